"""Manifests and array schemas: the only thing that stages share.

An artifact is a folder (local path, `gs://` or `s3://`) with a `manifest.json` and, for
array artifacts, one zarr3 array per name (`arrays` writes and reads them). The manifest is
written twice: unfinished when work starts, finished when every chunk is in place, so a
reader sees a whole artifact or none. Nothing in it depends on the clock or the machine:
an interrupted and an uninterrupted run end in the same bytes.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

SCHEMA = 1
_BLOCK_BYTES = 1 << 19
MANIFEST = "manifest.json"
"""The file of an artifact that says what it is, written first and last."""
SEAL = "checksums.json"
"""The file that says what is in a finished folder beside its arrays."""
LOGS = ("tensorboard",)
"""Folders of an artifact that hold no part of its result."""
_ON_THE_WAY = ("chunks", "steps", "units")


class UserError(Exception):
    """Something the person at the keyboard can mend: one line, shown without a traceback.

    What a file put into the message stays text: line ends and controls of a terminal are written as escapes.
    """

    def __init__(self, message: str):
        shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__("".join(shown))


class Directory:
    """A folder behind a path or URL. Single writes are atomic on every backend."""

    def __init__(self, location: str | os.PathLike):
        location = os.fspath(location)
        if location.startswith("file://"):
            location = location[len("file://") :]
        scheme = re.match(r"^([a-z0-9]+)://", location)
        if scheme and scheme.group(1) not in ("gs", "s3"):
            raise UserError(f"{location!r}: only local paths, file://, gs:// and s3:// are supported")
        self.is_local = scheme is None
        self.location = str(Path(location).expanduser().absolute()) if self.is_local else location.rstrip("/")
        self._kvstore = None

    def __str__(self) -> str:
        return self.location

    def __truediv__(self, name: str) -> "Directory":
        return Directory(f"{self.location}/{name}")

    @property
    def path(self) -> Path:
        """The local path; raises `UserError` where the folder is not local."""
        if not self.is_local:
            raise UserError(f"{self.location} is not on this machine; this needs a local folder")
        return Path(self.location)

    @property
    def kvstore(self) -> ts.KvStore:
        if self._kvstore is None:
            url = f"file://{self.location}/" if self.is_local else f"{self.location}/"
            self._kvstore = ts.KvStore.open(_quote(url) if self.is_local else url).result()
        return self._kvstore

    def read(self, name: str) -> bytes | None:
        """The bytes under `name`, or None."""
        result = self.kvstore.read(name).result()
        return bytes(result.value) if result.state == "value" else None

    def write(self, name: str, data: bytes) -> None:
        try:
            self.kvstore.write(name, data).result()
        except ValueError as error:  # tensorstore's word for a full disk or a refused write
            raise UserError(f"cannot write {self.location}/{name}: {first_line(error)}") from error

    def take(self, name: str, source: "Directory") -> None:
        """Has the file `name` of another folder here as well: one file under two names on a local
        disk, which every writer replaces and none changes; a copy elsewhere.

        Raises:
          UserError: it is not there, or this folder cannot be written.
        """
        if self.is_local and source.is_local:
            target = self.path / name
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                os.link(source.path / name, target)
                return
            except FileNotFoundError as error:
                raise UserError(f"{source}/{name} is gone") from error
            except OSError:  # another disk, or one that has no such links: a copy
                pass
        if (data := source.read(name)) is None:
            raise UserError(f"{source}/{name} is gone")
        self.write(name, data)

    def take_all(self, source: "Directory", without: str = "") -> None:
        """`take`s the files of another folder that are missing here, manifests last, all but `without`."""
        missing = set(source.names()) - set(self.names()) - {without}
        for name in sorted(missing, key=lambda name: (name.endswith(MANIFEST), name)):
            self.take(name, source)

    def names(self) -> list[str]:
        """Every key below this folder, sorted; writers' lock files left out."""
        if self.is_local and not self.path.is_dir():
            return []
        keys = (key.decode() for key in self.kvstore.list().result())
        return sorted(key for key in keys if not key.endswith(".__lock"))

    def folders(self) -> list[str]:
        """The folders directly below this one, sorted; a local disk is not searched any deeper."""
        if self.is_local:
            return sorted(p.name for p in self.path.iterdir() if p.is_dir()) if self.path.is_dir() else []
        return sorted({name.split("/")[0] for name in self.names() if "/" in name})

    def delete(self) -> None:
        """Removes the folder and all below it."""
        if self.is_local:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.kvstore.delete_range(ts.KvStore.KeyRange()).result()

    def delete_file(self, name: str) -> None:
        """Removes one file, if it is there."""
        self.kvstore.write(name, None).result()

    def size(self) -> int | None:
        """Bytes on disk; None where the folder is remote."""
        if not self.is_local:
            return None
        return sum(p.stat().st_size for p in self.path.rglob("*") if p.is_file())


