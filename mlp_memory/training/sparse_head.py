"""Projection to the vocabulary where only named logits and the log-sum-exp are wanted.

Every loss of this project needs, per token, the log-sum-exp of the logits and the logits
of a few named tokens: language modelling names the next token, distillation the teacher's
tokens and the next one, the mixture the next token under both models. So this is the one
place where [tokens, V] logits come into being, a chunk of tokens at a time, and they are
computed again for the gradient rather than kept.
"""

import jax
import jax.numpy as jnp

_CHUNK_ELEMENTS = 1 << 24
"""Logits alive at once; 64 MiB in float32."""


def named_logits(
    hidden_NxD: jax.Array,
    kernel_DxV: jax.Array,
    ids_NxM: jax.Array,
    chunk_elements: int = _CHUNK_ELEMENTS,
) -> tuple[jax.Array, jax.Array]:
    """Logits of the named tokens and the log-sum-exp over the vocabulary.

    Args:
      hidden_NxD: states; products run in their dtype, accumulated in float32.
      kernel_DxV: output projection.
      ids_NxM: integer token ids; may repeat.
      chunk_elements: logits alive at once (tokens of a chunk times V).

    Returns:
      z_NxM and lse_N, float32.
    """
    kernel_DxV = kernel_DxV.astype(hidden_NxD.dtype)
    n, chunk = hidden_NxD.shape[0], max(1, chunk_elements // kernel_DxV.shape[1])

    def project(hidden_CxD: jax.Array, ids_CxM: jax.Array) -> tuple[jax.Array, jax.Array]:
        z_CxV = jnp.matmul(hidden_CxD, kernel_DxV, preferred_element_type=jnp.float32)
        return jnp.take_along_axis(z_CxV, ids_CxM, axis=-1), jax.nn.logsumexp(z_CxV, axis=-1)

    if n <= chunk:
        return project(hidden_NxD, ids_NxM)
    pad = -n % chunk
    padded = [jnp.pad(x, ((0, pad), (0, 0))).reshape(-1, chunk, x.shape[1]) for x in (hidden_NxD, ids_NxM)]
    z, lse = jax.lax.map(lambda x: jax.checkpoint(project)(*x), tuple(padded))
    return z.reshape(n + pad, -1)[:n], lse.reshape(n + pad)[:n]


def label_log_prob(hidden_NxD: jax.Array, kernel_DxV: jax.Array, labels_N: jax.Array) -> jax.Array:
    """log p(label) per token, [N] float32: z_label − logsumexp(z)."""
    z_Nx1, lse_N = named_logits(hidden_NxD, kernel_DxV, labels_N[:, None])
    return z_Nx1[:, 0] - lse_N


def sparse_cross_entropy(z_NxM: jax.Array, lse_N: jax.Array, weights_NxM: jax.Array) -> jax.Array:
    """−Σ_v t_v log p_v per token, [N], for a sparse target t given as weights of named ids.

    With t = α·p_kNN + (1−α)·onehot(y) this is α·KL(p_kNN ‖ p) + (1−α)·CE(y, p) plus the
    constant α·H(p_kNN) (PAPER.md, "The method in one page", 3). Repeated ids add up.
    """
    return (weights_NxM * (lse_N[:, None] - z_NxM)).sum(-1)
