"""The export stage: every model as a folder that others load, read back before it counts.

Where several processes share a model, all of them gather each tensor and the first writes.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from mlp_memory import artifacts
from mlp_memory.artifacts import Directory, Manifest, UserError
from mlp_memory.interchange import families
from mlp_memory.interchange.layout import Layout, Path
from mlp_memory.interchange.model_folder import make_as_saved, save_model
from mlp_memory.interchange.source import open_source
from mlp_memory.memory.mlp import Memory


def export(
    directory: Directory,
    manifest: Manifest,
    models: dict[str, Callable[[], tuple[nnx.Module, Manifest]]],
    tap: dict[str, Any],
    tokenizer: dict[str, bytes],
    special: dict[str, int],
) -> None:
    """Writes `directory`/NAME for each model and reads it back.

    Decoders go out in the layout of their family (`families.family_of`), which
    `transformers` loads; memories in that of the reference release.

    Args:
      directory: where the folders go.
      manifest: of the artifact, begun.
      models: name -> what loads the model and its manifest; one is held at a time.
      tap: the memory's input.
      tokenizer: files that go beside each model.
      special: ids of special tokens for config.json, such as `bos_token_id`.

    Raises:
      UserError: the disk refuses, or what was read back differs.
    """
    for name, load in models.items():
        model, made = load()
        facts = {"fingerprint": made.fingerprint, "model": made.facts["model"]}
        if isinstance(model, Memory):
            facts |= {"kind": "memory", "tap": made.facts.get("tap", tap)}
        else:
            facts |= {"kind": "decoder"}
        if isinstance(model, Memory) or "interpolation" in made.facts:
            facts["lambda"] = made.facts["validation"]["validation_lambda"]
        export_model(directory / name, model, facts, tokenizer, special, made.facts.get("original"))
    if jax.process_index() == 0:
        artifacts.finish(directory, manifest)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"exported {directory}")


def export_model(
    directory: Directory,
    model: nnx.Module,
    facts: dict[str, Any],
    tokenizer: dict[str, bytes],
    special: dict[str, int],
    original: dict[str, Any] | None = None,
) -> None:
    """Writes one model as a folder and reads it back: names, shapes, and each tensor's checksum.

    The host holds one tensor beside the model: a layer of a parameter, or several side by side.

    Args:
      directory: the folder.
      model: a decoder or a memory.
      facts: what goes into `mlp_memory.json`.
      tokenizer, special: see `export`.
      original: the config.json it was imported with, which goes out again.

    Raises:
      UserError: the disk refuses, or what was read back differs.
    """
    params: dict[Path, jax.Array] = {
        tuple(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    dtype = params["norm", "scale"].dtype.name
    if isinstance(model, Memory):
        kind, family = "memory", model.config.style
        config = families.write_memory_config(model.config, dtype)
    else:
        kind, family = "decoder", families.family_of(model.config)
        config = {**families.write_config(model.config, dtype), **special}
        if original and "architectures" in original:
            config = {**original, **{key: dtype for key in ("dtype", "torch_dtype") if key in original}}
    layout = Layout(kind, family, {path: value.shape for path, value in params.items()})

    def parameter(path: Path, layer: int | None) -> np.ndarray:
        return _on_host(params[path] if layer is None else params[path][layer])

    tensors = {name: lambda name=name: layout.scatter(name, parameter) for name in layout.tensors}
    if jax.process_index() > 0:
        make_as_saved(tensors)
        return
    save_model(directory, config, tensors, tokenizer, facts=facts)
    found = open_source(directory.location)
    if found.layout.tensors != layout.tensors:
        raise UserError(f"{directory} reads back as another model: check the disk and export again")
    for name in found.layout.tensors:
        found.read(name)


def _on_host(value: jax.Array) -> np.ndarray:
    """All of an array, also where this process holds a part; then every process must ask for it."""
    if value.is_fully_addressable:
        return np.asarray(value)
    return multihost_utils.process_allgather(value, tiled=True)
