import importlib.util
import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DEMO = f"--gin_file={REPOSITORY / 'gin_configs/recipes/demo.gin'}"
MESH = ("--gin=mesh.fsdp=2", "--gin=mesh.tensor=2")

# demo.gin: 6 SwiGLU blocks of 128 x 352, a head of 128 x 2048, 7 norms of 128; 64 blocks of 16 rows.
WEIGHTS, NORMS, ROWS = 6 * 3 * 128 * 352 + 128 * 2048, 7 * 128, 64 * 16


def test_distilling_on_eight_gpus_by_hand(mlp_memory, tmp_path):
    file = tmp_path / "plan.json"
    answer = mlp_memory("plan", "distill", "--topology=h100-8", DEMO, *MESH, "--price=2", f"--json={file}")
    assert answer.code == 0, answer.error
    plan = json.loads(file.read_text())
    assert plan["parameters"] == WEIGHTS + NORMS
    assert plan["mesh"] == {"slice": 1, "data": 2, "fsdp": 2, "tensor": 2}
    # Matrices lie over fsdp x tensor, norms everywhere, the batch over data x fsdp; float32.
    assert plan["memory"]["parameters"] == 4 * (WEIGHTS // 4 + NORMS)
    assert plan["memory"]["optimizer"] == pytest.approx(2 * plan["memory"]["parameters"], rel=1e-3)
    assert plan["memory"]["batch"] == ROWS // 4 * (4 * (128 + 1 + 1) + 2 * (32 + 32))
    assert plan["model_flops"] == 6 * ROWS * WEIGHTS
    # Nothing is computed again, and every product is done once.
    assert plan["compiled_flops"] * 8 == pytest.approx(plan["model_flops"], rel=1e-3)
    gathered = sum(c["bytes"] for c in plan["collectives"] if c["kind"] == "all-gather")
    # At least every matrix in 16 bits, gathered over fsdp into halves (tensor = 2).
    assert gathered >= 2 * WEIGHTS // 2
    assert 0 < plan["mfu"] <= 1
    assert plan["days"] == pytest.approx(450 * plan["step_seconds"] / 86400)
    assert plan["dollars"] == pytest.approx(plan["days"] * 24 * 8 * 2)
    assert plan["units_per_second"] == pytest.approx(ROWS / plan["step_seconds"])
    for shown in ("8 x H100 SXM", f"{WEIGHTS + NORMS:,}", "all-gather", "rows a second", "nothing was run"):
        assert shown in answer.out


def test_the_joint_training_is_planned_by_the_same_code(mlp_memory, tmp_path):
    file = tmp_path / "plan.json"
    answer = mlp_memory("plan", "joint", "--topology=h100-1", DEMO, f"--json={file}")
    assert answer.code == 0, answer.error
    plan = json.loads(file.read_text())
    assert (plan["stage"], plan["unit"], plan["units_per_step"]) == ("joint", "tokens", 16 * 128)
    # Where a batch is one chunk the compiler finds that both heads make their logits twice.
    assert plan["compiled_flops"] == pytest.approx(plan["model_flops"], rel=1e-3)


def test_adapters_and_the_divergence_are_planned_too(mlp_memory, tmp_path):
    file, settings = tmp_path / "plan.json", ("--gin=joint.kl=0.1", "--gin=joint.adapter_rank=4")
    answer = mlp_memory("plan", "joint", "--topology=h100-1", DEMO, f"--json={file}", *settings)
    assert answer.code == 0, answer.error
    plan = json.loads(file.read_text())
    # A little more: the adapters' merging.
    assert plan["compiled_flops"] == pytest.approx(plan["model_flops"], rel=1e-3)
    assert plan["memory"]["optimizer"] < plan["memory"]["batch"]  # the decoder is frozen
    assert plan["parameters"] < 2e5


def test_what_does_not_fit_is_shown_and_refused(mlp_memory):
    answer = mlp_memory("plan", "distill", "--topology=h100-1", DEMO, "--gin=distill.batch_size=4194304")
    assert answer.code == 2
    assert "does NOT fit a chip" in answer.out
    assert answer.error.strip().count("\n") == 0
    assert answer.error.startswith("error: distill does not fit h100-1: raise mesh.fsdp")


def test_a_mesh_that_does_not_fit_the_topology_is_one_line(mlp_memory):
    answer = mlp_memory("plan", "distill", "--topology=h100-8", DEMO, "--gin=mesh.fsdp=3")
    assert answer.code == 2
    assert answer.error.startswith("error: mesh")
    assert "does not fit 8 device(s)" in answer.error
    assert answer.error.strip().count("\n") == 0


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed: tests/tpu")
def test_without_the_tpu_compiler_the_message_has_the_command(mlp_memory):
    answer = mlp_memory("plan", "distill", "--topology=v5p-64", DEMO)
    assert answer.code == 2
    assert answer.error.strip().count("\n") == 0
    assert "make plan ARGS='distill --topology=v5p-64 --gin_file=...'" in answer.error
