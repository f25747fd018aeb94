"""The index stage: tree and codes chosen on a sample, shards built, the search chosen, recall measured."""

import contextlib
import dataclasses
import functools
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mlp_memory.artifacts import Directory, Manifest, UserError, begin, config_dict, finish
from mlp_memory.index import scann_shard, tuning
from mlp_memory.index.build import build_shard
from mlp_memory.index.config import IndexConfig
from mlp_memory.index.exact import Rows, exact_search
from mlp_memory.index.neighbors import exclude_self, hits
from mlp_memory.index.scann_shard import GAPS, ScannShard, Trained
from mlp_memory.index.search import Index
from mlp_memory.index.shards import Stream, bytes_per_key, checked_blocks, shard_count, single_rows
from mlp_memory.index.tuning import Setting, Structure
from mlp_memory.training.progress import Progress

# Below this a tree and codes gain nothing, and k-means has too few rows per leaf.
BRUTE_FORCE_ROWS = 4096
# Rows that train centres and codes and make up the pilots: enough for 60 a leaf at 2^20 rows, in
# a quarter of a GiB. Runs of a few rows, since one row costs as much to read.
_SAMPLE_ROWS = 1 << 16
_SAMPLE_BYTES = 1 << 28
_RUN_ROWS = 16
ROWS_PER_LEAF = 8
_PILOT_QUERIES = 512
_PILOT_LEAST_K = 16


def build_index(
    directory: Directory,
    keys: Rows,
    datastore_fingerprint: str,
    stream: Stream,
    config: IndexConfig,
    neighbors_k: int,
    mesh: Mesh | None = None,
) -> None:
    """Builds the missing shards of WORKDIR/index, measures recall, declares the index whole.

    What is left open in `config` is chosen here: the cheapest that reach `target_recall` for
    `neighbors_k` neighbours on sampled rows, each row itself excluded. Memory: a shard's keys and
    codes (4.5·d bytes per row), the sample, and what `exact_search` takes.

    Facts: backend, shards, recall, recall_k, recall_rows, keys; approximate_recall, if the exact
    backend was given one; with ScaNN also leaves,
    dimensions_per_block, leaves_to_search, reorder, and tuning: what was tried.

    Args:
      directory: WORKDIR/index.
      keys: [N, E] keys, row i of the stream each.
      datastore_fingerprint: of the datastore the keys are from.
      stream: whose rows without a next token are left out.
      config: how to build and search.
      neighbors_k: k that recall is measured for.
      mesh: of the exact searches; None: the default device.

    Raises:
      UserError: keys and stream differ in length, no row has a next token, a key is not finite, or
        the folder holds an index made otherwise.
    """
    made_with = {**config_dict(config), "k": neighbors_k}
    manifest = begin(directory, "index", made_with, {"datastore": datastore_fingerprint})
    if manifest.finished:
        return
    rows = len(stream)
    if keys.shape[0] != rows:
        raise UserError(f"the datastore has {keys.shape[0]} rows, the token stream {rows}: run embed again")
    valid_N = stream.has_next(0, rows)
    if not valid_N.any():
        raise UserError(f"none of the stream's {rows} rows has a next token: the corpus is too small")
    shards = shard_count(rows, keys.shape[1], config)
    facts = {"backend": config.backend, "shards": shards, "keys": int(valid_N.sum())}
    work = _Work(directory, keys, datastore_fingerprint, stream, valid_N, shards, config, neighbors_k, mesh)
    if config.backend == "exact":
        for _ in checked_blocks(keys, stream, 0, rows):
            pass
        measured = {"recall": config.approximate_recall or 1.0, "recall_rows": 0}
        if config.approximate_recall:
            measured["approximate_recall"] = config.approximate_recall
    else:
        _say_needs(rows, keys.shape[1], shards, config)
        measured = _build_and_tune(work)
        recall = measured["recall"]
        if recall < config.target_recall:
            print(
                f"index: recall@{neighbors_k} is {recall:.3f}, below index.target_recall = "
                f"{config.target_recall}: leave leaves, leaves_to_search, reorder and "
                "dimensions_per_block at 0",
                file=sys.stderr,
            )
    finish(directory, manifest, recall_k=neighbors_k, **facts, **measured)


