"""Whether a benchmark could run, told before any stage's work."""

import importlib.util
from pathlib import Path

from mlp_memory.artifacts import UserError
from mlp_memory.evaluation.harness.config import BenchmarkConfig
from mlp_memory.evaluation.harness.rows import find
from mlp_memory.evaluation.harness.tasks import TASKS


def require_lm_eval() -> None:
    """Raises `UserError` where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "benchmarks run through lm-eval, which is not installed: make harness, or "
            "pip install 'mlp-memory[harness]'"
        )


def check(config: BenchmarkConfig) -> None:
    """Raises `UserError` where a benchmark that is asked for could not run."""
    if not config.wanted:
        return
    require_lm_eval()
    folder = Path(config.data).expanduser()
    if config.tasks and (not config.data or not folder.is_dir()):
        raise UserError(f"benchmark.data = {config.data!r} is no folder: give the one with the tasks' files")
    for name in config.tasks:
        if find(folder, TASKS[name].test) is None:
            files = " or ".join(TASKS[name].test)
            raise UserError(f"benchmark.tasks: {folder} has no {files}, which {name} needs")
