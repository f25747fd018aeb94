"""Time per token of decoding: a decoder alone, with memories of two sizes, and decoders of equal parameters.

Random weights: what is timed does not depend on them. Contenders take turns in one process, a round each;
the figure is the median round.

    python benchmarks/decode.py --dim=512 --layers=12 --context=512 --batch=8
"""

import argparse
import dataclasses
import statistics
import time

import jax
import numpy as np
from flax import nnx

from mlp_memory.decoder.config import DecoderConfig, Tap, equal_parameters
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.inference.config import GenerateConfig
from mlp_memory.inference.generate import Steps
from mlp_memory.inference.next_token import Mixture
from mlp_memory.inference.sampling import Filters, Numbers
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory
from mlp_memory.training.loop import compute_dtype


def count(model: nnx.Module) -> int:
    """Scalars in all parameters."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(model)))


def memory_of(share: float, decoder: Decoder) -> Memory:
    """A memory of about `share` of the decoder's parameters, head included, as deep as that allows.

    Where the head alone is more, one block on a narrower state.
    """
    config, wanted = decoder.config, share * count(decoder)
    shape = MemoryConfig("llama", 1, config.dim, 0, input_dim=config.dim, vocab_size=config.vocab_size)
    block = shape.matmul_parameters() - config.dim * config.vocab_size
    layers = round((wanted - config.dim * config.vocab_size) / block)
    if layers < 1:
        width = max(16, int(wanted / (config.vocab_size + config.dim)) // 16 * 16)
        shape, layers = dataclasses.replace(shape, dim=width), 1
    return Memory(dataclasses.replace(shape, layers=layers), nnx.Rngs(1))


class Contender:
    """A model that decodes after prompts of a length, `steps` tokens at a time."""

    def __init__(self, decoder: Decoder, memory: Memory | None, args: argparse.Namespace):
        self.parameters = count(decoder) + (count(memory) if memory else 0)
        self._memory = f"{count(memory) / 1e6:.1f} M" if memory else "–"
        self._config = GenerateConfig(max_tokens=args.rounds * args.steps + 8)
        mixture = Mixture(decoder, memory, 0.3, Tap(), compute_dtype(args.dtype))
        self._model, self._numbers = Steps(mixture, Filters.of(self._config)), Numbers.of(self._config)
        prompts = np.random.default_rng(0).integers(0, args.vocab, (args.batch, args.context)).tolist()
        self._state = self._model.begin(prompts, self._config)
        self.round(4)  # compiles
        self.seconds: list[float] = []

    def round(self, steps: int) -> float:
        """Seconds a step."""
        start = time.perf_counter()
        for _ in range(steps):
            self._state = self._model.advance(self._state, self._numbers)
        jax.block_until_ready(self._state.token_B)
        return (time.perf_counter() - start) / steps

    def row(self, name: str, base: float) -> str:
        step = statistics.median(self.seconds)
        ratios = f"{step / base:.2f}"
        return f"| {name} | {self.parameters / 1e6:.1f} M | {self._memory} | {1e3 * step:.2f} | {ratios} |"


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("dim", 512), ("layers", 12), ("vocab", 32000), ("context", 512), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=8, help="tokens of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    args = parser.parse_args()
    shape = DecoderConfig(
        layers=args.layers, dim=args.dim, heads=args.dim // 64, vocab_size=args.vocab, tied=True
    )
    decoder = Decoder(shape, nnx.Rngs(0))
    contenders = {"decoder alone": Contender(decoder, None, args)}
    for name, share in (("1/7", 1 / 7), ("1/1", 1.0)):
        memory = memory_of(share, decoder)
        contenders[f"decoder + memory of {name}"] = Contender(decoder, memory, args)
        peer = Decoder(equal_parameters(shape, count(decoder) + count(memory)), nnx.Rngs(2))
        contenders[f"decoder as large as with {name}"] = Contender(peer, None, args)
    for _ in range(args.rounds):
        for contender in contenders.values():
            contender.seconds.append(contender.round(args.steps))
    base = statistics.median(contenders["decoder alone"].seconds)
    where = f"d = {args.dim}, V = {args.vocab}, {jax.devices()[0].device_kind}"
    print(f"batch {args.batch}, after {args.context} tokens, {where}")
    print("| model | parameters | of them memory | ms a step | ÷ decoder alone |\n|---|---:|---:|---:|---:|")
    for name, contender in contenders.items():
        print(contender.row(name, base))


if __name__ == "__main__":
    main()
