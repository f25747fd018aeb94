"""The kNN distribution over next tokens, sparse: p(y) ∝ Σ_{i: v_i = y} exp(−d_i / τ).

arXiv 2508.01832, eq. for p_kNN. Neighbour lists are as in index/neighbors.py: rows -1 and
distance inf where there is no neighbour.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)


class SparseTargets(NamedTuple):
    """Sparse distributions, most probable token first, equal ones by token.

    Attributes:
      token_ids_QxM: int32, 0 where the probability is 0.
      probs_QxM: float32, sum 1 over M; all 0 where a query has no neighbour.
      kept_mass_Q: float32, the share of the full distribution that the M tokens hold; 0 there.
      support_Q: int32, tokens with a positive probability in the full distribution.
    """

    token_ids_QxM: np.ndarray
    probs_QxM: np.ndarray
    kept_mass_Q: np.ndarray
    support_Q: np.ndarray


def knn_distribution(
    rows_Qxk: np.ndarray, sqdist_Qxk: np.ndarray, labels_Qxk: np.ndarray, tau: float, top_m: int
) -> SparseTargets:
    """The distribution of the neighbours' next tokens, cut to its `top_m` and renormalised.

    Args:
      rows_Qxk: int64, -1 where there is no neighbour.
      sqdist_Qxk: float32 squared distances.
      labels_Qxk: int32 next token of each neighbour; any value where there is none.
      tau: temperature, in units of squared distance.
      top_m: M, tokens kept.
    """
    queries, k = rows_Qxk.shape
    found_Qxk = rows_Qxk >= 0
    excess_Qxk, _ = _excess(np.where(found_Qxk, sqdist_Qxk, np.inf))
    weights_Qxk = np.exp(excess_Qxk / np.float32(-tau))

    # Token and position in one integer: sorting it brings equal tokens together, in rank order.
    packed_Qxk = np.where(found_Qxk, labels_Qxk, -1).astype(np.uint32).astype(np.uint64) << _HIGH
    packed_Qxk |= np.arange(k, dtype=np.uint64)
    packed_Qxk.sort(axis=1)
    tokens_Qxk = packed_Qxk >> _HIGH
    weights_Qxk = np.take_along_axis(weights_Qxk, (packed_Qxk & _LOW).astype(np.intp), axis=1)
    first_Qxk = np.ones((queries, k), bool)
    first_Qxk[:, 1:] = tokens_Qxk[:, 1:] != tokens_Qxk[:, :-1]
    starts = np.flatnonzero(first_Qxk)
    mass_Qxk = np.zeros((queries, k), np.float32)
    if starts.size:
        mass_Qxk.reshape(-1)[starts] = np.add.reduceat(weights_Qxk.reshape(-1).astype(np.float64), starts)
    # Less than this may round to no probability at all once divided by the total.
    mass_Qxk[mass_Qxk < np.finfo(np.float32).tiny] = 0
    total_Q = mass_Qxk.sum(axis=1, dtype=np.float64)
    support_Q = (mass_Qxk > 0).sum(axis=1, dtype=np.int32)

    # Falling mass, then rising token: bits of floats that are not negative order as they do.
    ranked_Qxk = (_LOW - mass_Qxk.view(np.uint32).astype(np.uint64)) << _HIGH | tokens_Qxk
    ranked_Qxk.sort(axis=1)
    ranked_QxM = ranked_Qxk[:, :top_m]
    kept_QxM = (_LOW - (ranked_QxM >> _HIGH)).astype(np.uint32).view(np.float32)
    tokens_QxM = np.where(kept_QxM > 0, ranked_QxM & _LOW, 0).astype(np.int32)
    kept_Q = kept_QxM.sum(axis=1, dtype=np.float64)
    probs_QxM = (kept_QxM / np.maximum(kept_Q, np.finfo(np.float64).tiny)[:, None]).astype(np.float32)
    short = ((0, 0), (0, max(top_m - k, 0)))
    return SparseTargets(
        np.pad(tokens_QxM, short),
        np.pad(probs_QxM, short),
        np.divide(kept_Q, total_Q, out=np.zeros(queries), where=total_Q > 0).astype(np.float32),
        support_Q,
    )


def neighbour_weights(rows_Qxk: np.ndarray, sqdist_Qxk: np.ndarray, tau: float) -> np.ndarray:
    """Each neighbour's share of the distribution, exp(−d/τ) / Σ exp(−d/τ).

    Args:
      rows_Qxk: int64, -1 where there is no neighbour.
      sqdist_Qxk: float32 squared distances.
      tau: temperature.

    Returns:
      float64 [Q, k], sum 1 over k; 0 where there is no neighbour.
    """
    excess_Qxk, _ = _excess(np.where(rows_Qxk >= 0, sqdist_Qxk, np.inf))
    weights_Qxk = np.exp(excess_Qxk / np.float32(-tau)).astype(np.float64)
    return weights_Qxk / np.maximum(weights_Qxk.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)


def knn_log_prob(
    rows_Qxk: np.ndarray,
    sqdist_Qxk: np.ndarray,
    labels_Qxk: np.ndarray,
    taus: Sequence[float],
    next_token_Q: np.ndarray,
) -> np.ndarray:
    """Log p_kNN of one token per query over all k neighbours, for each temperature.

    Args:
      rows_Qxk: int64, -1 where there is no neighbour.
      sqdist_Qxk: float32 squared distances.
      labels_Qxk: int32 next token of each neighbour.
      taus: T temperatures.
      next_token_Q: int the token whose probability is asked for.

    Returns:
      float64 [T, Q] in nats; -inf where no neighbour has the token.
    """
    found_Qxk = rows_Qxk >= 0
    excess_Qxk, nearest_Q = _excess(np.where(found_Qxk, sqdist_Qxk, np.inf))
    query_H, rank_H = np.nonzero(found_Qxk & (labels_Qxk == next_token_Q[:, None]))
    hit_Qxk = np.full(rows_Qxk.shape, np.inf, np.float32)
    hit_Qxk[query_H, rank_H] = sqdist_Qxk[query_H, rank_H]
    # Hits are summed from their own nearest, so that a small temperature does not lose them.
    hit_excess_Qxk, hit_nearest_Q = _excess(hit_Qxk)
    hit_excess_H = hit_excess_Qxk[query_H, rank_H]
    result = np.empty((len(taus), len(rows_Qxk)))
    for t, tau in enumerate(taus):
        total_Q = np.exp(excess_Qxk / np.float32(-tau)).sum(axis=1, dtype=np.float64)
        hits_Q = np.bincount(query_H, np.exp(hit_excess_H / np.float32(-tau)), minlength=len(rows_Qxk))
        with np.errstate(divide="ignore"):
            log_hits_Q = np.log(hits_Q)
        shift_Q = (hit_nearest_Q.astype(np.float64) - nearest_Q) / tau
        result[t] = log_hits_Q - shift_Q - np.log(np.where(total_Q > 0, total_Q, 1.0))
    result[:, hits_Q == 0] = -np.inf
    return result


def _excess(sqdist_Qxk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance beyond each query's nearest (inf where there is no neighbour), and the nearest.

    Where a query has no neighbour, its nearest is said to be 0.
    """
    nearest_Q = sqdist_Qxk.min(axis=1, initial=np.inf)
    nearest_Q = np.where(np.isfinite(nearest_Q), nearest_Q, np.float32(0)).astype(np.float32)
    return (sqdist_Qxk - nearest_Q[:, None]).astype(np.float32, copy=False), nearest_Q
