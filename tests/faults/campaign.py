"""The fault campaign: a tiny run is hurt again and again and must end in the bytes of an unhurt one.

    make faults ARGS="--kills=100 --seed=0"
    python tests/faults/campaign.py kills flips --folder=/tmp/faults --kills=100
    python tests/faults/campaign.py table --folder=/tmp/faults --write=docs/reliability.md

Parts, all of them if none is named:

  kills      `run` is sent SIGKILL or SIGTERM at random moments of every stage, several times a run
  updates    the same of an `update` that adds and deletes documents, a quarter as often
  flips      a random bit of each file of a finished run is flipped: `verify` names the file
  repairs    a file of every artifact, of a run and of an update, is flipped or cut off: `verify --repair`,
             at times killed and given again, gives the bytes back; each start of this part hurts other files
  truncated  the checkpoint that a training would go on from is cut off: one line, then from the start
  full       the disk is full (a tmpfs of a few hundred kilobytes, then grown): one line, then the run goes on
  readonly   the workdir is read-only (a bind mount): one line
  two        two runs on one workdir at the same time
  clock      time.time() jumps by days, back and forth
  lost       workers of Beam and processes of a training are killed or hang: the tests of that
  table      nothing is run: the counts so far; --write puts them into a file, between its markers

What has happened is in FOLDER/events.jsonl, a line an event: a campaign that was stopped goes on, and parts
can be run one by one. What a machine does not allow (mounts want root) is counted as not run.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests/pipeline")]

import conftest  # noqa: E402 (the tests' own recipe)
from test_kill import compared  # noqa: E402
from test_verify import faults, files_of, flip  # noqa: E402

PARTS = ("kills", "updates", "flips", "repairs", "truncated", "full", "readonly", "two", "clock", "lost")
# Of a run that is hurt so often, the last start is left alone to its end.
KILLS_PER_RUN = 25
_SITE = """
import random, time
_now, _random = time.time, random.Random(0)
time.time = lambda: _now() + _random.choice((-86400, -1, 0, 0, 3600, 864000))
"""
_MARKERS = ("<!-- faults: begin -->", "<!-- faults: end -->")
_COLUMNS = {"same bytes": "same bytes", "found": "found", "one line": "one line", "passed": "same bytes"}


class Campaign:
    """One campaign's folder, its unhurt run, and what has been counted."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.events = folder, folder / "events.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.rng = np.random.default_rng([seed, len(self.counted())])
        if not (folder / "recipe/tiny.gin").exists():
            (folder / "recipe").mkdir(exist_ok=True)
            conftest.write_recipe(folder / "recipe")
        self.reference = folder / "reference"

    def make_reference(self) -> None:
        """The unhurt run; goes on with one that was begun."""
        done = self.run(self.reference)
        assert done.returncode == 0, done.stderr[-2000:]

    def environment(self) -> dict[str, str]:
        """Of the programs: what one has compiled serves the others."""
        return {
            **conftest.environment(),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }

    def words(self, workdir: Path, *command: str) -> list[str]:
        recipe = self.folder / "recipe/tiny.gin"
        command = command or ("run", f"--gin_file={recipe}")
        return [sys.executable, "-m", "mlp_memory", *command, f"--workdir={workdir}"]

    def run(self, workdir: Path, *command: str, **more: str) -> subprocess.CompletedProcess:
        """A command, `run` if none is given, to its end."""
        env = {**self.environment(), **more}
        return subprocess.run(self.words(workdir, *command), env=env, capture_output=True, text=True)

    def differing(self, workdir: Path, reference: Path | None = None) -> list[str]:
        """Files that are not those of an unhurt run."""
        expected, found = compared(reference or self.reference), compared(workdir)
        names = {*expected, *found}
        return sorted(name for name in names if expected.get(name) != found.get(name))

    def counted(self) -> list[dict[str, str]]:
        """Every event so far."""
        if not self.events.exists():
            return []
        return [json.loads(line) for line in self.events.read_text().splitlines()]

    def count(self, fault: str, stage: str, verdict: str) -> None:
        event = {"fault": fault, "stage": stage, "verdict": verdict, "commit": _commit()}
        event["date"] = datetime.date.today().isoformat()
        with self.events.open("a") as file:
            file.write(json.dumps(event) + "\n")
        print(f"{fault:12} {stage:10} {verdict}", flush=True)

    def verdict(
        self,
        workdir: Path,
        done: subprocess.CompletedProcess,
        log: str = "",
        reference: Path | None = None,
    ) -> str:
        """After a run that has been hurt and then left alone to its end."""
        if done.returncode != 0:
            return f"FAILED: {done.returncode} {done.stderr[-300:]}"
        if "Traceback" in log + done.stderr:
            return "FAILED: a traceback"
        differing = self.differing(workdir, reference)
        return f"FAILED: {differing[:3]} differ" if differing else "same bytes"


