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
from mlp_memory.decoder.layers import FeedForward, Linear, Norm, each_block, parameter, scan_blocks, stack


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


class LayerCache(NamedTuple):
    """A layer's keys (rotated) and values of every position read so far; slot c is position c of its row."""

    keys_BxKxCxE: jax.Array
    values_BxKxCxE: jax.Array

    def store(self, positions_BxT: jax.Array, k_BxTxKxE: jax.Array, v_BxTxKxE: jax.Array) -> "LayerCache":
        """With these keys and values at their positions."""
        place = (jnp.arange(positions_BxT.shape[0])[:, None], slice(None), positions_BxT)
        return LayerCache(self[0].at[place].set(k_BxTxKxE), self[1].at[place].set(v_BxTxKxE))

    def grown(self, capacity: int) -> "LayerCache":
        """With room for so many positions."""
        room = [(0, 0), (0, 0), (0, capacity - self[0].shape[2]), (0, 0)]
        return LayerCache(*(jnp.pad(x, room) for x in self))


Cache = list[LayerCache]
"""Of every layer. Arrays of their own, since a CPU copies a layer that is cut out of one array."""


def rotate(x_BxTxHxE: jax.Array, frequency: np.ndarray, positions_BxT: jax.Array) -> jax.Array:
    """Rotary position embedding, first half paired with second half (as in GPT-NeoX, Llama)."""
    angle = positions_BxT.astype(jnp.float32)[:, :, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BxTxHxE.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxTxHxE.dtype)


def attend(
    q_BxTxHxE: jax.Array, k_BxKxCxE: jax.Array, v_BxKxCxE: jax.Array, mask_BxTxC: jax.Array
) -> jax.Array:
    """Grouped-query attention over a cache, [B, T, H, E]: softmax(q·k / √E) v, the softmax in float32.

    `jax.nn.dot_product_attention` wants positions before heads, which for one query costs a
    transposed copy of the cache: six times the time on a CPU.
    """
    (batch, length, heads, width), kvs = q_BxTxHxE.shape, k_BxKxCxE.shape[1]
    q_BxTxKxGxE = q_BxTxHxE.reshape(batch, length, kvs, heads // kvs, width)
    scores = jnp.einsum("btkge,bkce->bkgtc", q_BxTxKxGxE, k_BxKxCxE, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BxTxC[:, None, None], scores * width**-0.5, -jnp.inf)
    p_BxKxGxTxC = jax.nn.softmax(scores).astype(v_BxKxCxE.dtype)
    return jnp.einsum("bkgtc,bkce->btkge", p_BxKxGxTxC, v_BxKxCxE).reshape(q_BxTxHxE.shape)


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
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        c, (batch, length) = self.config, x_BxTxD.shape[:2]
        q = self.query(x_BxTxD).reshape(batch, length, c.heads, c.head_dim)
        k = self.key(x_BxTxD).reshape(batch, length, c.num_kv_heads, c.head_dim)
        v = self.value(x_BxTxD).reshape(batch, length, c.num_kv_heads, c.head_dim)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if c.positions == "rotary":
            frequency = rotary_frequencies(c)
            q, k = rotate(q, frequency, positions_BxT), rotate(k, frequency, positions_BxT)
        if cache is None:
            y = jax.nn.dot_product_attention(q, k, v, mask=mask_BxTxC[:, None])
        else:
            cache = cache.store(positions_BxT, k, v)
            y = attend(q, *cache, mask_BxTxC)
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

    def __call__(self, x_BxTxD: jax.Array, *attended: Any) -> tuple[jax.Array, jax.Array, LayerCache | None]:
        """The stream after the block and its feed-forward's input, both [B, T, D], and its cache."""
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
        slots_C = jnp.arange(cache[0].keys_BxKxCxE.shape[2])
        seen_BxTxC = slots_C <= positions_BxT[:, :, None]
        return self._read(tokens_BxT, positions_BxT, seen_BxTxC, cache, tap, dtype)

    def empty_cache(self, batch: int, capacity: int, dtype: Any = jnp.float32) -> Cache:
        """Room for `capacity` positions of each of `batch` rows."""
        c = self.config
        shape = (batch, c.num_kv_heads, capacity, c.head_dim)
        return [LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(c.layers)]

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
        x_BxTxD = self.embedding[...].astype(dtype)[tokens_BxT]
        if self.positions is not None:
            x_BxTxD = x_BxTxD + self.positions[...].astype(dtype)[positions_BxT]

        def step(
            block: Block, x: jax.Array, tapped: jax.Array, layer: jax.Array | int, cache: LayerCache | None
        ) -> tuple[jax.Array, jax.Array, LayerCache | None]:
            seen_BxTxC = mask_BxTxC & (near_BxTxC | (layer < c.window_from)) if c.window else mask_BxTxC
            x, ffn_input, cache = block(x, positions_BxT, seen_BxTxC, cache)
            found = ffn_input if tap.kind == "ffn_input" else x
            return x, jnp.where(layer == tap_index, found, tapped), cache

        tap_BxTxD = jnp.zeros_like(x_BxTxD)
        if cache is None:
            carry = (x_BxTxD, tap_BxTxD)
            x_BxTxD, tap_BxTxD = scan_blocks(
                self.blocks, lambda block, carry, layer: step(block, *carry, layer, None)[:2], carry, remat
            )
            return self.norm(x_BxTxD), tap_BxTxD, None
        stored = []
        for layer, block in enumerate(each_block(self.blocks)):
            x_BxTxD, tap_BxTxD, of_layer = step(block, x_BxTxD, tap_BxTxD, layer, cache[layer])
            stored.append(of_layer)
        return self.norm(x_BxTxD), tap_BxTxD, stored

    def head_kernel(self) -> jax.Array:
        """The output projection, [D, V]."""
        return self.embedding[...].T if self.head is None else self.head[...]

    def logits(self, hidden_BxTxD: jax.Array) -> jax.Array:
        """Next-token logits [B, T, V] in float32."""
        kernel = self.head_kernel().astype(hidden_BxTxD.dtype)
        return jnp.matmul(hidden_BxTxD, kernel, preferred_element_type=jnp.float32)
