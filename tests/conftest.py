import hashlib
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlp_memory.artifacts import ArraySpec, ChunkWriter, Directory, begin
from mlp_memory.corpus.stream import BOUNDS_NAME, KIND, TokenStream
from mlp_memory.decoder.config import DecoderConfig
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.parallel.config import MeshConfig
from mlp_memory.parallel.mesh import make_mesh

VOCAB = 37

DECODERS = {
    "llama": DecoderConfig(layers=3, dim=16, heads=4, kv_heads=2, ffn_dim=24, vocab_size=VOCAB),
    "gpt2": DecoderConfig(
        layers=2,
        dim=12,
        heads=3,
        norm="layernorm",
        positions="learned",
        activation="gelu",
        bias=True,
        tied=True,
        max_positions=24,
        vocab_size=VOCAB,
    ),
    "mixed": DecoderConfig(
        layers=2,
        dim=16,
        heads=4,
        kv_heads=1,
        positions="learned",
        bias=True,
        max_positions=32,
        norm_epsilon=1e-3,
        vocab_size=VOCAB,
    ),
    "neox": DecoderConfig(
        layers=2,
        dim=16,
        heads=2,
        norm="layernorm",
        activation="gelu",
        tied=True,
        rope_base=100.0,
        vocab_size=VOCAB,
    ),
}


def randomized(make: Callable[[], nnx.Module], rng: np.random.Generator) -> nnx.Module:
    """A model of that shape with every parameter random: no bias is 0, no norm's scale is 1."""
    graphdef, state = nnx.split(nnx.eval_shape(make))

    def value(path: tuple, shape: tuple[int, ...]) -> jax.Array:
        mean = 1.0 if path[-1] == "scale" else 0.0
        return jnp.asarray(mean + 0.35 * rng.normal(size=shape), jnp.float32)

    flat = {path: value(path, v.get_value().shape) for path, v in nnx.to_flat_state(state)}
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(flat))
    return nnx.merge(graphdef, state)


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh random input; the seed of a failing test is in its captured output."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"rng seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(params=sorted(DECODERS))
def decoder_config(request: pytest.FixtureRequest) -> DecoderConfig:
    return DECODERS[request.param]


@pytest.fixture
def decoders() -> dict[str, DecoderConfig]:
    return DECODERS


@pytest.fixture
def make_decoder(rng: np.random.Generator):
    """config -> a decoder whose parameters are all random."""

    def make(config: DecoderConfig) -> Decoder:
        return randomized(lambda: Decoder(config, nnx.Rngs(0)), rng)

    return make


@pytest.fixture
def randomize(rng: np.random.Generator):
    """A function that makes a model -> such a model with random parameters."""
    return lambda make: randomized(make, rng)


@pytest.fixture(scope="session")
def mesh() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def write_stream(folder: Path, tokens: np.ndarray, bounds: np.ndarray, vocab_size: int) -> TokenStream:
    """A corpus split of these tokens and document bounds, as the tokenize stage leaves it."""
    directory = Directory(folder)
    arrays = {"tokens": ArraySpec((len(tokens),), "uint16", 64)}
    manifest = begin(directory, KIND, {}, {}, arrays)
    data = np.asarray(bounds).astype("<i8").tobytes()
    directory.write(BOUNDS_NAME, data)
    writer = ChunkWriter(directory, manifest)
    for chunk in range(len(writer)):
        start, stop = writer.rows(chunk)
        writer.write(chunk, tokens=np.asarray(tokens[start:stop], np.uint16))
    writer.finish(vocab_size=vocab_size, words=1, bytes=1, bounds_sha256=hashlib.sha256(data).hexdigest())
    return TokenStream.open(directory)


@pytest.fixture
def make_stream(tmp_path: Path, rng: np.random.Generator):
    """(rows, vocab_size) -> a stream of random documents, one of them a single token."""
    count = iter(range(1000))

    def make(rows: int, vocab_size: int = VOCAB, mean_document: int = 12) -> TokenStream:
        inner = np.flatnonzero(rng.random(rows - 1) < 1 / mean_document) + 1
        alone = int(rng.integers(1, rows - 1))
        bounds = np.unique(np.concatenate([[0, alone, alone + 1, rows], inner]))
        tokens = rng.integers(0, vocab_size, rows)
        return write_stream(tmp_path / f"stream-{next(count)}", tokens, bounds, vocab_size)

    return make
