"""kNN-LM decoding against kNN-LM written out in NumPy, without cache or batch."""

import jax
import numpy as np
import pytest

from mlp_memory.inference.config import GenerateConfig
from mlp_memory.inference.generate import Steps, generate
from mlp_memory.inference.knn_lm import KnnSteps
from mlp_memory.inference.sampling import Filters
from mlp_memory.targets.knn_lm import Neighbors

TAU, WEIGHT, K = 3.0, 0.4, 7


class Keys:
    """A datastore whose searched space is the states' own."""

    def __init__(self, keys_NxD):
        self.keys_NxD, self.shape = keys_NxD, keys_NxD.shape

    def __getitem__(self, rows):
        return self.keys_NxD[rows]

    def queries(self, states_QxD):
        return states_QxD


@pytest.fixture
def neighbors(rng, decoder_config):
    keys = rng.normal(size=(400, decoder_config.dim)).astype(np.float32)
    labels = rng.integers(0, decoder_config.vocab_size, 400).astype(np.int32)
    valid = rng.random(400) > 0.1
    return Neighbors(Keys(keys), valid, labels, None, K, (TAU,), None)


def continued(mixture, neighbors, search, prompts, config, eos=-1):
    steps = KnnSteps(
        mixture, Filters.of(config), lambda taps: neighbors.distribution(search, taps, TAU), WEIGHT
    )
    texts = [[] for _ in prompts]
    for found in generate(steps, prompts, eos, config):
        for row, token in found:
            texts[row].append(token)
    return texts


def test_every_token_is_the_likeliest_of_knn_lm_written_out(make_mixture, decoder_config, neighbors, prompts):
    mixture = make_mixture(decoder_config, memory=False)
    read = jax.jit(lambda parameters, tokens: mixture.read(parameters, tokens))
    base_of = jax.jit(lambda parameters, hidden, tap: mixture.next_token(parameters, hidden, tap).base_NxV)
    config = GenerateConfig(max_tokens=6)
    keys, valid = neighbors.keys.keys_NxD, np.flatnonzero(neighbors.valid_N)
    for prompt, text in zip(prompts, continued(mixture, neighbors, neighbors.exact, prompts, config)):
        tokens = list(prompt)
        for token in text:
            padded = np.array([[*tokens, *[0] * (24 - len(tokens))]])
            hidden, tap = (x[:, len(tokens) - 1] for x in read(mixture.parameters, padded))
            p = np.exp(np.asarray(base_of(mixture.parameters, hidden, tap)[0], np.float64)) * (1 - WEIGHT)
            distance = ((keys[valid].astype(np.float64) - np.asarray(tap, np.float64)) ** 2).sum(1)
            near = np.argsort(distance, kind="stable")[:K]
            shares = np.exp(-(distance[near] - distance[near[0]]) / TAU)
            for row, share in zip(valid[near], shares / shares.sum()):
                p[neighbors.labels_N[row]] += WEIGHT * share
            best = np.sort(p)[::-1]
            assert p[token] == best[0] or best[0] - p[token] < 1e-5  # a tie to rounding
            tokens.append(token)
        assert len(text) == 6


def test_keys_that_stay_on_the_device_are_searched_with_the_same_result(
    make_mixture, decoder_config, neighbors, prompts, rng
):
    for count in (1, 3, 300):
        queries = rng.normal(size=(count, decoder_config.dim)).astype(np.float32)
        for a, b in zip(neighbors.exact(queries, K), neighbors.resident(queries, K)):
            np.testing.assert_allclose(a, b, rtol=1e-5)
    mixture, config = make_mixture(decoder_config, memory=False), GenerateConfig(max_tokens=4, seed=3)
    texts = [
        continued(mixture, neighbors, search, prompts, config)
        for search in (neighbors.exact, neighbors.resident)
    ]
    assert texts[0] == texts[1]


def test_a_query_without_neighbours_is_the_decoder_alone(make_mixture, decoder_config, neighbors, prompts):
    mixture, config = make_mixture(decoder_config, memory=False), GenerateConfig(max_tokens=4)

    def none(queries, k):
        return np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), np.inf, np.float32)

    alone = [[] for _ in prompts]
    for found in generate(Steps(mixture, Filters.of(config)), prompts, -1, config):
        for row, token in found:
            alone[row].append(token)
    assert continued(mixture, neighbors, none, prompts, config) == alone
