import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from mlp_memory.artifacts import UserError
from mlp_memory.decoder.config import DecoderConfig
from mlp_memory.decoder.layers import parameter
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory
from mlp_memory.parallel.config import MeshConfig
from mlp_memory.parallel.mesh import AXES, make_mesh
from mlp_memory.parallel.sharding import RULES, spec, state_shardings

MEMORIES = {
    style: MemoryConfig(style=style, layers=2, dim=8, input_dim=width, vocab_size=11)
    for style, width in (("gpt2", 8), ("llama", 6))
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixed", "neox", "memory-gpt2", "memory-llama"])
def test_every_parameter_is_covered_by_the_rules(decoders, mesh, name):
    if name.startswith("memory-"):
        state = nnx.state(nnx.eval_shape(lambda: Memory(MEMORIES[name[7:]], nnx.Rngs(0))))
    else:
        state = nnx.state(nnx.eval_shape(lambda: Decoder(decoders[name], nnx.Rngs(0))))
    shardings = nnx.traversals.flatten_mapping(state_shardings(state, mesh))
    flat = dict(nnx.to_flat_state(state))
    assert set(shardings) == set(flat)
    for path, variable in flat.items():
        axes = variable.get_metadata()["logical_axes"]
        assert len(axes) == len(variable.get_value().shape)
        assert shardings[path].spec == PartitionSpec(*(RULES[axis] for axis in axes))
        if path[0] == "blocks":
            assert axes[0] == "layers"


def test_no_parameter_uses_a_mesh_axis_twice(decoder_config):
    states = [nnx.state(nnx.eval_shape(lambda: Decoder(decoder_config, nnx.Rngs(0))))]
    states += [nnx.state(nnx.eval_shape(lambda c=c: Memory(c, nnx.Rngs(0)))) for c in MEMORIES.values()]
    for state in states:
        for path, variable in nnx.to_flat_state(state):
            used = [axis for axis in spec(variable.get_metadata()["logical_axes"]) if axis]
            assert len(used) == len(set(used)), path


def test_rules_name_axes_of_the_mesh_only():
    assert {axis for axis in RULES.values() if axis} <= set(AXES)


def test_a_parameter_without_a_rule_is_an_error(mesh):
    class Odd(nnx.Module):
        def __init__(self, rngs):
            self.w = parameter(rngs, (2, 2), ("embed", "unheard_of"), 1.0)

    class Nameless(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jax.numpy.zeros((2, 2)))

    with pytest.raises(KeyError, match="unheard_of"):
        state_shardings(nnx.state(Odd(nnx.Rngs(0))), mesh)
    with pytest.raises(ValueError, match=r"w\(2, 2\) has logical axes None"):
        state_shardings(nnx.state(Nameless(nnx.Rngs(0))), mesh)


def test_mesh_sizes_multiply_to_the_devices_or_are_refused(rng):
    for _ in range(300):
        data, fsdp, tensor, slices = (int(x) for x in rng.choice([-1, 0, 1, 2, 3, 4, 8], 4))
        devices = int(rng.integers(1, 33))
        config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, slice=slices)
        rest = fsdp * tensor * slices
        possible = min(fsdp, tensor, slices) >= 1 and (
            (data == -1 and devices % rest == 0) or (data >= 1 and data * rest == devices)
        )
        if possible:
            sizes = config.sizes(devices)
            assert np.prod(sizes) == devices
            assert sizes == (slices, devices // rest, fsdp, tensor)
        else:
            with pytest.raises(UserError) as refused:
                config.sizes(devices)
            assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "impossible", [{"data": 3}, {"fsdp": 2}, {"tensor": 0}, {"data": 1.0}, {"fsdp": "2"}]
)
def test_an_impossible_mesh_is_refused(impossible):
    with pytest.raises(UserError):
        make_mesh(MeshConfig(**impossible), jax.devices()[:1])


def test_a_dimension_that_does_not_divide_is_refused_by_name():
    sizes = jax.sharding.AbstractMesh((1, 1, 1, 4), AXES)
    config = DecoderConfig(layers=1, dim=16, heads=4, ffn_dim=30, vocab_size=40)
    state = nnx.state(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))
    with pytest.raises(UserError, match=r"dimension of 30, which does not divide over mesh axis tensor=4"):
        state_shardings(state, sizes)
