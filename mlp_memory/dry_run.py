"""What a config would make, without making it: every parameter's shape and the counts."""

import dataclasses
import math

import jax
from flax import nnx

from mlp_memory.config import Config
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.memory.mlp import Memory


def shapes_table(config: Config) -> str:
    """Parameters of decoder and memory with shapes and logical axes, and the sizes of the trainings.

    Raises:
      UserError: the mesh does not fit the devices.
    """
    vocab_size = config.decoder.vocab_size or config.corpus.vocab_size
    decoder = dataclasses.replace(config.decoder, vocab_size=vocab_size)
    memory = config.memory.resolved(decoder.dim, vocab_size)
    sizes = config.mesh.sizes(jax.device_count())
    lines = [f"# mesh slice, data, fsdp, tensor = {sizes} over {jax.device_count()} device(s)"]
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
    steps = config.pretrain
    lines.append(
        f"# pretrain: {steps.steps:,} steps of {steps.batch_size} x {steps.context} = "
        f"{steps.steps * steps.batch_size * steps.context:,} tokens"
    )
    lines.append(
        f"# distill: {config.distill.steps:,} steps of {config.distill.batch_size} x "
        f"{config.distill.block_rows} = "
        f"{config.distill.steps * config.distill.batch_size * config.distill.block_rows:,} rows, "
        f"teacher of k = {config.retrieve.k}, {config.retrieve.top_m} tokens a row"
    )
    return "\n".join(lines)
