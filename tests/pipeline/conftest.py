import contextlib
import dataclasses
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[2]

# As small as a run can be that still takes every path: several chunks, checkpoints and epochs.
RECIPE = """
corpus.source = "jsonl"
corpus.train_files = ["{text}"]
corpus.validation_fraction = 0.15
corpus.test_fraction = 0.15
corpus.vocab_size = 300
corpus.chunk_rows = 1000
decoder.layers = 1
decoder.dim = 32
decoder.heads = 2
pretrain.steps = 20
pretrain.batch_size = 4
pretrain.context = 32
pretrain.eval_every = 5
pretrain.eval_rows = 512
pretrain.warmup = 5
embed.context = 32
embed.stride = 16
embed.chunk_rows = 512
index.recall_sample = 50
retrieve.k = 8
retrieve.top_m = 8
retrieve.chunk_rows = 512
retrieve.temperatures = (0.5, 1.0)
memory.layers = 1
distill.steps = 20
distill.batch_size = 8
distill.eval_every = 5
distill.eval_rows = 512
corpus.elsewhere = {{"other": @other/part()}}
other/part.source = "jsonl"
other/part.train_files = ["{text}"]
other/part.fraction = 0.2
gate.guards = ["other"]
gate.rows = 1000
gate.folds = 2
gate.bootstrap = 50
gate.penalties = (1e-2,)
joint.steps = 10
joint.batch_size = 4
joint.context = 32
joint.eval_every = 5
joint.eval_rows = 512
evaluate.max_rows = 600
evaluate.bootstrap = 50
evaluate.samples = 2
evaluate.chunk_rows = 300
"""


def environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}


@dataclasses.dataclass(frozen=True)
class Answer:
    code: int
    out: str
    error: str
    seconds: float  # by the clock or of CPU time, whichever is less: other work must not fail a test


def command(*words: object, timeout: float = 600) -> Answer:
    """Runs `python -m mlp_memory WORDS`."""
    start, cpu = time.monotonic(), _children_cpu_seconds()
    done = subprocess.run(
        [sys.executable, "-m", "mlp_memory", *map(str, words)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    seconds = min(time.monotonic() - start, _children_cpu_seconds() - cpu)
    return Answer(done.returncode, done.stdout, done.stderr, seconds)


def _children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="session")
def mlp_memory():
    return command


@pytest.fixture(scope="session")
def start_command():
    """Starts `python -m mlp_memory WORDS` and returns at once."""

    def start(*words: object, log: Path) -> subprocess.Popen:
        with log.open("ab") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "mlp_memory", *map(str, words)],
                env=environment(),
                stdout=subprocess.DEVNULL,
                stderr=file,
            )

    return start


@contextlib.contextmanager
def made_once(folder: Path) -> Iterator[bool]:
    """Whether `folder` is still to be made; other processes of the same test run wait until it is."""
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder.with_suffix(".done")
        yield not done.exists()
        done.touch()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all processes of a test run have."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session")
def recipe(shared: Path) -> Path:
    """A gin file of a run that takes seconds, over documents of random words."""
    folder = shared / "recipe"
    with made_once(folder) as missing:
        if missing:
            folder.mkdir()
            write_recipe(folder)
    return folder / "tiny.gin"


def write_recipe(folder: Path) -> None:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnop"), rng.integers(2, 7))) for _ in range(120)]
    with (folder / "train.jsonl").open("w") as file:
        for _ in range(60):
            topic = rng.choice(words, 12)
            text = " ".join(rng.choice(topic if rng.random() < 0.7 else words) for _ in range(60))
            file.write(json.dumps({"text": f"{text}."}) + "\n")
    (folder / "tiny.gin").write_text(RECIPE.format(text=folder / "train.jsonl"))


@pytest.fixture(scope="session")
def small_run(recipe: Path, shared: Path) -> Path:
    """The workdir of a finished run; tests that change something take `workdir`."""
    folder = shared / "small_run"
    with made_once(folder) as missing:
        if missing:
            answer = command("run", f"--workdir={folder}", f"--gin_file={recipe}")
            assert answer.code == 0, answer.error
    return folder


@pytest.fixture
def workdir(small_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished workdir."""
    return Path(shutil.copytree(small_run, tmp_path / "workdir"))
