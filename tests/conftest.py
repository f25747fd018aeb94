import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlp_memory.arrays import ChunkWriter
from mlp_memory.artifacts import ArraySpec, Directory, begin
from mlp_memory.corpus.stream import BOUNDS_NAME, KIND, TokenStream
from mlp_memory.decoder.config import DecoderConfig
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.interchange.export import export_model
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory
from mlp_memory.parallel.config import MeshConfig
from mlp_memory.parallel.mesh import make_mesh

# Tests start the same programs again and again: what one has compiled serves the others.
_COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _COMPILED.name)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
jax.config.update("jax_enable_compilation_cache", False)  # here, where tests read what was compiled

# Tests are compiled more than they are run. Programs that tests start compile as users do.
_USERS_FLAGS = os.environ.get("XLA_FLAGS")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    f"{_USERS_FLAGS or ''} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
jax.devices()  # reads the flags
if _USERS_FLAGS is None:
    del os.environ["XLA_FLAGS"]
else:
    os.environ["XLA_FLAGS"] = _USERS_FLAGS

VOCAB = 37


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: one that begins last would run alone to the end.

    One file of tests/pipeline comes before all: it makes the run that the others then find made.
    """
    first = ["test_command_line.py", "multi_process", "multi_device", "pipeline"]

    def rank(item: pytest.Item) -> int:
        return next((n for n, part in enumerate(first) if part in item.path.parts), len(first))

    items.sort(key=rank)


DECODERS = {
    "llama": DecoderConfig(layers=3, dim=16, heads=4, kv_heads=2, ffn_dim=24, vocab_size=VOCAB),
    "gpt2": DecoderConfig(
        layers=2,
        dim=12,
        heads=3,
        norm="layernorm",
        positions="learned",
        activation="gelu",
        bias="all",
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
        bias="all",
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
    "mistral": DecoderConfig(
        layers=2,
        dim=16,
        heads=4,
        kv_heads=2,
        bias="qkv",
        window=3,
        window_from=1,
        rope_scaling="linear",
        rope_factor=2.0,
        vocab_size=VOCAB,
    ),
    "qwen3": DecoderConfig(
        layers=2,
        dim=12,
        heads=4,
        kv_heads=2,
        head_size=10,
        bias="attention",
        qk_norm=True,
        tied=True,
        rope_scaling="llama3",
        rope_factor=4.0,
        rope_low_factor=1.5,
        rope_high_factor=3.0,
        rope_original=12,
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

    def make(
        rows: int, vocab_size: int = VOCAB, mean_document: int = 12, folder: Path | None = None
    ) -> TokenStream:
        inner = np.flatnonzero(rng.random(rows - 1) < 1 / mean_document) + 1
        alone = int(rng.integers(1, rows - 1))
        bounds = np.unique(np.concatenate([[0, alone, alone + 1, rows], inner]))
        tokens = rng.integers(0, vocab_size, rows)
        return write_stream(folder or tmp_path / f"stream-{next(count)}", tokens, bounds, vocab_size)

    return make


@pytest.fixture
def write_arrays():
    """(folder, name=array...) -> the folder as a finished artifact of these arrays."""

    def write(folder: Path, **arrays: np.ndarray) -> Directory:
        directory = Directory(folder)
        specs = {name: ArraySpec(a.shape, a.dtype.name, 32) for name, a in arrays.items()}
        writer = ChunkWriter(directory, begin(directory, "test", {}, {}, specs))
        for chunk in range(len(writer)):
            start, stop = writer.rows(chunk)
            writer.write(chunk, **{name: a[start:stop] for name, a in arrays.items()})
        writer.finish()
        return directory

    return write


@pytest.fixture
def training_inputs(make_stream, write_arrays, tmp_path: Path, rng: np.random.Generator) -> Path:
    """A folder of streams "train" and "validation" (40 tokens), "datastore" (8 wide) and "targets"."""
    for name, rows in (("train", 700), ("validation", 120)):
        make_stream(rows, 40, folder=tmp_path / "inputs" / name)
    probs = rng.random((700, 3))
    write_arrays(tmp_path / "inputs/datastore", keys=rng.normal(size=(700, 8)).astype(np.float32))
    write_arrays(
        tmp_path / "inputs/targets",
        token_ids=rng.integers(0, 40, (700, 3)).astype(np.uint16),
        probs=(probs / probs.sum(1, keepdims=True)).astype(np.float16),
    )
    return tmp_path / "inputs"


@pytest.fixture
def files_of():
    """folder -> its files' bytes by name, less Orbax's, whose names are random, and the list of them."""

    def read(folder: Path) -> dict[str, bytes]:
        found = [path for path in folder.rglob("*") if path.is_file() and "model" not in path.parts]
        found = [
            path for path in found if path.name != "checksums.json" or not (path.parent / "model").is_dir()
        ]
        return {str(path.relative_to(folder)): path.read_bytes() for path in found}

    return read


@pytest.fixture
def model_folders(make_decoder, randomize, tmp_path: Path) -> Path:
    """A folder of models as `export` leaves them: two decoders, one in bfloat16, and two memories."""
    models = {
        "llama": make_decoder(
            DecoderConfig(layers=3, dim=16, heads=4, kv_heads=2, ffn_dim=24, vocab_size=42, tied=True)
        ),
        "gpt2": make_decoder(dataclasses.replace(DECODERS["gpt2"], dim=24, heads=4, vocab_size=42)),
        "llama_memory": randomize(
            lambda: Memory(MemoryConfig("llama", 2, 16, 24, 0.0, 1e-6, 24, 42), nnx.Rngs(0))
        ),
        "gpt2_memory": randomize(
            lambda: Memory(MemoryConfig("gpt2", 2, 16, 24, 0.0, 1e-5, 16, 42), nnx.Rngs(0))
        ),
    }
    graphdef, state = nnx.split(models["gpt2"])
    models["gpt2"] = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    for name, model in models.items():
        export_model(Directory(tmp_path / "models" / name), model, {}, {"tokenizer.model": b"any"}, {})
    return tmp_path / "models"
