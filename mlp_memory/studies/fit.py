"""The scaling law PPL = (β·N)^γ, fitted to a few sizes, and where two of them cross."""

from typing import NamedTuple

import numpy as np


class PowerLaw(NamedTuple):
    """ln PPL = γ·(ln N + ln β); γ below 0 where larger is better. Arrays fit alike in every element."""

    log_beta: np.ndarray
    gamma: np.ndarray

    def log_perplexity(self, parameters: np.ndarray) -> np.ndarray:
        """ln PPL at N parameters."""
        return self.gamma * (np.log(parameters) + self.log_beta)


def fit(parameters_P: np.ndarray, nats_SxP: np.ndarray) -> PowerLaw:
    """Least squares in logarithms.

    Args:
      parameters_P: N of each size.
      nats_SxP: mean nats per token (ln PPL) of each size, in S samples; [P] for one.

    Returns:
      β and γ, each [S] (scalars for one). β is not finite where γ is 0.

    Raises:
      ValueError: fewer than two different sizes.
    """
    x_P = np.log(np.asarray(parameters_P, np.float64))
    nats_SxP = np.asarray(nats_SxP, np.float64)
    if len(np.unique(x_P)) < 2 or nats_SxP.shape[-1] != len(x_P):
        raise ValueError(f"a power law of {len(x_P)} sizes, {len(np.unique(x_P))} different")
    centred_P = x_P - x_P.mean()
    gamma = (nats_SxP * centred_P).sum(-1) / (centred_P**2).sum()
    intercept = nats_SxP.mean(-1) - gamma * x_P.mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        return PowerLaw(intercept / gamma, gamma)


def log_crossing(one: PowerLaw, other: PowerLaw) -> np.ndarray:
    """ln N at which both give the same perplexity; not finite where they are parallel."""
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = other.gamma * other.log_beta - one.gamma * one.log_beta
        return gap / (one.gamma - other.gamma)


class Bounds(NamedTuple):
    """A 95 % percentile interval; an end is infinite, or both are NaN, where samples are."""

    low: float
    high: float

    @classmethod
    def of(cls, values_S: np.ndarray) -> "Bounds":
        """That of samples, which may be infinite."""
        if np.isnan(values_S).any():
            return cls(float("nan"), float("nan"))
        low, high = np.quantile(values_S, [0.025, 0.975], method="nearest")
        return cls(float(low), float(high))


def verdict(difference: Bounds) -> str:
    """Whether something is below something else: "yes", "no", or "unclear" where the interval has 0."""
    if difference.high < 0:
        return "yes"
    return "no" if difference.low > 0 else "unclear"


def crossing_bounds(one: PowerLaw, other: PowerLaw, low: float, high: float) -> tuple[float, Bounds | None]:
    """The share of samples whose curves cross, `other` being better from there on, and their N's interval.

    Args:
      one, other: fits to the same samples.
      low, high: N between which a crossing counts as found.

    Returns:
      The share of samples that cross between low and high with other falling faster, and the 95 % interval
      of their N, None where there are none.
    """
    log_N_S = log_crossing(one, other)
    good_S = np.isfinite(log_N_S) & (other.gamma < one.gamma)
    good_S &= (log_N_S >= np.log(low)) & (log_N_S <= np.log(high))
    if not good_S.any():
        return 0.0, None
    return float(good_S.mean()), Bounds(*np.exp(Bounds.of(log_N_S[good_S])))
