import jax
import jax.numpy as jnp
import numpy as np

from mlp_memory.inference.config import GenerateConfig
from mlp_memory.inference.sampling import Filters, Numbers, draw, filtered


def random_log_probs(rng, size=40):
    logits = rng.normal(size=size) * 2
    return (logits - np.log(np.exp(logits).sum())).astype(np.float32)


def slow_probs(log_probs, seen, config):
    """One row, one filter after another, each over what the one before left."""
    scores = {t: float(z) * (config.repetition_penalty if seen[t] else 1) for t, z in enumerate(log_probs)}
    probs = {t: np.exp(z / config.temperature) for t, z in scores.items()}
    order = sorted(probs, key=lambda t: (-probs[t], t))
    if config.top_k:
        order = order[: config.top_k]
    whole, mass, kept = sum(probs[t] for t in order), 0.0, []
    for token in order:
        if mass >= config.top_p:
            break
        kept.append(token)
        mass += probs[token] / whole
    kept = [t for t in kept if probs[t] >= config.min_p * probs[kept[0]]]
    found = np.zeros(len(log_probs))
    found[kept] = [probs[t] for t in kept]
    return found / found.sum()


def test_each_filter_keeps_what_the_slow_formula_keeps(rng):
    compiled = jax.jit(filtered, static_argnums=2)
    for _ in range(30):
        log_probs = np.stack([random_log_probs(rng) for _ in range(3)])
        seen = rng.random(log_probs.shape) < 0.3
        config = GenerateConfig(
            temperature=float(rng.uniform(0.2, 3)),
            top_k=int(rng.choice([0, 1, 7, 44])),
            top_p=float(rng.choice([1.0, rng.uniform(0.05, 1)])),
            min_p=float(rng.choice([0.0, rng.uniform(0.01, 0.5)])),
            repetition_penalty=float(rng.choice([1.0, rng.uniform(0.5, 2)])),
        )
        found = compiled(log_probs, seen, Filters.of(config), Numbers.of(config))
        for row in range(3):
            expected = slow_probs(log_probs[row], seen[row], config)
            np.testing.assert_allclose(np.exp(found[row]), expected, atol=2e-6)


def test_zero_temperature_takes_the_smallest_of_the_most_likely_tokens(rng):
    log_probs = random_log_probs(rng)
    log_probs[[5, 17, 30]] = log_probs.max() + 1
    config = GenerateConfig(temperature=0.0, top_k=3, top_p=0.2)
    keys = jax.random.split(jax.random.key(0), 1)
    assert draw(
        jnp.asarray(log_probs)[None], None, Filters.of(config), Numbers.of(config), keys
    ).tolist() == [5]


def test_only_what_the_filters_leave_is_drawn(rng):
    log_probs, config = random_log_probs(rng), GenerateConfig(temperature=2.0, top_k=3)
    keys = jax.random.split(jax.random.key(int(rng.integers(1000))), 2000)
    rows = jnp.broadcast_to(log_probs, (2000, 40))
    drawn = np.asarray(draw(rows, None, Filters.of(config), Numbers.of(config), keys))
    assert set(drawn) == set(np.argsort(-log_probs, kind="stable")[:3])
