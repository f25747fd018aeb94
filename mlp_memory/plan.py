"""What a training would take on chips that are not here, read from the program compiled for them.

TPU programs come from the real compiler (libtpu), which needs no TPU. For GPUs the same step is
compiled for as many CPU devices: partitioned alike, so FLOPs and collectives are the GPU program's,
while memory and HBM traffic are too high, since CPU kernels fuse less and multiply in float32.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mlp_memory.artifacts import UserError, as_dtype, first_line
from mlp_memory.config import Config
from mlp_memory.decoder.config import DecoderConfig
from mlp_memory.decoder.pretrain import pretrain_task
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.decoder.windows import batch_shapes as window_shapes
from mlp_memory.dry_run import resolved_shapes
from mlp_memory.joint.gate import SIGNALS, Gate
from mlp_memory.joint.train import joint_flops, joint_task
from mlp_memory.memory.distill import batch_shapes, distill_task
from mlp_memory.memory.mlp import Memory
from mlp_memory.memory.states import RecomputedStates, States, StoredStates
from mlp_memory.parallel import compiled as reading
from mlp_memory.parallel import hlo
from mlp_memory.parallel.chips import MACHINE_GPUS, Topology
from mlp_memory.parallel.mesh import compiling_for, make_mesh
from mlp_memory.parallel.sharding import without_numbers
from mlp_memory.training.config import TrainConfig
from mlp_memory.training.loop import Task, lower_step

ADVICE = 'raise mesh.fsdp, mesh.tensor or accumulate, or set remat = "full"'

# No CPU will run the stand-in for a GPU's program, so its machine code need not be good.
_COMPILER_OPTIONS = {
    "tpu": {},
    "gpu": {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
}

# What libtpu would otherwise ask of a machine that has TPUs, and that one process has them alone.
_NO_TPU_HERE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Collectives:
    """All collectives of one kind, of one chip in one step."""

    kind: str
    count: int
    bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """One training on one topology. Bytes, FLOPs and seconds are of one chip and one step.

    Attributes:
      memory: bytes of HBM: "parameters", "optimizer", "batch" (with what is frozen), "temporary" and
        "total".
      model_flops: 6 for each weight and row, of all chips: what MFU counts.
      compiled_flops: of the matrix products in the program, those computed again too.
      hbm_bytes: read and written by its kernels.
      collectives: by kind.
      buffers: the largest arrays, with their bytes and what makes them.
      compiler_seconds: the TPU compiler's cycles, without collectives; None for GPUs.
      compute_seconds, hbm_seconds, network_seconds: each alone at its peak.
      step_seconds: predicted: the compiler's time and the collectives that are waited for, and no less
        than the longest of the three before. For GPUs, which have no compiler's time, the longer of
        products and network: a bound, since HBM traffic is not known well enough to count.
      mfu: model FLOPs over what the chips' peak would do meanwhile.
      days, dollars: of all the recipe's steps.
    """

    stage: str
    topology: str
    chip: str
    chips: int
    mesh: dict[str, int]
    parameters: int
    memory: dict[str, int]
    memory_limit: float
    fits: bool
    model_flops: int
    compiled_flops: int
    hbm_bytes: int
    collectives: list[Collectives]
    buffers: list[dict[str, Any]]
    compiler_seconds: float | None
    compute_seconds: float
    hbm_seconds: float
    network_seconds: float
    step_seconds: float
    mfu: float
    unit: str
    units_per_step: int
    units_per_second: float
    steps: int
    days: float
    price: float
    dollars: float


def plan_training(stage: str, config: Config, topology: Topology, price: float | None = None) -> Plan:
    """Compiles one of the trainings for a topology and reads what it takes.

    Args:
      stage: "distill", "pretrain" or "joint".
      config: the recipe.
      topology: chips.
      price: dollars for a chip's hour; None for the list's.

    Raises:
      UserError: the mesh or the batch does not fit the topology, the compiler for it is not installed,
        or the program does not fit its memory by far enough that none is made.
    """
    compiled, settings, task, model_flops, places = _compile(stage, config, topology)
    program, chip = hlo.parse(compiled.as_text()), topology.chip
    memory, memory_parts = reading.memory(compiled), _arguments(compiled)
    memory_parts |= {"temporary": memory.outputs + memory.temporary + memory.code, "total": memory.total}
    found = reading.collectives(program, chip, places)
    flops, traffic = reading.matmul_flops(program), reading.hbm_bytes(program)
    compute, hbm = flops / chip.flops, traffic / chip.bandwidth
    network = sum(c.seconds for c in found)
    waited = sum(c.seconds for c in found if c.waits)
    estimate = reading.compiler_seconds(program, chip) if chip.platform == "tpu" else None
    step = max(compute, network) if estimate is None else max(estimate + waited, compute, hbm, network)
    days = settings.steps * step / 86400
    price = chip.price if price is None else price
    return Plan(
        stage=stage,
        topology=topology.name,
        chip=chip.name,
        chips=topology.chips,
        mesh=dict(zip(("slice", "data", "fsdp", "tensor"), config.mesh.sizes(topology.chips))),
        parameters=_parameters(compiled),
        memory=memory_parts,
        memory_limit=chip.memory,
        fits=memory.total <= chip.memory,
        model_flops=model_flops,
        compiled_flops=flops,
        hbm_bytes=traffic,
        collectives=_by_kind(found),
        buffers=[
            {"array": f"{shape.dtype}{list(shape.sizes)}", "bytes": shape.bytes, "of": where}
            for shape, where in reading.largest_buffers(program)
        ],
        compiler_seconds=estimate,
        compute_seconds=compute,
        hbm_seconds=hbm,
        network_seconds=network,
        step_seconds=step,
        mfu=model_flops / (step * topology.chips * chip.flops),
        unit=task.unit,
        units_per_step=task.unit_per_step,
        units_per_second=task.unit_per_step / step,
        steps=settings.steps,
        days=days,
        price=price,
        dollars=days * 24 * topology.chips * price,
    )


def _compile(
    stage: str, config: Config, topology: Topology
) -> tuple[jax.stages.Compiled, TrainConfig, Task, int, np.ndarray]:
    """The compiled step, its settings, its task, the model's FLOPs in a step, and where devices stand."""
    # CPU programs keep bfloat16 as float32; float16 stays 16 bits wide, but in attention is refused.
    stands_in = topology.chip.platform == "gpu" and stage == "distill"
    half = jnp.float16 if stands_in else jnp.bfloat16
    with compiling_for(topology.chip.platform, half), _devices(stage, topology) as devices:
        mesh = make_mesh(config.mesh, devices)
        task, settings, batch, flops = _task(stage, config, mesh)
        lowered = lower_step(task, settings, mesh, batch)
        try:
            compiled = lowered.compile(_COMPILER_OPTIONS[topology.chip.platform])
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(_too_large(stage, topology, error)) from error
    return compiled, settings, task, flops, _places(mesh, topology)