def _quote(url: str) -> str:
    from urllib.parse import quote

    return quote(url, safe="/:")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for messages that must stay on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """How an array lies on disk: chunks, written whole, of blocks that can be read alone.

    Attributes:
      shape: [rows, ...].
      dtype: NumPy's name or ml_dtypes'.
      chunk_rows: rows per chunk, each a file.
      block_rows: rows per block; 0 where the chunk is one.
    """

    shape: tuple[int, ...]
    dtype: str
    chunk_rows: int
    block_rows: int = 0

    @classmethod
    def in_blocks(cls, shape: tuple[int, ...], dtype: str, chunk_rows: int) -> "ArraySpec":
        """With blocks of half a mebibyte or less, for arrays whose rows are read at random."""
        spec = cls(shape, dtype, chunk_rows)
        whole = spec.chunk_shape[0]
        row_bytes = math.prod(shape[1:]) * as_dtype(dtype).itemsize
        fitting = (
            rows for rows in range(1, whole + 1) if whole % rows == 0 and rows * row_bytes <= _BLOCK_BYTES
        )
        block_rows = max(fitting, default=1)
        return spec if block_rows == whole else dataclasses.replace(spec, block_rows=block_rows)

    def check(self, name: str) -> None:
        """Raises `ValueError` for what no array of that name can be."""
        if not re.fullmatch(r"[A-Za-z0-9_]{1,80}", name):
            raise ValueError(f"an array is named {name!r}")
        counts = (*self.shape, self.chunk_rows, self.block_rows)
        if not self.shape or not all(type(n) is int and 0 <= n < 1 << 48 for n in counts):
            raise ValueError(f"{name} has shape {self.shape}")
        known = self.dtype == "bfloat16" or as_dtype(self.dtype).kind in "biuf"
        if not known or math.prod(map(float, self.shape)) >= 1 << 60:
            raise ValueError(f"{name} is {self.dtype} of shape {self.shape}")
        if not self.chunk_rows or (self.block_rows and self.chunk_shape[0] % self.block_rows):
            raise ValueError(f"{name} has chunks of {self.chunk_rows} rows, blocks of {self.block_rows}")

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return (min(self.chunk_rows, max(self.shape[0], 1)), *self.shape[1:])

    def chunk_bytes(self, chunk: int) -> int:
        """Bytes of a stored chunk: little-endian values with 4 bytes of crc32c, or so many blocks and
        their index, 16 bytes a block and 4 of crc32c. Of the last chunk only blocks with rows are stored.
        """
        whole, row_bytes = self.chunk_shape[0], math.prod(self.shape[1:]) * as_dtype(self.dtype).itemsize
        if not self.block_rows:
            return whole * row_bytes + 4
        rows = min(whole, self.shape[0] - chunk * whole)
        blocks = -(-rows // self.block_rows)
        return blocks * (self.block_rows * row_bytes + 4) + whole // self.block_rows * 16 + 4


def as_dtype(name: str) -> np.dtype:
    """The NumPy dtype of that name, bfloat16 included."""
    return np.dtype(getattr(ml_dtypes, name)) if name == "bfloat16" else np.dtype(name)


class _Facts(dict):
    """What a manifest that was read says: a name that is not there is for the user to mend."""

    def __missing__(self, name: str) -> Any:
        raise UserError(f"a manifest lacks {name!r}: delete its folder and run the stage again")


@dataclasses.dataclass
class Manifest:
    """What an artifact is, what it was made from and with, and whether it is whole.

    `checksums` maps an array to the sha256 (16 hex digits) of each of its chunks' values.
    `facts` is what the stage found out (counts, recall, perplexities): plain JSON.
    """

    kind: str
    config: dict[str, Any]
    parents: dict[str, str]
    arrays: dict[str, ArraySpec] = dataclasses.field(default_factory=dict)
    finished: bool = False
    checksums: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def fingerprint(self) -> str:
        """12 hex digits over everything in the manifest."""
        return digest(self.to_json().encode())[:12]

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        for spec in fields["arrays"].values():
            if not spec["block_rows"]:  # arrays without blocks are written as before there were any
                del spec["block_rows"]
        return canonical_json(fields)

    @classmethod
    def from_json(cls, text: str, where: str) -> "Manifest":
        try:
            fields = json.loads(text, parse_float=_finite, parse_constant=_finite)
            if fields["schema"] != SCHEMA:
                raise UserError(
                    f"{where} has schema {fields['schema']}, this version reads {SCHEMA}: "
                    "make it again or use the version that made it"
                )
            arrays = {
                name: ArraySpec(tuple(s["shape"]), s["dtype"], s["chunk_rows"], s.get("block_rows", 0))
                for name, s in fields.pop("arrays").items()
            }
            manifest = cls(arrays=arrays, **fields)
            for name in ("config", "parents", "checksums", "facts"):
                if not isinstance(getattr(manifest, name), dict):
                    raise TypeError(f"{name} is no table")
            for name, spec in arrays.items():
                spec.check(name)
            manifest.facts, manifest.config = _Facts(manifest.facts), _Facts(manifest.config)
            return manifest
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{where} is damaged ({first_line(error)}): delete its folder and run the stage again"
            ) from error


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


