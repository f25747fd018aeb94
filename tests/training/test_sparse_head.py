import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlp_memory.training.sparse_head import divergence, label_log_prob, sparse_cross_entropy

# chunk_elements as a function of V: the default (no chunking), chunks of several tokens that do
# not divide N, one token at a time, and less than one token.
CHUNKS = [lambda v: None, lambda v: 5 * v - 1, lambda v: v, lambda v: 1]


@pytest.fixture
def head(rng):
    """Random states, kernel, ids (some repeated) and weights (some 0, one target empty) of random sizes."""
    n, d, v, m = (int(rng.integers(*bounds)) for bounds in ((2, 40), (2, 9), (3, 60), (1, 9)))
    ids, weights = rng.integers(0, v, (n, m)), rng.random((n, m)).astype(np.float32)
    ids[:, -1] = ids[:, 0]
    weights[rng.random((n, m)) < 0.3] = 0
    weights[int(rng.integers(n))] = 0
    hidden, kernel = rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(d, v)).astype(np.float32)
    return hidden, kernel, ids, weights


def dense_targets(ids_NxM, weights_NxM, vocab):
    """The sparse target as [N, V] numbers; repeated ids add up."""
    dense_NxV = np.zeros((len(ids_NxM), vocab))
    for n, (ids, weights) in enumerate(zip(ids_NxM, weights_NxM)):
        for token, weight in zip(ids, weights):
            dense_NxV[n, token] += weight
    return dense_NxV


def dense_loss(hidden, kernel, ids, weights):
    """−Σ t log p in float64, and its gradients, written out."""
    z_NxV = hidden.astype(np.float64) @ kernel.astype(np.float64)
    log_p_NxV = z_NxV - np.log(np.exp(z_NxV).sum(-1, keepdims=True))
    t_NxV = dense_targets(ids, weights, kernel.shape[1])
    dz_NxV = np.exp(log_p_NxV) * t_NxV.sum(-1, keepdims=True) - t_NxV
    return -(t_NxV * log_p_NxV).sum(), (dz_NxV @ kernel.T, hidden.T @ dz_NxV)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("trial", range(5))
def test_sparse_loss_and_gradients_are_those_of_the_dense_loss(head, chunk, trial):
    hidden, kernel, ids, weights = head

    def loss(hidden, kernel):
        return sparse_cross_entropy(hidden, kernel, ids, weights, chunk_elements=chunk(kernel.shape[1]))

    expected, gradients = dense_loss(hidden, kernel, ids, weights)
    np.testing.assert_allclose(jax.jit(loss)(hidden, kernel), expected, rtol=1e-5)
    value, found = jax.jit(jax.value_and_grad(lambda *x: 3 * loss(*x), (0, 1)))(hidden, kernel)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, 3 * expected, rtol=1e-5)
    for a, b in zip(found, gradients):
        np.testing.assert_allclose(a, 3 * b, atol=3e-5)
    assert (np.asarray(found[0])[weights.sum(-1) == 0] == 0).all()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_label_log_probs_and_their_gradients_token_by_token(head, rng, chunk):
    hidden, kernel, ids, _ = head
    pull, labels = rng.normal(size=len(ids)).astype(np.float32), ids[:, 0]

    def log_prob(hidden, kernel):
        return label_log_prob(hidden, kernel, labels, chunk_elements=chunk(kernel.shape[1]))

    for row in range(len(labels)):
        one = slice(row, row + 1)
        loss, _ = dense_loss(hidden[one], kernel, labels[one, None], np.ones((1, 1)))
        np.testing.assert_allclose(jax.jit(log_prob)(hidden, kernel)[row], -loss, rtol=1e-5, atol=1e-5)
    found = jax.jit(jax.grad(lambda *x: (log_prob(*x) * pull).sum(), (0, 1)))(hidden, kernel)
    for a, b in zip(found, dense_loss(hidden, kernel, labels[:, None], -pull[:, None])[1]):
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_divergence_and_its_gradients_are_those_of_whole_softmaxes(head, rng, chunk):
    hidden, kernel, *_ = head
    start, start_kernel = (x + rng.normal(size=x.shape).astype(np.float32) for x in (hidden, kernel))
    weights = rng.random(len(hidden)).astype(np.float32)
    weights[0] = 0

    def log_softmax(hidden, kernel):
        z_NxV = hidden.astype(np.float64) @ kernel.astype(np.float64)
        return z_NxV - np.log(np.exp(z_NxV).sum(-1, keepdims=True))

    log_start, log_p = log_softmax(start, start_kernel), log_softmax(hidden, kernel)
    expected = (weights[:, None] * np.exp(log_start) * (log_start - log_p)).sum()
    dz = weights[:, None] * (np.exp(log_p) - np.exp(log_start))

    def loss(*arrays):
        start, start_kernel, hidden, kernel = arrays
        return 3 * divergence(
            start, start_kernel, hidden, kernel, weights, chunk_elements=chunk(kernel.shape[1])
        )

    found = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
    value, gradients = found(start, start_kernel, hidden, kernel)
    np.testing.assert_allclose(value, 3 * expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients[2:], (dz @ kernel.T, hidden.T @ dz)):
        np.testing.assert_allclose(a, 3 * b, atol=3e-5)
    assert not any(np.asarray(a).any() for a in gradients[:2])  # where it started is data


def test_label_log_probs_are_of_a_distribution(head):
    hidden, kernel, *_ = head
    tokens = range(kernel.shape[1])
    log_probs = np.stack([label_log_prob(hidden, kernel, np.full(len(hidden), v)) for v in tokens])
    np.testing.assert_allclose(np.exp(log_probs).sum(0), 1, atol=1e-5)


def test_bfloat16_states_give_bfloat16_gradients_near_the_exact_ones(head):
    hidden, kernel, ids, weights = head
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    kernel = np.asarray(jnp.asarray(kernel, jnp.bfloat16), np.float32)  # so that only products are rounded
    value, found = jax.value_and_grad(sparse_cross_entropy, (0, 1))(hidden, kernel, ids, weights)
    expected, gradients = dense_loss(np.asarray(hidden, np.float32), kernel, ids, weights)
    assert value.dtype == jnp.float32
    assert [g.dtype for g in found] == [jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for a, b in zip(found, gradients):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=0.02 * np.abs(b).max())


def test_huge_logits_stay_finite(rng):
    hidden, kernel = np.full((3, 2), 1e4, np.float32), rng.normal(size=(2, 9)).astype(np.float32)
    labels = np.array([0, 4, 8])
    assert np.isfinite(label_log_prob(hidden, kernel, labels)).all()
    gradients = jax.grad(sparse_cross_entropy, (0, 1))(hidden, kernel, labels[:, None], np.ones((3, 1)))
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize(
    "loss", [sparse_cross_entropy, lambda h, k, ids, t, *x: label_log_prob(h, k, ids[:, 0], *x).sum()]
)
def test_no_array_of_tokens_by_vocabulary_is_made_when_chunked(loss):
    n, d, v = 64, 4, 1000
    shapes = (
        jax.ShapeDtypeStruct((n, d), jnp.float32),
        jax.ShapeDtypeStruct((d, v), jnp.float32),
        jax.ShapeDtypeStruct((n, 2), jnp.int32),
        jax.ShapeDtypeStruct((n, 2), jnp.float32),
    )
    gradient = jax.grad(lambda *x: loss(*x, None, 8 * v), argnums=(0, 1))
    compiled = jax.jit(gradient).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < n * v * 4
