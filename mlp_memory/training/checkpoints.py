"""Checkpoints by Orbax: the training state on the way, the model at the end.

Layout of a model artifact: `steps/` (training state, gone once finished), `model/` (the
result's parameters), `metrics.jsonl`, `manifest.json`.
"""

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mlp_memory import artifacts
from mlp_memory.artifacts import Directory, Manifest, UserError, as_dtype
from mlp_memory.parallel.sharding import state_shardings


def _rank(metrics: dict[str, float]) -> tuple[float, float]:
    """Least first: the best checkpoint, and the earliest of equals."""
    return metrics["validation_loss"], metrics["step"]


class StepCheckpoints:
    """The training states of one run: asynchronous saves, the latest `keep` and the best.

    Args:
      directory: the model artifact.
      keep: how many of the latest to keep.
    """

    def __init__(self, directory: Directory, keep: int):
        policies = ocp.training.preservation_policies
        self._directory = directory / "steps"
        _silence_failed_saves()
        self._checkpointer = ocp.training.Checkpointer(
            self._directory.location,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep),
                    policies.BestN(
                        get_metric_fn=_rank,
                        reverse=True,
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The last whole checkpoint's step, as process 0 sees it."""
        found = self._checkpointer.latest
        step = _of_process_0(-1 if found is None else found.step)
        return None if step < 0 else step

    def best(self) -> tuple[int, dict[str, float]]:
        """The step with the lowest validation loss (the earliest of equals) and its figures.

        Waits until every save is on disk.
        """
        return min(self._validated(), key=lambda found: (found[1]["validation_loss"], found[0]))

    def last(self) -> tuple[int, dict[str, float]]:
        """The last validated step and its figures. Waits as `best` does."""
        return max(self._validated(), key=lambda found: found[0])

    def _validated(self) -> list[tuple[int, dict[str, float]]]:
        with self._saving():
            self._checkpointer.wait()
        found = (c for c in self._checkpointer.checkpoints if c.metrics is not None)
        return [(c.step, {k: v for k, v in c.metrics.items() if k != "step"}) for c in found]

    def save(self, step: int, state: Any, figures: dict[str, float] | None) -> None:
        """Starts a save with its validation figures; returns before it is on disk."""
        metrics = None if figures is None else {**figures, "step": step}
        with self._saving():
            self._checkpointer.save_async(step, state, metrics=metrics)

    def load(self, step: int, abstract: Any) -> Any:
        """The state of a step, in the shapes and shardings of `abstract`."""
        return _load(lambda: self._checkpointer.load(step, abstract), f"{self._directory}/{step}")

    def close(self) -> None:
        """Waits until every save is on disk."""
        with self._saving():
            self._checkpointer.close()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """What goes wrong with a save, this one or one before, in one line."""
        try:
            with _telling_once():
                yield
        except (OSError, ValueError) as error:
            raise UserError(f"cannot save {self._directory}: {artifacts.first_line(error)}") from error


def _silence_failed_saves() -> None:
    """Orbax logs a traceback of a failed save from its threads, and raises it again in ours.

    Tensorstore's threads print others, of an event loop that was closed by the failure while they wrote.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if getattr(loud := sys.unraisablehook, "func", None) is not _tell_but_of_closed_loops:
        sys.unraisablehook = functools.partial(_tell_but_of_closed_loops, loud)


def _tell_but_of_closed_loops(loud: Callable[[Any], None], found: Any) -> None:
    if not (found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"):
        loud(found)


def _of_process_0(step: int) -> int:
    """Process 0's value: what others see of a shared disk may be older."""
    return step if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(step)))


@contextlib.contextmanager
def _telling_once() -> Iterator[None]:
    """Orbax's event loop tells of a failure a second time, in tracebacks of its own while it is taken down.

    The loop is gone with the process, so after a failure they are not let through.
    """
    loud, asyncio_log = sys.unraisablehook, logging.getLogger("asyncio")
    level = asyncio_log.level
    sys.unraisablehook = lambda _: None
    asyncio_log.setLevel(logging.CRITICAL + 1)
    yield
    sys.unraisablehook = loud
    asyncio_log.setLevel(level)


def _load(read: Callable[[], Any], where: str) -> Any:
    """What `read` gives; a checkpoint that cannot be read is one line."""
    try:
        with _telling_once():
            return read()
    except Exception as error:  # Orbax has no one class for "this checkpoint is damaged"
        raise UserError(
            f"cannot read checkpoint {where}: {artifacts.first_line(error)}; "
            "delete its folder and run the stage again"
        ) from error


