import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlp_memory.artifacts import UserError
from mlp_memory.parallel import compiled, hlo
from mlp_memory.parallel.chips import CHIPS, find_topology
from mlp_memory.parallel.groups import replica_groups

REPOSITORY = Path(__file__).parents[2]

# Eight devices in two rows of four. Each of 40 turns multiplies x by a slice of stacked weights, whose
# columns lie along "tensor", and sums over it; then the mean over "data".
PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

def local(x, w):
    def layer(x, w):
        return jax.lax.psum(x @ w, "tensor") @ jnp.ones((48, 32), jnp.float32), None
    x, _ = jax.lax.scan(layer, x, w)
    return jax.lax.psum_scatter(x, "data", scatter_dimension=0, tiled=True)

step = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P(None, None, "tensor")), out_specs=P("data"),
                     check_vma=False)
shapes = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, p))
          for s, p in (((16, 32), P("data")), ((LAYERS, 32, 192), P(None, None, "tensor")))]
print(jax.jit(step).lower(*shapes).compile().as_text())
""".replace("LAYERS", "40")


# Eight GPUs in one machine.
MACHINE = np.zeros((8, 1), int)


@pytest.fixture(scope="module")
def program() -> hlo.Program:
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return hlo.parse(done.stdout)


def test_flops_of_a_scan_count_every_turn(program):
    # 8 rows a device, [8, 32] @ [32, 48] and [8, 48] @ [48, 32], 40 times.
    assert compiled.matmul_flops(program) == 40 * 2 * (2 * 8 * 32 * 48)


def test_collectives_count_every_turn_with_their_bytes_and_groups(program):
    found = {c.kind: c for c in compiled.collectives(program, CHIPS["h100"], MACHINE)}
    assert set(found) == {"all-reduce", "reduce-scatter"}
    inside, after = found["all-reduce"], found["reduce-scatter"]
    assert (inside.times, inside.dtype, inside.bytes) == (40, "f32", 8 * 48 * 4)
    assert inside.groups.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert (after.times, after.elements, after.bytes) == (1, 8 * 32, 8 * 32 * 4)
    assert sorted(map(sorted, after.groups.tolist())) == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_traffic_of_a_scan_reads_each_layer_once(program):
    weights, products = 40 * 32 * 48 * 4, 40 * (8 * 48 + 8 * 32) * 4
    found = compiled.hbm_bytes(program)
    # Weights and products of each turn, and what lies between; all layers at each turn were 40 x weights.
    assert weights + products < found < 10 * weights


def test_large_buffers_are_found_by_their_elements(program):
    (largest, _), *_ = compiled.largest_buffers(program)
    assert largest.sizes == (40, 32, 48)
    assert compiled.buffers_of(program, 40 * 32 * 48)
    assert not compiled.buffers_of(program, 40 * 32 * 48 + 1)


TPU_LOOP = """HloModule step

%condition (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(7)
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i.1, %two)
  %x = f32[8]{0:T(128)} get-tuple-element(%p.1), index=1
  %y = f32[8]{0:T(128)} all-reduce(%x), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%sum, \
metadata={op_name="jit(step)/while"}, backend_config={"window_config":{"estimated_cycles":"600"}}
  %known = f32[8]{0:T(128)} add(%y, %y), backend_config={"window_config":{"estimated_cycles":"100"}}
  %odd = f32[8]{0:T(128)} negate(%known), backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%next, %odd)
}

ENTRY %main (x.1: f32[8]) -> f32[8] {
  %zero = s32[]{:T(128)} constant(START)
  %x.1 = f32[8]{0:T(128)} parameter(0)
  %t.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%zero, %x.1)
  %loop = (s32[]{:T(128)}, /*index=1*/f32[8]{0:T(128)}) while(%t.1), condition=%condition, body=%body
  ROOT %out = f32[8]{0:T(128)} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(("start", "turns"), [(0, 4), (1, 3), (7, 0)])
def test_a_loop_without_a_note_turns_as_its_condition_and_step_say(start, turns):
    program = hlo.parse(TPU_LOOP.replace("START", str(start)))
    assert program.times["body"] == turns
    assert [c.times for c in compiled.collectives(program, CHIPS["h100"], MACHINE)] == (
        [turns] if turns else []
    )
    # A kernel whose cycles the compiler does not know adds none.
    seconds = compiled.compiler_seconds(program, CHIPS["v5p"])
    assert seconds == (pytest.approx(turns * 700 / CHIPS["v5p"].clock) if turns else None)


