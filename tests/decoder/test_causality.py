import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlp_memory.decoder.config import Tap
from mlp_memory.decoder.transformer import Decoder

TAPS = [Tap(-1, "ffn_input"), Tap(0, "ffn_input"), Tap(-1, "residual"), Tap(0, "residual")]


def influence(model: Decoder, tokens_1xT, segments_1xT, tap: Tap, key: jax.Array) -> np.ndarray:
    """Largest |d out[t] / d embedding-of-position[t']|, [2, T, T]: of hidden state and of tap.

    Every token id of the row is its own, so the gradient of an embedding row is the gradient
    of that position's input. With a tied head the hidden state is the place to look: logits
    are the same linear map of it at every position.
    """
    table = model.embedding[...]
    directions = jax.random.normal(key, (2, model.config.dim))

    @jax.jit
    def gradients(table):
        def outputs(table):
            model.embedding[...] = table
            hidden, tapped = model(tokens_1xT, segments_1xT, tap)
            return jnp.stack([hidden[0] @ directions[0], tapped[0] @ directions[1]])

        return jax.jacrev(outputs)(table)

    found_2xTxVxD = gradients(table)
    model.embedding[...] = table
    return np.abs(np.asarray(found_2xTxVxD)[:, :, np.asarray(tokens_1xT)[0]]).max(-1)


@pytest.mark.parametrize("tap", TAPS, ids=str)
def test_a_position_depends_on_all_of_its_documents_past_and_on_nothing_else(
    decoder_config, make_decoder, rng, tap
):
    model, length = make_decoder(decoder_config), 14
    tokens = rng.permutation(decoder_config.vocab_size)[:length][None].astype(np.int32)
    cuts = np.sort(rng.choice(np.arange(1, length), 2, replace=False))
    segments = np.searchsorted(cuts, np.arange(length), side="right")[None].astype(np.int32)
    found_2xTxT = influence(model, tokens, segments, tap, jax.random.key(0))
    t, other = np.indices((length, length))
    allowed = (other <= t) & (segments[0][t] == segments[0][other])
    for found_TxT in found_2xTxT:
        assert (found_TxT[~allowed] == 0).all()
        assert (found_TxT[allowed] > 0).all()


def test_without_segments_a_row_is_one_document(decoder_config, make_decoder, rng):
    model, length = make_decoder(decoder_config), 9
    tokens = rng.permutation(decoder_config.vocab_size)[:length][None].astype(np.int32)
    found_2xTxT = influence(model, tokens, None, Tap(), jax.random.key(1))
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
