"""Published models: what is saved comes back, whatever its size, and is told from any other."""

import resource
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from mlp_memory.artifacts import Directory, Manifest, UserError, begin
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory
from mlp_memory.training import checkpoints

CONFIG = MemoryConfig("gpt2", 3, 16, 24, 0.0, 1e-5, 16, 40)


def checksum(values: np.ndarray) -> str:
    """Value by value over the whole parameter."""
    bits_N = values.astype(np.float32).reshape(-1).view(np.uint32)
    return f"{sum(int(bits) * (2 * i + 1) for i, bits in enumerate(bits_N)) % 2**32:08x}"


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_checksums_are_sums_over_every_value(rng: np.random.Generator, dtype: object) -> None:
    params = {
        "blocks": {"kernel": jnp.asarray(rng.normal(size=(5, 7, 9)).astype(dtype))},
        "embedding": jnp.asarray(rng.normal(size=(301, 3)).astype(dtype)),
        "scale": jnp.asarray(rng.normal(size=1).astype(dtype)),
    }
    assert checkpoints.checksums(params) == {
        "blocks.kernel": checksum(np.asarray(params["blocks"]["kernel"])),
        "embedding": checksum(np.asarray(params["embedding"])),
        "scale": checksum(np.asarray(params["scale"])),
    }


# The largest parameter, blocks.ffn.up.kernel, has 3 · 16 · 24 float32 values.
@pytest.mark.parametrize("least", [8, 3 * 16 * 24 * 4, 1 << 26])
def test_a_parameter_may_be_as_large_as_what_is_saved_at_once_and_larger(
    least: int, randomize, mesh: Mesh, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_LEAST_IN_FLIGHT", least)
    model = randomize(lambda: Memory(CONFIG, nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model))
    directory = Directory(tmp_path / "m")
    manifest = checkpoints.publish(directory, begin(directory, "memory", {}, {}), params)
    abstract = nnx.eval_shape(lambda: Memory(CONFIG, nnx.Rngs(0)))
    found = nnx.to_pure_dict(nnx.state(checkpoints.restore(directory, manifest, abstract, mesh)))
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_parameters_other_than_those_saved_are_refused(randomize, mesh: Mesh, tmp_path) -> None:
    directory = Directory(tmp_path / "m")

    def publish() -> Manifest:
        params = nnx.to_pure_dict(nnx.state(randomize(lambda: Memory(CONFIG, nnx.Rngs(0)))))
        return checkpoints.publish(directory, begin(directory, "memory", {}, {}), params)

    before, now = publish(), publish()
    abstract = nnx.eval_shape(lambda: Memory(CONFIG, nnx.Rngs(0)))
    checkpoints.restore(directory, now, abstract, mesh)
    with pytest.raises(UserError, match="is not what was saved"):
        checkpoints.restore(directory, before, abstract, mesh)


def _save_twice(directory: Directory) -> None:
    steps = checkpoints.StepCheckpoints(directory, keep=1)
    for step in (1, 2):
        steps.save(step, {"x": jnp.arange(1 << 16, dtype=jnp.float32)}, {"validation_loss": 1.0})
    assert steps.best()[0] == 1
    steps.close()


class _Loud:
    def __init__(self, says: str):
        self.says = says

    def __del__(self) -> None:
        raise RuntimeError(self.says)


def test_a_save_that_the_disk_refuses_is_one_line_whichever_call_meets_it(
    tmp_path, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: heard.append(str(found.exc_value)))
    _save_twice(Directory(tmp_path / "fits"))
    _Loud("of something else")
    # What tensorstore's threads tell of a save that failed while they wrote, which is a matter of chance.
    _Loud("Event loop is closed")
    assert heard == ["of something else"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"^cannot save .*steps: ") as refused:
            _save_twice(Directory(tmp_path / "refused"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    _Loud("again, while it is taken down")
    assert heard == ["of something else"]
    assert "\n" not in str(refused.value)
    assert "Traceback" not in capfd.readouterr().err
