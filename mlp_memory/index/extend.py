"""An index of more rows, made from one of fewer: its shards taken over, new rows in shards of their own."""

import dataclasses
import math
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mlp_memory.artifacts import Directory, Manifest, begin, config_dict, finish
from mlp_memory.index import scann_shard, tuning
from mlp_memory.index.build import build_shard, take_shard
from mlp_memory.index.config import IndexConfig
from mlp_memory.index.exact import Rows, exact_search
from mlp_memory.index.neighbors import exclude_self, hits, recall_at_k
from mlp_memory.index.scann_shard import Trained
from mlp_memory.index.search import Index, RowRange
from mlp_memory.index.shards import Stream, checked_blocks, shard_name, shard_rows, single_rows
from mlp_memory.index.stage import BRUTE_FORCE_ROWS, ROWS_PER_LEAF, sample_keys
from mlp_memory.index.tuning import Structure
from mlp_memory.training.progress import Progress

# Exact search of the sample costs as much as the rest of a small update.
_RECALL_SAMPLE = 256


def extend_index(
    directory: Directory,
    source: Directory,
    found: Manifest,
    old_rows: int,
    keys: Rows,
    datastore_fingerprint: str,
    stream: Stream,
    config: IndexConfig,
    neighbors_k: int,
    mesh: Mesh | None = None,
) -> None:
    """Writes WORKDIR/index for a stream that goes on where another one ends and has lost documents.

    Shards of the other index keep their centres and codes; keys of deleted rows are taken out of
    their files. New rows get shards no longer than those, trained on themselves, with as many leaves a
    row; a search visits as large a part of them, or a larger one where that does not find
    `index.target_recall` of their own neighbours among them. The work grows with the new rows and the
    shards that lose any; recall is measured on samples of 256 rows.

    Facts: as of `stage.build_index`; ranges: the rows of each shard; searches: leaves visited and
    candidates of each.

    Args:
      directory: WORKDIR/index.
      source, found, old_rows: the other index, its finished manifest, the rows of its stream.
      keys: [N, E] keys, row i of the stream each.
      datastore_fingerprint: of the datastore the keys are from.
      stream: its first rows are the other index's.
      config: as the other index was made with.
      neighbors_k: k that recall is measured for.
      mesh: of the exact searches; None: the default device.

    Raises:
      UserError: a shard is gone or damaged, a key is not finite, or the folder holds another index.
    """
    made_with = {**config_dict(config), "k": neighbors_k}
    manifest = begin(directory, "index", made_with, {"datastore": datastore_fingerprint})
    if manifest.finished:
        return
    rows, valid_N = len(stream), stream.has_next(0, len(stream))
    before = _ranges(found, old_rows)
    added = _new_ranges(before, rows)
    facts = {name: value for name, value in found.facts.items() if name not in ("recall_low", "tuning")}
    facts |= {"shards": len(before) + len(added), "keys": int(valid_N.sum()), "ranges": [*before, *added]}
    usual = [facts.get(name, 0) for name in ("leaves_to_search", "reorder")]
    searches = list(found.facts.get("searches", [usual] * len(before)))
    if config.backend == "exact":
        for start, stop in added:
            for _ in checked_blocks(keys, stream, start, stop):
                pass
        finish(directory, manifest, **facts)
        return
    with Progress("index: extend", facts["shards"], "shards") as progress:
        for shard in range(len(before)):
            take_shard(directory, shard, source, stream, datastore_fingerprint)
            progress.advance(1)
        for shard, extent in enumerate(added, len(before)):
            structure, trained = _train(found, before, keys, stream, extent, config)
            work = (keys, stream, datastore_fingerprint, structure, trained, extent)
            build_shard(directory, shard, facts["shards"], *work)
            searches.append(_search_of(directory / shard_name(shard), facts, work, config, neighbors_k, mesh))
            progress.advance(1)
    facts["searches"] = searches
    index = Index(directory, keys, valid_N, mesh, facts["shards"], made_with, facts)
    finish(directory, manifest, **facts | _recall(index, keys, valid_N, config, neighbors_k, mesh))


def _ranges(found: Manifest, rows: int) -> list[list[int]]:
    """First row of each shard and one past its last, of an index of so many rows."""
    if "ranges" in found.facts:
        return found.facts["ranges"]
    shards = found.facts["shards"]
    return [list(shard_rows(rows, shards, shard)) for shard in range(shards)]


