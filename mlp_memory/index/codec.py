"""Squared L2 as a dot product, and keys as the codes that ScaNN scans.

With x a key less the mean of a sample, and q a query less that mean,

    |q − x|² = |q|² − 2 (q·x − |x|²/2) = |q|² − 2 [q, 1]·[x, −|x|²/2],

so that the nearest keys by squared L2 are the best by dot product in one more dimension, and
ScaNN may code the residual to a leaf's centre, which it does not for squared L2. Centres are lifted
as keys are, so that a query visits the leaves whose centres are nearest.

What is left of −|x|²/2 beyond its centre's share is large beside a block of x: 4 bits of it would spoil
the sum, and ScaNN rounds all blocks' products to 8 bits of the largest. So it has eight codes: seven
share the value, each correcting the ones before, and the last takes what is left. For these the
lifted key has seven more columns, zero, and the query seven more ones. Measured on 192-dimensional keys
whose residual has a standard deviation of 21: with four codes ScaNN's rounding adds an error of 0.79
to 0.91 of the codes of one dimension each, with eight 0.40 to 0.90.

ScaNN trains centres and codewords on a sample; every row is coded here, block by block. Its own
builder holds the keys twice, their residuals once more, and repeats with one thread only.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

NORM_CODES = 8
_BLOCK_BYTES = 1 << 25
_CODES = 127


@dataclasses.dataclass(frozen=True)
class Space:
    """The space of the dot product, of E = D + 8 dimensions.

    Attributes:
      mean_D: float32, taken from keys and queries.
      dtype: of the keys that are kept for reordering: "float32", "bfloat16" or "int8".
      steps_E: float32, for "int8" only: what one of a column's 127 codes up or down is worth.
    """

    mean_D: np.ndarray
    dtype: str = "float32"
    steps_E: np.ndarray | None = None

    @classmethod
    def of(cls, sample_SxD: np.ndarray, dtype: str = "float32") -> "Space":
        """The space around a sample's mean, with codes that reach its largest values."""
        mean_D = sample_SxD.mean(axis=0, dtype=np.float64).astype(np.float32)
        if dtype != "int8":
            return cls(mean_D, dtype)
        x_SxD = sample_SxD - mean_D
        largest_D = np.abs(x_SxD).max(axis=0)
        steps_E = np.ones(len(mean_D) + NORM_CODES, np.float32)
        steps_E[:-NORM_CODES] = np.where(largest_D > 0, largest_D, 1) / _CODES
        # Longer keys than the sample's are rare; a third more is allowed for, the rest is cut off.
        steps_E[-NORM_CODES] = (4 / 3 * half_sqnorm(x_SxD).max() or 1.0) / _CODES
        steps_E[1 - NORM_CODES] = steps_E[-NORM_CODES] / (2 * _CODES)
        return cls(mean_D, dtype, steps_E)

    def keys(self, keys_RxD: np.ndarray) -> np.ndarray:
        """float32 [R, E]: [x, −|x|²/2, 0, ...], with x as it is kept."""
        lifted_RxE = np.zeros((len(keys_RxD), len(self.mean_D) + NORM_CODES), np.float32)
        x_RxD = lifted_RxE[:, :-NORM_CODES]
        np.subtract(keys_RxD, self.mean_D, out=x_RxD)
        if self.dtype != "float32":
            x_RxD[:] = self._decoded(self._rounded(lifted_RxE))[:, :-NORM_CODES]
        lifted_RxE[:, -NORM_CODES] = -half_sqnorm(x_RxD)
        return lifted_RxE

    def stored(self, lifted_RxE: np.ndarray) -> np.ndarray:
        """Lifted keys as ScaNN keeps them: float32, bfloat16 as its bits in int16, or int8 codes.

        One rounded number is too few for −|x|²/2: the next column has what it leaves.
        """
        if self.dtype == "float32":
            return lifted_RxE
        stored_RxE, left_RxE = self._rounded(lifted_RxE), np.zeros_like(lifted_RxE)
        norm, rest = -NORM_CODES, 1 - NORM_CODES
        left_RxE[:, rest] = lifted_RxE[:, norm] - self._decoded(stored_RxE)[:, norm]
        stored_RxE[:, rest] = self._rounded(left_RxE)[:, rest]
        return stored_RxE

    def _rounded(self, lifted_RxE: np.ndarray) -> np.ndarray:
        if self.dtype == "bfloat16":
            return lifted_RxE.astype(ml_dtypes.bfloat16).view(np.int16)
        return np.clip(np.rint(lifted_RxE / self.steps_E), -_CODES, _CODES).astype(np.int8)

    def _decoded(self, stored_RxE: np.ndarray) -> np.ndarray:
        if self.dtype == "bfloat16":
            return stored_RxE.view(ml_dtypes.bfloat16).astype(np.float32)
        return stored_RxE * self.steps_E

    def queries(self, queries_QxD: np.ndarray) -> np.ndarray:
        """float32 [Q, E]: [q, 1, 1, ...]."""
        lifted_QxE = np.ones((len(queries_QxD), len(self.mean_D) + NORM_CODES), np.float32)
        np.subtract(queries_QxD, self.mean_D, out=lifted_QxE[:, :-NORM_CODES])
        return lifted_QxE

    def sqdist(self, lifted_QxE: np.ndarray, dots_Qxk: np.ndarray) -> np.ndarray:
        """Squared distances, float32 and not negative, of dot products with lifted queries."""
        half_Q = half_sqnorm(lifted_QxE[:, :-NORM_CODES])
        return np.maximum(2 * (half_Q[:, None] - dots_Qxk), 0).astype(np.float32)


