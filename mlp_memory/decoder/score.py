"""Reads a stream through a decoder: for each row its tapped state and log p(next token)."""

import operator
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlp_memory.corpus.stream import TokenStream
from mlp_memory.decoder.config import Tap
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.decoder.windows import Ranges, Window, WindowPlan, window_arrays
from mlp_memory.parallel.sharding import place_whole_batch
from mlp_memory.training.sparse_head import Spread, label_and_spread


class Scored(NamedTuple):
    """Of rows: tapped states [n, D], log p(next token) [n] and the distribution's `Spread`, float32.

    All but the states mean nothing on rows without a next token (`stream.has_next`).
    """

    taps_NxD: np.ndarray
    log_prob_N: np.ndarray
    spread: Spread


class RowReader:
    """Tapped states and log-probabilities by row.

    A row's values depend on the rows asked for only through which windows share a batch,
    and that is a pure function of the range; the same range gives the same bytes.

    Args:
      decoder: the model.
      mesh: devices; a batch of windows is split over them.
      plan: context and stride.
      tap: the state to return.
      batch: windows at once; rounded up to the mesh's batch size.
      dtype: of the computation.
    """

    def __init__(
        self,
        decoder: Decoder,
        mesh: Mesh,
        plan: WindowPlan,
        tap: Tap,
        batch: int = 16,
        dtype: jnp.dtype = jnp.float32,
    ):
        split = mesh.shape["slice"] * mesh.shape["data"] * mesh.shape["fsdp"]
        self.mesh, self._plan, self._batch = mesh, plan, -(-batch // split) * split
        graphdef, self._params = nnx.split(decoder)

        def read(params: nnx.State, arrays: dict[str, jax.Array]) -> Scored:
            model = nnx.merge(graphdef, params)
            hidden, tapped = model(arrays["tokens"], arrays["segments"], tap, dtype)
            labels_N = arrays["labels"].reshape(-1)
            hidden_NxD = hidden.reshape(labels_N.size, -1)
            log_prob_N, spread = label_and_spread(hidden_NxD, model.head_kernel(), labels_N, mesh)
            log_prob, spread = jax.tree.map(
                lambda x_N: x_N.reshape(arrays["labels"].shape), (log_prob_N, spread)
            )
            return Scored(tapped.astype(jnp.float32), log_prob, spread)

        def tap_only(params: nnx.State, arrays: dict[str, jax.Array]) -> jax.Array:
            return nnx.merge(graphdef, params)(arrays["tokens"], arrays["segments"], tap, dtype)[1].astype(
                jnp.float32
            )

        everywhere = NamedSharding(mesh, P())
        self._read = jax.jit(read, out_shardings=everywhere)
        self._tap_only = jax.jit(tap_only, out_shardings=everywhere)

    def _batches(
        self, stream: TokenStream, ranges: Ranges
    ) -> Iterator[tuple[list[Window], dict[str, jax.Array]]]:
        windows = [w for start, stop in ranges for w in self._plan.windows(start, stop, len(stream))]
        for i in range(0, len(windows), self._batch):
            group = windows[i : i + self._batch]
            starts = [w.start for w in group] + [len(stream)] * (self._batch - len(group))
            parts = [window_arrays(stream, s, self._plan.context) for s in starts]
            arrays = {k: np.stack([p[k] for p in parts]) for k in parts[0]}
            yield group, place_whole_batch(arrays, self.mesh)

    def taps(self, stream: TokenStream, start: int, stop: int) -> np.ndarray:
        """Tapped states of rows start..stop, [stop − start, D] float32."""
        return self.taps_of(stream, [(start, stop)])

    def taps_of(self, stream: TokenStream, ranges: Ranges) -> np.ndarray:
        """Tapped states of the rows of `ranges`, [n, D] float32."""
        found = []
        for group, arrays in self._batches(stream, ranges):
            tapped = np.asarray(self._tap_only(self._params, arrays))
            found += [tapped[i, w.first - w.start : w.stop - w.start] for i, w in enumerate(group)]
        return np.concatenate(found)

    def taps_and_log_probs(self, stream: TokenStream, ranges: Ranges) -> tuple[np.ndarray, np.ndarray]:
        """The first two of `scores`."""
        return self.scores(stream, ranges)[:2]

    def scores(self, stream: TokenStream, ranges: Ranges) -> Scored:
        """What the decoder says of the rows of `ranges`."""
        found = []
        for group, arrays in self._batches(stream, ranges):
            batch = jax.tree.map(np.asarray, self._read(self._params, arrays))
            for i, w in enumerate(group):
                used = slice(w.first - w.start, w.stop - w.start)
                found.append(jax.tree.map(operator.itemgetter((i, used)), batch))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)
