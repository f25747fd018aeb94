"""kNN-LM decoding, the peer that the memory replaces: each step searches the datastore, on the host."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlp_memory.decoder.transformer import Cache
from mlp_memory.inference.config import GenerateConfig
from mlp_memory.inference.generate import State, Steps, drawn, inputs
from mlp_memory.inference.next_token import Mixture
from mlp_memory.inference.sampling import Filters, Numbers
from mlp_memory.joint.train import mixture_log_prob
from mlp_memory.targets.knn import SparseTargets


class KnnSteps(Steps):
    """As `Steps`, with p = λ·p_kNN + (1 − λ)·p_LM: a program up to the query, a search, a program that draws.

    Args:
      mixture: the decoder, without a memory; its tap is the query.
      filters: of the draws.
      neighbors: queries [B, D] float32 -> p_kNN.
      weight: λ; may be set anew between texts.
    """

    def __init__(
        self,
        mixture: Mixture,
        filters: Filters,
        neighbors: Callable[[np.ndarray], SparseTargets],
        weight: float,
    ):
        super().__init__(mixture, filters)
        self._neighbors, self.weight = neighbors, weight
        self._read_prompts = jax.jit(self.read_prompts, static_argnames="capacity")
        self._read_token = jax.jit(self.read_token, donate_argnums=1)
        self._draw = jax.jit(self._drawn, donate_argnums=0)

    def begin(self, prompts: list[list[int]], config: GenerateConfig) -> State:
        """Reads the prompts and draws each row's first token."""
        arrays, capacity = inputs(prompts, config)
        state, said = self._read_prompts(self.mixture.parameters, *arrays, capacity=capacity)
        return self._searched(state, said, Numbers.of(config))

    def advance(self, state: State, numbers: Numbers) -> State:
        """Reads each row's token and draws the next; the state's cache is used up."""
        cache, state = state.cache, state._replace(cache=None)
        return self._searched(*self._read_token(self.mixture.parameters, cache, state), numbers)

    def _searched(self, state: State, said: Any, numbers: Numbers) -> State:
        found = self._neighbors(np.asarray(said.tap_NxD, np.float32))
        cache: Cache = state.cache
        state = state._replace(cache=None)
        drawn_state = self._draw(
            state, said.base_NxV, found.token_ids_QxM, found.probs_QxM, jnp.float32(self.weight), numbers
        )
        return drawn_state._replace(cache=cache)

    def _drawn(
        self,
        state: State,
        base_BxV: jax.Array,
        token_ids_BxM: jax.Array,
        probs_BxM: jax.Array,
        weight: jax.Array,
        numbers: Numbers,
    ) -> State:
        rows_Bx1 = jnp.arange(len(base_BxV))[:, None]
        # A row without neighbours, whose p_kNN is all 0, is the decoder's alone.
        weight_Bx1 = jnp.where(probs_BxM.sum(1, keepdims=True) > 0, weight, 0.0)
        knn_BxV = jnp.log(jnp.zeros_like(base_BxV).at[rows_Bx1, token_ids_BxM].add(probs_BxM))
        return drawn(state, mixture_log_prob(knn_BxV, base_BxV, weight_Bx1), self.filters, numbers)
