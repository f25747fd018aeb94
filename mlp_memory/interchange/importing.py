"""The import stage: a model from elsewhere becomes this workdir's decoder or memory."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from mlp_memory.artifacts import Directory, Manifest, UserError
from mlp_memory.decoder.config import Tap
from mlp_memory.interchange.source import Source, load
from mlp_memory.training import checkpoints


def import_model(
    directory: Directory, manifest: Manifest, source: Source, mesh: Mesh, dtype: str, tokenizer: Directory
) -> None:
    """Reads a model onto the mesh and publishes it as `directory`.

    Args:
      directory: where the artifact goes.
      manifest: of that artifact, begun.
      source: the model.
      mesh: devices.
      dtype: of its parameters; see `source.load`.
      tokenizer: where its tokenizer's files go.

    Raises:
      UserError: a file is damaged, a value is not finite, or the disk refuses.
    """
    model = load(source, mesh, dtype)
    if jax.process_index() == 0:
        for name, data in source.files.items():
            tokenizer.write(name, data)
    facts: dict[str, Any] = {
        "model": dataclasses.asdict(source.config),
        "parameters": checkpoints.count_parameters(model),
        "family": source.family,
        "original": source.original,
        "imported": True,
    }
    if source.kind == "memory":
        facts |= memory_facts(source)
    checkpoints.publish(directory, manifest, nnx.to_pure_dict(nnx.state(model)), **facts)


def memory_facts(source: Source) -> dict[str, Any]:
    """Tap and λ that lie beside a memory; the last feed-forward's input and 0.25 where they do not.

    The reference code reads the input of the last layer's feed-forward; 0.25 is the paper's λ
    on WikiText-103.

    Raises:
      UserError: the tap beside it is none.
    """
    facts = source.facts or {}
    try:
        tap = Tap(**facts.get("tap", {}))
        weight = float(facts.get("lambda", 0.25))
    except (TypeError, ValueError) as error:
        raise UserError(f"{source.where}/mlp_memory.json: tap or lambda is damaged: {error}") from error
    return {"tap": dataclasses.asdict(tap), "validation": {"validation_lambda": weight}}
