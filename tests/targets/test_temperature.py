import math

import numpy as np
import pytest

from mlp_memory.targets.temperature import choose_temperature, median_spread


def test_chosen_temperature_is_the_best_of_a_brute_force_grid():
    rng = np.random.default_rng()
    sqdist = np.sort(rng.gamma(2.0, 30.0, (60, 25)), axis=1).astype(np.float32)
    sqdist[7, 10:], sqdist[8] = np.inf, np.inf
    labels = rng.integers(0, 30, sqdist.shape)
    asked = np.where(rng.random(60) < 0.5, labels[:, 0], rng.integers(0, 30, 60))
    base = np.log(rng.uniform(0.001, 0.3, 60))
    taus, lambdas = [1.0, 8.0, 40.0, 200.0], [0.1, 0.3, 0.7]
    losses = {}
    for tau in taus:
        for lam in lambdas:
            total = 0.0
            for q in range(60):
                weights = [math.exp(-(d - sqdist[q].min()) / tau) if d < math.inf else 0.0 for d in sqdist[q]]
                hit = sum(w for w, label in zip(weights, labels[q]) if label == asked[q])
                knn = hit / sum(weights) if sum(weights) else 0.0
                total -= math.log(lam * knn + (1 - lam) * math.exp(base[q]))
            losses[tau, lam] = total / 60
    choice = choose_temperature(sqdist, labels, base, asked, taus, lambdas)
    assert (choice.tau, choice.lam) == min(losses, key=losses.get)
    for t, tau in enumerate(taus):
        for l, lam in enumerate(lambdas):
            assert choice.table["nll"][t][l] == pytest.approx(losses[tau, lam], abs=1e-5)
    assert choice.table["base_nll"] == pytest.approx(-base.mean(), abs=1e-5)


def test_spread_scales_with_distances_and_not_with_their_offset():
    rng = np.random.default_rng()
    sqdist = rng.gamma(2.0, 30.0, (50, 25)).astype(np.float32)
    sqdist[3], sqdist[4, 5:] = np.inf, np.inf
    spread = median_spread(sqdist)
    assert median_spread(sqdist * 7) == pytest.approx(7 * spread, rel=1e-4)
    assert median_spread(sqdist + 100) == pytest.approx(spread, rel=1e-4)
    assert median_spread(np.full((3, 4), np.inf, np.float32)) == 1.0
    assert median_spread(np.zeros((3, 4), np.float32)) == 1.0
