"""The rows that get teachers: every row of the stream, or chosen blocks of it."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from mlp_memory.index.exact import Rows


class Stream(Protocol):
    """What is asked of the token stream (corpus/stream.py)."""

    def __len__(self) -> int: ...

    def has_next(self, start: int, stop: int) -> np.ndarray: ...

    def labels(self, start: int, stop: int) -> np.ndarray: ...

    def is_deleted(self, start: int, stop: int) -> np.ndarray: ...


class Asked(Protocol):
    """Row i of the targets is the teacher of stream row `rows(i, i + 1)[0]`, if it `asks`."""

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> np.ndarray:
        """int64: the stream rows of the targets' rows start..stop."""
        ...

    def asks(self, start: int, stop: int) -> np.ndarray:
        """bool: which of them get a teacher."""
        ...

    def queries(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop − start, E]: their keys."""
        ...


class EveryRow:
    """All rows of a stream, each its own; those with a next token ask."""

    def __init__(self, stream: Stream, keys: Rows):
        self._stream, self._keys = stream, keys

    def __len__(self) -> int:
        return len(self._stream)

    def rows(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop)

    def asks(self, start: int, stop: int) -> np.ndarray:
        return self._stream.has_next(start, stop)

    def queries(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self._keys[start:stop], np.float32)


class Source(NamedTuple):
    """A stream and its keys."""

    stream: Stream
    keys: Rows


class ChosenBlocks:
    """Blocks of consecutive rows of a stream that goes on where another ends and has lost documents.

    A row of the other stream that had a next token there asks, with the key it had there: where its
    document has been deleted, it asks what the others say in its place. Blocks that cross the
    border and rows past the end are as in the stream itself.

    Args:
      starts_B: int64, ascending: the first row of each block.
      block_rows: rows of a block.
      before: the other stream.
      now: the stream.
    """

    def __init__(self, starts_B: np.ndarray, block_rows: int, before: Source, now: Source):
        self._starts_B, self._block_rows, self._before, self._now = starts_B, block_rows, before, now

    def __len__(self) -> int:
        return len(self._starts_B) * self._block_rows

    def source(self, first: int) -> Source:
        """Which of the two a block that begins at row `first` is read from."""
        return self._before if first + self._block_rows <= len(self._before.stream) else self._now

    def rows(self, start: int, stop: int) -> np.ndarray:
        places = np.arange(start, stop)
        return self._starts_B[places // self._block_rows] + places % self._block_rows

    def asks(self, start: int, stop: int) -> np.ndarray:
        return self._read(start, stop, np.bool_, lambda source, a, b: source.stream.has_next(a, b))

    def queries(self, start: int, stop: int) -> np.ndarray:
        width = self._now.keys.shape[1:]
        return self._read(start, stop, np.float32, lambda source, a, b: source.keys[a:b], width)

    def labels(self, start: int, stop: int) -> np.ndarray:
        """int32: next tokens, 0 where there is none; of deleted rows they are the base's."""
        return self._read(start, stop, np.int32, lambda source, a, b: source.stream.labels(a, b))

    def is_deleted(self, start: int, stop: int) -> np.ndarray:
        """bool: rows that ask and have been deleted since."""
        deleted_T = self._read(start, stop, np.bool_, lambda _, a, b: self._now.stream.is_deleted(a, b))
        return deleted_T & self.asks(start, stop)

    def _read(
        self,
        start: int,
        stop: int,
        dtype: type,
        read: Callable[[Source, int, int], np.ndarray],
        width: tuple[int, ...] = (),
    ) -> np.ndarray:
        """`read` of each stretch of rows, [stop − start, *width]; zero past the end."""
        found_T = np.zeros((stop - start, *width), dtype)
        for place, first, last, source in self._runs(start, stop):
            found_T[place : place + last - first] = read(source, first, last)
        return found_T

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int, Source]]:
        """Stretches within a block: place from `start`, stream rows first..last, where they are read from."""
        for block in range(start // self._block_rows, -(-stop // self._block_rows)):
            begin = block * self._block_rows
            offset, end = max(start - begin, 0), min(stop - begin, self._block_rows)
            row, source = int(self._starts_B[block]), self.source(int(self._starts_B[block]))
            last = min(row + end, len(source.stream))
            if row + offset < last:
                yield begin + offset - start, row + offset, last, source
