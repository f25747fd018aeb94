"""The work of retrieve in units that may be done anywhere, in any order, once or twice.

A block is a chunk of the targets. A search unit looks one shard through for a block's rows
and leaves the candidates in a file; a merge unit joins the shards' candidates, leaves out
what a row may not learn from, and writes the chunk. What is done is known from files alone.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np

from mlp_memory.arrays import ChunkWriter
from mlp_memory.artifacts import Directory, peek
from mlp_memory.index.exact import Rows
from mlp_memory.index.neighbors import nearest_first
from mlp_memory.targets.asked import Asked, EveryRow
from mlp_memory.targets.candidates import CandidateLists, bytes_per_candidate
from mlp_memory.targets.config import RetrieveConfig
from mlp_memory.targets.exclusion import Exclusion
from mlp_memory.targets.knn import SparseTargets, knn_distribution

UNITS = "units"
"""The folder of spilled candidates below WORKDIR/targets."""

# Queries merged at once: what sorting them needs stays small beside the lists.
_MERGED_ROWS = 1024


class Stream(Protocol):
    """What retrieve asks of the token stream (corpus/stream.py)."""

    vocab_size: int
    tokens: Rows
    bounds_D1: np.ndarray
    deleted_D: np.ndarray

    def __len__(self) -> int: ...

    def has_next(self, start: int, stop: int) -> np.ndarray: ...


class Searcher(Protocol):
    """One loaded shard of an index."""

    def search(self, queries_QxE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]: ...


class Index(Protocol):
    """What retrieve asks of an index: `shard(s)` loads one and forgets the last one.

    `ranges` has the first row of each shard and one past its last.
    """

    facts: dict[str, Any]
    shards: int
    ranges: list[tuple[int, int]]

    def shard(self, s: int) -> Searcher: ...

    def search(self, queries_QxE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]: ...


class Inputs(NamedTuple):
    """What retrieve reads: the stream, its keys in the search space, the index over them.

    `chosen` are the rows that get teachers, if not all.
    """

    stream: Stream
    keys: Rows
    index: Index
    chosen: Asked | None = None

    @property
    def asked(self) -> Asked:
        """The rows that get teachers."""
        return self.chosen or EveryRow(self.stream, self.keys)


class Search(NamedTuple):
    """One shard looked through for the rows of one block."""

    shard: int
    block: int


class Merge(NamedTuple):
    """One chunk of the targets, from the candidates of every shard."""

    block: int


Unit = Search | Merge


class NextTokens:
    """Next tokens of any rows that have one, from the tokens in memory: 2 or 4 bytes a row.

    Indexed by an array of rows, any shape, -1 included; int32. Of a row without a next token, and
    of -1, the answer means nothing.
    """

    def __init__(self, stream: Stream):
        self._tokens_N = np.asarray(stream.tokens[0 : len(stream)])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self._tokens_N[np.minimum(rows + 1, len(self._tokens_N) - 1)].astype(np.int32)


class Worker:
    """Does units of one `retrieve`; each process has one.

    Memory: one shard of the index, the tokens (2 bytes per row of the stream, 4 where the
    vocabulary needs them; twice with exclude_context), and of the block at work (B rows, d
    dimensions, C candidates) its queries and the lists of two shards: B·(8·d + 32·C) bytes. To
    which the readers of keys and tokens add what they cache, 1 GiB each at most.

    Args:
      directory: WORKDIR/targets, begun.
      inputs: what is read.
      config: as in the manifest.
      tau: the temperature.
      count: C, candidates that a search asks for (`exclusion.candidates`).
    """

    def __init__(self, directory: Directory, inputs: Inputs, config: RetrieveConfig, tau: float, count: int):
        self._inputs, self._config, self._tau, self._count = inputs, config, tau, count
        self._asked = inputs.asked
        self._writer = ChunkWriter(directory, peek(directory))
        self._lists = CandidateLists(directory / UNITS, len(inputs.stream))
        self._next_tokens: NextTokens | None = None
        self._exclusion: Exclusion | None = None

    def __call__(self, unit: Unit) -> None:
        """Does the unit unless it is done."""
        if isinstance(unit, Search):
            if unit.shard not in self._lists.shards(unit.block):
                self._lists.write(unit.block, unit.shard, *self._search(unit))
        elif unit.block in self._writer.missing():
            self._writer.write(unit.block, **self._chunk(unit.block))

    def _asking(self, block: int) -> np.ndarray:
        """The places in the block of rows that get a teacher."""
        return np.flatnonzero(self._asked.asks(*self._writer.rows(block)))

    def _search(self, unit: Search) -> tuple[np.ndarray, np.ndarray]:
        """Always for the block's rows together: a search may depend on its company."""
        place_Q = self._asking(unit.block)
        if not len(place_Q):
            return np.zeros((0, self._count), np.int64), np.zeros((0, self._count), np.float32)
        queries_QxE = self._asked.queries(*self._writer.rows(unit.block))[place_Q]
        return self._inputs.index.shard(unit.shard).search(queries_QxE, self._count)

    def _candidates(self, block: int, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """A shard's list for a block: as spilled, or searched for now where there is no sound one."""
        found = self._lists.read(block, shard)
        return self._search(Search(shard, block)) if found is None else found

    def _chunk(self, block: int) -> dict[str, np.ndarray]:
        """One chunk of every array."""
        start, stop = self._writer.rows(block)
        place_Q = self._asking(block)
        arrays = {
            name: np.zeros((stop - start, *spec.shape[1:]), spec.dtype)
            for name, spec in self._writer.manifest.arrays.items()
        }
        if not len(place_Q):
            return arrays
        row_Q = self._asked.rows(start, stop)[place_Q]
        shards = range(self._inputs.index.shards)
        lists = (self._candidates(block, shard) for shard in shards)
        rows_QxC, sqdist_QxC = merged(lists, self._count)
        if self._next_tokens is None:
            self._next_tokens = NextTokens(self._inputs.stream)
            self._exclusion = Exclusion(self._config, self._inputs.stream)
        top_m = self._writer.manifest.arrays["probs"].shape[1]
        for first in range(0, len(place_Q), _MERGED_ROWS):
            some = slice(first, first + _MERGED_ROWS)
            rows_Qxk, sqdist_Qxk = self._exclusion.exclude(rows_QxC[some], sqdist_QxC[some], row_Q[some])
            labels_Qxk = self._next_tokens[rows_Qxk]
            targets = knn_distribution(rows_Qxk, sqdist_Qxk, labels_Qxk, self._tau, top_m)
            _fill(arrays, place_Q[some], rows_Qxk, targets)
        return arrays


def merged(lists: Iterable[tuple[np.ndarray, np.ndarray]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` nearest of several shards' lists, in order of shards; two in memory at a time.

    Returns:
      rows_QxC int64 and sqdist_QxC float32, nearest first, ties by row; C = `count`.
    """
    best_rows = best_sqdist = None
    for rows_QxC, sqdist_QxC in lists:
        fresh = best_rows is None
        if fresh:
            best_rows = np.empty((len(rows_QxC), count), np.int64)
            best_sqdist = np.empty((len(rows_QxC), count), np.float32)
        for first in range(0, len(rows_QxC), _MERGED_ROWS):
            some = slice(first, first + _MERGED_ROWS)
            rows, sqdist = rows_QxC[some], sqdist_QxC[some]
            if not fresh:
                rows = np.concatenate([best_rows[some], rows], axis=1)
                sqdist = np.concatenate([best_sqdist[some], sqdist], axis=1)
            best_rows[some], best_sqdist[some] = nearest_first(rows, sqdist, count)
    return best_rows, best_sqdist


def _fill(
    arrays: dict[str, np.ndarray], places_Q: np.ndarray, rows_Qxk: np.ndarray, targets: SparseTargets
) -> None:
    probs_QxM = targets.probs_QxM.astype(np.float16)
    arrays["probs"][places_Q] = probs_QxM
    arrays["token_ids"][places_Q] = np.where(probs_QxM > 0, targets.token_ids_QxM, 0)
    arrays["kept_mass"][places_Q] = targets.kept_mass_Q
    arrays["neighbours"][places_Q] = (rows_Qxk >= 0).sum(axis=1)
    arrays["support"][places_Q] = targets.support_Q


def spilled_bytes(rows: int, stream_rows: int, count: int) -> int:
    """Bytes of one shard's lists of `count` candidates for so many rows."""
    return rows * count * bytes_per_candidate(stream_rows)
