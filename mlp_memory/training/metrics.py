"""One writer: metrics.jsonl, which survives restarts without repeats, and TensorBoard."""

import json
from typing import Any

import jax
import tensorboardX

from mlp_memory.artifacts import Directory, UserError, first_line

_FILE = "metrics.jsonl"


class Metrics:
    """Writes figures by step, on the first process.

    Lines after `resume_step` of an earlier start are dropped.

    Only figures that a repeated run would repeat go into metrics.jsonl; rates go to
    TensorBoard alone.
    """

    def __init__(self, directory: Directory, resume_step: int):
        self._directory = directory
        self._lines = [line for line in read_metrics(directory) if line["step"] <= resume_step]
        self._writes = jax.process_index() == 0
        local = directory.is_local and self._writes
        self._board = tensorboardX.SummaryWriter(str(directory.path / "tensorboard")) if local else None

    def write(self, step: int, figures: dict[str, float], rates: dict[str, float] | None = None) -> None:
        """Adds one step's figures; `flush` puts them on disk."""
        self._lines.append({"step": step, **figures})
        if self._board is not None:
            for name, value in {**figures, **(rates or {})}.items():
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Replaces the file as a whole, so that it is never half a line."""
        text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in self._lines)
        if self._writes:
            self._directory.write(_FILE, text.encode())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        self.flush()
        if self._board is not None:
            self._board.close()


def read_metrics(directory: Directory) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; empty where there are none.

    Raises:
      UserError: the file is damaged.
    """
    data = directory.read(_FILE)
    try:
        lines = [json.loads(line) for line in (data or b"").decode().splitlines()]
        if not all(isinstance(line, dict) and isinstance(line.get("step"), int) for line in lines):
            raise ValueError("a line tells of no step")
        return lines
    except (ValueError, RecursionError) as error:
        raise UserError(f"{directory}/{_FILE} is damaged ({first_line(error)}): delete it") from error
