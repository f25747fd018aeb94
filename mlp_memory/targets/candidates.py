"""Candidate lists between search and merge: one file a block and shard, whole or not there.

A file is one line of JSON (queries, candidates, the type of a row, sha256 of the rest) and
then rows and squared distances, little-endian. Nothing is trusted that does not check.
"""

import hashlib
import json

import numpy as np

from mlp_memory.artifacts import Directory

_ROW_DTYPE = {4: np.dtype("<u4"), 8: np.dtype("<i8")}
_NONE = np.uint32(0xFFFFFFFF)


def bytes_per_candidate(rows: int) -> int:
    """Bytes of one candidate of a stream of `rows` rows: its row and its distance."""
    return _row_bytes(rows) + 4


class CandidateLists:
    """The lists that searches have left for merges, below WORKDIR/targets/units.

    Args:
      directory: the folder; block b's lists are in its folder `b`, one file a shard.
      rows: of the stream.
    """

    def __init__(self, directory: Directory, rows: int):
        self._directory, self._rows = directory, rows

    def shards(self, block: int) -> set[int]:
        """The shards whose lists for this block are there."""
        names = self._block(block).names()
        return {int(name.removeprefix("shard-")) for name in names if name.startswith("shard-")}

    def write(self, block: int, shard: int, rows_QxC: np.ndarray, sqdist_QxC: np.ndarray) -> None:
        """Publishes one list in one step: int64 rows (-1 none), float32 distances (inf none)."""
        dtype = _ROW_DTYPE[_row_bytes(self._rows)]
        # A row that is none, -1, becomes the greatest number of four bytes.
        data = np.ascontiguousarray(rows_QxC).astype(dtype).tobytes()
        data += np.ascontiguousarray(sqdist_QxC, "<f4").tobytes()
        head = {
            "queries": rows_QxC.shape[0],
            "candidates": rows_QxC.shape[1],
            "row_bytes": dtype.itemsize,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        self._block(block).write(_name(shard), json.dumps(head).encode() + b"\n" + data)

    def read(self, block: int, shard: int) -> tuple[np.ndarray, np.ndarray] | None:
        """rows_QxC int64 and sqdist_QxC float32 as written; None where missing or damaged."""
        file = self._block(block).read(_name(shard)) or b""
        head, _, _ = file[:1000].partition(b"\n")
        try:
            facts = json.loads(head)
            shape, dtype = (facts["queries"], facts["candidates"]), _ROW_DTYPE[facts["row_bytes"]]
            expected = facts["sha256"]
            if not all(type(n) is int and n >= 0 for n in shape):
                return None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        data = memoryview(file)[len(head) + 1 :]
        if hashlib.sha256(data).hexdigest() != expected:
            return None
        if len(data) != shape[0] * shape[1] * (dtype.itemsize + 4):
            return None
        split = shape[0] * shape[1] * dtype.itemsize
        rows_QxC = np.frombuffer(data[:split], dtype).reshape(shape)
        found_QxC = rows_QxC.astype(np.int64)
        if dtype.itemsize == 4:
            found_QxC[rows_QxC == _NONE] = -1
        return found_QxC, np.frombuffer(data[split:], "<f4").reshape(shape).astype(np.float32)

    def delete(self, block: int) -> None:
        """Removes every shard's list for this block."""
        self._block(block).delete()

    def _block(self, block: int) -> Directory:
        return self._directory / f"{block:08d}"


def _name(shard: int) -> str:
    return f"shard-{shard:05d}"


def _row_bytes(rows: int) -> int:
    return 4 if rows < int(_NONE) else 8
