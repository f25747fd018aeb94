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

# An update of that: one document added, one deleted. It trains on what its rows are searched by.
UPDATE = """
import sys
import numpy as np
from mlp_memory.recipes import load_config
from mlp_memory.artifacts import Directory
from mlp_memory.job import Job
from mlp_memory.updating.request import read_request
from mlp_memory.updating.train import JoinedStates
from mlp_memory.updating.update import Update, _chosen

workdir, output, added, recipe, *bindings = sys.argv[1:]
base = Directory(workdir)
config = load_config([recipe], bindings, base)
update = Update(read_request(base, [added], ["1"], "text"), Directory(output), config)
update.prepare()
while stage := update.next_stage():
    stage.work(update.job, update.job.workdir / stage.folder)
    update.job = Job(update.job.workdir, config)
if config.embed.store == "none":
    job, rows = update.job, config.distill.block_rows
    old = len(update.base.stream("train"))
    states = JoinedStates(update.base.memory_inputs(), job.memory_inputs(), old)
    asked = _chosen(job, update.base)
    for start in range(0, len(asked), rows):
        first = int(asked.rows(start, start + 1)[0])
        batch = {name: np.asarray(value)[None] for name, value in states.block(first, rows).items()}
        asks = asked.asks(start, start + rows)
        queries = asked.queries(start, start + rows)[asks]
        np.testing.assert_allclose(np.asarray(states.of(states.frozen, batch))[0][asks], queries, atol=2e-4)
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


def run(program: str, *words: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bindings", [INT8, NONE], ids=["int8", "none"])
def test_teacher_and_memory_come_out_of_a_small_store(small_run, recipe, tmp_path, bindings):
    workdir = tmp_path / "workdir"
    for folder in ("corpus", "decoder"):
        shutil.copytree(small_run / folder, workdir / folder)
    run(PROGRAM, workdir, recipe, *bindings)
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

    (tmp_path / "added.txt").write_text("A document of a few words, added later. " * 20)
    trained_on = (*bindings, "update.memory='trained_on'")
    run(UPDATE, workdir, tmp_path / "updated", tmp_path / "added.txt", recipe, *trained_on)
    updated = peek(Directory(tmp_path / "updated/memory")).facts
    assert updated["checksums"] != memory["checksums"]
    assert updated["validation"]["validation_memory_perplexity"] < 1.05 * loss
    if bindings == INT8:
        codecs = [(folder / "datastore/codec.npz").read_bytes() for folder in (workdir, tmp_path / "updated")]
        assert codecs[0] == codecs[1]
