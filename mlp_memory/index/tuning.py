"""Which tree, codes and search: the cheapest that reach the recall goal, by measured recall and counted work.

A pilot is an index over a sample of n of the N rows. With as many leaves as a shard will have,
with k·n/N neighbours asked for and candidates thinned alike, it finds the share of neighbours that
the whole would, at n/N of the work; so trees and codes are compared on pilots, and only the
best is built. How to search it is then measured on the index itself. Time does not enter: cost is
work counted, so two builds choose the same.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from mlp_memory.index.codec import NORM_CODES
from mlp_memory.index.config import IndexConfig

# Nanoseconds of one core per unit of work: non-negative least squares over 241 searches of ScaNN 1.4.2 on
# 180k keys of d = 192 (2 AVX-512 cores, 2026-11-26), which fits their times to 12 % (root mean
# square). Candidates cost 133 ns there; that two thirds of it grow with d is assumed.
_NS_PER_CENTRE_VALUE = 0.1
_NS_PER_CODE = 0.031
_NS_PER_LEAF = 580.0
_NS_PER_CANDIDATE = 45.0
_NS_PER_CANDIDATE_VALUE = 0.46
_NS_PER_KEY_VALUE = 0.15

_STEP = 1.25
_BAND = 1.15
_MOST_REORDER_FACTOR = 32
_CONFIDENCE = 1.96


@dataclasses.dataclass(frozen=True)
class Structure:
    """What building decides: leaves of a shard's tree, 0 = brute force, and dimensions per code."""

    leaves: int
    dimensions_per_block: int


@dataclasses.dataclass(frozen=True)
class Setting:
    """What searching decides, per shard."""

    leaves_to_search: int
    reorder: int


def cost(structure: Structure, setting: Setting, rows: int, dimension: int) -> float:
    """Microseconds of one core that a query takes in a shard of so many rows, by counted work."""
    if not structure.leaves:
        return 1e-3 * _NS_PER_KEY_VALUE * rows * dimension
    codes = -(-dimension // structure.dimensions_per_block) + NORM_CODES
    scanned = rows * min(setting.leaves_to_search / structure.leaves, 1)
    return 1e-3 * (
        _NS_PER_CENTRE_VALUE * structure.leaves * dimension
        + _NS_PER_CODE * scanned * codes
        + _NS_PER_LEAF * setting.leaves_to_search
        + (_NS_PER_CANDIDATE + _NS_PER_CANDIDATE_VALUE * dimension) * min(setting.reorder, scanned)
    )


def leaf_counts(rows: int, config: IndexConfig) -> list[int]:
    """Trees worth a pilot for a shard of so many rows, the likeliest first."""
    root = math.sqrt(rows)
    return [config.leaves] if config.leaves else [round(root), round(root / 2), round(2 * root)]


def code_widths(config: IndexConfig) -> list[int]:
    """Dimensions per code worth a pilot."""
    return [config.dimensions_per_block] if config.dimensions_per_block else [2, 1, 4]


def settings(
    structure: Structure, rows: int, k: int, config: IndexConfig, near: Setting | None = None
) -> list[Setting]:
    """The grid of searches of a shard, in steps of a quarter; k counts the row itself.

    With `near`, candidates from half to four times its, and at least half its leaves.
    """
    if not structure.leaves:
        return [Setting(0, 0)]
    most = min(_MOST_REORDER_FACTOR * k, rows)
    reorders = [config.reorder] if config.reorder else _steps(min(k, rows), most)
    searched = [config.leaves_to_search] if config.leaves_to_search else _steps(1, structure.leaves)
    if near is not None:
        reorders = [r for r in reorders if near.reorder / 2 <= r <= 4 * near.reorder] or reorders[-1:]
        searched = [s for s in searched if s >= near.leaves_to_search / 2] or searched[-1:]
    return [Setting(leaves, reorder) for reorder in reorders for leaves in searched]


def _steps(low: int, high: int) -> list[int]:
    values = [low]
    while values[-1] < high:
        values.append(min(max(values[-1] + 1, int(values[-1] * _STEP)), high))
    return values


@dataclasses.dataclass(frozen=True)
class Trial:
    """A setting tried.

    Attributes:
      setting: which.
      recall: mean over the queries.
      low: recall less 1.96 standard errors.
      cost: microseconds of one core per query, by counted work.
    """

    setting: Setting
    recall: float
    low: float
    cost: float


def trial(setting: Setting, recall_Q: np.ndarray, cost: float) -> Trial:
    """From the recall of every query."""
    error = recall_Q.std() / math.sqrt(len(recall_Q))
    recall = float(recall_Q.mean())
    return Trial(setting, round(recall, 6), round(recall - _CONFIDENCE * float(error), 6), round(cost, 3))


def walk(
    grid: list[Setting],
    price: Callable[[Setting], float],
    recall: Callable[[Setting], np.ndarray],
    goal: float,
) -> Trial:
    """The cheapest setting of a grid that surely reaches the goal; the best tried where none does.

    Recall rises with leaves and with candidates, so the edge of what reaches the goal is walked along,
    from most candidates to fewest: about one search per row and column of the grid.
    """
    reorders = sorted({setting.reorder for setting in grid}, reverse=True)
    searched = sorted({setting.leaves_to_search for setting in grid})
    trials: list[Trial] = []
    while reorders and searched:
        setting = Setting(searched[0], reorders[0])
        trials.append(trial(setting, recall(setting), price(setting)))
        (reorders if trials[-1].low >= goal else searched).pop(0)
    return _best(trials, goal)


def climb(
    grid: list[Setting],
    price: Callable[[Setting], float],
    recalls: Callable[[list[Setting]], Iterator[np.ndarray]],
    goal: float,
    start: float,
) -> tuple[Trial, list[Trial]]:
    """The same with many settings measured at once, in bands of rising price.

    A setting with no more leaves and no more candidates than one that failed is not tried.

    Args:
      grid: settings.
      price: of one.
      recalls: measures some, each query's recall each.
      goal: to be reached by recall less 1.96 standard errors.
      start: the price expected; what is below 0.7 of it is not tried.

    Returns:
      the trial chosen, and all trials.
    """
    left = sorted(grid, key=price)
    left = [setting for setting in left if price(setting) >= 0.7 * start] or left[-1:]
    trials: list[Trial] = []
    while left:
        limit = _BAND * price(left[0])
        failed = [one.setting for one in trials if one.low < goal]
        band = [setting for setting in left if price(setting) <= limit]
        left = left[len(band) :]
        band = [setting for setting in band if not any(_no_more(setting, other) for other in failed)]
        trials += [trial(s, recall_Q, price(s)) for s, recall_Q in zip(band, recalls(band))]
        if any(one.low >= goal for one in trials):
            break
    return _best(trials, goal), trials


def _best(trials: list[Trial], goal: float) -> Trial:
    passing = [one for one in trials if one.low >= goal]
    if passing:
        return min(passing, key=lambda one: one.cost)
    return max(trials, key=lambda one: (one.low, -one.cost))


def _no_more(one: Setting, other: Setting) -> bool:
    return one.leaves_to_search <= other.leaves_to_search and one.reorder <= other.reorder
