"""What the others do when a process does not come, is killed, fails or is asked to stop."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest

TOY = Path(__file__).parents[1] / "training/toy.py"
STEPS, EVAL_EVERY, HEARTBEAT = 60, 5, 5


def saved(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folder.glob("steps/*") if p.name.isdigit())


def toy(job, folder: Path, count: int, seconds: float = 0.0):
    """The toy training in one process with one device, or in several of two each."""
    words = (TOY, folder, STEPS, seconds, HEARTBEAT)
    return job(*words, count=count, devices=1 if count == 1 else 2)


def wait_for_step(job, folder: Path, after: int) -> None:
    """Waits until a checkpoint beyond `after` is there, so that the job is in the midst of its steps."""
    deadline = time.monotonic() + 120
    while not any(step > after for step in saved(folder)):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in job.processes.values())
        time.sleep(0.01)


def curve(folder: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {f"{k} at {line['step']}": v for line in lines for k, v in line.items()}


def assert_same_curve(found: Path, expected: Path) -> None:
    a, b = curve(found), curve(expected)
    assert set(a) == set(b)
    assert f"loss at {STEPS}" in b
    for name in b:
        np.testing.assert_allclose(a[name], b[name], atol=1e-5, rtol=1e-5, err_msg=name)


def went_on_from(error: str) -> int:
    return int(error.split("goes on from step ")[1].split()[0])


def test_sigterm_to_one_saves_one_step_in_all_and_one_two_and_one_processes_go_on(job, straight, tmp_path):
    folder, last = tmp_path, 0
    # Two processes, then one, then two again; the last time none is stopped.
    for count, asked in ((2, 1), (1, 0), (2, 0)):
        stopped = toy(job, folder, count, 0.05)
        wait_for_step(stopped, folder, last)
        before = saved(folder)
        stopped.processes[asked].send_signal(signal.SIGTERM)
        time.sleep(0.05)
        if stopped.processes[asked].poll() is None:  # once more, while it saves perhaps
            stopped.processes[asked].send_signal(signal.SIGTERM)
        for number in range(count):
            code, error = stopped.end(number, 60)
            assert code == 143, error
            assert "error" not in error
            assert last == 0 or went_on_from(error) == last
        last = saved(folder)[-1]
        assert last > before[-1]
        assert not list(folder.glob("steps/*tmp*"))
    assert last < STEPS
    (error,) = toy(job, folder, 1).finish()
    assert went_on_from(error) == last
    assert_same_curve(folder, straight)


def test_a_process_that_is_killed_ends_the_other_and_the_restart_loses_an_interval_at_most(
    job, straight, tmp_path
):
    folder, last = tmp_path, 0
    for killed in (1, 0):  # process 0 holds the roll and JAX's coordination service
        started = toy(job, folder, 2, 0.05)
        wait_for_step(started, folder, last)
        reached = saved(folder)[-1]
        started.processes[killed].kill()
        start = time.monotonic()
        code, error = started.end(1 - killed, HEARTBEAT + 5)
        assert time.monotonic() - start < HEARTBEAT + 5
        assert code == 1
        told = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(told) == 1
        assert told[0] == error.splitlines()[-1]
        assert told[0].startswith(f"error: process {killed} (host ")
        assert "is gone" in told[0]
        assert "goes on from the last checkpoint" in told[0]
        assert "Traceback" not in error
        last = saved(folder)[-1]
        assert last >= reached - EVAL_EVERY
    errors = toy(job, folder, 2).finish()
    assert {went_on_from(error) for error in errors} == {last}
    assert_same_curve(folder, straight)


def test_a_process_that_hangs_ends_the_other_after_the_heartbeat_timeout(job, tmp_path):
    started = toy(job, tmp_path / "toy", 2, 0.05)
    wait_for_step(started, tmp_path / "toy", 0)
    started.processes[1].send_signal(signal.SIGSTOP)
    code, error = started.end(0, HEARTBEAT + 10)
    assert code == 1
    assert f"has been silent for hosts.heartbeat_timeout = {HEARTBEAT} s" in error.splitlines()[-1]
    assert error.splitlines()[-1].startswith("error: process 1 (host ")


def test_a_process_that_fails_is_named_with_its_reason_by_the_others(job, tmp_path):
    script = (
        f"import sys; sys.path.insert(0, {str(TOY.parent)!r}); import jax, toy\n"
        "from mlp_memory.artifacts import UserError\n"
        "def change(index, element):\n"
        "    if jax.process_index() == 1: raise UserError('tokens are damaged')\n"
        "    return element\n"
        "points = toy.Points\n"
        "toy.Points = lambda seconds: points(seconds=seconds, change=change)\n"
        "toy.main()\n"
    )
    started = job("-c", script, tmp_path / "toy", STEPS, 0, HEARTBEAT, count=2, devices=2)
    (code, error), (failed, _) = started.end(0, 60), started.end(1, 60)
    assert (code, failed) == (2, 2)
    assert error.splitlines()[-1].startswith("error: process 1 (host ")
    assert "failed: tokens are damaged" in error.splitlines()[-1]


@pytest.mark.parametrize(
    ("started", "missing"),
    [((0,), "1 of 2 processes did not come within"), ((1,), "process 0 (host localhost) did not answer at")],
)
def test_a_process_that_never_comes_is_named_with_the_host_that_slurm_tells(job, tmp_path, started, missing):
    slurm = {
        "SLURM_JOB_ID": str(time.time_ns() % 4096),
        "SLURM_STEP_NODELIST": "localhost,node7",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(started[0]),
        "SLURM_LOCALID": "0",
    }
    words = (TOY, tmp_path / "toy", STEPS, 0, HEARTBEAT, 3)
    code, error = job(*words, numbers=started, **slurm).end(started[0], 60)
    assert code == 2
    (line,) = [line for line in error.splitlines() if "error" in line]
    assert line == error.splitlines()[-1]
    assert missing in line
    assert "hosts.start_timeout = 3 s" in line
    assert started == (1,) or "process 1 (host node7)" in line
