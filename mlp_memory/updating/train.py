"""The memory of an update: the base's, trained on at the chosen rows."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mlp_memory.arrays import ArrayReader
from mlp_memory.artifacts import Directory, Manifest
from mlp_memory.memory.config import DistillConfig, MemoryConfig
from mlp_memory.memory.distill import ValidationRows, distill_task, validate
from mlp_memory.memory.mlp import Memory
from mlp_memory.memory.states import States
from mlp_memory.targets.asked import ChosenBlocks
from mlp_memory.training.batches import Batches
from mlp_memory.training.loop import train
from mlp_memory.updating.config import UpdateConfig

_RATE = 1 / 8
"""Of distillation's learning rate."""


class JoinedStates:
    """States of blocks, each from the base's datastore or from the update's (see `ChosenBlocks.source`)."""

    def __init__(self, before: States, now: States, old_rows: int):
        self._before, self._now, self._old_rows = before, now, old_rows
        self.shape, self.frozen = now.shape, now.frozen

    def block(self, start: int, rows: int) -> dict[str, np.ndarray]:
        states = self._before if start + rows <= self._old_rows else self._now
        return states.block(start, rows)

    def shapes(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        return self._now.shapes(rows)

    def of(self, frozen: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return self._now.of(frozen, batch)


class ChosenSource:
    """Training elements, as of `distill.TargetSource`, of the chosen blocks.

    A deleted row has no next token to learn: the one it gets is drawn from its teacher, which says
    what the other documents would.
    """

    def __init__(self, asked: ChosenBlocks, states: States, targets: Directory, block_rows: int, seed: int):
        self._asked, self._states, self._block, self._seed = asked, states, block_rows, seed
        self._ids, self._probs = ArrayReader(targets, "token_ids"), ArrayReader(targets, "probs")

    def __len__(self) -> int:
        return len(self._asked) // self._block

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start, stop = index * self._block, (index + 1) * self._block
        token_ids, probs = self._ids[start:stop], self._probs[start:stop]
        first = int(self._asked.rows(start, start + 1)[0])
        labels_R = self._asked.labels(start, stop)
        deleted_R = self._asked.is_deleted(start, stop)
        if deleted_R.any():
            drawn_R = _draw(token_ids, probs, np.random.default_rng([self._seed, first]))
            labels_R = np.where(deleted_R, drawn_R, labels_R)
        return {
            "token_ids": token_ids,
            "probs": probs,
            "labels": labels_R.astype(np.int32),
            "weight": self._asked.asks(start, stop).astype(np.float32),
            **self._states.block(first, self._block),
            "rows": np.int64(first),
        }


def _draw(token_ids_RxM: np.ndarray, probs_RxM: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A token of each distribution, int64 [R]; the first where it is empty."""
    cumulative_RxM = np.cumsum(probs_RxM.astype(np.float64), axis=1)
    point_R = rng.random(len(probs_RxM)) * cumulative_RxM[:, -1]
    place_R = np.where(cumulative_RxM[:, -1] > 0, (cumulative_RxM <= point_R[:, None]).sum(axis=1), 0)
    return token_ids_RxM[np.arange(len(place_R)), place_R].astype(np.int64)


def training(
    config: DistillConfig, update: UpdateConfig, blocks: int, base_facts: dict[str, Any], base_rows: int
) -> DistillConfig:
    """How an update's memory is trained: as it was distilled, but for steps, rate and warm-up.

    Args:
      config: of the distillation.
      update: how it is to be changed.
      blocks: chosen blocks.
      base_facts: of the base's memory.
      base_rows: rows of the stream that it was distilled on.
    """
    passes = update.passes or base_facts.get("passes") or base_facts["train_rows"] / base_rows
    steps = max(math.ceil(passes * blocks / config.batch_size), 1)
    return dataclasses.replace(
        config,
        steps=steps,
        learning_rate=update.learning_rate or config.learning_rate * _RATE,
        warmup=min(update.warmup, steps),
        eval_every=math.ceil(steps / update.evaluations),
    )


def train_on(
    directory: Directory,
    manifest: Manifest,
    memory: Memory,
    model_config: MemoryConfig,
    config: DistillConfig,
    asked: ChosenBlocks,
    states: States,
    targets: Directory,
    validation: ValidationRows,
    mesh: Mesh,
    facts: dict[str, Any],
) -> Manifest:
    """Trains a memory on at the chosen blocks and publishes the last state as `directory`.

    Args:
      directory: where the artifact goes.
      manifest: of that artifact, begun.
      memory: the base's.
      model_config: its shape.
      config: of `training`.
      asked, states, targets: the rows, what is read of them, their teachers.
      validation: held-out rows.
      mesh: devices.
      facts: for the manifest.

    Raises:
      UserError: a loss that is not finite, a damaged array.
    """
    source = ChosenSource(asked, states, targets, config.block_rows, config.seed)
    task = dataclasses.replace(
        distill_task(model_config, config, states, mesh),
        name="update",
        batches=Batches(source, config.batch_size, config.seed, config.read_threads),
        evaluate=validate(validation, mesh, config),
        initial=nnx.to_pure_dict(nnx.state(memory)),
        publish_last=True,
    )
    return train(task, directory, manifest, config, mesh, facts)