def _new_ranges(before: list[list[int]], rows: int) -> list[list[int]]:
    """The rows past the last shard, in shards of equal length that are no longer than the longest there."""
    first, longest = before[-1][1], max(stop - start for start, stop in before)
    count = -(-(rows - first) // longest)
    cut = [shard_rows(rows - first, count, shard) for shard in range(count)]
    return [[first + start, first + stop] for start, stop in cut]


def _train(
    found: Manifest,
    before: list[list[int]],
    keys: Rows,
    stream: Stream,
    extent: list[int],
    config: IndexConfig,
) -> tuple[Structure, Trained]:
    """Centres and codes of a new shard."""
    valid_S = stream.has_next(*extent)
    sample_SxD = sample_keys(keys, stream, valid_S, extent[0])
    leaves, rows = found.facts["leaves"], extent[1] - extent[0]
    if not leaves or valid_S.sum() < BRUTE_FORCE_ROWS:
        return Structure(0, 0), scann_shard.brute_force(sample_SxD)
    share = rows / max(stop - start for start, stop in before)
    count = max(min(round(leaves * share), len(sample_SxD) // ROWS_PER_LEAF), 1)
    width = found.facts["dimensions_per_block"]
    tree = scann_shard.train_tree(sample_SxD, count, config.reorder_dtype)
    trained = scann_shard.train_codes(tree, sample_SxD, width)
    return Structure(trained.leaves, width), trained


def _search_of(
    directory: Directory,
    facts: dict[str, Any],
    work: tuple[Rows, Stream, str, Structure, Trained, list[int]],
    config: IndexConfig,
    k: int,
    mesh: Mesh | None,
) -> list[int]:
    """Leaves and candidates with which a new shard is searched.

    As large a part of it as of the others to begin with; more leaves, and once those are all more
    candidates, until a sample of its rows finds config.target_recall of its neighbours in the shard,
    less 1.96 standard errors.
    """
    keys, stream, _, structure, _, (start, stop) = work
    valid_S = stream.has_next(start, stop)
    rows_K = np.flatnonzero(valid_S)
    setting = tuning.Setting(facts["leaves_to_search"], facts["reorder"])
    if not structure.leaves:
        return list(dataclasses.astuple(setting))
    part = structure.leaves / facts["leaves"]
    setting = tuning.Setting(math.ceil(setting.leaves_to_search * part), setting.reorder)
    shard = scann_shard.ScannShard(directory, *dataclasses.astuple(setting), (start, stop))
    rng = np.random.default_rng(config.sample_seed)
    asked_Q = np.sort(rng.choice(rows_K, size=min(_RECALL_SAMPLE, len(rows_K)), replace=False))
    of_shard = RowRange(keys, start, stop)
    queries_QxE = single_rows(of_shard, asked_Q)
    exact = exact_search(of_shard, valid_S, queries_QxE, k + 1, mesh)
    truth_Qxk = _from(start, exclude_self(*exact, asked_Q, k)[0])
    while True:
        shard.leaves_to_search, shard.reorder = dataclasses.astuple(setting)
        found_Qxk, _ = exclude_self(*shard.search(queries_QxE, k + 1), start + asked_Q, k)
        recall_Q = hits(found_Qxk, truth_Qxk).sum(axis=1) / (truth_Qxk >= 0).sum(axis=1)
        most = tuning.Setting(structure.leaves, len(rows_K))
        if setting == most or tuning.trial(setting, recall_Q, 0.0).low >= config.target_recall:
            return list(dataclasses.astuple(setting))
        if setting.leaves_to_search < most.leaves_to_search:
            leaves = min(2 * setting.leaves_to_search, most.leaves_to_search)
            setting = dataclasses.replace(setting, leaves_to_search=leaves)
        else:
            setting = dataclasses.replace(setting, reorder=min(2 * setting.reorder, most.reorder))


def _from(first: int, rows_Qxk: np.ndarray) -> np.ndarray:
    """Rows of a range as rows of all; -1 stays."""
    return np.where(rows_Qxk < 0, -1, first + rows_Qxk)


def _recall(
    index: Index, keys: Rows, valid_N: np.ndarray, config: IndexConfig, k: int, mesh: Mesh | None
) -> dict[str, Any]:
    """recall and recall_rows, measured as `stage.build_index` does, on fewer rows."""
    valid_rows = np.flatnonzero(valid_N)
    rng = np.random.default_rng(config.sample_seed)
    count = min(config.recall_sample, _RECALL_SAMPLE, len(valid_rows))
    asked_Q = np.sort(rng.choice(valid_rows, size=count, replace=False))
    queries_QxE = single_rows(keys, asked_Q)
    exact_Qxk, _ = exclude_self(*exact_search(keys, valid_N, queries_QxE, k + 1, mesh), asked_Q, k)
    found_Qxk, _ = exclude_self(*index.search(queries_QxE, k + 1), asked_Q, k)
    return {"recall": recall_at_k(found_Qxk, exact_Qxk), "recall_rows": count}
