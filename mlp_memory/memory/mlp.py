"""The memory M: R^d -> R^|V| as a stack of pre-norm residual feed-forward blocks.

No token sees another: M reads one hidden state (PAPER.md, "The method in one page", 3).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlp_memory.decoder.layers import FeedForward, Linear, Norm, parameter, scan_blocks, stack
from mlp_memory.memory.config import MemoryConfig


class MemoryBlock(nnx.Module):
    """x + dropout(feed_forward(norm(x)))."""

    def __init__(self, config: MemoryConfig, rngs: nnx.Rngs):
        self.dropout = config.dropout
        kind = "layernorm" if config.style == "gpt2" else "rmsnorm"
        self.norm = Norm(kind, config.dim, config.norm_epsilon, rngs)
        self.ffn = FeedForward(
            config.dim,
            config.hidden_dim,
            config.activation,
            config.style == "gpt2",
            rngs,
            out_scale=(2 * config.layers) ** -0.5,
        )

    def __call__(self, x_NxD: jax.Array, key: jax.Array | None) -> jax.Array:
        y_NxD = self.ffn(self.norm(x_NxD))
        if key is not None and self.dropout > 0:
            keep = jax.random.bernoulli(key, 1 - self.dropout, y_NxD.shape)
            y_NxD = jnp.where(keep, y_NxD / (1 - self.dropout), 0)
        return x_NxD + y_NxD


class Memory(nnx.Module):
    """Hidden states to final states; times `head_kernel` they are logits.

    Args:
      config: the shape, resolved.
      rngs: parameter seeds.
    """

    def __init__(self, config: MemoryConfig, rngs: nnx.Rngs):
        self.config = config
        d = config.dim
        self.transform = (
            Linear((config.input_dim, d), ("input", "embed"), True, rngs) if config.input_dim != d else None
        )
        self.blocks = stack(lambda r: MemoryBlock(config, r), config.layers, rngs)
        self.norm = Norm("layernorm" if config.style == "gpt2" else "rmsnorm", d, config.norm_epsilon, rngs)
        self.head = parameter(rngs, (d, config.vocab_size), ("embed", "vocab"), d**-0.5)

    def __call__(
        self, h_NxD: jax.Array, key: jax.Array | None = None, dtype: Any = jnp.float32, remat: str = "none"
    ) -> jax.Array:
        """Final normed states [N, dim] in `dtype`; `key` turns dropout on."""
        x_NxD = h_NxD.astype(dtype)
        if self.transform is not None:
            x_NxD = self.transform(x_NxD)

        def step(block: MemoryBlock, x: jax.Array, layer: jax.Array) -> jax.Array:
            return block(x, None if key is None else jax.random.fold_in(key, layer))

        return self.norm(scan_blocks(self.blocks, step, x_NxD, remat))

    def head_kernel(self) -> jax.Array:
        """The output projection, [dim, V]."""
        return self.head[...]
