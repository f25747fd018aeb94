"""The choice of λ on one part of a task, and what a system gains on the other."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from mlp_memory.statistics import bootstrap_mean

_FEWEST = 10


def best(values_L: Sequence[float], lambdas_L: Sequence[float], higher: bool = True) -> int:
    """The place of the best value; of the least λ where several tie."""
    sign = 1.0 if higher else -1.0
    return max(range(len(values_L)), key=lambda at: (sign * values_L[at], -lambdas_L[at]))


class Gain(NamedTuple):
    """A system less another on the same examples.

    Attributes:
      difference: of the means.
      interval: 95 % of the paired bootstrap over examples; None for fewer than ten.
      wins, losses, ties: examples on which it is better, worse, equal.
      p: of the exact two-sided sign test over wins and losses.
    """

    difference: float
    interval: tuple[float, float] | None
    wins: int
    losses: int
    ties: int
    p: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**self._asdict(), "interval": self.interval and list(self.interval)}


def gain(
    values_E: Sequence[float],
    others_E: Sequence[float],
    samples: int,
    seed: int,
    higher: bool = True,
) -> Gain:
    """What `values_E` gains over `others_E`, example by example.

    Args:
      values_E, others_E: the same examples' values under two systems.
      samples, seed: of the bootstrap.
      higher: whether a higher value is better; the difference is of the values as they are.
    """
    difference_E = np.asarray(values_E, np.float64) - np.asarray(others_E, np.float64)
    sign = 1.0 if higher else -1.0
    wins, losses = int((sign * difference_E > 0).sum()), int((sign * difference_E < 0).sum())
    ties = len(difference_E) - wins - losses
    found = interval(difference_E, samples, seed)
    return Gain(float(difference_E.mean()), found, wins, losses, ties, sign_test(wins, losses))


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p of so uneven a split, where either is as likely."""
    tosses, fewer, ways, total = wins + losses, min(wins, losses), 1, 0
    for heads in range(fewer + 1):
        total += ways
        ways = ways * (tosses - heads) // (heads + 1)
    return float(min(Fraction(2 * total, 1 << tosses), 1))


def interval(values_E: Sequence[float], samples: int, seed: int) -> tuple[float, float] | None:
    """95 % bootstrap interval of a mean over examples; None for fewer than ten, or an infinite one."""
    values_E = np.asarray(values_E, np.float64)
    if len(values_E) < _FEWEST or not np.isfinite(values_E).all():
        return None
    low, high, _ = bootstrap_mean(values_E, np.arange(len(values_E)), samples, seed)
    return low, high


def verdict(found: Gain) -> str:
    """Whether a gain is there: "yes" above 0 at its interval's lower end, "no" below 0 at the upper."""
    if found.interval is None:
        return "unclear"
    low, high = found.interval
    return "yes" if low > 0 else "no" if high < 0 else "unclear"


def mean_gain(differences: Sequence[Sequence[float]], samples: int, seed: int) -> dict[str, Any]:
    """The mean over tasks of their gains, and its interval: each task's examples are resampled alone.

    Args:
      differences: of each task's examples, a system less the base.
      samples, seed: of the bootstrap.
    """
    arrays = [np.asarray(difference_E, np.float64) for difference_E in differences]
    rng = np.random.default_rng(seed)
    draws_S = np.zeros(samples)
    for difference_E in arrays:
        count = len(difference_E)
        for at in range(samples):
            draws_S[at] += difference_E[rng.integers(0, count, count)].mean() / len(arrays)
    low, high = np.quantile(draws_S, [0.025, 0.975])
    enough = min(map(len, arrays)) >= _FEWEST
    return {
        "difference": float(np.mean([difference_E.mean() for difference_E in arrays])),
        "interval": [float(low), float(high)] if enough else None,
    }
