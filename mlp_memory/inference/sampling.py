"""Drawing tokens from next-token distributions, inside a compiled step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlp_memory.inference.config import GenerateConfig


class Filters(NamedTuple):
    """Which filters a program has; their numbers are its arguments."""

    greedy: bool
    top_k: int
    top_p: bool
    min_p: bool
    penalty: bool

    @classmethod
    def of(cls, config: GenerateConfig) -> "Filters":
        greedy = config.temperature == 0
        return cls(
            greedy,
            0 if greedy else config.top_k,
            not greedy and config.top_p < 1,
            not greedy and config.min_p > 0,
            config.repetition_penalty != 1,
        )


class Numbers(NamedTuple):
    """The filters' settings, float32 scalars."""

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    penalty: jax.Array

    @classmethod
    def of(cls, config: GenerateConfig) -> "Numbers":
        temperature = config.temperature or 1.0
        values = (temperature, config.top_p, config.min_p, config.repetition_penalty)
        return cls(*map(jnp.float32, values))


def filtered(
    log_prob_BxV: jax.Array, seen_BxV: jax.Array | None, filters: Filters, numbers: Numbers
) -> jax.Array:
    """The distribution that is drawn from, log-probabilities [B, V]; −inf where a filter forbids.

    Of equally likely tokens the one with the smaller id counts as the likelier.

    Args:
      log_prob_BxV: the model's.
      seen_BxV: tokens that each row's text has; None without a penalty.
      filters, numbers: what is kept.
    """
    z_BxV, vocabulary = log_prob_BxV, log_prob_BxV.shape[-1]
    if filters.penalty:
        z_BxV = jnp.where(seen_BxV, z_BxV * numbers.penalty, z_BxV)
    z_BxV = z_BxV / numbers.temperature
    if filters.top_p or 0 < filters.top_k < vocabulary:
        count = filters.top_k or vocabulary
        z_BxK, ids_BxK = jax.lax.top_k(z_BxV, min(count, vocabulary))
        if filters.top_p:
            p_BxK = jax.nn.softmax(z_BxK)
            # The token that crosses top_p stays: at least one always does.
            before_BxK = jnp.cumsum(p_BxK, axis=-1) - p_BxK
            z_BxK = jnp.where(before_BxK < numbers.top_p, z_BxK, -jnp.inf)
        rows_Bx1 = jnp.arange(z_BxV.shape[0])[:, None]
        z_BxV = jnp.full_like(z_BxV, -jnp.inf).at[rows_Bx1, ids_BxK].set(z_BxK)
    if filters.min_p:
        least_Bx1 = z_BxV.max(-1, keepdims=True) + jnp.log(numbers.min_p)
        z_BxV = jnp.where(z_BxV >= least_Bx1, z_BxV, -jnp.inf)
    return jax.nn.log_softmax(z_BxV)


def draw(
    log_prob_BxV: jax.Array,
    seen_BxV: jax.Array | None,
    filters: Filters,
    numbers: Numbers,
    keys_B: jax.Array,
) -> jax.Array:
    """A token per row, [B] int32; the likeliest (the smallest id of equals) where `greedy`.

    Args:
      log_prob_BxV, seen_BxV, filters, numbers: see `filtered`.
      keys_B: a random key per row.
    """
    z_BxV = filtered(log_prob_BxV, seen_BxV, filters, numbers)
    if not filters.greedy:
        noise_BxV = jax.vmap(lambda key: jax.random.gumbel(key, z_BxV.shape[1:]))(keys_B)
        z_BxV = z_BxV + noise_BxV
    return jnp.argmax(z_BxV, axis=-1).astype(jnp.int32)
