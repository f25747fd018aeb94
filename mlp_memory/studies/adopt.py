"""The adopt stage: targets that another decoder's datastore gave, for a memory on this decoder's states.

Row i of any targets is position i of the train stream (the row rule), so targets over the same train stream
fit whichever states are learned on. What is published names its true parents: the train stream and, among its
settings, the targets it was taken from; the datastore of this workdir is none of them.
"""

import dataclasses
from typing import Any

import jax

from mlp_memory import artifacts
from mlp_memory.artifacts import Directory, UserError
from mlp_memory.job import Job
from mlp_memory.pipeline import Stage

_TRAIN = "corpus/train"
_FOLDER = "targets"


def adopt_stage(teacher: Directory) -> Stage:
    """Takes over the targets of another workdir, which must have the same train stream."""

    def theirs() -> artifacts.Manifest:
        return artifacts.require(teacher / _FOLDER, "retrieve")

    def settings(job: Job) -> dict[str, Any]:
        return {**theirs().config, "taken_from": theirs().fingerprint}

    def work(job: Job, directory: Directory) -> None:
        found, ours = theirs(), job.fingerprints(_TRAIN)
        if found.parents.get(_TRAIN) != ours[_TRAIN]:
            raise UserError(
                f"{teacher}/{_FOLDER} was made over train stream {found.parents.get(_TRAIN)}, this one is "
                f"{ours[_TRAIN]}: rows would not be the same positions; give both the same corpus settings"
            )
        if jax.process_index() > 0:
            return
        manifest = artifacts.begin(directory, found.kind, settings(job), ours, found.arrays)
        for name in (teacher / _FOLDER).names():
            if not name.endswith("manifest.json"):
                directory.write(name, (teacher / _FOLDER).read(name) or b"")
        artifacts.finish(directory, dataclasses.replace(manifest, checksums=found.checksums), **found.facts)

    return Stage("adopt", _FOLDER, "another decoder's targets", settings, lambda config: (_TRAIN,), work)
