import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlp_memory.training.sparse_head import label_log_prob, named_logits, sparse_cross_entropy

# chunk_elements: the default (no chunking), chunks that do not divide N, one token at a time.
CHUNKS = [1 << 24, 5, 1]


def shapes(rng):
    return (
        int(x) for x in (rng.integers(2, 30), rng.integers(2, 9), rng.integers(3, 40), rng.integers(1, 7))
    )


def dense_targets(ids_NxM, weights_NxM, vocab):
    """The sparse target as [N, V] numbers; repeated ids add up."""
    dense_NxV = np.zeros((len(ids_NxM), vocab))
    for n, (ids, weights) in enumerate(zip(ids_NxM, weights_NxM)):
        for token, weight in zip(ids, weights):
            dense_NxV[n, token] += weight
    return dense_NxV


@pytest.mark.parametrize("chunk", CHUNKS)
def test_named_logits_are_those_of_the_dense_product(rng, chunk):
    n, d, v, m = shapes(rng)
    hidden, kernel = rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(d, v)).astype(np.float32)
    ids = rng.integers(0, v, (n, m))
    z_NxM, lse_N = named_logits(hidden, kernel, ids, chunk if chunk > 5 else chunk * v + int(rng.integers(v)))
    dense_NxV = hidden.astype(np.float64) @ kernel
    assert z_NxM.shape == (n, m)
    assert z_NxM.dtype == lse_N.dtype == jnp.float32
    np.testing.assert_allclose(z_NxM, np.take_along_axis(dense_NxV, ids, 1), atol=1e-4)
    np.testing.assert_allclose(lse_N, np.log(np.exp(dense_NxV).sum(-1)), atol=1e-4)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_sparse_loss_and_gradients_are_those_of_the_dense_loss(rng, chunk):
    n, d, v, m = shapes(rng)
    hidden, kernel = rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(d, v)).astype(np.float32)
    ids = rng.integers(0, v, (n, m))
    ids[:, -1] = ids[:, 0]  # repeated
    weights = rng.random((n, m)).astype(np.float32)
    weights[rng.random((n, m)) < 0.3] = 0
    weights[0] = 0  # an empty target
    dense_NxV = jnp.asarray(dense_targets(ids, weights, v), jnp.float32)

    def sparse(hidden, kernel):
        chunk_elements = chunk if chunk > 5 else chunk * v
        return sparse_cross_entropy(*named_logits(hidden, kernel, ids, chunk_elements), weights)

    def dense(hidden, kernel):
        return -(dense_NxV * jax.nn.log_softmax(hidden @ kernel)).sum(-1)

    np.testing.assert_allclose(sparse(hidden, kernel), dense(hidden, kernel), atol=1e-4)
    pull = rng.normal(size=n).astype(np.float32)
    found, expected = (
        jax.jit(jax.grad(lambda h, k, f=f: (f(h, k) * pull).sum(), argnums=(0, 1)))(hidden, kernel)
        for f in (sparse, dense)
    )
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, atol=2e-4)
    assert (np.asarray(found[0])[0] == 0).all()


def test_label_log_probs_are_of_a_distribution(rng):
    n, d, v, _ = shapes(rng)
    hidden, kernel = rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(d, v)).astype(np.float32)
    log_probs = np.stack([label_log_prob(hidden, kernel, np.full(n, token)) for token in range(v)])
    np.testing.assert_allclose(np.exp(log_probs).sum(0), 1, atol=1e-5)


def test_huge_logits_stay_finite(rng):
    hidden, kernel = np.full((3, 2), 1e4, np.float32), rng.normal(size=(2, 9)).astype(np.float32)
    assert np.isfinite(label_log_prob(hidden, kernel, np.array([0, 4, 8]))).all()


def test_no_array_of_tokens_by_vocabulary_is_made_when_chunked():
    n, d, v = 64, 4, 1000

    def loss(hidden, kernel, ids):
        z, lse = named_logits(hidden, kernel, ids, chunk_elements=8 * v)
        return sparse_cross_entropy(z, lse, jnp.ones_like(z)).sum()

    shapes = (
        jax.ShapeDtypeStruct((n, d), jnp.float32),
        jax.ShapeDtypeStruct((d, v), jnp.float32),
        jax.ShapeDtypeStruct((n, 2), jnp.int32),
    )
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < n * v * 4
