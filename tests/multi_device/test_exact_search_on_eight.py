import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("search_on_meshes.py")
MESHES = ["data=8", "data=2,fsdp=2,tensor=2"]
KS = [1, 30, 700]


def run(inputs: Path, output: Path, devices: int, *meshes: str) -> subprocess.Popen:
    """The program in a process of its own: the number of devices is fixed at its start."""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(PROGRAM.parents[2]),
    }
    words = [sys.executable, str(PROGRAM), str(inputs), str(output), *meshes]
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("whole_numbers", [True, False])
def test_eight_devices_find_what_one_finds(tmp_path, rng, whole_numbers):
    count = int(rng.integers(5000, 14000))
    keys = rng.integers(-2, 3, (count, 4)) if whole_numbers else rng.normal(size=(count, 12))
    keys[rng.integers(0, count, 300)] = keys[rng.integers(0, count, 300)]
    keys = keys.astype(np.float32)
    inputs = {
        "keys": keys,
        "valid": rng.random(count) < 0.9,
        "queries": np.concatenate(
            [keys[:20], rng.normal(size=(10, keys.shape[1])).round().astype(np.float32)]
        ),
        "ks": np.array(KS),
        "superblock_rows": np.array(1024),
    }
    np.savez(tmp_path / "inputs.npz", **inputs)
    processes = [
        run(tmp_path / "inputs.npz", tmp_path / "one", 1, "data=1"),
        run(tmp_path / "inputs.npz", tmp_path / "eight", 8, *MESHES),
    ]
    for process in processes:
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, error
    with np.load(tmp_path / "one/data=1.npz") as file:
        one = dict(file)
    for mesh in MESHES:
        with np.load(tmp_path / f"eight/{mesh}.npz") as eight:
            for k in KS:
                np.testing.assert_array_equal(eight[f"rows {k}"], one[f"rows {k}"])
                np.testing.assert_array_equal(eight[f"sqdist {k}"], one[f"sqdist {k}"])
    sqdist = ((keys[None] - inputs["queries"][:, None]).astype(np.float64) ** 2).sum(-1)
    sqdist[:, ~inputs["valid"]] = np.inf
    np.testing.assert_allclose(one["sqdist 30"], np.sort(sqdist, axis=1)[:, :30], rtol=1e-5, atol=1e-5)
