"""Exact nearest neighbours by brute force, in JAX: recall's oracle and kNN-LM's exact search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mlp_memory.artifacts import Rows
from mlp_memory.index.neighbors import nearest_first

# Measured on 2 AVX-512 cores, 300k keys of d = 192, k = 256: three quarters of the time is the
# matrix product. Superblocks half as long select more often (0.83 of the queries a second).
_SUPERBLOCK_ROWS = 1 << 19
_BLOCK_ROWS = 1 << 13
_GROUP_ROWS = 32
_QUERY_ROWS = 256
# Selection is by |k|² − 2 q·k, whose rounding may swap near ties; a few more are kept until
# the distances are known in full.
_SLACK = 16


def exact_search(
    keys_NxD: Rows, valid_N: np.ndarray, queries_QxD: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest valid rows of each query by squared L2 distance.

    Distances returned are sums of squared differences in float32, so a row's distance to
    itself or to a duplicate is 0 exactly. Memory: 2^19 keys at most, in float32 here and on
    the device (2^22·D bytes), 256 queries' scores over them (0.5 GiB) and the result, 12 bytes
    per query and neighbour; whatever N is.

    Args:
      keys_NxD: any float dtype; read in superblocks, each once.
      valid_N: bool, False for rows that may not be found.
      queries_QxD: float32.
      k: neighbours per query.

    Returns:
      rows_Qxk int64 (-1 where fewer than k rows are valid) and sqdist_Qxk float32 (inf
      there), nearest first, ties by row.

    Raises:
      ValueError: shapes or dtypes do not fit each other.
    """
    rows_total, dimension = keys_NxD.shape
    if valid_N.dtype != np.bool_ or valid_N.shape != (rows_total,):
        raise ValueError(f"valid rows: bool[{rows_total}] expected, got {valid_N.dtype}{valid_N.shape}")
    if queries_QxD.ndim != 2 or queries_QxD.shape[1] != dimension or k < 1:
        raise ValueError(f"queries {queries_QxD.shape}, k = {k} for keys {keys_NxD.shape}")
    count = len(queries_QxD)
    best_rows = np.full((count, k), -1, np.int64)
    best_sqdist = np.full((count, k), np.inf, np.float32)
    superblock_rows, block_rows = _grid(rows_total)
    for start in range(0, rows_total, superblock_rows):
        stop = min(start + superblock_rows, rows_total)
        keys_SxD = np.zeros((superblock_rows, dimension), np.float32)
        keys_SxD[: stop - start] = keys_NxD[start:stop]
        usable_S = np.zeros(superblock_rows, bool)
        usable_S[: stop - start] = valid_N[start:stop]
        keys_device_SxD, penalty_S = _prepare(keys_SxD, usable_S)
        for first in range(0, count, _QUERY_ROWS):
            batch = slice(first, min(first + _QUERY_ROWS, count))
            queries_BxD = np.zeros((_QUERY_ROWS, dimension), np.float32)
            queries_BxD[: batch.stop - first] = queries_QxD[batch]
            position_Bxk, sqdist_Bxk = jax.device_get(
                _search_superblock(
                    keys_device_SxD, penalty_S, queries_BxD, min(k, superblock_rows), block_rows
                )
            )
            found = slice(0, batch.stop - first)
            sqdist = np.concatenate([best_sqdist[batch], sqdist_Bxk[found]], axis=1)
            rows = np.concatenate([best_rows[batch], position_Bxk[found].astype(np.int64) + start], axis=1)
            best_rows[batch], best_sqdist[batch] = nearest_first(rows, sqdist, k)
    return best_rows, best_sqdist


def _grid(rows: int) -> tuple[int, int]:
    """Rows per superblock and per block: equal superblocks, whole blocks, little padding."""
    per_superblock = -(-rows // -(-max(rows, 1) // _SUPERBLOCK_ROWS))
    if per_superblock <= _BLOCK_ROWS:
        padded = max(-(-per_superblock // 512) * 512, 512)
        return padded, padded
    return -(-per_superblock // _BLOCK_ROWS) * _BLOCK_ROWS, _BLOCK_ROWS


@jax.jit
def _prepare(keys_SxD: jax.Array, usable_S: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys on the device, and |k|², infinite where a row may not be found."""
    return keys_SxD, jnp.where(usable_S, jnp.sum(keys_SxD * keys_SxD, axis=1), jnp.inf)


@functools.partial(jax.jit, static_argnames=("k", "block_rows"))
def _search_superblock(
    keys_SxD: jax.Array, penalty_S: jax.Array, queries_QxD: jax.Array, k: int, block_rows: int
) -> tuple[jax.Array, jax.Array]:
    """Positions_Qxk (int32) and sqdist_Qxk of the nearest rows in one superblock.

    The c best scores lie in the c groups of 32 rows with the best maxima, so only those
    groups are sorted: a top-c over all S scores would take longer than the matrix product.
    """
    (rows, dimension), queries = keys_SxD.shape, len(queries_QxD)
    kept = min(k + _SLACK, rows)

    def score(_: None, block: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        keys_BxD, penalty_B = block
        dots_QxB = jax.lax.dot_general(
            queries_QxD, keys_BxD, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
        )
        return None, 2 * dots_QxB - penalty_B

    blocks = (keys_SxD.reshape(-1, block_rows, dimension), penalty_S.reshape(-1, block_rows))
    _, scores_NxQxB = jax.lax.scan(score, None, blocks)
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
    position_Qxc = group * _GROUP_ROWS + index_Qxc % _GROUP_ROWS
    sqdist_Qxc = jnp.sum((queries_QxD[:, None, :] - keys_SxD[position_Qxc]) ** 2, axis=-1)
    sqdist_Qxc = jnp.where(jnp.isneginf(score_Qxc), jnp.inf, sqdist_Qxc)
    sqdist, position = jax.lax.sort((sqdist_Qxc, position_Qxc), num_keys=2)
    return position[:, :k], sqdist[:, :k]
