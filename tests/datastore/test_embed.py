import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlp_memory.arrays import ArrayReader, ChunkWriter
from mlp_memory.artifacts import Directory, UserError, as_dtype, begin, config_dict
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.datastore.embed import Inputs, embed, key_specs, row_reader

CONFIG = EmbedConfig(context=10, stride=4, chunk_rows=16, batch_windows=3)


def embedded(folder, config, decoder, stream, mesh) -> np.ndarray:
    directory = Directory(folder)
    shape = (len(stream), decoder.config.dim)
    manifest = begin(directory, "datastore", {"embed": config_dict(config)}, {}, key_specs(config, *shape))
    done = embed(directory, manifest, config, shape, lambda: Inputs(decoder, stream, mesh))
    assert done.facts["rows"] == len(stream)
    return ArrayReader(directory, "keys")[0 : len(stream)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_keys_do_not_depend_on_chunking_or_batching(
    decoders, make_decoder, make_stream, mesh, tmp_path, rng, name
):
    decoder, stream = make_decoder(decoders[name]), make_stream(61)
    expected = row_reader(CONFIG, decoder, mesh).taps(stream, 0, len(stream))
    assert expected.shape == (61, decoder.config.dim)
    for i in range(3):
        config = dataclasses.replace(
            CONFIG, chunk_rows=int(rng.integers(1, 70)), batch_windows=int(rng.integers(1, 6))
        )
        keys = embedded(tmp_path / f"keys-{i}", config, decoder, stream, mesh)
        np.testing.assert_allclose(keys, expected, atol=1e-5)


def test_an_interrupted_start_ends_in_the_same_bytes(
    decoders, make_decoder, make_stream, mesh, tmp_path, monkeypatch
):
    decoder, stream = make_decoder(decoders["llama"]), make_stream(61)
    embedded(tmp_path / "straight", CONFIG, decoder, stream, mesh)
    write, written = ChunkWriter.write, []

    def interrupted(self, chunk, **arrays):
        if len(written) == 2:
            raise KeyboardInterrupt
        write(self, chunk, **arrays)
        written.append(chunk)

    monkeypatch.setattr(ChunkWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded(tmp_path / "stopped", CONFIG, decoder, stream, mesh)
    monkeypatch.undo()
    embedded(tmp_path / "stopped", CONFIG, decoder, stream, mesh)
    straight, stopped = (
        {str(p.relative_to(tmp_path / f)): p.read_bytes() for p in (tmp_path / f).rglob("*") if p.is_file()}
        for f in ("straight", "stopped")
    )
    assert straight == stopped


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_keys_are_the_rounded_keys(decoders, make_decoder, make_stream, mesh, tmp_path, dtype):
    decoder, stream = make_decoder(decoders["llama"]), make_stream(40)
    wide = embedded(tmp_path / "wide", CONFIG, decoder, stream, mesh)
    narrow = embedded(
        tmp_path / "narrow", dataclasses.replace(CONFIG, key_dtype=dtype), decoder, stream, mesh
    )
    assert narrow.dtype == as_dtype(dtype)
    np.testing.assert_array_equal(narrow, wide.astype(as_dtype(dtype)))


def test_a_key_that_is_not_finite_is_refused_by_row(decoders, make_decoder, make_stream, mesh, tmp_path):
    decoder, stream = make_decoder(decoders["llama"]), make_stream(40)
    row = 17
    token = int(stream.tokens[row : row + 1][0])
    first = int(np.flatnonzero(stream.tokens[0:40] == token)[0])
    graphdef, state = nnx.split(decoder)
    params = nnx.to_pure_dict(state)
    params["embedding"] = params["embedding"].at[token].set(jnp.nan)
    nnx.replace_by_pure_dict(state, params)
    decoder = nnx.merge(graphdef, state)
    with pytest.raises(UserError, match=r"keys: row \d+ is not finite") as refused:
        embedded(tmp_path / "keys", CONFIG, decoder, stream, mesh)
    # A weight of 0 times NaN is NaN: all rows of a window that holds the token are lost.
    assert first - CONFIG.context < int(re.search(r"row (\d+)", str(refused.value))[1]) <= first


def test_a_context_beyond_the_learned_positions_is_refused(
    decoders, make_decoder, make_stream, mesh, tmp_path
):
    config = EmbedConfig(context=25, stride=5)
    with pytest.raises(UserError, match=r"embed.context = 25 is longer than the decoder's 24"):
        embedded(tmp_path / "keys", config, make_decoder(decoders["gpt2"]), make_stream(40), mesh)


@pytest.mark.parametrize(
    "impossible",
    [
        {"stride": 0},
        {"stride": 11, "context": 10},
        {"key_dtype": "int4"},
        {"key_dim": -1},
        {"key_dim": 20, "projection_rows": 19},
        {"projection_rows": 0},
        {"store": "some"},
        {"dtype": "float64"},
        {"chunk_rows": 0},
        {"batch_windows": 0},
        {"context": 10.5, "stride": 2},
        {"tap_kind": "attention"},
        {"tap_layer": 0.5},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(impossible):
    with pytest.raises(UserError):
        EmbedConfig(**impossible)
