import jax
import numpy as np
import pytest
from flax import nnx

from mlp_memory.artifacts import UserError
from mlp_memory.decoder.config import Tap
from mlp_memory.inference.config import GenerateConfig
from mlp_memory.inference.generate import generate, sampling_probs
from mlp_memory.inference.next_token import NextToken, Predictor
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory

CONTEXT = 12


@pytest.fixture
def models(decoders, make_decoder, randomize):
    decoder = make_decoder(decoders["llama"])
    shape = MemoryConfig(style="llama", layers=1, dim=8, ffn_dim=16, input_dim=16, vocab_size=37)
    return decoder, randomize(lambda: Memory(shape, nnx.Rngs(0)))


def test_the_distribution_is_that_of_the_plain_models_on_the_last_tokens(models, rng):
    (decoder, memory), tap, weight = models, Tap(1, "residual"), float(rng.uniform(0.1, 0.9))
    predictor = Predictor(decoder, memory, weight, tap, CONTEXT)

    @jax.jit
    def plain(tokens_1xT):
        hidden, tapped = decoder(tokens_1xT, tap=tap)
        memory_logits = memory(tapped[0, -1:]) @ memory.head_kernel()
        return jax.nn.softmax(decoder.logits(hidden)[0, -1]), jax.nn.softmax(memory_logits[0])

    for length in (1, CONTEXT, CONTEXT + 5):
        tokens = rng.integers(0, 37, length).tolist()
        found = predictor(tokens)
        base, other = map(np.asarray, plain(np.array([tokens[-CONTEXT:]])))
        np.testing.assert_allclose(np.exp(found.base_V), base, atol=1e-5)
        np.testing.assert_allclose(np.exp(found.memory_V), other, atol=1e-5)
        np.testing.assert_allclose(np.exp(found.mixture_V), weight * other + (1 - weight) * base, atol=1e-5)


def test_without_a_memory_the_mixture_is_the_decoder(models, rng):
    found = Predictor(models[0], None, 0.3, Tap(), CONTEXT)(rng.integers(0, 37, 5).tolist())
    assert found.memory_V is None
    np.testing.assert_array_equal(found.mixture_V, found.base_V)
    np.testing.assert_allclose(np.exp(found.base_V).sum(), 1, atol=1e-5)


def random_log_probs(rng, size=40):
    logits = rng.normal(size=size) * 2
    return (logits - np.log(np.exp(logits).sum())).astype(np.float32)


def test_zero_temperature_takes_the_smallest_of_the_most_likely_tokens(rng):
    log_probs = random_log_probs(rng)
    log_probs[[5, 17, 30]] = log_probs.max() + 1
    probs = sampling_probs(log_probs, GenerateConfig(temperature=0.0, top_k=3, top_p=0.2))
    assert probs[5] == probs.sum() == 1


def test_sampling_keeps_the_fewest_most_likely_tokens_that_hold_top_p_and_at_most_top_k(rng):
    for _ in range(100):
        log_probs = random_log_probs(rng)
        config = GenerateConfig(
            temperature=float(rng.uniform(0.2, 3)),
            top_k=int(rng.integers(0, 45)),
            top_p=float(rng.uniform(0.05, 1)),
        )
        tempered = np.exp(log_probs.astype(np.float64) / config.temperature)
        if config.top_k:
            tempered[np.argsort(-tempered, kind="stable")[config.top_k :]] = 0
        order = np.argsort(-tempered, kind="stable")
        kept, mass, whole = [], 0.0, np.exp(log_probs.astype(np.float64) / config.temperature).sum()
        for token in order:
            if tempered[token] == 0 or mass >= config.top_p:
                break
            kept.append(token)
            mass += tempered[token] / whole
        expected = np.zeros(len(log_probs))
        expected[kept] = tempered[kept]
        np.testing.assert_allclose(sampling_probs(log_probs, config), expected / expected.sum(), atol=1e-9)


def fixed(log_probs):
    return lambda tokens: NextToken(log_probs, None, log_probs)


def test_text_repeats_by_its_seed(rng):
    predict = fixed(random_log_probs(rng))
    config = GenerateConfig(temperature=1.0, max_tokens=30, seed=int(rng.integers(1000)))
    draws = [list(generate(predict, [1], -1, config)) for _ in range(2)]
    assert draws[0] == draws[1]
    assert len(draws[0]) == 30
    assert draws[0] != list(
        generate(predict, [1], -1, GenerateConfig(temperature=1.0, max_tokens=30, seed=-1 + 5000))
    )


def test_draws_follow_the_distribution(rng):
    log_probs = random_log_probs(rng, 5)
    config = GenerateConfig(temperature=1.0, max_tokens=4000, seed=int(rng.integers(1000)))
    counts = np.bincount(list(generate(fixed(log_probs), [0], -1, config)), minlength=5)
    np.testing.assert_allclose(counts / 4000, np.exp(log_probs), atol=0.05)


def test_generation_stops_at_the_end_of_the_document_and_sees_what_it_wrote():
    seen = []

    def predict(tokens):
        seen.append(list(tokens))
        log_probs = np.full(10, -50.0, np.float32)
        log_probs[tokens[-1] + 1] = 0
        return NextToken(log_probs, None, log_probs)

    assert list(generate(predict, [2, 3], 7, GenerateConfig())) == [4, 5, 6]
    assert seen == [[2, 3], [2, 3, 4], [2, 3, 4, 5], [2, 3, 4, 5, 6]]
    assert list(generate(predict, [2], 7, GenerateConfig(max_tokens=2))) == [3, 4]


@pytest.mark.parametrize(
    "impossible",
    [
        {"max_tokens": 0},
        {"max_tokens": 2.5},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(impossible):
    with pytest.raises(UserError):
        GenerateConfig(**impossible)
