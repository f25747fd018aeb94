import numpy as np
import pytest

from mlp_memory.inference.continuations import ContinuationScorer
from mlp_memory.inference.scoring import Scorer
from mlp_memory.joint.gate import SIGNALS, Gate
from mlp_memory.targets.knn import SparseTargets

VOCAB = 37
LAMBDAS = (0.0, 0.2, 0.55, 0.9)


def requests_of(rng):
    """Continuations of three beginnings, some alike for a while, some of one token, one much longer."""
    found = []
    for length in (1, 5, 9):
        context = rng.integers(0, VOCAB, length).tolist()
        stem = rng.integers(0, VOCAB, 2).tolist()
        tails = [stem + rng.integers(0, VOCAB, 3).tolist(), [*stem, 7], [3], [4], [3, 5]]
        found += [(context + tail, length) for tail in tails]
    found.append((rng.integers(0, VOCAB, 40).tolist(), 11))
    return found


def test_one_pass_gives_what_each_lambda_gives_alone(make_mixture, decoder_config, rng):
    mixture, requests = make_mixture(decoder_config), requests_of(rng)
    scored, scorer = ContinuationScorer(mixture, 16, batch_tokens=128)(requests), Scorer(mixture, 16)
    for weight in LAMBDAS:
        mixture.interpolate(weight)
        alone = scorer([tokens for tokens, _ in requests])
        log_prob_R, greedy_R = scored.at("memory", weight)
        for (_, start), found, log_prob, greedy in zip(requests, alone, log_prob_R, greedy_R):
            assert log_prob == pytest.approx(float(found.log_prob_T[start - 1 :].sum()), abs=2e-4)
            assert greedy == found.likeliest_T[start - 1 :].all()
    np.testing.assert_allclose(scored.at(None)[0], scored.at("memory", 0.0)[0], atol=1e-6)
    np.testing.assert_array_equal(scored.at(None)[1], scored.at("memory", 0.0)[1])


def test_a_token_is_the_likeliest_exactly_between_its_bounds(make_mixture, decoders, plain, rng):
    mixture = make_mixture(decoders["llama"])
    context = rng.integers(0, VOCAB, 6).tolist()
    scored = ContinuationScorer(mixture, 16)([([*context, token], 6) for token in range(VOCAB)])
    found = scored.partners["memory"]
    for weight in rng.uniform(0, 0.98, 30):
        mixture.interpolate(float(weight))
        said = plain(mixture, context)
        near = np.sort(said)[-1] - np.sort(said)[-2] < 1e-4  # a tie to rounding belongs to either
        between = (found.least_T <= weight) & (weight <= found.most_T)
        assert near or np.flatnonzero(between).tolist() == [int(said.argmax())]


def test_a_gate_gives_each_token_its_own_lambda(make_mixture, decoders, rng):
    mixture, requests = make_mixture(decoders["llama"]), requests_of(rng)
    signals = len(SIGNALS) + decoders["llama"].dim
    arrays = [rng.normal(size=signals).astype(np.float32) for _ in range(3)]
    gate = Gate(arrays[0], np.abs(arrays[1]) + 0.5, arrays[2], np.float32(0.3), np.float32(0.8))
    mixture.interpolate(gate)
    log_prob_R, _ = ContinuationScorer(mixture, 64)(requests).at("memory", "gate")
    alone = Scorer(mixture, 64)([tokens for tokens, _ in requests])
    wanted = [float(found.log_prob_T[start - 1 :].sum()) for (_, start), found in zip(requests, alone)]
    np.testing.assert_allclose(log_prob_R, wanted, atol=2e-4)


def test_neighbours_are_a_partner_and_none_leaves_the_decoder_alone(make_mixture, decoders, plain, rng):
    mixture = make_mixture(decoders["llama"], memory=False)
    context = rng.integers(0, VOCAB, 6).tolist()
    probs_V = rng.dirichlet(np.ones(4))
    tokens = rng.choice(VOCAB, 4, replace=False).astype(np.int32)

    def neighbors(taps_QxD):
        rows = len(taps_QxD)
        probs_QxM = np.tile(probs_V.astype(np.float32), (rows, 1))
        return SparseTargets(np.tile(tokens, (rows, 1)), probs_QxM, np.ones(rows), np.full(rows, 4))

    def nothing(taps_QxD):
        found = neighbors(taps_QxD)
        return found._replace(probs_QxM=np.zeros_like(found.probs_QxM))

    scorer = ContinuationScorer(mixture, 16, {"knn": neighbors, "empty": nothing})
    scored = scorer([([*context, token], 6) for token in range(VOCAB)])
    base = np.exp(plain(mixture, context))
    mixed = 0.7 * base
    mixed[tokens] += 0.3 * probs_V
    log_prob_R, greedy_R = scored.at("knn", 0.3)
    np.testing.assert_allclose(log_prob_R, np.log(mixed), atol=1e-4)
    assert np.flatnonzero(greedy_R).tolist() == [mixed.argmax()]
    np.testing.assert_allclose(scored.at("empty", 0.6)[0], np.log(base), atol=1e-4)
