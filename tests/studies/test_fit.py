import math

import numpy as np
import pytest

from mlp_memory.statistics import bootstrap_mean, resampled_means
from mlp_memory.studies.fit import Bounds, PowerLaw, crossing_bounds, fit, log_crossing, verdict
from mlp_memory.studies.scaling import crosses, fitted, steeper


def random_law(rng: np.random.Generator) -> PowerLaw:
    return PowerLaw(rng.uniform(-30, -15), -rng.uniform(0.05, 0.5))


def sizes(rng: np.random.Generator, count: int = 4) -> np.ndarray:
    return np.round(10 ** (5 + 0.5 * np.arange(count) + rng.uniform(0, 0.2, count)))


def test_a_fit_recovers_the_law_that_gave_the_perplexities(rng):
    law, parameters_P = random_law(rng), sizes(rng)
    found = fit(parameters_P, law.log_perplexity(parameters_P))
    np.testing.assert_allclose([found.gamma, found.log_beta], [law.gamma, law.log_beta], rtol=1e-9)


def test_a_fit_of_samples_is_each_samples_own_fit(rng):
    parameters_P, nats_SxP = sizes(rng), rng.normal(4, 0.3, (5, 4))
    together = fit(parameters_P, nats_SxP)
    for sample, nats_P in enumerate(nats_SxP):
        alone = fit(parameters_P, nats_P)
        np.testing.assert_allclose(together.gamma[sample], alone.gamma, rtol=1e-9)
        np.testing.assert_allclose(together.log_beta[sample], alone.log_beta, rtol=1e-9)
        slope, intercept = np.polyfit(np.log(parameters_P), nats_P, 1)
        np.testing.assert_allclose(alone.gamma, slope, rtol=1e-7)
        np.testing.assert_allclose(alone.gamma * alone.log_beta, intercept, rtol=1e-7)


def test_one_size_is_no_law():
    with pytest.raises(ValueError, match="1 different"):
        fit(np.array([1e6, 1e6]), np.array([4.0, 4.1]))


def test_curves_cross_where_both_give_the_same_perplexity(rng):
    slow, crossing = random_law(rng), rng.uniform(10, 20)
    gamma = slow.gamma - rng.uniform(0.05, 0.2)
    fast = PowerLaw(slow.gamma * (crossing + slow.log_beta) / gamma - crossing, gamma)
    assert log_crossing(slow, fast) == pytest.approx(crossing, rel=1e-9)
    assert log_crossing(fast, slow) == pytest.approx(crossing, rel=1e-9)
    assert not np.isfinite(
        log_crossing(slow, PowerLaw(np.float64(slow.log_beta - 1), np.float64(slow.gamma)))
    )
    slow, fast = (PowerLaw(np.array([law.log_beta]), np.array([law.gamma])) for law in (slow, fast))
    share, bounds = crossing_bounds(slow, fast, 1, 1e12)
    assert share == 1
    np.testing.assert_allclose(bounds, math.exp(crossing), rtol=1e-6)
    # The other way round the second law is the better one below the crossing, not beyond it.
    assert crossing_bounds(fast, slow, 1, 1e12) == (0.0, None)
    assert crossing_bounds(slow, fast, 1, math.exp(crossing) / 2) == (0.0, None)


def nats_of_documents(rng, law, parameters_P, documents: int, tokens: int) -> np.ndarray:
    """Per-token nats whose expectation is the law's; a document is easy or hard for every size alike."""
    shared = np.repeat(rng.normal(0, 0.5, documents), tokens)
    own = np.repeat(rng.normal(0, 0.1, (len(parameters_P), documents)), tokens, axis=1)
    return law.log_perplexity(parameters_P)[:, None] + shared + own


def test_the_interval_of_the_exponent_covers_the_truth_about_as_often_as_it_says(rng):
    hits, trials, documents = 0, 150, 60
    ids_N = np.repeat(np.arange(documents), 3)
    for _ in range(trials):
        law, parameters_P = random_law(rng), sizes(rng)
        nats_PxN = nats_of_documents(rng, law, parameters_P, documents, 3)
        found = fitted(parameters_P, nats_PxN, parameters_P, nats_PxN[::-1], ids_N, 300)
        low, high = found["families"]["memory"]["gamma_interval"]
        hits += low <= law.gamma <= high
    # A little under 0.95 at 60 documents; at 0.92 so few hits as 0.80 come once in 10^5 runs.
    assert hits / trials >= 0.80


def test_a_steeper_family_is_found_with_its_ratio_and_crossing(rng):
    parameters_P, documents = sizes(rng), 80
    slow, crossing = random_law(rng), np.log(rng.uniform(1e6, 3e6))
    gamma = slow.gamma * 1.5
    fast = PowerLaw(slow.gamma * (crossing + slow.log_beta) / gamma - crossing, gamma)
    ids_N = np.repeat(np.arange(documents), 3)
    noise_N = np.repeat(rng.normal(0, 0.5, documents), 3)
    means = [law.log_perplexity(parameters_P)[:, None] for law in (fast, slow)]
    found = fitted(parameters_P, means[0] + noise_N, parameters_P, means[1] + noise_N, ids_N, 200)
    # Noise common to all sizes moves no slope.
    assert found["families"]["memory"]["gamma"] == pytest.approx(gamma, rel=1e-6)
    assert found["ratio"] == pytest.approx(1.5, rel=1e-6)
    assert found["crossing"] == pytest.approx(math.exp(crossing), rel=1e-4)
    assert (steeper(found), crosses(found)) == ("yes", "yes")
    turned = fitted(parameters_P, means[1] + noise_N, parameters_P, means[0] + noise_N, ids_N, 200)
    assert (steeper(turned), crosses(turned)) == ("no", "no")


def test_exponents_that_hang_on_one_size_are_unclear():
    fits = {
        "gamma_difference_interval": [-0.2, -0.1],
        "gamma_difference_without_one_size": [-0.1, 0.01, -0.2],
    }
    assert steeper(fits) == "unclear"
    assert steeper(fits | {"gamma_difference_without_one_size": [-0.1, -0.01, -0.2]}) == "yes"


def test_a_verdict_needs_an_interval_without_zero():
    assert verdict(Bounds(-2, -1)) == "yes"
    assert verdict(Bounds(1, 2)) == "no"
    assert {verdict(Bounds(*b)) for b in ((-1, 1), (0, 1), (-1, 0), (0, 0), (math.nan, math.nan))} == {
        "unclear"
    }


def test_resampled_means_are_the_bootstrap_of_each_system_and_of_their_differences(rng):
    ids_N = np.sort(rng.integers(0, 30, 400))
    nll_JxN = rng.normal(4, 1, (2, 400))
    means_SxJ = resampled_means(nll_JxN, ids_N, 500)
    for system, nll_N in enumerate(nll_JxN):
        low, high, _ = bootstrap_mean(nll_N, ids_N, samples=500)
        np.testing.assert_allclose(np.quantile(means_SxJ[:, system], [0.025, 0.975]), [low, high], rtol=1e-12)
    low, high, _ = bootstrap_mean(nll_JxN[0] - nll_JxN[1], ids_N, samples=500)
    gaps_S = means_SxJ[:, 0] - means_SxJ[:, 1]
    np.testing.assert_allclose(np.quantile(gaps_S, [0.025, 0.975]), [low, high], atol=1e-12)
