"""The hidden states that the memory is distilled on: read from the datastore, or computed in the step."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlp_memory.arrays import Rows
from mlp_memory.artifacts import UserError
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.decoder.windows import WindowPlan, window_arrays
from mlp_memory.training.loop import compute_dtype


class States(Protocol):
    """Hidden states [N, D] in two steps: what a host reads of a block of rows, and what devices make of it.

    Attributes:
      shape: [N, D].
      frozen: pytree that `of` needs; the training hands it over, sharded as it is.
    """

    shape: tuple[int, ...]
    frozen: Any

    def block(self, start: int, rows: int) -> dict[str, np.ndarray]:
        """For rows start..start + `rows`, which may lie past the end; their values mean nothing then."""
        ...

    def shapes(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Those of what `block` gives."""
        ...

    def of(self, frozen: Any, batch: dict[str, jax.Array]) -> jax.Array:
        """The states [B, R, D] of a batch of blocks."""
        ...


class StoredStates:
    """States as a datastore keeps them. They travel to the devices in the dtype they are stored in."""

    frozen = None

    def __init__(self, rows: Rows):
        self._rows, self.shape = rows, rows.shape

    def block(self, start: int, rows: int) -> dict[str, np.ndarray]:
        found = self._rows[start : min(start + rows, self.shape[0])]
        return {"h": np.pad(found, ((0, rows - len(found)), (0, 0)))}

    def shapes(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"h": jax.ShapeDtypeStruct((rows, self.shape[1]), self._rows.dtype)}

    def of(self, frozen: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return batch["h"]


class RecomputedStates:
    """States that the frozen decoder computes again inside the step, from windows of tokens.

    Row by row they are what `embed` would have stored in float32: a row is read through the window that
    `WindowPlan` says. Each block costs the decoder one window, so every row is computed
    context / `block_rows` times: least where `block_rows` is the stride.

    Args:
      decoder: what embedded the datastore.
      stream: the tokens.
      embed: how it was embedded.
      block_rows: rows of a block.

    Raises:
      UserError: a block can lie in no one window.
    """

    def __init__(self, decoder: Decoder, stream: TokenStream, embed: EmbedConfig, block_rows: int):
        if embed.context % block_rows or embed.stride % block_rows:
            raise UserError(
                f"distill.block_rows = {block_rows} does not divide embed.context = {embed.context} and "
                f"embed.stride = {embed.stride}: it must where the decoder computes the states again; "
                "with the stride itself each row is computed the fewest times"
            )
        self._graphdef, self.frozen = nnx.split(decoder)
        self._stream, self._plan = stream, WindowPlan(embed.context, embed.stride)
        self._tap, self._dtype = embed.tap, compute_dtype(embed.dtype)
        self.shape = (len(stream), decoder.config.dim)
        self._block_rows = block_rows

    def block(self, start: int, rows: int) -> dict[str, np.ndarray]:
        first = self._plan.window_of(start) * self._plan.stride
        found = window_arrays(self._stream, first, self._plan.context)
        return {
            "tokens": found["tokens"],
            "segments": found["segments"],
            "offset": np.int32(start - first),
        }

    def shapes(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        window = jax.ShapeDtypeStruct((self._plan.context,), np.int32)
        return {"tokens": window, "segments": window, "offset": jax.ShapeDtypeStruct((), np.int32)}

    def of(self, frozen: Any, batch: dict[str, jax.Array]) -> jax.Array:
        decoder = nnx.merge(self._graphdef, frozen)
        _, tapped_BxTxD = decoder(batch["tokens"], batch["segments"], self._tap, self._dtype)

        def cut(tapped_TxD: jax.Array, offset: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(tapped_TxD, offset, self._block_rows)

        return jax.vmap(cut)(tapped_BxTxD, batch["offset"]).astype(jnp.float32)
