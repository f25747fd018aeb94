import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

PROGRAM = Path(__file__).parents[1] / "multi_device/train_on_meshes.py"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run(inputs: Path, output: Path, devices: int, mesh: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(inputs), str(output), mesh],
        env={
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(PROGRAM.parents[2]),
            **environment,
        },
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_train_what_one_trains(training_inputs, tmp_path):
    one = run(training_inputs, tmp_path / "one", 1, "data=1")
    coordinator = f"127.0.0.1:{free_port()}"
    two = [
        run(
            training_inputs,
            tmp_path / "two",
            2,
            "data=2,fsdp=2",
            MLP_MEMORY_COORDINATOR=coordinator,
            MLP_MEMORY_PROCESSES="2",
            MLP_MEMORY_PROCESS=str(index),
        )
        for index in range(2)
    ]
    try:
        for process in (one, *two):
            error = process.communicate(timeout=300)[1]
            assert process.returncode == 0, error[-4000:]
    finally:
        for process in two:
            process.kill()
    with (
        np.load(tmp_path / "one/data=1.npz") as expected,
        np.load(tmp_path / "two/data=2,fsdp=2.npz") as found,
    ):
        assert set(expected) == set(found)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-5, rtol=1e-5, err_msg=name)


def test_a_process_that_does_not_know_its_number_is_told_in_one_line(training_inputs, tmp_path):
    process = run(
        training_inputs,
        tmp_path / "out",
        1,
        "data=1",
        MLP_MEMORY_COORDINATOR="127.0.0.1:1",
        MLP_MEMORY_PROCESS="x",
    )
    error = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert "needs MLP_MEMORY_PROCESSES and MLP_MEMORY_PROCESS as whole numbers" in error.splitlines()[-1]
