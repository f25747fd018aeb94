"""A short run of the fuzzer: what was found before, and a few hundred cases that are always the same."""

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parent / "fuzz.py"

_BAD = ("crash", "hang", "memory", "growth", "raise", "write", "pickle")
_OWN = """
import ctypes, pickle, time
import readers
def read(folder):
    what = (folder / "a").read_text()
    if what == "crash": ctypes.string_at(0)
    if what == "hang": time.sleep(60)
    if what == "memory": bytearray(8 << 30)
    if what == "growth": bytearray(b"x" * (1 << 30))
    if what == "raise": raise ValueError(what)
    if what == "write": open(folder.parent / "b", "w")
    if what == "pickle": pickle.loads(pickle.dumps(FileNotFoundError))
readers.READERS.clear()
readers.READERS["own"] = readers.Reader(lambda: [{"a": b"fine"}], read)
"""
_CHECK = """
from pathlib import Path
import fuzz
fuzz.SECONDS, fuzz.ROOT, fuzz.WORKER = 3, {repository!r}, Path({folder}) / "worker.py"
run = fuzz.Run(["own"], Path({folder}) / "found")
for what in ("fine", *{bad!r}, "fine"):
    print(what, run.case("own", {{"a": what.encode()}})["end"])
run.close()
"""


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FUZZ), f"--output={tmp_path}", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_no_reader_fails_on_what_was_found_before_nor_on_fifteen_cases_of_each(tmp_path):
    done = run(tmp_path, "--executions=15", "--seed=2026")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_reader_that_crashes_hangs_fills_memory_or_writes_elsewhere_is_found(tmp_path):
    folder, fuzz = repr(str(tmp_path)), repr(str(FUZZ.parent))
    (tmp_path / "own.py").write_text(_OWN)
    # The worker as it is, with the table of readers replaced by the one that misbehaves.
    imports = f"import sys\nsys.path[:0] = [{folder}, {fuzz}]\nimport own\n"
    (tmp_path / "worker.py").write_text(imports + (FUZZ.parent / "worker.py").read_text())
    (tmp_path / "check.py").write_text(
        imports + _CHECK.format(folder=folder, repository=str(FUZZ.parents[2]), bad=_BAD)
    )
    done = subprocess.run([sys.executable, str(tmp_path / "check.py")], capture_output=True, text=True)
    ends = dict(line.split() for line in done.stdout.splitlines() if len(line.split()) == 2)
    assert ends == {"fine": "read", **dict.fromkeys(_BAD, "finding")}, done.stdout + done.stderr
