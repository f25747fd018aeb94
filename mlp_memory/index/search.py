"""The index as others see it: shards of rows, searched one at a time and merged."""

import dataclasses
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh

from mlp_memory.artifacts import Directory, UserError, first_line, peek
from mlp_memory.index.config import IndexConfig
from mlp_memory.index.exact import Rows, exact_search
from mlp_memory.index.neighbors import nearest_first
from mlp_memory.index.scann_shard import ScannShard
from mlp_memory.index.shards import shard_name, shard_rows


class Searcher(Protocol):
    """One shard, loaded."""

    def search(self, queries_QxE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Index.search`, among the rows of the shard."""
        ...


class Index:
    """The shards of WORKDIR/index.

    Attributes:
      facts: what the index stage found out; {} before it has.
      shards: how many there are.
      ranges: the first row of each and one past its last.
      leaves_to_search, reorder: how a ScaNN shard is searched.
    """

    def __init__(
        self,
        directory: Directory,
        keys: Rows,
        valid_N: np.ndarray,
        mesh: Mesh | None,
        shards: int,
        config: dict[str, Any],
        facts: dict[str, Any],
    ):
        try:
            self.ranges = _ranges(len(valid_N), shards, facts)
            IndexConfig(**{field.name: config[field.name] for field in dataclasses.fields(IndexConfig)})
        except (UserError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{directory}/manifest.json is damaged ({first_line(error)}): delete {directory} and run "
                "`index` again"
            ) from error
        self.facts, self.shards = facts, shards
        self.leaves_to_search, self.reorder = facts.get("leaves_to_search", 0), facts.get("reorder", 0)
        self._directory, self._keys, self._valid_N, self._mesh = directory, keys, valid_N, mesh
        self._backend, self._approximate_recall = config["backend"], config["approximate_recall"] or None
        self._loaded: dict[int, Searcher] = {}
        self._loaded_bytes = config["shard_gigabytes"] * 1e9

    def shard(self, s: int) -> Searcher:
        """Shard s, loaded; those loaded before are let go unless all fit `index.shard_gigabytes`.

        Raises:
          UserError: a file of it is missing or damaged.
        """
        if s not in self._loaded:
            if sum(map(self._bytes, (*self._loaded, s))) > self._loaded_bytes:
                self._loaded.clear()  # first let go, then load
            self._loaded[s] = self._load(s)
        return self._loaded[s]

    def _bytes(self, s: int) -> int:
        """Of a shard's float32 keys."""
        start, stop = self.ranges[s]
        return 4 * (stop - start) * self._keys.shape[1]

    def _load(self, s: int) -> Searcher:
        if self._backend == "exact":
            return ExactShard(self._keys, self._valid_N, self.ranges[s], self._mesh, self._approximate_recall)
        directory = self._directory / shard_name(s)
        usual = (self.leaves_to_search, self.reorder)
        searches = self.facts.get("searches")  # of an index that was extended
        return ScannShard(directory, *(searches[s] if searches else usual), self.ranges[s])

    def search(self, queries_QxE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest rows of each query that were found, by squared L2 distance.

        The same queries give the same result, on any number of threads; in other company a query
        finds the same rows, their distances the same but for rounding. ScaNN's distances are
        expanded around the keys' mean, with a rounding of 1e-6·(|q|² + |k|²); those of the exact
        backend are sums of squared differences. Every shard is loaded in turn, unless there
        is but one.

        Args:
          queries_QxE: float32, in the space of the keys.
          k: neighbours per query.

        Returns:
          rows_Qxk int64 rows of the stream (-1 where fewer were found) and sqdist_Qxk
          float32 (inf there), nearest first, ties by row.

        Raises:
          UserError: a file of a shard is missing or damaged.
        """
        rows_Qxk, sqdist_Qxk = nearest_first(*self.shard(0).search(queries_QxE, k), k)
        for s in range(1, self.shards):
            found_rows, found_sqdist = self.shard(s).search(queries_QxE, k)
            rows_Qxk, sqdist_Qxk = nearest_first(
                np.concatenate([rows_Qxk, found_rows], axis=1),
                np.concatenate([sqdist_Qxk, found_sqdist], axis=1),
                k,
            )
        return rows_Qxk, sqdist_Qxk


def _ranges(rows: int, shards: int, facts: dict[str, Any]) -> list[tuple[int, int]]:
    """The first row of each shard and one past its last; how they are searched is checked with them.

    Raises:
      ValueError, TypeError: the facts are those of no index of so many rows.
    """
    counts = [shards, *(facts.get(name, 0) for name in ("leaves_to_search", "reorder"))]
    if not all(type(n) is int and n >= 0 for n in counts) or not 0 < shards <= max(rows, 1 << 16):
        raise ValueError(f"{shards} shards")
    equal = (shard_rows(rows, shards, s) for s in range(shards))
    ranges = [(start, stop) for start, stop in facts.get("ranges", equal)]
    ends = [row for extent in ranges for row in extent]
    if len(ranges) != shards or any(type(row) is not int for row in ends) or ends != sorted(ends):
        raise ValueError("its shards' rows")
    if not 0 == ends[0] <= ends[-1] == rows:
        raise ValueError("its shards have other rows than the stream")
    searches = facts.get("searches", [[0, 0]] * shards)
    if [len(search) for search in searches] != [2] * shards or not all(
        type(n) is int and n >= 0 for search in searches for n in search
    ):
        raise ValueError("how its shards are searched")
    return ranges


def open_index(directory: Directory, keys: Rows, valid_N: np.ndarray, mesh: Mesh | None = None) -> Index:
    """The finished index in WORKDIR/index.

    Args:
      directory: of the index.
      keys: [N, E] keys of the whole stream; only the exact backend reads them.
      valid_N: bool, False for rows that may not be found, as the index was built with.
      mesh: of the exact backend.

    Raises:
      UserError: the index is missing or unfinished, or of another number of rows.
    """
    manifest = peek(directory)
    if manifest is None or not manifest.finished:
        state = "is missing" if manifest is None else "is unfinished"
        raise UserError(f"{directory} {state}: run `python -m mlp_memory index` first")
    if manifest.facts["keys"] != int(valid_N.sum()):
        raise UserError(
            f"{directory} is of {manifest.facts['keys']} keys, the token stream has {int(valid_N.sum())}: "
            "run index again"
        )
    return Index(directory, keys, valid_N, mesh, manifest.facts["shards"], manifest.config, manifest.facts)


class RowRange:
    """Rows start:stop of other rows, themselves rows from 0."""

    def __init__(self, keys: Rows, start: int, stop: int):
        self.shape = (stop - start, *keys.shape[1:])
        self._keys, self._start = keys, start

    def __getitem__(self, rows: slice) -> np.ndarray:
        first, last, _ = rows.indices(self.shape[0])
        return self._keys[self._start + first : self._start + last]


class ExactShard:
    """A row range searched by brute force."""

    def __init__(
        self,
        keys: Rows,
        valid_N: np.ndarray,
        rows: tuple[int, int],
        mesh: Mesh | None,
        approximate_recall: float | None,
    ):
        self._start = rows[0]
        self._keys, self._valid_S = RowRange(keys, *rows), valid_N[rows[0] : rows[1]]
        self._mesh, self._approximate_recall = mesh, approximate_recall

    def search(self, queries_QxE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if not len(queries_QxE) or not self._valid_S.any():
            shape = (len(queries_QxE), k)
            return np.full(shape, -1, np.int64), np.full(shape, np.inf, np.float32)
        queries_QxE = np.ascontiguousarray(queries_QxE, np.float32)
        rows_Qxk, sqdist_Qxk = exact_search(
            self._keys, self._valid_S, queries_QxE, k, self._mesh, self._approximate_recall
        )
        return np.where(rows_Qxk < 0, -1, rows_Qxk + self._start), sqdist_Qxk
