import functools

import jax
import numpy as np
import pytest
from flax import nnx

from mlp_memory.decoder.config import Tap
from mlp_memory.inference.next_token import Mixture
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory

VOCAB, LONGEST = 37, 24


@pytest.fixture
def make_mixture(make_decoder, randomize, rng):
    """A decoder's config -> its mixture with a random memory, λ and tap; without a memory if told so."""

    def make(config, memory=True, tap=None):
        shape = MemoryConfig("llama", 2, 8, 16, input_dim=config.dim, vocab_size=config.vocab_size)
        model = randomize(lambda: Memory(shape, nnx.Rngs(0))) if memory else None
        tap = tap or Tap(int(rng.integers(config.layers)), str(rng.choice(["ffn_input", "residual"])))
        return Mixture(make_decoder(config), model, float(rng.uniform(0.1, 0.9)), tap)

    return make


@pytest.fixture
def plain():
    """The slow reference: (mixture, tokens) -> log p of the next token, read anew without cache or batch."""

    @functools.cache
    def program(mixture):
        def run(parameters, tokens_1xT, last):
            hidden, tapped = mixture.read(parameters, tokens_1xT)
            return mixture.next_token(parameters, hidden[:, last], tapped[:, last])

        return jax.jit(run)

    def next_log_prob(mixture, tokens):
        parameters = mixture.parameters
        padded = np.array([[*tokens, *[0] * (LONGEST - len(tokens))]])  # no position sees what follows it
        found = program(mixture)(parameters, padded, len(tokens) - 1)
        base, memory = found.base_NxV[0], found.memory_NxV
        if memory is None:
            return np.asarray(base, np.float64)
        weight = float(parameters["weight"])
        mixed = weight * jax.nn.softmax(memory[0]) + (1 - weight) * jax.nn.softmax(base)
        return np.log(np.asarray(mixed, np.float64))

    return next_log_prob


@pytest.fixture
def prompts(rng):
    """Prompts of different lengths, one of them a single token."""
    return [rng.integers(0, VOCAB, n).tolist() for n in (7, 1, int(rng.integers(2, 12)), 3)]
