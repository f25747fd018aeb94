"""One mesh for everything: axes slice, data, fsdp, tensor."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from mlp_memory.parallel.config import AXES, MeshConfig


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
    if len(devices) == len(jax.devices()) and len(devices) > 1:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=types)
