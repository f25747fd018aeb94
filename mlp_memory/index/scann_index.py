"""ScaNN: one shard built and published whole or not at all; all shards searched as one.

The only importer of scann. Squared L2, a k-means tree, 4-bit asymmetric hashing, candidates
reordered by their distance in float32; a shard of few rows is searched by brute force.
"""

import contextlib
import hashlib
import importlib
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mlp_memory.artifacts import (
    Directory,
    Manifest,
    UserError,
    begin,
    config_dict,
    finish,
    first_line,
    peek,
    require_same,
)
from mlp_memory.index.config import IndexConfig
from mlp_memory.index.exact import Rows
from mlp_memory.index.neighbors import nearest_first

# Below this a tree and codes gain nothing, and k-means has too few rows per leaf.
_BRUTE_FORCE_ROWS = 4096
_READ_ROWS = 1 << 16
# ScaNN searches so many queries together; a batch of fewer than about ten takes another path, whose
# candidates differ here and there. Filled up to _LEAST_QUERIES, a query's rows are its own.
_BATCH_QUERIES = 256
_LEAST_QUERIES = 32
_GAPS = "rows_without_key.npy"


def shard_name(shard: int) -> str:
    """The shard's folder below WORKDIR/index."""
    return f"shard-{shard:05d}"


