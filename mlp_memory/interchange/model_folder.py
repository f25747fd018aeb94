"""A model as a folder: `config.json`, safetensors in the Hugging Face layout, extra files.

`config.json` lists every tensor with its shape, dtype and checksum, and is written last:
a folder that has one is whole, and what `load_model` returns is what was saved.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from mlp_memory.artifacts import Directory, UserError, canonical_json, digest, first_line

MAX_SHARD_BYTES = 5_000_000_000
_CONFIG, _SINGLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# Loaders elsewhere (transformers) refuse a file that does not name a framework they know.
# A second key must not join it: the library writes several in an order that changes.
_METADATA = {"format": "pt"}
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def save_model(
    directory: Directory,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model; equal arguments give equal bytes.

    A folder that exists is taken over file by file: what an earlier save left is replaced
    or removed, files of other origin stay.

    Args:
      directory: where to; local folders are prepared beside it and moved into place.
      config: plain JSON; the key `tensors` is added and must not be there.
      tensors: arrays by name, of any shape; floats of 16 (bfloat16 too), 32 and 64 bits,
        integers of 8 to 64 bits, bool.
      files: further files by plain name, such as `tokenizer.model`.
      max_shard_bytes: tensors beyond this many bytes go into several numbered files
        with an index; a larger tensor gets a file of its own.

    Raises:
      UserError: the folder cannot be written.
      ValueError: a dtype, tensor name, file name or config that cannot be stored.
    """
    files = dict(files or {})
    _check_arguments(config, tensors, files)
    arrays = {name: _storable(name, tensors[name]) for name in sorted(tensors)}
    shards = _shards(arrays, max_shard_bytes)
    listed = {
        name: {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": _checksum(array)}
        for name, array in arrays.items()
    }
    config_bytes = canonical_json({**config, "tensors": listed}).encode()
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        total = sum(array.nbytes for array in arrays.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files[_INDEX] = canonical_json(index).encode()
    try:
        if directory.is_local:
            _write_local(directory.path, arrays, shards, files, config_bytes)
        else:
            _write_remote(directory, arrays, shards, files, config_bytes)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write {directory}: {first_line(error)}") from error


def load_model(directory: Directory) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads what `save_model` wrote.

    Returns:
      The config as it was given (without `tensors`), and the arrays by name.

    Raises:
      UserError: a file is missing, truncated, damaged or a pickle; a tensor is missing,
        surplus, of another shape or dtype than the config says, or has other values.
    """
    config, listed = _read_config(directory)
    held = _weight_files(directory)
    tensors: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory(prefix="mlp_memory_") as folder:
        for file, mapped in held.items():
            path = _fetch(directory, file, Path(folder))
            found = _read_file(path, f"{directory}/{file}", listed)
            if mapped is not None and (wrong := sorted(mapped ^ set(found))):
                raise UserError(
                    f"{directory}/{_INDEX} and {file} disagree on where tensor {wrong[0]!r} is: export again"
                )
            if twice := sorted(set(found) & set(tensors)):
                raise UserError(f"{directory}/{file}: tensor {twice[0]!r} is in two files: export again")
            tensors.update(found)
    if missing := sorted(set(listed) - set(tensors)):
        shape = tuple(listed[missing[0]]["shape"])
        raise UserError(
            f"{directory}: tensor {missing[0]!r} of shape {shape} is in {_CONFIG}, in no file: export again"
        )
    return config, {name: tensors[name] for name in sorted(tensors)}


def _check_arguments(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], files: Mapping[str, bytes]
) -> None:
    if "tensors" in config:
        raise ValueError("config has a key 'tensors', which save_model adds")
    if "__metadata__" in tensors:
        raise ValueError("'__metadata__' cannot name a tensor in safetensors")
    for name in files:
        if name != Path(name).name or _is_ours(name) or name == "manifest.json":
            raise ValueError(f"file name {name!r} is not plain or is taken")
        if name.endswith(_PICKLES):
            raise ValueError(f"file {name!r} would be taken for a pickle, which load_model refuses")


def _is_ours(name: str) -> bool:
    return name in (_CONFIG, _SINGLE, _INDEX) or _SHARD.fullmatch(name) is not None


def _storable(name: str, array: np.ndarray) -> np.ndarray:
    """The array, little-endian and contiguous (`np.ascontiguousarray` would turn [] into [1])."""
    array = np.asarray(array)
    if array.dtype.name not in _DTYPES.values():
        raise ValueError(f"tensor {name!r}: dtype {array.dtype.name} cannot be stored")
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def _checksum(array: np.ndarray) -> str:
    return digest(array.reshape(-1).view(np.uint8).data if array.size else b"")


def _shards(arrays: Mapping[str, np.ndarray], max_shard_bytes: int) -> dict[str, list[str]]:
    """File name -> the tensors it holds, filled in the order of the names."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, array in arrays.items():
        if groups[-1] and filled + array.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += array.nbytes
    if len(groups) == 1:
        return {_SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _write_local(
    target: Path,
    arrays: Mapping[str, np.ndarray],
    shards: Mapping[str, list[str]],
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
    for file, names in shards.items():
        safetensors.numpy.save_file({n: arrays[n] for n in names}, partial / file, metadata=_METADATA)
        # The library's files are for their owner alone, whatever the umask.
        shutil.copymode(partial / _CONFIG, partial / file)
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
    arrays: Mapping[str, np.ndarray],
    shards: Mapping[str, list[str]],
    files: Mapping[str, bytes],
    config_bytes: bytes,
) -> None:
    for old in [_CONFIG, *(name for name in directory.names() if _is_ours(name))]:
        directory.kvstore.write(old, None).result()
    for file, names in shards.items():
        directory.write(file, safetensors.numpy.save({n: arrays[n] for n in names}, metadata=_METADATA))
    for file, data in files.items():
        directory.write(file, data)
    directory.write(_CONFIG, config_bytes)


def _read_config(directory: Directory) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """config.json without its tensor list, and that list."""
    if directory.is_local and directory.path.is_file():
        raise UserError(f"{directory} is a file: give the folder that holds {_CONFIG}")
    data = _read(directory, _CONFIG)
    if data is None:
        _refuse_pickles(directory)
        raise UserError(f"{directory}/{_CONFIG} is missing: give a folder that export wrote")
    try:
        config = json.loads(data)
        listed = config.pop("tensors")
        for entry in listed.values():
            if not (
                isinstance(entry["dtype"], str)
                and isinstance(entry["sha256"], str)
                and all(type(n) is int for n in entry["shape"])
            ):
                raise TypeError("a tensor's entry has fields of wrong types")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{directory}/{_CONFIG} is damaged or not from export ({first_line(error)}): export again"
        ) from error
    return config, listed


def _weight_files(directory: Directory) -> dict[str, set[str] | None]:
    """The safetensors files and, where there is an index, the tensors it says each holds."""
    names = directory.names()
    if _SINGLE in names:
        return {_SINGLE: None}
    if _INDEX not in names:
        _refuse_pickles(directory)
        raise UserError(f"{directory}/{_SINGLE} is missing: export again")
    try:
        weight_map = json.loads(_read(directory, _INDEX) or b"")["weight_map"]
        held: dict[str, set[str] | None] = {}
        for tensor, file in sorted(weight_map.items()):
            held.setdefault(file, set()).add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{directory}/{_INDEX} is damaged ({first_line(error)}): export again") from error
    for file in held:
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            hint = "convert it to safetensors" if str(file).endswith(_PICKLES) else "export again"
            raise UserError(f"{directory}/{_INDEX} names {file!r}, not a numbered .safetensors file: {hint}")
        if file not in names:
            raise UserError(f"{directory}/{file} is missing: export again")
    return held


def _refuse_pickles(directory: Directory) -> None:
    for name in directory.names():
        if name.endswith(_PICKLES):
            raise UserError(
                f"{directory}/{name} is a pickle, which can run code when opened: convert it to safetensors"
            )


def _read(directory: Directory, name: str) -> bytes | None:
    if directory.is_local and not directory.path.is_dir():
        return None
    try:
        return directory.read(name)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {directory}/{name}: {first_line(error)}") from error


def _fetch(directory: Directory, file: str, folder: Path) -> Path:
    """A local path to the file; remote ones are copied to `folder`, each over the last."""
    if directory.is_local:
        return directory.path / file
    data = _read(directory, file)
    if data is None:
        raise UserError(f"{directory}/{file} is missing: export again")
    path = folder / "shard.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def _read_file(path: Path, where: str, listed: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The file's tensors, each checked against its entry in the config before it is read."""
    found = {}
    try:
        # The library checks the header's length, offsets and overlaps against the file
        # before it allocates.
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in sorted(file.keys()):
                view = file.get_slice(name)
                shape, dtype = tuple(view.get_shape()), _DTYPES.get(view.get_dtype(), view.get_dtype())
                _check_entry(where, name, shape, dtype, listed)
                found[name] = file.get_tensor(name)
                if _checksum(found[name]) != listed[name]["sha256"]:
                    raise UserError(f"{where}: tensor {name!r} is damaged (checksum): export again")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{where} is truncated or damaged ({first_line(error)}): export again") from error
    return found


def _check_entry(
    where: str, name: str, shape: tuple[int, ...], dtype: str, listed: Mapping[str, Mapping[str, Any]]
) -> None:
    if name not in listed:
        raise UserError(f"{where}: tensor {name!r} of shape {shape} is not in {_CONFIG}: export again")
    wanted = tuple(listed[name]["shape"])
    if shape != wanted:
        raise UserError(f"{where}: tensor {name!r} has shape {shape}, {_CONFIG} says {wanted}: export again")
    if dtype != listed[name]["dtype"]:
        raise UserError(
            f"{where}: tensor {name!r} of shape {shape} is {dtype}, "
            f"{_CONFIG} says {listed[name]['dtype']} of shape {wanted}: export again"
        )
