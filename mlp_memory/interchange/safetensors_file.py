"""A .safetensors file written tensor by tensor: the library wants all of a file's in memory, twice.

The bytes are the library's own. Reading is left to it.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from typing import BinaryIO, NamedTuple

import numpy as np

from mlp_memory.artifacts import as_dtype

DTYPES = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""The format's dtypes and NumPy's names, in the order in which a file holds them: aligned, widest first."""

# Loaders elsewhere (transformers) refuse a file that does not name a framework they know.
_METADATA = {"format": "pt"}


class TensorSpec(NamedTuple):
    """A tensor's shape and dtype name."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * as_dtype(self.dtype).itemsize


def storable(name: str, array: np.ndarray) -> np.ndarray:
    """The array, little-endian and contiguous (`np.ascontiguousarray` would turn [] into [1]).

    Raises:
      ValueError: the format has no such dtype.
    """
    if array.dtype.name not in DTYPES.values():
        raise ValueError(f"tensor {name!r}: dtype {array.dtype.name} cannot be stored")
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def in_file_order(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The names of a file's tensors as they stand in it: by dtype, then by name."""
    order = list(DTYPES.values())
    return sorted(specs, key=lambda name: (order.index(specs[name].dtype), name))


def write(file: BinaryIO, specs: Mapping[str, TensorSpec], make: Callable[[str], np.ndarray]) -> None:
    """Writes one file; `make` gives its tensors one after the other, in the order of `in_file_order`.

    Raises:
      ValueError: a tensor is not what `specs` says.
      OSError: the disk refuses.
    """
    code = {dtype: letters for letters, dtype in DTYPES.items()}
    header, offset, names = {"__metadata__": _METADATA}, 0, in_file_order(specs)
    for name in names:
        spec = specs[name]
        place = [offset, offset + spec.nbytes]
        header[name] = {"dtype": code[spec.dtype], "shape": list(spec.shape), "data_offsets": place}
        offset = place[1]
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        array = storable(name, make(name))
        if TensorSpec(array.shape, array.dtype.name) != specs[name]:
            raise ValueError(f"tensor {name!r} is {array.dtype.name} {array.shape}, not {specs[name]}")
        file.write(array.reshape(-1).view(np.uint8).data if array.size else b"")
