"""A training that takes milliseconds a step: linear regression through the real loop.

Also a program: python toy.py FOLDER STEPS SECONDS_PER_ELEMENT [HEARTBEAT_TIMEOUT [START_TIMEOUT]]
trains, on all devices of all processes of its job, so that a test can stop it at any moment.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlp_memory.artifacts import Directory, UserError, begin
from mlp_memory.decoder.layers import parameter
from mlp_memory.parallel.config import HostsConfig, MeshConfig
from mlp_memory.parallel.hosts import joined
from mlp_memory.parallel.mesh import make_mesh
from mlp_memory.training import checkpoints
from mlp_memory.training.batches import Batches
from mlp_memory.training.config import TrainConfig
from mlp_memory.training.loop import Task, train

SETTINGS = dict(batch_size=4, eval_every=5, log_every=1, learning_rate=0.05, warmup=3, weight_decay=0.01)


class Line(nnx.Module):
    """y = x w + b for x [N, 3]."""

    def __init__(self, rngs: nnx.Rngs):
        self.kernel = parameter(rngs, (3, 2), ("input", "embed"), 1.0)
        self.bias = parameter(rngs, (2,), ("embed",), None)

    def __call__(self, x_Nx3: jax.Array) -> jax.Array:
        return x_Nx3 @ self.kernel[...] + self.bias[...]


class Points:
    """Elements of two points each; some carry no weight."""

    def __init__(self, count: int = 30, seconds: float = 0.0, change: Callable | None = None):
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(count, 2, 3)).astype(np.float32)
        self.y = self.x @ rng.normal(size=(3, 2)).astype(np.float32) + 0.1
        self.weight = (rng.random((count, 2)) < 0.8).astype(np.float32)
        self.seconds, self.change = seconds, change

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        time.sleep(self.seconds)
        element = {"x": self.x[index], "y": self.y[index], "weight": self.weight[index]}
        element = self.change(index, element) if self.change else element
        return {**element, "rows": np.int64(2 * index)}


def squared_error(model: Line, frozen: Any, batch: dict[str, jax.Array], *_: jax.Array) -> jax.Array:
    error = (model(batch["x"].reshape(-1, 3)) - batch["y"].reshape(-1, 2)) ** 2
    return (error.sum(-1) * batch["weight"].reshape(-1)).sum()


def make_task(source: Points, config: TrainConfig, **changes: Any) -> Task:
    def evaluate(model: Line) -> dict[str, float]:
        return {"validation_loss": float(jnp.square(model(source.x) - source.y).mean())}

    settings = dict(
        name="toy",
        make_model=Line,
        loss=squared_error,
        batches=Batches(source, config.batch_size, config.seed),
        evaluate=evaluate,
        unit="points",
        unit_per_step=config.batch_size,
    )
    return Task(**{**settings, **changes})


def train_toy(
    folder: str, config: TrainConfig, source: Points | None = None, devices: int = 1, **changes: Any
) -> Any:
    """Trains in `folder`, or goes on there; returns the finished manifest."""
    directory = Directory(folder)
    manifest = begin(directory, "toy", {"steps": config.steps}, {})
    task = make_task(source or Points(), config, **changes)
    # Several devices share the parameters too.
    mesh = make_mesh(MeshConfig(fsdp=2 if devices > 1 else 1), jax.devices()[:devices])
    return train(task, directory, manifest, config, mesh, {})


def load_toy(folder: str) -> dict[str, Any]:
    """The published parameters."""
    from mlp_memory.artifacts import require

    directory = Directory(folder)
    model = nnx.eval_shape(lambda: Line(nnx.Rngs(0)))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    found = checkpoints.restore(directory, require(directory, "toy"), model, mesh)
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(found)))


def main() -> None:
    folder, steps, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    waits = dict(zip(("heartbeat_timeout", "start_timeout"), map(float, sys.argv[4:])))
    with joined(HostsConfig(**waits)) as hosts:
        hosts.start_jax()
        devices = jax.device_count()
        train_toy(folder, TrainConfig(steps=steps, **SETTINGS), Points(seconds=seconds), devices)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
