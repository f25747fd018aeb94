import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("head_on_meshes.py")


def test_the_head_on_eight_devices_is_the_dense_formula(rng):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(int(rng.integers(1 << 31)))],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(PROGRAM.parents[2]),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 9
    for line in lines:
        assert line["summed"] < 1e-5, line
        assert line["labels"] < 1e-5, line
