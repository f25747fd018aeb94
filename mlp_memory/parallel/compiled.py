"""What a compiled program takes of a chip: memory, FLOPs, HBM traffic, collectives, time.

Everything is of one chip and one run of the program. Loops count as often as they turn (see `hlo`).
"""

import collections
import dataclasses
import re

import jax
import numpy as np

from mlp_memory.parallel import hlo
from mlp_memory.parallel.chips import Chip
from mlp_memory.parallel.groups import replica_groups

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# What moves no bytes of its own: names for what is there, loops and calls, ends of what began elsewhere.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id"),
    *("while", "call", "conditional", "after-all", "optimization-barrier"),
    *("copy-done", "call-start", "call-done", "async-start", "async-done", "async-update"),
}

_SAME = frozenset(("bitcast", "convert", "copy", "transpose", "reshape"))
"""In a kernel: the same numbers, made one by one as they are asked for."""

_NO_ESTIMATE = (1 << 63) - 1
"""What stands where the TPU compiler has none, as in scatters done by another unit."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      kind: one of `COLLECTIVES`.
      times: how often it runs.
      dtype: of the most bytes in it.
      elements: of what it makes or takes, whichever is larger, at a time and chip.
      bytes: of those elements.
      groups: positions of the devices that talk, [groups, members].
      seconds: time of all its runs when the links carry nothing else.
      waits: nothing else is computed meanwhile.
      where: what it comes from, in JAX's words.
    """

    kind: str
    times: int
    dtype: str
    elements: int
    bytes: int
    groups: np.ndarray
    seconds: float
    waits: bool
    where: str


