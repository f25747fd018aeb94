import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlp_memory.arrays import ArrayReader
from mlp_memory.artifacts import Directory, UserError, as_dtype, begin, config_dict
from mlp_memory.datastore import embed as embedding
from mlp_memory.datastore.codec import CODEC_NAME
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.datastore.embed import Inputs, embed, key_specs, row_reader
from mlp_memory.datastore.store import RecomputedRows, open_keys, open_states

CONFIG = EmbedConfig(context=10, stride=4, chunk_rows=16, batch_windows=3)
KINDS = [
    {},
    {"key_dtype": "bfloat16"},
    {"key_dtype": "int8"},
    {"key_dim": 5},
    {"key_dtype": "int8", "key_dim": 5},
    {"key_dtype": "float16", "key_dim": 16, "projection_rows": 30},
]


def made(folder, config, decoder, stream, mesh):
    """Keys, states and manifest of a fresh datastore."""
    directory = Directory(folder)
    shape = (len(stream), decoder.config.dim)
    arrays = key_specs(config, *shape)
    manifest = embed(
        directory,
        begin(directory, "datastore", {"embed": config_dict(config)}, {}, arrays),
        config,
        shape,
        lambda: Inputs(decoder, stream, mesh),
    )
    reader = functools.cache(lambda: row_reader(config, decoder, mesh))
    given = (directory, manifest, config, stream, reader)
    return open_keys(*given), open_states(*given), manifest


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_keys_that_are_not_kept_are_those_that_would_be(
    decoders, make_decoder, make_stream, mesh, tmp_path, rng, kind
):
    decoder, stream = make_decoder(decoders["llama"]), make_stream(61)
    config = dataclasses.replace(CONFIG, **kind)
    kept, kept_states, manifest = made(tmp_path / "kept", config, decoder, stream, mesh)
    none, states, bare = made(
        tmp_path / "none", dataclasses.replace(config, store="none"), decoder, stream, mesh
    )
    dim = kind.get("key_dim") or decoder.config.dim
    assert kept.shape == none.shape == (len(kept), len(none[0:1][0])) == (61, dim)
    assert kept[0:61].dtype == none[0:61].dtype == np.float32
    for start, stop in [(0, 61), (60, 61), (15, 17), *np.sort(rng.integers(0, 62, (6, 2)), axis=1).tolist()]:
        np.testing.assert_array_equal(kept[start:stop], none[start:stop])
        assert none[start:stop].shape == (stop - start, dim)
    wide = row_reader(config, decoder, mesh).taps(stream, 0, 61)
    np.testing.assert_allclose(states[0:61], wide, atol=1e-5)
    np.testing.assert_allclose(
        np.asarray(kept_states[0:61], np.float32), wide, atol=1e-5, rtol=0.01 if kind.get("key_dtype") else 0
    )
    names = {"manifest.json", "checksums.json"} | ({CODEC_NAME} if config.fitted else set())
    assert {p.name for p in (tmp_path / "none").rglob("*")} == names
    size = dim * as_dtype(config.key_dtype).itemsize
    assert manifest.facts["bytes_per_token"] == size
    assert bare.facts["bytes_per_token"] == 0
    assert manifest.facts["dim"] == 16
    assert manifest.facts["key_dim"] == dim
    assert ("explained_variance" in manifest.facts) == bool(kind.get("key_dim"))
    assert ("clip_share" in manifest.facts) == (kind.get("key_dtype") == "int8")


def test_full_float32_keys_are_the_states_as_ever(decoders, make_decoder, make_stream, mesh, tmp_path, rng):
    decoder, stream = make_decoder(decoders["llama"]), make_stream(61)
    keys, states, manifest = made(tmp_path / "keys", CONFIG, decoder, stream, mesh)
    reader = row_reader(CONFIG, decoder, mesh)
    chunks = [reader.taps(stream, a, min(a + 16, 61)) for a in range(0, 61, 16)]
    np.testing.assert_array_equal(
        ArrayReader(Directory(tmp_path / "keys"), "keys")[0:61], np.concatenate(chunks)
    )
    np.testing.assert_array_equal(keys[0:61], states[0:61])
    h = rng.normal(size=(5, 16)).astype(np.float32)
    np.testing.assert_array_equal(keys.queries(h), h)
    # A datastore made before there were other stores is still that of this config.
    assert not {"store", "key_dim", "projection_rows"} & manifest.config["embed"].keys()


