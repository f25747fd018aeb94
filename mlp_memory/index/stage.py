"""The index stage: every shard built, then recall measured against exact search."""

import sys
from typing import Protocol

import numpy as np

from mlp_memory.artifacts import Directory, UserError, begin, config_dict, finish
from mlp_memory.index.config import IndexConfig
from mlp_memory.index.exact import Rows, exact_search
from mlp_memory.index.neighbors import exclude_self, recall_at_k
from mlp_memory.index.scann_index import ScannIndex, build_shard
from mlp_memory.training.progress import Progress

# Candidates reordered per neighbour asked for, tried in turn. Below 4 the 4-bit codes bound
# recall near 0.92 on d = 192 keys, however many leaves are searched.
_REORDER_FACTORS = (4, 8, 16)
_REORDER_LEAST = 128


class Stream(Protocol):
    """What the stage asks of the token stream (corpus/stream.py)."""

    def __len__(self) -> int: ...

    def has_next(self, start: int, stop: int) -> np.ndarray: ...


def build_index(
    directory: Directory,
    keys_reader: Rows,
    datastore_fingerprint: str,
    stream: Stream,
    config: IndexConfig,
    neighbors_k: int,
) -> None:
    """Builds the missing shards of WORKDIR/index, measures recall, declares the index whole.

    The search parameters left open in `config` are chosen here: the cheapest that reach
    `target_recall` for `neighbors_k` neighbours on sampled rows, each row itself excluded.

    Facts: recall, recall_k, recall_rows, keys, leaves, leaves_to_search, reorder.

    Args:
      directory: WORKDIR/index.
      keys_reader: [N, D] keys, row i of the stream each.
      datastore_fingerprint: of the datastore the keys are from.
      stream: whose rows without a next token are left out.
      config: how to build and search.
      neighbors_k: k that recall is measured for.

    Raises:
      UserError: keys and stream differ in length, no row has a next token, or the folder
        holds an index made otherwise.
    """
    manifest = begin(
        directory, "index", {**config_dict(config), "k": neighbors_k}, {"datastore": datastore_fingerprint}
    )
    if manifest.finished:
        return
    rows = len(stream)
    if keys_reader.shape[0] != rows:
        raise UserError(
            f"the datastore has {keys_reader.shape[0]} rows, the token stream {rows}: run embed again"
        )
    valid_N = stream.has_next(0, rows)
    if not valid_N.any():
        raise UserError(f"none of the stream's {rows} rows has a next token: the corpus is too small")
    with Progress("index: build", config.shards, "shards") as progress:
        for shard in range(config.shards):
            build_shard(directory, shard, keys_reader, valid_N, datastore_fingerprint, config)
            progress.advance(1)
    index = ScannIndex.load(directory)
    recall = _choose_search(index, keys_reader, valid_N, config, neighbors_k)
    if recall < config.target_recall:
        print(
            f"index: recall@{neighbors_k} is {recall:.3f}, below index.target_recall = "
            f"{config.target_recall}: give more leaves_to_search or reorder, or fewer dimensions_per_block",
            file=sys.stderr,
        )
    finish(
        directory,
        manifest,
        recall=recall,
        recall_k=neighbors_k,
        recall_rows=min(config.recall_sample, int(valid_N.sum())),
        keys=int(valid_N.sum()),
        leaves=index.leaves,
        leaves_to_search=index.leaves_to_search,
        reorder=index.reorder,
    )


def _choose_search(index: ScannIndex, keys: Rows, valid_N: np.ndarray, config: IndexConfig, k: int) -> float:
    """Sets the index's search parameters to the chosen ones and returns their recall@k."""
    valid_rows = np.flatnonzero(valid_N)
    sample_Q = np.random.default_rng(config.sample_seed).choice(
        valid_rows, size=min(config.recall_sample, len(valid_rows)), replace=False
    )
    sample_Q.sort()
    queries_QxD = np.concatenate([np.asarray(keys[row : row + 1], np.float32) for row in sample_Q])
    true_rows, _ = exclude_self(*exact_search(keys, valid_N, queries_QxD, k + 1), sample_Q, k)
    if not (true_rows >= 0).any():
        return 1.0  # a single key has no neighbours to miss
    best: tuple[float, int, int] | None = None
    for reorder, leaves_to_search in _candidates(index.leaves, config, k):
        index.reorder, index.leaves_to_search = reorder, leaves_to_search
        found_rows, _ = exclude_self(*index.search(queries_QxD, k + 1), sample_Q, k)
        recall = round(recall_at_k(found_rows, true_rows), 6)
        if best is None or recall > best[0]:
            best = (recall, reorder, leaves_to_search)
        if recall >= config.target_recall:
            break
    recall, index.reorder, index.leaves_to_search = best
    return recall


def _candidates(leaves: int, config: IndexConfig, k: int) -> list[tuple[int, int]]:
    """(reorder, leaves_to_search) from the cheapest to the dearest."""
    if not leaves:
        return [(0, 0)]
    reorders = [config.reorder] if config.reorder else [max(f * k, _REORDER_LEAST) for f in _REORDER_FACTORS]
    pairs = []
    for reorder in reorders:
        if config.leaves_to_search:
            pairs.append((reorder, config.leaves_to_search))
            continue
        # Past a quarter of the leaves more candidates are cheaper than more leaves.
        most = leaves if reorder == reorders[-1] else max(leaves // 4, 1)
        searched = max(leaves // 64, 1)
        while searched < most:
            pairs.append((reorder, searched))
            searched = max(searched + 1, searched * 5 // 4)
        pairs.append((reorder, most))
    return pairs
