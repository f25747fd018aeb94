"""Squared L2 as a dot product, and keys as the codes that ScaNN scans.

With x a key less the mean of a sample, and q a query less that mean,

    |q − x|² = |q|² − 2 (q·x − |x|²/2) = |q|² − 2 [q, s]·[x, −|x|²/(2s)],

so that the nearest keys by squared L2 are the best by dot product in one more dimension, and
ScaNN may code the residual to a leaf's centre, which it does not for squared L2. s, the root
mean square of |x|, gives the new column the scale of the keys' length.

ScaNN trains centres and codebooks on a sample; every row is coded here, block by block. Its own
builder holds the keys twice, their residuals once more, and repeats with one thread only.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

_BLOCK_BYTES = 1 << 26
_CODES = 127


@dataclasses.dataclass(frozen=True)
class Space:
    """The space of the dot product, E = D + 1; D + 2 where keys are kept rounded.

    A rounded key x is searched as the key that it is, so |x|² is of the rounded one; one rounded
    number is too few for that, so a second column has what the first leaves: with queries [q, s, s]
    a distance is exact but for the rounding of x.

    Attributes:
      mean_D: float32, taken from keys and queries.
      scale: s, above 0.
      dtype: of the keys that are kept: "float32", "bfloat16" or "int8".
      steps_E: float32, for "int8" only: what one of a column's 127 codes up or down is worth.
    """

    mean_D: np.ndarray
    scale: float
    dtype: str = "float32"
    steps_E: np.ndarray | None = None

    @classmethod
    def of(cls, sample_SxD: np.ndarray, dtype: str = "float32") -> "Space":
        """The space that a sample's mean, lengths and, for "int8", largest values give."""
        mean_D = sample_SxD.mean(axis=0, dtype=np.float64).astype(np.float32)
        centred_SxD = sample_SxD - mean_D
        sqnorm_S = np.square(centred_SxD).sum(axis=1, dtype=np.float64)
        scale = float(np.float32(np.sqrt(sqnorm_S.mean()))) or 1.0
        if dtype != "int8":
            return cls(mean_D, scale, dtype)
        largest_D = np.abs(centred_SxD).max(axis=0)
        steps_D = np.where(largest_D > 0, largest_D, 1) / _CODES
        # Longer keys than the sample's are rare; a third more is allowed for, the rest is cut off.
        step = 4 / 3 * (sqnorm_S.max() or 1.0) / (2 * scale) / _CODES
        steps_E = np.concatenate([steps_D, [step, step / (2 * _CODES)]]).astype(np.float32)
        return cls(mean_D, scale, dtype, steps_E)

    def keys(self, keys_RxD: np.ndarray) -> np.ndarray:
        """float32 [R, E]: [x, −|x|²/(2s)], x as it is kept."""
        dim = len(self.mean_D)
        lifted_RxE = np.zeros((len(keys_RxD), dim + (1 if self.dtype == "float32" else 2)), np.float32)
        np.subtract(keys_RxD, self.mean_D, out=lifted_RxE[:, :dim])
        lifted_RxE[:, :dim] = self._rounded(lifted_RxE)[:, :dim]
        half_R = np.einsum("re,re->r", lifted_RxE[:, :dim], lifted_RxE[:, :dim]) / (-2 * self.scale)
        lifted_RxE[:, dim] = half_R
        if self.dtype != "float32":
            lifted_RxE[:, dim] = self._rounded(lifted_RxE)[:, dim]
            lifted_RxE[:, dim + 1] = half_R - lifted_RxE[:, dim]
            lifted_RxE[:, dim + 1] = self._rounded(lifted_RxE)[:, dim + 1]
        return lifted_RxE

    def stored(self, lifted_RxE: np.ndarray) -> np.ndarray:
        """Lifted keys as ScaNN keeps them: float32, bfloat16 as its bits in int16, or int8 codes."""
        if self.dtype == "int8":
            return np.clip(np.rint(lifted_RxE / self.steps_E), -_CODES, _CODES).astype(np.int8)
        if self.dtype == "bfloat16":
            return lifted_RxE.astype(ml_dtypes.bfloat16).view(np.int16)
        return lifted_RxE

    def _rounded(self, lifted_RxE: np.ndarray) -> np.ndarray:
        stored_RxE = self.stored(lifted_RxE)
        if self.dtype == "int8":
            return stored_RxE * self.steps_E
        return (
            stored_RxE.view(ml_dtypes.bfloat16).astype(np.float32) if self.dtype == "bfloat16" else stored_RxE
        )

    def queries(self, queries_QxD: np.ndarray) -> np.ndarray:
        """float32 [Q, E]: [q, s], s twice where keys are rounded."""
        dim = len(self.mean_D)
        lifted_QxE = np.empty((len(queries_QxD), dim + (1 if self.dtype == "float32" else 2)), np.float32)
        np.subtract(queries_QxD, self.mean_D, out=lifted_QxE[:, :dim])
        lifted_QxE[:, dim:] = self.scale
        return lifted_QxE

    def sqdist(self, lifted_QxE: np.ndarray, dots_Qxk: np.ndarray) -> np.ndarray:
        """Squared distances, float32 and not negative, of dot products with lifted queries."""
        queries_QxD = lifted_QxE[:, : len(self.mean_D)]
        sqnorm_Q = np.einsum("qe,qe->q", queries_QxD, queries_QxD)
        return np.maximum(sqnorm_Q[:, None] - 2 * dots_Qxk, 0).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Codebook:
    """What a lifted key is coded by: the nearest centre, then 4 bits per block of its residual.

    Attributes:
      centres_LxE: float32, of the leaves.
      codewords_Bx16xP: float32, of the blocks; dimension b·P + p is p of block b, zero past E.
    """

    centres_LxE: np.ndarray
    codewords_Bx16xP: np.ndarray

    def encode(self, lifted_NxE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """leaves_N int32, and codes_NxB uint8 below 16."""
        blocks = len(self.codewords_Bx16xP)
        leaf_N = nearest_leaves(lifted_NxE, self.centres_LxE)
        code_NxB = np.empty((len(lifted_NxE), blocks), np.uint8)
        for rows, filled_RxE in _blocks(lifted_NxE, blocks * 16):
            filled_R = np.pad(leaf_N[rows], (0, len(filled_RxE) - len(leaf_N[rows])))
            residual_RxE = filled_RxE - self.centres_LxE[filled_R]
            code_NxB[rows] = np.asarray(_codes(residual_RxE, self.codewords_Bx16xP))[: len(leaf_N[rows])]
        return leaf_N, code_NxB


def nearest_leaves(lifted_NxE: np.ndarray, centres_LxE: np.ndarray) -> np.ndarray:
    """int32 [N]: the centre nearest to each row."""
    leaf_N = np.empty(len(lifted_NxE), np.int32)
    for rows, filled_RxE in _blocks(lifted_NxE, len(centres_LxE)):
        leaf_N[rows] = np.asarray(_nearest(filled_RxE, centres_LxE))[: len(leaf_N[rows])]
    return leaf_N


def _blocks(lifted_NxE: np.ndarray, values_per_row: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of so many intermediate values a row, some 64 MiB; the last is filled up.

    One shape to compile, and a row's code does not depend on the rows around it.
    """
    step = 1 << (max(_BLOCK_BYTES // (4 * values_per_row), 1).bit_length() - 1)
    for first in range(0, len(lifted_NxE), step):
        some_RxE = lifted_NxE[first : first + step]
        yield slice(first, first + step), np.pad(some_RxE, ((0, step - len(some_RxE)), (0, 0)))


@jax.jit
def _nearest(lifted_RxE: jax.Array, centres_LxE: jax.Array) -> jax.Array:
    dots_RxL = jnp.einsum("re,le->rl", lifted_RxE, centres_LxE, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(dots_RxL - jnp.square(centres_LxE).sum(1) / 2, axis=1).astype(jnp.int32)


@jax.jit
def _codes(residual_RxE: jax.Array, codewords_Bx16xP: jax.Array) -> jax.Array:
    blocks, _, width = codewords_Bx16xP.shape
    padding = ((0, 0), (0, blocks * width - residual_RxE.shape[1]))
    residual_RxBxP = jnp.pad(residual_RxE, padding).reshape(-1, blocks, width)
    dots_RxBx16 = jnp.einsum(
        "rbp,bcp->rbc", residual_RxBxP, codewords_Bx16xP, precision=jax.lax.Precision.HIGHEST
    )
    return jnp.argmax(dots_RxBx16 - jnp.square(codewords_Bx16xP).sum(2) / 2, axis=2).astype(jnp.uint8)
