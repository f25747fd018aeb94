"""Perplexity and its uncertainty, from the nats of each scored token."""

import math
from typing import Any, NamedTuple

import numpy as np

_BLOCK_ROWS = 256
_MIN_DOCUMENTS = 10
# Bounds the [samples, groups] counts of one bootstrap batch to 32 MiB.
_COUNTS_PER_BATCH = 1 << 22


class Interval(NamedTuple):
    """A bootstrap interval and what was resampled for it."""

    low: float
    high: float
    method: str


def perplexity(nll_sum: float, count: int) -> float:
    """exp(nll_sum / count). Per token with `count` tokens, per word with `count` words.

    Raises:
      ValueError: `count` is not positive.
    """
    if count <= 0:
        raise ValueError(f"perplexity over {count} units")
    with np.errstate(over="ignore"):
        return float(np.exp(np.float64(nll_sum) / count))


def bootstrap_interval(nll_N: np.ndarray, document_ids_N: np.ndarray, **settings: Any) -> Interval:
    """Percentile bootstrap interval of the per-token perplexity of `nll_N`. Args as `bootstrap_mean`'s."""
    low, high, method = bootstrap_mean(nll_N, document_ids_N, **settings)
    return Interval(float(np.exp(low)), float(np.exp(high)), method)


def units_of(document_ids_N: np.ndarray) -> tuple[np.ndarray, str]:
    """What is drawn or set apart as one, [N] numbers from 0, and what it is.

    Tokens of one document are not independent, so it is whole documents. Below ten documents,
    contiguous blocks of 256 rows take their place.
    """
    unit_N = np.unique(document_ids_N, return_inverse=True)[1].reshape(-1)
    if unit_N.max() + 1 >= _MIN_DOCUMENTS:
        return unit_N, f"{unit_N.max() + 1} documents"
    unit_N = np.arange(unit_N.size) // _BLOCK_ROWS
    blocks = int(unit_N[-1]) + 1
    return unit_N, f"{blocks} block{'s' if blocks > 1 else ''} of {_BLOCK_ROWS} tokens"


def bootstrap_mean(
    nll_N: np.ndarray,
    document_ids_N: np.ndarray,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of the mean of `nll_N`, over `units_of` its documents.

    Args:
      nll_N: nats of each scored token, or differences of them.
      document_ids_N: integer that tells which document each row belongs to.
      samples: number of resamples.
      seed: of the resampling; equal arguments give equal intervals.
      level: coverage in (0, 1).

    Raises:
      ValueError: shapes differ, there are no rows, or a value is not finite.
    """
    nll_N = np.asarray(nll_N, np.float64)
    document_ids_N = np.asarray(document_ids_N)
    if nll_N.ndim != 1 or nll_N.shape != document_ids_N.shape or not nll_N.size:
        raise ValueError(
            f"nll {nll_N.shape} and document ids {document_ids_N.shape} must be equal [N], N > 0"
        )
    if not np.isfinite(nll_N).all():
        raise ValueError(f"row {int(np.isfinite(nll_N).argmin())} of nll is not finite")
    means_S = resampled_means(nll_N[None], document_ids_N, samples, seed)[:, 0]
    low, high = np.quantile(means_S, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), f"bootstrap over {units_of(document_ids_N)[1]}")


def resampled_means(
    nll_JxN: np.ndarray, document_ids_N: np.ndarray, samples: int = 1000, seed: int = 0
) -> np.ndarray:
    """Means of J systems' nats over the same resamples of `units_of` the documents, float64 [samples, J].

    What is made of a row (a difference, a fit over systems) has as its percentile interval the quantiles of
    that over the rows. Equal arguments give equal resamples.
    """
    group_N = units_of(document_ids_N)[0]
    sums_JxG = np.stack([np.bincount(group_N, weights=nll_N) for nll_N in nll_JxN])
    counts_G = np.bincount(group_N)
    groups = len(counts_G)
    rng = np.random.default_rng(seed)
    found = []
    for start in range(0, samples, batch := max(1, _COUNTS_PER_BATCH // groups)):
        drawn_SxG = rng.multinomial(groups, np.full(groups, 1 / groups), size=min(batch, samples - start))
        # Elementwise and not `@`: BLAS adds in an order that depends on its thread count.
        rows_S = (drawn_SxG * counts_G).sum(1)
        found.append(np.stack([(drawn_SxG * sums_G).sum(1) / rows_S for sums_G in sums_JxG], axis=1))
    return np.concatenate(found)


def gain_recovered(base_nll: float, knn_nll: float, memory_nll: float) -> float | None:
    """The memory's gain over base as a share of kNN-LM's, in log perplexity.

    Returns None where kNN-LM gains nothing, since there is then nothing to recover.
    """
    gain = base_nll - knn_nll
    return (base_nll - memory_nll) / gain if gain > 0 and math.isfinite(gain) else None


def gain_interval(
    base_N: np.ndarray,
    knn_N: np.ndarray,
    memory_N: np.ndarray,
    document_ids_N: np.ndarray,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of `gain_recovered`, all three systems on the same resampled tokens.

    Args:
      base_N, knn_N, memory_N: nats of each scored token.
      document_ids_N, samples, seed, level: as `bootstrap_mean`'s.

    Returns:
      None where kNN-LM gains nothing in some resample: its share then has no bounds.
    """
    base_N = np.asarray(base_N, np.float64)
    gains_2xN = np.stack([base_N - knn_N, base_N - memory_N])
    available_S, gained_S = resampled_means(gains_2xN, document_ids_N, samples, seed).T
    if (available_S <= 0).any():
        return None
    low, high = np.quantile(gained_S / available_S, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