def _places(mesh: Mesh, topology: Topology) -> np.ndarray:
    """Coordinates of the mesh's devices in a TPU's grid, [devices, 3]; machines of GPUs, [devices, 1]."""
    if topology.chip.platform == "tpu":
        return np.array([device.coords for device in mesh.devices.flat])
    return np.arange(topology.chips)[:, None] // MACHINE_GPUS


def _task(
    stage: str, config: Config, mesh: Mesh
) -> tuple[Task, TrainConfig, dict[str, jax.ShapeDtypeStruct], int]:
    decoder, memory = resolved_shapes(config)
    if stage == "distill":
        settings = config.distill
        states = _states(config, decoder, mesh)
        task = distill_task(memory, settings, states, mesh)
        teacher_tokens = min(config.retrieve.top_m, config.retrieve.k)
        batch = batch_shapes(settings, states, teacher_tokens, decoder.vocab_size)
        return task, settings, batch, memory.train_flops(task.unit_per_step)
    settings = config.pretrain if stage == "pretrain" else config.joint
    batch = window_shapes(settings.batch_size, settings.context)
    if stage == "pretrain":
        task = pretrain_task("pretrain", decoder, settings, mesh)
        return task, settings, batch, decoder.train_flops(task.unit_per_step, settings.context)
    frozen = without_numbers(lambda: Memory(memory, nnx.Rngs(0)), mesh)
    weight = 0.5 if isinstance(settings.interpolation, str) else float(settings.interpolation)
    if settings.interpolation == "gate":
        signals = [np.zeros(len(SIGNALS) + decoder.dim, np.float32)] * 3
        weight = Gate(*signals, np.float32(0), np.float32(1))
    start = without_numbers(lambda: Decoder(decoder, nnx.Rngs(0)), mesh)
    task = joint_task(start, frozen, settings, config.embed.tap, weight, mesh)
    return task, settings, batch, joint_flops(decoder, memory, settings, task.unit_per_step)


def _states(config: Config, decoder: DecoderConfig, mesh: Mesh) -> States:
    """The memory's inputs, as `Job.memory_inputs` has them, without a row."""
    embed = config.embed
    if embed.keeps_states:
        return StoredStates(jax.ShapeDtypeStruct((0, decoder.dim), as_dtype(embed.key_dtype)))
    frozen = without_numbers(lambda: Decoder(decoder, nnx.Rngs(0)), mesh)
    return RecomputedStates(frozen, (), embed, config.distill.block_rows)


