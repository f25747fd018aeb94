"""A model as two compiled-anywhere programs and their weights, for processes without this package.

`prefill` reads a batch of prompts, `step` one token of each row; both draw the next token. They are
what `inference.generate.Steps` compiles, exported as StableHLO with batch, prompt length and cache
as symbolic sizes. `serve.py` goes beside them and runs them with jax, numpy and safetensors alone.
"""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from mlp_memory.artifacts import Directory, UserError, first_line
from mlp_memory.corpus.vocabulary import Vocabulary
from mlp_memory.decoder.transformer import LayerCache
from mlp_memory.inference.config import GenerateConfig
from mlp_memory.inference.generate import State, Steps
from mlp_memory.inference.next_token import Mixture
from mlp_memory.inference.sampling import Filters, Numbers
from mlp_memory.interchange import safetensors_file
from mlp_memory.interchange.safetensors_file import TensorSpec
from mlp_memory.joint.gate import Gate

FORMAT = "mlp_memory serving 1"
MANIFEST, WEIGHTS, LOADER = "serving.json", "weights.safetensors", "serve.py"
PREFILL, STEP = "prefill.stablehlo", "step.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")
_STATE = ("token", "position", "drawn", "seen", "random_keys")
"""Of a step's state what follows the cache, whose arrays come first, a layer's keys before its values."""


def export_serving(
    directory: Directory, mixture: Mixture, vocabulary: Vocabulary, config: GenerateConfig, model: str
) -> None:
    """Writes programs, weights, tokenizer, loader and `serving.json`; with that last one the folder is whole.

    Args:
      directory: where to; files of these names are replaced.
      mixture: the model, in the dtype it is to be served in.
      vocabulary: goes along.
      config: which filters the programs have; their numbers, seed and lengths are defaults of the loader.
      model: its name, for `serving.json`.

    Raises:
      UserError: the disk refuses, or `config` asks for beams, which the programs do not have.
    """
    if config.beams > 1:
        raise UserError(f"generate.beams = {config.beams}: what is exported draws token by token, leave 1")
    leaves, _ = jax.tree.flatten_with_path(mixture.parameters)
    names = [_name(path) for path, _ in leaves]
    values = dict(zip(names, (leaf for _, leaf in leaves), strict=True))
    specs = {name: TensorSpec(value.shape, value.dtype.name) for name, value in values.items()}
    programs, state = _programs(mixture, Filters.of(config))
    try:
        directory.write(MANIFEST, b"")  # what was there before counts no more
        checksums = {WEIGHTS: _write_weights(directory, specs, lambda name: np.asarray(values[name]))}
        loader = Path(__file__).with_name(LOADER).read_bytes()
        for name, data in {**programs, **vocabulary.files, LOADER: loader}.items():
            directory.write(name, data)
            checksums[name] = hashlib.sha256(data).hexdigest()
    except OSError as error:
        raise UserError(f"cannot write {directory}: {first_line(error)}") from error
    numbers = {name: float(value) for name, value in Numbers.of(config)._asdict().items()}
    weight = mixture.parameters["weight"]
    manifest = {
        "format": FORMAT,
        "model": model,
        "lambda": "gate" if isinstance(weight, Gate) else float(weight),
        "jax": jax.__version__,
        "platforms": PLATFORMS,
        "vocab_size": mixture.config.vocab_size,
        "bos": vocabulary.bos,
        "eos": vocabulary.eos,
        "max_positions": mixture.config.max_positions if mixture.config.positions == "learned" else 0,
        "filters": Filters.of(config)._asdict(),
        "defaults": {**numbers, "max_tokens": config.max_tokens, "seed": config.seed},
        "numbers": list(numbers),
        "weights": [{"name": name, "shape": specs[name].shape, "dtype": specs[name].dtype} for name in names],
        "state": state,
        "tokenizer": {"kind": vocabulary.kind, "files": sorted(vocabulary.files)},
        "sha256": checksums,
    }
    directory.write(MANIFEST, json.dumps(manifest, indent=1).encode())


def _name(path: tuple[Any, ...]) -> str:
    """ "decoder.blocks.ffn.up.kernel" of a parameter's path."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def _programs(mixture: Mixture, filters: Filters) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The serialised programs by file name, and the arrays of the state: names, shapes, dtypes.

    Arguments and results are flat lists: the weights, the state, the filters' numbers.
    """
    steps, structure = Steps(mixture, filters), jax.tree.structure(mixture.parameters)
    layers = range(mixture.config.layers)
    cached = [f"cache_{name}_{layer}" for layer in layers for name in ("keys", "values")]
    kept = [*cached, *(name for name in _STATE if name != "seen" or filters.penalty)]

    def flat(state: State) -> list[jax.Array]:
        arrays = (
            *(x for layer in state.cache for x in layer),
            *state[1:-1],
            jax.random.key_data(state.keys_B),
        )
        return [array for array in arrays if array is not None]

    def prefill(
        weights: list[jax.Array],
        tokens_BxT: jax.Array,
        lengths_B: jax.Array,
        seed: jax.Array,
        numbers: list[jax.Array],
    ) -> list[jax.Array]:
        parameters = jax.tree.unflatten(structure, weights)
        return flat(steps.prefill(parameters, tokens_BxT, lengths_B, seed, Numbers(*numbers)))

    def step(weights: list[jax.Array], state: list[jax.Array], numbers: list[jax.Array]) -> list[jax.Array]:
        part = dict(zip(kept, state, strict=True))
        cache = [LayerCache(*state[at : at + 2]) for at in range(0, len(cached), 2)]
        keys_B = jax.random.wrap_key_data(part["random_keys"])
        before = State(None, part["token"], part["position"], part["drawn"], part.get("seen"), keys_B)
        return flat(steps.step(jax.tree.unflatten(structure, weights), cache, before, Numbers(*numbers)))

    shape = jax.ShapeDtypeStruct
    weights = [shape(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(mixture.parameters)]
    numbers = [shape((), jnp.float32)] * len(Numbers._fields)
    batch, length, room = export.symbolic_shape("b, t, c")
    read = (shape((batch, length), jnp.int32), shape((batch,), jnp.int32), shape((), jnp.uint32))
    first = export.export(jax.jit(prefill), platforms=PLATFORMS)(weights, *read, numbers)
    state = [
        shape(tuple(room if size == length else size for size in array.shape), array.dtype)
        for array in first.out_avals
    ]
    then = export.export(jax.jit(step), platforms=PLATFORMS)(weights, state, numbers)
    described = [
        {
            "name": name,
            "shape": [s if isinstance(s, int) else str(s) for s in array.shape],
            "dtype": array.dtype.name,
        }
        for name, array in zip(kept, state, strict=True)
    ]
    return {PREFILL: bytes(first.serialize()), STEP: bytes(then.serialize())}, described


def _write_weights(
    directory: Directory, specs: dict[str, TensorSpec], make: Callable[[str], np.ndarray]
) -> str:
    """Writes the weights, one at a time where the folder is local; their file's checksum."""
    if not directory.is_local:
        data = io.BytesIO()
        safetensors_file.write(data, specs, make)
        directory.write(WEIGHTS, data.getvalue())
        return hashlib.sha256(data.getvalue()).hexdigest()
    directory.path.mkdir(parents=True, exist_ok=True)
    with (directory.path / WEIGHTS).open("w+b") as file:
        safetensors_file.write(file, specs, make)
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()
