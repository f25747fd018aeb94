import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("joint_on_meshes.py")


def test_every_kind_of_joint_training_on_eight_devices_is_that_on_one(make_stream, tmp_path):
    for name, rows in (("train", 600), ("validation", 120)):
        make_stream(rows, 40, folder=tmp_path / name)
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(PROGRAM.parents[2]),
    }
    done = subprocess.run(
        [sys.executable, str(PROGRAM), tmp_path], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2
    for figures in found:
        assert figures["apart"] < 1e-5, figures
        assert figures["moved"] > 1e-3, figures
