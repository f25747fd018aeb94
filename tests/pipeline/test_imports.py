import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
HEAVY = ("tensorflow", "tensorflow_text", "seqio", "scann", "apache_beam")
PROGRAM = """
import sys
from mlp_memory.__main__ import main

workdir, heavy, *stages = sys.argv[1:]
for stage in stages:
    sys.argv = ["mlp_memory", stage, f"--workdir={workdir}"]
    main()
print("loaded:", *(name for name in heavy.split() if name in sys.modules))
"""


def run(program: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_processes_load_no_tensorflow_seqio_scann_or_beam_and_repeat_their_results(
    workdir, small_run
):
    stages = {
        "pretrain": "decoder",
        "embed": "datastore",
        "distill": "memory",
        "joint": "joint",
        "baseline": "baseline",
    }
    for folder in stages.values():
        for path in sorted((workdir / folder).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    out = run(PROGRAM, str(workdir), " ".join(HEAVY), *stages)
    assert out.splitlines()[-1] == "loaded:"
    for folder in stages.values():
        a, b = ((run_folder / folder / "manifest.json").read_text() for run_folder in (workdir, small_run))
        assert a == b


@pytest.mark.parametrize(
    "module",
    [
        "mlp_memory.pipeline",
        "mlp_memory.config",
        "mlp_memory.plan",
        "mlp_memory.__main__",
        "mlp_memory.corpus.stream",
        "mlp_memory.training.loop",
        "mlp_memory.joint.train",
        "mlp_memory.memory.distill",
        "mlp_memory.datastore.embed",
        "mlp_memory.targets.retrieve",
        "mlp_memory.parallel.fleet",
        "mlp_memory.tracing.command",
    ],
)
def test_importing_loads_nothing_heavy(module):
    out = run(f"import sys, {module}\nprint('loaded:', *(n for n in {HEAVY} if n in sys.modules))")
    assert out.strip() == "loaded:"
