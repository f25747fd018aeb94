"""A program: joint training of every kind on one of this process's eight devices and on all.

python joint_on_meshes.py FOLDER: a JSON line for each kind with the largest difference of the
published parameters, absolute and relative in one. FOLDER holds the streams that the test wrote.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from train_on_meshes import DECODER, MEMORY

from mlp_memory.artifacts import Directory, begin
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.decoder.pretrain import load_decoder
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.joint.config import JointConfig
from mlp_memory.joint.gate import SIGNALS, Gate
from mlp_memory.joint.train import train_joint
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory
from mlp_memory.parallel.config import MeshConfig
from mlp_memory.parallel.mesh import make_mesh
from mlp_memory.parallel.sharding import state_shardings

KINDS = [{"kl": 0.5, "adapter_rank": 2, "interpolation": "gate", "learning_rate": 0.006}]
# Adam divides by a gradient's size: where that is rounding alone, so would be the step.
COMMON = dict(steps=4, batch_size=8, context=12, eval_every=4, warmup=1, eval_rows=600, epsilon=1e-3)
EMBED = EmbedConfig(context=12, stride=6, batch_windows=8)


def spread(model: nnx.Module, mesh: jax.sharding.Mesh) -> nnx.Module:
    """The model laid out over a mesh by the rules."""
    graphdef, state = nnx.split(model)
    placed = jax.device_put(nnx.to_pure_dict(state), state_shardings(state, mesh))
    nnx.replace_by_pure_dict(state, placed)
    return nnx.merge(graphdef, state)


def main() -> None:
    """Trains and compares."""
    folder = Path(sys.argv[1])
    streams = [TokenStream.open(Directory(folder / name)) for name in ("train", "validation")]
    shape = MemoryConfig(**{**vars(MEMORY), "input_dim": DECODER.dim})
    meshes = {
        "one": make_mesh(MeshConfig(), jax.devices()[:1]),
        "eight": make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)),
    }
    for number, kind in enumerate(KINDS):
        config = JointConfig(**COMMON, **kind)
        found = {}
        for name, mesh in meshes.items():
            decoder, memory = (
                spread(m, mesh) for m in (Decoder(DECODER, nnx.Rngs(0)), Memory(shape, nnx.Rngs(1)))
            )
            weight, signals = 0.3, np.full(len(SIGNALS) + DECODER.dim, 0.2, np.float32)
            if kind.get("interpolation") == "gate":
                weight = Gate(signals, 1 + signals, signals, np.float32(0.1), np.float32(0.9))
            directory = Directory(folder / f"{name}-{number}")
            manifest = begin(directory, "joint", {}, {})
            train_joint(directory, manifest, config, EMBED, decoder, memory, weight, *streams, mesh)
            found[name] = jax.tree.leaves(nnx.state(load_decoder(directory, "joint", mesh)[0]))
        pairs = [tuple(map(np.asarray, pair)) for pair in zip(found["one"], found["eight"])]
        start = jax.tree.leaves(nnx.state(Decoder(DECODER, nnx.Rngs(0))))
        print(
            json.dumps(
                {
                    "kind": kind,
                    "apart": max(float((abs(a - b) / (1 + abs(b))).max()) for a, b in pairs),
                    "moved": max(float(abs(a - np.asarray(s)).max()) for (a, _), s in zip(pairs, start)),
                }
            )
        )


if __name__ == "__main__":
    main()
