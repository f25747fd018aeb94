"""Fuzzes the readers of files: valid ones are changed at random and read in a child process.

    make fuzz ARGS="--minutes=60 --reader=gguf"

The child may answer or refuse with one line. A crash, an exception of another kind, more than
--seconds for one file or --megabytes above what it holds at rest, or a file written beside the
input, is a finding: the input is kept under --folder and the run goes on.
"""

import argparse
import json
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from readers import READERS

_WORDS = (b"null", b"-1", b"1e999", b"[]", b"{}", b'"\\ud800"', b"[" * 3000, b"../../x", b"\0", b"NaN")
_EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


def mutated(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes: bits, numbers, cuts, repeats, pieces of another seed, JSON values."""
    for _ in range(int(rng.integers(1, 5))):
        size = len(data)
        place = int(rng.integers(size + 1))
        kind = int(rng.integers(9))
        if kind == 0 and size:
            at = place % size
            data = data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
        elif kind == 1:
            data = data[:place]
        elif kind == 2:
            data = data[:place] + rng.bytes(int(rng.integers(1, 40))) + data[place:]
        elif kind == 3:
            data = data[:place] + data[place + int(rng.integers(1, 60)) :]
        elif kind == 4:
            width = int(rng.choice([1, 2, 4, 8]))
            value = int(_EXTREMES[int(rng.integers(len(_EXTREMES)))]) & ((1 << (8 * width)) - 1)
            # Most lengths stand near the beginning.
            at = place if rng.random() < 0.5 else int(rng.integers(min(size, 200) + 1))
            data = data[:at] + value.to_bytes(width, "little") + data[at + width :]
        elif kind == 5:
            length = int(rng.integers(1, 400))
            data = data[:place] + data[place : place + length] * int(rng.integers(2, 6)) + data[place:]
        elif kind == 6 and other:
            at = int(rng.integers(len(other)))
            data = data[:place] + other[at : at + int(rng.integers(1, 400))] + data[place:]
        elif kind == 7:
            data = _other_json(data, rng)
        else:
            words = (
                b"null",
                b"-1",
                b"1e999",
                b"[]",
                b"{}",
                b'"\\ud800"',
                b"[" * 3000,
                b"../../x",
                b"\0",
                b"NaN",
            )
            data = data[:place] + words[int(rng.integers(len(words)))] + data[place:]
    return data


def _other_json(data: bytes, rng: np.random.Generator) -> bytes:
    """One value of a JSON text replaced, dropped or nested; other data as it is."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return data
    values = (None, -1, 0, 1 << 62, 1e308, "", "../x", "a" * 3000, [], {}, [[[]]], True, ["x"] * 50)
    holders, node = [], value
    stack = [node]
    while stack and len(holders) < 4000:
        node = stack.pop()
        if isinstance(node, dict | list) and node:
            holders.append(node)
            stack += list(node.values() if isinstance(node, dict) else node)
    if not holders:
        return data
    holder = holders[int(rng.integers(len(holders)))]
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    key = keys[int(rng.integers(len(keys)))]
    if rng.random() < 0.3:
        del holder[key]
    else:
        holder[key] = values[int(rng.integers(len(values)))]
    return json.dumps(value).encode()


class Child:
    """The reading process, started again when it has died or been stopped."""

    def __init__(self, name: str, folder: Path, seconds: float, megabytes: float):
        self._name, self._folder, self._seconds, self._megabytes = name, folder, seconds, megabytes
        self._process: subprocess.Popen | None = None

    def ask(self, path: Path) -> str:
        """The answer, or what became of the child."""
        if self._process is None:
            words = [sys.executable, str(Path(__file__).parent / "readers.py"), self._name]
            log = (self._folder / "log").open("w")
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
            self._at_rest = None
        process = self._process
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        # The first answer takes the imports' time.
        deadline = time.monotonic() + (self._seconds if self._at_rest else 120)
        while not select.select([process.stdout], [], [], 0.05)[0]:
            held = self._held()
            if self._at_rest and held - self._at_rest > self._megabytes:
                return self._stop(f"FAILED: memory, {held - self._at_rest:.0f} MB more than at rest")
            if time.monotonic() > deadline:
                return self._stop(f"FAILED: hangs, {self._seconds:.0f} s")
        answer = process.stdout.readline().strip()
        if not answer:
            return self._stop(f"FAILED: crash, exit code {process.wait()}")
        self._at_rest = self._at_rest or self._held()
        return answer

    def _held(self) -> float:
        """MB in memory."""
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0.0
        return pages * 4096 / 1e6

    def _stop(self, said: str) -> str:
        self.close()
        return said

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def fuzz(
    name: str, folder: Path, seed: int, seconds: float, most: int = 1 << 60, megabytes: float = 600.0
) -> tuple[int, int, list[str]]:
    """Executions, refusals and findings of one reader.

    Args:
      name: of the reader.
      folder: where seeds, inputs and findings go.
      seed: of the changes.
      seconds: after which it ends.
      most: executions.
      megabytes: that reading one input may take.
    """
    seeds = folder / "seeds"
    if not seeds.exists():
        seeds.mkdir(parents=True)
        READERS[name].seeds(seeds)
    originals = sorted(seeds.iterdir())
    files = [path for path in seeds.rglob("*") if path.is_file()]
    rng, child, began = np.random.default_rng(seed), Child(name, folder, 20.0, megabytes), time.monotonic()
    done = refused = 0
    findings: list[str] = []
    for original in originals:
        answer = child.ask(original)
        assert answer == "ok", f"{name}: the seed {original.name} is not read: {answer}"
    while done < most and time.monotonic() - began < seconds:
        original = originals[int(rng.integers(len(originals)))]
        with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
            path = Path(scratch) / "input" / original.name
            path.parent.mkdir()
            if original.is_dir():
                shutil.copytree(original, path)
                inside = sorted(p for p in path.rglob("*") if p.is_file())
                target = inside[int(rng.integers(len(inside)))]
            else:
                shutil.copy(original, path)
                target = path
            other = files[int(rng.integers(len(files)))].read_bytes()
            target.write_bytes(mutated(target.read_bytes(), other, rng))
            answer = child.ask(path)
            strays = [p.name for p in Path(scratch).iterdir() if p.name != "input"]
            if strays:
                answer = f"FAILED: wrote {strays} beside its input"
            if answer.startswith("FAILED"):
                kept = folder / "findings" / f"{seed}-{done}"
                shutil.copytree(path.parent, kept, dirs_exist_ok=True)
                (kept / "said.txt").write_text(answer + "\n")
                findings.append(answer)
                print(f"{name}: {answer[:600]}\n  kept in {kept}", flush=True)
        done += 1
        refused += answer.startswith("refused")
    child.close()
    return done, refused, findings


def main() -> None:
    """Runs the readers asked for one after the other; exit code 1 where anything was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--reader", action="append", choices=READERS, help="may be given again; all if left out"
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="for each reader")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--folder", default="runs/fuzz")
    args = parser.parse_args()
    found = 0
    print(f"seed {args.seed}")
    for name in args.reader or READERS:
        folder = Path(args.folder).absolute() / name
        done, refused, findings = fuzz(name, folder, args.seed, 60 * args.minutes)
        different = f"{len(findings)} ({len({finding[-200:] for finding in findings})} different)"
        print(f"| {name} | {args.minutes:g} | {done:,} | {refused:,} | {different} |", flush=True)
        found += len(findings)
    sys.exit(found > 0)


if __name__ == "__main__":
    main()
