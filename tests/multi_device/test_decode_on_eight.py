import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

PROGRAM = Path(__file__).with_name("decode_on_meshes.py")


def test_models_on_meshes_of_eight_devices_write_and_score_as_on_one(rng):
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(PROGRAM.parents[2]),
    }
    words = [sys.executable, str(PROGRAM), str(int(rng.integers(1 << 30)))]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, spread = [json.loads(line) for line in done.stdout.splitlines()]
    assert "tensor=2" in spread["mesh"]
    assert all(len(text) == 9 for texts in one["texts"] for text in texts)
    assert spread["texts"] == one["texts"]
    np.testing.assert_allclose(spread["scores"], one["scores"], atol=1e-4)
