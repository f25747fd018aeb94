"""Token streams cut into windows: training elements and scored rows.

Row i of a stream may be read through any window that holds it; every window is masked to
the row's own document, so its context is what precedes it in the window and the document.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from mlp_memory.corpus.stream import TokenStream

Ranges = list[tuple[int, int]]
"""Stretches of rows, first and one past the last, in order."""

_SPREAD_ROWS = 256


def spread(total: int, most: int) -> Ranges:
    """All rows of a stream, or about `most` of them in evenly spaced stretches of 256.

    A stretch says more than as many rows from the start of the stream, which may be a few
    documents only. `most` 0 is all.
    """
    if most <= 0 or most >= total:
        return [(0, total)]
    length = min(_SPREAD_ROWS, most)
    count = most // length
    return [(i * total // count, i * total // count + length) for i in range(count)]


def cut(ranges: Ranges, start: int, stop: int) -> Ranges:
    """The part of `ranges` that holds their start-th to (stop − 1)-th row, counted through."""
    found, before = [], 0
    for a, b in ranges:
        first, last = max(start - before, 0), min(stop - before, b - a)
        if first < last:
            found.append((a + first, a + last))
        before += b - a
    return found


def read(column: Callable[[int, int], np.ndarray], ranges: Ranges) -> np.ndarray:
    """`column(start, stop)` of every stretch, end to end."""
    return np.concatenate([column(start, stop) for start, stop in ranges])


@dataclasses.dataclass(frozen=True)
class Window:
    """Stream rows start..stop, of which first..stop are the ones to use."""

    start: int
    first: int
    stop: int


@dataclasses.dataclass(frozen=True)
class WindowPlan:
    """Windows of `context` rows at every multiple of `stride`.

    A row is used from the earliest window that holds it, which is the one that gives it the
    most context: the first window serves all its rows, each later one its last `stride`.
    """

    context: int
    stride: int

    def window_of(self, row: int) -> int:
        """Index of the window that serves a row."""
        return 0 if row < self.context else (row - self.context) // self.stride + 1

    def windows(self, start: int, stop: int, total: int) -> list[Window]:
        """The windows that serve rows start..stop of a stream of `total` rows, in order.

        Their `first..stop` parts, cut to start..stop, tile that range without overlap.
        """
        if start >= stop:
            return []
        found = []
        for index in range(self.window_of(start), self.window_of(stop - 1) + 1):
            begin = index * self.stride
            end = min(begin + self.context, total)
            served = begin if index == 0 else begin + self.context - self.stride
            found.append(Window(begin, max(served, start), min(end, stop)))
        return found


def window_arrays(stream: TokenStream, start: int, length: int) -> dict[str, np.ndarray]:
    """`length` rows from `start`, padded past the stream's end.

    Returns:
      tokens [length] int32, labels [length] int32 (next tokens), segments [length] int32
      (document numbers; −1 on padding), weight [length] float32 (1 where there is a label).
    """
    stop = min(start + length, len(stream))
    pad = length - (stop - start)

    def padded(values: np.ndarray, fill: int, dtype: type) -> np.ndarray:
        return np.concatenate([values.astype(dtype), np.full(pad, fill, dtype)])

    return {
        "tokens": padded(stream.tokens[start:stop], 0, np.int32),
        "labels": padded(stream.labels(start, stop), 0, np.int32),
        "segments": padded(stream.document_ids(start, stop), -1, np.int32),
        "weight": padded(stream.has_next(start, stop), 0, np.float32),
    }


def batch_shapes(windows: int, context: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `WindowSource`'s elements, less their rows."""
    dtypes = {"tokens": np.int32, "labels": np.int32, "segments": np.int32, "weight": np.float32}
    return {name: jax.ShapeDtypeStruct((windows, context), dtype) for name, dtype in dtypes.items()}


class WindowSource:
    """Training elements: the stream in consecutive windows, none of its rows left out."""

    def __init__(self, stream: TokenStream, context: int):
        self._stream, self._context = stream, context

    def __len__(self) -> int:
        return -(-len(self._stream) // self._context)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = index * self._context
        return {**window_arrays(self._stream, start, self._context), "rows": np.int64(start)}
