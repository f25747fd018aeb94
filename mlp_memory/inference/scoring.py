"""Log-likelihoods of given texts under a model: every token's, and whether it was the likeliest."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlp_memory.decoder.windows import WindowPlan
from mlp_memory.inference.next_token import Mixture
from mlp_memory.inference.prompts import packed

_CHUNK_ELEMENTS = 1 << 24
"""Probabilities held at once, of each of the models."""


class TokenScores(NamedTuple):
    """Of each token but a sequence's first.

    Attributes:
      log_prob_T: natural-log probability given all before it, float32.
      likeliest_T: whether no token was likelier, bool.
    """

    log_prob_T: np.ndarray
    likeliest_T: np.ndarray


class Scorer:
    """Scores sequences of any lengths, in batches.

    Args:
      mixture: the model.
      context: longest window; a longer sequence is read through windows that overlap by half.
      batch: windows at once.
    """

    def __init__(self, mixture: Mixture, context: int, batch: int = 16):
        self._mixture, self._batch = mixture, batch
        self._plan = WindowPlan(context, max(1, context // 2))
        self._score = jax.jit(self._of_batch)

    def __call__(self, sequences: Sequence[Sequence[int]]) -> list[TokenScores]:
        """Scores of each sequence's tokens after its first."""
        windows = [
            (index, window, sequence)
            for index, sequence in enumerate(sequences)
            for window in self._plan.windows(0, len(sequence) - 1, len(sequence) - 1)
        ]
        found = [
            TokenScores(np.zeros(max(len(s) - 1, 0), np.float32), np.zeros(max(len(s) - 1, 0), bool))
            for s in sequences
        ]
        # Windows of like lengths share a batch, so that little is computed for padding.
        windows.sort(key=lambda found: found[1].stop - found[1].start)
        for start in range(0, len(windows), self._batch):
            group = windows[start : start + self._batch]
            none = [[]] * (self._batch - len(group))
            tokens_BxT, _ = packed([text[w.start : w.stop] for _, w, text in group] + none)
            labels_BxT, _ = packed([text[w.start + 1 : w.stop + 1] for _, w, text in group] + none)
            scores = map(np.asarray, self._score(self._mixture.parameters, tokens_BxT, labels_BxT))
            for part, values_BxT in enumerate(scores):
                for (index, window, _), values_T in zip(group, values_BxT):
                    used = slice(window.first - window.start, window.stop - window.start)
                    found[index][part][window.first : window.stop] = values_T[used]
        return found

    def _of_batch(
        self, parameters: dict[str, Any], tokens_BxT: jax.Array, labels_BxT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        hidden, tapped = self._mixture.read(parameters, tokens_BxT)
        batch, length = tokens_BxT.shape
        most = max(1, _CHUNK_ELEMENTS // (batch * self._mixture.config.vocab_size))
        size = next(n for n in range(min(most, length), 0, -1) if length % n == 0)

        def chunk(xs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            hidden_NxD, tap_NxD, labels_N = (x.reshape(batch * size, *x.shape[2:]) for x in xs)
            said_NxV = self._mixture.next_token(parameters, hidden_NxD, tap_NxD).mixture_NxV
            log_prob_N = jnp.take_along_axis(said_NxV, labels_N[:, None], axis=1)[:, 0]
            likeliest_N = jnp.argmax(said_NxV, axis=1) == labels_N
            return log_prob_N.reshape(batch, size), likeliest_N.reshape(batch, size)

        def cut(x_BxT: jax.Array) -> jax.Array:
            return jnp.moveaxis(x_BxT.reshape(batch, length // size, size, *x_BxT.shape[2:]), 1, 0)

        outs = jax.lax.map(chunk, tuple(map(cut, (hidden, tapped, labels_BxT))))
        return tuple(jnp.moveaxis(x, 0, 1).reshape(batch, length) for x in outs)
