import math

import numpy as np
import pytest

from mlp_memory.targets.knn import knn_distribution, knn_log_prob


def random_neighbors(rng, queries=40, k=33, vocab=9):
    """Lists with ties, missing ends, one empty list, one token everywhere."""
    sqdist = np.sort(rng.gamma(2.0, 20.0, (queries, k)).round(1), axis=1).astype(np.float32)
    rows = rng.integers(0, 1000, (queries, k))
    labels = rng.integers(0, vocab, (queries, k)).astype(np.int32)
    length = rng.integers(0, k + 1, queries)
    length[0], length[1] = 0, k
    absent = np.arange(k) >= length[:, None]
    rows[absent], sqdist[absent] = -1, np.inf
    labels[1] = 3
    return rows, sqdist, labels


def naive_distribution(rows, sqdist, labels, tau):
    """{token: probability} of one list, in plain Python."""
    mass = {}
    nearest = min(sqdist, default=0.0)
    for row, d, label in zip(rows, sqdist, labels):
        if row >= 0:
            mass[int(label)] = mass.get(int(label), 0.0) + math.exp(-(float(d) - float(nearest)) / tau)
    return {token: m / sum(mass.values()) for token, m in mass.items()}


@pytest.mark.parametrize("tau", [0.5, 10.0, 300.0])
@pytest.mark.parametrize("top_m", [1, 4, 9, 50])
def test_distribution_agrees_with_a_brute_force_one(tau, top_m):
    rows, sqdist, labels = random_neighbors(np.random.default_rng())
    got = knn_distribution(rows, sqdist, labels, tau, top_m)
    assert got.token_ids_QxM.shape == got.probs_QxM.shape == (len(rows), top_m)
    for q in range(len(rows)):
        want = naive_distribution(rows[q], sqdist[q], labels[q], tau)
        probs, ids = got.probs_QxM[q], got.token_ids_QxM[q]
        kept = sum(sorted(want.values(), reverse=True)[:top_m])
        assert got.kept_mass_Q[q] == pytest.approx(kept, rel=1e-5)
        assert probs.sum() == pytest.approx(1.0 if want else 0.0, abs=1e-5)
        assert (np.diff(probs) <= 0).all()
        assert (ids[probs == 0] == 0).all()
        for token, p in zip(ids[probs > 0], probs[probs > 0]):
            assert p == pytest.approx(want[token] / kept, rel=1e-4)
        big = [t for t, p in want.items() if p > 1e-30]
        assert len(big) <= got.support_Q[q] <= len(want)
        assert (probs > 0).sum() == min(top_m, got.support_Q[q])


def test_equal_probabilities_are_ordered_by_token():
    rng = np.random.default_rng()
    labels = np.stack([rng.permutation(70_000)[:12] for _ in range(20)]).astype(np.int32)
    got = knn_distribution(np.zeros((20, 12), int), np.ones((20, 12), np.float32), labels, 3.0, 5)
    np.testing.assert_array_equal(got.token_ids_QxM, np.sort(labels, axis=1)[:, :5])
    np.testing.assert_allclose(got.probs_QxM, 0.2, rtol=1e-6)
    np.testing.assert_allclose(got.kept_mass_Q, 5 / 12, rtol=1e-6)


def test_log_prob_of_a_token_is_over_all_neighbours_at_every_temperature():
    rng = np.random.default_rng()
    rows, sqdist, labels = random_neighbors(rng)
    asked = rng.integers(0, 9, len(rows))
    taus = [0.5, 10.0, 300.0]
    got = knn_log_prob(rows, sqdist, labels, taus, asked)
    for t, tau in enumerate(taus):
        for q in range(len(rows)):
            want = naive_distribution(rows[q], sqdist[q], labels[q], tau).get(int(asked[q]), 0.0)
            if want > 0:
                assert got[t, q] == pytest.approx(math.log(want), rel=1e-4, abs=1e-5)
            else:
                assert got[t, q] == -math.inf


def test_a_far_neighbours_log_prob_does_not_underflow():
    rows = np.zeros((1, 2), int)
    got = knn_log_prob(rows, np.array([[0, 5000]], np.float32), np.array([[1, 2]]), [1.0, 2.0], np.array([2]))
    np.testing.assert_allclose(got[:, 0], [-5000, -2500])
