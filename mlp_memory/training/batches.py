"""Batches as a pure function of (seed, step), on any number of hosts (only importer of grain).

A source holds numbered elements (a window of tokens, a block of rows). Epoch after epoch
they are shuffled and laid end to end; step s takes elements s·B .. (s+1)·B, and each
process reads only its own part of them, ahead of the step that needs it.
"""

import dataclasses
import functools
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


@dataclasses.dataclass(frozen=True)
class Nearby:
    """A shuffle that stays in a few places at a time, for sources that are dear to read at random.

    Stretches of `stretch` elements are shuffled among each other, then the elements of every
    `pool` stretches that come to stand together.
    """

    stretch: int
    pool: int


class _NearbyOrder:
    """Epoch after epoch of a source in that order, as good as endless."""

    def __init__(self, source: Source, seed: int, nearby: Nearby):
        self._source, self._seed, self._nearby = source, seed, nearby
        self._pools = functools.lru_cache(2)(self._epoch_pools)
        self._elements = functools.lru_cache(4)(self._pool_elements)

    def __len__(self) -> int:
        return (1 << 62) // len(self._source) * len(self._source)

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        epoch, at = divmod(int(position), len(self._source))
        _, ends_P = self._pools(epoch)
        pool = int(np.searchsorted(ends_P, at, side="right"))
        elements = self._elements(epoch, pool)
        return self._source[int(elements[at - (ends_P[pool] - len(elements))])]

    def _epoch_pools(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the stretches, and where each pool ends."""
        total, stretch, pool = len(self._source), self._nearby.stretch, self._nearby.pool
        order_S = np.random.default_rng((self._seed, epoch)).permutation(-(-total // stretch))
        ends_S = np.cumsum(np.minimum(stretch, total - order_S * stretch))
        return order_S, np.append(ends_S[pool - 1 : -1 : pool], total)

    def _pool_elements(self, epoch: int, pool: int) -> np.ndarray:
        order_S, _ = self._pools(epoch)
        stretches = order_S[pool * self._nearby.pool : (pool + 1) * self._nearby.pool]
        first = stretches[:, None] * self._nearby.stretch + np.arange(self._nearby.stretch)
        elements = first[first < len(self._source)]
        return np.random.default_rng((self._seed, epoch, pool)).permutation(elements)


class Batches:
    """Steps of `batch_size` elements.

    Args:
      source: the elements.
      batch_size: of a step, over all processes.
      seed: of the shuffle.
      threads: that read ahead; with 0 elements are read when asked for, by who asks.
      nearby: how far an epoch's shuffle reaches; over the whole source if not given.

    Raises:
      UserError: the batch does not divide over the processes.
    """

    def __init__(
        self, source: Source, batch_size: int, seed: int, threads: int = 2, nearby: Nearby | None = None
    ):
        processes = jax.process_count()
        if batch_size % processes:
            raise UserError(f"batch_size = {batch_size} does not divide over {processes} processes")
        self._threads = threads
        if nearby:
            laid = grain.MapDataset.source(_NearbyOrder(source, seed, nearby))
        else:
            # As good as endless; grain's own endless repeat overflows with batches of one.
            laid = grain.MapDataset.source(source).seed(seed).shuffle().repeat((1 << 62) // len(source))
        self._parts = laid.batch(batch_size // processes)

    def from_step(self, step: int) -> Iterator[dict[str, Any]]:
        """This process's part of the batches of `step`, `step` + 1, ..."""
        first = step * jax.process_count() + jax.process_index()
        parts = self._parts.slice(slice(first, None, jax.process_count()))
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=2 * self._threads)
        return iter(parts.to_iter_dataset(options))
