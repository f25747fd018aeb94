"""How far apart two sparse next-token distributions are, row by row."""

from typing import NamedTuple

import numpy as np

SKEW = 0.01
"""ε of the skew divergence."""

_HIGH = 32


class Divergence(NamedTuple):
    """Per row, float64 in nats where it is a divergence; see `divergence`.

    Attributes:
      tv_Q: total variation, in [0, 1].
      skew_kl_Q: skew divergence, in [0, ln 1/ε].
      infinite_Q: bool, whether plain KL(p || q) is infinite: q lacks a token of p.
    """

    tv_Q: np.ndarray
    skew_kl_Q: np.ndarray
    infinite_Q: np.ndarray


def divergence(
    p_tokens_QxM: np.ndarray, p_QxM: np.ndarray, q_tokens_QxL: np.ndarray, q_QxL: np.ndarray
) -> Divergence:
    """Total variation and skew divergence of each row of q from the same row of p.

    TV = ½ Σ_v |p_v − q_v|. The skew divergence KL(p || (1 − ε) q + ε p) with ε = `SKEW` (Lee,
    "Measures of distributional similarity", 1999) stays finite where q lacks a token of p. Each
    row is renormalised first. A row without any mass in p diverges from nothing; one without any
    in q, but with some in p, is as far off as can be: TV 1, skew divergence ln 1/ε.

    Args:
      p_tokens_QxM: int tokens, none twice in a row among those with a positive probability.
      p_QxM: float probabilities, 0 for entries that do not count.
      q_tokens_QxL, q_QxL: likewise.
    """
    queries = len(p_QxM)
    p_key_P, p_P = _entries(p_tokens_QxM, p_QxM)
    q_key_R, q_R = _entries(q_tokens_QxL, q_QxL)
    key_U, place = np.unique(np.concatenate([p_key_P, q_key_R]), return_inverse=True)
    p_U, q_U = np.zeros(len(key_U)), np.zeros(len(key_U))
    p_U[place[: len(p_P)]], q_U[place[len(p_P) :]] = p_P, q_R
    query_U = key_U >> _HIGH

    def total(value_U: np.ndarray) -> np.ndarray:
        return np.bincount(query_U, value_U, minlength=queries)

    some_Q = total(p_U) > 0
    mixed_U = (1 - SKEW) * q_U + SKEW * p_U
    ratio_U = np.divide(p_U, mixed_U, out=np.ones_like(p_U), where=p_U > 0)
    return Divergence(
        # Both halves of |p − q| are equal, but for a row that has no mass on one side.
        np.where(some_Q, np.clip(total(np.maximum(p_U - q_U, 0)), 0, 1), 0),
        np.where(some_Q, np.maximum(total(p_U * np.log(ratio_U)), 0), 0),
        total((p_U > 0) & (q_U == 0)) > 0,
    )


def _entries(tokens_QxM: np.ndarray, probs_QxM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row << 32 | token) and renormalised probability of every entry that is positive."""
    probs_QxM = probs_QxM.astype(np.float64)
    query_P, column_P = np.nonzero(probs_QxM > 0)
    key_P = query_P.astype(np.int64) << _HIGH | tokens_QxM[query_P, column_P].astype(np.int64)
    return key_P, probs_QxM[query_P, column_P] / probs_QxM.sum(axis=1)[query_P]
