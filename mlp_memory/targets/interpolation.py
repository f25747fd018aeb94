"""Interpolation of a language model with its memory or with kNN, on held-out tokens.

p = λ·p_other + (1 − λ)·p_base (PAPER.md, 4). Pure functions of float arrays with one row per
scored token (`_N`), in nats; no model and no corpus is known.
"""

import numpy as np


def lambda_grid() -> np.ndarray:
    """The interpolation weights that are tried: float64 [40], 0, 0.025, ... 0.975.

    1 is left out: a retrieved distribution gives most tokens no mass at all, so its
    perplexity alone is infinite.
    """
    return np.arange(40) / 40


def mixture_rows(base_N: np.ndarray, other_N: np.ndarray, weight: float | np.ndarray) -> np.ndarray:
    """-log(λ e^other + (1 - λ) e^base) of each row, in nats (PAPER.md, step 4).

    Args:
      base_N: log probabilities of the true next token under the base model.
      other_N: the same under the memory or the retrieved distribution; may be -inf.
      weight: λ in [0, 1], of all rows or of each.

    Returns:
      float64 [N]; +inf where the mixture gives the token no mass.

    Raises:
      ValueError: shapes differ, a value is NaN or λ lies outside [0, 1].
    """
    base_N, other_N = _checked(base_N, other_N)
    weight = np.asarray(weight, np.float64)
    if not ((weight >= 0) & (weight <= 1)).all():
        raise ValueError(f"λ = {weight} lies outside [0, 1]")
    with np.errstate(divide="ignore"):
        log_other, log_base = np.log(weight), np.log1p(-weight)
    return -np.logaddexp(log_other + other_N, log_base + base_N)


def mixture_nll(base_N: np.ndarray, other_N: np.ndarray, lambdas_L: np.ndarray) -> np.ndarray:
    """Mean nats per row of the mixture for each λ: float64 [L] (see `mixture_rows`).

    Raises:
      ValueError: as `mixture_rows`, or there are no rows.
    """
    base_N, other_N = _checked(base_N, other_N)
    if not base_N.size:
        raise ValueError("no rows to score")
    return np.array([mixture_rows(base_N, other_N, weight).mean() for weight in np.asarray(lambdas_L)])


def best_lambda(
    base_N: np.ndarray, other_N: np.ndarray, lambdas_L: np.ndarray | None = None
) -> tuple[float, float]:
    """The λ with the least mean nats and those nats; the smallest λ where several tie."""
    lambdas_L = lambda_grid() if lambdas_L is None else np.sort(np.asarray(lambdas_L, np.float64))
    nll_L = mixture_nll(base_N, other_N, lambdas_L)
    best = int(nll_L.argmin())
    return float(lambdas_L[best]), float(nll_L[best])


def _checked(base_N: np.ndarray, other_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    base_N, other_N = np.asarray(base_N, np.float64), np.asarray(other_N, np.float64)
    if base_N.ndim != 1 or base_N.shape != other_N.shape:
        raise ValueError(f"log probabilities {base_N.shape} and {other_N.shape} must be equal [N]")
    if np.isnan(base_N).any() or np.isnan(other_N).any():
        raise ValueError("a log probability is NaN")
    return base_N, other_N
