"""Low-rank adapters: a decoder W + (α/r)·A·B whose W stays as it is."""

from typing import Any

import jax
from flax import nnx

from mlp_memory.decoder.config import DecoderConfig
from mlp_memory.decoder.layers import parameter
from mlp_memory.decoder.transformer import Decoder

Path = tuple[Any, ...]


class Adapters(nnx.Module):
    """A and B for every product of the decoder's blocks: A normal with std 1/sqrt(in), B zero at the start.

    Args:
      config: the decoder's.
      rank: r.
      alpha: α.
      rngs: parameter seeds.
    """

    def __init__(self, config: DecoderConfig, rank: int, alpha: float, rngs: nnx.Rngs):
        self._scale = alpha / rank
        self.down, self.up = nnx.Dict({}), nnx.Dict({})
        state = nnx.state(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))
        for path, variable in nnx.to_flat_state(state):
            if path[0] == "blocks" and path[-1] == "kernel":
                axes, (layers, inputs, outputs) = (
                    variable.get_metadata()["logical_axes"],
                    variable.get_value().shape,
                )
                name, std = _name(path), inputs**-0.5
                self.down[name] = parameter(rngs, (layers, inputs, rank), (axes[0], axes[1], "rank"), std)
                self.up[name] = parameter(rngs, (layers, rank, outputs), (axes[0], "rank", axes[2]), None)

    def onto(self, decoder: Decoder) -> Decoder:
        """The decoder with the adapters merged in; it is not changed itself."""
        graphdef, state = nnx.split(decoder)
        flat = nnx.traversals.flatten_mapping(nnx.to_pure_dict(state))
        for path, kernel in flat.items():
            if (name := _name(path)) in self.down:
                added = self._scale * (self.down[name][...] @ self.up[name][...])
                flat[path] = (kernel.astype(added.dtype) + added).astype(kernel.dtype)
        merged = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(merged, nnx.traversals.unflatten_mapping(flat))
        return nnx.merge(graphdef, merged)


def _name(path: Path) -> str:
    """Of a kernel's adapter: its place in a block."""
    return "_".join(map(str, path[1:-1])) if path[0] == "blocks" and path[-1] == "kernel" else ""
