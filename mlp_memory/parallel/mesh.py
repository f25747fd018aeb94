"""One mesh for everything: axes slice, data, fsdp, tensor. And what programs are compiled for."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from mlp_memory.parallel.config import AXES, MeshConfig

_TARGET: contextvars.ContextVar[tuple[str, Any] | None] = contextvars.ContextVar("target", default=None)


def target_platform() -> str:
    """What programs are compiled for: "cpu", "gpu" or "tpu"; this process's devices unless told otherwise."""
    target = _TARGET.get()
    return target[0] if target else jax.default_backend()


def half_dtype() -> Any:
    """The 16-bit float of computations: bfloat16 unless told otherwise."""
    target = _TARGET.get()
    return target[1] if target else jnp.bfloat16


def compiler_options() -> dict[str, str]:
    """How the target's compiler is to build a training step."""
    if target_platform() != "tpu":
        return {}
    # A product with an operand that is gathered over n devices would become a ring of n products, to hide
    # the gathering. With fsdp = 32 their inner dimension is 128 and each adds up into memory: by the
    # compiler's own reckoning twice the time of gathering first (docs/scale.md).
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


@contextlib.contextmanager
def compiling_for(platform: str, half: Any = jnp.bfloat16) -> Iterator[None]:
    """Programs traced inside are for devices of that platform, which this process need not have.

    Args:
      platform: "cpu", "gpu" or "tpu".
      half: what stands for bfloat16, where a compiler at hand would make float32 of it.
    """
    before = _TARGET.set((platform, half))
    try:
        yield
    finally:
        _TARGET.reset(before)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices (of all processes).

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    types = (AxisType.Auto,) * len(AXES)
    if config.slice > 1 and len({getattr(d, "slice_index", 0) for d in devices}) > 1:
        from jax.experimental import mesh_utils

        grid = mesh_utils.create_hybrid_device_mesh((1, *sizes[1:]), (sizes[0], 1, 1, 1), devices)
        return Mesh(grid, AXES, axis_types=types)
    if len(devices) > 1 and (devices[0].platform == "tpu" or len(devices) == len(jax.devices())):
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=types)
