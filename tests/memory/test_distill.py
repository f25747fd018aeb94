import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlp_memory.arrays import ArrayReader
from mlp_memory.artifacts import Directory, UserError, begin
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.datastore.embed import row_reader
from mlp_memory.decoder.config import DecoderConfig, Tap
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.memory.config import DistillConfig, MemoryConfig
from mlp_memory.memory.distill import (
    TargetSource,
    ValidationRows,
    batch_shapes,
    distill,
    distillation_loss,
    load_memory,
)
from mlp_memory.memory.mlp import Memory
from mlp_memory.memory.states import RecomputedStates, StoredStates
from mlp_memory.training.batches import Batches

N, D, V, M = 90, 6, 37, 4
CONFIG = MemoryConfig(style="llama", layers=1, dim=8, ffn_dim=16, input_dim=D, vocab_size=V)


def targets(rng, shape):
    """Sparse distributions [..., M], some of them empty, ids repeating now and then."""
    ids = rng.integers(0, V, (*shape, M))
    probs = rng.random((*shape, M)).astype(np.float32)
    probs[rng.random((*shape, M)) < 0.3] = 0
    total = probs.sum(-1, keepdims=True)
    probs = np.divide(probs, total, out=np.zeros_like(probs), where=total > 0)
    probs[rng.random(shape) < 0.2] = 0
    return ids.astype(np.int32), probs


@pytest.fixture
def batch(rng):
    shape = (3, 5)
    ids, probs = targets(rng, shape)
    return {
        "h": rng.normal(size=(*shape, D)).astype(np.float32),
        "token_ids": ids,
        "probs": probs,
        "labels": rng.integers(0, V, shape).astype(np.int32),
        "weight": (rng.random(shape) < 0.7).astype(np.float32),
    }


def dense(batch):
    """p_kNN and onehot(y) as [N, V], flattened rows."""
    n = batch["labels"].size
    teacher, label = np.zeros((n, V)), np.zeros((n, V))
    for i in range(n):
        for token, p in zip(batch["token_ids"].reshape(n, M)[i], batch["probs"].reshape(n, M)[i]):
            teacher[i, token] += p
        label[i, batch["labels"].reshape(n)[i]] = 1
    return teacher, label


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_loss_and_gradient_are_those_of_dense_kl_and_cross_entropy(batch, rng, randomize, alpha):
    memory = randomize(lambda: Memory(CONFIG, nnx.Rngs(0)))
    graphdef, state = nnx.split(memory)
    teacher_NxV, label_NxV = dense(batch)
    weight_N, empty_N = batch["weight"].reshape(-1), teacher_NxV.sum(-1) == 0
    entropy_N = -(teacher_NxV * np.log(np.where(teacher_NxV > 0, teacher_NxV, 1))).sum(-1)

    def sparse(state):
        key = jax.random.key(0)
        return distillation_loss(nnx.merge(graphdef, state), batch, alpha, key, jnp.float32, "none")

    def reference(state):
        model = nnx.merge(graphdef, state)
        log_p_NxV = jax.nn.log_softmax(model(batch["h"].reshape(-1, D)) @ model.head_kernel())
        cross_N = -(label_NxV * log_p_NxV).sum(-1)
        kl_N = -(teacher_NxV * log_p_NxV).sum(-1) - entropy_N
        # Rows without a teacher learn from the next token alone.
        share_N = np.where(empty_N, 0, alpha)
        return ((share_N * (kl_N + entropy_N) + (1 - share_N) * cross_N) * weight_N).sum()

    (a, grads_a), (b, grads_b) = (jax.jit(jax.value_and_grad(f))(state) for f in (sparse, reference))
    np.testing.assert_allclose(a, b, rtol=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-3, rtol=1e-3), grads_a, grads_b)


