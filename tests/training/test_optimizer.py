import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlp_memory.artifacts import UserError
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory
from mlp_memory.training import optimizer
from mlp_memory.training.config import TrainConfig


def rates(**settings) -> np.ndarray:
    config = TrainConfig(**settings)
    return np.asarray(jax.vmap(optimizer.schedule(config))(jnp.arange(config.steps + 1)))


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_rate_rises_to_its_peak_then_falls_to_its_floor(rng, decay):
    steps = int(rng.integers(20, 300))
    warmup = int(rng.integers(1, steps // 2))
    peak, ratio = float(rng.uniform(1e-4, 1e-2)), float(rng.uniform(0, 0.5))
    found = rates(steps=steps, warmup=warmup, learning_rate=peak, decay=decay, final_ratio=ratio)
    assert found[0] > 0
    np.testing.assert_allclose(np.diff(found[: warmup + 1], 2), 0, atol=1e-6 * peak + 1e-8)
    np.testing.assert_allclose(found.max(), peak, rtol=1e-5)
    np.testing.assert_allclose(found[warmup], peak, rtol=1e-5)
    assert (np.diff(found[warmup:]) <= 1e-9).all()
    np.testing.assert_allclose(found[-1], peak if decay == "constant" else ratio * peak, rtol=1e-4, atol=1e-9)


def test_without_warmup_the_first_rate_is_the_peak():
    assert rates(steps=10, warmup=0, learning_rate=0.5)[0] == 0.5


def test_a_warmup_longer_than_the_run_ends_at_the_peak():
    found = rates(steps=7, warmup=100, learning_rate=0.5)
    assert (np.diff(found[:8]) > 0).all()
    np.testing.assert_allclose(found[7], 0.5, rtol=1e-5)


def masks(model: nnx.Module) -> dict[str, bool]:
    flat = nnx.traversals.flatten_mapping(optimizer.decay_mask(nnx.state(model)))
    return {".".join(map(str, path)): bool(value) for path, value in flat.items()}


def test_weight_decay_is_for_matrices_only_and_stacking_makes_no_matrix(decoder_config):
    memory = MemoryConfig(style="gpt2", layers=2, dim=8, input_dim=6, vocab_size=11)
    models = {
        "decoder": lambda: Decoder(decoder_config, nnx.Rngs(0)),
        "memory": lambda: Memory(memory, nnx.Rngs(0)),
    }
    for make in models.values():
        for name, decayed in masks(nnx.eval_shape(make)).items():
            part = name.split(".")[-1]
            assert decayed == (part in ("kernel", "embedding", "positions", "head")), name


def test_weight_decay_moves_matrices_alone(rng, randomize):
    config = MemoryConfig(style="gpt2", layers=2, dim=4, input_dim=4, vocab_size=5)
    model = randomize(lambda: Memory(config, nnx.Rngs(0)))
    state = nnx.state(model)
    params = nnx.to_pure_dict(state)
    mask = optimizer.decay_mask(state)
    tx = optimizer.make_optimizer(TrainConfig(weight_decay=0.1, warmup=0, learning_rate=0.1), mask)
    zero = jax.tree.map(jnp.zeros_like, params)
    after, _ = optimizer.apply(tx, zero, tx.init(params), params)

    def check(before, now, decayed):
        np.testing.assert_allclose(now, before * (1 - 0.01 if decayed else 1), rtol=1e-5)

    jax.tree.map(check, params, after, mask)


def test_clipping_bounds_the_gradient_norm(rng):
    """Adam's step does not depend on the gradient's size, but its moments do."""
    grads = {"w": jnp.asarray(rng.normal(size=(4, 5)) * 100, jnp.float32)}
    params, mask = jax.tree.map(jnp.zeros_like, grads), {"w": True}
    for clip, scale in ((1.0, 1 / float(optimizer.global_norm(grads))), (0.0, 1.0)):
        tx = optimizer.make_optimizer(TrainConfig(clip=clip), mask)
        _, state = optimizer.apply(tx, grads, tx.init(params), params)
        first = next(x for x in jax.tree.leaves(state) if x.shape == (4, 5))
        np.testing.assert_allclose(first, 0.1 * scale * grads["w"], rtol=1e-4)


@pytest.mark.parametrize(
    "impossible",
    [
        {"steps": -1},
        {"steps": 1.5},
        {"batch_size": 0},
        {"batch_size": "16"},
        {"accumulate": 3},
        {"accumulate": 0},
        {"learning_rate": 0.0},
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"warmup": -1},
        {"decay": "step"},
        {"dtype": "float64"},
        {"remat": "some"},
        {"eval_every": 0},
        {"keep": 0},
        {"log_every": 0},
        {"eval_rows": -1},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"epsilon": 0.0},
        {"clip": -1.0},
        {"weight_decay": -0.1},
        {"final_ratio": -0.5},
        {"seed": -1},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(impossible):
    with pytest.raises(UserError):
        TrainConfig(**impossible)
