"""Row ranges: how many shards, which rows each has, what one needs; its keys read and checked."""

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from mlp_memory.artifacts import UserError
from mlp_memory.index.codec import NORM_CODES
from mlp_memory.index.config import REORDER_DTYPES, IndexConfig
from mlp_memory.index.exact import Rows

_READ_BYTES = 1 << 25


class Stream(Protocol):
    """What the index asks of the token stream (corpus/stream.py)."""

    def __len__(self) -> int: ...

    def has_next(self, start: int, stop: int) -> np.ndarray: ...

    def document_ids(self, start: int, stop: int) -> np.ndarray: ...


def shard_name(shard: int) -> str:
    """The shard's folder below WORKDIR/index."""
    return f"shard-{shard:05d}"


def shard_rows(rows: int, shards: int, shard: int) -> tuple[int, int]:
    """First stream row of a shard and one past its last; shards are of equal length."""
    per_shard = -(-rows // shards)
    return min(shard * per_shard, rows), min((shard + 1) * per_shard, rows)


def shard_count(rows: int, dimension: int, config: IndexConfig) -> int:
    """Shards as configured, or the fewest whose float32 keys fit `shard_gigabytes`."""
    return config.shards or max(math.ceil(4 * rows * dimension / (config.shard_gigabytes * 1e9)), 1)


def single_rows(keys: Rows, rows_Q: np.ndarray) -> np.ndarray:
    """The keys of some rows, float32 [Q, E]; cheapest where the rows ascend."""
    return np.concatenate([np.asarray(keys[row : row + 1], np.float32) for row in rows_Q.tolist()])


def bytes_per_key(dimension: int, config: IndexConfig) -> int:
    """Bytes on disk, at most, of a key in a ScaNN shard: kept for reordering, coded, its leaf."""
    codes = math.ceil(dimension / (config.dimensions_per_block or 1)) + NORM_CODES
    return REORDER_DTYPES[config.reorder_dtype] * (dimension + NORM_CODES) + codes + 4


def checked_blocks(keys: Rows, stream: Stream, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
    """Rows start:stop of the keys, some 32 MiB at a time, float32, with the first row of each block.

    Raises:
      UserError: a key is not finite; says which, and of what document.
    """
    step = max(_READ_BYTES // (4 * keys.shape[1]), 1)
    for first in range(start, stop, step):
        block_RxD = np.asarray(keys[first : min(first + step, stop)]).astype(np.float32, copy=False)
        finite_R = np.isfinite(block_RxD).all(axis=1)
        if not finite_R.all():
            row = first + int(np.argmin(finite_R))
            document = int(stream.document_ids(row, row + 1)[0])
            raise UserError(
                f"datastore: the key of row {row} (document {document}) is not finite: "
                "delete the datastore and run embed again"
            )
        yield first, block_RxD
