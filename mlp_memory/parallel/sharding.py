"""From logical axis names to mesh axes: one table, which must cover every parameter."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlp_memory.artifacts import UserError

BATCH = ("slice", "data", "fsdp")
"""Mesh axes that split a batch's first axis."""

RULES: dict[str, str | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "mlp": "tensor",
    "norm": None,
    "position": None,
    "input": None,
    "rank": None,
}
"""Logical axis -> mesh axis (None: replicated)."""


def spec(logical_axes: tuple[str, ...]) -> P:
    """The partition of a parameter with these axes.

    Raises:
      KeyError: an axis is not in `RULES`.
    """
    return P(*(RULES[axis] for axis in logical_axes))


def state_shardings(state: nnx.State, mesh: Mesh) -> Any:
    """NamedShardings with the structure of `nnx.to_pure_dict(state)`.

    Raises:
      UserError: a dimension does not divide over its mesh axis.
      ValueError: a parameter has no logical axes or the wrong number of them.
    """
    shardings = {}
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        axes = variable.get_metadata().get("logical_axes")
        shape = variable.get_value().shape
        if axes is None or len(axes) != len(shape):
            raise ValueError(f"{name}{shape} has logical axes {axes}")
        for size, axis in zip(shape, spec(axes)):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"{name} has a dimension of {size}, which does not divide over mesh axis "
                    f"{axis}={mesh.shape[axis]}: change mesh.{axis} or that size"
                )
        shardings[path] = NamedSharding(mesh, spec(axes))
    return nnx.traversals.unflatten_mapping(shardings)


def abstract_batch(batch: dict[str, jax.ShapeDtypeStruct], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `place_batch` makes."""
    sharding = NamedSharding(mesh, P(BATCH))
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding) for k, v in batch.items()}


def without_numbers(make: Callable[[], nnx.Module], mesh: Mesh) -> nnx.Module:
    """The model that `make` makes, shapes instead of arrays, laid out over a mesh that need not be here."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    shapes = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nnx.to_pure_dict(state),
        state_shardings(state, mesh),
    )
    nnx.replace_by_pure_dict(state, shapes)
    return nnx.merge(graphdef, state)


def place_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch, NumPy, as global arrays split over the batch axes."""
    sharding = NamedSharding(mesh, P(BATCH))
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def place_whole_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """A batch that every process holds whole, as global arrays split over the batch axes."""
    sharding = NamedSharding(mesh, P(BATCH))
    return {k: jax.make_array_from_callback(v.shape, sharding, v.__getitem__) for k, v in batch.items()}
