"""The fleet itself, with workers that only write files; Beam starts processes, so there are few tests."""

import functools
import itertools
import os
import signal
import time
from pathlib import Path

import pytest

from mlp_memory.artifacts import Directory, UserError
from mlp_memory.parallel.config import FleetConfig
from mlp_memory.parallel.fleet import elements, run_units

UNITS = list(range(12))


class Worker:
    """Writes a file a unit; what it does besides is said by files named `first-WORD-UNIT`."""

    def __init__(self, folder: str):
        self.folder = Directory(folder)
        self.folder.write(f"started/{os.getpid()}", b"")

    def __call__(self, unit: int) -> None:
        time.sleep(0.02)
        if self.once(f"kill-{unit}") or self.folder.read(f"always-kill-{unit}") is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.once(f"hang-{unit}"):
            time.sleep(3600)
        if self.folder.read(f"refuse-{unit}") is not None:
            raise UserError(f"unit {unit} is refused")
        if self.folder.read(f"fail-{unit}") is not None:
            raise ZeroDivisionError(f"unit {unit} fails")
        self.folder.write(f"done/{unit}", str(os.getpid()).encode())

    def once(self, name: str) -> bool:
        if self.folder.read(name) != b"":
            return False
        self.folder.write(name, b"used")
        return True


def run(folder, config, groups=(UNITS,)):
    done, notes = [], []
    run_units(
        "test",
        functools.partial(Worker, str(folder)),
        groups,
        config,
        finished=lambda: {int(name) for name in (Directory(folder) / "done").names()},
        done=done.append,
        note=notes.append,
        notes=Directory(folder) / "failures",
    )
    return done, notes


def beam(**settings):
    return FleetConfig(runner="DirectRunner", workers=2, **settings)


def alive(folder):
    """Workers that still run, a moment after they were ended."""
    pids = [int(name) for name in (Directory(folder) / "started").names()]
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(map(runs, pids)):
        time.sleep(0.05)
    return [pid for pid in pids if runs(pid)]


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_in_process_every_unit_is_done_in_order(tmp_path):
    done, notes = run(tmp_path, FleetConfig(), [UNITS[:5], [], UNITS[5:]])
    assert done == UNITS
    assert notes == []


def test_units_of_a_killed_and_of_a_hanging_worker_are_done_by_the_next(tmp_path):
    start = time.monotonic()
    Directory(tmp_path / "a").write("kill-3", b"")
    done, notes = run(tmp_path / "a", beam())
    assert sorted(done) == UNITS
    assert [note.partition("; ")[2] for note in notes] == ["attempt 2 of 3 does them"]
    workers = {(tmp_path / "a/done" / str(unit)).read_text() for unit in UNITS}
    assert str(os.getpid()) not in workers
    assert not alive(tmp_path / "a")

    # Two pipelines took so long; should one take that long on a busy machine, it costs an attempt.
    patience = time.monotonic() - start
    Directory(tmp_path / "b").write("hang-7", b"")
    done, notes = run(tmp_path / "b", beam(patience=patience, attempts=8))
    assert sorted(done) == UNITS
    assert len(notes) >= 1
    assert not alive(tmp_path / "b")


def test_a_unit_that_kills_every_worker_ends_in_one_line(tmp_path):
    Directory(tmp_path).write("always-kill-5", b"")
    with pytest.raises(
        UserError, match=r"^test: 1 units are still missing after fleet.attempts = 2"
    ) as refused:
        run(tmp_path, beam(attempts=2), [[5]])
    assert "\n" not in str(refused.value)
    assert not alive(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("refuse-4", UserError, "^unit 4 is refused$"),
        ("fail-4", RuntimeError, "ZeroDivisionError: unit 4 fails"),
    ],
)
def test_what_a_worker_raises_is_raised_here_at_once(tmp_path, name, kind, words):
    Directory(tmp_path).write(name, b"")
    with pytest.raises(kind, match=words):
        run(tmp_path, beam())
    assert not alive(tmp_path)


def test_a_runner_that_beam_does_not_know_is_named(tmp_path):
    with pytest.raises(UserError, match=r"fleet\.runner = .SparklerRunner. cannot be started"):
        run(tmp_path, FleetConfig(runner="SparklerRunner", workers=2))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_elements_hold_every_unit_once_and_no_two_groups(rng, workers):
    groups = [[(g, u) for u in range(rng.integers(0, 40))] for g in range(rng.integers(2, 9))]
    cut = elements(groups, workers)
    assert sorted(itertools.chain(*cut)) == sorted(itertools.chain(*groups))
    assert all(len({group for group, _ in element}) == 1 for element in cut)
    filled = sum(bool(group) for group in groups)
    if filled > 1:
        assert len(cut) <= 2 * workers + filled
    assert elements([UNITS], workers) == [[unit] for unit in UNITS]


@pytest.mark.parametrize(
    "wrong",
    [
        {"workers": 0},
        {"workers": 2},
        {"runner": ""},
        {"runner": "DirectRunner", "options": ("flink_master=here",)},
        {"attempts": 0},
        {"patience": 0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match=r"fleet\."):
        FleetConfig(**wrong)