def canonical_json(value: Any) -> str:
    """JSON in the one form used on disk: sorted keys, no NaN, a last newline."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n"


def digest(data: bytes | memoryview) -> str:
    """16 hex digits of sha256."""
    return hashlib.sha256(data).hexdigest()[:16]


def config_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON, less the fields marked `runtime()`.

    Those change how fast or how visibly a result is made, never the result, so they
    do not enter the manifest and a finished artifact survives their change. A field marked
    `later()` is left out at its default: what was made before there was such a field stays valid.
    """
    values = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if not f.metadata.get("runtime")
        and not (f.metadata.get("later") and getattr(config, f.name) == f.default)
    }
    return json.loads(json.dumps(values, default=config_dict))  # configs within it likewise


def runtime(default: Any) -> Any:
    """A dataclass field that cannot change a result (see `config_dict`)."""
    return dataclasses.field(default=default, metadata={"runtime": True})


def later(default: Any) -> Any:
    """A dataclass field that was added when artifacts without it existed (see `config_dict`)."""
    return dataclasses.field(default=default, metadata={"later": True})


def peek(directory: Directory) -> Manifest | None:
    """The manifest, finished or not; None where there is none."""
    data = directory.read(MANIFEST) if not directory.is_local or directory.path.is_dir() else None
    return (
        None if data is None else Manifest.from_json(data.decode(errors="replace"), f"{directory}/{MANIFEST}")
    )


def begin(
    directory: Directory,
    kind: str,
    config: Mapping[str, Any],
    parents: Mapping[str, str],
    arrays: Mapping[str, ArraySpec] | None = None,
    writes: bool = True,
) -> Manifest:
    """Starts an artifact or takes up an earlier start of the same one.

    Args:
      directory: of the artifact.
      kind: what it is.
      config: settings that decide its bytes.
      parents: fingerprints of what it is made from, by name.
      arrays: their shapes, by name.
      writes: False in a process for which another one of its job writes.

    Raises:
      UserError: the folder holds the same kind of artifact made with another config or
        from other parents.
    """
    fresh = Manifest(kind, dict(config), dict(parents), dict(arrays or {}))
    found = peek(directory)
    if found is None and not writes:
        return fresh
    if found is None:
        try:
            directory.write(MANIFEST, fresh.to_json().encode())
        except ValueError as error:
            raise UserError(f"cannot write to {directory}: {first_line(error)}") from error
        return fresh
    require_same(directory, found, fresh)
    return found


def require_same(directory: Directory, found: Manifest, wanted: Manifest) -> None:
    """Raises `UserError` unless `found` was made with the config and parents of `wanted`."""
    for name, now in wanted.parents.items():
        before = found.parents.get(name)
        if before != now:
            raise UserError(
                f"{directory} was made from {name} {before}, this {name} is {now}: "
                f"delete {directory} to make it again, or point --workdir elsewhere"
            )
    if difference := _first_difference(found.config, wanted.config):
        key, before, now = difference
        raise UserError(
            f"{directory} was made with {key} = {before!r}, now it is {now!r}: "
            f"delete {directory} to make it again, or point --workdir elsewhere"
        )
    if wanted.arrays and found.arrays != wanted.arrays:
        raise UserError(f"{directory} holds arrays of other shapes: delete it to make it again")


