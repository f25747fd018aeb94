"""What `verify --repair` makes again: a damaged chunk, shard or file, by the stage that made it.

What is to be made again becomes an unfinished artifact that lacks just that. Its seal stays until the stage
writes another: by it a repair that was killed is known and gone on with, and what was made is compared.
"""

import dataclasses
import subprocess
import sys
from collections.abc import Collection, Sequence

from mlp_memory import artifacts, pipeline
from mlp_memory.arrays import ChunkWriter, metadata
from mlp_memory.artifacts import MANIFEST, SEAL, Directory, Manifest, Seal, UserError
from mlp_memory.job import Job
from mlp_memory.recipes import SAVED
from mlp_memory.targets.certificate import NAME as CERTIFICATE
from mlp_memory.updating.request import RECORD, read_record, restore_record
from mlp_memory.verify.check import Fault, check_folder, read_manifest

_ZARR = "/zarr.json"
_OF_AN_UPDATE = ("tokenize", "pretrain", "import", "embed", "index", "retrieve", "distill")
_BY_CHUNKS = {"datastore": (), "targets": (CERTIFICATE,), "scored_rows": ()}
"""Kind whose stage makes missing chunks alone -> files that it writes again at its end."""


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


def repair(job: Job, folder: str, faults: Sequence[Fault], lost: Collection[str] = ()) -> Repair:
    """Takes away what is damaged, so that its stage makes just that; mends what needs no stage.

    Args:
      job: the workdir.
      folder: of the artifact; "" is the workdir itself.
      faults: in it, all of them.
      lost: folders that could not be repaired.

    Raises:
      UserError: it cannot be made again; then it is left as it is.
    """
    workdir = job.workdir
    if not folder:
        return repair_workdir(workdir, [fault.file for fault in faults])
    directory, stage = workdir / folder, stage_of(job, folder)
    manifest, seal = read_manifest(workdir, folder)
    if stale := [fault for fault in faults if fault.stale]:
        raise UserError(f"it {stale[0].what}: delete it and run `{stage}`")
    files, mended = {fault.file: fault.chunk for fault in faults}, []
    if manifest is not None and manifest.finished:
        mended = _mend(directory, manifest, seal, files)
        files = {file: chunk for file, chunk in files.items() if file not in mended and file != SEAL}
        if not files:
            return Repair(folder, f"written again: {', '.join(mended)}")
    _require_inputs(job, folder, stage, manifest, lost)
    if manifest is not None and not manifest.finished:
        return Repair(folder, "to be finished", stage)
    if all(fault.within or fault.file in mended for fault in faults):
        _unfinish(directory)
        return Repair(folder, f"to be made again: {', '.join(f.within for f in faults if f.within)}", stage)
    if manifest is not None and manifest.kind in _BY_CHUNKS:
        others = [file for file, chunk in files.items() if chunk is None]
        if set(others) <= set(_BY_CHUNKS[manifest.kind]):
            bad = {chunk for chunk in files.values() if chunk is not None}
            _reopen(workdir, folder, manifest, bad)
            return Repair(folder, f"taken away: {len(bad)} of its chunks", stage)
    return _take_away(workdir, folder, stage)


def repair_base(job: Job, folders: Collection[str]) -> None:
    """Repairs what a workdir updates where that has the same damage: files it took over are both's.

    Args:
      job: the workdir; nothing is done if it is no update.
      folders: of it, that are damaged.

    Raises:
      UserError: it cannot be repaired.
    """
    try:
        record = read_record(job.workdir)
    except UserError:  # it is told of each folder
        return
    if record is None:
        return
    base = Directory(record["base"])
    made = [folder for folder in folders if folder and stage_of(job, folder) in _OF_AN_UPDATE]
    there = [folder for folder in made if read_manifest(base, folder)[0] is not None]
    if not (shared := [folder for folder in there if check_folder(base, folder).faults]):
        return
    print(f"repair: {', '.join(shared)}: first in {base}, of which this is an update", flush=True)
    words = [sys.executable, "-m", "mlp_memory", "verify", "--repair", f"--workdir={base}"]
    if subprocess.run(words, check=False).returncode:
        raise UserError(f"verify: {base} could not be repaired, of which {job.workdir} is an update")


def _mend(
    directory: Directory, manifest: Manifest, seal: Seal | None, files: dict[str, int | None]
) -> list[str]:
    """Writes again what is known without its stage; the names."""
    mended = []
    if MANIFEST in files and seal is not None and directory.read(MANIFEST) != seal.manifest.encode():
        directory.write(MANIFEST, seal.manifest.encode())
        mended.append(MANIFEST)
    for name, spec in manifest.arrays.items():
        if f"{name}{_ZARR}" in files:
            directory.write(f"{name}{_ZARR}", metadata(spec))
            mended.append(f"{name}{_ZARR}")
    if set(files) == {SEAL}:
        artifacts.seal(directory, manifest)
        mended.append(f"{SEAL} (what it names is taken as it is)")
    return mended


