"""Artifacts that several workdirs have alike: made in one, linked or copied into the others.

Alike means that a stage of this variant, asked with its own settings and its own parents' fingerprints, takes
the other workdir's artifact for finished; nothing else is compared.
"""

import os
from collections.abc import Iterable

from mlp_memory import artifacts
from mlp_memory.artifacts import Directory, Manifest, UserError
from mlp_memory.job import Job
from mlp_memory.pipeline import Stage


def finished(job: Job, stage: Stage, others: Iterable[Directory]) -> bool:
    """Whether a stage's artifact is there, after it has been looked for in other workdirs.

    Args:
      job: the variant; the stage's parents are finished there.
      stage: whose artifact.
      others: workdirs to look in.

    Raises:
      UserError: the workdir has one of its own that was made otherwise.
    """
    directory = job.workdir / stage.folder
    if _is_link(directory):
        if _fits(job, stage, job.workdir):
            return True
        directory.path.unlink()  # it led to what has since been deleted or made otherwise
    elif stage.is_done(job):
        return True
    if _begun(directory):
        return False  # it goes on where it stopped
    for other in others:
        if other.location != job.workdir.location and _fits(job, stage, other):
            _take(other / stage.folder, directory)
            return True
    return False


def _is_link(directory: Directory) -> bool:
    return directory.is_local and directory.path.is_symlink()


def _begun(directory: Directory) -> bool:
    return directory.path.is_dir() if directory.is_local else bool(directory.names())


def _fits(job: Job, stage: Stage, other: Directory) -> bool:
    """Whether the other workdir holds, finished and whole, what the stage would make here."""
    directory = other / stage.folder
    try:
        if parts := stage.parts(job.config):
            if any(artifacts.peek(directory / part) is None for part in parts):
                return False
            return stage.is_done(Job(other, job.config))  # what has parts has no parents
        found = artifacts.peek(directory)
        if found is None or not found.finished:
            return False
        wanted = Manifest(found.kind, stage.settings(job), job.fingerprints(*stage.parents(job.config)))
        artifacts.require(directory, stage.name)
        artifacts.require_same(directory, found, wanted)
        return found.parents == wanted.parents
    except UserError:
        return False


def _take(source: Directory, target: Directory) -> None:
    """A relative link on a local disk; elsewhere a copy, its manifests last."""
    if target.is_local and source.is_local:
        real = source.path.resolve()
        target.path.parent.mkdir(parents=True, exist_ok=True)
        target.path.symlink_to(os.path.relpath(real, target.path.parent.resolve()), target_is_directory=True)
        return
    target.take_all(source)
