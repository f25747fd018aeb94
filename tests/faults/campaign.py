"""The fault campaign: a tiny run is hurt again and again and must end in the bytes of an unhurt one.

    make faults ARGS="--kills=100 --seed=0"
    python tests/faults/campaign.py kills flips --folder=/tmp/faults --kills=100

Parts, all of them if none is named:

  kills     `run` is sent SIGKILL or SIGTERM at random moments of every stage, several times a run
  flips     a random bit of each file of a finished run is flipped: `verify` names the file, and
            `--repair`, of a few at once, gives the bytes back
  full      the disk is full (a tmpfs of a few hundred kilobytes, then grown): one line, then the run goes on
  readonly  the workdir is read-only (a bind mount): one line
  two       two runs on one workdir at the same time
  clock     time.time() jumps by days, back and forth

What a machine does not allow (mounts want root) is said and counted as not run. Lost workers of Beam and of a
training by several processes are in tests/parallel/test_fleet.py and tests/multi_process.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests/pipeline")]

from conftest import environment, write_recipe  # noqa: E402 (the tests' own recipe)
from test_kill import compared  # noqa: E402
from test_verify import faults, files_of, flip  # noqa: E402

PARTS = ("kills", "flips", "full", "readonly", "two", "clock")
# Of a run that is hurt so often in a row, the next one is left alone to its end.
KILLS_PER_RUN = 12
_SITE = """
import random, time
_now, _random = time.time, random.Random(0)
time.time = lambda: _now() + _random.choice((-86400, -1, 0, 0, 3600, 864000))
"""


class Campaign:
    """One campaign's folder, its unhurt run, and what has been counted."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng, self.counts = folder, np.random.default_rng(seed), Counter()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "recipe/tiny.gin").exists():
            (folder / "recipe").mkdir(exist_ok=True)
            write_recipe(folder / "recipe")
        self.reference = folder / "reference"
        done = self.run(self.reference)
        assert done.returncode == 0, done.stderr[-2000:]

    def words(self, workdir: Path) -> list[str]:
        recipe = self.folder / "recipe/tiny.gin"
        return [sys.executable, "-m", "mlp_memory", "run", f"--workdir={workdir}", f"--gin_file={recipe}"]

    def run(self, workdir: Path, **more: str) -> subprocess.CompletedProcess:
        """To its end."""
        env = {**environment(), **more}
        return subprocess.run(self.words(workdir), env=env, capture_output=True, text=True)

    def differing(self, workdir: Path) -> list[str]:
        """Files that are not those of the unhurt run."""
        expected, found = compared(self.reference), compared(workdir)
        names = {*expected, *found}
        return sorted(name for name in names if expected.get(name) != found.get(name))

    def count(self, fault: str, stage: str, verdict: str) -> None:
        self.counts[fault, stage, verdict] += 1
        print(f"{fault:12} {stage:10} {verdict}", flush=True)

    def verdict(self, workdir: Path, log: str) -> str:
        """After a run that has been hurt and then left alone to its end."""
        if "Traceback" in log:
            return "FAILED: a traceback"
        return f"FAILED: {differing[:3]} differ" if (differing := self.differing(workdir)) else "same bytes"


def kills(campaign: Campaign, count: int) -> None:
    """Random kills; each is counted once its run has ended as it should, or not."""
    number = 0
    while count > 0:
        workdir, hurt = campaign.folder / f"killed-{number}", []
        number += 1
        shutil.rmtree(workdir, ignore_errors=True)
        log = campaign.folder / "killed.log"
        log.write_text("")
        while len(hurt) < min(KILLS_PER_RUN, count):
            with log.open("a") as file:
                process = subprocess.Popen(
                    campaign.words(workdir), env=environment(), stdout=file, stderr=file
                )
            # From a start that has hardly begun to a stage or two later.
            wait = float(campaign.rng.choice([campaign.rng.uniform(0, 3), campaign.rng.uniform(3, 25)]))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait)
            if process.poll() is not None:
                break  # it was done
            sent = signal.SIGKILL if campaign.rng.random() < 0.6 else signal.SIGTERM
            process.send_signal(sent)
            process.wait()
            said = [line for line in log.read_text().splitlines() if line.startswith("--- ")]
            stage = said[-1].split()[1].rstrip(":") if said else "start"
            hurt.append((sent.name, stage))
        done = campaign.run(workdir)
        text = log.read_text() + done.stderr
        verdict = campaign.verdict(workdir, text) if done.returncode == 0 else f"FAILED: {done.stderr[-200:]}"
        for fault, stage in hurt:
            campaign.count(fault, stage, verdict)
        count -= len(hurt)
        if verdict == "same bytes":
            shutil.rmtree(workdir)


