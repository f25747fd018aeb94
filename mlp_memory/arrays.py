"""Arrays of an artifact: written chunk by whole chunk, read row by row.

Each array is a zarr3 array with crc32c on every chunk, or on every block that can be read alone.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import tensorstore as ts

from mlp_memory.artifacts import (
    ArraySpec,
    Directory,
    Manifest,
    UserError,
    as_dtype,
    canonical_json,
    chunk_key,
    digest,
    finish,
    first_line,
    peek,
)

_METADATA = "zarr.json"


def metadata(spec: ArraySpec) -> bytes:
    """What an array's zarr.json holds."""
    context = ts.Context()
    _open_at("memory://", spec, create=True, context=context)
    return bytes(ts.KvStore.open("memory://", context=context).result().read(_METADATA).result().value)


def _open(directory: Directory, name: str, spec: ArraySpec, create: bool) -> ts.TensorStore:
    try:
        # Metadata nested too deeply would overflow tensorstore's stack; Python's parser refuses them.
        json.loads((directory / name).read(_METADATA) or b"{}")
        return _open_at((directory / name).kvstore.spec().to_json(), spec, create)
    except (ValueError, NotImplementedError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{directory}/{name} is damaged: {first_line(error)}; delete {directory} and run again"
        ) from error


def _open_at(
    kvstore: Any, spec: ArraySpec, create: bool, context: ts.Context | None = None
) -> ts.TensorStore:
    checked = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    blocks = {
        "chunk_shape": [spec.block_rows, *spec.chunk_shape[1:]],
        "codecs": checked,
        "index_codecs": checked,
        "index_location": "end",
    }
    found = {
        "driver": "zarr3",
        "kvstore": kvstore,
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": create,
        "metadata": {
            "shape": list(spec.shape),
            "data_type": str(as_dtype(spec.dtype)),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(spec.chunk_shape)}},
            "codecs": [{"name": "sharding_indexed", "configuration": blocks}] if spec.block_rows else checked,
        },
    }
    return ts.open(found, open=True, create=create, context=context).result()


def written_chunks(directory: Directory) -> set[int]:
    """The chunks that have been written of an unfinished array artifact, by whomever."""
    names = (name.removesuffix(".json") for name in (directory / "chunks").names())
    return {int(name) for name in names if name.isdecimal() and len(name) <= 18}


def _mark(chunk: int) -> str:
    return f"chunks/{chunk:08d}.json"


def _layout(spec: ArraySpec) -> tuple[Any, ...]:
    """What two arrays must have alike for their chunks to be the same files."""
    return spec.dtype, spec.chunk_shape, spec.block_rows


