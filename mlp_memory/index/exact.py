"""Exact nearest neighbours by brute force on a mesh of devices: the oracle of recall, and a backend."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlp_memory.arrays import Rows
from mlp_memory.index.neighbors import nearest_first

# Measured on 2 AVX-512 cores, 300k keys of d = 192, k = 256: three quarters of the time is the
# matrix product. Superblocks half as long select more often (0.83 of the queries a second).
_SUPERBLOCK_ROWS, _SUPERBLOCK_VALUES = 1 << 19, 1 << 29
_BLOCK_ROWS = 1 << 13
_GROUP_ROWS = 32
_QUERY_ROWS = 256
# Selection is by |k|² − 2 q·k, whose rounding may swap near ties; a few more are kept until
# the distances are known in full.
_SLACK = 16
_AXIS = "keys"


def exact_search(
    keys_NxD: Rows,
    valid_N: np.ndarray,
    queries_QxD: np.ndarray,
    k: int,
    mesh: Mesh | None = None,
    approximate_recall: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest valid rows of each query by squared L2 distance.

    Keys are read in superblocks, each once, and lie spread over all devices of the mesh; queries
    go through in batches. Every device keeps its own k best, and only these [Q, k] are merged.
    Products are in full float32 on every platform. Distances returned are sums of squared
    differences in float32, so a row's distance to itself or to a duplicate is 0 exactly.

    Memory, whatever N is: per device a superblock of at most 2^19 keys and 2^29 values (2 GiB)
    and 256 queries' scores over it (0.5 GiB); on the host one device's part of a superblock at a
    time, and the result, 12 bytes per query and neighbour.

    Args:
      keys_NxD: any float dtype.
      valid_N: bool, False for rows that may not be found.
      queries_QxD: float32.
      k: neighbours per query.
      mesh: whose devices search, whatever its axes; one device if not given. Processes of a
        multi-host mesh all call with the same arguments and all get the result.
      approximate_recall: share of the true neighbours that will do, in (0, 1): candidates are then
        selected by `jax.lax.approx_max_k` where that is faster (see `recall_goal`).

    Returns:
      rows_Qxk int64 (-1 where fewer than k rows are valid) and sqdist_Qxk float32 (inf
      there), nearest first, ties by row.

    Raises:
      ValueError: shapes, dtypes or the recall do not fit.
    """
    index = ExactIndex(keys_NxD, valid_N, mesh, approximate_recall, resident=False)
    return index.search(queries_QxD, k)


