"""The one training loop: pretraining, distillation, joint training and the baseline.

    resume or initialise -> (step, log, validate and checkpoint)* -> publish the best

A step's figures are read while the next step runs, so the device never waits for the host.
"""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlp_memory.artifacts import Directory, Manifest, UserError
from mlp_memory.parallel.mesh import compiler_options, half_dtype, target_platform
from mlp_memory.parallel.sharding import BATCH, abstract_batch, place_batch, state_shardings
from mlp_memory.training import checkpoints, optimizer
from mlp_memory.training.batches import Batches
from mlp_memory.training.config import TrainConfig
from mlp_memory.training.metrics import Metrics
from mlp_memory.training.progress import Progress

Batch = dict[str, jax.Array]
State = dict[str, Any]
_STOP = "stop"


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, on what, against what.

    Attributes:
      name: for people.
      make_model: builds the model from seeds.
      loss: (model, frozen, batch, key, step) -> the loss summed over the batch, a float32 scalar.
        It is divided by the sum of batch["weight"]; a batch entry "rows" names the
        elements in error messages and is not given to the loss.
      unit: what a step consumes, for the rate shown.
      unit_per_step: how many of them.
      batches: where steps come from; None where the step is only lowered.
      evaluate: validation figures of a model; must hold "validation_loss"; None as above.
      observe: called with the model, the step and the figures of each validation, before its checkpoint.
      frozen: pytree handed to `loss`, not differentiated.
      initial: parameters to start from, a pure dict; None for fresh ones.
      published: the model that becomes of the trained one; None for itself.
      publish_last: whether the last state is published rather than the one of least validation loss.
    """

    name: str
    make_model: Callable[[nnx.Rngs], nnx.Module]
    loss: Callable[[nnx.Module, Any, Batch, jax.Array, jax.Array], jax.Array]
    unit: str
    unit_per_step: int
    batches: Batches | None = None
    evaluate: Callable[[nnx.Module], dict[str, float]] | None = None
    observe: Callable[[nnx.Module, int, dict[str, float]], None] | None = None
    frozen: Any = None
    initial: Any = None
    published: Callable[[nnx.Module], nnx.Module] | None = None
    publish_last: bool = False


def compute_dtype(name: str) -> Any:
    """The dtype of the computation; "auto" is bfloat16 on accelerators, float32 on CPU."""
    if name == "auto":
        name = "float32" if target_platform() == "cpu" else "bfloat16"
    return half_dtype() if name == "bfloat16" else jnp.dtype(name)


class Run:
    """The compiled pieces of one training: initial state, its shardings, the step."""

    def __init__(self, task: Task, config: TrainConfig, mesh: Mesh):
        self.task, self.config, self.mesh = task, config, mesh
        self.graphdef, self.template = nnx.split(nnx.eval_shape(lambda: task.make_model(nnx.Rngs(0))))
        self.tx = optimizer.make_optimizer(config, optimizer.decay_mask(self.template))
        params = state_shardings(self.template, mesh)
        self.abstract = jax.eval_shape(self._start, nnx.to_pure_dict(self.template))
        self.shardings = self._shard_optimizer(params)
        self.step = jax.jit(self._step, donate_argnums=0, compiler_options=compiler_options())

    def _start(self, params: Any) -> State:
        return {"params": params, "opt": self.tx.init(params)}

    def _shard_optimizer(self, params: Any) -> State:
        """Moments are sharded as the parameters they belong to; counts are copied."""
        structure = jax.tree.structure(params)

        def like_params(node: Any) -> bool:
            return jax.tree.structure(node) == structure

        alone = NamedSharding(self.mesh, PartitionSpec())
        opt = jax.tree.map(
            lambda node: params if like_params(node) else alone, self.abstract["opt"], is_leaf=like_params
        )
        return {"params": params, "opt": opt}

    def initial_state(self) -> State:
        if self.task.initial is not None:
            params = jax.device_put(self.task.initial, self.shardings["params"])

            def start(params: Any) -> State:  # what is trained is kept in the template's float32
                template = nnx.to_pure_dict(self.template)
                return self._start(jax.tree.map(lambda x, like: x.astype(like.dtype), params, template))

            return jax.jit(start, out_shardings=self.shardings)(params)

        def fresh() -> State:
            model = self.task.make_model(nnx.Rngs(self.config.seed))
            return self._start(nnx.to_pure_dict(nnx.state(model)))

        return jax.jit(fresh, out_shardings=self.shardings)()

    def abstract_state(self) -> State:
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self.abstract, self.shardings
        )

    def model(self, params: Any) -> nnx.Module:
        state = jax.tree.map(lambda x: x, self.template)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self.graphdef, state)

    def _step(self, state: State, frozen: Any, batch: Batch, step: jax.Array) -> tuple[State, dict[str, Any]]:
        stop = {k: v.max() for k, v in batch.items() if k == _STOP}
        batch = {k: v for k, v in batch.items() if k != _STOP}
        parts = self.config.accumulate
        key = jax.random.fold_in(jax.random.key(self.config.seed), step)
        # Part i takes every parts-th element, so that each device keeps the elements it holds.
        split = {k: jnp.moveaxis(v.reshape(-1, parts, *v.shape[1:]), 1, 0) for k, v in batch.items()}

        def loss_of(params: Any, part: Batch, key: jax.Array) -> jax.Array:
            return self.task.loss(self.model(params), frozen, part, key, step)

        def add(total: Any, xs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            part, index = xs
            found = jax.value_and_grad(loss_of)(state["params"], part, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, found), None

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state["params"]))
        if parts == 1:
            (loss, grads), _ = add(zero, (batch, jnp.uint32(0)))
        else:
            (loss, grads), _ = jax.lax.scan(add, zero, (split, jnp.arange(parts, dtype=jnp.uint32)))
        weight = jnp.maximum(batch["weight"].sum(dtype=jnp.float32), 1.0)
        loss, grads = loss / weight, jax.tree.map(lambda g: g / weight, grads)
        params, opt = optimizer.apply(self.tx, grads, state["opt"], state["params"])
        new = jax.lax.with_sharding_constraint({"params": params, "opt": opt}, self.shardings)
        return new, {"loss": loss, "gradient_norm": optimizer.global_norm(grads), **stop}


class _Reporter:
    """Reads a finished step's figures, stops on a bad loss, writes metrics at their interval."""

    def __init__(self, task: Task, config: TrainConfig, metrics: Metrics, bar: Progress):
        self._task, self._config, self._metrics, self._bar = task, config, metrics, bar
        self._rate = optimizer.schedule(config)
        self._since, self._pending = None, None
        self.stop = False  # asked for in any process; the same in all, as every figure is

    def take(self, done: int, figures: dict[str, jax.Array], rows: np.ndarray | None) -> None:
        """Holds the figures of a step just dispatched, and reports the one before."""
        self.drain()
        self._pending = (done, figures, rows)

    def drain(self) -> None:
        """Reports the step held, if any."""
        if self._pending is None:
            return
        (done, figures, rows), self._pending = self._pending, None
        found = {name: float(value) for name, value in figures.items()}
        self.stop |= bool(found.pop(_STOP, 0))
        bad = [name for name, value in found.items() if not np.isfinite(value)]
        if bad:
            where = "" if rows is None else f", rows {np.unique(rows)[:8].tolist()}"
            raise UserError(
                f"{self._task.name}: the {bad[0].replace('_', ' ')} is {found[bad[0]]} at step {done}"
                f"{where}: lower learning_rate or look at these rows; the last checkpoint is kept"
            )
        self._bar.advance(1, loss=found["loss"])
        if done % self._config.log_every == 0:
            found["learning_rate"] = float(self._rate(done - 1))
            self._metrics.write(done, found, self._speed(done))

    def _speed(self, done: int) -> dict[str, float]:
        """Units per second since the last line; compilation and validation count in."""
        before, self._since = self._since, (done, time.monotonic())
        if before is None:
            return {}
        units = (done - before[0]) * self._task.unit_per_step
        return {f"{self._task.unit}_per_second": units / (self._since[1] - before[1])}


