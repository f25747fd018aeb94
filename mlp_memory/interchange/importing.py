"""The import stage: a model from elsewhere becomes this workdir's decoder or memory."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from mlp_memory.artifacts import Directory, Manifest, UserError
from mlp_memory.decoder.config import DecoderConfig, Tap
from mlp_memory.interchange.source import Source, load
from mlp_memory.memory.config import MemoryConfig
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
    """λ and tap that lie beside a memory: 0.25, the paper's λ on WikiText-103, and no tap where they do not.

    Raises:
      UserError: what lies beside it is no tap or no λ.
    """
    facts = source.facts or {}
    try:
        found = {"tap": dataclasses.asdict(Tap(**facts["tap"]))} if "tap" in facts else {}
        weight = float(facts.get("lambda", 0.25))
    except (TypeError, ValueError) as error:
        raise UserError(f"{source.where}/mlp_memory.json: tap or lambda is damaged: {error}") from error
    return {**found, "validation": {"validation_lambda": weight}}


def check_memory(
    where: str, memory: MemoryConfig, tap: dict[str, Any] | None, decoder: DecoderConfig, ours: Tap
) -> None:
    """Raises unless a memory reads the states and names the tokens of a decoder.

    Args:
      where: the memory, for messages.
      memory: its shape.
      tap: what it reads, as it lies beside it; None where nothing says so.
      decoder: the decoder's shape.
      ours: what it is given to read.

    Raises:
      UserError: width, vocabulary or tap differ.
    """
    again = "give the memory that was made for this decoder"
    if memory.input_dim != decoder.dim:
        raise UserError(
            f"{where} reads states [{memory.input_dim}], the decoder's are [{decoder.dim}]: {again}"
        )
    if memory.vocab_size != decoder.vocab_size:
        raise UserError(f"{where} has {memory.vocab_size} tokens, the decoder {decoder.vocab_size}: {again}")
    if not tap:
        return
    try:
        layer = Tap(**tap).index(decoder.layers)
    except UserError as error:
        raise UserError(f"{where}: {error}: {again}") from error
    if (tap["kind"], layer) != (ours.kind, ours.index(decoder.layers)):
        raise UserError(
            f"{where} reads {tap['kind']} of layer {tap['layer']}, embed taps {ours.kind} of layer "
            f"{ours.layer}: set embed.tap_layer = {tap['layer']} and embed.tap_kind = {tap['kind']!r}"
        )
