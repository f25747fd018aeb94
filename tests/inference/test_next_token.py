import jax
import numpy as np

from mlp_memory.decoder.config import Tap
from mlp_memory.inference.next_token import Predictor

CONTEXT = 12


def test_the_distribution_is_that_of_the_plain_models_on_the_last_tokens(make_mixture, decoders, rng):
    mixture = make_mixture(decoders["llama"], tap=Tap(1, "residual"))
    predictor, weight = Predictor(mixture, CONTEXT), float(mixture.parameters["weight"])
    decoder, memory = mixture.models()

    @jax.jit
    def plain(tokens_1xT):
        hidden, tapped = decoder(tokens_1xT, tap=mixture.tap)
        memory_logits = memory(tapped[0, -1:]) @ memory.head_kernel()
        return jax.nn.softmax(decoder.logits(hidden)[0, -1]), jax.nn.softmax(memory_logits[0])

    for length in (1, CONTEXT, CONTEXT + 5):
        tokens = rng.integers(0, 37, length).tolist()
        found = predictor(tokens)
        base, other = map(np.asarray, plain(np.array([tokens[-CONTEXT:]])))
        np.testing.assert_allclose(np.exp(found.base_NxV), base, atol=1e-5)
        np.testing.assert_allclose(np.exp(found.memory_NxV), other, atol=1e-5)
        np.testing.assert_allclose(np.exp(found.mixture_NxV), weight * other + (1 - weight) * base, atol=1e-5)
        np.testing.assert_allclose(found.weight_N, weight, rtol=1e-6)


def test_without_a_memory_the_mixture_is_the_decoder(make_mixture, decoders, rng):
    found = Predictor(make_mixture(decoders["llama"], memory=False), CONTEXT)(rng.integers(0, 37, 5).tolist())
    assert found.memory_NxV is None
    assert found.weight_N is None
    np.testing.assert_array_equal(found.mixture_NxV, found.base_NxV)
    np.testing.assert_allclose(np.exp(found.base_NxV).sum(), 1, atol=1e-5)
