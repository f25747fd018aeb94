"""Shapes for comparisons: a memory of a given share, a decoder of given parameters, steps of given FLOPs."""

import dataclasses
import math

from mlp_memory.artifacts import UserError
from mlp_memory.config import Config
from mlp_memory.decoder.config import DecoderConfig, parameter_count
from mlp_memory.dry_run import resolved_shapes
from mlp_memory.memory.config import MemoryConfig

_CLOSE = 0.01


@dataclasses.dataclass(frozen=True)
class Cost:
    """Scalars in the parameters, and FLOPs of the trainings, of the decoder and of its memory (0 without)."""

    decoder: int
    memory: int
    decoder_flops: int
    memory_flops: int

    @property
    def parameters(self) -> int:
        return self.decoder + self.memory

    @property
    def train_flops(self) -> int:
        return self.decoder_flops + self.memory_flops


def memory_parameters(config: MemoryConfig) -> int:
    """Scalars in all parameters of that shape, resolved."""
    norm = 2 * config.dim if config.style == "gpt2" else config.dim
    if config.style == "gpt2":
        block = norm + (2 * config.dim + 1) * config.hidden_dim + config.dim
    else:
        block = norm + 3 * config.dim * config.hidden_dim
    transform = (config.input_dim + 1) * config.dim if config.input_dim != config.dim else 0
    return transform + config.layers * block + norm + config.dim * config.vocab_size


def cost(config: Config, memory: bool) -> Cost:
    """Of a config's trainings, by its vocabulary's intended size.

    Args:
      config: every section.
      memory: whether there is one.
    """
    decoder, shape = resolved_shapes(config)
    pretrained = bool(config.pretrained.source) and not config.pretrained.finetune
    training, distill = config.pretrain, config.distill
    tokens = training.steps * training.batch_size * training.context
    rows = distill.steps * distill.batch_size * distill.block_rows
    return Cost(
        decoder=parameter_count(decoder),
        memory=memory_parameters(shape) if memory else 0,
        decoder_flops=0 if pretrained else decoder.train_flops(tokens, training.context),
        memory_flops=shape.train_flops(rows) if memory else 0,
    )


def datastore_flops(decoder: DecoderConfig, rows: int, context: int, stride: int) -> dict[str, int]:
    """FLOPs behind a teacher over `rows` rows: `embed`, the decoder's forward passes over windows of
    `context` rows, one every `stride`; `exact_search`, 2·rows²·D."""
    read = rows * -(-context // stride)
    return {"embed": decoder.train_flops(read, context) // 3, "exact_search": 2 * rows * rows * decoder.dim}


def sized(base: DecoderConfig, layers: int, dim: int) -> DecoderConfig:
    """The decoder of that depth and width with the base's head size and queries per key.

    Raises:
      UserError: the width is no number of such heads.
    """
    heads, group = dim // base.head_dim, base.heads // base.num_kv_heads
    if dim % base.head_dim or heads % group:
        raise UserError(
            f"study: a decoder of dim {dim} has no whole number of heads of {base.head_dim}"
            + (f", {group} queries a key" if group > 1 else "")
            + ": change the size or decoder.heads"
        )
    kv_heads = 0 if not base.kv_heads else heads // group
    return dataclasses.replace(base, layers=layers, dim=dim, heads=heads, kv_heads=kv_heads, ffn_dim=0)


def memory_layers(memory: MemoryConfig, parameters: int) -> int:
    """Blocks that bring a memory, resolved, closest to so many parameters; 1 at least."""
    one, two = (memory_parameters(dataclasses.replace(memory, layers=n)) for n in (1, 2))
    return max(1, 1 + round((parameters - one) / (two - one)))


def peer(base: DecoderConfig, parameters: int) -> DecoderConfig:
    """A decoder like `base` with as close to `parameters` parameters as 1 %, or as its shape allows.

    It grows in width and depth as decoders do: of the candidates as close as that, the one whose
    proportions (width to depth, feed-forward to width) are nearest to the base's.
    """
    group = base.heads // base.num_kv_heads
    usual = base.hidden_dim / base.dim
    best = None
    for heads in range(group, 8 * base.heads + 1, group):
        dim = heads * base.head_dim
        for layers in range(1, 4 * base.layers + 1):
            shape = dataclasses.replace(sized(base, layers, dim), tied=base.tied)
            least = parameter_count(dataclasses.replace(shape, ffn_dim=16))
            if least > parameters:
                break
            slope = parameter_count(dataclasses.replace(shape, ffn_dim=32)) - least
            step = max(1, 1 + round((parameters - least) / slope))
            shape = dataclasses.replace(shape, ffn_dim=16 * step)
            miss = abs(parameter_count(shape) / parameters - 1)
            aspect = abs(math.log(dim * base.layers / (layers * base.dim)))
            odd = aspect + abs(math.log(shape.hidden_dim / (dim * usual)))
            rank = (miss > _CLOSE, miss if miss > _CLOSE else odd, miss)
            if best is None or rank < best[0]:
                best = (rank, shape)
    if best is None:
        raise UserError(f"study: no decoder of {parameters:,} parameters has the recipe's heads")
    return best[1]


def matched_steps(shape: DecoderConfig, config: Config, flops: int) -> int:
    """Steps of the recipe's pretraining that come closest to so many training FLOPs; 1 at least."""
    training = config.pretrain
    per_step = shape.train_flops(training.batch_size * training.context, training.context)
    return max(1, round(flops / per_step))
