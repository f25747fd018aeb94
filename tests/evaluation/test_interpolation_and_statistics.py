"""Mixture, λ choice and bootstrap against slow references on random input."""

import math

import numpy as np
import pytest

from mlp_memory.statistics import bootstrap_interval, gain_interval, gain_recovered, perplexity
from mlp_memory.targets.interpolation import best_lambda, lambda_grid, mixture_nll, mixture_rows


def random_log_probabilities(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng()
    other_N = np.log(rng.random(n))
    other_N[rng.random(n) < 0.3] = -np.inf
    return np.log(rng.random(n)), other_N


def test_mixture_equals_the_formula_in_probabilities() -> None:
    base_N, other_N = random_log_probabilities(200)
    lambdas_L = lambda_grid()
    slow = [
        sum(-math.log(w * math.exp(o) + (1 - w) * math.exp(b)) for b, o in zip(base_N, other_N)) / 200
        for w in lambdas_L
    ]
    np.testing.assert_allclose(mixture_nll(base_N, other_N, lambdas_L), slow, rtol=1e-12)


def test_lambda_zero_is_the_base_exactly_and_the_grid_begins_there() -> None:
    base_N, other_N = random_log_probabilities(50)
    assert lambda_grid()[0] == 0
    assert lambda_grid()[-1] < 1
    np.testing.assert_array_equal(mixture_rows(base_N, other_N, 0.0), -base_N)


def test_tiny_probabilities_do_not_underflow() -> None:
    rows_N = mixture_rows(np.array([-2000.0, -2000.0]), np.array([-np.inf, -1990.0]), 0.5)
    np.testing.assert_allclose(rows_N, [2000 + math.log(2), 1990 + math.log(2) - math.log1p(math.exp(-10))])


def test_best_lambda_is_the_argmin_and_the_smallest_of_ties() -> None:
    base_N, other_N = random_log_probabilities(300)
    weight, nll = best_lambda(base_N, other_N)
    curve_L = mixture_nll(base_N, other_N, lambda_grid())
    assert nll == curve_L.min()
    assert weight == lambda_grid()[np.flatnonzero(curve_L == nll)[0]]
    assert best_lambda(base_N, np.full(300, -np.inf))[0] == 0
    assert best_lambda(np.zeros(3), np.zeros(3), np.array([0.5, 0.25]))[0] == 0.25


def test_document_bootstrap_equals_resampling_rows_of_whole_documents() -> None:
    rng = np.random.default_rng(7)
    ids_N = np.repeat(rng.permutation(23), rng.integers(1, 60, 23))
    nll_N = rng.gamma(2.0, 2.0, len(ids_N)) + 0.1 * ids_N
    found = bootstrap_interval(nll_N, ids_N, samples=4000, seed=3)
    documents = [nll_N[ids_N == d] for d in range(23)]
    slow = [
        math.exp(np.concatenate([documents[i] for i in rng.integers(0, 23, 23)]).mean()) for _ in range(4000)
    ]
    assert found.method == "bootstrap over 23 documents"
    spread = np.std(slow)
    # An end of a 4,000-sample percentile interval has a standard error near 0.04 spreads.
    np.testing.assert_allclose(found[:2], np.quantile(slow, [0.025, 0.975]), atol=0.2 * spread)
    assert found.low < math.exp(nll_N.mean()) < found.high


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    ids_N = np.repeat(np.arange(60), 5)
    hits = 0
    for trial in range(200):
        nll_N = 3 + rng.normal(size=60)[ids_N] + rng.normal(size=300)
        low, high, _ = bootstrap_interval(nll_N, ids_N, samples=200, seed=trial)
        hits += low <= math.exp(3) <= high
    # 200 draws at 0.95 (a little less at 60 documents): five standard errors is 0.08.
    assert 0.86 <= hits / 200 <= 1


def test_few_documents_fall_back_to_blocks_and_one_block_has_no_width() -> None:
    nll_N = np.random.default_rng().random(1000)
    ids_N = np.arange(1000) // 112
    interval = bootstrap_interval(nll_N, ids_N)
    assert interval.method == "bootstrap over 4 blocks of 256 tokens"
    assert interval.low < interval.high
    short = bootstrap_interval(nll_N[:100], ids_N[:100])
    assert short.method == "bootstrap over 1 block of 256 tokens"
    np.testing.assert_allclose(short[:2], math.exp(nll_N[:100].mean()))


def test_interval_repeats_and_does_not_depend_on_document_names() -> None:
    rng = np.random.default_rng()
    ids_N = np.sort(rng.integers(0, 40, 5000))
    nll_N = rng.random(5000)
    first = bootstrap_interval(nll_N, ids_N, seed=5)
    assert first == bootstrap_interval(nll_N, ids_N * 1000 - 7, seed=5)
    assert first[:2] != bootstrap_interval(nll_N, ids_N, seed=6)[:2]


def test_perplexity_per_token_and_per_word() -> None:
    assert perplexity(math.log(8), 3) == pytest.approx(2)
    assert perplexity(1e6, 1) == math.inf
    with pytest.raises(ValueError):
        perplexity(1.0, 0)


def test_gain_recovered_is_a_share_of_the_teachers_gain() -> None:
    assert gain_recovered(5.0, 4.0, 4.25) == pytest.approx(0.75)
    assert gain_recovered(5.0, 4.0, 5.5) == pytest.approx(-0.5)
    assert gain_recovered(5.0, 5.0, 4.0) is None


def test_the_interval_of_the_share_resamples_all_three_systems_together() -> None:
    rng = np.random.default_rng()
    ids_N = np.sort(rng.integers(0, 30, 900))
    base_N = 5 + rng.normal(size=900)
    available_N = 1 + 0.1 * rng.random(900) + 0.5 * rng.random(30)[ids_N]
    knn_N = base_N - available_N
    found = gain_interval(base_N, knn_N, base_N - 0.75 * available_N, ids_N)
    np.testing.assert_allclose(found, 0.75)  # the same share of every token's gain: no width
    memory_N = base_N - available_N * rng.random(30)[ids_N]
    low, high = gain_interval(base_N, knn_N, memory_N, ids_N, samples=4000)
    assert low < gain_recovered(base_N.mean(), knn_N.mean(), memory_N.mean()) < high
    slow = []
    for _ in range(1000):
        rows = np.concatenate(
            [np.flatnonzero(ids_N == d) for d in rng.choice(np.unique(ids_N), len(set(ids_N)))]
        )
        slow.append(gain_recovered(base_N[rows].mean(), knn_N[rows].mean(), memory_N[rows].mean()))
    # An end of a 1,000-sample percentile interval has a standard error near 0.08 spreads.
    np.testing.assert_allclose([low, high], np.quantile(slow, [0.025, 0.975]), atol=0.8 * np.std(slow))
    assert (low, high) == gain_interval(base_N, knn_N, memory_N, ids_N * 7 + 3, samples=4000)


def test_a_gain_that_is_not_sure_has_no_share_with_bounds() -> None:
    rng = np.random.default_rng()
    ids_N = np.arange(600) // 20
    base_N = rng.random(600)
    knn_N = base_N + np.where(ids_N < 15, 1.0, -1.0)
    assert gain_interval(base_N, knn_N, base_N - 0.1, ids_N) is None
    assert gain_interval(base_N, base_N, base_N - 0.1, ids_N) is None


@pytest.mark.parametrize(
    ("base", "other", "weight"),
    [([0.0, 0.0], [0.0], 0.5), ([math.nan], [0.0], 0.5), ([0.0], [0.0], 1.5), ([[0.0]], [[0.0]], 0.5)],
)
def test_bad_rows_are_refused(base: list, other: list, weight: float) -> None:
    with pytest.raises(ValueError):
        mixture_rows(np.array(base), np.array(other), weight)


def test_rows_that_are_not_finite_have_no_interval() -> None:
    with pytest.raises(ValueError, match="row 1"):
        bootstrap_interval(np.array([1.0, math.inf]), np.array([0, 1]))
    with pytest.raises(ValueError):
        mixture_nll(np.zeros(0), np.zeros(0), lambda_grid())
