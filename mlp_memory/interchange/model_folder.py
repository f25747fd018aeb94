"""A model as a folder: `config.json`, safetensors in the Hugging Face layout, extra files.

What `save_model` wrote also has `mlp_memory.json`, which lists every tensor with its shape,
dtype and checksum; `config.json` comes last: a folder that has one is whole. Folders from
elsewhere have no such list and are read as they are.
"""

import contextlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from mlp_memory.artifacts import Directory, UserError, canonical_json, digest, first_line
from mlp_memory.interchange import safetensors_file
from mlp_memory.interchange.safetensors_file import TensorSpec

MAX_SHARD_BYTES = 5_000_000_000
FACTS = "mlp_memory.json"
_CONFIG, _SINGLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

CONVERT = (
    'convert it first, where you trust it: python -c "import sys, torch, safetensors.torch as s; '
    "s.save_file(torch.load(sys.argv[1], weights_only=True), 'model.safetensors')\" FILE"
)
"""How a pickle becomes a file that is read here."""


LazyArray = np.ndarray | Callable[[], np.ndarray]


def save_model(
    directory: Directory,
    config: Mapping[str, Any],
    tensors: Mapping[str, LazyArray],
    files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model; equal arguments give equal bytes.

    A folder that exists is taken over file by file: what an earlier save left is replaced
    or removed, files of other origin stay.

    Args:
      directory: where to; local folders are prepared beside it and moved into place.
      config: plain JSON, for `config.json`.
      tensors: arrays by name, of any shape; floats of 16 (bfloat16 too), 32 and 64 bits,
        integers of 8 to 64 bits, bool. Or functions that make them, each called twice, so
        that no more than one of them need be in memory.
      files: further files by plain name, such as `tokenizer.model`.
      max_shard_bytes: tensors beyond this many bytes go into several numbered files
        with an index; a larger tensor gets a file of its own.
      facts: more plain JSON, for `mlp_memory.json`; the keys `tensors` and `config_sha256`
        are added and must not be there.

    Raises:
      UserError: the folder cannot be written.
      ValueError: a dtype, tensor name, file name or config that cannot be stored.
    """
    files, facts = dict(files or {}), dict(facts or {})
    _check_arguments(facts, tensors, files)
    listed, shards = _plan(tensors, max_shard_bytes)
    config_bytes = canonical_json(config).encode()
    listing = {**facts, "tensors": listed, "config_sha256": digest(config_bytes)}
    files[FACTS] = canonical_json(listing).encode()
    if len(shards) > 1:
        weight_map = {name: file for file, specs in shards.items() for name in specs}
        total = sum(spec.nbytes for specs in shards.values() for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files[_INDEX] = canonical_json(index).encode()
    try:
        if directory.is_local:
            _write_local(directory.path, tensors, shards, files, config_bytes)
        else:
            _write_remote(directory, tensors, shards, files, config_bytes)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {first_line(error)}") from error


def _check_arguments(
    facts: Mapping[str, Any], tensors: Mapping[str, LazyArray], files: Mapping[str, bytes]
) -> None:
    if taken := sorted({"tensors", "config_sha256"} & set(facts)):
        raise ValueError(f"facts have a key {taken[0]!r}, which save_model adds")
    if "__metadata__" in tensors:
        raise ValueError("'__metadata__' cannot name a tensor in safetensors")
    for name in files:
        if name != Path(name).name or _is_ours(name) or name == "manifest.json":
            raise ValueError(f"file name {name!r} is not plain or is taken")
        if name.endswith(PICKLES):
            raise ValueError(f"file {name!r} would be taken for a pickle, which load_model refuses")


def _is_ours(name: str) -> bool:
    return name in (_CONFIG, _SINGLE, _INDEX, FACTS) or _SHARD.fullmatch(name) is not None


def make_as_saved(tensors: Mapping[str, LazyArray], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Calls the functions as `save_model` calls them, and writes nothing.

    For the processes that do not write, where a tensor comes into being only if all take part.
    """
    for specs in _plan(tensors, max_shard_bytes)[1].values():
        for name in safetensors_file.in_file_order(specs):
            _make(name, tensors)


def _make(name: str, tensors: Mapping[str, LazyArray]) -> np.ndarray:
    tensor = tensors[name]
    return safetensors_file.storable(name, np.asarray(tensor() if callable(tensor) else tensor))


def _plan(
    tensors: Mapping[str, LazyArray], max_shard_bytes: int
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, TensorSpec]]]:
    """The list for mlp_memory.json, and file name -> the tensors it holds, filled in name order."""
    listed, groups, filled = {}, [{}], 0
    for name in sorted(tensors):
        array = _make(name, tensors)
        spec = TensorSpec(array.shape, array.dtype.name)
        listed[name] = {"shape": list(spec.shape), "dtype": spec.dtype, "sha256": _checksum(array)}
        if groups[-1] and filled + array.nbytes > max_shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = spec
        filled += array.nbytes
    if len(groups) == 1:
        return listed, {_SINGLE: groups[0]}
    shards = enumerate(groups, 1)
    return listed, {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in shards}


