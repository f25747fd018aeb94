"""Beam search: the most likely continuations. A prompt's W hypotheses are W rows of one batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlp_memory.decoder.transformer import Cache
from mlp_memory.inference.config import GenerateConfig
from mlp_memory.inference.next_token import Mixture
from mlp_memory.inference.prompts import packed, rounded, seen_tokens
from mlp_memory.inference.sampling import Filters, Numbers, filtered


class Hypothesis(NamedTuple):
    """A continuation without the token that ends it, and its rank: Σ log p / n^length_penalty."""

    tokens: list[int]
    score: float


class _Choices(NamedTuple):
    """The 2·W likeliest extensions of each prompt's hypotheses, likeliest first, [P, 2·W] each."""

    log_prob: jax.Array
    parent: jax.Array
    token: jax.Array


class _Rows(NamedTuple):
    """What the device keeps of each row."""

    cache: Cache
    seen_RxV: jax.Array | None


class BeamSearch:
    """The two compiled programs of beam search with one model.

    Args:
      mixture: the model.
      filters: greedy; a repetition penalty counts into what hypotheses are ranked by.
      beams: W.
    """

    def __init__(self, mixture: Mixture, filters: Filters, beams: int):
        self._mixture, self._filters, self._beams = mixture, filters, beams
        self._begin = jax.jit(self._first, static_argnames="capacity")
        self._advance = jax.jit(self._next, donate_argnums=1)

    def __call__(self, prompts: list[list[int]], eos: int, config: GenerateConfig) -> list[list[Hypothesis]]:
        """The W best continuations found of each prompt, best first."""
        beams, numbers, parameters = self._beams, Numbers.of(config), self._mixture.parameters
        tokens_PxT, lengths_P = packed(prompts)
        capacity = rounded(lengths_P.max() + config.max_tokens)
        rows, choices = self._begin(parameters, tokens_PxT, lengths_P, numbers, capacity=capacity)
        searches = [_Search(eos, beams, config) for _ in prompts]
        for count in range(config.max_tokens):
            found = _Choices(*map(np.asarray, choices))
            picked = [search.take(*(part[p] for part in found)) for p, search in enumerate(searches)]
            if count + 1 == config.max_tokens or all(search.done for search in searches):
                break
            parent_PxW, token_PxW, score_PxW = (np.array(part) for part in zip(*picked))
            parent_R = (parent_PxW + np.arange(len(prompts))[:, None] * beams).ravel().astype(np.int32)
            position_R = np.repeat(lengths_P + count, beams).astype(np.int32)
            arrays = (token_PxW.ravel().astype(np.int32), position_R, parent_R, score_PxW.astype(np.float32))
            rows, choices = self._advance(parameters, rows, *arrays, numbers)
        return [search.best() for search in searches]

    def _first(
        self,
        parameters: dict[str, Any],
        tokens_PxT: jax.Array,
        lengths_P: jax.Array,
        numbers: Numbers,
        capacity: int,
    ) -> tuple[_Rows, _Choices]:
        hidden, tapped, cache = self._mixture.prompt(parameters, tokens_PxT, lengths_P, capacity)
        seen = seen_tokens(tokens_PxT, lengths_P, self._mixture.config.vocab_size)
        log_prob_PxV = self._log_probs(parameters, hidden, tapped, seen, numbers)
        # All hypotheses begin equal: the first stands for the others.
        alone_PxW = jnp.full((len(tokens_PxT), self._beams), -jnp.inf).at[:, 0].set(0)
        cache, seen, log_prob_RxV = jax.tree.map(
            lambda x: jnp.repeat(x, self._beams, axis=0), (cache, seen, log_prob_PxV)
        )
        rows = _Rows(cache, seen if self._filters.penalty else None)
        return rows, self._choices(alone_PxW, log_prob_RxV)

    def _next(
        self,
        parameters: dict[str, Any],
        rows: _Rows,
        token_R: jax.Array,
        position_R: jax.Array,
        parent_R: jax.Array,
        score_PxW: jax.Array,
        numbers: Numbers,
    ) -> tuple[_Rows, _Choices]:
        cache = jax.tree.map(lambda x: x[parent_R], rows.cache)
        hidden, tapped, cache = self._mixture.extend(parameters, token_R[:, None], position_R[:, None], cache)
        seen = rows.seen_RxV
        if seen is not None:
            seen = seen[parent_R].at[jnp.arange(len(token_R)), token_R].set(True)
        log_prob_RxV = self._log_probs(parameters, hidden[:, 0], tapped[:, 0], seen, numbers)
        return _Rows(cache, seen), self._choices(score_PxW, log_prob_RxV)

    def _log_probs(
        self,
        parameters: dict[str, Any],
        hidden_NxD: jax.Array,
        tap_NxD: jax.Array,
        seen_NxV: jax.Array | None,
        numbers: Numbers,
    ) -> jax.Array:
        log_prob_NxV = self._mixture.next_token(parameters, hidden_NxD, tap_NxD).mixture_NxV
        return filtered(log_prob_NxV, seen_NxV, self._filters, numbers)

    def _choices(self, score_PxW: jax.Array, log_prob_RxV: jax.Array) -> _Choices:
        vocabulary = log_prob_RxV.shape[1]
        total_PxWxV = score_PxW[:, :, None] + log_prob_RxV.reshape(*score_PxW.shape, vocabulary)
        flat = total_PxWxV.reshape(len(score_PxW), -1)
        log_prob, index = jax.lax.top_k(flat, min(2 * self._beams, flat.shape[1]))
        return _Choices(log_prob, index // vocabulary, index % vocabulary)


class _Search:
    """One prompt's hypotheses, growing and finished."""

    def __init__(self, eos: int, beams: int, config: GenerateConfig):
        self._eos, self._beams, self._config = eos, beams, config
        self._growing: list[tuple[list[int], float]] = [([], 0.0)] * beams
        self._finished: list[Hypothesis] = []
        self.done = False

    def take(
        self, log_prob_C: np.ndarray, parent_C: np.ndarray, token_C: np.ndarray
    ) -> tuple[list[int], list[int], list[float]]:
        """Sorts a step's choices into finished and growing; parents, tokens and scores of the W next rows."""
        before, self._growing, parents = self._growing, [], []
        for rank, (score, parent, token) in enumerate(zip(log_prob_C, parent_C, token_C)):
            tokens = before[parent][0]
            if token == self._eos:
                if rank < self._beams and np.isfinite(score):
                    self._finish(tokens, float(score), len(tokens) + 1)
            elif len(self._growing) < self._beams:
                self._growing.append(([*tokens, int(token)], float(score)))
                parents.append(int(parent))
        missing = self._beams - len(self._growing)  # a vocabulary smaller than W
        self._growing += [([self._eos], -np.inf)] * missing
        parents += [0] * missing
        self.done = self.done or self._cannot_improve()
        return parents, [tokens[-1] for tokens, _ in self._growing], [score for _, score in self._growing]

    def best(self) -> list[Hypothesis]:
        """The W best; those that were still growing are as long as texts may be."""
        if not self.done:
            for tokens, score in self._growing:
                if np.isfinite(score):
                    self._finish(tokens, score, len(tokens))
        return self._finished

    def _finish(self, tokens: list[int], score: float, length: int) -> None:
        if self.done:
            return
        self._finished.append(Hypothesis(tokens, score / length**self._config.length_penalty))
        self._finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self._finished[self._beams :]

    def _cannot_improve(self) -> bool:
        """Whether no growing hypothesis can come among the W best: log-probabilities only fall."""
        if len(self._finished) < self._beams:
            return False
        most = max(score for _, score in self._growing) / self._config.max_tokens**self._config.length_penalty
        return most <= self._finished[-1].score
