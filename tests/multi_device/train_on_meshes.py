"""A program: trains decoder and memory on meshes of this process's devices.

python train_on_meshes.py INPUTS OUTPUT MESH..., MESH as "data=2,fsdp=2,tensor=2". INPUTS holds
the streams and arrays that the test wrote. OUTPUT/MESH.npz gets parameters and losses.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from mlp_memory.arrays import ArrayReader
from mlp_memory.artifacts import Directory, begin
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.decoder.config import DecoderConfig, PretrainConfig
from mlp_memory.decoder.pretrain import load_decoder, pretrain
from mlp_memory.memory.config import DistillConfig, MemoryConfig
from mlp_memory.memory.distill import ValidationRows, distill, load_memory
from mlp_memory.memory.states import StoredStates
from mlp_memory.parallel.config import HostsConfig, MeshConfig
from mlp_memory.parallel.hosts import joined
from mlp_memory.parallel.mesh import make_mesh
from mlp_memory.parallel.sharding import RULES
from mlp_memory.training.checkpoints import StepCheckpoints

DECODER = DecoderConfig(layers=2, dim=16, heads=4, ffn_dim=32, bias="all", vocab_size=40)
MEMORY = MemoryConfig(style="llama", layers=2, dim=16, ffn_dim=32, input_dim=8, vocab_size=40)
COMMON = dict(steps=20, eval_every=10, learning_rate=0.01, warmup=5, weight_decay=0.1, log_every=1)
# Adam divides by a gradient's size: where that is rounding alone, so would be the step.
COMMON |= dict(epsilon=1e-5)
PRETRAIN = PretrainConfig(batch_size=8, context=12, eval_rows=100, **COMMON)
DISTILL = DistillConfig(batch_size=8, block_rows=4, accumulate=1, **COMMON)

_save = StepCheckpoints.save


def checking_save(self: StepCheckpoints, step: int, state: dict, figures: dict) -> None:
    """Saves as ever; asserts first that the state is sharded as the rules say."""
    for name, tree in (
        ("params", state["params"]),
        ("mu", state["opt"][1][0].mu),
        ("nu", state["opt"][1][0].nu),
    ):
        for path, value in nnx.traversals.flatten_mapping(tree).items():
            mesh = value.sharding.mesh
            wanted = NamedSharding(mesh, jax.sharding.PartitionSpec(*(RULES[a] for a in AXES_OF[path])))
            assert value.sharding.is_equivalent_to(wanted, value.ndim), (name, path, value.sharding)
            pieces = [mesh.shape[RULES[a]] if RULES[a] else 1 for a in AXES_OF[path]]
            shard = tuple(size // piece for size, piece in zip(value.shape, pieces))
            assert value.addressable_shards[0].data.shape == shard, (name, path)
    _save(self, step, state, figures)


AXES_OF: dict = {}


def remember_axes(model: nnx.Module) -> None:
    AXES_OF.clear()
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        AXES_OF[path] = variable.get_metadata()["logical_axes"]


def train_decoder(inputs: Path, folder: Path, mesh: jax.sharding.Mesh, config: PretrainConfig) -> None:
    from mlp_memory.decoder.transformer import Decoder

    remember_axes(nnx.eval_shape(lambda: Decoder(DECODER, nnx.Rngs(0))))
    streams = [TokenStream.open(Directory(inputs / name)) for name in ("train", "validation")]
    directory = Directory(folder)
    pretrain(directory, begin(directory, "decoder", {}, {}), DECODER, config, *streams, mesh)


def train_memory(inputs: Path, folder: Path, mesh: jax.sharding.Mesh) -> None:
    from mlp_memory.memory.mlp import Memory

    remember_axes(nnx.eval_shape(lambda: Memory(MEMORY, nnx.Rngs(0))))
    directory = Directory(folder)
    rng = np.random.default_rng(5)
    validation = ValidationRows(
        rng.normal(size=(50, 8)).astype(np.float32),
        np.log(rng.random(50)).astype(np.float32),
        rng.integers(0, 40, 50).astype(np.int32),
    )
    distill(
        directory,
        begin(directory, "memory", {}, {}),
        MEMORY,
        DISTILL,
        TokenStream.open(Directory(inputs / "train")),
        StoredStates(ArrayReader(Directory(inputs / "datastore"), "keys")),
        Directory(inputs / "targets"),
        validation,
        mesh,
    )


def results(folder: Path, model: nnx.Module) -> dict[str, np.ndarray]:
    found = {
        ".".join(map(str, path)): np.asarray(jax.device_get(v.get_value()))
        for path, v in nnx.to_flat_state(nnx.state(model))
    }
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(line)
        for name in ("loss", "validation_loss", "gradient_norm"):
            if name in line:
                found[f"{name} at {line['step']}"] = np.float64(line[name])
    return found


def mesh_of(text: str) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(**{k: int(v) for k, v in (part.split("=") for part in text.split(","))}))


class Stop(Exception):
    """Stands for a kill between two starts on different meshes."""


def change_of_mesh(inputs: Path, folder: Path, first: str, second: str) -> None:
    """Ten steps on one mesh, the rest on another."""

    def stopping_save(self: StepCheckpoints, step: int, state: dict, figures: dict) -> None:
        checking_save(self, step, state, figures)
        if step == 10:
            raise Stop

    StepCheckpoints.save = stopping_save
    try:
        train_decoder(inputs, folder, mesh_of(first), PRETRAIN)
    except Stop:
        StepCheckpoints.save = checking_save
    train_decoder(inputs, folder, mesh_of(second), PRETRAIN)


def main() -> None:
    inputs, output = Path(sys.argv[1]), Path(sys.argv[2])
    with joined(HostsConfig()) as hosts:
        hosts.start_jax()
        StepCheckpoints.save = checking_save
        output.mkdir(parents=True, exist_ok=True)
        for text in sys.argv[3:]:
            if text.startswith("change:"):
                _, first, second = text.split(":")
                folder = output / "change"
                change_of_mesh(inputs, folder / "decoder", first, second)
                mesh = mesh_of(second)
                found = results(
                    folder / "decoder", load_decoder(Directory(folder / "decoder"), "pretrain", mesh)[0]
                )
            else:
                folder, mesh = output / text, mesh_of(text)
                train_decoder(inputs, folder / "decoder", mesh, PRETRAIN)
                found = results(
                    folder / "decoder", load_decoder(Directory(folder / "decoder"), "pretrain", mesh)[0]
                )
                train_memory(inputs, folder / "memory", mesh)
                memory = results(folder / "memory", load_memory(Directory(folder / "memory"), mesh)[0])
                found |= {f"memory {name}": value for name, value in memory.items()}
            if jax.process_index() == 0:
                np.savez(output / f"{folder.name}.npz", **found)


if __name__ == "__main__":
    main()
