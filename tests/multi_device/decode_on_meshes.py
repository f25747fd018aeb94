"""A program: continues and scores texts with models spread over meshes of this process's eight devices.

python decode_on_meshes.py SEED: a JSON line for each mesh with the texts, greedy and drawn, and with the
log-likelihoods of what goes on from a prompt, at two λ.
"""

import json
import sys

import jax
import numpy as np
from flax import nnx

from mlp_memory.decoder.config import DecoderConfig, Tap
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.inference.config import GenerateConfig
from mlp_memory.inference.continuations import ContinuationScorer
from mlp_memory.inference.generate import Steps, generate
from mlp_memory.inference.next_token import Mixture
from mlp_memory.inference.sampling import Filters
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory
from mlp_memory.parallel.config import MeshConfig
from mlp_memory.parallel.mesh import make_mesh
from mlp_memory.parallel.sharding import state_shardings

DECODER = DecoderConfig(layers=2, dim=16, heads=4, kv_heads=2, ffn_dim=32, vocab_size=40)
MEMORY = MemoryConfig("llama", 2, 16, 32, input_dim=16, vocab_size=40)
MESHES = [None, MeshConfig(data=2, fsdp=2, tensor=2)]
SETTINGS = [GenerateConfig(max_tokens=9), GenerateConfig(max_tokens=9, temperature=0.9, top_p=0.9, seed=7)]


def spread(model: nnx.Module, config: MeshConfig | None) -> nnx.Module:
    """The model laid out over a mesh by the rules, or as it is."""
    if config is None:
        return model
    graphdef, state = nnx.split(model)
    shardings = state_shardings(state, make_mesh(config))
    placed = jax.device_put(nnx.to_pure_dict(state), shardings)
    assert any(not x.is_fully_replicated for x in jax.tree.leaves(placed))
    nnx.replace_by_pure_dict(state, placed)
    return nnx.merge(graphdef, state)


def main() -> None:
    """Prints the texts and scores."""
    seed = int(sys.argv[1])
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 40, n).tolist() for n in (5, 1, 8)]
    decoder, memory = Decoder(DECODER, nnx.Rngs(seed)), Memory(MEMORY, nnx.Rngs(seed + 1))
    for config in MESHES:
        mixture = Mixture(spread(decoder, config), spread(memory, config), 0.4, Tap())
        texts = []
        for settings in SETTINGS:
            found = [[] for _ in prompts]
            for step in generate(Steps(mixture, Filters.of(settings)), prompts, -1, settings):
                for row, token in step:
                    found[row].append(token)
            texts.append(found)
        requests = [
            ([*prompt, *tail], len(prompt)) for prompt in prompts for tail in ([3], [4, 5], [4, 6, 7])
        ]
        scored = ContinuationScorer(mixture, 32, batch_tokens=64)(requests)
        scores = [scored.at("memory", weight)[0].tolist() for weight in (0.0, 0.6)]
        print(json.dumps({"mesh": str(config), "texts": texts, "scores": scores}))


if __name__ == "__main__":
    main()
