import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlp_memory.arrays import ArrayReader
from mlp_memory.artifacts import Directory, peek

REPOSITORY = Path(__file__).parents[2]
# In one process, which saves three starts of Python per kind of store.
PROGRAM = """
import sys
from mlp_memory.recipes import load_config
from mlp_memory.artifacts import Directory
from mlp_memory.job import Job
from mlp_memory.pipeline import find_stage

workdir, recipe, *bindings = sys.argv[1:]
job = Job(Directory(workdir), load_config([recipe], bindings, Directory(workdir)))
for name in ("embed", "index", "retrieve", "distill"):
    stage = find_stage(name)
    assert not stage.is_done(job)
    stage.work(job, job.workdir / stage.folder)
    job = Job(job.workdir, job.config)
"""

INT8 = ("embed.key_dtype='int8'", "embed.key_dim=16", "embed.projection_rows=1000")
NONE = ("embed.store='none'",)


def probabilities(workdir, vocabulary=320) -> np.ndarray:
    """The targets as dense distributions, [N, vocabulary]."""
    targets = Directory(workdir / "targets")
    ids, probs = (ArrayReader(targets, name)[:] for name in ("token_ids", "probs"))
    dense = np.zeros((len(ids), vocabulary))
    np.put_along_axis(dense, ids.astype(np.int64), probs.astype(np.float64), axis=1)
    return dense


@pytest.mark.parametrize("bindings", [INT8, NONE], ids=["int8", "none"])
def test_teacher_and_memory_come_out_of_a_small_store(small_run, recipe, tmp_path, bindings):
    workdir = tmp_path / "workdir"
    for folder in ("corpus", "decoder"):
        shutil.copytree(small_run / folder, workdir / folder)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(workdir), str(recipe), *bindings],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    facts = peek(Directory(workdir / "datastore")).facts
    memory, full = (peek(Directory(folder / "memory")).facts for folder in (workdir, small_run))
    assert memory["model"] == full["model"]  # it reads whole hidden states, whatever is searched
    loss, full_loss = (f["validation"]["validation_memory_perplexity"] for f in (memory, full))
    assert abs(np.log(loss / full_loss)) < 0.1
    if bindings == NONE:
        assert not (workdir / "datastore/keys").exists()
        assert facts["bytes_per_token"] == 0
        # Keys computed again are the keys that would be stored: the teacher is the very same.
        checksums = [peek(Directory(folder / "targets")).checksums for folder in (workdir, small_run)]
        assert checksums[0] == checksums[1]
    else:
        assert facts["key_dim"] == facts["bytes_per_token"] == 16
        stored = ArrayReader(Directory(workdir / "datastore"), "keys")
        assert (stored.dtype, stored.shape[1]) == (np.int8, 16)
        variation = np.abs(probabilities(workdir) - probabilities(small_run)).sum(axis=1).mean() / 2
        assert 0 < variation < 0.25
