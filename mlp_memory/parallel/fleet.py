"""Work in units: in this process, or by Apache Beam in many, on one machine or on a cluster.

The only importer of apache_beam, which only the process that drives a pipeline and its workers
load. A unit is a small picklable value; what it makes is a file, written whole, so a unit
may be done twice. Nothing but files says which are done: a pipeline that loses a worker is
ended, and the next one gets the units that are missing.
"""

import contextlib
import functools
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mlp_memory.artifacts import Directory, UserError, first_line
from mlp_memory.parallel.config import FleetConfig

if TYPE_CHECKING:
    import apache_beam as beam
    from apache_beam.utils.shared import Shared

Unit = TypeVar("Unit", bound=Hashable)
_ROOT = Path(__file__).parents[2]
MakeWorker = Callable[[], Callable[[Unit], None]]

# How each runner is told the number of workers. Users' own flags come after and so win.
_WORKER_FLAGS = {
    "DirectRunner": ("--direct_running_mode=multi_processing", "--direct_num_workers={}"),
    "FlinkRunner": ("--parallelism={}",),
    "DataflowRunner": ("--num_workers={}",),
}
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 20.0


def usable_cores() -> int:
    """Cores that this process may run on: of workers on one machine each has its share."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_units(
    what: str,
    make_worker: MakeWorker,
    groups: Sequence[Sequence[Unit]],
    config: FleetConfig,
    finished: Callable[[], set[Unit]],
    done: Callable[[Unit], None],
    note: Callable[[str], None],
    notes: Directory,
) -> None:
    """Does every unit of every group; what is done is in files when it returns.

    In process the groups are done one after the other. With Beam they are cut into elements
    (`elements`), and an element is done by one worker process from its first unit to its last.
    A worker process makes its worker once, whatever its elements, and does one unit at a time.

    Args:
      what: name of the work, for messages.
      make_worker: makes what does a unit; picklable where `config.runner` is one of Beam's.
      groups: units; those of a group share something that is dear to load.
      config: who does the work.
      finished: the units found done by their files; ones of other groups do no harm. Asked
        again and again where the work is done elsewhere.
      done: told of each unit once, when it is done.
      note: shows a line to the person who waits.
      notes: a folder that workers see too, for the last words of one that cannot go on; emptied.

    Raises:
      UserError: a worker raised it, or units are missing after `config.attempts` pipelines.
      RuntimeError: a worker raised anything else.
    """
    if not any(groups):
        return
    if config.in_process:
        worker = make_worker()
        for unit in itertools.chain.from_iterable(groups):
            worker(unit)
            done(unit)
        return
    missing = set(itertools.chain.from_iterable(groups))
    for attempt in range(1, config.attempts + 1):
        left = [[unit for unit in group if unit in missing] for group in groups]
        with _Pipeline(make_worker, elements(left, config.workers), config, notes) as pipeline:
            for unit in _as_finished(pipeline, missing, config.patience, finished):
                missing.remove(unit)
                done(unit)
            if not missing:
                return
            if attempt == config.attempts:
                raise UserError(
                    f"{what}: {len(missing)} units are still missing after fleet.attempts = "
                    f"{config.attempts} pipelines of {config.runner}: {pipeline.keep_log()}; "
                    "the same command goes on from here"
                )
        note(
            f"{what}: a pipeline ended or hung and left {len(missing)} units, a worker was lost perhaps; "
            f"attempt {attempt + 1} of {config.attempts} does them"
        )


def _as_finished(
    pipeline: "_Pipeline[Unit]", missing: set[Unit], patience: float, finished: Callable[[], set[Unit]]
) -> Iterator[Unit]:
    """Units as their files appear, until the pipeline ends or nothing appears for too long."""
    seconds, quiet_since, runs = _POLL_SECONDS, time.monotonic(), True
    while runs and time.monotonic() - quiet_since < patience:
        runs = pipeline.runs(seconds)
        start = time.monotonic()
        new = sorted(finished() & missing)
        # Listing the files of a long run takes a while: at most a tenth of the time.
        seconds = max(_POLL_SECONDS, 10 * (time.monotonic() - start))
        yield from new
        pipeline.raise_failure()
        if new:
            quiet_since = time.monotonic()


def elements(groups: Sequence[Sequence[Unit]], workers: int) -> list[list[Unit]]:
    """Groups cut into what a worker takes at a time.

    A lone group is cut into single units. Several have a common thing each (an index shard) that
    whoever takes an element loads, so they are cut only as far as `workers` processes need
    to be kept busy: into 2·workers elements in all, or one a group if there are more groups. So the
    things are loaded 2·workers + groups times at most, by all workers together.
    """
    groups = [list(group) for group in groups if group]
    if len(groups) == 1 or not groups:
        return [[unit] for group in groups for unit in group]
    pieces = -(-2 * workers // len(groups))
    cut = []
    for group in groups:
        size = -(-len(group) // pieces)
        cut += [group[first : first + size] for first in range(0, len(group), size)]
    return cut


class _Pipeline(Generic[Unit]):
    """A pipeline at work in a process of its own, which can be ended with all its workers.

    Beam's local runner waits for ever for a worker that was killed, and has no way to be told.
    """

    def __init__(
        self, make_worker: MakeWorker, parts: list[list[Unit]], config: FleetConfig, notes: Directory
    ):
        self._notes = notes
        descriptor, name = tempfile.mkstemp(prefix="mlp-memory-fleet-", suffix=".log")
        os.close(descriptor)
        self._log, self._keep = Path(name), False
        self._notes.delete()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_drive, args=(make_worker, parts, config, notes.location, name)
        )

    def __enter__(self) -> "_Pipeline":
        self._process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.runs(0):
            self._process.terminate()  # where a job is on a cluster, it is cancelled first
            self.runs(_GRACE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # and its workers on this machine
        self._process.join()
        self._notes.delete()
        if not self._keep:
            self._log.unlink(missing_ok=True)

    def runs(self, seconds: float) -> bool:
        """Whether it is still at work; waits so long for its end."""
        return not multiprocessing.connection.wait([self._process.sentinel], seconds)

    def raise_failure(self) -> None:
        """Raises what a worker found that no other attempt can mend."""
        for name in self._notes.names():
            text = (self._notes.read(name) or b"").decode(errors="replace")
            kind, _, message = text.partition("\n")
            if kind == UserError.__name__:
                raise UserError(message)
            raise RuntimeError(f"a worker failed:\n{message}")

    def keep_log(self) -> str:
        """Where the pipeline's log is, and its last telling line."""
        self._keep = True
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"its log is {self._log}" + (f" and ends {lines[-1][:200]!r}" if lines else "")


