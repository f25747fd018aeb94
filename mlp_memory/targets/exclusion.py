"""Which neighbours may not teach a row, because they hold its answer rather than foretell it.

A row is never its own neighbour. A user may leave out more: the rows beside it, its whole
document, or every row that has read the same last tokens (a repeated text).
"""

from typing import NamedTuple

import numpy as np

from mlp_memory.index.neighbors import drop
from mlp_memory.targets.config import RetrieveConfig
from mlp_memory.targets.ngrams import Grams, Stream

_ROWS_SERVED = 0.99
# No more than so many times k candidates are asked for on account of documents, or of contexts:
# more rows may be excluded than any search should return.
_MOST_TIMES_K = 4
_SAMPLED_CONTEXTS = 1024


class _Contexts(NamedTuple):
    """Contexts of n tokens each, as a stream of documents."""

    tokens: np.ndarray
    bounds_D1: np.ndarray

    def __len__(self) -> int:
        return int(self.bounds_D1[-1])


def candidates(config: RetrieveConfig, stream: Stream) -> int:
    """How many neighbours to ask of the index so that k normally remain.

    k + 1 + 2·exclude_window; with exclude_document also the length of the document that 99 % of
    the rows are in or in a shorter one, but 4·k at most; with exclude_context also the number of
    rows of one context, which for 99 % of 1024 evenly spaced rows is no larger, but 4·k at most
    (this reads the stream). A row that still comes short says so: it has fewer than k in the
    targets' `neighbours`.
    """
    count, most = config.k + 1 + 2 * config.exclude_window, _MOST_TIMES_K * config.k
    if config.exclude_document:
        count += min(_rows_of_one_document(stream), most)
    if config.exclude_context:
        count += min(_rows_of_one_context(stream, config.exclude_context), most)
    return count


def _rows_of_one_document(stream: Stream) -> int:
    lengths_D = np.sort(np.diff(stream.bounds_D1))
    served = int(np.searchsorted(np.cumsum(lengths_D), _ROWS_SERVED * len(stream)))
    return int(lengths_D[min(served, len(lengths_D) - 1)])


def _rows_of_one_context(stream: Stream, n: int) -> int:
    row_Q = np.unique(np.linspace(0, len(stream) - 1, _SAMPLED_CONTEXTS).astype(np.int64))
    document_Q = np.searchsorted(stream.bounds_D1, row_Q, side="right") - 1
    first_Q = (row_Q - n + 1)[row_Q - n + 1 >= stream.bounds_D1[document_Q]]
    if not len(first_Q):
        return 0  # no document has n tokens
    tokens = np.concatenate([stream.tokens[int(first) : int(first) + n] for first in first_Q])
    grams = Grams([_Contexts(tokens, np.arange(len(first_Q) + 1) * n)], n)
    rows_U = np.zeros(grams.count, np.int64)
    for _, gram_H in grams.matches(stream):
        rows_U += np.bincount(gram_H, minlength=grams.count)
    sampled_U = grams.occurrences(np.arange(grams.count))
    return int(np.percentile(np.repeat(rows_U, sampled_U), 100 * _ROWS_SERVED, method="higher"))


class Exclusion:
    """Drops from neighbour lists what may not be in them.

    Excluded are, of row i: i itself, by identity and whatever its rank, so that another row with
    the very same key stays; rows j with |i − j| ≤ exclude_window, documents notwithstanding; rows
    of i's document (exclude_document); rows whose context equals i's (exclude_context = n). A
    context is the last n tokens read, the row's own among them, or all tokens of the document so
    far where they are fewer; contexts of different length differ. They are compared token by
    token, so nothing is excluded by the accident of a hash.

    Memory: with exclude_context the stream's tokens (2 or 4 bytes per row); in a call 27 bytes
    per candidate, and 60 more per candidate whose last token is the query's where those are compared.
    """

    def __init__(self, config: RetrieveConfig, stream: Stream):
        """Reads from the stream what the config's exclusions need; nothing where it has none.

        Raises:
          UserError: a chunk of the tokens is damaged.
        """
        self.k = config.k
        self._window, self._context = config.exclude_window, config.exclude_context
        self._by_document = config.exclude_document
        self._bounds_D1 = stream.bounds_D1 if self._by_document or self._context else None
        self._tokens_N = stream.tokens[0 : len(stream)] if self._context else None

    def exclude(
        self, rows_QxC: np.ndarray, sqdist_QxC: np.ndarray, query_rows_Q: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest candidates that may teach each query.

        Args:
          rows_QxC: int64 rows of a search for `candidates` neighbours, -1 where there is none.
          sqdist_QxC: float32 distances, inf there.
          query_rows_Q: int64 row of each query.

        Returns:
          rows_Qxk int64 and sqdist_Qxk float32, order kept, -1 and inf where fewer remain.
        """
        query_rows_Qx1 = np.asarray(query_rows_Q)[:, None]
        if self._window:
            dropped_QxC = np.abs(rows_QxC - query_rows_Qx1) <= self._window
        else:
            dropped_QxC = rows_QxC == query_rows_Qx1
        if self._by_document:
            document_Qx1 = np.searchsorted(self._bounds_D1, query_rows_Qx1, side="right") - 1
            dropped_QxC |= (rows_QxC >= self._bounds_D1[document_Qx1]) & (
                rows_QxC < self._bounds_D1[document_Qx1 + 1]
            )
        if self._context:
            dropped_QxC |= self._same_context(rows_QxC, query_rows_Qx1)
        return drop(rows_QxC, sqdist_QxC, dropped_QxC, self.k)

    def _same_context(self, rows_QxC: np.ndarray, query_rows_Qx1: np.ndarray) -> np.ndarray:
        """bool [Q, C]: whether the candidate has read the query's last n tokens.

        Token after token backwards, and only of the pairs that agreed so far: few agree in two.
        """
        same_QxC = (rows_QxC >= 0) & (self._tokens_N[rows_QxC] == self._tokens_N[query_rows_Qx1])
        query_P, column_P = np.nonzero(same_QxC)
        same_QxC[:] = False
        row_P, other_P = rows_QxC[query_P, column_P], query_rows_Qx1[query_P, 0]
        length_P = self._context_length(row_P)
        equal_P = length_P == self._context_length(other_P)
        back = 0
        while True:
            query_P, column_P = query_P[equal_P], column_P[equal_P]
            row_P, other_P, length_P = row_P[equal_P], other_P[equal_P], length_P[equal_P]
            back += 1
            whole_P = length_P == back
            same_QxC[query_P[whole_P], column_P[whole_P]] = True
            if whole_P.all():
                return same_QxC
            # Rows whose contexts end here are past their document's start; they are done.
            equal_P = ~whole_P & (
                self._tokens_N[np.maximum(row_P - back, 0)] == self._tokens_N[np.maximum(other_P - back, 0)]
            )

    def _context_length(self, rows_P: np.ndarray) -> np.ndarray:
        document_P = np.searchsorted(self._bounds_D1, rows_P, side="right") - 1
        return np.minimum(rows_P - self._bounds_D1[document_P] + 1, self._context)
