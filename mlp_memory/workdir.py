"""A workdir between stages: one process at a time, the time spent, what state it is in."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mlp_memory import artifacts
from mlp_memory.artifacts import Directory, UserError
from mlp_memory.job import Job
from mlp_memory.pipeline import STAGES, Stage

_TIMES = "times.jsonl"
_LOCK_SECONDS = 5.0


@contextmanager
def exclusive(workdir: Directory) -> Iterator[None]:
    """Holds the workdir; a second process is told to wait. The lock dies with its process.

    Raises:
      UserError: another process is at work there, or the folder cannot be written.
    """
    if not workdir.is_local:
        yield
        return
    try:
        workdir.path.mkdir(parents=True, exist_ok=True)
        file = open(workdir.path / ".lock", "a+")  # noqa: SIM115 (open for as long as the lock is held)
    except OSError as error:
        raise UserError(f"cannot write to --workdir {workdir}: {error.strerror}") from error
    with file:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise UserError(
                        f"another process (pid {file.read().strip() or '?'}) is at work in {workdir}: "
                        "wait for it or use another --workdir"
                    ) from None
                time.sleep(0.1)
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def timed(workdir: Directory, stage: Stage) -> Iterator[None]:
    """Adds the time a stage took, or had taken when it was interrupted, to the workdir's record."""
    start = time.monotonic()
    try:
        yield
    finally:
        line = json.dumps({"stage": stage.name, "seconds": round(time.monotonic() - start, 2)}) + "\n"
        with contextlib.suppress(UserError):  # a full disk; what the stage itself says of it counts
            workdir.write(_TIMES, (workdir.read(_TIMES) or b"") + line.encode())


def seconds_by_stage(workdir: Directory) -> dict[str, float]:
    """Seconds that each stage took, restarts added up."""
    found: dict[str, float] = {}
    for line in (workdir.read(_TIMES) or b"").splitlines():
        # A damaged line costs its seconds.
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            entry = json.loads(line)
            found[entry["stage"]] = found.get(entry["stage"], 0.0) + float(entry["seconds"])
    return found


def _state(job: Job, stage: Stage) -> str:
    """done, missing, unfinished with its share, or why it is not usable."""
    try:
        if stage.is_done(job):
            return "done"
    except UserError as error:
        return f"not usable: {error}"
    directory = job.workdir / stage.folder
    parts = [directory / part for part in stage.parts(job.config)] or [directory]
    found = [artifacts.peek(part) for part in parts]
    if not any(found):
        return "missing"
    if stage.parts(job.config):
        return f"unfinished: {sum(m is not None and m.finished for m in found)} of {len(parts)} parts"
    names = directory.names()
    if found[0].arrays:
        chunks = artifacts.chunk_count(next(iter(found[0].arrays.values())))
        return f"unfinished: {sum(n.startswith('chunks/') for n in names)} of {chunks} chunks"
    steps = {int(n.split("/")[1]) for n in names if n.startswith("steps/") and n.split("/")[1].isdigit()}
    return f"unfinished: step {max(steps)} saved" if steps else "unfinished"


def status_table(job: Job) -> str:
    """Each stage's state, size on disk and time, for people."""
    times = seconds_by_stage(job.workdir)
    rows = [("stage", "what it makes", "size", "time", "state")]
    for stage in STAGES:
        if not stage.wanted(job.config):
            continue
        size = (job.workdir / stage.folder).size()
        rows.append(
            (
                stage.name,
                stage.help,
                "–" if not size else f"{size / 1e6:,.1f} MB",
                f"{times[stage.name]:,.0f} s" if stage.name in times else "–",
                _state(job, stage),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            row[1].ljust(widths[1]),
            row[2].rjust(widths[2]),
            row[3].rjust(widths[3]),
        ]
        lines.append("  ".join([*cells, row[4]]))
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