@dataclasses.dataclass(frozen=True)
class _Work:
    """What the stage works on; see `build_index`."""

    directory: Directory
    keys: Rows
    datastore: str
    stream: Stream
    valid_N: np.ndarray
    shards: int
    config: IndexConfig
    k: int
    mesh: Mesh | None

    @property
    def shard_rows(self) -> int:
        """Keys in a shard, on average."""
        return max(int(self.valid_N.sum()) // self.shards, 1)

    def of_pilot(self, setting: Setting, k: int) -> Setting:
        """What a setting of a pilot that was asked for k neighbours is in a shard."""
        reorder = max(round(setting.reorder * self.k / k / self.shards), self.k + 1)
        return Setting(setting.leaves_to_search, reorder)

    def cost(self, structure: Structure, setting: Setting) -> float:
        return self.shards * tuning.cost(structure, setting, self.shard_rows, self.keys.shape[1])


def _say_needs(rows: int, dimension: int, shards: int, config: IndexConfig) -> None:
    """States memory and disk beforehand."""
    per_row = bytes_per_key(dimension, config)
    memory = 1.5 * 4 * dimension * -(-rows // shards) + (1 << 30)
    print(
        f"index: {shards} {'shard' if shards == 1 else 'shards'} of {-(-rows // shards):,} rows, at most "
        f"{memory / 1e9:.1f} GB of memory, {rows * per_row / 1e9:.1f} GB of disk",
        file=sys.stderr,
    )


def _build_and_tune(work: _Work) -> dict[str, Any]:
    """Facts of the plan that reaches the goal; plans are tried in turn."""
    sample_SxD = sample_keys(work.keys, work.stream, work.valid_N)
    plans, pilots = _plans(work, sample_SxD)
    oracle = _Oracle(work)
    tried: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    for number, plan in enumerate(plans):
        with Progress("index: build", work.shards, "shards") as progress:
            for shard in range(work.shards):
                build_shard(
                    work.directory,
                    shard,
                    work.shards,
                    work.keys,
                    work.stream,
                    work.datastore,
                    plan.structure,
                    plan.trained,
                )
                progress.advance(1)
        chosen, trials = oracle.choose(plan.structure, plan.near)
        tried += [_row(plan.structure, one) for one in trials]
        best = {
            **dataclasses.asdict(plan.structure),
            **dataclasses.asdict(chosen.setting),
            "recall": chosen.recall,
            "recall_low": chosen.low,
            "recall_rows": oracle.count,
            "tuning": {"pilots": pilots, "index": tried},
        }
        if chosen.low >= work.config.target_recall or number == len(plans) - 1:
            break
    return best


def _row(structure: Structure, one: tuning.Trial) -> dict[str, Any]:
    values = {**dataclasses.asdict(structure), **dataclasses.asdict(one.setting)}
    return {**values, "recall": one.recall, "recall_low": one.low, "cost_us": one.cost}


def sample_keys(keys: Rows, stream: Stream, valid_S: np.ndarray, first: int = 0) -> np.ndarray:
    """float32 [S, D]: keys from all over the rows from `first` on, in order; all where they are few.

    Args:
      keys, stream: what is sampled.
      valid_S: bool, which of those rows have a key to find.
      first: row that valid_S begins with.
    """
    rows, most = len(valid_S), min(_SAMPLE_ROWS, _SAMPLE_BYTES // (4 * keys.shape[1]))
    if rows <= most:
        blocks = [block for _, block in checked_blocks(keys, stream, first, first + rows)]
        return np.concatenate(blocks)[valid_S]
    runs = max(most // _RUN_ROWS, 1)
    parts = []
    for start in np.arange(runs) * (rows - _RUN_ROWS) // runs:
        begin_row = first + start
        part = np.concatenate(
            [block for _, block in checked_blocks(keys, stream, begin_row, begin_row + _RUN_ROWS)]
        )
        parts.append(part[valid_S[start : start + _RUN_ROWS]])
    return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Trained on the sample, and the search expected to serve."""

    structure: Structure
    trained: Trained
    near: Setting


def _plans(work: _Work, sample_SxD: np.ndarray) -> tuple[list[_Plan], list[dict[str, Any]]]:
    """What to build, in turn, and the pilots' table."""
    config = work.config
    brute = _Plan(Structure(0, 0), scann_shard.brute_force(sample_SxD), Setting(0, 0))
    if work.shard_rows < BRUTE_FORCE_ROWS:
        return [brute], []
    pilots = _Pilots(work, sample_SxD)
    counts = tuning.leaf_counts(work.shard_rows, config)
    widths = tuning.code_widths(config)
    with Progress("index: pilots", len(counts) + len(widths) - 1, "trees and codes") as progress:
        tree = scann_shard.train_tree(
            sample_SxD, min(counts[0], len(sample_SxD) // ROWS_PER_LEAF), config.reorder_dtype
        )
        for width in widths:
            pilots.try_one(tree, width)
            progress.advance(1)
        best_width = pilots.ranked()[0][0].structure.dimensions_per_block
        for leaves in counts[1:]:
            if leaves <= len(sample_SxD) // ROWS_PER_LEAF:
                pilots.try_one(scann_shard.train_tree(sample_SxD, leaves, config.reorder_dtype), best_width)
            progress.advance(1)
    pinned = config.leaves or config.leaves_to_search or config.reorder or config.dimensions_per_block
    ranked = pilots.ranked()
    if pinned:
        return [plan for plan, _ in ranked], pilots.table
    return [plan for plan, reaches in ranked if reaches] + [brute], pilots.table


class _Pilots:
    """Indexes over the sample, each searched as cheaply as the goal allows.

    Attributes:
      table: of those tried.
    """

    def __init__(self, work: _Work, sample_SxD: np.ndarray):
        self._work, self._sample_SxD = work, sample_SxD
        samples = len(sample_SxD)
        share = samples / int(work.valid_N.sum())
        self._k = min(max(round(work.k * share), _PILOT_LEAST_K), work.k, samples - 1)
        rng = np.random.default_rng(work.config.sample_seed)
        asked_Q = np.sort(rng.choice(samples, size=min(_PILOT_QUERIES, samples), replace=False))
        self._queries_QxD, every = sample_SxD[asked_Q], np.ones(samples, bool)
        found = exact_search(sample_SxD, every, self._queries_QxD, self._k + 1, work.mesh)
        self._truth_Qxk, _ = exclude_self(*found, asked_Q, self._k)
        self._tried: list[tuple[tuple[bool, float], _Plan]] = []
        self.table: list[dict[str, Any]] = []

    def try_one(self, tree: scann_shard.Tree, width: int) -> None:
        work, goal = self._work, self._work.config.target_recall
        trained = scann_shard.train_codes(tree, self._sample_SxD, width)
        structure = Structure(trained.leaves, width)
        grid = tuning.settings(structure, len(self._sample_SxD), self._k + 1, work.config)
        with _loaded_pilot(trained, self._sample_SxD) as shard:
            chosen = tuning.walk(
                grid,
                lambda setting: work.cost(structure, work.of_pilot(setting, self._k)),
                lambda setting: self._recall(shard, setting),
                goal,
            )
        self.table.append({**_row(structure, chosen), "k": self._k, "rows": len(self._sample_SxD)})
        plan = _Plan(structure, trained, work.of_pilot(chosen.setting, self._k))
        self._tried.append(((chosen.low < goal, chosen.cost), plan))

    def _recall(self, shard: ScannShard, setting: Setting) -> np.ndarray:
        shard.leaves_to_search, shard.reorder = setting.leaves_to_search, setting.reorder
        found, _ = shard.search(self._queries_QxD, self._k + 1)
        return hits(found, self._truth_Qxk).sum(1) / (self._truth_Qxk >= 0).sum(1)

    def ranked(self) -> list[tuple[_Plan, bool]]:
        """Plans that reach the goal, the cheapest first, and then those that do not; and whether."""
        return [(plan, not fails) for (fails, _), plan in sorted(self._tried, key=lambda one: one[0])]


@contextlib.contextmanager
def _loaded_pilot(trained: Trained, sample_SxD: np.ndarray) -> Iterator[ScannShard]:
    with tempfile.TemporaryDirectory(prefix="mlp-memory-index-") as name:
        folder = Directory(name)
        np.save(folder.path / GAPS, np.zeros(0, np.int64))
        scann_shard.write_shard(folder.path, trained, [sample_SxD], *sample_SxD.shape)
        facts = {"rows": [0, len(sample_SxD)], "leaves": trained.leaves, "bytes": {}}
        finish(folder, Manifest("index_shard", {}, {}), **facts)
        yield ScannShard(folder, 0, 0, (0, len(sample_SxD)))


class _Oracle:
    """Sampled rows with their true neighbours, by which searches of the index are measured.

    Attributes:
      count: rows sampled.
    """

    def __init__(self, work: _Work):
        self._work = work
        valid_rows = np.flatnonzero(work.valid_N)
        self.count = min(work.config.recall_sample, len(valid_rows))
        rng = np.random.default_rng(work.config.sample_seed)
        self._asked_Q = np.sort(rng.choice(valid_rows, size=self.count, replace=False))
        self._queries_QxD = single_rows(work.keys, self._asked_Q)
        found = exact_search(work.keys, work.valid_N, self._queries_QxD, work.k + 1, work.mesh)
        self._truth_Qxk, _ = exclude_self(*found, self._asked_Q, work.k)

    def choose(self, structure: Structure, near: Setting) -> tuple[tuning.Trial, list[tuning.Trial]]:
        """The cheapest search of the built index that reaches the goal, and all that were tried."""
        work, facts = self._work, {}
        config = config_dict(work.config)
        self._index = Index(work.directory, work.keys, work.valid_N, None, work.shards, config, facts)
        grid = tuning.settings(structure, work.shard_rows, work.k + 1, work.config, near)
        price = functools.partial(work.cost, structure)
        return tuning.climb(grid, price, self._recalls, work.config.target_recall, price(near))

    def _recalls(self, settings: list[Setting]) -> Iterator[np.ndarray]:
        """Every shard is loaded once for all settings: what a shard finds of the true, all shards would."""
        work, truth = self._work, self._truth_Qxk
        counts = np.zeros((len(settings), self.count), np.int64)
        for s in range(work.shards if settings else 0):
            shard = self._index.shard(s)
            for number, setting in enumerate(settings):
                shard.leaves_to_search, shard.reorder = setting.leaves_to_search, setting.reorder
                counts[number] += hits(shard.search(self._queries_QxD, work.k + 1)[0], truth).sum(1)
        true = (truth >= 0).sum(1)
        # A single key has no neighbours to miss.
        yield from np.where(true > 0, counts / np.maximum(true, 1), 1.0)
