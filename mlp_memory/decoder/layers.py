"""Parts that decoder and memory share: parameters with named axes, norms, feed-forward.

Computation runs in the dtype of the input; norms and what they reduce run in float32.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlp_memory.parallel.mesh import target_platform

_MOST_UNROLLED = 16


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float | None, mean: float = 0.0
) -> nnx.Param:
    """A float32 parameter: normal with `std`, or the constant `mean` where `std` is None."""
    value = jnp.full(shape, mean, jnp.float32)
    if std is not None:
        value = value + std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, logical_axes=axes)


class Linear(nnx.Module):
    """y = x W (+ b), W [in, out], normal with std 1/sqrt(in) times `scale`."""

    def __init__(
        self, sizes: tuple[int, int], axes: tuple[str, str], bias: bool, rngs: nnx.Rngs, scale: float = 1.0
    ):
        self.kernel = parameter(rngs, sizes, axes, scale * sizes[0] ** -0.5)
        self.bias = parameter(rngs, sizes[1:], axes[1:], None) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Norm(nnx.Module):
    """RMSNorm, x / rms(x) · g, or LayerNorm, (x − mean) / std · g + b, over the last axis."""

    def __init__(self, kind: str, dim: int, epsilon: float, rngs: nnx.Rngs):
        self.kind, self.epsilon = kind, epsilon
        self.scale = parameter(rngs, (dim,), ("norm",), None, mean=1.0)
        self.bias = parameter(rngs, (dim,), ("norm",), None) if kind == "layernorm" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.epsilon) * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)


class FeedForward(nnx.Module):
    """SwiGLU, (silu(x G) · x U) D, or GELU (tanh form), gelu(x U) D."""

    def __init__(
        self, dim: int, hidden: int, activation: str, bias: bool, rngs: nnx.Rngs, out_scale: float = 1.0
    ):
        up, down = ("embed", "mlp"), ("mlp", "embed")
        self.gate = Linear((dim, hidden), up, bias, rngs) if activation == "swiglu" else None
        self.up = Linear((dim, hidden), up, bias, rngs)
        self.down = Linear((hidden, dim), down, bias, rngs, scale=out_scale)

    def __call__(self, x: jax.Array) -> jax.Array:
        up = self.up(x)
        hidden = nnx.gelu(up, approximate=True) if self.gate is None else nnx.silu(self.gate(x)) * up
        return self.down(hidden)


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` blocks as one module whose parameters have a leading "layers" axis."""
    block = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graphdef, state = nnx.split(block)

    def init(key: jax.Array) -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key))))

    values = jax.vmap(init)(jax.random.split(rngs.params(), count))
    nnx.replace_by_pure_dict(state, values)
    for _, variable in nnx.to_flat_state(state):
        variable.set_metadata(logical_axes=("layers", *variable.get_metadata()["logical_axes"]))
    return nnx.merge(graphdef, state)


def each_block(blocks: nnx.Module) -> Iterator[nnx.Module]:
    """The blocks of what `stack` or `separate` made, one by one."""
    if isinstance(blocks, nnx.List):
        yield from blocks
        return
    graphdef, state = nnx.split(blocks)
    for layer in range(jax.tree.leaves(state)[0].shape[0]):
        yield nnx.merge(graphdef, jax.tree.map(operator.itemgetter(layer), state))


def separate(model: nnx.Module) -> nnx.Module:
    """The same model, each of its blocks with arrays of its own: no copy is cut out of a stack in a step."""
    found = nnx.merge(*nnx.split(model))
    found.blocks = nnx.List(list(each_block(model.blocks)))
    return found


def scan_blocks(
    blocks: nnx.Module,
    step: Callable[[nnx.Module, Any, jax.Array], Any],
    carry: Any,
    remat: str,
) -> Any:
    """Runs `carry = step(block, carry, layer_index)` over stacked blocks in one scan, over others in turn.

    Args:
      blocks: what `stack` or `separate` made.
      step: pure function of one block, the carry and the layer's index (int32 scalar).
      carry: any pytree of arrays.
      remat: "none", "dots" (keep products without batch axes) or "full" (keep the carry).
    """
    if isinstance(blocks, nnx.List):
        for layer, block in enumerate(blocks):
            carry = step(block, carry, jnp.int32(layer))
        return carry
    graphdef, state = nnx.split(blocks)
    count = jax.tree.leaves(state)[0].shape[0]

    def body(carry: Any, layer: tuple[nnx.State, jax.Array]) -> tuple[Any, None]:
        return step(nnx.merge(graphdef, layer[0]), carry, layer[1]), None

    if remat == "full":
        body = jax.checkpoint(body)
    elif remat == "dots":
        body = jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    # On CPU the loop's copies of stacked activations cost a fifth of a training step.
    # Unrolled, it would keep what remat is to throw away: XLA finds the same products twice.
    small = remat == "none" and count <= _MOST_UNROLLED
    unroll = count if target_platform() == "cpu" and small else 1
    carry, _ = jax.lax.scan(body, carry, (state, jnp.arange(count)), unroll=unroll)
    return carry
