"""The memory M: R^d -> R^|V| as a stack of pre-norm residual feed-forward blocks.

No token sees another: M reads one hidden state (PAPER.md, "The method in one page", 3).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlp_memory.artifacts import UserError
from mlp_memory.decoder.config import default_ffn_dim
from mlp_memory.decoder.layers import FeedForward, Linear, Norm, parameter, scan_blocks, stack


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """The shape of a memory.

    Attributes:
      style: "gpt2" (LayerNorm, GELU, biases) or "llama" (RMSNorm, SwiGLU, none).
      layers: blocks.
      dim: width; 0 takes the key's. Where it differs, a linear transform comes first.
      ffn_dim: width inside a block; 0 as in `DecoderConfig`.
      dropout: share of a block's output left out in training.
      input_dim, vocab_size: 0 until taken from the datastore and the corpus.
    """

    style: str = "llama"
    layers: int = 6
    dim: int = 0
    ffn_dim: int = 0
    dropout: float = 0.0
    norm_epsilon: float = 1e-5
    input_dim: int = 0
    vocab_size: int = 0

    def __post_init__(self):
        if self.style not in ("gpt2", "llama"):
            raise UserError(f"memory.style = {self.style!r}: use 'gpt2' or 'llama'")
        if self.layers < 1 or not 0 <= self.dropout < 1:
            raise UserError(
                f"memory.layers = {self.layers} must be 1 or more, dropout = {self.dropout} in [0, 1)"
            )

    def resolved(self, input_dim: int, vocab_size: int) -> "MemoryConfig":
        """This shape for given keys and vocabulary."""
        return dataclasses.replace(
            self, input_dim=input_dim, vocab_size=vocab_size, dim=self.dim or input_dim
        )

    @property
    def activation(self) -> str:
        return "gelu" if self.style == "gpt2" else "swiglu"

    @property
    def hidden_dim(self) -> int:
        """Width inside a block."""
        return self.ffn_dim or default_ffn_dim(self.dim, self.activation)

    def matmul_parameters(self) -> int:
        """Weights that multiply once per row."""
        block = self.dim * self.hidden_dim * (2 if self.style == "gpt2" else 3)
        transform = self.input_dim * self.dim if self.input_dim != self.dim else 0
        return transform + self.layers * block + self.dim * self.vocab_size

    def train_flops(self, rows: int) -> int:
        """FLOPs of training on `rows` rows: 6 per weight and row."""
        return 6 * rows * self.matmul_parameters()


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
