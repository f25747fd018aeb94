"""Today's ScaNN index behind `units.Index`; goes when the index itself opens shard by shard."""

import numpy as np

from mlp_memory.artifacts import Directory, UserError, peek
from mlp_memory.index.neighbors import nearest_first
from mlp_memory.index.scann_index import _Shard, shard_name


class _Searcher:
    def __init__(self, shard: _Shard, leaves_to_search: int, reorder: int):
        self._shard, self._limits = shard, (leaves_to_search, reorder)

    def search(self, queries_QxD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        queries_QxD = np.ascontiguousarray(queries_QxD, np.float32)
        return nearest_first(*self._shard.search(queries_QxD, k, *self._limits), k)


class TodaysIndex:
    """Shards of WORKDIR/index, one in memory at a time."""

    def __init__(self, directory: Directory):
        manifest = peek(directory)
        if manifest is None:
            raise UserError(f"{directory} is missing: run `python -m mlp_memory index` first")
        self._directory, self.facts, self.shards = directory, manifest.facts, manifest.config["shards"]
        shards = (peek(directory / shard_name(s)) for s in range(self.shards))
        self.ranges = [tuple(shard.facts["rows"]) for shard in shards]
        self._last: tuple[int, _Searcher] | None = None

    def shard(self, s: int) -> _Searcher:
        if self._last is None or self._last[0] != s:
            self._last = None
            shard = _Shard(self._directory / shard_name(s))
            limits = self.facts.get("leaves_to_search", 0), self.facts.get("reorder", 0)
            self._last = s, _Searcher(shard, *limits)
        return self._last[1]

    def search(self, queries_QxD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        lists = [self.shard(s).search(queries_QxD, k) for s in range(self.shards)]
        rows, sqdist = (np.concatenate(part, axis=1) for part in zip(*lists))
        return nearest_first(rows, sqdist, k)
