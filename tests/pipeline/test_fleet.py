"""embed and retrieve by Beam workers and by killed processes, in the bytes of one that was left alone."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

SETTINGS = ("--gin=index.shards=3", "--gin=retrieve.chunk_rows=64", "--gin=retrieve.spill_gigabytes=0.0002")
BEAM = ('--gin=fleet.runner="DirectRunner"', "--gin=fleet.workers=2")
WORKER = [b"-m", b"apache_beam.runners.worker.sdk_worker_main"]
SEARCHED, MERGED = "targets/units/0*/shard-*", "targets/chunks/*"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def workers(pid: int) -> list[int]:
    """Beam's worker processes below a process, their shells left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == pid:
                found += [int(entry.name)] if command[1:3] == WORKER else []
                found += workers(int(entry.name))
    return found


def wait_for(pattern: str, folder: Path, process, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not any(folder.glob(pattern)):
        assert process.poll() is None, f"ended before {pattern}: {log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.002)


@pytest.fixture(scope="module")
def three_shards(small_run, recipe, mlp_memory, tmp_path_factory) -> Path:
    """A workdir with an index of three shards and the targets that one process made from it."""
    workdir = tmp_path_factory.mktemp("fleet") / "workdir"
    for folder in ("corpus", "decoder", "datastore"):
        shutil.copytree(small_run / folder, workdir / folder)
    for stage in ("index", "retrieve"):
        answer = mlp_memory(stage, f"--workdir={workdir}", f"--gin_file={recipe}", *SETTINGS)
        assert answer.code == 0, answer.error
    assert not (workdir / "targets/units").exists()
    return workdir


@pytest.fixture
def without_targets(three_shards, tmp_path) -> Path:
    ignored = shutil.ignore_patterns("targets")
    return Path(shutil.copytree(three_shards, tmp_path / "workdir", ignore=ignored))


def test_a_killed_process_goes_on_in_search_and_in_merge_and_ends_in_the_same_bytes(
    three_shards, without_targets, recipe, start_command, tmp_path
):
    log, words = tmp_path / "log", ("retrieve", f"--workdir={without_targets}", f"--gin_file={recipe}")
    for moment in (SEARCHED, MERGED):
        process = start_command(*words, *SETTINGS, log=log)
        wait_for(moment, without_targets, process, log)
        process.kill()
        process.wait()
        assert (without_targets / "targets/units").exists()
        lists = sorted(without_targets.glob(SEARCHED))
        if moment == SEARCHED and len(lists) > 1:  # and what is damaged is made again
            data = bytearray(lists[0].read_bytes())
            data[-3] ^= 4
            lists[0].write_bytes(data)
            lists[1].write_bytes(lists[1].read_bytes()[:-5])
    process = start_command(*words, *SETTINGS, log=log)
    assert process.wait(300) == 0, log.read_text()[-3000:]
    assert contents(without_targets / "targets") == contents(three_shards / "targets")
    assert "Traceback" not in log.read_text()


def test_targets_of_two_workers_one_of_them_killed_are_the_same_bytes(
    three_shards, without_targets, recipe, start_command, tmp_path, rng
):
    log, words = tmp_path / "log", ("retrieve", f"--workdir={without_targets}", f"--gin_file={recipe}")
    # One round, so that a start runs two pipelines and not many.
    words = (*words, *SETTINGS[:2], *BEAM)

    process = start_command(*words, log=log)
    wait_for(SEARCHED, without_targets, process, log)
    left = workers(process.pid)
    assert left
    process.kill()  # the one that drives them: they must not outlive it
    process.wait()
    deadline = time.monotonic() + 20
    while any(b"sdk_worker_main" in command_line(pid) for pid in left):
        assert time.monotonic() < deadline, "workers outlive the process that started them"
        time.sleep(0.05)

    process = start_command(*words, log=log)
    while not (found := workers(process.pid)):
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.02)
    os.kill(int(rng.choice(found)), signal.SIGKILL)
    assert process.wait(300) == 0, log.read_text()[-3000:]
    assert "a worker was lost perhaps" in log.read_text()
    assert contents(without_targets / "targets") == contents(three_shards / "targets")
    assert "Traceback" not in log.read_text()


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_keys_that_two_workers_embed_are_the_same_bytes(small_run, workdir, recipe, mlp_memory):
    shutil.rmtree(workdir / "datastore")
    answer = mlp_memory("embed", f"--workdir={workdir}", f"--gin_file={recipe}", *BEAM)
    assert answer.code == 0, answer.error
    assert contents(workdir / "datastore") == contents(small_run / "datastore")
