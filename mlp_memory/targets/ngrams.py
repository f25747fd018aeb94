"""Token n-grams of some text, and where a stream has the very same ones.

An n-gram lies within one document. Both sides are hashed to 64 bits, block by block and
vectorised; what the hash finds is compared token by token, so that no answer rests on it.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

_BLOCK_ROWS = 1 << 20
# Table entries per n-gram, and the most of them: 16 let one in 16 foreign n-grams past.
_TABLE_FACTOR = 16
_TABLE_BITS = (16, 26)


class Rows(Protocol):
    """Tokens by row: `corpus.stream.TokenReader` or a NumPy array."""

    def __getitem__(self, rows: slice) -> np.ndarray: ...


class Stream(Protocol):
    """What is asked of a token stream (corpus/stream.py)."""

    bounds_D1: np.ndarray
    tokens: Rows

    def __len__(self) -> int: ...


def gram_hashes(tokens_T: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """Hash of every n tokens in a row: uint64 [max(T − n + 1, 0)].

    Σ_j mix(token_j) · B^(n−1−j) mod 2^64 with an odd B, mixed once more (Rabin and Karp's
    rolling hash over mixed tokens). Memory: 24 bytes per token.
    """
    count = max(len(tokens_T) - n + 1, 0)
    mixed_T = _mix(tokens_T.astype(np.uint64) + np.uint64(1 + (seed << 32)))
    base = np.uint64(0x9E3779B97F4A7C15)
    hash_T = np.zeros(count, np.uint64)
    for j in range(n if count else 0):
        hash_T *= base
        hash_T += mixed_T[j : j + count]
    return _mix(hash_T)


def _mix(value_T: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, in place: every input bit reaches every output bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value_T ^= value_T >> np.uint64(shift)
        value_T *= np.uint64(factor)
    value_T ^= value_T >> np.uint64(31)
    return value_T


def _in_one_document(bounds_D1: np.ndarray, row_T: np.ndarray, n: int) -> np.ndarray:
    """bool [T]: whether the n tokens from each row on lie in one document."""
    document_T = np.searchsorted(bounds_D1, row_T, side="right") - 1
    return bounds_D1[document_T + 1] - row_T >= n


class Grams:
    """The n-grams of some streams, joined end to end, to be found again in others.

    Attributes:
      tokens_E: uint32, the streams' tokens.
      bounds_D1: int64, where documents begin, streams joined.
      count: U, distinct n-grams.

    Memory: 95 bytes per token while it is made, 35 after, and a table of at most 64 MiB.
    """

    def __init__(self, streams: Sequence[Stream], n: int):
        """Reads the streams.

        Raises:
          UserError: a chunk of the tokens is damaged.
        """
        self.n = n
        parts = [np.asarray(s.tokens[0 : len(s)]).astype(np.uint32) for s in streams]
        self.tokens_E = np.concatenate([np.zeros(0, np.uint32), *parts])
        offsets = np.cumsum([0, *map(len, parts)])
        bounds = [s.bounds_D1[1:] + offset for s, offset in zip(streams, offsets)]
        self.bounds_D1 = np.concatenate([np.zeros(1, np.int64), *bounds])
        start_P = np.flatnonzero(_in_one_document(self.bounds_D1, np.arange(len(self.tokens_E)), n))
        for self._seed in itertools.count():
            hash_P = gram_hashes(self.tokens_E, n, self._seed)[start_P]
            self._hash_U, first_U, gram_P = np.unique(hash_P, return_index=True, return_inverse=True)
            self._start_U = start_P[first_U]
            # Two n-grams of one hash would be taken for one: then another seed serves.
            if self._equal(self.tokens_E, start_P, gram_P).all():
                break
        self.count = len(self._hash_U)
        self._start_P = start_P[np.argsort(gram_P, kind="stable")]
        self._first_U1 = np.concatenate([[0], np.cumsum(np.bincount(gram_P, minlength=self.count))])
        bits = min(max(_TABLE_BITS[0], (_TABLE_FACTOR * self.count).bit_length()), _TABLE_BITS[1])
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, bool)
        self._table[self._hash_U >> self._shift] = True

    def matches(self, stream: Stream) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Where a stream has one of these n-grams, a block of rows at a time.

        Yields:
          row_H int64, ascending, and gram_H int64 in [0, U). Every row at which one of the
          n-grams begins is there once. Memory: 40 bytes per row of a block of 2^20.
        """
        rows = len(stream)
        for start in range(0, rows, _BLOCK_ROWS) if self.count else ():
            tokens_T = np.asarray(stream.tokens[start : min(start + _BLOCK_ROWS + self.n - 1, rows)])
            hash_T = gram_hashes(tokens_T, self.n, self._seed)
            row_H = np.flatnonzero(self._table[hash_T >> self._shift])
            place_H = np.minimum(np.searchsorted(self._hash_U, hash_T[row_H]), self.count - 1)
            known_H = self._hash_U[place_H] == hash_T[row_H]
            row_H, place_H = row_H[known_H], place_H[known_H]
            whole_H = _in_one_document(stream.bounds_D1, row_H + start, self.n)
            row_H, place_H = row_H[whole_H], place_H[whole_H]
            equal_H = self._equal(tokens_T, row_H, place_H)
            yield row_H[equal_H] + start, place_H[equal_H]

    def places(self, gram_H: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Every row of `tokens_E` at which these n-grams begin.

        Returns:
          which_X, the index into `gram_H`, ascending, and row_X int64, ascending within each.
        """
        count_H = self.occurrences(gram_H)
        which_X = np.repeat(np.arange(len(gram_H)), count_H)
        within_X = np.arange(len(which_X)) - np.repeat(np.cumsum(count_H) - count_H, count_H)
        return which_X, self._start_P[self._first_U1[gram_H][which_X] + within_X]

    def occurrences(self, gram_H: np.ndarray) -> np.ndarray:
        """How many rows `places` has for each of them."""
        return self._first_U1[gram_H + 1] - self._first_U1[gram_H]

    def _equal(self, tokens_T: np.ndarray, row_H: np.ndarray, gram_H: np.ndarray) -> np.ndarray:
        """bool [H]: whether the n tokens from each row on are those of its n-gram."""
        equal_H = np.ones(len(row_H), bool)
        known_H = self._start_U[gram_H]
        for j in range(self.n):
            equal_H &= tokens_T[row_H + j] == self.tokens_E[known_H + j]
        return equal_H
