"""Time per token of decoding: a decoder alone, with memories, a larger one of equal parameters, and kNN-LM.

Random weights and keys: what is timed does not depend on them. Contenders take turns in one process, a
round each; the figure is the median round. kNN-LM searches a datastore of each size at every step,
exactly over keys in memory and by ScaNN; its growth is fitted, and the size at which a step takes 80
times as long as with the memory.

    python benchmarks/decode.py --dim=512 --layers=12 --context=512 --batch=8
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from mlp_memory.artifacts import Directory, Manifest, finish
from mlp_memory.decoder.config import DecoderConfig, Tap, equal_parameters
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.index import scann_shard
from mlp_memory.index.exact import ExactIndex
from mlp_memory.inference.config import GenerateConfig
from mlp_memory.inference.generate import Steps
from mlp_memory.inference.knn_lm import KnnSteps
from mlp_memory.inference.next_token import Mixture
from mlp_memory.inference.sampling import Filters, Numbers
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory
from mlp_memory.targets.knn import knn_distribution
from mlp_memory.targets.knn_lm import Search
from mlp_memory.training.loop import compute_dtype

_SAMPLE_ROWS = 50_000
_TIMES = 80


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

    def __init__(self, steps: Steps, parameters: int, memory: str, args: argparse.Namespace):
        self.parameters, self._memory, self._model = parameters, memory, steps
        config = GenerateConfig(max_tokens=args.rounds * args.steps + 8)
        self._numbers = Numbers.of(config)
        prompts = np.random.default_rng(0).integers(0, args.vocab, (args.batch, args.context)).tolist()
        self._state = self._model.begin(prompts, config)
        self.round(2)  # compiles
        self.seconds: list[float] = []

    @classmethod
    def of(cls, decoder: Decoder, memory: Memory | None, args: argparse.Namespace) -> "Contender":
        """Decoder and memory, or a decoder alone."""
        mixture = Mixture(decoder, memory, 0.3, Tap(), compute_dtype(args.dtype))
        in_memory = count(memory) if memory else 0
        shown = f"{in_memory / 1e6:.1f} M" if memory else "–"
        return cls(Steps(mixture, Filters.of(GenerateConfig())), count(decoder) + in_memory, shown, args)

    def round(self, steps: int) -> float:
        """Seconds a step."""
        start = time.perf_counter()
        for _ in range(steps):
            self._state = self._model.advance(self._state, self._numbers)
        jax.block_until_ready(self._state.token_B)
        return (time.perf_counter() - start) / steps

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def row(self, name: str, base: float) -> str:
        """Its line of the table."""
        return (
            f"| {name} | {self.parameters / 1e6:.1f} M | {self._memory} | {1e3 * self.median:.2f} | "
            f"{self.median / base:.2f} |"
        )


class Datastore:
    """Keys of 16 dimensions and a little noise, next tokens, and both ways of searching the first N rows."""

    def __init__(self, rows: int, args: argparse.Namespace):
        rng = np.random.default_rng(0)
        axes_RxD = rng.standard_normal((16, args.dim), np.float32)
        self.keys_NxD = np.empty((rows, args.dim), np.float32)
        for start in range(0, rows, 1 << 16):
            part = self.keys_NxD[start : start + (1 << 16)]
            part[:] = rng.standard_normal((len(part), 16), np.float32) @ axes_RxD
            part += 0.3 * rng.standard_normal(part.shape, np.float32)
        self.labels_N = rng.integers(0, args.vocab, rows).astype(np.int32)
        self._folder = tempfile.TemporaryDirectory(prefix="mlp-memory-decode-")

    def exact(self, rows: int) -> Search:
        """Brute force over keys that stay on the device."""
        return ExactIndex(self.keys_NxD[:rows], np.ones(rows, bool)).search

    def scann(self, rows: int, k: int) -> Search:
        """A tree of √N leaves, a fifth of them searched, codes of two dimensions, 4·k reordered."""
        keys = self.keys_NxD[:rows]
        sample = keys[np.sort(np.random.default_rng(1).permutation(rows)[:_SAMPLE_ROWS])]
        leaves = int(rows**0.5)
        trained = scann_shard.train_codes(scann_shard.train_tree(sample, leaves), sample, 2)
        folder = Directory(Path(self._folder.name) / str(rows))
        folder.path.mkdir()
        np.save(folder.path / scann_shard.GAPS, np.zeros(0, np.int64))
        blocks = (keys[start : start + (1 << 16)] for start in range(0, rows, 1 << 16))
        scann_shard.write_shard(folder.path, trained, blocks, *keys.shape)
        finish(folder, Manifest("index_shard", {}, {}), rows=[0, rows], leaves=trained.leaves, bytes={})
        return scann_shard.ScannShard(folder, max(1, leaves // 5), 4 * k, (0, rows)).search

    def distribution(self, search: Search, k: int):
        """Queries to p_kNN; τ is a fixed number, no result depends on it."""

        def answer(queries_BxD: np.ndarray):
            rows, sqdist = search(queries_BxD, k)
            return knn_distribution(rows, sqdist, self.labels_N[rows], 100.0, k)

        return answer


def models(args: argparse.Namespace) -> tuple[Decoder, dict[str, Contender]]:
    """The decoder, and everything that searches nothing."""
    shape = DecoderConfig(
        layers=args.layers, dim=args.dim, heads=args.dim // 64, vocab_size=args.vocab, tied=True
    )
    decoder = Decoder(shape, nnx.Rngs(0))
    found = {"decoder alone": Contender.of(decoder, None, args)}
    for name, share in (("1/7", 1 / 7), ("1/1", 1.0)):
        memory = memory_of(share, decoder)
        found[f"decoder + memory of {name}"] = Contender.of(decoder, memory, args)
        peer = Decoder(equal_parameters(shape, count(decoder) + count(memory)), nnx.Rngs(2))
        found[f"decoder as large as with {name}"] = Contender.of(peer, None, args)
    return decoder, found


def take_turns(contenders: dict[str, Contender], args: argparse.Namespace) -> None:
    """Times them, a round each, in another order each time: who follows a large model finds cold caches."""
    order = np.random.default_rng(4)
    for _ in range(args.rounds):
        for name in order.permutation(list(contenders)):
            contenders[name].seconds.append(contenders[name].round(args.steps))


def growth(rows: list[int], seconds: list[float]) -> tuple[float, float]:
    """c and p of a search's seconds c·N^p, by least squares of logarithms."""
    p, log_c = np.polyfit(np.log(rows), np.log(np.maximum(seconds, 1e-6)), 1)
    return float(np.exp(log_c)), float(p)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("dim", 512), ("layers", 12), ("vocab", 32000), ("context", 512), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=8, help="tokens of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--rows", default="", help="datastore sizes for kNN-LM: 10000,100000,1000000")
    parser.add_argument("--k", type=int, default=1024, help="neighbours of kNN-LM")
    parser.add_argument("--searches", default="exact,ScaNN", help="of kNN-LM")
    args = parser.parse_args()
    decoder, contenders = models(args)
    take_turns(contenders, args)
    base = contenders["decoder alone"].median
    where = f"d = {args.dim}, V = {args.vocab}, {jax.devices()[0].device_kind}"
    print(f"batch {args.batch}, after {args.context} tokens, {where}")
    print("| model | parameters | of them memory | ms a step | ÷ decoder alone |\n|---|---:|---:|---:|---:|")
    for name, contender in contenders.items():
        print(contender.row(name, base))
    for share in ("1/7", "1/1"):
        ours = contenders[f"decoder + memory of {share}"].median
        peer = contenders[f"decoder as large as with {share}"].median
        print(f"with a memory of {share}: {peer / ours:.2f} times as fast as a decoder of as many parameters")
    if args.rows:
        knn(decoder, contenders, args)


