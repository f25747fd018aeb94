"""A pre-norm causal transformer in Flax NNX with a tapped hidden state.

Shapes: B batch, T positions, D residual width, H query heads, K key/value heads, E head
width, V vocabulary, L layers, C positions that a cache has room for.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlp_memory.decoder.config import DecoderConfig, Tap
from mlp_memory.decoder.layers import FeedForward, Linear, Norm, parameter, scan_blocks, stack


def rotary_frequencies(config: DecoderConfig) -> np.ndarray:
    """Radians per position of each pair of a head's coordinates, [E / 2] float32."""
    half = config.head_dim // 2
    frequency = config.rope_base ** -(np.arange(half) / half)
    if config.rope_scaling == "linear":
        frequency = frequency / config.rope_factor
    elif config.rope_scaling == "llama3":
        turns = config.rope_original * frequency / (2 * np.pi)
        low, high = config.rope_low_factor, config.rope_high_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = kept * frequency + (1 - kept) * frequency / config.rope_factor
    return frequency.astype(np.float32)


class Cache(NamedTuple):
    """Keys (rotated) and values of every position read so far; slot c holds position c of its row."""

    keys_LxBxCxKxE: jax.Array
    values_LxBxCxKxE: jax.Array

    @property
    def capacity(self) -> int:
        """Positions that it has room for, C."""
        return self.keys_LxBxCxKxE.shape[2]

    def store(
        self, layer: jax.Array, positions_BxT: jax.Array, k_BxTxKxE: jax.Array, v_BxTxKxE: jax.Array
    ) -> tuple[jax.Array, jax.Array, "Cache"]:
        """Writes keys and values at their positions: all that the layer has, [B, C, K, E], and the cache."""
        place = (layer, jnp.arange(positions_BxT.shape[0])[:, None], positions_BxT)
        stored = Cache(self[0].at[place].set(k_BxTxKxE), self[1].at[place].set(v_BxTxKxE))
        return stored[0][layer], stored[1][layer], stored

    def grown(self, capacity: int) -> "Cache":
        """With room for so many positions."""
        room = [(0, 0), (0, 0), (0, capacity - self.capacity), (0, 0), (0, 0)]
        return Cache(*(jnp.pad(x, room) for x in self))


def rotate(x_BxTxHxE: jax.Array, frequency: np.ndarray, positions_BxT: jax.Array) -> jax.Array:
    """Rotary position embedding, first half paired with second half (as in GPT-NeoX, Llama)."""
    angle = positions_BxT.astype(jnp.float32)[:, :, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BxTxHxE.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxTxHxE.dtype)


class Attention(nnx.Module):
    """Causal self-attention with grouped-query heads."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        d, e = config.dim, config.head_dim
        queries, kvs = (d, config.heads * e), (d, config.num_kv_heads * e)
        qkv_bias = config.bias != "none"
        self.query = Linear(queries, ("embed", "heads"), qkv_bias, rngs)
        self.key = Linear(kvs, ("embed", "kv_heads"), qkv_bias, rngs)
        self.value = Linear(kvs, ("embed", "kv_heads"), qkv_bias, rngs)
        self.out = Linear(
            queries[::-1],
            ("heads", "embed"),
            config.bias in ("attention", "all"),
            rngs,
            scale=(2 * config.layers) ** -0.5,
        )
        norms = [Norm("rmsnorm", e, config.norm_epsilon, rngs) for _ in range(2)] if config.qk_norm else None
        self.query_norm, self.key_norm = norms or (None, None)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        positions_BxT: jax.Array,
        mask_BxTxC: jax.Array,
        cache: Cache | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, Cache | None]:
        c, (batch, length) = self.config, x_BxTxD.shape[:2]
        q = self.query(x_BxTxD).reshape(batch, length, c.heads, c.head_dim)
        k = self.key(x_BxTxD).reshape(batch, length, c.num_kv_heads, c.head_dim)
        v = self.value(x_BxTxD).reshape(batch, length, c.num_kv_heads, c.head_dim)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if c.positions == "rotary":
            frequency = rotary_frequencies(c)
            q, k = rotate(q, frequency, positions_BxT), rotate(k, frequency, positions_BxT)
        if cache is not None:
            k, v, cache = cache.store(layer, positions_BxT, k, v)
        y = jax.nn.dot_product_attention(q, k, v, mask=mask_BxTxC[:, None])
        return self.out(y.reshape(batch, length, c.heads * c.head_dim)), cache


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.attention_norm = Norm(config.norm, config.dim, config.norm_epsilon, rngs)
        self.attention = Attention(config, rngs)
        self.ffn_norm = Norm(config.norm, config.dim, config.norm_epsilon, rngs)
        self.ffn = FeedForward(
            config.dim,
            config.hidden_dim,
            config.activation,
            config.bias == "all",
            rngs,
            out_scale=(2 * config.layers) ** -0.5,
        )

    def __call__(self, x_BxTxD: jax.Array, *attended: Any) -> tuple[jax.Array, jax.Array, Cache | None]:
        """The stream after the block and its feed-forward's input, both [B, T, D], and the cache."""
        y, cache = self.attention(self.attention_norm(x_BxTxD), *attended)
        x = x_BxTxD + y
        ffn_input = self.ffn_norm(x)
        return x + self.ffn(ffn_input), ffn_input, cache