def _checksum(array: np.ndarray) -> str:
    return digest(array.reshape(-1).view(np.uint8).data if array.size else b"")


def _write_local(
    target: Path,
    tensors: Mapping[str, LazyArray],
    shards: Mapping[str, Mapping[str, TensorSpec]],
    files: Mapping[str, bytes],
    config_bytes: bytes,
) -> None:
    partial = target.with_name(f".{target.name}.partial")
    # A killed save leaves its partial folder; it is worth nothing.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / _CONFIG).write_bytes(config_bytes)
    for file, data in files.items():
        (partial / file).write_bytes(data)
    for file, specs in shards.items():
        with (partial / file).open("wb") as opened:
            safetensors_file.write(opened, specs, lambda name: _make(name, tensors))
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        partial.replace(target)
        return
    # config.json goes first and comes last, so that no mixture of two models can be loaded.
    (target / _CONFIG).unlink(missing_ok=True)
    written = {*shards, *files}
    for old in sorted(target.iterdir()):
        if _is_ours(old.name) and old.name not in written:
            old.unlink()
    for file in [*sorted(written), _CONFIG]:
        (partial / file).replace(target / file)
    partial.rmdir()


def _write_remote(
    directory: Directory,
    tensors: Mapping[str, LazyArray],
    shards: Mapping[str, Mapping[str, TensorSpec]],
    files: Mapping[str, bytes],
    config_bytes: bytes,
) -> None:
    for old in [_CONFIG, *(name for name in directory.names() if _is_ours(name))]:
        directory.kvstore.write(old, None).result()
    for file, specs in shards.items():
        data = io.BytesIO()
        safetensors_file.write(data, specs, lambda name: _make(name, tensors))
        directory.write(file, data.getvalue())
    for file, data in files.items():
        directory.write(file, data)
    directory.write(_CONFIG, config_bytes)


class ModelFolder:
    """Tensors of a folder in the Hugging Face layout, read one by one.

    Attributes:
      config: what is in `config.json`; {} where there is none.
      facts: what `save_model` was given; None for a folder from elsewhere.
      specs: every tensor's shape and dtype, from the files' headers.

    Raises:
      UserError: a file is missing, truncated, damaged or a pickle; headers, index and list
        disagree on a tensor.
    """

    def __init__(self, directory: Directory):
        if directory.is_local and directory.path.is_file():
            raise UserError(f"{directory} is a file: give the folder that holds {_CONFIG}")
        self._directory = directory
        self._copies = None if directory.is_local else tempfile.TemporaryDirectory(prefix="mlp_memory_")
        names = directory.names()
        self.config, self.facts, self._listed = _read_lists(directory, names)
        self._again = "fetch it again" if self.facts is None else "export again"
        self.specs: dict[str, TensorSpec] = {}
        self._file_of: dict[str, str] = {}
        for file, mapped in self._weight_files(names).items():
            self._read_header(file, mapped)
        if missing := sorted(set(self._listed or ()) - set(self.specs)):
            shape = tuple(self._listed[missing[0]]["shape"])
            raise UserError(
                f"{directory}: tensor {missing[0]!r} of shape {shape} is in {FACTS}, in no file: export again"
            )

    def __str__(self) -> str:
        return str(self._directory)

    def read(self, name: str) -> np.ndarray:
        """One tensor; where the folder lists checksums, checked.

        Raises:
          UserError: its bytes are damaged.
        """
        where = f"{self._directory}/{self._file_of[name]}"
        # The file is mapped only while it is read, or its pages would count as memory in use.
        with self._opened(self._file_of[name]) as file:
            array = file.get_tensor(name)
        if self._listed is not None and _checksum(array) != self._listed[name]["sha256"]:
            raise UserError(f"{where}: tensor {name!r} is damaged (checksum): {self._again}")
        return array

    def _weight_files(self, names: list[str]) -> dict[str, set[str] | None]:
        """The safetensors files and, where there is an index, the tensors it says each holds."""
        if _SINGLE in names:
            return {_SINGLE: None}
        directory = self._directory
        if _INDEX not in names:
            _refuse_pickles(directory, names)
            raise UserError(f"{directory}/{_SINGLE} is missing: {self._again}")
        try:
            weight_map = json.loads(_read(directory, _INDEX) or b"")["weight_map"]
            held: dict[str, set[str] | None] = {}
            for tensor, file in sorted(weight_map.items()):
                held.setdefault(file, set()).add(tensor)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{directory}/{_INDEX} is damaged ({first_line(error)}): {self._again}"
            ) from error
        for file in held:
            if not isinstance(file, str) or not _SHARD.fullmatch(file):
                hint = CONVERT if str(file).endswith(PICKLES) else self._again
                raise UserError(
                    f"{directory}/{_INDEX} names {file!r}, not a numbered .safetensors file: {hint}"
                )
            if file not in names:
                raise UserError(f"{directory}/{file} is missing: {self._again}")
        return held

    def _read_header(self, file: str, mapped: set[str] | None) -> None:
        """Takes the file's tensors into `specs`, each checked against what is said of it elsewhere."""
        where, found = f"{self._directory}/{file}", {}
        with self._opened(file) as opened:
            for name in sorted(opened.keys()):
                view = opened.get_slice(name)
                dtype = safetensors_file.DTYPES.get(view.get_dtype(), view.get_dtype())
                found[name] = TensorSpec(tuple(view.get_shape()), dtype)
        if mapped is not None and (wrong := sorted(mapped ^ set(found))):
            raise UserError(
                f"{self._directory}/{_INDEX} and {file} disagree on tensor {wrong[0]!r}: {self._again}"
            )
        if twice := sorted(set(found) & set(self.specs)):
            raise UserError(f"{where}: tensor {twice[0]!r} is in two files: {self._again}")
        if self._listed is not None:
            for name, spec in found.items():
                _check_entry(where, name, spec, self._listed)
        self.specs.update(found)
        self._file_of.update(dict.fromkeys(found, file))

    @contextlib.contextmanager
    def _opened(self, file: str) -> Iterator[Any]:
        """The file by the library, which checks length, offsets and overlaps before it allocates."""
        path = self._local(file)
        try:
            with safetensors.safe_open(path, framework="numpy") as opened:
                yield opened
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{self._directory}/{file} is truncated or damaged ({first_line(error)}): {self._again}"
            ) from error

    def _local(self, file: str) -> Path:
        """A local path to the file; remote ones are copied once."""
        if self._copies is None:
            return self._directory.path / file
        path = Path(self._copies.name, file)
        if not path.exists():
            data = _read(self._directory, file)
            if data is None:
                raise UserError(f"{self._directory}/{file} is missing: {self._again}")
            path.write_bytes(data)
        return path