def test_rows_without_weight_have_neither_loss_nor_gradient(batch):
    memory = Memory(CONFIG, nnx.Rngs(0))

    def loss(h, weight):
        found = {**batch, "h": h, "weight": weight}
        return distillation_loss(memory, found, 0.4, jax.random.key(0), jnp.float32, "none")

    value, grads = jax.jit(jax.value_and_grad(loss))(batch["h"], batch["weight"])
    weightless = batch["weight"] == 0
    assert (np.asarray(grads)[weightless] == 0).all()
    assert (np.abs(np.asarray(grads)[~weightless]).max(-1) > 0).all()
    assert value > 0
    assert float(jax.jit(loss)(batch["h"], 0 * batch["weight"])) == 0


@pytest.fixture
def data(make_stream, write_arrays, tmp_path, rng):
    stream = make_stream(N, V)
    ids, probs = targets(rng, (N,))
    probs[~stream.has_next(0, N)] = 0
    keys = rng.normal(size=(N, D)).astype(np.float32)
    keys_directory = write_arrays(tmp_path / "datastore", keys=keys)
    target_directory = write_arrays(
        tmp_path / "targets", token_ids=ids.astype(np.uint16), probs=probs.astype(np.float16)
    )
    validation = ValidationRows(
        rng.normal(size=(20, D)).astype(np.float32),
        np.log(rng.random(20)).astype(np.float32),
        rng.integers(0, V, 20).astype(np.int32),
    )
    return (
        stream,
        StoredStates(ArrayReader(keys_directory, "keys")),
        target_directory,
        validation,
        keys,
        ids,
        probs,
    )


def test_training_elements_hold_every_row_once_and_aligned(data, rng):
    stream, reader, target_directory, _, keys, ids, probs = data
    block = int(rng.integers(1, 20))
    source = TargetSource(stream, reader, target_directory, block)
    parts = [source[i] for i in range(len(source))]
    joined = {name: np.concatenate([np.atleast_1d(p[name]) for p in parts]) for name in parts[0]}
    np.testing.assert_array_equal(joined["h"][:N], keys)
    np.testing.assert_array_equal(joined["token_ids"][:N], ids)
    np.testing.assert_array_equal(joined["probs"][:N], probs.astype(np.float16))
    np.testing.assert_array_equal(joined["labels"][:N], stream.labels(0, N))
    np.testing.assert_array_equal(joined["weight"][:N], stream.has_next(0, N))
    assert (joined["weight"][N:] == 0).all()
    assert len(joined["weight"]) == block * len(source) < N + block
    assert joined["rows"].tolist() == list(range(0, N, block))


def test_the_shapes_that_are_planned_with_are_those_of_training_batches(data):
    stream, reader, target_directory, _, _, ids, _ = data
    config = DistillConfig(batch_size=6, block_rows=5)
    source = TargetSource(stream, reader, target_directory, config.block_rows)
    found = next(Batches(source, config.batch_size, seed=0).from_step(0))
    planned = batch_shapes(config, reader, ids.shape[1], V)
    assert {name: (x.shape, x.dtype) for name, x in planned.items()} == {
        name: (x.shape, x.dtype) for name, x in found.items() if name != "rows"
    }


def run_distill(folder, data, mesh, config=CONFIG, **settings):
    stream, reader, target_directory, validation, *_ = data
    directory = Directory(folder)
    manifest = begin(directory, "memory", {}, {})
    settings = DistillConfig(
        **{
            **dict(steps=12, batch_size=4, block_rows=8, eval_every=6, learning_rate=0.02, warmup=2),
            **settings,
        }
    )
    return distill(directory, manifest, config, settings, stream, reader, target_directory, validation, mesh)