def shard_rows(rows: int, shards: int, shard: int) -> tuple[int, int]:
    """First stream row of a shard and one past its last; shards are of equal length."""
    per_shard = -(-rows // shards)
    return min(shard * per_shard, rows), min((shard + 1) * per_shard, rows)


def leaves_for(rows: int, leaves: int) -> int:
    """Leaves of a tree over `rows` keys: as configured, or the square root; 0 = brute force."""
    if rows < _BRUTE_FORCE_ROWS:
        return 0
    return min(leaves, rows) or math.isqrt(rows)


def build_shard(
    directory: Directory, shard: int, keys: Rows, valid_N: np.ndarray, datastore: str, config: IndexConfig
) -> None:
    """Builds and publishes one shard unless it is there already.

    Memory: 4·d bytes per row of the shard twice (the keys and ScaNN's own), d/4 for the codes.

    Args:
      directory: WORKDIR/index.
      shard: number of the shard, from 0.
      keys: [N, D] keys of the whole stream, any float dtype.
      valid_N: bool, rows that have a next token; the others are never inserted.
      datastore: fingerprint of the datastore.
      config: how to build.

    Raises:
      UserError: the shard's folder holds one made from other keys or with another config.
    """
    start, stop = shard_rows(len(valid_N), config.shards, shard)
    target = directory / shard_name(shard)
    made_with = {name: config_dict(config)[name] for name in ("shards", "leaves", "dimensions_per_block")}
    parents = {"datastore": datastore}
    found = peek(target)
    if found is not None and found.finished:
        require_same(target, found, Manifest("index_shard", made_with, parents))
        return
    with _staging(directory, shard) as staging:
        valid_rows = start + np.flatnonzero(valid_N[start:stop])
        gaps = start + np.flatnonzero(~valid_N[start:stop])
        np.save(staging / _GAPS, gaps.astype(np.int64))
        leaves = leaves_for(len(valid_rows), config.leaves)
        if len(valid_rows):
            searcher = _build(_gather(keys, valid_N, start, stop), leaves, config.dimensions_per_block)
            (staging / "scann").mkdir()
            # Relative paths: the folder is renamed, and users move theirs.
            searcher.serialize(str(staging / "scann"), relative_path=True)
        staged = Directory(staging)
        files = staged.names()
        manifest = begin(staged, "index_shard", made_with, parents)
        manifest.checksums = {name: [_file_digest(staging / name)] for name in files}
        facts = {
            "rows": [start, stop],
            "keys": len(valid_rows),
            "leaves": leaves,
            "method": "tree and hashing" if leaves else "brute force",
            "bytes": {name: (staging / name).stat().st_size for name in files},
        }
        _publish(staged, target, finish(staged, manifest, **facts))


class ScannIndex:
    """The shards of WORKDIR/index, searched as one.

    Attributes:
      facts: what the index stage found out (recall, the parameters chosen); {} before it has.
      leaves: most leaves of any shard's tree; 0 where all are searched by brute force.
      leaves_to_search: partitions visited per query and shard.
      reorder: candidates reordered per query and shard.
    """

    def __init__(self, shards: list["_Shard"], facts: dict[str, Any], leaves_to_search: int, reorder: int):
        self.facts, self.leaves_to_search, self.reorder = facts, leaves_to_search, reorder
        self.leaves = max((shard.leaves for shard in shards), default=0)
        self._shards = shards

    @classmethod
    def load(cls, directory: Directory) -> "ScannIndex":
        """Loads every shard. Memory: 4.25·d bytes per key.

        Raises:
          UserError: the index or a file of it is missing or damaged.
        """
        manifest = peek(directory)
        if manifest is None:
            raise UserError(f"{directory} is missing: run `python -m mlp_memory index` first")
        shards = [_Shard(directory / shard_name(s)) for s in range(manifest.config["shards"])]
        facts = manifest.facts
        return cls(shards, facts, facts.get("leaves_to_search", 0), facts.get("reorder", 0))

    def search(self, queries_QxD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest rows of each query that were found, by squared L2 distance.

        The same queries give the same result, on any number of threads; in other company a query
        finds the same rows, their distances the same but for the last bit. Distances are sums of
        squared differences; where a shard is searched by brute force they are expanded, with
        a rounding of 1e-6·(|q|² + |k|²).

        Args:
          queries_QxD: float32.
          k: neighbours per query.

        Returns:
          rows_Qxk int64 rows of the stream (-1 where fewer were found) and sqdist_Qxk
          float32 (inf there), nearest first, ties by row.
        """
        queries_QxD = np.ascontiguousarray(queries_QxD, np.float32)
        rows = [np.zeros((len(queries_QxD), 0), np.int64)]
        sqdist = [np.zeros((len(queries_QxD), 0), np.float32)]
        if len(queries_QxD):
            for shard in self._shards:
                found_rows, found_sqdist = shard.search(queries_QxD, k, self.leaves_to_search, self.reorder)
                rows.append(found_rows)
                sqdist.append(found_sqdist)
        return nearest_first(np.concatenate(rows, axis=1), np.concatenate(sqdist, axis=1), k)


class _Shard:
    """One loaded shard."""

    def __init__(self, directory: Directory):
        manifest = peek(directory)
        if manifest is None or not manifest.finished:
            raise UserError(f"{directory} is missing: run `python -m mlp_memory index` first")
        self.leaves = manifest.facts["leaves"]
        self._local = None
        if directory.is_local:
            path = directory.path
        else:
            self._local = tempfile.TemporaryDirectory(prefix="mlp-memory-index-")
            path = Path(self._local.name)
            for name in manifest.facts["bytes"]:
                (path / name).parent.mkdir(exist_ok=True)
                (path / name).write_bytes(directory.read(name) or b"")
        for name, size in manifest.facts["bytes"].items():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes, not {size}"
                raise UserError(f"{directory}/{name} {what}: delete {directory} and run `index` again")
        start, stop = manifest.facts["rows"]
        valid = np.ones(stop - start, bool)
        valid[np.load(path / _GAPS) - start] = False
        self._row_of_position = start + np.flatnonzero(valid)
        self._searcher = None
        if len(self._row_of_position):
            try:
                self._searcher = _scann().load_searcher(str(path / "scann"))
            except (RuntimeError, ValueError) as error:
                raise UserError(
                    f"{directory} is damaged ({first_line(error)}): delete it and run `index` again"
                ) from error
            self._searcher.set_num_threads(os.cpu_count() or 1)

    def search(
        self, queries_QxD: np.ndarray, k: int, leaves_to_search: int, reorder: int
    ) -> tuple[np.ndarray, np.ndarray]:
        if self._searcher is None:
            return np.zeros((len(queries_QxD), 0), np.int64), np.zeros((len(queries_QxD), 0), np.float32)
        keys = len(self._row_of_position)
        k = min(k, keys)
        if self.leaves:
            limits = (min(max(reorder, k), keys), min(max(leaves_to_search, 1), self.leaves))
        else:
            limits = (None, None)
        last_batch = len(queries_QxD) % _BATCH_QUERIES
        filling = max(_LEAST_QUERIES - last_batch, 0) if last_batch else 0
        position_Qxk, sqdist_Qxk = self._searcher.search_batched_parallel(
            np.pad(queries_QxD, ((0, filling), (0, 0)), mode="edge"), k, *limits, batch_size=_BATCH_QUERIES
        )
        position_Qxk, sqdist_Qxk = position_Qxk[: len(queries_QxD)], sqdist_Qxk[: len(queries_QxD)]
        # ScaNN pads with position 0 and distance NaN; rounding may leave a distance below zero.
        missing_Qxk = np.isnan(sqdist_Qxk)
        sqdist_Qxk = np.where(missing_Qxk, np.inf, np.maximum(sqdist_Qxk, 0)).astype(np.float32)
        rows_Qxk = np.where(missing_Qxk, -1, self._row_of_position[position_Qxk.astype(np.int64)])
        return rows_Qxk, sqdist_Qxk


def _scann() -> ModuleType:
    """scann's pybind module, without TensorFlow.

    scann imports TensorFlow for its graph ops only, and goes on when there is none: hidden,
    the import takes 0.3 s instead of 7 and no GPU memory is claimed.
    """
    name = "tensorflow"
    hidden = name not in sys.modules
    if hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's way to refuse an import
    try:
        return importlib.import_module("scann.scann_ops.py.scann_ops_pybind")
    finally:
        if hidden:
            del sys.modules[name]


def _gather(keys: Rows, valid_N: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The valid keys of a row range, float32 [positions, D]."""
    gathered = np.empty((int(valid_N[start:stop].sum()), keys.shape[1]), np.float32)
    filled = 0
    for first in range(start, stop, _READ_ROWS):
        last = min(first + _READ_ROWS, stop)
        some = np.asarray(keys[first:last])[valid_N[first:last]]
        gathered[filled : filled + len(some)] = some
        filled += len(some)
    return gathered


def _build(keys_PxD: np.ndarray, leaves: int, dimensions_per_block: int) -> Any:
    """A searcher over the keys; the same keys give the same searcher in any process."""
    # The number of neighbours and candidates only are defaults: each search names its own.
    builder = _scann().builder(keys_PxD, 1, "squared_l2")
    # With more threads rows near two leaves go to either, from run to run: 215 of 697k in one
    # comparison. One thread costs half as much time again (30 s against 20 there).
    builder.set_n_training_threads(1)
    if leaves:
        # The random start of k-means has no seed; k-means++ repeats from run to run.
        builder.tree(leaves, leaves, random_init=False)
        builder.score_ah(min(dimensions_per_block, keys_PxD.shape[1]))
        builder.reorder(1)
    else:
        builder.score_brute_force()
    try:
        with _quiet():
            return builder.build()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"ScaNN refuses {len(keys_PxD)} keys with {leaves} leaves, {dimensions_per_block} dimensions "
            f"per block: {first_line(error)}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the C++ library's log lines from standard error; shows them if the work fails."""
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        except BaseException:
            log.seek(0)
            os.write(original, log.read())
            raise
        finally:
            os.dup2(original, 2)
            os.close(original)


@contextlib.contextmanager
def _staging(directory: Directory, shard: int) -> Iterator[Path]:
    """An empty local folder, next to the shard's place where that is local; gone at the end."""
    if directory.is_local:
        path = directory.path / f"building-{shard_name(shard)}"
        shutil.rmtree(path, ignore_errors=True)
    else:
        path = Path(tempfile.mkdtemp(prefix="mlp-memory-index-"))
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield path
    except OSError as error:
        raise UserError(f"cannot write {path}: {first_line(error)}") from error
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _publish(staged: Directory, target: Directory, manifest: Manifest) -> None:
    """Makes a staged shard appear at its place in one step: a rename, or the manifest's write."""
    target.delete()
    if target.is_local:
        staged.path.rename(target.path)
        return
    for name in manifest.facts["bytes"]:
        target.write(name, (staged.path / name).read_bytes())
    finish(target, manifest)


def _file_digest(path: Path) -> str:
    """16 hex digits of the file's sha256, as `artifacts.digest` gives for bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