def load_model(directory: Directory) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads what `save_model` wrote.

    Returns:
      The config as it was given, and the arrays by name.

    Raises:
      UserError: the folder is not from `save_model` or is damaged (see `ModelFolder`).
    """
    folder = ModelFolder(directory)
    if folder.facts is None:
        raise UserError(f"{directory}/{FACTS} is missing: give a folder that export wrote")
    return folder.config, {name: folder.read(name) for name in sorted(folder.specs)}


def _read_lists(
    directory: Directory, names: list[str]
) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, dict[str, Any]] | None]:
    """config.json, the facts of mlp_memory.json, and its list of tensors (None, None where there is none)."""
    config_bytes = _read(directory, _CONFIG) if _CONFIG in names else None
    if config_bytes is None:
        _refuse_pickles(directory, names)
        raise UserError(f"{directory}/{_CONFIG} is missing: give a model's folder")
    config = _object(config_bytes, f"{directory}/{_CONFIG}")
    if FACTS not in names:
        return config, None, None
    facts = _object(_read(directory, FACTS) or b"", f"{directory}/{FACTS}")
    try:
        listed, config_sha256 = facts.pop("tensors"), facts.pop("config_sha256")
        for entry in listed.values():
            if not (
                isinstance(entry["dtype"], str)
                and isinstance(entry["sha256"], str)
                and all(type(n) is int for n in entry["shape"])
            ):
                raise TypeError("a tensor's entry has fields of wrong types")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{directory}/{FACTS} is damaged or not from export ({first_line(error)}): export again"
        ) from error
    if config_sha256 != digest(config_bytes):
        raise UserError(f"{directory}/{_CONFIG} is damaged (checksum): export again")
    return config, facts, listed


def _object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged ({first_line(error)}): make or fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{where} is damaged (no JSON object): make or fetch it again")
    return found


def _refuse_pickles(directory: Directory, names: list[str]) -> None:
    for name in names:
        if name.endswith(PICKLES):
            raise UserError(f"{directory}/{name} is a pickle, which can run code when opened: {CONVERT}")


def _read(directory: Directory, name: str) -> bytes | None:
    try:
        return directory.read(name)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {directory}/{name}: {first_line(error)}") from error


def _check_entry(where: str, name: str, found: TensorSpec, listed: Mapping[str, Mapping[str, Any]]) -> None:
    shape, dtype = found
    if name not in listed:
        raise UserError(f"{where}: tensor {name!r} of shape {shape} is not in {FACTS}: export again")
    wanted = tuple(listed[name]["shape"])
    if shape != wanted:
        raise UserError(f"{where}: tensor {name!r} has shape {shape}, {FACTS} says {wanted}: export again")
    if dtype != listed[name]["dtype"]:
        raise UserError(
            f"{where}: tensor {name!r} of shape {shape} is {dtype}, "
            f"{FACTS} says {listed[name]['dtype']} of shape {wanted}: export again"
        )