@contextlib.contextmanager
def _devices(stage: str, topology: Topology) -> Iterator[list[jax.Device]]:
    """The topology's devices; CPU devices of this process for GPUs.

    Raises:
      UserError: libtpu is not installed, or knows no such topology.
    """
    jax.config.update("jax_platforms", "cpu")
    if topology.chip.platform == "gpu":
        jax.config.update("jax_num_cpu_devices", topology.chips)
        yield jax.devices("cpu")[: topology.chips]
        return
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"compiling for {topology.name} needs libtpu, which is not installed here: "
            f"make plan ARGS='{stage} --topology={topology.name} --gin_file=...'"
        )
    for name, value in _NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.grid)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology.name}: libtpu says: {first_line(error)}") from error
    yield list(found.devices)


def _too_large(stage: str, topology: Topology, error: Exception) -> str:
    found = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", str(error)) or re.search(
        r"memory required .*?\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", str(error)
    )
    needed = ", {}B needed of {}B a chip".format(*found.groups()) if found else ""
    return f"{stage} does not fit {topology.name}{needed}: {ADVICE}"


def _arguments(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of one chip's part of parameters, optimizer state and batch."""
    (state, frozen, batch, _), _ = compiled.args_info
    (shards, frozen_shards, batch_shards, _), _ = compiled.input_shardings

    def held(tree: Any, shardings: Any) -> int:
        sizes = jax.tree.map(
            lambda x, s: math.prod(s.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize, tree, shardings
        )
        return sum(jax.tree.leaves(sizes))

    return {
        "parameters": held(state["params"], shards["params"]),
        "optimizer": held(state["opt"], shards["opt"]),
        "batch": held(batch, batch_shards) + held(frozen, frozen_shards),
    }


def _parameters(compiled: jax.stages.Compiled) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(compiled.args_info[0][0]["params"]))


def _by_kind(found: list[reading.Collective]) -> list[Collectives]:
    kinds = collections.defaultdict(list)
    for collective in found:
        kinds[collective.kind].append(collective)
    return [
        Collectives(
            kind,
            sum(c.times for c in ones),
            sum(c.times * c.bytes for c in ones),
            sum(c.seconds for c in ones),
        )
        for kind, ones in sorted(kinds.items())
    ]


def training_table(plan: Plan) -> str:
    """The plan for people."""
    memory, giga = plan.memory, 1e9
    rows = [
        ("mesh", ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())),
        ("parameters", f"{plan.parameters:,}"),
        (
            "fits a chip" if plan.fits else "does NOT fit a chip",
            f"{memory['total'] / giga:,.1f} GB of {plan.memory_limit / giga:,.0f} GB: "
            + ", ".join(f"{name} {size / giga:,.2f}" for name, size in memory.items() if name != "total"),
        ),
        ("FLOPs a step", f"{plan.model_flops:.4g} of the model, in all"),
        ("", f"{plan.compiled_flops:.4g} a chip in the program, {_recomputed(plan):.1%} beyond the model's"),
        ("HBM traffic", f"{plan.hbm_bytes / giga:,.1f} GB a chip and step"),
    ]
    for c in plan.collectives:
        rows.append((c.kind, f"{c.count:,} of {c.bytes / giga:,.2f} GB in all, {_seconds(c.seconds)}"))
    given = plan.compiler_seconds is not None
    rows += [
        ("compiler's time", _seconds(plan.compiler_seconds) + " without collectives" if given else "none"),
        (
            "at peak alone",
            f"products {_seconds(plan.compute_seconds)}, HBM {_seconds(plan.hbm_seconds)}, "
            f"network {_seconds(plan.network_seconds)}",
        ),
        ("a step", f"{_seconds(plan.step_seconds)}, MFU {plan.mfu:.1%}" + ("" if given else ", at best")),
        (f"{plan.unit} a second", f"{plan.units_per_second:,.0f}"),
        (
            "the recipe",
            f"{plan.steps:,} steps of {plan.units_per_step:,} {plan.unit}: {plan.days:,.2f} days, "
            f"${plan.dollars:,.0f} at ${plan.price:.2f} a chip and hour",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    caveat = "the compiler's and the data sheet's figures; nothing was run"
    if not given:
        caveat = (
            "FLOPs and collectives of the program as compiled for CPU devices, memory and HBM traffic of it "
            "too high for GPUs; nothing was run"
        )
    return "\n".join(
        [
            f"{plan.stage} on {plan.topology}: {plan.chips:,} x {plan.chip}",
            *(f"{name.ljust(width)}  {value}" for name, value in rows),
            caveat,
        ]
    )


def _recomputed(plan: Plan) -> float:
    return plan.compiled_flops * plan.chips / plan.model_flops - 1


def _seconds(value: float) -> str:
    return f"{value:,.3g} s" if value >= 1 else f"{1000 * value:,.3g} ms"