class _StopRequest:
    """Notices SIGTERM, which clouds send before they take a machine back.

    Where there are several processes, each puts what it has noticed into its part of the batch, and the
    step that reads the batch says whether any has: they stop after the same step without a wait for
    each other beyond that step's own.
    """

    def __init__(self):
        self.asked = False
        self._before = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def mark(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """This process's part of a batch with its flag, int8 [B], if there are others."""
        if jax.process_count() == 1:
            return arrays
        return {**arrays, _STOP: np.full(len(arrays["weight"]), self.asked, np.int8)}

    def close(self) -> None:
        signal.signal(signal.SIGTERM, self._before)


def train(
    task: Task,
    directory: Directory,
    manifest: Manifest,
    config: TrainConfig,
    mesh: Mesh,
    facts: dict[str, Any],
) -> Manifest:
    """Trains, or goes on training, and publishes the checkpoint with the lowest validation loss.

    Args:
      task: what is trained.
      directory: the model artifact.
      manifest: of that artifact, begun and unfinished.
      config: how it is trained.
      mesh: devices.
      facts: for the manifest, beside what the training finds out.

    Returns:
      The finished manifest; its facts hold "step" and "validation" of the published checkpoint.

    Raises:
      UserError: the loss is not finite.
      SystemExit: after SIGTERM, the state saved.
    """
    _check_batch(config, mesh)
    run = Run(task, config, mesh)
    steps = checkpoints.StepCheckpoints(directory, config.keep)
    # SIGTERM is let through to Python only once every save is on disk.
    with contextlib.closing(_StopRequest()) as stop, contextlib.closing(steps):
        _take_steps(run, directory, steps, stop)
        best, figures = steps.last() if task.publish_last else steps.best()
        model = run.model(steps.load(best, run.abstract_state())["params"])
    if task.published:
        facts = {**facts, "trained_parameters": checkpoints.count_parameters(model)}
        model = task.published(model)
    return checkpoints.publish(
        directory,
        manifest,
        nnx.to_pure_dict(nnx.state(model)),
        step=best,
        validation=figures,
        parameters=checkpoints.count_parameters(model),
        **facts,
    )


def lower_step(
    task: Task, config: TrainConfig, mesh: Mesh, batch: dict[str, jax.ShapeDtypeStruct]
) -> jax.stages.Lowered:
    """The step that `train` runs, lowered for the mesh's devices, which need not be here.

    Args:
      task: what is trained; `frozen` may be abstract.
      config: how it is trained.
      mesh: devices.
      batch: shape of each array of a step's batch, over all devices.

    Raises:
      UserError: the batch or a parameter does not divide over the mesh.
    """
    _check_batch(config, mesh)
    run = Run(task, config, mesh)
    number = jax.ShapeDtypeStruct((), np.uint32)
    return run.step.lower(run.abstract_state(), task.frozen, abstract_batch(batch, mesh), number)


def _check_batch(config: TrainConfig, mesh: Mesh) -> None:
    parts = math.prod(mesh.shape[axis] for axis in BATCH)
    if (config.batch_size // config.accumulate) % parts:
        raise UserError(
            f"batch_size = {config.batch_size} in {config.accumulate} part(s) does not divide over the "
            f"{parts} devices of mesh axes {', '.join(BATCH)}: change batch_size or the mesh"
        )


def _take_steps(
    run: Run, directory: Directory, steps: checkpoints.StepCheckpoints, stop: _StopRequest
) -> None:
    """From the latest checkpoint, or the start, to the last step."""
    task, config, first = run.task, run.config, steps.latest
    state = run.initial_state() if first is None else steps.load(first, run.abstract_state())
    metrics = Metrics(directory, -1 if first is None else first)

    def validate_and_save(step: int) -> None:
        model = run.model(state["params"])
        figures = {k: float(v) for k, v in task.evaluate(model).items()}
        if not np.isfinite(figures["validation_loss"]):
            raise UserError(
                f"{task.name}: the validation loss is {figures['validation_loss']} at step {step}: lower "
                "learning_rate; the last checkpoint is kept"
            )
        if task.observe:
            task.observe(model, step, figures)
        metrics.write(step, figures)
        metrics.flush()
        steps.save(step, state, figures)
        shown = ", ".join(f"{k.removeprefix('validation_')} {v:.4f}" for k, v in figures.items())
        bar.note(f"{task.name}: step {step}: validation {shown}")

    with Progress(task.name, config.steps, "steps", done=first or 0) as bar, contextlib.closing(metrics):
        report = _Reporter(task, config, metrics, bar)

        def stops() -> bool:
            return report.stop if jax.process_count() > 1 else stop.asked

        if first is None:
            validate_and_save(0)
        else:
            bar.note(f"{task.name}: goes on from step {first}")
        for step, batch in zip(range(first or 0, config.steps), task.batches.from_step(first or 0)):
            rows = batch.get("rows")
            arrays = {k: v for k, v in batch.items() if k != "rows"}
            placed = place_batch(stop.mark(arrays), run.mesh)
            state, figures = run.step(state, task.frozen, placed, np.uint32(step))
            report.take(step + 1, figures, rows)
            if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
                report.drain()
                validate_and_save(step + 1)
                stopping = stops()
            elif stopping := stops():
                report.drain()
                steps.save(step + 1, state, None)
            if stopping:
                raise SystemExit(143)