def test_distillation_learns_and_can_be_loaded(data, mesh, tmp_path):
    manifest = run_distill(tmp_path / "memory", data, mesh, steps=40, log_every=1)
    lines = [json.loads(x) for x in (tmp_path / "memory/metrics.jsonl").read_text().splitlines()]
    losses = [x["loss"] for x in lines if "loss" in x]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
    facts = manifest.facts
    assert facts["train_rows"] == 40 * 4 * 8
    assert facts["train_flops"] == CONFIG.train_flops(40 * 4 * 8)
    memory, _ = load_memory(Directory(tmp_path / "memory"), mesh)
    assert memory.config == CONFIG
    assert sum(x.size for x in jax.tree.leaves(nnx.state(memory))) == facts["parameters"]
    validation = data[3]
    log_p = np.asarray(jax.nn.log_softmax(memory(validation.taps_NxD) @ memory.head_kernel()))
    memory_N = log_p[np.arange(20), validation.labels_N]
    base_N, lam = validation.base_log_prob_N, facts["validation"]["validation_lambda"]
    mixed = -np.log(lam * np.exp(memory_N) + (1 - lam) * np.exp(base_N)).mean()
    np.testing.assert_allclose(facts["validation"]["validation_loss"], mixed, atol=1e-5)
    assert facts["validation"]["validation_loss"] <= -base_N.mean() + 1e-6


def test_arrays_of_different_lengths_are_refused(data, mesh, tmp_path, make_stream):
    with pytest.raises(UserError, match=f"{N - 1}, {N} and {N} rows"):
        run_distill(tmp_path / "memory", (make_stream(N - 1, V), *data[1:]), mesh)


def test_a_vocabulary_that_does_not_hold_the_targets_is_refused(data, mesh, tmp_path):
    small = MemoryConfig(style="llama", layers=1, dim=8, ffn_dim=16, input_dim=D, vocab_size=V - 10)
    with pytest.raises(UserError, match="vocabulary"):
        run_distill(tmp_path / "memory", data, mesh, small)


def test_keys_of_another_width_are_refused(data, mesh, tmp_path):
    wide = MemoryConfig(style="llama", layers=1, dim=8, ffn_dim=16, input_dim=D + 1, vocab_size=V)
    with pytest.raises(UserError):
        run_distill(tmp_path / "memory", data, mesh, wide)


@pytest.mark.parametrize(
    "impossible", [{"alpha": 1.1}, {"alpha": -0.1}, {"block_rows": 0}, {"block_rows": 1.5}]
)
def test_impossible_settings_are_refused(impossible):
    with pytest.raises(UserError):
        DistillConfig(**impossible)


@pytest.fixture
def decoder(randomize):
    shape = DecoderConfig(layers=2, dim=D, heads=1, ffn_dim=12, vocab_size=V)
    return randomize(lambda: Decoder(shape, nnx.Rngs(0)))


# A block that is the stride, and one that is a part of it; and a tap inside the decoder.
@pytest.mark.parametrize(("block", "tap"), [(8, Tap()), (4, Tap(0, "residual"))])
def test_states_computed_in_the_step_give_the_losses_of_stored_ones(
    data, decoder, mesh, tmp_path, write_arrays, block, tap
):
    stream, embed = data[0], EmbedConfig(24, 8, tap.layer, tap.kind)
    states = row_reader(embed, decoder, mesh).taps(stream, 0, N)
    stored = StoredStates(ArrayReader(write_arrays(tmp_path / "states", keys=states), "keys"))
    online = RecomputedStates(decoder, stream, embed, block)
    assert online.shape == stored.shape
    curves = []
    for name, found in (("stored", stored), ("online", online)):
        settings = dict(block_rows=block, log_every=1, accumulate=2)
        run_distill(tmp_path / name, (stream, found, *data[2:]), mesh, **settings)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        curves.append([line["loss"] for line in map(json.loads, lines) if "loss" in line])
    assert len(curves[0]) == 12
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)


@pytest.mark.parametrize("block", [5, 16])
def test_blocks_that_lie_in_no_one_window_are_refused(data, decoder, block):
    with pytest.raises(UserError, match=f"block_rows = {block} does not divide"):
        RecomputedStates(decoder, data[0], EmbedConfig(24, 8), block)
