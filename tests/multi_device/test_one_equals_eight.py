import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("train_on_meshes.py")
# Sharded sums add up in another order; what is compared has gone through 20 steps of that.
TOLERANCE = 1e-5
MESHES = ["data=8", "data=2,fsdp=2,tensor=2"]


def run(inputs: Path, output: Path, devices: int, *meshes: str) -> subprocess.Popen:
    """The program in a process of its own: the number of devices is fixed at its start."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(PROGRAM.parents[2]),
    }
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(inputs), str(output), *meshes],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    error = process.communicate(timeout=600)[1]
    assert process.returncode == 0, error


def assert_close(found: Path, expected: Path) -> None:
    with np.load(found) as a, np.load(expected) as b:
        names = [name for name in b if not name.startswith("memory ") or name in a]
        assert set(a) == set(names)
        for name in names:
            np.testing.assert_allclose(a[name], b[name], atol=TOLERANCE, rtol=TOLERANCE, err_msg=name)


def test_training_on_eight_devices_is_training_on_one_and_parameters_are_sharded_by_the_rules(
    training_inputs, tmp_path
):
    one = run(training_inputs, tmp_path / "one", 1, "data=1")
    eight = run(training_inputs, tmp_path / "eight", 8, *MESHES, "change:fsdp=8:data=2,fsdp=2,tensor=2")
    finish(one)
    finish(eight)
    for mesh in (*MESHES, "change"):
        assert_close(tmp_path / "eight" / f"{mesh}.npz", tmp_path / "one/data=1.npz")


def test_a_batch_that_does_not_divide_over_the_devices_is_one_line(training_inputs, tmp_path):
    script = (
        "import sys, pathlib\n"
        f"sys.path.insert(0, {str(PROGRAM.parent)!r})\n"
        "import dataclasses, train_on_meshes as t\n"
        "from mlp_memory.artifacts import UserError\n"
        "inputs, output = map(pathlib.Path, sys.argv[1:])\n"
        "for i, changes in enumerate(({'batch_size': 4}, {'accumulate': 2})):\n"
        "    try:\n"
        "        config = dataclasses.replace(t.PRETRAIN, **changes)\n"
        "        t.train_decoder(inputs, output / str(i), t.mesh_of('data=8'), config)\n"
        "    except UserError as error:\n"
        "        assert '\\n' not in str(error) and 'batch_size' in str(error), error\n"
        "    else:\n"
        "        raise AssertionError(f'{changes} was not refused')\n"
    )
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(PROGRAM.parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(training_inputs), str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mesh", ["data=3", "fsdp=16", "tensor=8,data=2"])
def test_a_mesh_that_does_not_fit_eight_devices_is_refused(training_inputs, tmp_path, mesh):
    process = run(training_inputs, tmp_path / "out", 8, mesh)
    error = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert "does not fit 8 device(s)" in error.splitlines()[-1]