def _commit() -> str:
    words = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    return os.environ.get("COMMIT") or subprocess.run(words, capture_output=True, text=True).stdout.strip()


def _stage(said: str) -> str:
    """The stage that the last line of `run` or `update` about one names."""
    names = re.findall(r"^--- ((?:update: )?\w+):", said, re.MULTILINE)
    return names[-1] if names else "start"


def _one_line(done: subprocess.CompletedProcess) -> bool:
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr


def _copy(campaign: "Campaign", name: str, reference: Path | None = None) -> Path:
    """A fresh copy of an unhurt run, that of all stages if none is given."""
    folder = campaign.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(reference or campaign.reference, folder))


def kills(campaign: Campaign, count: int) -> None:
    """Random kills of `run`."""
    recipe = campaign.folder / "recipe/tiny.gin"
    _kill(
        campaign, count, campaign.reference, "", lambda to: campaign.words(to, "run", f"--gin_file={recipe}")
    )


def updates(campaign: Campaign, count: int) -> None:
    """Random kills of an `update` of the unhurt run that adds documents and deletes others."""
    command, reference = _updated(campaign)
    _kill(campaign, count // 4, reference, "update: ", command)


def _updated(campaign: Campaign) -> tuple[Callable[[Path], list[str]], Path]:
    """The command of an update into a folder, and an unhurt one."""
    added, reference = campaign.folder / "added.jsonl", campaign.folder / "updated"
    words, rng = (campaign.folder / "recipe/train.jsonl").read_text().split(), np.random.default_rng(7)
    texts = [" ".join(word.strip('{}":.') for word in rng.choice(words, 60)) for _ in range(9)]
    added.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    more = (f"--add={added}", "--delete=2,5-6", "--gin=update.memory='trained_on'")

    def command(to: Path) -> list[str]:
        return campaign.words(campaign.reference, "update", *more, f"--output={to}")

    done = subprocess.run(command(reference), env=campaign.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return command, reference


def _kill(
    campaign: Campaign, count: int, reference: Path, prefix: str, words: Callable[[Path], list[str]]
) -> None:
    """Random kills, `count` with those of earlier starts; each counted once its run has ended.

    Args:
      reference: an unhurt run of the command.
      prefix: of the names that its stages have on the screen.
      words: the command that makes a folder.
    """
    earlier = [event["stage"] for event in campaign.counted() if event["fault"].startswith("SIG")]
    count -= sum(stage.startswith("update: ") == bool(prefix) for stage in earlier)
    seconds = {}
    for line in (reference / "times.jsonl").read_text().splitlines():
        entry = json.loads(line)
        seconds[prefix + entry["stage"]] = entry["seconds"]
    while count > 0:
        workdir, log, hurt = campaign.folder / "killed", campaign.folder / "killed.log", []
        shutil.rmtree(workdir, ignore_errors=True)
        log.write_text("")
        while len(hurt) < min(KILLS_PER_RUN, count):
            before = log.read_text().count("--- ")
            with log.open("a") as file:
                process = subprocess.Popen(
                    words(workdir), env=campaign.environment(), stdout=file, stderr=file
                )
            if campaign.rng.random() < 0.15:  # while it starts
                wait = campaign.rng.uniform(0, 3)
            else:  # some time into this stage or one of the next
                stages = before + campaign.rng.integers(1, 3)
                while process.poll() is None and log.read_text().count("--- ") < stages:
                    time.sleep(0.02)
                wait = campaign.rng.uniform(0, 1.2) * seconds.get(_stage(log.read_text()), 1.0)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait)
            if process.poll() is not None:
                break  # it was done
            sent = signal.SIGKILL if campaign.rng.random() < 0.6 else signal.SIGTERM
            said = log.read_text()
            stage = _stage(said) if said.count("--- ") > before else f"{prefix}start"
            process.send_signal(sent)
            process.wait()
            hurt.append((sent.name, stage))
        done = subprocess.run(words(workdir), env=campaign.environment(), capture_output=True, text=True)
        verdict = campaign.verdict(workdir, done, log.read_text(), reference)
        for fault, stage in hurt:
            campaign.count(fault, stage, verdict)
        count -= len(hurt)
        if verdict != "same bytes":
            workdir.rename(workdir.with_name(f"killed-{time.time_ns()}"))


def flips(campaign: Campaign) -> None:
    """One flipped bit in every file, one file at a time."""
    workdir = _copy(campaign, "flipped")
    for path in files_of(workdir):
        name, kept = str(path.relative_to(workdir)), path.read_bytes()
        if not kept:
            continue
        flip(path, campaign.rng)
        said = faults(workdir)
        found = bool(said) and all(line.startswith(name) for line in said)
        verdict = "found" if found else f"FAILED: {name}: {said[:2]}"
        campaign.count("flipped bit", path.relative_to(workdir).parts[0], verdict)
        path.write_bytes(kept)
    shutil.rmtree(workdir)


def repairs(campaign: Campaign) -> None:
    """A file of every artifact flipped or cut off, one at a time, of the run and of an update."""
    _hurt_artifacts(campaign, campaign.reference, "")
    _, updated = _updated(campaign)
    _hurt_artifacts(campaign, updated, "update: ")


def _hurt_artifacts(campaign: Campaign, reference: Path, prefix: str) -> None:
    """`verify --repair` of a copy of an unhurt folder, once for each of its artifacts; at times killed."""
    for top in sorted({path.relative_to(reference).parts[0] for path in files_of(reference)}):
        workdir = _copy(campaign, "repaired", reference)
        paths = [workdir / top] if (workdir / top).is_file() else files_of(workdir / top)
        paths = [path for path in paths if path.stat().st_size]
        path = paths[int(campaign.rng.integers(len(paths)))]
        if campaign.rng.random() < 0.7:
            fault = "flip, repair"
            flip(path, campaign.rng)
        else:
            fault = "cut, repair"
            os.truncate(path, int(campaign.rng.integers(path.stat().st_size)))
        if campaign.rng.random() < 0.5:
            process = subprocess.Popen(
                campaign.words(workdir, "verify", "--repair"),
                env=campaign.environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                process.wait(campaign.rng.uniform(1, 20))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # it and the stage that it runs
                process.wait()
                fault += ", killed"
        done = campaign.run(workdir, "verify", "--repair")
        verdict, name = campaign.verdict(workdir, done, reference=reference), str(path.relative_to(workdir))
        if verdict == "same bytes" and (left := faults(workdir)):
            verdict = f"FAILED: {left[0]}"
        if verdict != "same bytes":
            verdict += f" ({name}) {done.stdout[-300:]}"
        campaign.count(fault, prefix + top, verdict)
    shutil.rmtree(campaign.folder / "repaired", ignore_errors=True)


def truncated(campaign: Campaign) -> None:
    """A training stopped in its midst, the checkpoint it would go on from cut off."""
    for stage, folder in (("pretrain", "decoder"), ("distill", "memory"), ("joint", "joint")):
        workdir = _copy(campaign, "truncated")
        shutil.rmtree(workdir / folder)
        process = subprocess.Popen(
            campaign.words(workdir, stage), env=campaign.environment(), stderr=subprocess.DEVNULL
        )
        steps = workdir / folder / "steps"
        while process.poll() is None and not [p for p in steps.glob("*") if p.name.isdigit() and int(p.name)]:
            time.sleep(0.005)
        process.kill()
        process.wait()
        cut = [p for p in steps.rglob("d/*") if p.is_file()] if steps.is_dir() else []
        if not cut:
            campaign.count("cut checkpoint", stage, "not run: the training was too fast")
            continue
        for path in cut:
            os.truncate(path, path.stat().st_size // 2)
        done = campaign.run(workdir, stage)
        campaign.count(
            "cut checkpoint", stage, "one line" if _one_line(done) else f"FAILED: {done.stderr[-300:]}"
        )
        shutil.rmtree(workdir / folder)
        campaign.count("cut checkpoint", stage, campaign.verdict(workdir, campaign.run(workdir)))
    shutil.rmtree(campaign.folder / "truncated", ignore_errors=True)


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
    disk, room = campaign.folder / "disk", size // 24
    with mounted(disk, "-t", "tmpfs", "-o", f"size={room}", "tmpfs") as allowed:
        if not allowed:
            campaign.count("full disk", "all", "not run: mounting is not allowed here")
            return
        while (done := campaign.run(disk / "workdir")).returncode != 0 and room < 4 * size:
            verdict = "one line" if _one_line(done) else f"FAILED: {done.returncode} {done.stderr[-400:]}"
            campaign.count("full disk", _stage(done.stdout), verdict)
            room += int(size * campaign.rng.uniform(0.04, 0.12))
            subprocess.run(["mount", "-o", f"remount,size={room}", str(disk)], check=True)
        campaign.count("full disk", "all", campaign.verdict(disk / "workdir", done))


def readonly(campaign: Campaign) -> None:
    """A workdir that cannot be written: with a stage to do, and finished."""
    for name in ("begun", "finished"):
        source, where = _copy(campaign, f"readonly-{name}"), campaign.folder / "mount"
        if name == "begun":
            shutil.rmtree(source / "memory")
        with mounted(where, "--bind", str(source)) as allowed:
            if not allowed:
                campaign.count("read-only", name, "not run: mounting is not allowed here")
                continue
            subprocess.run(["mount", "-o", "remount,bind,ro", str(where)], check=True)
            done = campaign.run(where)
            verdict = "one line" if _one_line(done) else f"FAILED: {done.returncode} {done.stderr[-300:]}"
            if name == "finished":  # it has nothing to write
                verdict = campaign.verdict(where, done)
            campaign.count("read-only", name, verdict)
            told = campaign.run(where, "verify")
            sound = told.returncode == 0 and "Traceback" not in told.stderr
            if name == "finished":
                campaign.count(
                    "read-only", "verify", "same bytes" if sound else f"FAILED: {told.stderr[-300:]}"
                )
        shutil.rmtree(source)


def two(campaign: Campaign) -> None:
    """Two runs on one workdir, the second started again and again until the first is done."""
    workdir = campaign.folder / "two"
    shutil.rmtree(workdir, ignore_errors=True)
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen(campaign.words(workdir), env=campaign.environment(), **silent)
    refused, log = 0, ""
    while first.poll() is None:
        done = campaign.run(workdir)
        log += done.stderr
        if "is at work in" in done.stderr:
            refused += 1
            campaign.count(
                "two at once", "all", "one line" if _one_line(done) else f"FAILED: {done.stderr[-300:]}"
            )
        time.sleep(0.5)
    said = first.stderr.read()
    if "is at work in" in said:  # the second came between two stages of the first
        refused += 1
        done = subprocess.CompletedProcess(first.args, first.returncode, "", said)
        campaign.count("two at once", "all", "one line" if _one_line(done) else f"FAILED: {said[-300:]}")
    log += said
    verdict = campaign.verdict(workdir, campaign.run(workdir), log)
    campaign.count("two at once", "all", verdict if refused else f"FAILED: never refused, {verdict}")


def clock(campaign: Campaign) -> None:
    """A clock that jumps."""
    workdir, site = campaign.folder / "clock", campaign.folder / "site"
    shutil.rmtree(workdir, ignore_errors=True)
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(_SITE)
    path = os.pathsep.join([str(site), campaign.environment()["PYTHONPATH"]])
    done = campaign.run(workdir, PYTHONPATH=path)
    if _one_line(done):  # Orbax times its saves by the clock
        campaign.count("clock jumps", _stage(done.stdout), "one line")
        done = campaign.run(workdir)
    campaign.count("clock jumps", "all", campaign.verdict(workdir, done))


def lost(campaign: Campaign) -> None:
    """Tests in which a worker or a process is lost, each counted."""
    for stage, file in (
        ("Beam", "tests/parallel/test_fleet.py"),
        ("retrieve, Beam", "tests/pipeline/test_fleet.py"),
        ("training", "tests/multi_process/test_lost_processes.py"),
    ):
        words = [sys.executable, "-m", "pytest", "-q", "-rA", "--no-header", "-p", "no:cacheprovider", file]
        done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            result, _, test = line.partition(" ")
            if result in ("PASSED", "FAILED", "ERROR"):
                name = test.split("::")[-1].split(" ")[0]
                campaign.count("lost worker", stage, "passed" if result == "PASSED" else f"FAILED: {name}")


def table(events: list[dict[str, str]]) -> str:
    """Markdown: a row for each fault and stage, how often, and how it ended."""
    counts: dict[tuple[str, str], Counter] = {}
    for event in events:
        column = _COLUMNS.get(event["verdict"], event["verdict"].split(":")[0])
        counts.setdefault((event["fault"], event["stage"]), Counter())[column] += 1
    columns = ("same bytes", "found", "one line", "FAILED", "not run")
    lines = [f"| fault | stage | times | {' | '.join(columns)} |", "|---|---|---:|" + "---:|" * len(columns)]
    for (fault, stage), counter in sorted(counts.items()):
        cells = [str(counter[column] or "") for column in columns]
        lines.append(f"| {fault} | {stage} | {counter.total()} | {' | '.join(cells)} |")
    total = sum((counter for counter in counts.values()), Counter())
    cells = [str(total[column] or "") for column in columns]
    lines.append(f"| all | | {total.total()} | {' | '.join(cells)} |")
    commits, dates = (sorted({event[name] for event in events}) for name in ("commit", "date"))
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    return "\n".join(
        [*lines, "", f"`make faults`, {machine}, {', '.join(dates)}, commit {', '.join(commits)}."]
    )


def _write_table(text: str, path: Path) -> None:
    before, _, rest = path.read_text().partition(_MARKERS[0])
    _, marker, after = rest.partition(_MARKERS[1])
    if not marker:
        sys.exit(f"{path} lacks the markers {' and '.join(_MARKERS)}")
    path.write_text(f"{before}{_MARKERS[0]}\n{text}\n{marker}{after}")


def main() -> None:
    """Runs the parts asked for; exit code 1 where anything failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join((*PARTS, "table")))
    parser.add_argument("--folder", default="runs/faults")
    parser.add_argument("--kills", type=int, default=100, help="in all, those of earlier starts counted in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", metavar="FILE", help="where the table goes besides the screen")
    args = parser.parse_args()
    if unknown := set(args.parts) - {*PARTS, "table"}:
        parser.error(f"no part {sorted(unknown)[0]!r}: {', '.join((*PARTS, 'table'))}")
    campaign = Campaign(Path(args.folder).absolute(), args.seed)
    parts = [part for part in args.parts or PARTS if part != "table"]
    if parts:
        campaign.make_reference()
    for part in parts:
        work = globals()[part]
        work(campaign, args.kills) if part in ("kills", "updates") else work(campaign)
    found = table(campaign.counted())
    print(found)
    if args.write:
        _write_table(found, Path(args.write))
    sys.exit(any(event["verdict"].startswith("FAILED") for event in campaign.counted()))


if __name__ == "__main__":
    main()
