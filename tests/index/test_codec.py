import ml_dtypes
import numpy as np
import pytest

from mlp_memory.index import scann_shard
from mlp_memory.index.codec import NORM_CODES, Codebook, Space, half_sqnorm, nearest_leaves


def random_keys(rng, rows, dimension):
    centres = rng.normal(size=(80, dimension)) * 2
    return (centres[rng.integers(0, 80, rows)] + rng.normal(size=(rows, dimension)) + 5).astype(np.float32)


def test_a_dot_product_in_the_lifted_space_is_the_squared_distance():
    rng = np.random.default_rng()
    keys = (rng.normal(size=(400, 30)) * rng.uniform(0.1, 3, (400, 1)) + 20).astype(np.float32)
    space = Space.of(keys)
    queries = np.concatenate([keys[:50], rng.normal(20, 1, (50, 30)).astype(np.float32)])
    lifted = space.queries(queries)
    sqdist = space.sqdist(lifted, lifted @ space.keys(keys).T)
    want = ((queries[:, None].astype(np.float64) - keys[None]) ** 2).sum(2)
    norms = (queries**2).sum(1)[:, None] + (keys**2).sum(1)
    assert (np.abs(sqdist - want) <= 1e-6 * norms).all()
    assert (sqdist >= 0).all()


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 2.0**-8), ("int8", 0.5 / 127)])
def test_rounded_keys_are_at_their_own_distance(dtype, error):
    rng = np.random.default_rng()
    keys = (rng.normal(size=(400, 30)) * rng.uniform(0.1, 3, (400, 1)) + 20).astype(np.float32)
    space = Space.of(keys, dtype)
    queries = np.concatenate([keys[:50], rng.normal(20, 1, (50, 30)).astype(np.float32)])
    lifted = space.keys(keys)
    stored = space.stored(lifted)
    assert stored.dtype.itemsize == {"bfloat16": 2, "int8": 1}[dtype]
    kept = stored * space.steps_E if dtype == "int8" else stored.view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_allclose(kept[:, :30], lifted[:, :30], rtol=1e-6, atol=1e-6)  # coded as kept
    rounded = kept[:, :30].astype(np.float64) + space.mean_D
    largest = np.abs(keys - space.mean_D).max(axis=0)
    assert (np.abs(rounded - keys) <= error * largest + 1e-5).all()
    asked = space.queries(queries)
    want = ((queries[:, None].astype(np.float64) - rounded[None]) ** 2).sum(2)
    norms = ((queries - space.mean_D) ** 2).sum(1)[:, None] + ((rounded - space.mean_D) ** 2).sum(1)
    # A second column has what the first one leaves of |x|²: 14 bits with int8, 16 with bfloat16.
    assert (np.abs(space.sqdist(asked, asked @ kept.T) - want) <= norms.max() * 2.0**-13).all()


def decoded(trained, leaves, codes):
    """[N, E] of the codes: the lifted centre and every block's word, put side by side."""
    book = trained.codebook
    blocks = len(book.codewords_Bx16xP)
    words = [book.codewords_Bx16xP[b][codes[:, b]] for b in range(blocks)]
    x = np.concatenate(words, axis=1)[:, : book.centres_LxD.shape[1]] + book.centres_LxD[leaves]
    norm = [book.norm_words_8x16[c][codes[:, blocks + c]] for c in range(NORM_CODES)]
    norm[0] = norm[0] - half_sqnorm(book.centres_LxD)[leaves]
    return np.concatenate([x, np.stack(norm, axis=1)], axis=1)


@pytest.mark.parametrize(("dimension", "width"), [(24, 1), (24, 2), (30, 4), (25, 3)])
def test_scann_scores_the_codes_as_they_are_meant(dimension, width, tmp_path, monkeypatch):
    rng = np.random.default_rng()
    keys = random_keys(rng, 6000, dimension)
    trained = scann_shard.train_codes(scann_shard.train_tree(keys, 40), keys, width)
    lifted = trained.space.keys(keys)
    leaves, codes = trained.codebook.encode(lifted)
    # Without reordering ScaNN returns the scores of its codes.
    config = scann_shard._scann("proto.scann_pb2").ScannConfig.FromString(trained.files["scann_config.pb"])
    config.ClearField("exact_reordering")
    trained.files["scann_config.pb"] = config.SerializeToString()
    scann_shard.write_shard(tmp_path, trained, [keys[:1000], keys[1000:]], *keys.shape)
    queries = trained.space.queries(keys[:64])
    searcher = scann_shard.load(tmp_path / "scann")
    positions, scores = searcher.search_batched_parallel(queries, 300, None, 40, batch_size=256)
    all_scores = queries @ decoded(trained, leaves, codes).T
    meant = np.take_along_axis(all_scores, positions.astype(int), axis=1)
    # ScaNN rounds every block's products to 8 bits of the largest; differences of scores remain.
    error = (scores - meant) - (scores - meant).mean(1, keepdims=True)
    assert error.std() < 0.03 * (queries @ lifted.T).std()
    best = np.argsort(-all_scores, axis=1)[:, :300]
    assert np.mean([np.isin(a, b).mean() for a, b in zip(best, positions)]) > 0.95


def test_codes_come_close_to_the_keys_and_the_norm_closest():
    rng = np.random.default_rng()
    keys = random_keys(rng, 6000, 24)
    tree = scann_shard.train_tree(keys, 40)
    lifted = tree_keys = tree.space.keys(keys)
    residual = lifted[:, :24] - tree.centres_LxD[nearest_leaves(tree_keys, tree.centres_LxD)]
    errors = []
    for width in (1, 2, 4):
        trained = scann_shard.train_codes(tree, keys, width)
        near = decoded(trained, *trained.codebook.encode(lifted))
        errors.append(np.square(near[:, :24] - lifted[:, :24]).mean() / np.square(residual).mean())
        assert np.std(near[:, 24:].sum(1) - lifted[:, 24]) < 0.02 * np.std(lifted[:, 24])
    assert errors[0] < 0.03 < errors[1] < 0.25 < errors[2] < 0.6


def test_codes_are_the_nearest_of_all_whatever_the_block_they_are_in():
    rng = np.random.default_rng()
    centres, words = rng.normal(size=(9, 7)).astype(np.float32), rng.normal(size=(4, 16, 2))
    words[3, :, 1] = 0
    norm_words = rng.normal(size=(NORM_CODES, 16)).astype(np.float32)
    codebook = Codebook(centres, words.astype(np.float32), norm_words)
    lifted = Space(np.zeros(7, np.float32)).keys(rng.normal(size=(301, 7)).astype(np.float32))
    leaves, codes = codebook.encode(lifted)
    x = lifted[:, :7]
    want = ((x[:, None] - centres) ** 2).sum(2).argmin(1)
    np.testing.assert_array_equal(leaves, want)
    residual = np.pad(x - centres[want], ((0, 0), (0, 1))).reshape(301, 4, 2)
    np.testing.assert_array_equal(codes[:, :4], ((residual[:, :, None] - words) ** 2).sum(3).argmin(2))
    for row in range(301):
        left = lifted[row, 7] + (centres[want[row]] ** 2).sum() / 2
        for code in range(NORM_CODES):
            share = left / (NORM_CODES - 1 - code) if code < NORM_CODES - 1 else left
            picked = norm_words[code][codes[row, 4 + code]]
            assert abs(share - picked) <= np.abs(share - norm_words[code]).min() + 1e-5
            left -= picked
    alone = [codebook.encode(lifted[i : i + 1])[1][0] for i in range(20)]
    np.testing.assert_array_equal(np.stack(alone), codes[:20])