def _first_difference(a: Any, b: Any, prefix: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            found = _first_difference(a.get(key), b.get(key), f"{prefix}.{key}".lstrip("."))
            if found:
                return found
        return None
    return None if a == b else (prefix, a, b)


def finish(directory: Directory, manifest: Manifest, **facts: Any) -> Manifest:
    """Declares the artifact whole: the manifest's last write. What was needed on the way goes."""
    done = dataclasses.replace(
        manifest, finished=True, facts=json.loads(canonical_json({**manifest.facts, **facts}))
    )
    seal(directory, done)
    directory.write(MANIFEST, done.to_json().encode())
    sweep(directory)
    return done


def seal(directory: Directory, manifest: Manifest) -> None:
    """Writes checksums.json: the manifest once more, and what the folder's other files are (`Seal`).

    Chunks of arrays are in the manifest, and artifacts within the folder have seals of their own. A
    file whose checksum the manifest has (a shard's) is not read once more.
    """
    names = directory.names()
    within = [name.removesuffix(f"/{SEAL}") for name in names if name.endswith(f"/{SEAL}")]
    known = {name: found[0] for name, found in manifest.checksums.items() if name not in manifest.arrays}
    files = {
        name: known.get(name) or file_digest(directory, name) for name in sealed(names, manifest, within)
    }
    directory.write(SEAL, Seal(files, manifest.to_json(), within).to_json().encode())


def reseal(directory: Directory, manifest: Manifest) -> None:
    """Writes a finished artifact's checksums.json where it is lost or damaged, of the files as they are."""
    with contextlib.suppress(ValueError):
        if Seal.read(directory) is not None:
            return
    seal(directory, manifest)


def sealed(names: Iterable[str], manifest: Manifest, within: Iterable[str]) -> list[str]:
    """Those of a folder's files that its seal speaks for: no chunks, logs or files of artifacts within."""
    others = [f"{name}/c" for name in manifest.arrays] + [*_ON_THE_WAY, *LOGS, *within]
    outside = tuple(f"{name}/" for name in others)
    return [name for name in names if not name.startswith(outside) and name not in (MANIFEST, SEAL)]


def write_sealed(directory: Directory, name: str, text: str, *others: str) -> None:
    """Writes the one text that matters of a folder without a manifest, and before it its checksums.json.

    A kill between the two leaves a text that its seal holds anew. `others` are files that the
    seal speaks for as well, where they are there.
    """
    data = text.encode()
    files = {other: file_digest(directory, other) for other in others}
    there = {other: found for other, found in files.items() if found is not None}
    directory.write(SEAL, Seal({name: digest(data), **there}, text).to_json().encode())
    directory.write(name, data)


@dataclasses.dataclass(frozen=True)
class Seal:
    """What a finished folder holds.

    Attributes:
      files: sha256 (16 hex digits) of each file, by name.
      manifest: its manifest's text; of a workdir its config.gin.
      within: artifacts in folders of it, which have seals of their own.
    """

    files: dict[str, str]
    manifest: str
    within: list[str] = dataclasses.field(default_factory=list)

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        return canonical_json(fields | {"digest": digest(canonical_json(fields).encode())})

    @classmethod
    def read(cls, directory: Directory) -> "Seal | None":
        """That of a folder; None where it has none, as those made by earlier versions.

        Raises:
          ValueError: it is not as it was written.
        """
        data = directory.read(SEAL)
        if data is None:
            return None
        try:
            fields = json.loads(data)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not isinstance(fields, dict) or not isinstance(fields.get("files"), dict):
            raise ValueError("no table of files")
        found = cls(fields["files"], fields.get("manifest"), fields.get("within"))
        if not isinstance(found.manifest, str) or found.to_json().encode() != data:
            raise ValueError("not as it was written")
        return found


def file_digest(directory: Directory, name: str) -> str | None:
    """16 hex digits of a file's sha256; None where it is not there."""
    if not directory.is_local:
        data = directory.read(name)
        return None if data is None else digest(data)
    try:
        with (directory.path / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except FileNotFoundError:
        return None


def sweep(directory: Directory) -> None:
    """Removes what a finished artifact needed while it was made and a kill may have left."""
    for name in _ON_THE_WAY:
        if not directory.is_local or (directory.path / name).is_dir():
            (directory / name).delete()
    if directory.is_local:
        for lock in directory.path.rglob("*.__lock"):
            lock.unlink(missing_ok=True)


def require(directory: Directory, stage: str) -> Manifest:
    """The finished manifest of a parent, its chunk files checked for presence and length.

    Raises:
      UserError: it is missing, unfinished or visibly damaged; `stage` is what to run.
    """
    manifest = peek(directory)
    if manifest is None or not manifest.finished:
        state = "is missing" if manifest is None else "is unfinished"
        raise UserError(f"{directory} {state}: run `python -m mlp_memory {stage}` first")
    if directory.is_local:
        for name, spec in manifest.arrays.items():
            for chunk in range(chunk_count(spec)):
                file = directory.path / name / chunk_key(spec, chunk)
                size = file.stat().st_size if file.is_file() else None
                if size != (wanted := spec.chunk_bytes(chunk)):
                    what = "is missing" if size is None else f"has {size} bytes, not {wanted}"
                    raise UserError(f"{file} {what}: delete {directory} and run `{stage}` again")
    return manifest


def chunk_count(spec: ArraySpec) -> int:
    """Chunks along the first axis."""
    return -(-spec.shape[0] // spec.chunk_shape[0])


def chunk_key(spec: ArraySpec, chunk: int) -> str:
    """The file of a chunk, below the array's folder."""
    return "c/" + "/".join([str(chunk)] + ["0"] * (len(spec.shape) - 1))
