"""The temperature τ of the kNN distribution, chosen on held-out text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mlp_memory.targets.interpolation import mixture_nll
from mlp_memory.targets.knn import knn_log_prob

LAMBDAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)


class TemperatureChoice(NamedTuple):
    """The best (τ, λ), and `table`: what every pair of the grid gave, as plain JSON.

    `table` has `temperatures` (T), `lambdas` (L), `nll` (T lists of L, nats per token) and
    `base_nll` (the decoder alone).
    """

    tau: float
    lam: float
    table: dict[str, Any]


def median_spread(sqdist_Qxk: np.ndarray) -> float:
    """Median over queries of the mean distance of a query's neighbours beyond its nearest.

    p_kNN does not change when all distances of a query grow by one amount, so the spread and
    not the distance is the scale that τ is measured against. 1 where nothing is spread.
    """
    found_Qxk = np.isfinite(sqdist_Qxk)
    some_Q = found_Qxk.any(axis=1)
    if not some_Q.any():
        return 1.0
    sqdist, found = sqdist_Qxk[some_Q], found_Qxk[some_Q]
    nearest = sqdist.min(axis=1)
    mean = np.where(found, sqdist, 0).sum(axis=1, dtype=np.float64) / found.sum(axis=1)
    return float(np.median(mean - nearest)) or 1.0


def choose_temperature(
    sqdist_Qxk: np.ndarray,
    neighbor_labels_Qxk: np.ndarray,
    base_log_prob_Q: np.ndarray,
    next_token_Q: np.ndarray,
    taus: Sequence[float],
    lambdas: Sequence[float] = LAMBDAS,
) -> TemperatureChoice:
    """The (τ, λ) with the least negative log likelihood of λ·p_kNN + (1 − λ)·p_base.

    Args:
      sqdist_Qxk: float32 squared distances of held-out queries' neighbours, inf where none.
      neighbor_labels_Qxk: int32 next token of each neighbour.
      base_log_prob_Q: the decoder's log probability of the next token, nats.
      next_token_Q: the token that does follow.
      taus: temperatures tried.
      lambdas: weights of p_kNN tried, in (0, 1).

    Returns:
      The choice; of equal ones the first τ, then the first λ.
    """
    rows_Qxk = np.where(np.isfinite(sqdist_Qxk), 0, -1)
    knn_TxQ = knn_log_prob(rows_Qxk, sqdist_Qxk, neighbor_labels_Qxk, taus, next_token_Q)
    base_Q = base_log_prob_Q.astype(np.float64)
    nll_TxL = np.array([mixture_nll(base_Q, knn_Q, np.asarray(lambdas)) for knn_Q in knn_TxQ])
    t, l = np.unravel_index(nll_TxL.argmin(), nll_TxL.shape)
    table = {
        "temperatures": [float(tau) for tau in taus],
        "lambdas": [float(lam) for lam in lambdas],
        "nll": [[round(float(x), 6) for x in row] for row in nll_TxL],
        "base_nll": round(float(-base_Q.mean()), 6),
    }
    return TemperatureChoice(float(taus[t]), float(lambdas[l]), table)
