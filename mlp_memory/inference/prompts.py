"""Prompts of any lengths as one batch."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mlp_memory.artifacts import UserError
from mlp_memory.decoder.config import DecoderConfig
from mlp_memory.inference.config import GenerateConfig

_ROUND = 64
"""Lengths are rounded up to a multiple of this, so that few programs are compiled."""


def packed(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of any lengths as tokens [B, T] padded on the right, and their lengths [B].

    T is the longest prompt's length, rounded up.
    """
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens_BxT = np.zeros((len(prompts), rounded(lengths_B.max(initial=1))), np.int32)
    for row, prompt in zip(tokens_BxT, prompts):
        row[: len(prompt)] = prompt
    return tokens_BxT, lengths_B


def rounded(length: int) -> int:
    """The next multiple of 64."""
    return -(-int(length) // _ROUND) * _ROUND


def unpadded(tokens_BxT: np.ndarray, mask_BxT: np.ndarray) -> list[list[int]]:
    """The rows of a padded batch, wherever the padding is: the tokens that the mask marks, in order."""
    return [tokens[mask.astype(bool)].tolist() for tokens, mask in zip(tokens_BxT, mask_BxT)]


def seen_tokens(tokens_BxT: jax.Array, lengths_B: jax.Array, vocab_size: int) -> jax.Array:
    """Which tokens each row of a padded batch has, [B, V] bool."""
    batch, length = tokens_BxT.shape
    read_BxT = jnp.arange(length) < lengths_B[:, None]
    return jnp.zeros((batch, vocab_size), bool).at[jnp.arange(batch)[:, None], tokens_BxT].max(read_BxT)


def fitted(prompt: list[int], config: GenerateConfig, decoder: DecoderConfig) -> list[int]:
    """The end of a prompt that can be read and continued.

    Raises:
      UserError: nothing of it can.
    """
    if not prompt:
        raise UserError("an empty prompt: give at least one token (a document begins with its first token)")
    most = decoder.max_positions - config.max_tokens if decoder.positions == "learned" else len(prompt)
    if most < 1:
        raise UserError(
            f"generate.max_tokens = {config.max_tokens}: the decoder has {decoder.max_positions} positions, "
            "one at least is the prompt's"
        )
    return prompt[-min(most, config.context or most) :]
