"""Batches as a pure function of (seed, step), on any number of hosts (only importer of grain).

A source holds numbered elements (a window of tokens, a block of rows). Epoch after epoch
they are shuffled and laid end to end; step s takes elements s·B .. (s+1)·B, and each
process reads only its own part of them, ahead of the step that needs it.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import grain
import jax
import numpy as np

from mlp_memory.artifacts import UserError


class Source(Protocol):
    """Numbered elements, each a dict of equally shaped NumPy arrays."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


class Batches:
    """Steps of `batch_size` elements.

    Args:
      source: the elements.
      batch_size: of a step, over all processes.
      seed: of the shuffle.
      threads: that read ahead, a batch each.

    Raises:
      UserError: the batch does not divide over the processes.
    """

    def __init__(self, source: Source, batch_size: int, seed: int, threads: int = 4):
        processes = jax.process_count()
        if batch_size % processes:
            raise UserError(f"batch_size = {batch_size} does not divide over {processes} processes")
        self._threads = threads
        # As good as endless; grain's own endless repeat overflows with batches of one.
        laid = grain.MapDataset.source(source).seed(seed).shuffle().repeat((1 << 62) // len(source))
        self._parts = laid.batch(batch_size // processes)

    def from_step(self, step: int) -> Iterator[dict[str, Any]]:
        """This process's part of the batches of `step`, `step` + 1, ..."""
        first = step * jax.process_count() + jax.process_index()
        parts = self._parts.slice(slice(first, None, jax.process_count()))
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=2 * self._threads)
        return iter(parts.to_iter_dataset(options))
