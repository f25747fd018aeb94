import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


class Job:
    """Processes of one job on this machine; its words are a program's, or -m mlp_memory's."""

    def __init__(self, *words: object, count: int = 1, devices: int = 1, **environment: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._words, self._environment = [sys.executable, *map(str, words)], environment
        if count > 1:
            self._environment = {
                "MLP_MEMORY_COORDINATOR": f"127.0.0.1:{port}",
                "MLP_MEMORY_PROCESSES": str(count),
                **environment,
            }
        self._flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        self.processes: dict[int, subprocess.Popen] = {}

    def start(self, *numbers: int) -> "Job":
        """Starts the processes of these numbers, of a job of several."""
        for number in numbers:
            self.processes[number] = subprocess.Popen(
                self._words,
                env={
                    **os.environ,
                    "XLA_FLAGS": self._flags,
                    "JAX_PLATFORMS": "cpu",
                    "PYTHONPATH": str(REPOSITORY),
                    "MLP_MEMORY_PROCESS": str(number),
                    **self._environment,
                },
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        return self

    def end(self, number: int, seconds: float = 300) -> tuple[int, str]:
        """Waits for a process: its exit code and what it said on stderr."""
        error = self.processes[number].communicate(timeout=seconds)[1]
        return self.processes[number].returncode, error

    def finish(self) -> list[str]:
        """Waits for all; what each said. None may have failed."""
        ends = [self.end(number) for number in self.processes]
        for code, error in ends:
            assert code == 0, error[-4000:]
        return [error for _, error in ends]


@pytest.fixture
def job() -> Iterator[Callable[..., Job]]:
    """Makes a `Job` and starts all its processes, unless told which."""
    made: list[Job] = []

    def make(*words: object, count: int = 1, numbers: range | None = None, **options) -> Job:
        made.append(Job(*words, count=count, **options))
        return made[-1].start(*(range(count) if numbers is None else numbers))

    yield make
    for job in made:
        for process in job.processes.values():
            process.kill()
            process.wait()
            process.stderr.close()


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy training of 60 steps in one process that nobody stops."""
    folder = tmp_path_factory.mktemp("straight")
    Job(REPOSITORY / "tests/training/toy.py", folder, 60, 0).start(0).finish()
    return folder
