import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.datastore.embed import row_reader
from mlp_memory.decoder.config import DecoderConfig
from mlp_memory.decoder.windows import WindowPlan
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.states import StoredStates
from mlp_memory.studies.mixer import (
    HeldOutWindows,
    SequenceMemory,
    WindowTargets,
    mixer_parameters,
    mixer_shape,
)
from mlp_memory.studies.sizes import memory_parameters

SHAPE = DecoderConfig(layers=2, dim=16, heads=2, ffn_dim=32, tied=True, vocab_size=37)


@pytest.mark.parametrize("style", ["llama", "gpt2"])
@pytest.mark.parametrize("dim", [192, 128])
def test_it_has_the_parameters_of_the_mlp_memory_it_is_held_against(style, dim):
    decoder = DecoderConfig(layers=4, dim=192, heads=6, vocab_size=2048)
    memory = MemoryConfig(style, 6, dim).resolved(192, 2048)
    shape = mixer_shape(decoder, memory)
    state = nnx.state(nnx.eval_shape(lambda: SequenceMemory(shape, 192, nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == mixer_parameters(decoder, memory)
    assert mixer_parameters(decoder, memory) == pytest.approx(memory_parameters(memory), rel=0.01)
    assert shape.head_dim == decoder.head_dim


def test_a_position_sees_the_past_of_its_own_document_and_nothing_else(randomize, rng):
    model = randomize(lambda: SequenceMemory(SHAPE, 12, nnx.Rngs(0)))
    length, border = 10, int(rng.integers(3, 7))
    segments_1xT = jnp.asarray(np.arange(length) >= border, jnp.int32)[None]
    h_1xTxD = jnp.asarray(rng.normal(size=(1, length, 12)), jnp.float32)
    # How each position's state moves with each position's input.
    moved = jax.jacobian(lambda h: model(h, segments_1xT)[0].sum(-1))(h_1xTxD)[:, 0]
    seen_TxT = np.abs(np.asarray(moved)).max(-1) > 0
    past_TxT = np.tril(np.ones((length, length), bool))
    own_TxT = np.equal.outer(np.asarray(segments_1xT[0]), np.asarray(segments_1xT[0]))
    assert not (seen_TxT & ~(past_TxT & own_TxT)).any()
    # It does mix: some earlier position is seen, and every position sees itself.
    assert seen_TxT[border - 1, : border - 1].any()
    assert np.diagonal(seen_TxT).all()


def test_training_windows_hold_each_row_once_beside_its_document(training_inputs, rng):
    from mlp_memory.artifacts import Directory
    from mlp_memory.corpus.stream import TokenStream

    stream = TokenStream.open(Directory(training_inputs / "train"))
    states_NxD = rng.normal(size=(len(stream), 8)).astype(np.float32)
    source = WindowTargets(stream, StoredStates(states_NxD), Directory(training_inputs / "targets"), 48)
    elements = [source[i] for i in range(len(source))]
    rows = len(stream)
    for name, wanted in (
        ("h", states_NxD),
        ("labels", stream.labels(0, rows)),
        ("segments", stream.document_ids(0, rows)),
        ("weight", stream.has_next(0, rows)),
    ):
        found = np.concatenate([element[name] for element in elements])
        np.testing.assert_array_equal(found[:rows], wanted)
    padding = np.concatenate([element["segments"] for element in elements])[rows:]
    assert (padding == -1).all()


def test_a_rows_score_does_not_depend_on_the_rows_asked_for(
    make_decoder, make_stream, randomize, mesh, decoders, rng
):
    config = EmbedConfig(context=16, stride=8, batch_windows=4)
    decoder = make_decoder(dataclasses.replace(decoders["llama"], dim=16))
    stream = make_stream(150)
    model = randomize(lambda: SequenceMemory(SHAPE, 16, nnx.Rngs(0)))
    reader, plan = row_reader(config, decoder, mesh), WindowPlan(config.context, config.stride)

    def scored(ranges: list[tuple[int, int]]) -> np.ndarray:
        return HeldOutWindows(reader, stream, ranges, plan).log_probs(model, mesh, jnp.float32)

    whole_N = scored([(0, 150)])
    assert whole_N.shape == (150,)
    a, b, c, d = sorted(rng.choice(np.arange(1, 150), 4, replace=False).tolist())
    parts = scored([(a, b), (c, d)])
    np.testing.assert_allclose(parts, np.concatenate([whole_N[a:b], whole_N[c:d]]), atol=2e-4)
    assert np.isfinite(whole_N).all()
    assert (whole_N <= 0).all()
