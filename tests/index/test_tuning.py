import numpy as np
import pytest

from mlp_memory.index.config import IndexConfig
from mlp_memory.index.tuning import Setting, Structure, climb, code_widths, cost, leaf_counts, settings, walk


def surface(rng):
    """A recall that rises with both settings, and what each of 40 queries has of it."""
    scale, spread = rng.uniform(20, 200, 2), rng.normal(0, 0.01, 40)
    spread -= spread.mean()

    def recall(setting):
        reached = (1 - np.exp(-setting.leaves_to_search / scale[0])) * (
            1 - np.exp(-setting.reorder / scale[1])
        )
        return np.clip(reached + spread, 0, 1)

    return recall


def low(values):
    return values.mean() - 1.96 * values.std() / np.sqrt(len(values))


@pytest.mark.parametrize("goal", [0.5, 0.9, 0.95])
def test_walk_and_climb_find_the_cheapest_setting_that_surely_reaches_the_goal(goal):
    rng = np.random.default_rng()
    recall, structure = surface(rng), Structure(700, 2)
    grid = settings(structure, 500_000, 65, IndexConfig())

    def price(setting):
        return cost(structure, setting, 500_000, 64)

    passing = [setting for setting in grid if low(recall(setting)) >= goal]
    best = min(price(setting) for setting in passing)
    chosen = walk(grid, price, recall, goal)
    assert chosen.cost == pytest.approx(best, rel=1e-3)
    assert chosen.low == pytest.approx(low(recall(chosen.setting)), abs=1e-6)
    asked = []

    def recalls(some):
        asked.extend(some)
        return (recall(setting) for setting in some)

    chosen, trials = climb(grid, price, recalls, goal, best)
    assert chosen.cost == pytest.approx(best, rel=1e-3)
    assert len(asked) == len(trials) < len(grid) / 4


def test_where_no_setting_reaches_the_goal_the_best_tried_is_told_as_it_is():
    recall, structure = surface(np.random.default_rng()), Structure(50, 2)
    grid = settings(structure, 3000, 9, IndexConfig())
    for chosen in (
        walk(grid, lambda s: s.reorder, recall, 1.0),
        climb(grid, lambda s: s.reorder, lambda some: map(recall, some), 1.0, 0.0)[0],
    ):
        assert chosen.low < 1.0
        assert chosen.recall == pytest.approx(recall(chosen.setting).mean(), abs=1e-6)


def test_what_the_config_gives_is_not_tuned():
    config = IndexConfig(leaves=90, dimensions_per_block=3, leaves_to_search=7, reorder=200)
    assert (leaf_counts(10_000, config), code_widths(config)) == ([90], [3])
    assert settings(Structure(90, 3), 10_000, 65, config) == [Setting(7, 200)]
    assert sorted(leaf_counts(10_000, IndexConfig())) == [50, 100, 200]
    grid = settings(Structure(100, 2), 10_000, 65, IndexConfig())
    assert {min(s.reorder for s in grid), max(s.reorder for s in grid)} == {65, 32 * 65}
    assert {min(s.leaves_to_search for s in grid), max(s.leaves_to_search for s in grid)} == {1, 100}
