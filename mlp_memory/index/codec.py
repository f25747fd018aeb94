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
import functools

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True)
class Space:
    """The space of the dot product, E = D + 1.

    Attributes:
      mean_D: float32, taken from keys and queries.
      scale: s, above 0.
    """

    mean_D: np.ndarray
    scale: float

    @classmethod
    def of(cls, sample_SxD: np.ndarray) -> "Space":
        """The space that a sample's mean and lengths give."""
        mean_D = sample_SxD.mean(axis=0, dtype=np.float64).astype(np.float32)
        sqnorm_S = np.square(sample_SxD - mean_D).sum(axis=1, dtype=np.float64)
        return cls(mean_D, float(np.float32(np.sqrt(sqnorm_S.mean()))) or 1.0)

    def keys(self, keys_RxD: np.ndarray) -> np.ndarray:
        """float32 [R, E]: [x, −|x|²/(2s)]."""
        lifted_RxE = np.empty((len(keys_RxD), len(self.mean_D) + 1), np.float32)
        np.subtract(keys_RxD, self.mean_D, out=lifted_RxE[:, :-1])
        sqnorm_R = np.einsum("re,re->r", lifted_RxE[:, :-1], lifted_RxE[:, :-1])
        lifted_RxE[:, -1] = sqnorm_R / (-2 * self.scale)
        return lifted_RxE

    def queries(self, queries_QxD: np.ndarray) -> np.ndarray:
        """float32 [Q, E]: [q, s]."""
        lifted_QxE = np.empty((len(queries_QxD), len(self.mean_D) + 1), np.float32)
        np.subtract(queries_QxD, self.mean_D, out=lifted_QxE[:, :-1])
        lifted_QxE[:, -1] = self.scale
        return lifted_QxE

    def sqdist(self, lifted_QxE: np.ndarray, dots_Qxk: np.ndarray) -> np.ndarray:
        """Squared distances, float32 and not negative, of dot products with lifted queries."""
        queries_QxD = lifted_QxE[:, :-1]
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
        rows, blocks = len(lifted_NxE), len(self.codewords_Bx16xP)
        per_row = 4 * (len(self.centres_LxE) + 2 * self.codewords_Bx16xP.size // max(blocks, 1) * blocks)
        # A power of two, and the last block filled up: one shape to compile, and a row's code is its own.
        step = 1 << max(_BLOCK_BYTES // per_row, 1).bit_length()
        leaves_N, codes_NxB = np.empty(rows, np.int32), np.empty((rows, blocks), np.uint8)
        for first in range(0, rows, step):
            some_RxE = lifted_NxE[first : first + step]
            filled_RxE = np.pad(some_RxE, ((0, step - len(some_RxE)), (0, 0)))
            leaf_R, code_RxB = jax.device_get(_encode(filled_RxE, self.centres_LxE, self.codewords_Bx16xP))
            leaves_N[first : first + step] = leaf_R[: len(some_RxE)]
            codes_NxB[first : first + step] = code_RxB[: len(some_RxE)]
        return leaves_N, codes_NxB


@functools.partial(jax.jit)
def _encode(
    lifted_RxE: jax.Array, centres_LxE: jax.Array, codewords_Bx16xP: jax.Array
) -> tuple[jax.Array, jax.Array]:
    blocks, _, width = codewords_Bx16xP.shape
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    half_sqnorm_L = jnp.square(centres_LxE).sum(1) / 2
    leaf_R = jnp.argmax(dot("re,le->rl", lifted_RxE, centres_LxE) - half_sqnorm_L, axis=1)
    residual_RxE = lifted_RxE - centres_LxE[leaf_R]
    padding = blocks * width - residual_RxE.shape[1]
    residual_RxBxP = jnp.pad(residual_RxE, ((0, 0), (0, padding))).reshape(-1, blocks, width)
    half_sqnorm_Bx16 = jnp.square(codewords_Bx16xP).sum(2) / 2
    code_RxB = jnp.argmax(dot("rbp,bcp->rbc", residual_RxBxP, codewords_Bx16xP) - half_sqnorm_Bx16, axis=2)
    return leaf_R.astype(jnp.int32), code_RxB.astype(jnp.uint8)
