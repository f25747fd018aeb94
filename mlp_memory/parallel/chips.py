"""What chips can do, by their makers' data sheets, and the topologies that a plan may name.

Sources, in words. TPU v5e and v5p: Google Cloud's system architecture pages (peak in bfloat16, HBM and
its bandwidth, inter-chip interconnect of 1,600 and 4,800 Gbit/s a chip, over 4 and 6 links). H100 and
H200: NVIDIA's data sheets of the SXM modules (dense bfloat16, without sparsity; NVLink of 900 GB/s both
ways, so 450 one way), in machines of 8 with a network card of 400 Gbit/s for each GPU. Prices are list
prices of 2025, on demand and for one chip: Google's in the United States for TPUs, and an eighth of
Amazon's p5 and p5en machines for GPUs. Prices change: --price overrides.
"""

import dataclasses
import math
import re

from mlp_memory.artifacts import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: for people.
      platform: "tpu" or "gpu".
      flops: peak FLOPs a second in bfloat16, dense.
      memory: HBM in bytes.
      bandwidth: of it, bytes a second.
      link: bytes a second, one way, of one link to a neighbour (TPU), or of all links of a GPU to the
        others of its machine.
      network: bytes a second, one way, between machines; 0 where links reach every chip (TPU).
      clock: cycles a second, as peak over FLOPs a cycle says: a TPU's matrix units are 128 x 128, four
        a core, and a v5p chip has two cores. 0 for GPUs, whose compiler gives no cycles.
      price: dollars an hour.
    """

    name: str
    platform: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    clock: float
    price: float


MACHINE_GPUS = 8

CHIPS = {
    "v5e": Chip("TPU v5e", "tpu", 197e12, 16e9, 819e9, 50e9, 0, 197e12 / (4 * 2 * 128**2), 1.20),
    "v5p": Chip("TPU v5p", "tpu", 459e12, 95e9, 2765e9, 100e9, 0, 459e12 / (8 * 2 * 128**2), 4.20),
    "h100": Chip("H100 SXM", "gpu", 989e12, 80e9, 3350e9, 450e9, 50e9, 0, 6.88),
    "h200": Chip("H200 SXM", "gpu", 989e12, 141e9, 4800e9, 450e9, 50e9, 0, 7.91),
}

# Google's names count chips of v5e, and TensorCores, two a chip, of v5p.
_TPUS = {"v5e-16": "4x4", "v5e-256": "16x16", "v5p-64": "2x4x4", "v5p-2048": "8x8x16"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips joined to one machine.

    Attributes:
      name: as it was given.
      chip: of each.
      chips: how many.
      grid: what libtpu calls it, "v5p:4x4x4"; empty for GPUs.
    """

    name: str
    chip: Chip
    chips: int
    grid: str = ""


def find_topology(name: str) -> Topology:
    """The topology of that name: v5p-64, v5p:2x4x4 or h100-64.

    Raises:
      UserError: there is none.
    """
    if name in _TPUS:
        grid = f"{name.split('-')[0]}:{_TPUS[name]}"
        return dataclasses.replace(find_topology(grid), name=name)
    if (grid := re.fullmatch(r"(v5e|v5p):(\d+(?:x\d+){1,2})", name)) and "x0" not in f"x{grid.group(2)}":
        return Topology(name, CHIPS[grid.group(1)], math.prod(map(int, grid.group(2).split("x"))), name)
    if gpus := re.fullmatch(r"(h100|h200)-([1-9]\d*)", name):
        count = int(gpus.group(2))
        if count <= MACHINE_GPUS or count % MACHINE_GPUS == 0:
            return Topology(name, CHIPS[gpus.group(1)], count)
        raise UserError(f"--topology={name}: machines have {MACHINE_GPUS} GPUs, give a multiple of it")
    raise UserError(
        f"--topology={name!r} is not known: {', '.join(_TPUS)}, h100-8, h100-64 (h100-N, h200-N), or as "
        "libtpu writes them, v5p:4x4x4"
    )
