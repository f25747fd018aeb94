import math

import jax
import numpy as np
import pytest
from flax import nnx

from mlp_memory.artifacts import UserError
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory
from mlp_memory.memory.score import memory_log_probs

CONFIGS = {
    f"{style}-{'transform' if width != 8 else 'plain'}": MemoryConfig(
        style=style, layers=3, dim=8, ffn_dim=16, input_dim=width, vocab_size=13, norm_epsilon=1e-3
    )
    for style in ("gpt2", "llama")
    for width in (8, 5)
}


@pytest.fixture(params=sorted(CONFIGS))
def memory(request, randomize) -> Memory:
    return randomize(lambda: Memory(CONFIGS[request.param], nnx.Rngs(0)))


def slow_memory(params, config, h_D):
    """Logits [V] of one state, in NumPy float64, one row and one step at a time."""

    def norm(x_D, p):
        if config.style == "gpt2":
            x_D = x_D - x_D.mean()
        y_D = x_D / math.sqrt((x_D**2).mean() + config.norm_epsilon) * p["scale"]
        return y_D + p["bias"] if config.style == "gpt2" else y_D

    def linear(x, p):
        y = sum(x[i] * p["kernel"][i] for i in range(len(x)))
        return y + p["bias"] if "bias" in p else y

    x_D = linear(h_D, params["transform"]) if "transform" in params else h_D
    for layer in range(config.layers):
        p = jax.tree.map(lambda x, layer=layer: x[layer], params["blocks"])
        y_D = norm(x_D, p["norm"])
        up_F = linear(y_D, p["ffn"]["up"])
        if config.style == "gpt2":
            hidden_F = 0.5 * up_F * (1 + np.tanh(math.sqrt(2 / math.pi) * (up_F + 0.044715 * up_F**3)))
        else:
            gate_F = linear(y_D, p["ffn"]["gate"])
            hidden_F = gate_F / (1 + np.exp(-gate_F)) * up_F
        x_D = x_D + linear(hidden_F, p["ffn"]["down"])
    return norm(x_D, params["norm"]) @ params["head"]


def test_logits_are_those_of_the_slow_memory(memory, rng):
    config = memory.config
    h = rng.normal(size=(6, config.input_dim)).astype(np.float32)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(memory)))
    expected = np.array([slow_memory(params, config, row) for row in h])
    found = jax.jit(lambda h: memory(h) @ memory.head_kernel())(h)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert ("transform" in params) == (config.input_dim != config.dim)
    assert ("bias" in params["norm"]) == (config.style == "gpt2")


def test_a_row_does_not_depend_on_the_other_rows(memory, rng):
    h = rng.normal(size=(5, memory.config.input_dim)).astype(np.float32)
    jacobian = np.asarray(jax.jit(jax.jacrev(lambda h: memory(h).sum(-1)))(h))
    influence = np.abs(jacobian).max(-1)
    assert (influence[~np.eye(5, dtype=bool)] == 0).all()
    assert (influence[np.eye(5, dtype=bool)] > 0).all()


def test_log_probs_of_batches_are_those_of_all_rows_and_form_distributions(memory, mesh, rng):
    n, v = int(rng.integers(1, 30)), memory.config.vocab_size
    h = rng.normal(size=(n, memory.config.input_dim)).astype(np.float32)
    labels = rng.integers(0, v, n)
    log_softmax = jax.jit(lambda h: jax.nn.log_softmax(memory(h) @ memory.head_kernel()))
    expected = np.asarray(log_softmax(h))[np.arange(n), labels]
    for batch in (7, 4096):
        found = memory_log_probs(memory, h, labels, mesh, batch=batch)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_no_rows_have_no_log_probs(mesh):
    memory = Memory(CONFIGS["llama-plain"], nnx.Rngs(0))
    found = memory_log_probs(memory, np.zeros((0, 8), np.float32), np.zeros(0, np.int32), mesh)
    assert found.shape == (0,)


def test_dropout_acts_with_a_key_only(rng):
    shape = dict(style="llama", layers=2, dim=8, input_dim=8, vocab_size=5)
    models = [Memory(MemoryConfig(dropout=p, **shape), nnx.Rngs(0)) for p in (0.5, 0.0)]
    dropping, whole = (jax.jit(lambda h, key=None, model=model: model(h, key)) for model in models)
    h = rng.normal(size=(64, 8)).astype(np.float32)
    one, other = jax.random.split(jax.random.key(int(rng.integers(1000))))
    np.testing.assert_array_equal(dropping(h), whole(h))
    np.testing.assert_array_equal(whole(h, one), whole(h))
    assert (np.asarray(dropping(h, one)) != np.asarray(whole(h))).any()
    assert (np.asarray(dropping(h, one)) != np.asarray(dropping(h, other))).any()
    np.testing.assert_array_equal(dropping(h, one), dropping(h, one))


def test_dropout_keeps_the_mean_and_drops_its_share_of_each_layer():
    config = MemoryConfig(style="llama", layers=1, dim=64, input_dim=64, vocab_size=5, dropout=0.25)
    memory = Memory(config, nnx.Rngs(0))
    graphdef, state = nnx.split(memory.blocks)
    block = nnx.merge(graphdef, jax.tree.map(lambda x: x[0], state))
    h = jax.random.normal(jax.random.key(1), (4000, 64))
    added, dropped = block(h, None) - h, block(h, jax.random.key(2)) - h
    share = float((np.abs(dropped) < 1e-7).mean())
    assert abs(share - 0.25) < 0.01
    kept = np.abs(np.asarray(dropped)) > 1e-7
    np.testing.assert_allclose(np.asarray(dropped)[kept], np.asarray(added)[kept] / 0.75, atol=1e-4)


def test_counted_multiplications_are_those_of_the_matrices(memory):
    flat = nnx.to_flat_state(nnx.state(memory))
    expected = sum(v.get_value().size for path, v in flat if path[-1] in ("kernel", "head"))
    assert memory.config.matmul_parameters() == expected


def test_the_resolved_width_is_the_keys_unless_given():
    assert MemoryConfig().resolved(24, 99).dim == 24
    found = MemoryConfig(dim=32).resolved(24, 99)
    assert (found.dim, found.input_dim, found.vocab_size) == (32, 24, 99)


@pytest.mark.parametrize(
    "impossible",
    [
        {"style": "mamba"},
        {"layers": 0},
        {"layers": 1.5},
        {"dim": -8},
        {"ffn_dim": -8},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"norm_epsilon": -1.0},
    ],
    ids=str,
)
def test_impossible_shapes_are_refused(impossible):
    with pytest.raises(UserError):
        MemoryConfig(**impossible)