def flips(campaign: Campaign) -> None:
    """One flipped bit in every file, one file at a time; then repairs."""
    workdir = campaign.folder / "flipped"
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(campaign.reference, workdir)
    for path in files_of(workdir):
        name, kept = str(path.relative_to(workdir)), path.read_bytes()
        if not kept or name == "config.gin":
            continue
        flip(path, campaign.rng)
        found = any(line.startswith(name) for line in faults(workdir))
        campaign.count("flip, found", name.split("/")[0], "found" if found else f"FAILED: {name}")
        path.write_bytes(kept)
    for top in sorted({path.relative_to(workdir).parts[0] for path in files_of(workdir)}):
        paths = [workdir / top] if (workdir / top).is_file() else files_of(workdir / top)
        path = paths[int(campaign.rng.integers(len(paths)))]
        flip(path, campaign.rng)
        words = [sys.executable, "-m", "mlp_memory", "verify", f"--workdir={workdir}", "--repair"]
        done = subprocess.run(words, env=environment(), capture_output=True, text=True)
        same = done.returncode == 0 and not campaign.differing(workdir)
        name = str(path.relative_to(workdir))
        verdict = "same bytes" if same else f"FAILED: {name}: {done.stdout[-300:]}{done.stderr[-300:]}"
        campaign.count("flip, repair", top, verdict)
    shutil.rmtree(workdir)


@contextlib.contextmanager
def mounted(path: Path, *words: str) -> Iterator[bool]:
    """Something mounted at a path; whether that is allowed here."""
    path.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *words, str(path)], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", str(path)], check=True)


def full(campaign: Campaign) -> None:
    """A disk that is full at one stage after another."""
    size = sum(path.stat().st_size for path in campaign.reference.rglob("*") if path.is_file())
    disk = campaign.folder / "disk"
    with mounted(disk, "-t", "tmpfs", "-o", f"size={size // 24}", "tmpfs") as allowed:
        if not allowed:
            campaign.count("full disk", "all", "not run: mounting is not allowed here")
            return
        log, room = "", size // 24
        for _ in range(40):
            done = campaign.run(disk / "workdir")
            log += done.stderr
            if done.returncode == 0:
                break
            said = [line for line in done.stdout.splitlines() if line.startswith("--- ")]
            stage = said[-1].split()[1].rstrip(":") if said else "start"
            lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            one_line = done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr
            verdict = "one line" if one_line else f"FAILED: {done.returncode} {done.stderr[-400:]}"
            campaign.count("full disk", stage, verdict)
            room += int(size * campaign.rng.uniform(0.04, 0.12))
            subprocess.run(["mount", "-o", f"remount,size={room}", str(disk)], check=True)
        campaign.count("full disk", "to the end", campaign.verdict(disk / "workdir", ""))


def readonly(campaign: Campaign) -> None:
    """A workdir that cannot be written: unfinished, and finished."""
    for name in ("begun", "finished"):
        source = campaign.folder / f"readonly-{name}"
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(campaign.reference, source)
        if name == "begun":
            shutil.rmtree(source / "memory")
        with mounted(campaign.folder / "mount", "--bind", str(source)) as allowed:
            if not allowed:
                campaign.count("read-only", name, "not run: mounting is not allowed here")
                continue
            where = campaign.folder / "mount"
            subprocess.run(["mount", "-o", "remount,bind,ro", str(where)], check=True)
            done = campaign.run(where)
            lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            told = done.returncode == 2 and len(lines) == 1
            good = (told or (name == "finished" and done.returncode == 0)) and "Traceback" not in done.stderr
            verdict = ("one line" if told else "nothing to do") if good else f"FAILED: {done.stderr[-300:]}"
            campaign.count("read-only", name, verdict)


def two(campaign: Campaign) -> None:
    """Two runs started together on one workdir, one started again until both are done."""
    workdir = campaign.folder / "two"
    shutil.rmtree(workdir, ignore_errors=True)
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen(campaign.words(workdir), env=environment(), **silent)
    refused, log = 0, ""
    while first.poll() is None:
        done = campaign.run(workdir)
        log += done.stderr
        refused += "is at work in" in done.stderr
        time.sleep(0.5)
    log += first.stderr.read()
    last = campaign.run(workdir)
    verdict = campaign.verdict(workdir, log) if last.returncode == 0 else f"FAILED: {last.stderr[-300:]}"
    campaign.count("two at once", "all", verdict if refused else f"{verdict}, never refused")


def clock(campaign: Campaign) -> None:
    """A clock that jumps."""
    workdir, site = campaign.folder / "clock", campaign.folder / "site"
    shutil.rmtree(workdir, ignore_errors=True)
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(_SITE)
    path = os.pathsep.join([str(site), environment()["PYTHONPATH"]])
    done = campaign.run(workdir, PYTHONPATH=path)
    verdict = (
        campaign.verdict(workdir, done.stderr) if done.returncode == 0 else f"FAILED: {done.stderr[-300:]}"
    )
    campaign.count("clock jumps", "all", verdict)


def table(counts: Counter) -> str:
    """Markdown: a row for each fault, stage and verdict."""
    lines = ["| fault | stage | ended | times |", "|---|---|---|---:|"]
    lines += [f"| {' | '.join(key)} | {count} |" for key, count in sorted(counts.items())]
    return "\n".join(lines)


def main() -> None:
    """Runs the parts asked for; exit code 1 where anything failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--folder", default="runs/faults")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {sorted(unknown)[0]!r}: {', '.join(PARTS)}")
    campaign = Campaign(Path(args.folder).absolute(), args.seed)
    for part in args.parts or PARTS:
        work = globals()[part]
        work(campaign, args.kills) if part == "kills" else work(campaign)
        rows = [[*key, count] for key, count in campaign.counts.items()]
        (campaign.folder / "counts.json").write_text(json.dumps(rows, indent=1))
    print(table(campaign.counts))
    sys.exit(any(verdict.startswith("FAILED") for _, _, verdict in campaign.counts))


if __name__ == "__main__":
    main()
