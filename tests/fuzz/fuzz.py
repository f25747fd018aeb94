"""Gives every reader of files damaged ones, and says what came of it.

    make fuzz ARGS="--minutes=60 --reader=gguf"
    make fuzz                          # each reader for two minutes
    make fuzz ARGS="--again=runs/fuzz/gguf-0123456789"      # one that was found before

A reader may return or refuse (`UserError`, one line). Anything else is a finding: another exception, a
process that died, SECONDS without an answer, memory beyond what `worker.py` allows, a file written
elsewhere, a pickle opened, a process started. The files of a finding are kept under --output. The same
--seed gives the same cases.
"""

import argparse
import hashlib
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from mutate import Files, mutate
from readers import READERS
from regressions import REGRESSIONS

SECONDS = 20
WORKER = Path(__file__).parent / "worker.py"
ROOT = WORKER.parents[2]


class Worker:
    """`worker.py` as a process that is started again when it has died."""

    def __init__(self, names: list[str], scratch: Path):
        self._names, self._scratch, self._process = names, scratch, None
        self.log = scratch / "log"

    def _start(self) -> None:
        temporary = self._scratch / "tmp"
        temporary.mkdir(exist_ok=True)
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "TMPDIR": str(temporary), "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER), ",".join(self._names)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )
        if self._answer(300).get("end") != "ready":
            raise SystemExit(f"the worker did not start:\n{self.log.read_text()[-3000:]}")

    def _answer(self, seconds: float) -> dict[str, str]:
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            self.close()
            return {"end": "finding", "what": f"no answer in {seconds:g} s", "at": "hang"}
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._process = None
        return {
            "end": "finding",
            "what": f"the process died: {code}",
            "at": "crash",
            "trace": self.log.read_text(errors="replace")[-3000:],
        }

    def ask(self, name: str, folder: Path) -> dict[str, str]:
        """How the reader ended on this folder."""
        if self._process is None:
            self._start()
        self._process.stdin.write(f"{name}\t{folder}\n".encode())
        self._process.stdin.flush()
        return self._answer(SECONDS)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def write(folder: Path, files: Files) -> None:
    """The files below a folder that is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


class Run:
    """Cases of all kinds through one worker, counted."""

    def __init__(self, names: list[str], output: Path):
        # Below /tmp where the machine has one in memory; nothing of it is kept.
        self._scratch = Path(tempfile.mkdtemp(prefix="fuzz-")).resolve()
        self._worker, self._output = Worker(names, self._scratch), output
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in names}
        self.findings: dict[tuple[str, str], str] = {}

    def case(self, reader: str, files: Files) -> dict[str, str]:
        """One case; what it is a finding of is kept, the first time it is met."""
        box, counts = self._scratch / "box", self.counts[reader]
        write(box / "case", files)
        end = self._worker.ask(reader, box / "case")
        if stray := sorted(set(os.listdir(box)) - {"case"}):
            end = {"end": "finding", "what": f"wrote {stray[0]} beside its folder", "at": "stray"}
            shutil.rmtree(box)
        counts[end["end"]] += 1
        if end["end"] == "finding":
            kind = f"{end['at']} {end['what'].split(':')[0]}"
            if (reader, kind) not in self.findings:
                digest = hashlib.sha256(
                    json.dumps({n: d.hex() for n, d in files.items()}).encode()
                ).hexdigest()
                kept = self._output / f"{reader}-{digest[:10]}"
                write(kept, files)
                self.findings[reader, kind] = f"{end['what']} at {end['at']}: {kept}"
                print(f"{reader}: {self.findings[reader, kind]}", flush=True)
                if "trace" in end:
                    kept.with_suffix(".txt").write_text(end["trace"])
        return end

    def close(self) -> None:
        self._worker.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


def fuzz(run: Run, name: str, seed: int, seconds: float, executions: int) -> None:
    """Cases of one reader: its seeds, which must be read; old findings; then new damage."""
    reader = READERS[name]
    rng = random.Random(f"{seed} {name}")
    seeds = reader.seeds()
    for number, files in enumerate(seeds):
        end = run.case(name, files)
        if end["end"] != "read":
            raise SystemExit(f"{name}: its seed {number} is not read: {end}")
    for title, files in REGRESSIONS.get(name, {}).items():
        end = run.case(name, files())
        if end["end"] == "finding":
            print(f"{name}: {title} is found again", flush=True)
    done, deadline = 0, time.monotonic() + seconds
    while time.monotonic() < deadline and (not executions or done < executions):
        files = mutate(rng.choice(seeds), rng)
        if reader.mend and rng.random() < 0.8:
            files = reader.mend(files)
        run.case(name, files)
        done += 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reader", action="append", choices=sorted(READERS), help="all if left out")
    parser.add_argument("--minutes", type=float, default=2.0, help="of each reader")
    parser.add_argument("--executions", type=int, default=0, help="of each reader, most; 0 for any number")
    parser.add_argument("--seed", type=int, default=None, help="of the cases; drawn if left out")
    parser.add_argument("--output", default="runs/fuzz", help="folder for the files of findings")
    parser.add_argument("--again", help="a folder of a finding: that one case again")
    arguments = parser.parse_args()
    output = Path(arguments.output).absolute()
    names = arguments.reader or sorted(READERS)
    if arguments.again:
        kept = Path(arguments.again)
        names = [kept.name.rpartition("-")[0]]
        files = {str(p.relative_to(kept)): p.read_bytes() for p in kept.rglob("*") if p.is_file()}
        run = Run(names, output)
        end = run.case(names[0], files)
        run.close()
        return print(end.pop("trace", ""), json.dumps(end, indent=1), sep="\n")
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    run, table = Run(names, output), []
    try:
        for name in names:
            began = time.monotonic()
            fuzz(run, name, seed, 60 * arguments.minutes, arguments.executions)
            counts, minutes = run.counts[name], (time.monotonic() - began) / 60
            kinds = sum(reader == name for reader, _ in run.findings)
            table.append((name, counts.total(), counts["read"], counts["refused"], f"{minutes:.1f}", kinds))
            print("  ".join(map(str, table[-1])), flush=True)
    finally:
        run.close()
    heads = ("reader", "executions", "read", "refused", "minutes", "findings")
    for row in (heads, tuple("---" for _ in heads), *table):
        print("| " + " | ".join(map(str, row)) + " |")
    if run.findings:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
