"""The export stage: every model as a safetensors folder, read back before it counts."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from mlp_memory import artifacts
from mlp_memory.artifacts import Directory, Manifest, UserError
from mlp_memory.corpus.vocabulary import Vocabulary
from mlp_memory.decoder.config import DecoderConfig
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.interchange.model_folder import load_model, save_model
from mlp_memory.memory.mlp import Memory, MemoryConfig


def export(
    directory: Directory,
    manifest: Manifest,
    models: dict[str, tuple[nnx.Module, Manifest]],
    tap: dict[str, Any],
    vocabulary: Vocabulary,
) -> None:
    """Writes `directory`/NAME for each model and reads it back.

    Args:
      directory: where the folders go.
      manifest: of the artifact, begun.
      models: name -> model and its manifest.
      tap: the memory's input, for its config.
      vocabulary: whose files go beside each model.

    Raises:
      UserError: the disk refuses, or what was read back differs.
    """
    for name, (model, made) in models.items():
        config = {
            "model_type": "memory" if isinstance(model, Memory) else "decoder",
            "model": made.facts["model"],
            "fingerprint": made.fingerprint,
        }
        if isinstance(model, Memory):
            config |= {"tap": tap, "lambda": made.facts["validation"]["validation_lambda"]}
        elif "interpolation" in made.facts:
            config["lambda"] = made.facts["validation"]["validation_lambda"]
        tensors = tensors_of(model)
        save_model(directory / name, config, tensors, vocabulary.files)
        found = tensors_of(load_exported(directory / name)[0])
        if any(not np.array_equal(found[n], t) for n, t in tensors.items()):
            raise UserError(
                f"{directory / name} does not read back as written: check the disk and export again"
            )
    artifacts.finish(directory, manifest)


def tensors_of(model: nnx.Module) -> dict[str, np.ndarray]:
    """Parameters by dotted path, in the model's dtype; stacked layers have a leading axis."""
    return {
        ".".join(map(str, path)): np.asarray(variable.get_value())
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


def load_exported(directory: Directory) -> tuple[nnx.Module, dict[str, Any]]:
    """A model that `export` wrote, and its config.

    Raises:
      UserError: the folder is damaged, or its tensors do not fit its config.
    """
    config, tensors = load_model(directory)
    try:
        if config["model_type"] == "memory":
            shape = MemoryConfig(**config["model"])
            abstract = nnx.eval_shape(lambda: Memory(shape, nnx.Rngs(0)))
        else:
            shape = DecoderConfig(**config["model"])
            abstract = nnx.eval_shape(lambda: Decoder(shape, nnx.Rngs(0)))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{directory}/config.json does not describe a model: {artifacts.first_line(error)}"
        ) from error
    graphdef, state = nnx.split(abstract)
    wanted = {".".join(map(str, path)): v for path, v in nnx.to_flat_state(state)}
    for name in sorted({*wanted, *tensors}):
        shape = wanted[name].get_value().shape if name in wanted else None
        found = tensors[name].shape if name in tensors else None
        if shape != found:
            raise UserError(f"{directory}: tensor {name} is {found}, its config says {shape}")
    for name, variable in wanted.items():
        variable.set_value(jax.numpy.asarray(tensors[name]))
    return nnx.merge(graphdef, state), config
