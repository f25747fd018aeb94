"""A short run of the fuzzer: what was found before, and a few hundred cases that are always the same."""

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parent / "fuzz.py"


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FUZZ), f"--output={tmp_path}", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_no_reader_fails_on_what_was_found_before_nor_on_fifteen_cases_of_each(tmp_path):
    done = run(tmp_path, "--executions=15", "--seed=2026")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_reader_that_crashes_hangs_fills_memory_or_writes_elsewhere_is_found(tmp_path):
    program = f"""
import ctypes, sys, time
sys.path.insert(0, {str(FUZZ.parent)!r})
import readers
def read(folder):
    what = (folder / "a").read_text()
    if what == "crash": ctypes.string_at(0)
    if what == "hang": time.sleep(60)
    if what == "memory": bytearray(8 << 30)
    if what == "growth": bytearray(b"x" * (1 << 30))
    if what == "raise": raise ValueError(what)
    if what == "write": open(folder.parent / "b", "w")
    if what == "pickle":
        import pickle
        pickle.loads(pickle.dumps(ValueError))
seed = readers.Reader(lambda: [{{"a": b"fine"}}], read)
readers.READERS.clear()
readers.READERS["own"] = seed
"""
    (tmp_path / "own.py").write_text(program)
    check = f"""
import runpy, sys
sys.path[:0] = [{str(tmp_path)!r}, {str(FUZZ.parent)!r}]
import own
if "worker" in sys.argv[0]: raise SystemExit("not here")
import fuzz
from pathlib import Path
fuzz.SECONDS = 3
text = (fuzz.HERE / "worker.py").read_text().replace("    from readers import READERS", "    import own\\n    from readers import READERS")
(Path({str(tmp_path)!r}) / "worker.py").write_text(text)
fuzz.HERE = Path({str(tmp_path)!r})
import os
os.environ["PYTHONPATH"] = os.pathsep.join([{str(tmp_path)!r}, {str(FUZZ.parent)!r}, os.environ.get("PYTHONPATH", ""), {str(FUZZ.parents[2])!r}])
run = fuzz.Run(["own"], Path({str(tmp_path)!r}) / "found")
for what in ("fine", "crash", "hang", "memory", "growth", "raise", "write", "pickle", "fine"):
    print(what, run.case("own", {{"a": what.encode()}})["end"])
run.close()
"""
    (tmp_path / "check.py").write_text(check)
    done = subprocess.run([sys.executable, str(tmp_path / "check.py")], capture_output=True, text=True)
    ends = dict(line.split() for line in done.stdout.splitlines() if len(line.split()) == 2)
    bad = ("crash", "hang", "memory", "growth", "raise", "write", "pickle")
    assert ends == {"fine": "read", **dict.fromkeys(bad, "finding")}, done.stdout + done.stderr
