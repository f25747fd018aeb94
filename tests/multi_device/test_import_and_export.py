import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("import_on_meshes.py")
MESHES = ["fsdp=8", "data=2,fsdp=2,tensor=2"]


def start(sources: Path, output: Path, devices: int, *meshes: str) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(sources), str(output), *meshes],
        env={
            **os.environ,
            "XLA_FLAGS": flags,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(PROGRAM.parents[2]),
        },
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error


@pytest.fixture
def on_one(model_folders, tmp_path) -> Path:
    finish(start(model_folders, tmp_path / "one", 1, "data=1"))
    return tmp_path / "one/data=1"


def test_import_and_export_on_eight_devices_are_those_on_one(model_folders, on_one, files_of, tmp_path):
    finish(start(model_folders, tmp_path / "eight", 8, *MESHES))
    wanted = files_of(on_one)
    for folder in model_folders.iterdir():
        assert f"{folder.name}/manifest.json" in wanted  # every parameter's checksum
        weights = wanted[f"{folder.name}-out/model.safetensors"]
        assert weights == (folder / "model.safetensors").read_bytes()
    for mesh in MESHES:
        assert files_of(tmp_path / "eight" / mesh) == wanted, mesh


def test_a_model_that_does_not_divide_over_the_mesh_is_named(model_folders, tmp_path):
    process = start(model_folders, tmp_path / "out", 8, "tensor=8")
    error = process.communicate(timeout=300)[1]
    assert process.returncode != 0
    assert "does not divide over mesh axis tensor=8" in error.splitlines()[-1]
