import math

import numpy as np
import pytest
import scipy.stats

from mlp_memory.evaluation.harness.gains import best, gain, interval, mean_gain, sign_test, verdict


def test_the_sign_test_is_the_exact_binomial(rng):
    for wins, losses in [(0, 0), (1, 0), (5, 5), (0, 30), *rng.integers(0, 60, (20, 2)).tolist()]:
        wanted = scipy.stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert sign_test(wins, losses) == pytest.approx(wanted, rel=1e-9)
    assert 0 < sign_test(0, 1000) < 1e-300
    assert sign_test(4000, 3900) < 1


def test_a_gain_counts_wins_losses_and_ties_and_knows_which_way_is_better(rng):
    base = rng.integers(0, 2, 200).astype(float)
    better = np.maximum(base, rng.integers(0, 2, 200))
    found = gain(better, base, 200, 0)
    changed = int((better != base).sum())
    assert (found.wins, found.losses, found.ties) == (changed, 0, 200 - changed)
    assert found.difference == pytest.approx(changed / 200)
    turned = gain(better, base, 200, 0, higher=False)
    assert (turned.wins, turned.losses, turned.p) == (0, changed, found.p)
    assert gain(better, base, 200, 0).to_json()["interval"] == list(found.interval)


def test_the_interval_covers_a_known_mean_and_fewer_than_ten_examples_have_none(rng):
    values = rng.normal(size=400)
    low, high = interval(values, 1000, 0)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=half / 2)
    assert high == pytest.approx(values.mean() + half, abs=half / 2)
    assert interval(values[:9], 1000, 0) is None
    assert interval([math.inf] * 20, 10, 0) is None


def test_what_no_interval_bears_out_is_unclear():
    ones, zeros = np.ones(50), np.zeros(50)
    assert verdict(gain(ones, zeros, 100, 0)) == "yes"
    assert verdict(gain(zeros, ones, 100, 0)) == "no"
    assert verdict(gain(zeros, zeros, 100, 0)) == "unclear"
    assert verdict(gain(ones[:5], zeros[:5], 100, 0)) == "unclear"


def test_the_least_of_equally_good_lambdas_is_taken():
    assert best([0.1, 0.4, 0.4, 0.2], [0.0, 0.1, 0.2, 0.3]) == 1
    assert best([0.4, 0.1, 0.1], [0.0, 0.1, 0.2], higher=False) == 1


def test_the_mean_gain_gives_each_task_one_vote():
    found = mean_gain([np.ones(10), np.zeros(1000)], 200, 0)
    assert found["difference"] == 0.5
    assert found["interval"] == [0.5, 0.5]
    assert mean_gain([np.ones(9), np.zeros(1000)], 20, 0)["interval"] is None
