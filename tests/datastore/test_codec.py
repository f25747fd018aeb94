import dataclasses

import numpy as np
import pytest

from mlp_memory.artifacts import Directory, Manifest, UserError, config_dict, digest
from mlp_memory.datastore.codec import CODEC_NAME, Codec, fit, open_codec
from mlp_memory.datastore.config import EmbedConfig


def states(rng, rows=3000, dim=12) -> np.ndarray:
    """Correlated dimensions of very different sizes, far from the origin."""
    mixing = rng.normal(size=(dim, dim)) * np.geomspace(8, 0.1, dim)[:, None]
    return (rng.normal(size=(rows, dim)) @ mixing + rng.normal(size=dim) * 20).astype(np.float32)


def test_plain_codecs_round_and_do_nothing_else(rng):
    h = states(rng)
    for dtype in ("float32", "float16"):
        codec = Codec(dtype)
        np.testing.assert_array_equal(codec.encode(h), h.astype(dtype))
        np.testing.assert_array_equal(codec.decode(codec.encode(h)), h.astype(dtype).astype(np.float32))
        np.testing.assert_array_equal(codec.project(h), h)


def test_the_projection_is_that_of_a_singular_value_decomposition(rng):
    h = states(rng)
    codec = fit(EmbedConfig(key_dim=5), h)
    centred = h.astype(np.float64) - h.mean(axis=0, dtype=np.float64)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    agreement = np.abs((codec.components_DxE * directions[:5].T).sum(axis=0))
    np.testing.assert_allclose(agreement, 1, atol=1e-5)
    np.testing.assert_allclose(codec.explained, (sizes[:5] ** 2).sum() / (sizes**2).sum(), atol=1e-9)
    largest = np.abs(codec.components_DxE).argmax(axis=0)
    assert (codec.components_DxE[largest, np.arange(5)] > 0).all()
    np.testing.assert_allclose(codec.project(h), centred @ codec.components_DxE, atol=1e-4)


def test_all_components_keep_every_distance(rng):
    h = states(rng)
    codec = fit(EmbedConfig(key_dim=12), h)
    a, b = rng.permutation(3000)[:2000].reshape(2, -1)
    before = ((h[a] - h[b]).astype(np.float64) ** 2).sum(axis=1)
    z = codec.project(h).astype(np.float64)
    np.testing.assert_allclose(((z[a] - z[b]) ** 2).sum(axis=1), before, rtol=1e-3)
    assert codec.explained == pytest.approx(1)


@pytest.mark.parametrize("key_dim", [0, 7])
def test_int8_codes_are_off_by_half_a_scale_at_most_unless_clipped(rng, key_dim):
    h = states(rng)
    codec = fit(EmbedConfig(key_dim=key_dim, key_dtype="int8"), h)
    wanted, stored = codec.project(h), codec.encode(h)
    assert stored.dtype == np.int8
    assert stored.shape == (3000, key_dim or 12)
    assert stored.min() >= -127
    clipped = np.abs(wanted) > 127.5 * codec.scale_E
    np.testing.assert_allclose(codec.clipped, clipped.mean())
    error = np.abs(codec.decode(stored) - wanted)
    assert (error <= 0.5001 * codec.scale_E + 1e-6)[~clipped].all()
    assert (np.abs(stored)[clipped] == 127).all()


def test_the_clip_is_the_one_of_least_squared_error(rng):
    h = rng.normal(size=(4000, 3)).astype(np.float32)
    h[:, 1] *= 100
    h[5, 2] = 10_000  # one value that is worth clipping
    codec = fit(EmbedConfig(key_dtype="int8"), h)
    z = codec.project(h).astype(np.float64)

    def error(scale_E: np.ndarray) -> np.ndarray:
        return ((np.clip(np.rint(z / scale_E), -127, 127) * scale_E - z) ** 2).sum(axis=0)

    for factor in 2.0 ** (np.arange(-6, 7) / 6):
        tried = codec.scale_E.astype(np.float64) * factor
        allowed = tried * 127 <= np.abs(z).max(axis=0) * 1.0001
        assert (error(codec.scale_E.astype(np.float64)) <= error(tried) * 1.0001)[allowed].all()


def test_a_dimension_that_never_changes_is_harmless(rng):
    h = states(rng)
    h[:, 4] = 3.5
    for config in (EmbedConfig(key_dtype="int8"), EmbedConfig(key_dtype="int8", key_dim=12)):
        codec = fit(config, h)
        assert np.isfinite(codec.decode(codec.encode(h))).all()
    np.testing.assert_array_equal(fit(EmbedConfig(key_dtype="int8"), h).encode(h)[:, 4], 0)


def test_a_row_is_projected_the_same_alone_and_among_others(rng):
    h = states(rng, 500)
    codec = fit(EmbedConfig(key_dim=6), h)
    whole = codec.project(h)
    start = int(rng.integers(0, 480))
    np.testing.assert_allclose(codec.project(h[start : start + 7]), whole[start : start + 7], rtol=3e-7)


def test_fitting_repeats_and_the_file_holds_all_of_it(rng, tmp_path):
    h, config = states(rng), EmbedConfig(key_dim=6, key_dtype="int8")
    codec, data = fit(config, h), fit(config, h).to_bytes()
    assert codec.to_bytes() == data
    directory = Directory(tmp_path)
    directory.write(CODEC_NAME, data)
    manifest = Manifest("datastore", {"embed": config_dict(config)}, {}, facts={"codec": digest(data)})
    found = open_codec(directory, manifest)
    for field in dataclasses.fields(Codec):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(codec, field.name))
    directory.write(CODEC_NAME, data[:-20])
    with pytest.raises(UserError, match=r"codec.npz is damaged: delete .* and run embed again"):
        open_codec(directory, manifest)
    with pytest.raises(UserError, match="is damaged"):
        Codec.from_bytes("int8", data[:-20], "codec.npz")
    (tmp_path / CODEC_NAME).unlink()
    with pytest.raises(UserError, match=r"codec.npz is gone"):
        open_codec(directory, manifest)


@pytest.mark.parametrize(("rows", "message"), [(50, "12 dimensions"), (9, "9 rows")])
def test_more_dimensions_than_there_are_is_refused(rng, rows, message):
    with pytest.raises(UserError, match=f"embed.key_dim = {13 if rows == 50 else 10} .*{message}"):
        fit(EmbedConfig(key_dim=13 if rows == 50 else 10), states(rng, rows))
