"""The fused sparse head: projection to the vocabulary and cross-entropy with a sparse target.

Every loss of this project is −Σ_v t_v log p_v for a target t that names a few tokens: language
modelling names the next token, distillation the teacher's tokens and the next one, the mixture
the next token under both models. It is logsumexp(z)·Σt − Σ_v t_v z_v, so it needs the named
logits and the log-sum-exp. This is the one place where logits come into being: [chunk, V] of
them at a time, never [tokens, V], and no dense target.

Where the loss is summed, its gradient is known as soon as a chunk's logits are, so both are
taken in one pass, with three products, as many as a dense head has. Where each token's loss
goes on into something else (`label_log_prob`), the gradient computes the logits again.

On a mesh each device keeps to its tokens and, along `tensor`, to its part of the vocabulary.
What crosses the network is two numbers a token, a gradient as large as the states, and one as
large as the kernel.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mlp_memory.parallel.mesh import target_platform
from mlp_memory.parallel.sharding import BATCH, RULES

_CHUNK_ELEMENTS_ON_CPU = 1 << 25
_CHUNK_ELEMENTS = 1 << 27
"""Logits that a device holds at once. Every chunk reads and writes the kernel's gradient, which
accelerators hide behind the products of some 4,096 tokens."""

_TENSOR, _SHARDS = RULES["vocab"], RULES["embed"]
_COPIES = tuple(axis for axis in BATCH if axis != _SHARDS)
_TOKENS, _GATHERED, _SHARDED = P(BATCH), P(None, _TENSOR), P(_SHARDS, _TENSOR)
"""Tokens over the batch axes; a kernel as the products want it, and as its gradient is kept."""


def sparse_cross_entropy(
    hidden_NxD: jax.Array,
    kernel_DxV: jax.Array,
    ids_NxM: jax.Array,
    weights_NxM: jax.Array,
    mesh: Mesh | None = None,
    chunk_elements: int | None = None,
) -> jax.Array:
    """Σ over tokens of −Σ_v t_v log p_v, a float32 scalar; value and gradient in one pass.

    With t = α·p_kNN + (1−α)·onehot(y) this is α·KL(p_kNN ‖ p) + (1−α)·CE(y, p) plus the
    constant α·H(p_kNN) (PAPER.md, "The method in one page", 3).

    Args:
      hidden_NxD: states; products run in their dtype, accumulated in float32.
      kernel_DxV: output projection.
      ids_NxM: integer token ids; where one repeats, its weights add up.
      weights_NxM: t, a weight for each id. A target is data: it has no gradient.
      mesh: devices that the tokens (over the batch axes) and V (over `tensor`) are split over;
        None for one device. N divides over the batch axes, V over `tensor`.
      chunk_elements: logits that a device holds at once.
    """
    return _summed(_head(mesh, chunk_elements), hidden_NxD, kernel_DxV, ids_NxM, weights_NxM)


def label_log_prob(
    hidden_NxD: jax.Array,
    kernel_DxV: jax.Array,
    labels_N: jax.Array,
    mesh: Mesh | None = None,
    chunk_elements: int | None = None,
) -> jax.Array:
    """log p(label) per token, [N] float32: z_label − logsumexp(z). Args as above."""
    ones_Nx1 = jnp.ones((labels_N.shape[0], 1), jnp.float32)
    head = _head(mesh, chunk_elements)
    return -_per_token(head, hidden_NxD, kernel_DxV, labels_N[:, None], ones_Nx1)


def divergence(
    start_NxD: jax.Array,
    start_kernel_DxV: jax.Array,
    hidden_NxD: jax.Array,
    kernel_DxV: jax.Array,
    weights_N: jax.Array,
    mesh: Mesh | None = None,
    chunk_elements: int | None = None,
) -> jax.Array:
    """Σ weight · KL(p_start ‖ p), nats, a float32 scalar; the gradient is taken for p in the same pass.

    Args:
      start_NxD, start_kernel_DxV: states and output projection of p_start, which are data.
      hidden_NxD, kernel_DxV: those of p.
      weights_N: of the tokens; data.
      mesh, chunk_elements: see `sparse_cross_entropy`.
    """
    fixed = (start_NxD, start_kernel_DxV.astype(start_NxD.dtype), weights_N)
    return _diverged(_head(mesh, chunk_elements), hidden_NxD, kernel_DxV, *map(jax.lax.stop_gradient, fixed))


class Spread(NamedTuple):
    """How sure next-token distributions are, nats, [N] float32 each.

    Attributes:
      entropy_N: −Σ_v p_v log p_v.
      most_N: log of the largest probability.
    """

    entropy_N: jax.Array
    most_N: jax.Array


def label_and_spread(
    hidden_NxD: jax.Array,
    kernel_DxV: jax.Array,
    labels_N: jax.Array,
    mesh: Mesh | None = None,
    chunk_elements: int | None = None,
) -> tuple[jax.Array, Spread]:
    """log p(label) per token, [N] float32, and how sure the distributions are; no gradient. Args as above."""
    head, ones_Nx1 = _head(mesh, chunk_elements), jnp.ones((labels_N.shape[0], 1), jnp.float32)
    hidden_NxD, kernel_DxV = map(jax.lax.stop_gradient, (hidden_NxD, kernel_DxV))
    loss_N, _, spread = head.losses(hidden_NxD, kernel_DxV, labels_N[:, None], ones_Nx1, with_spread=True)
    return -loss_N, spread


def spread_of(log_prob_NxV: jax.Array) -> Spread:
    """The same of distributions given whole, as log-probabilities."""
    p_NxV = jnp.exp(log_prob_NxV)
    return Spread(-jnp.where(p_NxV > 0, p_NxV * log_prob_NxV, 0).sum(-1), log_prob_NxV.max(-1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(head: "_Head", h_NxD: jax.Array, w_DxV: jax.Array, ids_NxM: jax.Array, t_NxM: jax.Array):
    return head.losses(h_NxD, w_DxV, ids_NxM, t_NxM)[0].sum()


def _summed_forward(head: "_Head", h_NxD: jax.Array, w_DxV: jax.Array, *target: jax.Array):
    loss_N, *gradients = head.gradients(h_NxD, w_DxV, *target, None)
    return loss_N.sum(), gradients


def _summed_backward(head: "_Head", gradients: list[jax.Array], pull: jax.Array):
    return *((pull * g.astype(jnp.float32)).astype(g.dtype) for g in gradients), None, None


_summed.defvjp(_summed_forward, _summed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _per_token(head: "_Head", h_NxD: jax.Array, w_DxV: jax.Array, ids_NxM: jax.Array, t_NxM: jax.Array):
    return head.losses(h_NxD, w_DxV, ids_NxM, t_NxM)[0]


def _per_token_forward(head: "_Head", *arrays: jax.Array):
    loss_N, lse_N = head.losses(*arrays)
    return loss_N, (*arrays, lse_N)


def _per_token_backward(head: "_Head", kept: tuple[jax.Array, ...], pull_N: jax.Array):
    h_NxD, w_DxV, ids_NxM, t_NxM, lse_N = kept
    _, *gradients = head.gradients(h_NxD, w_DxV, ids_NxM, t_NxM * pull_N[:, None], lse_N)
    return *gradients, None, None


_per_token.defvjp(_per_token_forward, _per_token_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _diverged(head: "_Head", *arrays: jax.Array):
    return head.divergence(*arrays)[0].sum()


def _diverged_forward(head: "_Head", *arrays: jax.Array):
    loss_N, *gradients = head.divergence(*arrays)
    return loss_N.sum(), gradients


def _diverged_backward(head: "_Head", gradients: list[jax.Array], pull: jax.Array):
    return *((pull * g.astype(jnp.float32)).astype(g.dtype) for g in gradients), None, None, None


_diverged.defvjp(_diverged_forward, _diverged_backward)


def _head(mesh: Mesh | None, chunk_elements: int | None) -> "_Head":
    if chunk_elements is None:
        platform = target_platform()
        chunk_elements = _CHUNK_ELEMENTS_ON_CPU if platform == "cpu" else _CHUNK_ELEMENTS
    return _Head(None if mesh is None or mesh.size == 1 else mesh, chunk_elements)


@dataclasses.dataclass(frozen=True)
class _Head:
    """The two passes over chunks of tokens, each device over its own tokens and vocabulary."""

    mesh: Mesh | None
    chunk_elements: int

    def losses(
        self,
        h_NxD: jax.Array,
        w_DxV: jax.Array,
        ids_NxM: jax.Array,
        t_NxM: jax.Array,
        with_spread: bool = False,
    ) -> tuple[jax.Array | Spread, ...]:
        """loss_N and lse_N, float32, and the `Spread` where it is wanted."""

        def local(h_NxD: jax.Array, w_DxV: jax.Array, *target: jax.Array) -> tuple[jax.Array, ...]:
            def chunk(carry: None, xs: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, ...]]:
                z_CxV = self._logits(xs[0], w_DxV)
                loss_C, lse_C, most_C, exp_CxV = self._loss(z_CxV, *xs[1:])
                if not with_spread:
                    return None, (loss_C, lse_C)
                return None, (loss_C, lse_C, *self._spread(z_CxV, lse_C, most_C, exp_CxV))

            return self._scan(chunk, None, (h_NxD, *target), w_DxV.shape[1])[1]

        ins, outs = (_TOKENS, _GATHERED, _TOKENS, _TOKENS), (_TOKENS,) * (4 if with_spread else 2)
        loss_N, lse_N, *spread = self._on_mesh(local, ins, outs)(
            h_NxD, w_DxV.astype(h_NxD.dtype), ids_NxM, t_NxM
        )
        return (loss_N, lse_N, Spread(*spread)) if with_spread else (loss_N, lse_N)

    def gradients(
        self,
        h_NxD: jax.Array,
        w_DxV: jax.Array,
        ids_NxM: jax.Array,
        t_NxM: jax.Array,
        lse_N: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """loss_N, and the gradients of its sum with respect to the states and the kernel.

        Args:
          h_NxD, w_DxV, ids_NxM, t_NxM: as `sparse_cross_entropy`'s.
          lse_N: log-sum-exps, where they are known; the loss then means nothing.
        """
        known = [] if lse_N is None else [lse_N]

        def local(h_NxD: jax.Array, w_DxV: jax.Array, *xs_N: jax.Array) -> tuple[jax.Array, ...]:
            # The kernel's gradient is added up the other way round, which is faster on CPUs.
            def chunk(dw_VxD: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple]:
                h_CxD, ids_CxM, t_CxM, *known = xs
                z_CxV = self._logits(h_CxD, w_DxV)
                if known:
                    loss_C, p_CxV = known[0], jnp.exp(z_CxV - known[0][:, None])
                else:
                    loss_C, lse_C, most_C, exp_CxV = self._loss(z_CxV, ids_CxM, t_CxM)
                    p_CxV = exp_CxV * jnp.exp(most_C - lse_C)[:, None]
                dz_CxV = p_CxV * t_CxM.sum(-1)[:, None]
                local_CxM, owned_CxM = self._local(ids_CxM, z_CxV.shape[1])
                rows_Cx1 = jnp.arange(len(dz_CxV))[:, None]
                dz_CxV = dz_CxV.at[rows_Cx1, local_CxM].add(-jnp.where(owned_CxM, t_CxM, 0))
                dw_VxD, dh_CxD = self._pulled(dz_CxV, h_CxD, w_DxV, dw_VxD)
                return dw_VxD, (loss_C, dh_CxD)

            zero = jnp.zeros(w_DxV.shape[::-1], jnp.float32)
            dw_VxD, (loss_N, dh_NxD) = self._scan(chunk, zero, (h_NxD, *xs_N), w_DxV.shape[1])
            return loss_N, *self._over_mesh(dh_NxD, dw_VxD)

        ins = (_TOKENS, _GATHERED, *(_TOKENS for _ in (ids_NxM, t_NxM, *known)))
        outs = (_TOKENS, _TOKENS, _SHARDED)
        arrays = (h_NxD, w_DxV.astype(h_NxD.dtype), ids_NxM, t_NxM, *known)
        loss_N, dh_NxD, dw_DxV = self._on_mesh(local, ins, outs)(*arrays)
        return loss_N, dh_NxD, dw_DxV.astype(w_DxV.dtype)

    def divergence(
        self, h_NxD: jax.Array, w_DxV: jax.Array, start_NxD: jax.Array, start_DxV: jax.Array, t_N: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """t · KL(p_start ‖ p), and the gradients of its sum with respect to p's states and kernel."""

        def local(
            h_NxD: jax.Array, w_DxV: jax.Array, start_NxD: jax.Array, start_DxV: jax.Array, t_N: jax.Array
        ) -> tuple[jax.Array, ...]:
            def chunk(dw_VxD: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple]:
                h_CxD, start_CxD, t_C = xs
                log_p_CxV = self._log_p(self._logits(h_CxD, w_DxV))
                log_start_CxV = self._log_p(self._logits(start_CxD, start_DxV))
                start_CxV = jnp.exp(log_start_CxV)
                loss_C = t_C * (start_CxV * (log_start_CxV - log_p_CxV)).sum(-1)
                dz_CxV = (jnp.exp(log_p_CxV) - start_CxV) * t_C[:, None]
                dw_VxD, dh_CxD = self._pulled(dz_CxV, h_CxD, w_DxV, dw_VxD)
                return dw_VxD, (loss_C, dh_CxD)

            zero, both = jnp.zeros(w_DxV.shape[::-1], jnp.float32), 2 * w_DxV.shape[1]
            dw_VxD, (loss_N, dh_NxD) = self._scan(chunk, zero, (h_NxD, start_NxD, t_N), both)
            if self.mesh is not None:
                loss_N = jax.lax.psum(loss_N, _TENSOR)
            return loss_N, *self._over_mesh(dh_NxD, dw_VxD)

        ins, outs = (_TOKENS, _GATHERED, _TOKENS, _GATHERED, _TOKENS), (_TOKENS, _TOKENS, _SHARDED)
        arrays = (h_NxD, w_DxV.astype(h_NxD.dtype), start_NxD, start_DxV, t_N)
        loss_N, dh_NxD, dw_DxV = self._on_mesh(local, ins, outs)(*arrays)
        return loss_N, dh_NxD, dw_DxV.astype(w_DxV.dtype)

    def _pulled(
        self, dz_CxV: jax.Array, h_CxD: jax.Array, w_DxV: jax.Array, dw_VxD: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The kernel's gradient with a chunk's added, and the gradient of its states."""
        dz_CxV = dz_CxV.astype(h_CxD.dtype)
        dw_VxD += jnp.einsum("cv,cd->vd", dz_CxV, h_CxD, preferred_element_type=jnp.float32)
        dh_CxD = jnp.einsum("cv,dv->cd", dz_CxV, w_DxV, preferred_element_type=jnp.float32)
        return dw_VxD, dh_CxD.astype(h_CxD.dtype)

    def _over_mesh(self, dh_NxD: jax.Array, dw_VxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gradients of all devices, added up where they are of the same numbers; the kernel's turned back."""
        if self.mesh is not None:
            dh_NxD = jax.lax.psum(dh_NxD, _TENSOR)
            dw_VxD = jax.lax.psum_scatter(dw_VxD, _SHARDS, scatter_dimension=1, tiled=True)
            dw_VxD = jax.lax.psum(dw_VxD, _COPIES)
        return dh_NxD, dw_VxD.T

    def _log_p(self, z_CxV: jax.Array) -> jax.Array:
        """log p of this device's part of the vocabulary."""
        lse_C = jax.nn.logsumexp(z_CxV, axis=-1)
        if self.mesh is not None and self.mesh.shape[_TENSOR] > 1:
            lse_C = jax.nn.logsumexp(jax.lax.all_gather(lse_C, _TENSOR), axis=0)
        return z_CxV - lse_C[:, None]

    def _on_mesh(self, local: Callable, ins: tuple[P, ...], outs: tuple[P, ...]) -> Callable:
        if self.mesh is None:
            return local
        return jax.shard_map(local, mesh=self.mesh, in_specs=ins, out_specs=outs, check_vma=False)

    def _scan(
        self, chunk: Callable, carry: jax.Array | None, xs_N: tuple[jax.Array, ...], vocabulary: int
    ) -> tuple[jax.Array | None, tuple[jax.Array, ...]]:
        """Runs `carry, outs = chunk(carry, parts)` over chunks of tokens; the last is padded with zeros."""
        tokens = xs_N[0].shape[0]
        chunks = max(1, -(-tokens * vocabulary // self.chunk_elements))
        length = -(-tokens // chunks)
        chunks = -(-tokens // length)
        if chunks == 1:
            return chunk(carry, xs_N)
        pad = chunks * length - tokens

        def cut(x_N: jax.Array) -> jax.Array:
            padded = jnp.pad(x_N, ((0, pad), *((0, 0),) * (x_N.ndim - 1)))
            return padded.reshape(chunks, length, *x_N.shape[1:])

        carry, outs = jax.lax.scan(chunk, carry, tuple(map(cut, xs_N)))
        return carry, tuple(x.reshape(chunks * length, *x.shape[2:])[:tokens] for x in outs)

    def _logits(self, h_CxD: jax.Array, w_DxV: jax.Array) -> jax.Array:
        return jnp.matmul(h_CxD, w_DxV, preferred_element_type=jnp.float32)

    def _local(self, ids_CxM: jax.Array, vocabulary: int) -> tuple[jax.Array, jax.Array]:
        """Ids within this device's part of the vocabulary, and which of them lie there."""
        if self.mesh is None:
            return ids_CxM, jnp.ones(ids_CxM.shape, bool)
        local_CxM = ids_CxM.astype(jnp.int32) - jax.lax.axis_index(_TENSOR) * vocabulary
        return jnp.clip(local_CxM, 0, vocabulary - 1), (local_CxM >= 0) & (local_CxM < vocabulary)

    def _loss(self, z_CxV: jax.Array, ids_CxM: jax.Array, t_CxM: jax.Array) -> tuple[jax.Array, ...]:
        """loss_C and lse_C over the whole vocabulary; most_C and exp(z − most) of this device's part."""
        local_CxM, owned_CxM = self._local(ids_CxM, z_CxV.shape[1])
        z_CxM = jnp.take_along_axis(z_CxV, local_CxM, axis=-1)
        named_C = jnp.where(owned_CxM, t_CxM * z_CxM, 0).sum(-1)
        most_C = z_CxV.max(-1)
        exp_CxV = jnp.exp(z_CxV - most_C[:, None])
        lse_C = most_C + jnp.log(exp_CxV.sum(-1))
        if self.mesh is not None and self.mesh.shape[_TENSOR] > 1:
            lse_KxC, named_KxC = jax.lax.all_gather((lse_C, named_C), _TENSOR)
            lse_C, named_C = jax.nn.logsumexp(lse_KxC, axis=0), named_KxC.sum(0)
        return lse_C * t_CxM.sum(-1) - named_C, lse_C, most_C, exp_CxV

    def _spread(
        self, z_CxV: jax.Array, lse_C: jax.Array, most_C: jax.Array, exp_CxV: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """entropy_C and most_C over the whole vocabulary, of what `_loss` gives."""
        # Σ p (z − most) keeps its digits where the logits are large.
        off_CxV = exp_CxV * (z_CxV - most_C[:, None])
        mean_C = jnp.exp(most_C - lse_C) * (off_CxV.sum(-1) + exp_CxV.sum(-1) * (most_C - lse_C))
        most_C = most_C - lse_C
        if self.mesh is not None and self.mesh.shape[_TENSOR] > 1:
            mean_C, most_C = jax.lax.psum(mean_C, _TENSOR), jax.lax.pmax(most_C, _TENSOR)
        return -mean_C, most_C