def half_sqnorm(x_RxD: np.ndarray) -> np.ndarray:
    """float32 [R]: |x|²/2."""
    return np.einsum("rd,rd->r", x_RxD, x_RxD) / 2


@dataclasses.dataclass(frozen=True)
class Codebook:
    """What a lifted key is coded by: the nearest centre, then 4 bits per block of its residual.

    Attributes:
      centres_LxD: float32, of the leaves, less the mean.
      codewords_Bx16xP: float32, of the blocks of x; dimension b·P + p is p of block b, zero past D.
      norm_words_8x16: float32, of the residual of −|x|²/2.
    """

    centres_LxD: np.ndarray
    codewords_Bx16xP: np.ndarray
    norm_words_8x16: np.ndarray

    def encode(self, lifted_NxE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """leaves_N int32, and codes [N, B + 8] uint8 below 16."""
        blocks = len(self.codewords_Bx16xP)
        leaf_N = nearest_leaves(lifted_NxE, self.centres_LxD)
        code_NxC = np.empty((len(lifted_NxE), blocks + NORM_CODES), np.uint8)
        half_sqnorm_L = half_sqnorm(self.centres_LxD)
        for rows, filled_RxE in _blocks(lifted_NxE, blocks * 16):
            count = len(leaf_N[rows])
            filled_R = np.pad(leaf_N[rows], (0, len(filled_RxE) - count))
            residual_RxD = filled_RxE[:, :-NORM_CODES] - self.centres_LxD[filled_R]
            code_NxC[rows, :blocks] = np.asarray(_codes(residual_RxD, self.codewords_Bx16xP))[:count]
            norm_R = filled_RxE[:, -NORM_CODES] + half_sqnorm_L[filled_R]
            code_NxC[rows, blocks:] = norm_codes(norm_R, self.norm_words_8x16)[:count]
        return leaf_N, code_NxC


def norm_target(left_R: np.ndarray, code: int) -> np.ndarray:
    """What one of the eight codes should be, of what the ones before it have left."""
    return left_R / max(NORM_CODES - 1 - code, 1)


def norm_codes(norm_R: np.ndarray, words_8x16: np.ndarray) -> np.ndarray:
    """uint8 [R, 8]: the codes, one after the other."""
    codes_RxC, left_R = np.empty((len(norm_R), len(words_8x16)), np.uint8), norm_R.copy()
    for code, words in enumerate(words_8x16):
        target_R = norm_target(left_R, code)
        codes_RxC[:, code] = np.abs(target_R[:, None] - words).argmin(1)
        left_R -= words[codes_RxC[:, code]]
    return codes_RxC


def nearest_leaves(lifted_NxE: np.ndarray, centres_LxD: np.ndarray) -> np.ndarray:
    """int32 [N]: the centre nearest to each row."""
    leaf_N = np.empty(len(lifted_NxE), np.int32)
    for rows, filled_RxE in _blocks(lifted_NxE, len(centres_LxD)):
        leaf_N[rows] = np.asarray(_nearest(filled_RxE[:, :-NORM_CODES], centres_LxD))[: len(leaf_N[rows])]
    return leaf_N


def _blocks(lifted_NxE: np.ndarray, values_per_row: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of so many intermediate values a row, some 32 MiB; the last is filled up.

    One shape to compile, and a row's code does not depend on the rows around it.
    """
    step = 1 << (max(_BLOCK_BYTES // (4 * values_per_row), 1).bit_length() - 1)
    for first in range(0, len(lifted_NxE), step):
        some_RxE = lifted_NxE[first : first + step]
        yield slice(first, first + step), np.pad(some_RxE, ((0, step - len(some_RxE)), (0, 0)))


@jax.jit
def _nearest(x_RxD: jax.Array, centres_LxD: jax.Array) -> jax.Array:
    dots_RxL = jnp.einsum("rd,ld->rl", x_RxD, centres_LxD, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(dots_RxL - jnp.square(centres_LxD).sum(1) / 2, axis=1).astype(jnp.int32)


@jax.jit
def _codes(residual_RxD: jax.Array, codewords_Bx16xP: jax.Array) -> jax.Array:
    blocks, _, width = codewords_Bx16xP.shape
    padding = ((0, 0), (0, blocks * width - residual_RxD.shape[1]))
    residual_RxBxP = jnp.pad(residual_RxD, padding).reshape(-1, blocks, width)
    dots_RxBx16 = jnp.einsum(
        "rbp,bcp->rbc", residual_RxBxP, codewords_Bx16xP, precision=jax.lax.Precision.HIGHEST
    )
    return jnp.argmax(dots_RxBx16 - jnp.square(codewords_Bx16xP).sum(2) / 2, axis=2).astype(jnp.uint8)
