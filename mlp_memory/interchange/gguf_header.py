"""Whether a GGUF file's header can be true, before the library believes it.

The library takes every count in a file at its word: one of 2^60 keeps it busy until memory is full. Here the
header is walked once, and each count and length is held against the bytes that are left.
"""

import mmap
import struct
from pathlib import Path

_STRING, _ARRAY = 8, 9
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of each scalar type, by its number in the format."""

MOST_VALUES = 1 << 22
"""Elements of all arrays in the metadata: the largest tokenizers have a quarter of this, and the library
takes about half a kilobyte for each."""
_MOST_DIMENSIONS = 8
_LEAST_TENSOR = 8 + 4 + 4 + 8
_LEAST_ENTRY = 8 + 4 + 1


def check(path: Path) -> None:
    """Walks the header.

    Raises:
      ValueError: it claims more than the file holds or than any model needs.
      OSError: the file cannot be read.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data).file()


class _Walk:
    """A place in the header that only moves forward."""

    def __init__(self, data: mmap.mmap):
        self._data, self._at, self._values = data, 0, 0

    def file(self) -> None:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version} (of the other byte order, perhaps); 2 and 3 are read")
        tensors, entries = self._number("<Q"), self._number("<Q")
        self._fits(tensors * _LEAST_TENSOR + entries * _LEAST_ENTRY, "tensors and metadata")
        for _ in range(entries):
            self._skip(self._number("<Q"), "a name")
            self._value(self._number("<I"))
        for _ in range(tensors):
            self._tensor()

    def _tensor(self) -> None:
        self._skip(self._number("<Q"), "a name")
        if (dimensions := self._number("<I")) > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        elements = 1
        for _ in range(dimensions):
            elements *= self._number("<Q")
        # No type has less than a bit for an element.
        if elements > 8 * len(self._data):
            raise ValueError(f"a tensor of {elements} elements in {len(self._data)} bytes")
        self._skip(4, "a type")
        if (offset := self._number("<Q")) > len(self._data):
            raise ValueError(f"a tensor at byte {offset} of {len(self._data)}")

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._skip(self._number("<Q"), "a text")
        elif kind == _ARRAY:
            self._array(self._number("<I"), self._number("<Q"))
        else:
            self._skip(self._width(kind), "a value")

    def _array(self, kind: int, count: int) -> None:
        if kind == _ARRAY:
            raise ValueError("an array of arrays")
        self._values += count
        if self._values > MOST_VALUES:
            raise ValueError(f"arrays of more than {MOST_VALUES} values in the metadata")
        if kind == _STRING:
            self._fits(8 * count, "an array")
            for _ in range(count):
                self._skip(self._number("<Q"), "a text")
        else:
            self._skip(self._width(kind) * count, "an array")

    def _width(self, kind: int) -> int:
        if kind not in _WIDTHS:
            raise ValueError(f"a value of unknown type {kind}")
        return _WIDTHS[kind]

    def _number(self, form: str) -> int:
        size = struct.calcsize(form)
        self._skip(size, "a number")
        return struct.unpack_from(form, self._data, self._at - size)[0]

    def _skip(self, size: int, what: str) -> None:
        self._fits(size, what)
        self._at += size

    def _fits(self, size: int, what: str) -> None:
        if size > (left := len(self._data) - self._at):
            raise ValueError(f"{what} of {size} bytes at byte {self._at}, {left} are left")
