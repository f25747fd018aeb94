"""`verify`: every artifact of a workdir checked, shown as a table, and repaired if asked to."""

import contextlib
import sys
from collections.abc import Sequence

from mlp_memory import artifacts, pipeline
from mlp_memory.artifacts import Directory, Seal, UserError, first_line
from mlp_memory.job import Job
from mlp_memory.training.progress import Progress
from mlp_memory.verify.check import Checked, Fault, check_folder, folders, read_manifest
from mlp_memory.verify.repair import Repair, repair, repair_base, run_stage, stage_of
from mlp_memory.workdir import exclusive

UNFINISHED = "is unfinished"
LEFT_OUT = "not checked: tensorboard/ (logs), times.jsonl (seconds), studies/ (workdirs of their own)"


def saved_config(workdir: Directory) -> str | None:
    """What config.gin held when it was written; None where there is nothing that says so."""
    with contextlib.suppress(ValueError, AttributeError):
        if workdir.names() and (seal := Seal.read(workdir)) is not None:
            return seal.manifest
    return None


def check(job: Job) -> list[Checked]:
    """What is there, folder by folder in the order of the stages; the workdir's own files first."""
    workdir = job.workdir
    order = [stage.name for stage in pipeline.STAGES]
    tops = sorted(
        {stage.folder for stage in pipeline.STAGES}, key=lambda top: order.index(stage_of(job, top))
    )
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
        if one.unfinished and not one.faults:
            if one.folder in parents:
                one.add(artifacts.MANIFEST, UNFINISHED)
            else:
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
            if parent == "update":  # the digest of update.json, which the workdir's own seal has too
                continue
            path = "corpus/vocabulary" if parent == "vocabulary" else parent
            found.add(path)
            now, _ = read_manifest(job.workdir, path)
            if now is None:
                made_by = stage_of(job, path)
                one.notes.append(
                    f"{one.folder} is not compared with {path}, which is gone (made by {made_by})"
                )
            elif now.finished and now.fingerprint != before and not one.faults:
                what = f"was made from {parent} {before}, this {parent} is {now.fingerprint}"
                one.add(artifacts.MANIFEST, what, stale=True)
    return found


def table(job: Job, checked: Sequence[Checked]) -> str:
    """For people: a line a folder, then a line a fault."""
    rows = [("artifact", "stage", "files", "bytes", "verdict")]
    for one in checked:
        count = len(one.faults)
        verdict = f"{count} faults" if count > 1 else "1 fault" if count else "sound"
        if one.unfinished and not count:
            verdict = "unfinished"
        stage = stage_of(job, one.folder) if one.folder else ""
        rows.append((one.folder or "(workdir)", stage, f"{one.files:,}", f"{one.bytes:,}", verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i > 1 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join([*cells, row[4]]))
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
    with exclusive(job.workdir) if repairs else contextlib.nullcontext():
        checked = check(job)
        print(table(job, checked), flush=True)
        faulty = {one.folder: one.faults for one in checked if one.faults}
        if not faulty:
            return True
        if not repairs:
            print("verify --repair makes again just what is damaged")
            return False
        repair_base(job, faulty)
        before = {folder: _sealed_fingerprint(job.workdir, folder) for folder in faulty if folder}
        done = _repair_all(job, faulty)
    for stage in dict.fromkeys(one.stage for one in done if one.stage):
        print(f"--- repair: {stage}", flush=True)
        run_stage(job, stage, flags)
    fresh = Job(job.workdir, job.config)
    after = [one for one in check(fresh) if one.folder in faulty or one.faults]
    repaired = {one.folder for one in done}
    for folder, fingerprint in before.items():
        now, _ = read_manifest(job.workdir, folder)
        if folder in repaired and fingerprint and now is not None and now.fingerprint != fingerprint:
            _tell_stale(fresh, folder, fingerprint)
    print(table(fresh, after))
    return not any(one.faults for one in after)


def _repair_all(job: Job, faulty: dict[str, list[Fault]]) -> list[Repair]:
    """Takes away what is damaged, in the order of the stages; tells of what cannot be made again."""
    done, lost = [], set()
    for folder, faults in faulty.items():
        try:
            done.append(repair(job, folder, faults, lost))
            print(f"repair: {folder or '(workdir)'}: {done[-1].done}", flush=True)
        except UserError as error:
            lost |= {folder, folder.split("/")[0]}
            print(f"repair: {folder}: left as it is: {first_line(error)}", flush=True)
    return done


def _sealed_fingerprint(workdir: Directory, folder: str) -> str | None:
    """Of an artifact as it was when it was last finished."""
    manifest, seal = read_manifest(workdir, folder)
    if seal is not None:
        return artifacts.Manifest.from_json(seal.manifest, folder).fingerprint
    return manifest.fingerprint if manifest is not None and manifest.finished else None


def _tell_stale(job: Job, folder: str, before: str) -> None:
    """Says what was made from an artifact that is another one now."""
    stale = []
    for stage in pipeline.STAGES:
        try:
            found = artifacts.peek(job.workdir / stage.folder)
            if found is not None and found.parents.get(folder) == before:
                stale.append(stage.folder)
        except UserError as error:
            print(f"verify: {first_line(error)}", file=sys.stderr)
    what = f": delete and make again what was made from it ({', '.join(stale)})" if stale else ""
    print(f"repair: {folder} was made again but is not what it was (other software or hardware?){what}")