@jax.jit
def _checksum(x: jax.Array, layer: jax.Array | None) -> jax.Array:
    """Σ bits_i · (2i + 1) mod 2^32 over the float32 values of a layer; i counts over all layers."""
    values_N = (x if layer is None else x[layer]).reshape(-1)
    bits_N = jax.lax.bitcast_convert_type(values_N.astype(jnp.float32), jnp.uint32)
    index_N = jnp.arange(values_N.size, dtype=jnp.uint32)
    if layer is not None:
        index_N += layer * jnp.uint32(values_N.size)
    return (bits_N * (2 * index_N + 1)).sum(dtype=jnp.uint32)


def checksums(params: Any) -> dict[str, str]:
    """A checksum per parameter, by path, that does not depend on how it is sharded."""
    found = {}
    for path, x in nnx.traversals.flatten_mapping(params).items():
        # Layer by layer: a scan over them would turn all of a bfloat16 parameter into float32 first.
        layers = map(np.uint32, range(len(x))) if path[0] == "blocks" else [None]
        total = sum(int(_checksum(x, layer)) for layer in layers)
        found[".".join(map(str, path))] = f"{total % (1 << 32):08x}"
    return found


_LEAST_IN_FLIGHT = 1 << 26
"""Bytes on their way to or from a disk, where no parameter is larger."""


def _bounded(params: Any) -> ocp.Context:
    """Saving and loading that hold the largest parameter beside the model rather than a copy of it."""
    context = ocp.Context()
    # The files of a checkpoint are filled in memory, to 2 GB if not told otherwise.
    context.array.saving.ocdbt_target_data_file_size = _LEAST_IN_FLIGHT
    # Orbax wants the limit above what it lets through, not at it.
    most = 1 + max(_LEAST_IN_FLIGHT, *(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)))
    memory = context.memory
    memory.write_concurrent_bytes = memory.transfer_concurrent_bytes = memory.read_concurrent_bytes = most
    return context


def publish(directory: Directory, manifest: Manifest, params: Any, **facts: Any) -> Manifest:
    """Writes a model's parameters and declares its artifact whole.

    Facts of every such artifact: `checksums`, and `dtypes` of parameters other than float32.
    """
    # First the checksums: what saving has used is not all given back at once.
    facts["checksums"] = checksums(params)
    with _bounded(params), _telling_once():
        ocp.save((directory / "model").location, params, overwrite=True)
    flat = nnx.traversals.flatten_mapping(params)
    dtypes = {".".join(map(str, path)): value.dtype.name for path, value in flat.items()}
    if other := {name: dtype for name, dtype in dtypes.items() if dtype != "float32"}:
        facts["dtypes"] = other
    if jax.process_index() == 0:
        artifacts.finish(directory, manifest, **facts)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"published {directory}")
    return artifacts.peek(directory)


def restore(directory: Directory, manifest: Manifest, model: nnx.Module, mesh: Mesh) -> nnx.Module:
    """Fills an abstract model (`nnx.eval_shape`) with an artifact's parameters.

    Raises:
      UserError: the checkpoint is damaged or of another shape.
    """
    graphdef, state = nnx.split(model)
    shardings = state_shardings(state, mesh)
    dtypes, expected = _mapping(directory, manifest, "dtypes"), _mapping(directory, manifest, "checksums")
    flat_shardings = nnx.traversals.flatten_mapping(shardings)
    abstract = nnx.traversals.unflatten_mapping(
        {
            path: jax.ShapeDtypeStruct(
                variable.get_value().shape,
                as_dtype(dtypes.get(".".join(map(str, path)), "float32")),
                sharding=flat_shardings[path],
            )
            for path, variable in nnx.to_flat_state(state)
        }
    )
    where = (directory / "model").location
    with _bounded(abstract):
        params = _load(lambda: ocp.load(where, abstract), where)
    wrong = [n for n, c in checksums(params).items() if expected.get(n) != c]
    if wrong:
        raise UserError(
            f"checkpoint {where}: {wrong[0]} is not what was saved; delete it and run the stage again"
        )
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def _mapping(directory: Directory, manifest: Manifest, fact: str) -> dict[str, Any]:
    found = manifest.facts.get(fact, {})
    if not isinstance(found, dict):
        raise UserError(f"{directory}/{artifacts.MANIFEST}: {fact} = {found!r} is not by parameter")
    return found


def damaged_parameter(directory: Directory, manifest: Manifest) -> str | None:
    """The first parameter in `directory`/model that is not what the manifest says was published.

    Raises:
      UserError: the checkpoint cannot be read.
    """
    expected = _mapping(directory, manifest, "checksums")
    where, device = (directory / "model").location, jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def read() -> Any:  # whatever devices it was saved from
        return ocp.load(
            where,
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
                ocp.metadata(where).metadata,
            ),
        )

    found = checksums(_load(read, where))
    return next((name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)), None)


def count_parameters(model: nnx.Module) -> int:
    """Scalars in all parameters."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