def test_a_loop_that_nothing_bounds_is_an_error():
    text = TPU_LOOP.replace("constant(7)", "parameter(1)").replace("START", "0")
    with pytest.raises(ValueError, match="how often the loop loop turns"):
        hlo.parse(text)


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x", [[0, 1], [2, 3]]),
    ],
)
def test_groups_in_every_notation(attributes, groups):
    assert replica_groups(attributes, 4).tolist() == groups


CONVOLUTION = """ENTRY %main (a: f32[3,5,6], b: f32[2,6,7]) -> f32[3,6,7] {
  %a = f32[3,5,6] parameter(0)
  %b = f32[2,6,7] parameter(1)
  ROOT %c = f32[3,6,7] convolution(%a, %b), window={size=2 pad=1_1}, dim_labels=b0f_0io->b0f
}
"""


def test_flops_of_a_convolution_leave_padding_out():
    # 6 places of 2 taps over 5 padded by one at each end: 10 taps meet a value.
    assert compiled.matmul_flops(hlo.parse(CONVOLUTION)) == 2 * 3 * 10 * 6 * 7


def test_collective_times_on_gpus_by_hand():
    h100, machines = CHIPS["h100"], np.arange(16)[:, None] // 8

    def seconds(kind: str, group: list[int]) -> float:
        return compiled.network_seconds(kind, 10**9, np.array([group]), h100, machines)

    assert seconds("all-gather", [0, 1, 2, 3]) == pytest.approx(0.75e9 / 450e9)
    assert seconds("all-reduce", [0, 1, 2, 3]) == pytest.approx(2 * 0.75e9 / 450e9)
    # One GPU of each of two machines has one network card; all sixteen have eight a machine.
    assert seconds("all-gather", [0, 8]) == pytest.approx(0.5e9 / 50e9)
    assert seconds("all-gather", list(range(16))) == pytest.approx(15 / 16 * 1e9 / 400e9)
    assert seconds("all-gather", [0]) == 0


def test_collective_times_on_a_grid_by_hand():
    v5p, grid = CHIPS["v5p"], np.stack(np.meshgrid(*map(range, (2, 4, 4)), indexing="ij"), -1).reshape(-1, 3)

    def seconds(kind: str, *groups: list[int]) -> float:
        return compiled.network_seconds(kind, 10**9, np.array(groups), v5p, grid)

    # Four along one axis have two links, sixteen of a plane four, all 32 one more along the short axis.
    assert seconds("all-gather", [0, 1, 2, 3], [4, 5, 6, 7]) == pytest.approx(3 / 4 * 1e9 / 200e9)
    assert seconds("reduce-scatter", list(range(16))) == pytest.approx(15 / 16 * 1e9 / 400e9)
    assert seconds("all-reduce", list(range(32))) == pytest.approx(2 * 31 / 32 * 1e9 / 500e9)
    assert seconds("collective-permute", [0, 1], [1, 2]) == pytest.approx(1e9 / 100e9)


@pytest.mark.parametrize(
    ("name", "chips", "grid"),
    [
        ("v5e-16", 16, "v5e:4x4"),
        ("v5e-256", 256, "v5e:16x16"),
        ("v5p-64", 32, "v5p:2x4x4"),  # Google's name counts TensorCores, two a chip
        ("v5p-2048", 1024, "v5p:8x8x16"),
        ("v5p:4x4x4", 64, "v5p:4x4x4"),
        ("h100-8", 8, ""),
        ("h100-64", 64, ""),
    ],
)
def test_topologies_by_name(name, chips, grid):
    found = find_topology(name)
    assert (found.name, found.chips, found.grid) == (name, chips, grid)
    assert found.chip.platform == ("tpu" if grid else "gpu")


@pytest.mark.parametrize("name", ["v5p", "v9-8", "h100-0", "h100-12", "v5p:0x4x4", "v5e-17", ""])
def test_an_unknown_topology_is_one_line(name):
    with pytest.raises(UserError) as refused:
        find_topology(name)
    assert "\n" not in str(refused.value)
    assert name in str(refused.value)
