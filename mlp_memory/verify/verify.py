"""`verify`: every artifact of a workdir checked, shown as a table, and repaired if asked to."""

import sys
from collections.abc import Sequence

from mlp_memory import artifacts, pipeline
from mlp_memory.artifacts import Directory, UserError, first_line
from mlp_memory.job import Job
from mlp_memory.recipes import SAVED
from mlp_memory.training.progress import Progress
from mlp_memory.verify.check import Checked, Fault, check_folder, folders, read_manifest
from mlp_memory.verify.repair import Repair, repair, repair_workdir, run_stage, stage_of
from mlp_memory.workdir import exclusive

UNFINISHED = "is unfinished"
LEFT_OUT = "not checked: tensorboard/ (a log), times.jsonl (seconds), studies/ (workdirs of their own)"


def restore_config(workdir: Directory, repairs: bool) -> None:
    """Writes a damaged config.gin again, which is read before anything else; tells of it if it may not.

    Raises:
      UserError: it is damaged.
    """
    for fault in check_folder(workdir, "").faults if workdir.names() else []:
        if fault.file == SAVED:
            if not repairs:
                raise UserError(f"{workdir}/{fault}: give --repair, or the recipe as --gin_file")
            print(f"repair: {repair_workdir(workdir).done}", flush=True)


def check(job: Job) -> list[Checked]:
    """What is there, folder by folder in the order of the stages; the workdir's own files first."""
    workdir = job.workdir
    tops = list(dict.fromkeys(stage.folder for stage in pipeline.STAGES if stage.wanted(job.config)))
    found = folders(workdir, tops)
    sizes = [(workdir / top).size() or 0 for top in tops]
    with Progress("verify", sum(sizes), "bytes") as progress:
        checked = [check_folder(workdir, "")]
        checked += [check_folder(workdir, folder, progress.advance) for folder in found]
    parents = _parents(job, checked)
    there = {one.folder for one in checked}
    checked[0].notes += [
        f"{folder} is not there any more: `run` makes it again" for folder in sorted(parents - there)
    ]
    for one in checked:
        if one.unfinished and one.folder in parents:
            one.add(artifacts.MANIFEST, UNFINISHED)
        elif one.unfinished:
            one.notes.append(f"{one.folder} is unfinished: run `{stage_of(job, one.folder)}` to go on")
    return checked


def _parents(job: Job, checked: Sequence[Checked]) -> set[str]:
    """What finished artifacts were made from; a parent that is another one now is their fault."""
    found = set()
    for one in checked:
        manifest, _ = read_manifest(job.workdir, one.folder) if one.folder else (None, None)
        if manifest is None or not manifest.finished or manifest.kind == "index_shard":
            continue
        for parent, before in manifest.parents.items():
            path = "corpus/vocabulary" if parent == "vocabulary" else parent
            found.add(path)
            now, _ = read_manifest(job.workdir, path)
            if now is not None and now.finished and now.fingerprint != before and not one.faults:
                what = f"was made from {parent} {before}, this {parent} is {now.fingerprint}"
                one.add(artifacts.MANIFEST, what)
    return found


def table(job: Job, checked: Sequence[Checked]) -> str:
    """For people: a line a folder, then a line a fault."""
    rows = [("artifact", "files", "bytes", "verdict")]
    for one in checked:
        count = len(one.faults)
        verdict = f"{count} faults" if count > 1 else "1 fault" if count else "sound"
        if one.unfinished and not count:
            verdict = "unfinished"
        rows.append((one.folder or "(workdir)", f"{one.files:,}", f"{one.bytes:,}", verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]), row[3]])
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    lines += [f"note: {note}" for one in checked for note in one.notes]
    lines += [f"fault: {fault}{_cure(job, fault)}" for one in checked for fault in one.faults]
    return "\n".join([*lines, LEFT_OUT])


def _cure(job: Job, fault: Fault) -> str:
    if not fault.folder:
        return " (any stage run with --gin_file writes it again)"
    return f" (made by {stage_of(job, fault.folder)})"


def verify(job: Job, flags: Sequence[str], repairs: bool) -> bool:
    """Checks a workdir, repairs it if asked to, prints what was found; whether all is sound now.

    Args:
      job: the workdir.
      flags: of the recipe, for the stages that repairs run.
      repairs: whether to repair.

    Raises:
      UserError: a stage that a repair needs cannot run.
    """
    if not job.workdir.names():
        raise UserError(f"{job.workdir} is empty: check --workdir")
    checked = check(job)
    print(table(job, checked))
    faulty = {one.folder: one.faults for one in checked if one.faults}
    if not faulty:
        return True
    if not repairs:
        print("verify --repair makes again just what is damaged")
        return False
    before = {folder: _fingerprint(job.workdir, folder) for folder in faulty if folder}
    with exclusive(job.workdir):
        done = [_repair(job, folder, faults) for folder, faults in faulty.items()]
    for stage in dict.fromkeys(one.stage for one in done if one.stage):
        print(f"--- repair: {stage}", flush=True)
        run_stage(job, stage, flags)
    fresh = Job(job.workdir, job.config)
    after = [one for one in check(fresh) if one.folder in faulty]
    for folder, fingerprint in before.items():
        if fingerprint is not None and _fingerprint(job.workdir, folder) != fingerprint:
            _tell_stale(fresh, folder, fingerprint)
    print(table(fresh, after))
    return not any(one.faults for one in after)


def _repair(job: Job, folder: str, faults: Sequence[Fault]) -> Repair:
    unfinished = all(fault.what == "is unfinished" for fault in faults)
    done = (
        Repair(folder, "to be finished", stage_of(job, folder)) if unfinished else repair(job, folder, faults)
    )
    print(f"repair: {folder or '(workdir)'}: {done.done}", flush=True)
    return done


def _fingerprint(workdir: Directory, folder: str) -> str | None:
    manifest, _ = read_manifest(workdir, folder)
    return None if manifest is None or not manifest.finished else manifest.fingerprint


def _tell_stale(job: Job, folder: str, before: str) -> None:
    """Says what was made from an artifact that is another one now."""
    stale = []
    for stage in pipeline.STAGES:
        found = artifacts.peek(job.workdir / stage.folder)
        try:
            if found is not None and found.parents.get(folder) == before:
                stale.append(stage.folder)
        except UserError as error:
            print(f"verify: {first_line(error)}", file=sys.stderr)
    what = f": delete and make again what was made from it ({', '.join(stale)})" if stale else ""
    print(f"repair: {folder} was made again but is not what it was (other software or hardware?){what}")