class ExactIndex:
    """Exact search, its keys on the devices if so wished: for many small searches, one a decoding step, say.

    Args:
      keys_NxD, valid_N, mesh, approximate_recall: see `exact_search`.
      resident: whether the keys stay on the devices, 4 bytes a value.
    """

    def __init__(
        self,
        keys_NxD: Rows,
        valid_N: np.ndarray,
        mesh: Mesh | None = None,
        approximate_recall: float | None = None,
        resident: bool = True,
    ):
        rows_total, dimension = keys_NxD.shape
        if valid_N.dtype != np.bool_ or valid_N.shape != (rows_total,):
            raise ValueError(f"valid rows: bool[{rows_total}] expected, got {valid_N.dtype}{valid_N.shape}")
        self._keys_NxD, self._valid_N = keys_NxD, valid_N
        self._goal = recall_goal(mesh, approximate_recall)
        devices = jax.local_devices()[:1] if mesh is None else mesh.devices.reshape(-1)
        self._mesh = Mesh(np.asarray(devices), (_AXIS,))
        device_rows, self._block_rows = _grid(rows_total, len(devices), dimension)
        self._superblock_rows = device_rows * len(devices)
        self._resident = list(self._superblocks()) if resident else None

    def _superblocks(self) -> Iterator[tuple[int, jax.Array, jax.Array]]:
        for start in range(0, len(self._valid_N), self._superblock_rows):
            yield (
                start,
                *_superblock(self._keys_NxD, self._valid_N, start, self._superblock_rows, self._mesh),
            )

    def search(self, queries_QxD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `exact_search`."""
        if queries_QxD.ndim != 2 or queries_QxD.shape[1] != self._keys_NxD.shape[1] or k < 1:
            raise ValueError(f"queries {queries_QxD.shape}, k = {k} for keys {self._keys_NxD.shape}")
        count, at_once = len(queries_QxD), _QUERY_ROWS
        if self._resident is not None:  # as few as there are: a step of decoding asks for a batch's rows
            at_once = min(_QUERY_ROWS, 1 << max(count - 1, 0).bit_length())
        best_rows = np.full((count, k), -1, np.int64)
        best_sqdist = np.full((count, k), np.inf, np.float32)
        for start, keys_SxD, penalty_S in self._superblocks() if self._resident is None else self._resident:
            for first in range(0, count, at_once):
                batch = slice(first, min(first + at_once, count))
                queries_BxD = np.zeros((at_once, queries_QxD.shape[1]), np.float32)
                queries_BxD[: batch.stop - first] = queries_QxD[batch]
                position_Bxk, sqdist_Bxk = jax.device_get(
                    _search_superblock(
                        keys_SxD, penalty_S, queries_BxD, self._mesh, k, self._block_rows, self._goal
                    )
                )
                found = slice(0, batch.stop - first)
                sqdist = np.concatenate([best_sqdist[batch], sqdist_Bxk[found]], axis=1)
                rows = np.concatenate(
                    [best_rows[batch], position_Bxk[found].astype(np.int64) + start], axis=1
                )
                best_rows[batch], best_sqdist[batch] = nearest_first(rows, sqdist, k)
        return best_rows, best_sqdist


def recall_goal(mesh: Mesh | None, approximate_recall: float | None) -> float:
    """The recall that `exact_search` with these arguments has in expectation; 1 is exact.

    `approx_max_k` is a partial reduction on TPU. Elsewhere it would be a full sort, and the exact
    selection is taken, which is faster.

    Raises:
      ValueError: the recall is not in (0, 1).
    """
    if approximate_recall is None:
        return 1.0
    if not 0 < approximate_recall < 1:
        raise ValueError(f"approximate_recall = {approximate_recall} is not between 0 and 1")
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    return approximate_recall if device.platform == "tpu" else 1.0


def _grid(rows: int, devices: int, dimension: int) -> tuple[int, int]:
    """Rows per device and superblock, and per block: equal superblocks, whole blocks, little padding."""
    most = max(min(_SUPERBLOCK_ROWS, _SUPERBLOCK_VALUES // dimension), 1) * devices
    superblocks = -(-max(rows, 1) // most)
    per_device = -(-rows // (superblocks * devices))
    if per_device <= _BLOCK_ROWS:
        padded = max(-(-per_device // 512) * 512, 512)
        return padded, padded
    return -(-per_device // _BLOCK_ROWS) * _BLOCK_ROWS, _BLOCK_ROWS


def _superblock(
    keys_NxD: Rows, valid_N: np.ndarray, start: int, rows: int, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """`rows` keys from `start` on, and |k|² (infinite where a row may not be found), over the mesh."""
    sharding, dimension = NamedSharding(mesh, P(_AXIS)), keys_NxD.shape[1]

    def keys_of(index: tuple[slice, ...]) -> np.ndarray:
        first, last, _ = index[0].indices(rows)
        keys_SxD = np.zeros((last - first, dimension), np.float32)
        stop = min(start + last, len(valid_N))
        if start + first < stop:
            keys_SxD[: stop - start - first] = keys_NxD[start + first : stop]
        return keys_SxD

    usable_S = np.zeros(rows, bool)
    usable_S[: len(valid_N) - start] = valid_N[start : start + rows]
    keys_SxD = jax.make_array_from_callback((rows, dimension), sharding, keys_of)
    usable_S = jax.make_array_from_callback((rows,), sharding, lambda index: usable_S[index])
    return keys_SxD, _penalty(keys_SxD, usable_S)


@jax.jit
def _penalty(keys_SxD: jax.Array, usable_S: jax.Array) -> jax.Array:
    return jnp.where(usable_S, jnp.sum(keys_SxD * keys_SxD, axis=1), jnp.inf)


@functools.partial(jax.jit, static_argnames=("mesh", "k", "block_rows", "goal"))
def _search_superblock(
    keys_SxD: jax.Array,
    penalty_S: jax.Array,
    queries_QxD: jax.Array,
    mesh: Mesh,
    k: int,
    block_rows: int,
    goal: float,
) -> tuple[jax.Array, jax.Array]:
    """Positions_Qxk (int32) and sqdist_Qxk of the nearest rows in one superblock; k at most its rows."""

    def search_part(
        keys_RxD: jax.Array, penalty_R: jax.Array, queries_QxD: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        rows = len(keys_RxD)
        kept = min(k + _SLACK, rows)
        scores_NxQxB = _scores(keys_RxD, penalty_R, queries_QxD, block_rows)
        if goal < 1:
            score_Qxc, position_Qxc = _select_approximately(scores_NxQxB, kept, goal)
        else:
            score_Qxc, position_Qxc = _select(scores_NxQxB, kept)
        sqdist_Qxc = jnp.sum((queries_QxD[:, None, :] - keys_RxD[position_Qxc]) ** 2, axis=-1)
        sqdist_Qxc = jnp.where(jnp.isneginf(score_Qxc), jnp.inf, sqdist_Qxc)
        position_Qxc = position_Qxc + jax.lax.axis_index(_AXIS) * rows
        sqdist_Qxc, position_Qxc = jax.lax.sort((sqdist_Qxc, position_Qxc), num_keys=2)
        if mesh.size > 1:
            gathered = (sqdist_Qxc[:, :k], position_Qxc[:, :k])
            gathered = [jax.lax.all_gather(x, _AXIS, axis=1, tiled=True) for x in gathered]
            sqdist_Qxc, position_Qxc = jax.lax.sort(gathered, num_keys=2)
        return position_Qxc[:, :k], sqdist_Qxc[:, :k]

    return jax.shard_map(
        search_part, mesh=mesh, in_specs=(P(_AXIS), P(_AXIS), P()), out_specs=(P(), P()), check_vma=False
    )(keys_SxD, penalty_S, queries_QxD)


def _scores(keys_RxD: jax.Array, penalty_R: jax.Array, queries_QxD: jax.Array, block_rows: int) -> jax.Array:
    """2 q·k − |k|² of every key, block by block, [blocks, Q, block_rows]; −∞ where it may not be found."""

    def score(_: None, block: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        keys_BxD, penalty_B = block
        dots_QxB = jax.lax.dot_general(
            queries_QxD, keys_BxD, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
        )
        return None, 2 * dots_QxB - penalty_B

    blocks = (keys_RxD.reshape(-1, block_rows, keys_RxD.shape[1]), penalty_R.reshape(-1, block_rows))
    return jax.lax.scan(score, None, blocks)[1]


def _select(scores_NxQxB: jax.Array, kept: int) -> tuple[jax.Array, jax.Array]:
    """The best scores of each query and their positions, [Q, kept] each.

    The c best scores lie in the c groups of 32 rows with the best maxima, so only those
    groups are sorted: a top-c over all scores would take longer than the matrix product.
    """
    queries, block_rows = scores_NxQxB.shape[1:]
    groups_per_block = block_rows // _GROUP_ROWS
    scores_NxQxGxR = scores_NxQxB.reshape(-1, queries, groups_per_block, _GROUP_ROWS)
    maxima_QxG = scores_NxQxGxR.max(-1).transpose(1, 0, 2).reshape(queries, -1)
    _, group_Qxc = jax.lax.top_k(maxima_QxG, min(kept, maxima_QxG.shape[1]))
    # Ascending groups make positions ascend, and top_k prefers the earlier of two equal scores.
    group_Qxc = jnp.sort(group_Qxc, axis=1)
    candidates = scores_NxQxGxR[
        group_Qxc // groups_per_block, jnp.arange(queries)[:, None], group_Qxc % groups_per_block
    ].reshape(queries, -1)
    score_Qxc, index_Qxc = jax.lax.top_k(candidates, kept)
    group = jnp.take_along_axis(group_Qxc, index_Qxc // _GROUP_ROWS, axis=1)
    return score_Qxc, group * _GROUP_ROWS + index_Qxc % _GROUP_ROWS


def _select_approximately(scores_NxQxB: jax.Array, kept: int, goal: float) -> tuple[jax.Array, jax.Array]:
    """As `_select`, with `goal` of the best scores in expectation."""
    scores_QxR = scores_NxQxB.transpose(1, 0, 2).reshape(scores_NxQxB.shape[1], -1)
    return jax.lax.approx_max_k(scores_QxR, kept, recall_target=goal)
