"""Work in units: in this process, or by Apache Beam on many."""

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from mlp_memory.artifacts import Directory
from mlp_memory.parallel.config import FleetConfig

Unit = TypeVar("Unit", bound=Hashable)


def run_units(
    what: str,
    make_worker: Callable[[], Callable[[Unit], None]],
    groups: Sequence[Sequence[Unit]],
    config: FleetConfig,
    finished: Callable[[], set[Unit]],
    done: Callable[[Unit], None],
    note: Callable[[str], None],
    notes: Directory,
) -> None:
    worker = make_worker()
    for unit in itertools.chain.from_iterable(groups):
        worker(unit)
        done(unit)
