"""The TPU compiler itself: `make test-plan`, in .venv-tpu."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
RECIPE = f"--gin_file={REPOSITORY / 'gin_configs/recipes/demo.gin'}"
# 2 blocks of 256 x 512 under a head of 256 x 16384: the head is most of it.
SHAPE = ["memory.layers=2", "memory.dim=256", "memory.ffn_dim=512", "decoder.vocab_size=16384"]
SHAPE += ["distill.batch_size=512", "distill.block_rows=1024", "mesh.fsdp=4", "mesh.tensor=4"]
WEIGHTS, ROWS = 128 * 256 + 2 * 3 * 256 * 512 + 256 * 16384, 512 * 1024


def plan(*words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-m", "mlp_memory", "plan", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_tpu_program_of_distillation(tmp_path):
    file = tmp_path / "plan.json"
    bindings = [f"--gin={binding}" for binding in SHAPE]
    done = plan("distill", "--topology=v5p:2x2x4", RECIPE, *bindings, f"--json={file}")
    assert done.returncode == 0, done.stderr
    assert "16 x TPU v5p" in done.stdout
    found = json.loads(file.read_text())
    assert found["model_flops"] == 6 * ROWS * WEIGHTS
    # Products that are done once each; the first layer's need no gradient of the input.
    assert found["compiled_flops"] * 16 == pytest.approx(found["model_flops"], rel=0.02)
    assert found["compiler_seconds"] > found["compute_seconds"]
    assert 0 < found["mfu"] < 1
    # No chip holds its part of [rows, V], rows over fsdp, V over tensor, nor half of it.
    assert max(b["bytes"] for b in found["buffers"]) < 4 * (ROWS // 4) * (16384 // 4) // 2
    # Nor does it send that much in all: parameters, [rows]-sized figures, and states.
    assert sum(c["bytes"] for c in found["collectives"]) < 4 * (ROWS // 4) * (16384 // 4)


def test_what_does_not_fit_a_chip_is_one_line():
    done = plan("distill", "--topology=v5e-16", RECIPE, "--gin=distill.batch_size=4194304")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: distill does not fit v5e-16")


def test_a_grid_that_does_not_exist_is_one_line():
    done = plan("distill", "--topology=v5p:3x5x7", RECIPE)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --topology=v5p:3x5x7: libtpu says: ")
