"""One next-token distribution: decoder alone, memory alone, or the two interpolated."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlp_memory.decoder.config import Tap
from mlp_memory.decoder.layers import separate
from mlp_memory.decoder.transformer import Cache, Decoder
from mlp_memory.inference.prompts import packed
from mlp_memory.joint.gate import Gate, gate_weight
from mlp_memory.joint.train import mixture_log_prob
from mlp_memory.memory.mlp import Memory
from mlp_memory.parallel.mesh import target_platform
from mlp_memory.training.sparse_head import spread_of


class NextToken(NamedTuple):
    """Natural-log probabilities [N, V], λ [N] and taps [N, D], float32; None where there is no memory."""

    base_NxV: jax.Array
    memory_NxV: jax.Array | None
    mixture_NxV: jax.Array
    weight_N: jax.Array | None
    tap_NxD: jax.Array


class Mixture:
    """Decoder and memory as one language model, p = λ·p_M + (1 − λ)·p_LM (PAPER.md, 4).

    Its methods are pure functions of `parameters`, for use inside `jax.jit`.

    Args:
      decoder: the language model.
      memory: its memory, or None.
      weight: λ, or what gives the λ of each token.
      tap: the memory's input.
      dtype: of the computation, and of the parameters' copies made for it.
    """

    def __init__(
        self,
        decoder: Decoder,
        memory: Memory | None,
        weight: float | Gate,
        tap: Tap,
        dtype: Any = jnp.float32,
    ):
        self.config, self.tap, self.dtype = decoder.config, tap, jnp.dtype(dtype)
        if target_platform() == "cpu":
            decoder, memory = separate(decoder), memory and separate(memory)
        self._decoder_def, decoder_state = nnx.split(decoder)
        self._memory_def, memory_state = (None, None) if memory is None else nnx.split(memory)
        states = {"decoder": decoder_state, "memory": memory_state}
        cast = jax.tree.map(lambda x: x.astype(self.dtype), states)
        self.parameters: dict[str, Any] = {**cast, "weight": jax.tree.map(jnp.float32, weight)}

    def models(self) -> tuple[Decoder, Memory | None]:
        """Decoder and memory with the parameters' copies."""
        decoder = nnx.merge(self._decoder_def, self.parameters["decoder"])
        if self._memory_def is None:
            return decoder, None
        return decoder, nnx.merge(self._memory_def, self.parameters["memory"])

    def read(
        self,
        parameters: dict[str, Any],
        tokens_BxT: jax.Array,
        segments_BxT: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Final states and taps, [B, T, D] each, of whole rows."""
        decoder = nnx.merge(self._decoder_def, parameters["decoder"])
        return decoder(tokens_BxT, segments_BxT, self.tap, self.dtype)

    def prompt(
        self, parameters: dict[str, Any], tokens_BxT: jax.Array, lengths_B: jax.Array, capacity: int
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """Reads prompts padded on the right: final states and taps of the last tokens, [B, D], and the cache.

        What the padding leaves in the cache lies beyond each row's length.
        """
        hidden, tapped, cache = self.begin(parameters, tokens_BxT, capacity)
        last = (jnp.arange(tokens_BxT.shape[0]), lengths_B - 1)
        return hidden[last], tapped[last], cache

    def begin(
        self, parameters: dict[str, Any], tokens_BxT: jax.Array, capacity: int
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """Final states and taps of all positions, [B, T, D], and the cache with room for `capacity`, or T."""
        batch, length = tokens_BxT.shape
        decoder = nnx.merge(self._decoder_def, parameters["decoder"])
        cache = decoder.empty_cache(batch, length, self.dtype)
        positions_BxT = jnp.broadcast_to(jnp.arange(length), (batch, length))
        hidden, tapped, cache = decoder.extend(tokens_BxT, positions_BxT, cache, self.tap, self.dtype)
        room = max(capacity, length)
        return hidden, tapped, [layer.grown(room) for layer in cache]

    def interpolate(self, weight: float | Gate) -> None:
        """Takes another λ from now on; compiled programs stay, as λ is one of their inputs."""
        self.parameters = {**self.parameters, "weight": jax.tree.map(jnp.float32, weight)}

    def extend(
        self, parameters: dict[str, Any], tokens_BxT: jax.Array, positions_BxT: jax.Array, cache: Cache
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """Final states, taps and the cache after more tokens of each row (`Decoder.extend`)."""
        decoder = nnx.merge(self._decoder_def, parameters["decoder"])
        return decoder.extend(tokens_BxT, positions_BxT, cache, self.tap, self.dtype)

    def next_token(self, parameters: dict[str, Any], hidden_NxD: jax.Array, tap_NxD: jax.Array) -> NextToken:
        """The distributions after positions of these states."""
        decoder = nnx.merge(self._decoder_def, parameters["decoder"])
        base_NxV = jax.nn.log_softmax(decoder.logits(hidden_NxD))
        if self._memory_def is None:
            return NextToken(base_NxV, None, base_NxV, None, tap_NxD)
        memory = nnx.merge(self._memory_def, parameters["memory"])
        z_NxV = jnp.matmul(
            memory(tap_NxD, dtype=self.dtype),
            memory.head_kernel().astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        memory_NxV = jax.nn.log_softmax(z_NxV)
        weight_N = parameters["weight"]
        if isinstance(weight_N, Gate):
            weight_N = gate_weight(weight_N, spread_of(base_NxV), spread_of(memory_NxV), tap_NxD)
        weight_N = jnp.broadcast_to(weight_N, hidden_NxD.shape[:1])
        mixture_NxV = mixture_log_prob(memory_NxV, base_NxV, weight_N[:, None])
        return NextToken(base_NxV, memory_NxV, mixture_NxV, weight_N, tap_NxD)


class Predictor:
    """The distributions after one text in one compiled step.

    Args:
      mixture: the model.
      context: longest window; of longer texts the end is read.
    """

    def __init__(self, mixture: Mixture, context: int):
        self._mixture, self.context = mixture, context

        @jax.jit
        def predict(parameters: dict[str, Any], tokens_1xT: jax.Array, lengths_1: jax.Array) -> NextToken:
            hidden, tapped, _ = mixture.prompt(parameters, tokens_1xT, lengths_1, 0)
            return mixture.next_token(parameters, hidden, tapped)

        self._predict = predict

    def __call__(self, tokens: list[int]) -> NextToken:
        """The distributions after these tokens (at least one), NumPy, [V] each."""
        found = self._predict(self._mixture.parameters, *packed([tokens[-self.context :]]))
        return jax.tree.map(lambda x: np.asarray(x)[0], found)
