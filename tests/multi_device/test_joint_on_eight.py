import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("joint_on_meshes.py")


def test_every_kind_of_joint_training_on_eight_devices_is_that_on_one(make_stream, tmp_path):
    # The best step is published: over random tokens only the training text itself gets better.
    make_stream(600, 40, folder=tmp_path / "train")
    shutil.copytree(tmp_path / "train", tmp_path / "validation")
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
    assert found
    for figures in found:
        assert figures["apart"] < 1e-5, figures
        assert figures["moved"] > 1e-3, figures