def _drive(
    make_worker: MakeWorker, parts: list[list[Unit]], config: FleetConfig, notes: str, log: str
) -> None:
    """Runs the pipeline; the whole of the process that `_Pipeline` starts."""
    os.setsid()  # workers started from here are ended with it
    with open(log, "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    threading.Thread(target=_follow_parent, args=(Path(log),), daemon=True).start()
    threading.excepthook = functools.partial(_end_without_a_worker, threading.excepthook)
    # Local workers import what this process has.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
    try:
        pipeline = _build(make_worker, parts, config, notes)
    except (ImportError, ValueError) as error:  # no Beam, no such runner, flags that do not parse
        text = f"fleet.runner = {config.runner!r} cannot be started: {first_line(error)}"
        _write_failure(Directory(notes), UserError(text))
        raise
    result = pipeline.run()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        result.wait_until_finish()
    except SystemExit:
        result.cancel()
        raise
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gRPC's threads need not be waited for


def _build(
    make_worker: MakeWorker, parts: list[list[Unit]], config: FleetConfig, notes: str
) -> "beam.Pipeline":
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.utils.shared import Shared

    flags = [flag.format(config.workers) for flag in _WORKER_FLAGS.get(config.runner, ())]
    runner: Any = config.runner
    if runner == "DirectRunner":
        # Its local runner outright: by that name Beam first looks for a Go program on the network.
        from apache_beam.runners.portability.fn_api_runner import FnApiRunner

        runner = FnApiRunner()
    pipeline = beam.Pipeline(runner=runner, options=PipelineOptions([*flags, *config.options]))
    local = config.workers if config.runner == "DirectRunner" else 0
    # Without the reshuffle Beam would fuse the two steps and one worker would do everything.
    _ = (
        pipeline
        | "elements" >> beam.Create(list(enumerate(parts)))
        | "spread" >> beam.Reshuffle()
        | "units" >> beam.FlatMap(_do_element, make_worker, Shared(), notes, local)
    )
    return pipeline


class _SharedWorker:
    """A process's worker and the lock that keeps its threads from working side by side."""

    def __init__(self, make_worker: MakeWorker):
        self.do, self.lock = make_worker(), threading.Lock()


def _do_element(
    element: tuple[int, list[Unit]], make_worker: MakeWorker, shared: "Shared", notes: str, local: int
) -> list[None]:
    """Does an element's units in a worker process."""
    number, units = element
    try:
        if local:
            _take_cores(local)
        worker = shared.acquire(functools.partial(_SharedWorker, make_worker))
        with worker.lock:
            for unit in units:
                worker.do(unit)
    except Exception as error:
        _write_failure(Directory(notes), error, number)
    return []


def _write_failure(notes: Directory, error: Exception, number: int = 0) -> None:
    user = isinstance(error, UserError)
    message = str(error) if user else "".join(traceback.format_exception(error))
    notes.write(f"{number:08d}", f"{type(error).__name__}\n{message}".encode())


def _take_cores(workers: int) -> None:
    """Leaves this thread, and those it starts, a local worker's share of the cores.

    XLA and ScaNN start as many threads as they see cores, in every process.
    """
    number = os.environ.get("WORKER_ID", "").rpartition("_")[2]
    if number.isdigit() and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(os.getpid()))  # of the first thread, which keeps them all
        if len(cores) >= workers:
            os.sched_setaffinity(0, cores[int(number) % workers :: workers])


def _follow_parent(log: Path) -> None:
    """Ends this process and its workers when the parent does, however that was killed."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    log.unlink(missing_ok=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _end_without_a_worker(
    show: Callable[[threading.ExceptHookArgs], Any], args: threading.ExceptHookArgs
) -> None:
    """Ends the pipeline when the thread that waits for a local worker says that it was killed."""
    show(args)
    if args.thread is not None and args.thread.name == "run_worker":  # Beam's name for it
        sys.stderr.flush()
        os.killpg(os.getpgrp(), signal.SIGKILL)
