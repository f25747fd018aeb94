"""What a config would make, without making it: every parameter's shape and the counts."""

import math
from typing import Any

import jax
from flax import nnx

from mlp_memory.config import Config
from mlp_memory.corpus.config import CorpusConfig
from mlp_memory.corpus.vocabulary import Vocabulary
from mlp_memory.decoder.config import DecoderConfig
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.job import is_there
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory


def shapes_table(config: Config, devices: int | None = None) -> str:
    """Parameters of decoder and memory with shapes and logical axes, and the sizes of the trainings.

    Args:
      config: every section.
      devices: that the mesh is for; None for those of this process.

    Raises:
      UserError: the mesh does not fit the devices, or the decoder the vocabulary.
    """
    decoder, memory = resolved_shapes(config)
    devices = jax.device_count() if devices is None else devices
    lines = [f"# mesh slice, data, fsdp, tensor = {config.mesh.sizes(devices)} over {devices} device(s)"]
    for name, make in (
        ("decoder", lambda: Decoder(decoder, nnx.Rngs(0))),
        ("memory", lambda: Memory(memory, nnx.Rngs(0))),
    ):
        flat = nnx.to_flat_state(nnx.state(nnx.eval_shape(make)))
        total = 0
        for path, variable in flat:
            shape = variable.get_value().shape
            total += math.prod(shape)
            axes = ", ".join(variable.get_metadata()["logical_axes"])
            lines.append(f"# {name}.{'.'.join(map(str, path)):<36} {shape!s:<22} {axes}")
        lines.append(f"# {name}: {total:,} parameters")
    if not config.pretrained.source or config.pretrained.finetune:
        steps = config.pretrain
        lines.append(
            f"# pretrain: {steps.steps:,} steps of {steps.batch_size} x {steps.context} = "
            f"{steps.steps * steps.batch_size * steps.context:,} tokens"
        )
    if not config.pretrained.memory:
        lines.append(
            f"# distill: {config.distill.steps:,} steps of {config.distill.batch_size} x "
            f"{config.distill.block_rows} = "
            f"{config.distill.steps * config.distill.batch_size * config.distill.block_rows:,} rows, "
            f"teacher of k = {config.retrieve.k}, {config.retrieve.top_m} tokens a row"
        )
    return "\n".join(lines)


def resolved_shapes(config: Config) -> tuple[DecoderConfig, MemoryConfig]:
    """Decoder and memory with every size set: of the models named where they are on this machine.

    Raises:
      UserError: the decoder does not fit the vocabulary.
    """
    decoder = _imported(config.pretrained.source)
    decoder = decoder or config.decoder.with_vocabulary(_vocab_size(config.corpus))
    memory = _imported(config.pretrained.memory) or config.memory.resolved(decoder.dim, decoder.vocab_size)
    return decoder, memory


def _imported(location: str) -> Any:
    """The shape of a model from elsewhere; None where it is not on this machine."""
    if "://" in location or not location or not is_there(location):
        return None
    from mlp_memory.interchange.source import open_source

    return open_source(location).config


def _vocab_size(config: CorpusConfig) -> int:
    if config.vocab_file is None:
        return config.vocab_size
    return Vocabulary.from_path(config.vocab_file, config.bos, config.eos, config.lossless).size