class Decoder(nnx.Module):
    """Token ids to final hidden states, a tapped hidden state, and logits.

    Args:
      config: the shape; `vocab_size` must be set.
      rngs: parameter seeds.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        d, v = config.dim, config.vocab_size
        self.embedding = parameter(rngs, (v, d), ("vocab", "embed"), d**-0.5)
        self.positions = (
            parameter(rngs, (config.max_positions, d), ("position", "embed"), 0.1 * d**-0.5)
            if config.positions == "learned"
            else None
        )
        self.blocks = stack(lambda r: Block(config, r), config.layers, rngs)
        self.norm = Norm(config.norm, d, config.norm_epsilon, rngs)
        self.head = None if config.tied else parameter(rngs, (d, v), ("embed", "vocab"), d**-0.5)

    def __call__(
        self,
        tokens_BxT: jax.Array,
        segments_BxT: jax.Array | None = None,
        tap: Tap | None = None,
        dtype: Any = jnp.float32,
        remat: str = "none",
    ) -> tuple[jax.Array, jax.Array]:
        """Final hidden states (normed; times `head_kernel` they are logits) and the tap.

        Position t sees positions ..t of its own segment only, and within `config.window`.

        Args:
          tokens_BxT: integer ids.
          segments_BxT: integer document numbers; None for one document per row.
          tap: which state to return beside; None for the last layer's feed-forward input.
          dtype: of the computation.
          remat: see `scan_blocks`.

        Returns:
          hidden_BxTxD, tap_BxTxD, both in `dtype`.
        """
        length = tokens_BxT.shape[1]
        mask_BxTxT = jnp.tril(jnp.ones((1, length, length), bool))
        if segments_BxT is not None:
            mask_BxTxT = mask_BxTxT & (segments_BxT[:, :, None] == segments_BxT[:, None, :])
        positions_1xT = jnp.arange(length)[None]
        hidden, tapped, _ = self._read(tokens_BxT, positions_1xT, mask_BxTxT, None, tap, dtype, remat)
        return hidden, tapped

    def extend(
        self,
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array,
        cache: Cache,
        tap: Tap | None = None,
        dtype: Any = jnp.float32,
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """Reads more tokens of each row: what `__call__` gives at their positions, and the cache with them.

        A position sees what the cache holds at positions up to its own. What lies beyond, left by padding
        or by tokens taken back, is not seen, and is overwritten when its position is read.

        Args:
          tokens_BxT: integer ids.
          positions_BxT: where each stands in its row, from 0; below the cache's capacity.
          cache: of the positions before.
          tap, dtype: see `__call__`.
        """
        slots_C = jnp.arange(cache.capacity)
        seen_BxTxC = slots_C <= positions_BxT[:, :, None]
        return self._read(tokens_BxT, positions_BxT, seen_BxTxC, cache, tap, dtype)

    def empty_cache(self, batch: int, capacity: int, dtype: Any = jnp.float32) -> Cache:
        """Room for `capacity` positions of each of `batch` rows."""
        c = self.config
        shape = (c.layers, batch, capacity, c.num_kv_heads, c.head_dim)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def _read(
        self,
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array,
        mask_BxTxC: jax.Array,
        cache: Cache | None,
        tap: Tap | None,
        dtype: Any,
        remat: str = "none",
    ) -> tuple[jax.Array, jax.Array, Cache | None]:
        c, tap = self.config, tap or Tap()
        tap_index = tap.index(c.layers)
        near_BxTxC = positions_BxT[:, :, None] - jnp.arange(mask_BxTxC.shape[2]) < c.window
        windowed = 0 < c.window < mask_BxTxC.shape[2]
        x_BxTxD = self.embedding[...].astype(dtype)[tokens_BxT]
        if self.positions is not None:
            x_BxTxD = x_BxTxD + self.positions[...].astype(dtype)[positions_BxT]

        def step(
            block: Block, carry: tuple[jax.Array, jax.Array, Cache | None], layer: jax.Array
        ) -> tuple[jax.Array, jax.Array, Cache | None]:
            x, tapped, cache = carry
            seen_BxTxC = mask_BxTxC & (near_BxTxC | (layer < c.window_from)) if windowed else mask_BxTxC
            x, ffn_input, cache = block(x, positions_BxT, seen_BxTxC, cache, layer)
            found = ffn_input if tap.kind == "ffn_input" else x
            return x, jnp.where(layer == tap_index, found, tapped), cache

        carry = (x_BxTxD, jnp.zeros_like(x_BxTxD), cache)
        x_BxTxD, tap_BxTxD, cache = scan_blocks(self.blocks, step, carry, remat)
        return self.norm(x_BxTxD), tap_BxTxD, cache

    def head_kernel(self) -> jax.Array:
        """The output projection, [D, V]."""
        return self.embedding[...].T if self.head is None else self.head[...]

    def logits(self, hidden_BxTxD: jax.Array) -> jax.Array:
        """Next-token logits [B, T, V] in float32."""
        kernel = self.head_kernel().astype(hidden_BxTxD.dtype)
        return jnp.matmul(hidden_BxTxD, kernel, preferred_element_type=jnp.float32)