def network_seconds(kind: str, size: int, groups: np.ndarray, chip: Chip, places_NxA: np.ndarray) -> float:
    """Time of one collective at the links' peak.

    In a TPU's grid a group uses both links of each axis along which its chips differ (one, where
    only two stand there), as the compiler's rings do. GPUs of one machine are joined by a switch; what
    leaves a machine goes by as many network cards as the group has GPUs in it.

    Args:
      kind: one of `COLLECTIVES`.
      size: bytes of the whole that is gathered, scattered or summed, at one chip.
      groups: positions in `places_NxA`, [groups, members].
      chip: of each.
      places_NxA: coordinates in the grid; for GPUs the machine's number.
    """
    members = groups.shape[1]
    if members == 1:
        return 0.0
    sent = size * (members - 1) / members
    if chip.platform == "tpu":
        axes = np.array([len(set(axis)) for axis in places_NxA[groups[0]].T])
        bandwidth = chip.link * (2 * (axes > 2).sum() + (axes == 2).sum())
        if kind == "all-to-all":  # goes a quarter of the way around
            sent = max(sent, size * axes.max() / 4)
        if kind == "collective-permute":  # one way, to a neighbour
            sent, bandwidth = size, chip.link
    else:
        local = min(np.unique(places_NxA[group], return_counts=True)[1].min() for group in groups)
        bandwidth = chip.link if local == members else min(chip.link, chip.network * local)
        sent = size if kind == "collective-permute" else sent
    return float(sent * (2 if kind == "all-reduce" else 1) / bandwidth)


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM of one chip in bytes; what is donated stands in `arguments` only."""

    arguments: int
    outputs: int
    temporary: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporary + self.code


def memory(compiled: jax.stages.Compiled) -> Memory:
    """What the compiler allotted."""
    found = compiled.memory_analysis()
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes - found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
    )


def matmul_flops(program: hlo.Program) -> int:
    """FLOPs of all matrix products, recomputed ones too."""
    return sum(times * hlo.matmul_flops(i, where) for times, where, i in program.instructions(fused=True))


def compiler_seconds(program: hlo.Program, chip: Chip) -> float | None:
    """The cycles that the TPU compiler reckons for its kernels, as seconds; None where it gives none.

    Collectives, and the few kernels that it knows no cost of, are not in it.
    """
    cycles = 0
    for times, _, instruction in program.instructions(fused=False):
        if found := re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes):
            cycles += times * int(found.group(1)) if int(found.group(1)) != _NO_ESTIMATE else 0
    return cycles / chip.clock if cycles else None


def collectives(program: hlo.Program, chip: Chip, places_NxA: np.ndarray) -> list[Collective]:
    """Every collective that runs, those in kernels too; the last arguments as in `network_seconds`."""
    found, chains = [], set()
    for times, where, instruction in program.instructions(fused=True):
        kind = instruction.kind.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        # The TPU compiler splits one that it hides behind products over the kernels of a chain.
        chain = re.search(r'chain_id="\d+"', instruction.attributes)
        part = chain and re.search(r"channel_id=\d+", instruction.attributes).group(0)
        if part in chains:
            continue
        if part:
            chains.add(part)
        operands = [s for name in instruction.operands for s in where[name].shapes]
        groups = replica_groups(instruction.attributes, len(places_NxA))
        if groups is None:
            pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.attributes).group(1)
            groups = np.array([[int(n) for n in p] for p in re.findall(r"\{?(\d+),(\d+)", pairs)])
        grown = groups.shape[1] if kind == "all-gather" else 1
        source = re.search(r'op_name="([^"]*)"', instruction.attributes)
        size = grown * sum(shape.bytes for shape in operands)
        found.append(
            Collective(
                kind,
                times,
                max(operands, key=lambda shape: shape.bytes).dtype,
                grown * sum(shape.elements for shape in operands),
                size,
                groups,
                times * network_seconds(kind, size, groups, chip, places_NxA),
                waits=instruction.kind == kind and not part,
                where=source.group(1) if source else "",
            )
        )
    return found


def largest_buffers(program: hlo.Program, count: int = 5) -> list[tuple[hlo.Shape, str]]:
    """The largest arrays that kernels leave in HBM, with what they come from; each shape once."""
    found = {}
    for _, _, instruction in program.instructions(fused=False):
        source = re.search(r'op_name="([^"]*)"', instruction.attributes)
        for shape in instruction.shapes:
            found.setdefault(shape, source.group(1) if source else instruction.name)
    return sorted(found.items(), key=lambda item: -item[0].bytes)[:count]


def buffers_of(program: hlo.Program, elements: int) -> list[str]:
    """Names of what makes an array of so many elements or more, in a buffer or in a collective."""
    return [
        f"{i.name}: {shape.dtype}{list(shape.sizes)}"
        for _, _, i in program.instructions(fused=False)
        for shape in i.shapes
        if shape.elements >= elements
    ]


def hbm_bytes(program: hlo.Program) -> int:
    """Bytes that kernels read from and write to HBM: operands and results of each.

    A slice of a larger array counts as the slice: a scan reads its own layer of stacked parameters, and
    writes its own row of stacked results.
    """
    return sum(
        times * _traffic(instruction, where, program)
        for times, where, instruction in program.instructions(fused=False)
        if instruction.kind not in _FREE and not instruction.kind.endswith("-done")
    )


def _traffic(instruction: hlo.Instruction, where: hlo.Computation, program: hlo.Program) -> int:
    reads = [_stored(where[name]) for name in instruction.operands]
    writes = _stored(instruction)
    kind = instruction.kind
    if kind.endswith("-start"):  # its tuple names its operands again
        writes = sum(reads)
    if kind in ("dynamic-slice", "gather", "slice"):
        return 2 * writes
    if kind in ("dynamic-update-slice", "scatter"):
        return 2 * reads[1 if kind == "dynamic-update-slice" else -1]
    if kind == "fusion":
        inner = program.computations[instruction.named("calls")]
        reads = [_read(program, inner, number, whole) if whole else 0 for number, whole in enumerate(reads)]
        root = next(i for i in inner.values() if i.is_root)
        for part in [inner[name] for name in root.operands] if root.kind == "tuple" else [root]:
            while part.kind in _SAME:
                part = inner[part.operands[0]]
            if part.kind == "dynamic-update-slice":
                update = inner[part.operands[1]].shapes[0].bytes
                writes -= max(0, part.shapes[0].bytes - update) if writes else 0
    return sum(reads) + max(writes, 0)


def _stored(instruction: hlo.Instruction) -> int:
    return sum(shape.bytes for shape in instruction.shapes if not shape.scratch)


def _read(program: hlo.Program, inner: hlo.Computation, number: int, whole: int) -> int:
    """Bytes that a kernel reads of its operand: all, or the slices that it takes of it."""
    parameter = next(i for i in inner.values() if i.kind == "parameter" and i.operands == (str(number),))
    users, names = [], collections.deque([parameter.name])
    while names:
        name = names.popleft()
        for user in inner.values():
            if name in user.operands:
                if user.kind in _SAME:
                    names.append(user.name)
                else:
                    users.append((user, user.operands.index(name)))
    sliced = 0
    for user, place in users:
        if user.kind in ("dynamic-slice", "gather", "slice") and place == 0:
            sliced += user.shapes[0].bytes
        elif user.kind == "fusion":
            part = program.computations[user.named("calls")]
            sliced += _read(program, part, place, whole)
        elif user.kind == "dynamic-update-slice" and place == 0:
            continue  # written in place
        else:
            return whole
    return min(sliced, whole)