def repair_workdir(workdir: Directory, files: Collection[str]) -> Repair:
    """The update's record out of its token stream, the saved config out of the seal, or the seal anew."""
    if RECORD in files:
        restore_record(workdir)
        if set(files) == {RECORD}:
            return Repair("", f"written again: {RECORD}")
    try:
        seal = Seal.read(workdir)
    except (ValueError, AttributeError):
        seal = None
    if seal is not None:
        workdir.write(SAVED, seal.manifest.encode())
        return Repair("", f"written again: {SAVED}")
    artifacts.write_sealed(workdir, SAVED, (workdir.read(SAVED) or b"").decode(errors="replace"), RECORD)
    return Repair("", f"written again: {SEAL}")


def _require_inputs(
    job: Job, folder: str, stage: str, manifest: Manifest | None, lost: Collection[str]
) -> None:
    """Raises `UserError` where what an artifact is made from is not there any more."""
    if record := read_record(job.workdir):
        if stage in _OF_AN_UPDATE and artifacts.peek(Directory(record["base"]) / "corpus/train") is None:
            raise UserError(f"what was updated, {record['base']}, is gone")
        return
    for parent in pipeline.find_stage(stage).parents(job.config):
        found, _ = read_manifest(job.workdir, parent)
        if found is None or parent in lost:
            state = "is gone" if found is None else "could not be repaired"
            made_by = stage_of(job, parent)
            raise UserError(f"{parent}, which `{stage}` reads, {state}: run `{made_by}` first")
    if stage == "tokenize":
        _require_texts(job, folder.removeprefix("corpus/"), manifest)
    if stage == "import":
        _ = job.source
    if stage == "import_memory":
        _ = job.memory_source


def _require_texts(job: Job, part: str, manifest: Manifest | None) -> None:
    from mlp_memory.corpus.documents import fingerprints, input_files

    source = job.config.corpus.elsewhere.get(part, job.config.corpus)
    now = fingerprints(source, input_files(source))
    before = manifest.config.get("inputs", now) if manifest is not None else now
    for name, fingerprint in now.items():
        if before.get(name, fingerprint) != fingerprint:
            raise UserError(f"{name} has changed since it was tokenized")


def _take_away(workdir: Directory, folder: str, stage: str) -> Repair:
    """The artifact, or the whole one that it is a part of where its stage cannot make the part alone."""
    top, _, within = folder.partition("/")
    if within and pipeline.find_stage(stage).folder == "index":
        _unfinish(workdir / top)
        (workdir / folder).delete()
        return Repair(folder, "taken away: the shard", stage)
    whole = folder if top == "corpus" else top
    directory, (manifest, _) = workdir / whole, read_manifest(workdir, whole)
    if manifest is None:
        directory.delete()
    else:
        _write_unfinished(directory, manifest)
        for name in directory.names():
            if name not in (MANIFEST, SEAL):
                directory.delete_file(name)
    return Repair(folder, f"taken away: {whole}", stage)


def _reopen(workdir: Directory, folder: str, manifest: Manifest, bad: Collection[int]) -> None:
    """Turns a finished array artifact into one that lacks these chunks, and so the one that it is part of."""
    directory, top = workdir / folder, folder.partition("/")[0]
    for chunk in range(artifacts.chunk_count(next(iter(manifest.arrays.values())))):
        if chunk not in bad:
            marks = {name: checksums[chunk] for name, checksums in manifest.checksums.items()}
            ChunkWriter.mark(directory, chunk, marks)
        else:  # a last chunk is written in part, for which what is there would be read
            for name, spec in manifest.arrays.items():
                directory.delete_file(f"{name}/{artifacts.chunk_key(spec, chunk)}")
    if top != folder:
        _unfinish(workdir / top)
    _write_unfinished(directory, manifest)


def _unfinish(directory: Directory) -> None:
    """Has the stage look an artifact through again."""
    manifest = artifacts.peek(directory)
    if manifest is not None and manifest.finished:
        _write_unfinished(directory, manifest)


def _write_unfinished(directory: Directory, manifest: Manifest) -> None:
    unfinished = dataclasses.replace(manifest, finished=False, checksums={}, facts={})
    directory.write(MANIFEST, unfinished.to_json().encode())


def stage_of(job: Job, folder: str) -> str:
    """The name of the stage that makes an artifact."""
    top = folder.split("/")[0]
    wanted = (stage.name for stage in pipeline.STAGES if stage.folder == top and stage.wanted(job.config))
    return next(wanted, job.made_by(top))


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
    if record is not None and stage in _OF_AN_UPDATE:
        words = ["update", f"--workdir={record['base']}", f"--output={job.workdir}"]
        words += [f"--add={name}" for name in record["add"]]
        words += [f"--delete={number}" for number in record["delete"]]
        words += [f"--delete={name}" for name in record["delete_files"]]
    done = subprocess.run([sys.executable, "-m", "mlp_memory", *words, *flags], check=False)
    if done.returncode:
        raise UserError(f"verify: {stage} ended with code {done.returncode}; what is sound was kept")