def test_a_held_out_state_is_as_near_in_the_searched_space(
    decoders, make_decoder, make_stream, mesh, tmp_path
):
    decoder, stream = make_decoder(decoders["llama"]), make_stream(61)
    config = dataclasses.replace(CONFIG, key_dim=16, key_dtype="int8")
    keys, states, _ = made(tmp_path / "keys", config, decoder, stream, mesh)
    queries = keys.queries(states[0:61])
    assert np.abs(queries - keys[0:61]).max() < 0.05 * np.abs(queries).max()
    before = ((states[0:61][:, None] - states[0:61][None]) ** 2).sum(-1)
    after = ((queries[:, None] - keys[0:61][None]) ** 2).sum(-1)
    np.testing.assert_allclose(after, before, atol=0.05 * before.max())


def test_a_codec_is_fitted_once_and_read_again_on_a_resume(
    decoders, make_decoder, make_stream, mesh, tmp_path, monkeypatch
):
    decoder, stream = make_decoder(decoders["llama"]), make_stream(61)
    config = dataclasses.replace(CONFIG, key_dim=5, key_dtype="int8")
    made(tmp_path / "straight", config, decoder, stream, mesh)
    write, fit, fits, writes = embedding.ChunkWriter.write, embedding.fit, [], []

    def interrupted(self, chunk, **arrays):
        if len(writes) == 2:
            raise KeyboardInterrupt
        write(self, chunk, **arrays)
        writes.append(chunk)

    def counted(*given):
        fits.append(given)
        return fit(*given)

    monkeypatch.setattr(embedding, "fit", counted)
    monkeypatch.setattr(embedding.ChunkWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "stopped", config, decoder, stream, mesh)
    monkeypatch.setattr(embedding.ChunkWriter, "write", write)
    made(tmp_path / "stopped", config, decoder, stream, mesh)
    assert len(fits) == 1
    straight, stopped = (
        {str(p.relative_to(tmp_path / f)): p.read_bytes() for p in (tmp_path / f).rglob("*") if p.is_file()}
        for f in ("straight", "stopped")
    )
    assert straight == stopped


def test_rows_read_in_order_are_computed_once_whatever_the_steps(rng):
    truth, computed = rng.normal(size=(157, 3)), []

    def compute(start, stop):
        computed.append((start, stop))
        return truth[start:stop]

    rows, at = RecomputedRows(compute, truth.shape, chunk_rows=20, cache_bytes=0), 0
    while at < 157:
        step = int(rng.integers(1, 35))
        np.testing.assert_array_equal(rows[at : at + step], truth[at : at + step])
        at += step
    assert computed == [(a, min(a + 20, 157)) for a in range(0, 157, 20)]
    np.testing.assert_array_equal(rows[:], truth)
    assert rows[30:30].shape == (0, 3)
    computed.clear()
    rows = RecomputedRows(compute, truth.shape, chunk_rows=20, cache_bytes=157 * 3 * 4 + 20 * 3 * 4)
    for _ in range(3):
        np.testing.assert_array_equal(rows[:], truth)
    assert len(computed) == 8  # what fits is computed once, however often it is read


@pytest.mark.parametrize(
    "kind", [{"store": "none"}, {"key_dtype": "int8"}, {"key_dtype": "int8", "key_dim": 3}]
)
def test_a_key_that_is_not_finite_is_named_by_every_kind_of_store(
    decoders, make_decoder, make_stream, mesh, tmp_path, kind
):
    decoder, stream = make_decoder(decoders["llama"]), make_stream(40)
    graphdef, state = nnx.split(decoder)
    params = nnx.to_pure_dict(state)
    params["embedding"] = params["embedding"].at[int(stream.tokens[17:18][0])].set(jnp.nan)
    nnx.replace_by_pure_dict(state, params)
    broken, config = nnx.merge(graphdef, state), dataclasses.replace(CONFIG, **kind)

    def read() -> None:
        made(tmp_path / "keys", config, broken, stream, mesh)[0][0:40]

    with pytest.raises(UserError, match=r"keys: row \d+ is not finite"):
        read()


def test_more_dimensions_than_the_decoder_has_are_refused_at_once(
    decoders, make_decoder, make_stream, mesh, tmp_path
):
    with pytest.raises(UserError, match=r"embed.key_dim = 17 is more than the decoder's 16 dimensions"):
        made(
            tmp_path,
            dataclasses.replace(CONFIG, key_dim=17),
            make_decoder(decoders["llama"]),
            make_stream(40),
            mesh,
        )
