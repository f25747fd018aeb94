"""What `verify --repair` makes again: a damaged chunk, shard or file, by the stage that made it."""

import dataclasses
import subprocess
import sys
from collections.abc import Sequence

from mlp_memory import artifacts, pipeline
from mlp_memory.arrays import ChunkWriter, metadata
from mlp_memory.artifacts import MANIFEST, SEAL, Directory, Manifest, Seal, UserError
from mlp_memory.job import Job
from mlp_memory.recipes import SAVED
from mlp_memory.updating.request import RECORD, read_record
from mlp_memory.verify.check import Fault, read_manifest

_ZARR = "/zarr.json"
_OF_AN_UPDATE = ("tokenize", "pretrain", "import", "embed", "index", "retrieve", "distill")


@dataclasses.dataclass(frozen=True)
class Repair:
    """What was done about a folder's faults.

    Attributes:
      folder: below the workdir.
      done: in words.
      stage: that has to run; "" where nothing more has to.
    """

    folder: str
    done: str
    stage: str = ""


def repair(job: Job, folder: str, faults: Sequence[Fault]) -> Repair:
    """Takes away what is damaged, so that its stage makes just that; mends what needs no stage.

    After a kill the folder is an unfinished one, which is left to its stage.

    Args:
      job: the workdir.
      folder: of the artifact; "" is the workdir itself.
      faults: in it, all of them.

    Raises:
      UserError: nobody knows how the folder was made.
    """
    workdir = job.workdir
    if not folder:
        return repair_workdir(workdir)
    directory, stage = workdir / folder, stage_of(job, folder)
    manifest, seal = read_manifest(workdir, folder)
    if manifest is None:
        return _take_away(workdir, folder, manifest, stage)
    files, mended = {fault.file: fault.chunk for fault in faults}, []
    if MANIFEST in files and seal is not None and directory.read(MANIFEST) != seal.manifest.encode():
        directory.write(MANIFEST, seal.manifest.encode())
        mended.append(MANIFEST)
    for name, spec in manifest.arrays.items():
        if f"{name}{_ZARR}" in files:
            directory.write(f"{name}{_ZARR}", metadata(spec))
            mended.append(f"{name}{_ZARR}")
    if set(files) - set(mended) == {SEAL}:
        artifacts.seal(directory, manifest)
        mended.append(f"{SEAL} (what it names is taken as it is)")
    left = {file: chunk for file, chunk in files.items() if file not in mended and file != SEAL}
    if not left:
        return Repair(folder, f"written again: {', '.join(mended)}")
    chunks = set(left.values())
    if None not in chunks and manifest.kind in ("datastore", "targets"):
        _reopen(directory, manifest, chunks)
        return Repair(folder, f"taken away: {len(chunks)} of its chunks", stage)
    return _take_away(workdir, folder, manifest, stage)


def repair_workdir(workdir: Directory) -> Repair:
    """The saved config out of the seal, or the seal anew."""
    try:
        seal = Seal.read(workdir)
    except (ValueError, AttributeError):
        seal = None
    if seal is not None:
        workdir.write(SAVED, seal.manifest.encode())
        return Repair("", f"written again: {SAVED}")
    artifacts.seal_text(workdir, SAVED, RECORD)
    return Repair("", f"written again: {SEAL}")


def _take_away(workdir: Directory, folder: str, manifest: Manifest | None, stage: str) -> Repair:
    """The artifact, or the whole one that it is a part of where its stage cannot make the part alone."""
    top, _, within = folder.partition("/")
    if within and pipeline.find_stage(stage).folder == "index":
        (workdir / folder).delete()
        _unfinish(workdir / top)
        return Repair(folder, "taken away: the shard", stage)
    whole = folder if top == "corpus" else top
    (workdir / whole).delete()
    return Repair(folder, f"taken away: {whole}", stage)


def _reopen(directory: Directory, manifest: Manifest, bad: set[int | None]) -> None:
    """Turns a finished array artifact into one that lacks these chunks."""
    for chunk in range(artifacts.chunk_count(next(iter(manifest.arrays.values())))):
        if chunk not in bad:
            marks = {name: checksums[chunk] for name, checksums in manifest.checksums.items()}
            ChunkWriter.mark(directory, chunk, marks)
    unfinished = dataclasses.replace(manifest, finished=False, checksums={}, facts={})
    directory.write(MANIFEST, unfinished.to_json().encode())


def _unfinish(directory: Directory) -> None:
    """Has the stage look an artifact through again."""
    manifest = artifacts.peek(directory)
    if manifest is not None and manifest.finished:
        unfinished = dataclasses.replace(manifest, finished=False, facts={})
        directory.write(MANIFEST, unfinished.to_json().encode())


def stage_of(job: Job, folder: str) -> str:
    """The name of the stage that makes an artifact.

    Raises:
      UserError: no stage does.
    """
    top = folder.split("/")[0]
    for stage in pipeline.STAGES:
        if stage.folder == top and stage.wanted(job.config):
            return stage.name
    raise UserError(
        f"{job.workdir}/{folder} is made by no stage of this recipe: delete it, or give its --gin_file"
    )


def run_stage(job: Job, stage: str, flags: Sequence[str]) -> None:
    """Runs a stage in a process of its own; the update that the workdir is, where that makes the folder.

    Args:
      job: the workdir.
      stage: its name.
      flags: the recipe's, --gin_file and --gin.

    Raises:
      UserError: it fails; it has said why.
    """
    words = [stage, f"--workdir={job.workdir}"]
    record = read_record(job.workdir)
    if record is not None and stage in (
        "tokenize",
        "pretrain",
        "import",
        "embed",
        "index",
        "retrieve",
        "distill",
    ):
        words = ["update", f"--workdir={record['base']}", f"--output={job.workdir}"]
        words += [f"--add={name}" for name in record["add"]]
        words += [f"--delete={number}" for number in record["delete"]]
        words += [f"--delete={name}" for name in record["delete_files"]]
    done = subprocess.run([sys.executable, "-m", "mlp_memory", *words, *flags], check=False)
    if done.returncode:
        raise UserError(f"verify: {stage} ended with code {done.returncode}; what is sound was kept")
