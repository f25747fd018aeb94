"""One next-token distribution: decoder alone, memory alone, or the two interpolated."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlp_memory.decoder.config import Tap
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.joint.train import mixture_log_prob
from mlp_memory.memory.mlp import Memory


class NextToken(NamedTuple):
    """Natural-log probabilities over the vocabulary, [V] float32; None without a memory."""

    base_V: np.ndarray
    memory_V: np.ndarray | None
    mixture_V: np.ndarray


class Predictor:
    """p(next token | context) in one compiled step over a window of fixed length.

    Args:
      decoder: the language model.
      memory: its memory, or None.
      weight: λ of p = λ·p_M + (1 − λ)·p_LM (PAPER.md, 4).
      tap: the memory's input.
      context: window length; longer contexts lose their beginning.
      dtype: of the computation.
    """

    def __init__(
        self,
        decoder: Decoder,
        memory: Memory | None,
        weight: float,
        tap: Tap,
        context: int,
        dtype: Any = jnp.float32,
    ):
        self.context = context
        decoder_def, self._decoder = nnx.split(decoder)
        memory_def, self._memory = (None, None) if memory is None else nnx.split(memory)

        @jax.jit
        def predict(
            decoder_state: Any, memory_state: Any, tokens_1xT: jax.Array, last: jax.Array
        ) -> NextToken:
            model = nnx.merge(decoder_def, decoder_state)
            hidden, tapped = model(tokens_1xT, tap=tap, dtype=dtype)
            base_V = jax.nn.log_softmax(model.logits(hidden[:, last])[0])
            if memory_def is None:
                return NextToken(base_V, None, base_V)
            memory = nnx.merge(memory_def, memory_state)
            z_1xV = jnp.matmul(
                memory(tapped[:, last], dtype=dtype),
                memory.head_kernel().astype(dtype),
                preferred_element_type=jnp.float32,
            )
            memory_V = jax.nn.log_softmax(z_1xV[0])
            return NextToken(base_V, memory_V, mixture_log_prob(memory_V, base_V, weight))

        self._predict = predict

    def __call__(self, tokens: list[int]) -> NextToken:
        """The distribution after these tokens (at least one)."""
        window = tokens[-self.context :]
        padded = np.zeros((1, self.context), np.int32)
        padded[0, : len(window)] = window
        found = self._predict(self._decoder, self._memory, padded, np.int32(len(window) - 1))
        return jax.tree.map(np.asarray, found)
