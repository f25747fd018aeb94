import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlp_memory.decoder.config import Tap
from mlp_memory.decoder.transformer import Decoder


def influence(
    model: Decoder, tokens_1xT: np.ndarray, segments_1xT: np.ndarray | None, tap: Tap
) -> np.ndarray:
    """Largest |d out[t] / d embedding[t']|, [2, T, T]: of the hidden state and of the tap.

    Every token id of the row is its own, so the gradient of its embedding row is the gradient
    of that position's input. Logits are one linear map of the hidden state at all positions.
    """
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    directions = jax.random.normal(jax.random.key(0), (2, model.config.dim))

    def outputs(table_VxD: jax.Array) -> jax.Array:
        fresh = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(fresh, {**params, "embedding": table_VxD})
        hidden, tapped = nnx.merge(graphdef, fresh)(tokens_1xT, segments_1xT, tap)
        return jnp.stack([hidden[0] @ directions[0], tapped[0] @ directions[1]])

    found_2xTxVxD = jax.jit(jax.jacrev(outputs))(params["embedding"])
    return np.abs(np.asarray(found_2xTxVxD)[:, :, tokens_1xT[0]]).max(-1)


def test_a_position_depends_on_all_of_its_documents_past_and_on_nothing_else(
    decoder_config, make_decoder, rng
):
    model, length = make_decoder(decoder_config), 14
    tokens = rng.permutation(decoder_config.vocab_size)[:length][None].astype(np.int32)
    cuts = np.sort(rng.choice(np.arange(1, length), 2, replace=False))
    segments = np.searchsorted(cuts, np.arange(length), side="right")[None].astype(np.int32)
    tap = Tap(int(rng.integers(-2, 2)), str(rng.choice(["ffn_input", "residual"])))
    found_2xTxT = influence(model, tokens, segments, tap)
    t, other = np.indices((length, length))
    allowed = (other <= t) & (segments[0][t] == segments[0][other])
    for found_TxT in found_2xTxT:
        assert (found_TxT[~allowed] == 0).all(), tap
        assert (found_TxT[allowed] > 0).all(), tap


def test_without_segments_a_row_is_one_document(decoders, make_decoder, rng):
    model, length = make_decoder(decoders["llama"]), 9
    tokens = rng.permutation(model.config.vocab_size)[:length][None].astype(np.int32)
    found_2xTxT = influence(model, tokens, None, Tap())
    assert ((found_2xTxT > 0) == np.tril(np.ones((length, length), bool))).all()


def test_rows_of_a_batch_do_not_see_each_other(decoder_config, make_decoder, rng):
    model = make_decoder(decoder_config)
    tokens = rng.integers(0, decoder_config.vocab_size, (3, 10)).astype(np.int32)
    run = jax.jit(lambda tokens: model(tokens))
    before = run(tokens)
    changed = tokens.copy()
    changed[1] = (changed[1] + 1) % decoder_config.vocab_size
    after = run(changed)
    for a, b in zip(before, after):
        np.testing.assert_array_equal(np.asarray(a)[[0, 2]], np.asarray(b)[[0, 2]])
        assert (np.abs(np.asarray(a - b)[1]).max(-1) > 0).all()


def test_a_document_reads_the_same_wherever_it_stands_in_a_window_with_rotary_positions(
    decoders, make_decoder, rng
):
    model = make_decoder(decoders["llama"])
    document = rng.integers(0, 37, 6)
    before = rng.integers(0, 37, 9)
    run = jax.jit(lambda tokens, segments: model(tokens, segments)[0])
    alone = run(document[None], np.zeros((1, 6), np.int32))[0]
    behind = run(np.concatenate([before, document])[None], np.repeat([0, 1], [9, 6])[None])[0, 9:]
    np.testing.assert_allclose(alone, behind, atol=2e-5)
