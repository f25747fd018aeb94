"""The serving export: the decode step as StableHLO, its weights apart, and a loader without this package.

DIR/prefill.stablehlo   prompts [B, T] padded on the right -> first tokens, cache
DIR/step.stablehlo      a token of each row -> the next, the cache
DIR/weights.safetensors both programs' first argument
DIR/serving.json        order of the weights, sizes, checksums
DIR/served.py           loads and runs it; needs jax, numpy and safetensors
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from mlp_memory.artifacts import Directory, UserError
from mlp_memory.inference.config import GenerateConfig
from mlp_memory.inference.generate import State, Steps, row_keys
from mlp_memory.inference.next_token import Mixture
from mlp_memory.inference.sampling import Filters, Numbers
from mlp_memory.interchange import safetensors_file
from mlp_memory.interchange.safetensors_file import TensorSpec

PLATFORMS = ("cpu", "cuda", "tpu")
LOADER = "served.py"


def export_serving(
    directory: Directory,
    mixture: Mixture,
    config: GenerateConfig,
    batch: int,
    prompt_tokens: int,
    special: dict[str, int],
    platforms: tuple[str, ...] = PLATFORMS,
) -> None:
    """Writes the programs of one model, for a fixed batch and room for prompt and continuation.

    Args:
      directory: the folder.
      mixture: the model.
      config: how tokens are drawn, and `max_tokens`, the longest continuation. The settings are part of
        the programs; the seed is an argument.
      batch: rows; fewer prompts are filled up.
      prompt_tokens: longest prompt.
      special: "bos" and "eos".
      platforms: that the programs are lowered for.

    Raises:
      UserError: beams, stop texts, or more positions than the decoder has.
    """
    _check(mixture, config, batch, prompt_tokens)
    steps, numbers = Steps(mixture, Filters.of(config)), Numbers.of(config)
    weights, structure = jax.tree.flatten(mixture.parameters)
    capacity = prompt_tokens + config.max_tokens
    prompts = [jax.ShapeDtypeStruct(shape, np.int32) for shape in ((batch, prompt_tokens), (batch,))]
    abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in weights]
    seed = jax.ShapeDtypeStruct((), np.uint32)

    # State as a list of plain arrays, so that no class of ours is needed to hold it.
    def keyless(state: State) -> list[jax.Array]:
        return jax.tree.leaves(state._replace(keys_B=None))

    def prefill(weights: list[jax.Array], prompts: list[jax.Array], seed: jax.Array) -> list[jax.Array]:
        parameters, keys_B = jax.tree.unflatten(structure, weights), row_keys(seed, batch)
        return keyless(steps.prefill(parameters, *prompts, keys_B, numbers, capacity))

    like = jax.eval_shape(
        lambda weights, prompts, seed: steps.prefill(
            jax.tree.unflatten(structure, weights), *prompts, row_keys(seed, batch), numbers, capacity
        ),
        abstract,
        prompts,
        seed,
    )._replace(keys_B=None)

    def step(weights: list[jax.Array], state: list[jax.Array], seed: jax.Array) -> list[jax.Array]:
        parameters = jax.tree.unflatten(structure, weights)
        found: State = jax.tree.unflatten(jax.tree.structure(like), state)
        found = found._replace(keys_B=row_keys(seed, batch))
        return keyless(steps.step(parameters, found.cache, found, numbers))

    files = {
        f"{name}.stablehlo": bytes(
            export.export(jax.jit(program), platforms=platforms)(abstract, second, seed).serialize()
        )
        for name, program, second in (("prefill", prefill, prompts), ("step", step, jax.tree.leaves(like)))
    }
    names = ["/".join(_words(path)) for path, _ in jax.tree_util.tree_leaves_with_path(mixture.parameters)]
    files["weights.safetensors"] = _safetensors(dict(zip(names, weights)))
    files[LOADER] = Path(__file__).with_name(LOADER).read_bytes()
    token = next(i for i, x in enumerate(jax.tree.leaves(_marked(like))) if x == "token")
    facts = {
        "format": 1,
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "max_tokens": config.max_tokens,
        "vocab_size": mixture.config.vocab_size,
        **special,
        "weights": names,
        "token": token,
        "platforms": list(platforms),
        "jax": jax.__version__,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    for name, data in files.items():
        directory.write(name, data)
    directory.write("serving.json", json.dumps(facts, indent=1, sort_keys=True).encode())


def _check(mixture: Mixture, config: GenerateConfig, batch: int, prompt_tokens: int) -> None:
    if config.beams > 1 or config.stop:
        raise UserError("serving: beams and stop texts are not part of the programs: leave them out")
    for name, value in (("batch", batch), ("prompt_tokens", prompt_tokens)):
        if value < 1:
            raise UserError(f"serving: {name} = {value}: give 1 or more")
    room, decoder = prompt_tokens + config.max_tokens, mixture.config
    if decoder.positions == "learned" and room > decoder.max_positions:
        raise UserError(
            f"serving: prompt_tokens = {prompt_tokens} and generate.max_tokens = {config.max_tokens} are "
            f"more than the decoder's {decoder.max_positions} positions: lower one"
        )


def _marked(state: State) -> Any:
    """The state's structure with the token's leaf named."""
    return jax.tree.map(lambda _: "", state)._replace(token_B="token")


def _words(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]


def _safetensors(tensors: dict[str, jax.Array]) -> bytes:
    specs = {name: TensorSpec(x.shape, jnp.dtype(x.dtype).name) for name, x in tensors.items()}
    file = io.BytesIO()
    safetensors_file.write(file, specs, lambda name: np.asarray(tensors[name]))
    return file.getvalue()