class ChunkWriter:
    """Writes an artifact's arrays chunk by whole chunk; knows which are still missing.

    A chunk counts as written once its mark (`chunks/NNN.json`, the checksums) is there,
    and the mark is written last. All arrays share the first axis and its chunking.
    """

    def __init__(self, directory: Directory, manifest: Manifest):
        specs = list(manifest.arrays.values())
        if len({(s.shape[0], s.chunk_shape[0]) for s in specs}) != 1:
            raise ValueError("arrays of one artifact share rows and chunk rows")
        self.directory, self.manifest = directory, manifest
        self.rows_total, self.chunk_rows = specs[0].shape[0], specs[0].chunk_shape[0]
        self._stores = {n: _open(directory, n, s, create=True) for n, s in manifest.arrays.items()}
        self._marks = {chunk: mark for chunk in written_chunks(directory) if (mark := self._read_mark(chunk))}

    def __len__(self) -> int:
        return -(-self.rows_total // self.chunk_rows)

    def _read_mark(self, chunk: int) -> dict[str, str] | None:
        """The checksums of a chunk; None where the mark is damaged, and the chunk is written again."""
        try:
            found = json.loads(self.directory.read(_mark(chunk)) or b"")
        except (ValueError, RecursionError):
            return None
        names = self.manifest.arrays
        whole = isinstance(found, dict) and all(isinstance(found.get(name), str) for name in names)
        return {name: found[name] for name in names} if whole else None

    def rows(self, chunk: int) -> tuple[int, int]:
        """First row and one past the last row of a chunk."""
        return chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.rows_total)

    def missing(self) -> list[int]:
        return [c for c in range(len(self)) if c not in self._marks]

    def write(self, chunk: int, **arrays: np.ndarray) -> None:
        """Writes one whole chunk of every array.

        Raises:
          UserError: a value is not finite, or the disk refuses.
        """
        start, stop = self.rows(chunk)
        pending, marks = [], {}
        for name, spec in self.manifest.arrays.items():
            value = np.ascontiguousarray(arrays[name], dtype=as_dtype(spec.dtype))
            if value.shape != (stop - start, *spec.shape[1:]):
                raise ValueError(f"{name}: {value.shape} written to rows {start}:{stop} of {spec.shape}")
            if value.dtype.kind == "f" or spec.dtype == "bfloat16":
                bad = ~np.isfinite(value.reshape(len(value), -1)).all(axis=1)
                if bad.any():
                    raise UserError(f"{self.directory}/{name}: row {start + int(bad.argmax())} is not finite")
            marks[name] = digest(value.view(np.uint8).data if value.size else b"")
            pending.append(self._stores[name][start:stop].write(value))
        try:
            for future in pending:
                future.result()
        except ValueError as error:
            raise UserError(f"cannot write {self.directory}: {first_line(error)}") from error
        self._mark_written(chunk, marks)

    def adopt(self, source: Directory, found: Manifest, same: Callable[[int, int], bool]) -> None:
        """Takes over whole chunks of another artifact that are still missing here.

        None where its arrays lie on disk otherwise.

        Args:
          source: its folder.
          found: its manifest, finished, with arrays of the same names.
          same: whether rows start..stop, which the other has, are alike in both.
        """
        here, there = self.manifest.arrays, found.arrays
        if any(_layout(here[name]) != _layout(there[name]) for name in here):
            return
        rows = next(iter(there.values())).shape[0]
        for chunk in self.missing():
            start = self.rows(chunk)[0]
            if start + self.chunk_rows > rows or not same(start, start + self.chunk_rows):
                continue
            for name, spec in here.items():
                (self.directory / name).take(chunk_key(spec, chunk), source / name)
            marks = {name: found.checksums[name][chunk] for name in here}
            self._mark_written(chunk, marks)

    def _mark_written(self, chunk: int, marks: dict[str, str]) -> None:
        self.mark(self.directory, chunk, marks)
        self._marks[chunk] = marks

    @staticmethod
    def mark(directory: Directory, chunk: int, marks: dict[str, str]) -> None:
        """Declares a chunk written: the checksum of each array's."""
        directory.write(_mark(chunk), canonical_json(marks).encode())

    def finish(self, **facts: Any) -> Manifest:
        """Declares the artifact whole; the marks move into the manifest."""
        if self.missing():
            raise ValueError(f"chunks {self.missing()[:5]} are missing")
        checksums = {name: [self._marks[c][name] for c in range(len(self))] for name in self.manifest.arrays}
        return finish(self.directory, dataclasses.replace(self.manifest, checksums=checksums), **facts)


class Rows(Protocol):
    """What has rows, shape [N, ...]: an `ArrayReader`, a NumPy array, a `KeyStore`."""

    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> np.ndarray: ...


class ArrayReader:
    """Rows of one finished array, `reader[a:b]`, as NumPy; decoded chunks are cached.

    Args:
      directory: of the artifact.
      name: of the array.
      cache_bytes: of the chunks kept.
      manifest: of the artifact; read if None.

    Raises:
      UserError: on a chunk that is damaged (crc32c) or gone.
    """

    def __init__(
        self,
        directory: Directory,
        name: str,
        cache_bytes: int = 1 << 30,
        manifest: Manifest | None = None,
    ):
        manifest = manifest or peek(directory)
        if manifest is None or name not in manifest.arrays:
            raise UserError(f"{directory} has no array {name!r}")
        self.spec = manifest.arrays[name]
        self.shape, self.dtype = self.spec.shape, as_dtype(self.spec.dtype)
        self._what, self._directory = f"{directory}/{name}", directory
        self._location, self._name, self._cache_bytes = directory.location, name, cache_bytes
        self._store = None

    @property
    def store(self) -> ts.TensorStore:
        if self._store is None:
            context = ts.Context({"cache_pool": {"total_bytes_limit": self._cache_bytes}})
            spec = _open(self._directory, self._name, self.spec, create=False).spec()
            self._store = ts.open(spec, context=context, open=True).result()
        return self._store

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        try:
            return np.asarray(self.store[rows].read().result())
        except ValueError as error:
            raise UserError(
                f"{self._what} is damaged: {first_line(error)}; delete its folder and run again"
            ) from error
