"""What the memory would be worth as a drafter: how often its proposals stand, and what they cost.

The drafter is the decoder up to the tap with the memory behind it, p_M; the full model is the mixture.
Drafted tokens are kept as speculative sampling keeps them, so a proposal stands with probability
Σ_v min(p_M, p), here over held-out text. A round drafts n tokens, reads on with what the drafter has not
computed, and checks them all at once; at best it takes as long as reading the weights it needs:

    speed-up(n) = (1 − a^(n+1)) / (1 − a) / ((n + 1)·c + 1 − c),   a proposals that stand, c drafter's share

Neither rejected work nor the checks' own time is counted: a bound.

    python benchmarks/speculative.py --workdir=runs/enwiki_small --rows=4096
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mlp_memory
from mlp_memory.artifacts import Directory
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.decoder.config import DecoderConfig, Tap
from mlp_memory.memory.config import MemoryConfig


def drafter_share(decoder: DecoderConfig, memory: MemoryConfig, tap: Tap) -> float:
    """Weights that the drafter's step reads, of those of the full step."""
    head = decoder.dim * decoder.vocab_size
    block = (decoder.matmul_parameters() - head) / decoder.layers
    below = block * (tap.index(decoder.layers) + 1)
    below -= decoder.ffn_parameters() if tap.kind == "ffn_input" else 0
    full = decoder.matmul_parameters() + memory.matmul_parameters()
    return (below + memory.matmul_parameters()) / full


def speed_up(stands: float, share: float, drafted: int) -> float:
    """The bound for a number of drafted tokens."""
    tokens = sum(stands**i for i in range(drafted + 1))
    return tokens / ((drafted + 1) * share + 1 - share)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--rows", type=int, default=4096, help="of the validation split")
    parser.add_argument("--context", type=int, default=256, help="tokens of a stretch")
    args = parser.parse_args()
    model = mlp_memory.load(args.workdir)
    mixture, context = model.mixture, args.context
    stream = TokenStream.open(Directory(args.workdir) / "corpus/validation")

    @jax.jit
    def compare(parameters: dict[str, Any], tokens_1xT: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden, tapped = mixture.read(parameters, tokens_1xT)
        found = mixture.next_token(parameters, hidden[0], tapped[0])
        stands_T = jnp.exp(jnp.minimum(found.memory_NxV, found.mixture_NxV)).sum(-1)
        return stands_T, found.memory_NxV.argmax(-1) == found.mixture_NxV.argmax(-1)

    starts = np.linspace(0, len(stream) - context, max(1, args.rows // context)).astype(int)
    rows = (stream.tokens[start : start + context][None].astype(np.int32) for start in starts)
    pairs = [compare(mixture.parameters, tokens_1xT) for tokens_1xT in rows]
    stands, agree = (float(np.mean([np.asarray(x) for x in column])) for column in zip(*pairs))
    decoder, memory = mixture.models()
    share = drafter_share(decoder.config, memory.config, mixture.tap)
    best = max(range(1, 9), key=lambda n: speed_up(stands, share, n))
    print(
        f"{len(starts) * context:,} positions: a proposal stands with {stands:.3f}, the likeliest tokens "
        f"agree on {agree:.3f}; the drafter reads {share:.2f} of the weights; at best {best} drafted, "
        f"{speed_up(stands, share, best):.2f} times as fast"
    )


if __name__ == "__main__":
    main()