def knn(decoder: Decoder, contenders: dict[str, Contender], args: argparse.Namespace) -> None:
    """kNN-LM at each size beside the decoder with a memory of 1/7, and the fits."""
    sizes = [int(size) for size in args.rows.split(",")]
    ours = contenders["decoder + memory of 1/7"]
    store, seconds = Datastore(max(sizes), args), {name: [] for name in args.searches.split(",")}
    mixture, filters = (
        Mixture(decoder, None, 0.0, Tap(), compute_dtype(args.dtype)),
        Filters.of(GenerateConfig()),
    )
    print(
        f"\nkNN-LM, k = {args.k}\n| rows | search | ms a step | ÷ decoder + memory of 1/7 | recall |\n"
        "|---:|---|---:|---:|---:|"
    )
    asked = store.keys_NxD[np.random.default_rng(3).integers(0, min(sizes), 64)]
    for rows in sizes:
        exact = store.exact(rows)
        wanted = exact(asked, args.k)[0]
        for name in seconds:
            search = exact if name == "exact" else store.scann(rows, args.k)
            pair = {
                "ours": ours,
                name: Contender(
                    KnnSteps(mixture, filters, store.distribution(search, args.k), 0.3), 0, "", args
                ),
            }
            ours.seconds.clear()
            take_turns(pair, args)
            seconds[name].append(pair[name].median)
            found = search(asked, args.k)[0]
            recall = np.mean([len(np.intersect1d(a, b)) / args.k for a, b in zip(found, wanted)])
            ratio = pair[name].median / ours.median
            print(
                f"| {rows:,} | {name} | {1e3 * pair[name].median:.2f} | {ratio:.2f} | {recall:.3f} |",
                flush=True,
            )
    if len(sizes) < 2:
        return
    base = contenders["decoder alone"].median
    added = max(contenders["decoder + memory of 1/7"].median - base, 1e-9)
    for name, found in seconds.items():
        c, p = growth(sizes, [one - base for one in found])
        limit = ((_TIMES * ours.median - base) / c) ** (1 / p) if p > 0 else float("inf")
        beyond = ", beyond what was measured" if limit > max(sizes) else ""
        print(
            f"{name}: a search takes {1e3 * c * max(sizes) ** p:.1f} ms at {max(sizes):,} rows and grows as "
            f"N^{p:.2f}; a step takes {_TIMES} times the step with the memory from {limit:,.0f} rows "
            f"on{beyond}; at {max(sizes):,} rows the search costs {(found[-1] - base) / added:,.0f} times "
            "what the memory adds"
        )


if __name__ == "__main__":
    main()
