"""Continues prompts token by token: one compiled step with a cache, batches of different lengths."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlp_memory.decoder.transformer import Cache
from mlp_memory.inference.config import GenerateConfig
from mlp_memory.inference.next_token import Mixture, NextToken
from mlp_memory.inference.prompts import packed, rounded, seen_tokens
from mlp_memory.inference.sampling import Filters, Numbers, draw


class State(NamedTuple):
    """Where the rows of a batch stand between two steps.

    Attributes:
      cache: of every position before the token.
      token_B: drawn last, and not yet read.
      position_B: where it stands in its row.
      drawn: tokens drawn so far, int32.
      seen_BxV: tokens of each row's text; None without a repetition penalty.
      keys_B: random keys of the rows.
    """

    cache: Cache | None
    token_B: jax.Array
    position_B: jax.Array
    drawn: jax.Array
    seen_BxV: jax.Array | None
    keys_B: jax.Array


class Steps:
    """The two compiled programs of decoding: the prompts at once, then a token of each row at a time.

    Args:
      mixture: the model.
      filters: of the draws.
    """

    def __init__(self, mixture: Mixture, filters: Filters):
        self.mixture, self.filters = mixture, filters
        self._begin = jax.jit(self.prefill, static_argnames="capacity")
        self._advance = jax.jit(self.step, donate_argnums=1)

    def begin(self, prompts: list[list[int]], config: GenerateConfig) -> State:
        """Reads the prompts and draws each row's first token."""
        arrays, capacity = inputs(prompts, config)
        return self._begin(self.mixture.parameters, *arrays, Numbers.of(config), capacity=capacity)

    def advance(self, state: State, numbers: Numbers) -> State:
        """Reads each row's token and draws the next; the state's cache is used up."""
        return self._advance(self.mixture.parameters, state.cache, state._replace(cache=None), numbers)

    def prefill(
        self,
        parameters: dict[str, Any],
        tokens_BxT: jax.Array,
        lengths_B: jax.Array,
        seed: jax.Array,
        numbers: Numbers,
        capacity: int = 0,
    ) -> State:
        """The program of `begin`: prompts padded on the right; the cache has room for `capacity`, or T."""
        state, said = self.read_prompts(parameters, tokens_BxT, lengths_B, seed, capacity)
        return drawn(state, said.mixture_NxV, self.filters, numbers)

    def step(self, parameters: dict[str, Any], cache: Cache, state: State, numbers: Numbers) -> State:
        """The program of `advance`."""
        state, said = self.read_token(parameters, cache, state)
        return drawn(state, said.mixture_NxV, self.filters, numbers)

    def read_prompts(
        self,
        parameters: dict[str, Any],
        tokens_BxT: jax.Array,
        lengths_B: jax.Array,
        seed: jax.Array,
        capacity: int,
    ) -> tuple[State, NextToken]:
        """`prefill` up to the draw."""
        rows_B = jnp.arange(tokens_BxT.shape[0])
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows_B)
        hidden, tapped, cache = self.mixture.prompt(parameters, tokens_BxT, lengths_B, capacity)
        seen_BxV = None
        if self.filters.penalty:
            seen_BxV = seen_tokens(tokens_BxT, lengths_B, self.mixture.config.vocab_size)
        state = State(cache, lengths_B, lengths_B - 1, jnp.int32(0), seen_BxV, keys_B)
        return state, self.mixture.next_token(parameters, hidden, tapped)

    def read_token(self, parameters: dict[str, Any], cache: Cache, state: State) -> tuple[State, NextToken]:
        """`step` up to the draw."""
        tokens_Bx1, positions_Bx1 = state.token_B[:, None], state.position_B[:, None]
        hidden, tapped, cache = self.mixture.extend(parameters, tokens_Bx1, positions_Bx1, cache)
        return state._replace(cache=cache), self.mixture.next_token(parameters, hidden[:, 0], tapped[:, 0])


def inputs(
    prompts: list[list[int]], config: GenerateConfig
) -> tuple[tuple[np.ndarray, np.ndarray, np.uint32], int]:
    """Tokens [B, T] and lengths [B] of a batch, the seed, and the positions that it wants room for."""
    tokens_BxT, lengths_B = packed(prompts)
    capacity = rounded(lengths_B.max() + config.max_tokens)
    return (tokens_BxT, lengths_B, np.uint32(config.seed & 0xFFFFFFFF)), capacity


def drawn(state: State, log_prob_BxV: jax.Array, filters: Filters, numbers: Numbers) -> State:
    """The state after a token of each row has been drawn from these distributions."""
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(state.keys_B, state.drawn)
    token_B = draw(log_prob_BxV, state.seen_BxV, filters, numbers, keys_B)
    rows_B = jnp.arange(token_B.shape[0])
    seen_BxV = None if state.seen_BxV is None else state.seen_BxV.at[rows_B, token_B].set(True)
    return state._replace(
        token_B=token_B,
        position_B=state.position_B + 1,
        drawn=state.drawn + 1,
        seen_BxV=seen_BxV,
    )


def generate(
    model: Steps,
    prompts: list[list[int]],
    eos: int,
    config: GenerateConfig,
    stops: Callable[[int, list[int]], bool] = lambda row, tokens: False,
) -> Iterator[list[tuple[int, int]]]:
    """Continues prompts, a step at a time, until every row has ended.

    Args:
      model: the programs, of `config`'s filters.
      prompts: token ids, at least one each.
      eos: ends a row; it is not given out.
      config: how tokens are drawn.
      stops: told (row, its new tokens so far) after each token; True ends the row.

    Yields:
      The step's (row, token) of every row still going on.
    """
    texts: list[list[int]] = [[] for _ in prompts]
    going, numbers = set(range(len(prompts))), Numbers.of(config)
    state = model.begin(prompts, config)
    for count in range(config.max_tokens):
        token_B = state.token_B
        if count + 1 < config.max_tokens:
            # The device begins the next step before this one's tokens are read: neither waits for the other.
            state = model.advance(state, numbers)
        said_B = np.asarray(token_B)
        found = [(row, int(said_B[row])) for row in sorted(going) if said_B[row] != eos]
        for row, token in found:
            texts[row].append(token)
        going = {row for row, _ in found if not stops(row, texts[row])}
        yield found
        if not going:
            return
