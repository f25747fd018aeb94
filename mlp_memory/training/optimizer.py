"""AdamW, its schedule and its clipping (only importer of optax)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mlp_memory.training.config import TrainConfig


def schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then decay to `final_ratio` at the last step."""
    warmup = min(config.warmup, config.steps)
    rest = max(config.steps - warmup, 1)
    peak, floor = config.learning_rate, config.learning_rate * config.final_ratio
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=config.final_ratio),
        "linear": optax.linear_schedule(peak, floor, rest),
        "constant": optax.constant_schedule(peak),
    }[config.decay]
    return optax.join_schedules([optax.linear_schedule(peak / max(warmup, 1), peak, warmup), after], [warmup])


def make_optimizer(config: TrainConfig, decayed: Any) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW.

    Args:
      config: rates, betas, decay.
      decayed: pytree of bools shaped as the parameters: which ones weight decay touches.
    """
    clip = optax.clip_by_global_norm(config.clip) if config.clip > 0 else optax.identity()
    adamw = optax.adamw(
        schedule(config),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    return optax.chain(clip, adamw)


def decay_mask(state: nnx.State) -> Any:
    """True for matrices, counted without the stacked "layers" axis; a pure dict of bools."""
    mask = {}
    for path, variable in nnx.to_flat_state(state):
        axes = [a for a in variable.get_metadata()["logical_axes"] if a != "layers"]
        mask[path] = len(axes) > 1
    return nnx.traversals.unflatten_mapping(mask)


def global_norm(tree: Any) -> jax.Array:
    """Square root of the sum of squares over all leaves, float32 scalar."""
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))


def apply(optimizer: optax.GradientTransformation, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """One update: new parameters and new optimizer state."""
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state
