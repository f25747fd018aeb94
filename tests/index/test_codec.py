import ml_dtypes
import numpy as np
import pytest

from mlp_memory.index import scann_shard
from mlp_memory.index.codec import Codebook, Space


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
    np.testing.assert_allclose(kept, lifted, rtol=1e-6, atol=1e-6)  # what is coded is what is kept
    rounded = kept[:, :30].astype(np.float64) + space.mean_D
    largest = np.abs(keys - space.mean_D).max(axis=0)
    assert (np.abs(rounded - keys) <= error * largest + 1e-5).all()
    asked = space.queries(queries)
    want = ((queries[:, None].astype(np.float64) - rounded[None]) ** 2).sum(2)
    norms = ((queries - space.mean_D) ** 2).sum(1)[:, None] + ((rounded - space.mean_D) ** 2).sum(1)
    # A second column has what the first one leaves of |x|²: 14 bits with int8, 16 with bfloat16.
    assert (np.abs(space.sqdist(asked, asked @ kept.T) - want) <= norms.max() * 2.0**-13).all()


@pytest.mark.parametrize(("dimension", "width"), [(24, 1), (24, 2), (30, 4), (25, 3)])
def test_rows_are_coded_as_scann_codes_them(dimension, width, tmp_path):
    """ScaNN's own build of the sample is the reference; ties to rounding may go either way."""
    rng = np.random.default_rng()
    keys = (rng.normal(size=(80, dimension))[rng.integers(0, 80, 6000)] * 2).astype(np.float32)
    keys += rng.normal(size=keys.shape).astype(np.float32)
    trained = scann_shard.train_codes(scann_shard.train_tree(keys, 40), keys, width)
    lifted = trained.space.keys(keys)
    builder = scann_shard._scann("scann_ops.py.scann_ops_pybind").builder(lifted, 1, "dot_product")
    builder.set_n_training_threads(1)
    builder.tree(40, 40, training_sample_size=6000, training_iterations=12, random_init=False)
    builder.score_ah(width, training_sample_size=6000)
    builder.build().serialize(str(tmp_path), relative_path=True)
    for name in ("serialized_partitioner.pb", "ah_codebook.pb"):
        assert (tmp_path / name).read_bytes() == trained.files[name]
    leaves, codes = trained.codebook.encode(lifted)
    assert (leaves == np.load(tmp_path / "datapoint_to_token.npy")).mean() > 0.999
    assert codes.shape[1] == -(-(dimension + 1) // width)
    assert (codes == np.load(tmp_path / "hashed_dataset.npy")).mean() > 0.999


def test_codes_are_the_nearest_of_all_whatever_the_block_they_are_in():
    rng = np.random.default_rng()
    centres, words = rng.normal(size=(9, 7)), rng.normal(size=(4, 16, 2))
    words[3, :, 1] = 0
    codebook = Codebook(centres.astype(np.float32), words.astype(np.float32))
    lifted = rng.normal(size=(301, 7)).astype(np.float32)
    leaves, codes = codebook.encode(lifted)
    want = ((lifted[:, None] - centres) ** 2).sum(2).argmin(1)
    np.testing.assert_array_equal(leaves, want)
    residual = np.pad(lifted - centres[want], ((0, 0), (0, 1))).reshape(301, 4, 2)
    np.testing.assert_array_equal(codes, ((residual[:, :, None] - words) ** 2).sum(3).argmin(2))
    alone = [codebook.encode(lifted[i : i + 1])[1][0] for i in range(20)]
    np.testing.assert_array_equal(np.stack(alone), codes[:20])
