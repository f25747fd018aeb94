"""A pre-norm causal transformer in Flax NNX with a tapped hidden state.

Shapes: B batch, T positions, D residual width, H query heads, K key/value heads, E head
width, V vocabulary.
"""

from typing import Any

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


def rotate(x_BxTxHxE: jax.Array, frequency: np.ndarray) -> jax.Array:
    """Rotary position embedding, first half paired with second half (as in GPT-NeoX, Llama)."""
    angle = jnp.arange(x_BxTxHxE.shape[1], dtype=jnp.float32)[:, None, None] * frequency
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

    def __call__(self, x_BxTxD: jax.Array, mask_BxTxT: jax.Array) -> jax.Array:
        c, (batch, length) = self.config, x_BxTxD.shape[:2]
        q = self.query(x_BxTxD).reshape(batch, length, c.heads, c.head_dim)
        k = self.key(x_BxTxD).reshape(batch, length, c.num_kv_heads, c.head_dim)
        v = self.value(x_BxTxD).reshape(batch, length, c.num_kv_heads, c.head_dim)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if c.positions == "rotary":
            frequency = rotary_frequencies(c)
            q, k = rotate(q, frequency), rotate(k, frequency)
        y = jax.nn.dot_product_attention(q, k, v, mask=mask_BxTxT[:, None])
        return self.out(y.reshape(batch, length, c.heads * c.head_dim))


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

    def __call__(self, x_BxTxD: jax.Array, mask_BxTxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The stream after the block, and its feed-forward's input; both [B, T, D]."""
        x = x_BxTxD + self.attention(self.attention_norm(x_BxTxD), mask_BxTxT)
        ffn_input = self.ffn_norm(x)
        return x + self.ffn(ffn_input), ffn_input


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
        tap = tap or Tap()
        tap_index = tap.index(self.config.layers)
        c, length = self.config, tokens_BxT.shape[1]
        mask_BxTxT = jnp.tril(jnp.ones((1, length, length), bool))
        near_TxT = jnp.triu(jnp.ones((length, length), bool), 1 - c.window)
        windowed = 0 < c.window < length
        if segments_BxT is not None:
            mask_BxTxT = mask_BxTxT & (segments_BxT[:, :, None] == segments_BxT[:, None, :])
        x_BxTxD = self.embedding[...].astype(dtype)[tokens_BxT]
        if self.positions is not None:
            x_BxTxD = x_BxTxD + self.positions[...].astype(dtype)[:length]

        def step(
            block: Block, carry: tuple[jax.Array, jax.Array], layer: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            x, tapped = carry
            seen_BxTxT = mask_BxTxT & (near_TxT | (layer < c.window_from)) if windowed else mask_BxTxT
            x, ffn_input = block(x, seen_BxTxT)
            found = ffn_input if tap.kind == "ffn_input" else x
            return x, jnp.where(layer == tap_index, found, tapped)

        x_BxTxD, tap_BxTxD = scan_blocks(self.blocks, step, (x_BxTxD, jnp.zeros_like(x_BxTxD)), remat)
        return self.norm(x_BxTxD), tap_BxTxD

    def head_kernel(self) -> jax.Array:
        """The output projection, [D, V]."""
        return self.embedding[...].T if self.head is None else self.head[...]

    def logits(self, hidden_BxTxD: jax.Array) -> jax.Array:
        """Next-token logits [B, T, V] in float32."""
        kernel = self.head_kernel().astype(hidden_BxTxD.dtype)
        return jnp.matmul(hidden_BxTxD, kernel, preferred_element_type=jnp.float32)
