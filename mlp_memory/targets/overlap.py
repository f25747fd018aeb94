"""The audit: held-out text that the train stream holds too, and train documents that stand twice.

What evaluation asks of a memory should not be what it was taught by heart. `audit` goes through
the train stream twice, once for n-grams of the held-out splits and once for equal documents.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from mlp_memory.targets.ngrams import Grams, Stream

COPY_SHARE = 0.5
"""A held-out document of which one train document holds this share or more is named as a copy."""

_NAMED = 100
_WARNED = 5
_FIRST_TOKENS = 24
_BLOCK_ROWS = 1 << 20
_EXPANDED = 1 << 21
_PERCENTILES = (50, 75, 95, 99, 100)
_DIGITS = 6


class TrainStream(Stream, Protocol):
    """A stream that may have lost documents."""

    deleted_D: np.ndarray


def audit(train: TrainStream, splits: Mapping[str, Stream], n: int) -> dict[str, Any]:
    """What the splits and the train stream have in common, as plain JSON.

    A scored row, one that has a next token, is covered if an n-gram that begins in a train
    document too holds both its token and the next one. A held-out document shorter than n has no
    n-gram: it is covered, whole, if a train document is equal to it.

    Per split: `scored` and `covered` rows and their share; `documents`; percentiles over documents
    of the largest share that a single train document covers; `copies`, the documents where that is
    half or more (`copy_count`; the 100 with the largest share are named): its number, rows [first,
    one past the last] and `first_tokens` (24 ids), and number and rows of the train document.

    Of train: `copies`, documents equal to an earlier one, `copied_rows` and `copied_share` of
    their rows; `pairs` names the first 100 with the document that they are equal to.

    Documents are equal if 128 bits of BLAKE2b over their tokens are; n-grams are compared token
    by token. Memory: see `Grams`, and 75 bytes per train document.

    Args:
      train: the datastore's stream.
      splits: held-out streams by name; empty ones are fine.
      n: tokens of an n-gram, 2 or more.

    Raises:
      UserError: a chunk of the tokens is damaged.
    """
    coverage = _Coverage(Grams(list(splits.values()), n))
    coverage.look_through(train)
    digests_Dx2, parts, first = document_digests(train), {}, 0
    for name, stream in splits.items():
        parts[name] = slice(first, first + len(stream.bounds_D1) - 1)
        coverage.add_short_documents(first, document_digests(stream), digests_Dx2)
        first = parts[name].stop
    covered_H = coverage.covered_by_any()
    return {
        "ngram": n,
        "splits": {
            name: _split(coverage, covered_H, parts[name], stream, train) for name, stream in splits.items()
        },
        "train": _repeats(train, digests_Dx2, train.deleted_D),
    }


def audit_warnings(found: Mapping[str, Any]) -> list[str]:
    """What a person should know, a line each: the five worst of a kind, and how many more."""
    lines = []
    for split, part in found["splits"].items():
        lines += [
            f"audit: {split} document {copy['document']} ({_rows(copy['rows'])}) is "
            f"{_per_cent(copy['share'])} contained in train document {copy['train_document']} "
            f"({_rows(copy['train_rows'])})"
            for copy in part["copies"][:_WARNED]
        ]
        if part["copy_count"] > _WARNED:
            lines.append(f"audit: {part['copy_count'] - _WARNED:,} more {split} documents are copies")
    repeats = found["train"]
    lines += [
        f"audit: train document {pair['document']} ({_rows(pair['rows'])}) repeats train document "
        f"{pair['first_document']} ({_rows(pair['first_rows'])})"
        for pair in repeats["pairs"][:_WARNED]
    ]
    if repeats["copies"] > _WARNED:
        lines.append(f"audit: {repeats['copies'] - _WARNED:,} more train documents repeat an earlier one")
    return lines


def document_digests(stream: Stream) -> np.ndarray:
    """128 bits of BLAKE2b over each document's tokens (as uint32): uint64 [D, 2].

    Two of D different documents get the same with a chance of D²/2^129.
    """
    bounds_D1 = stream.bounds_D1
    digests_Dx2 = np.zeros((len(bounds_D1) - 1, 2), np.uint64)
    document, hasher = 0, hashlib.blake2b(digest_size=16)
    for start in range(0, len(stream), _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, len(stream))
        data = memoryview(np.asarray(stream.tokens[start:stop]).astype("<u4")).cast("B")
        first, last = np.searchsorted(bounds_D1[1:], [start, stop], side="right")
        done = 0
        for end in bounds_D1[first + 1 : last + 1].tolist():
            hasher.update(data[done : 4 * (end - start)])
            digests_Dx2[document] = np.frombuffer(hasher.digest(), "<u8")
            document, done, hasher = document + 1, 4 * (end - start), hashlib.blake2b(digest_size=16)
        hasher.update(data[done:])
    return digests_Dx2


class _Coverage:
    """What of the held-out documents a train stream covers.

    Attributes:
      found_U: bool, the n-grams that were found.
      rows_H: int64 per held-out document, the most scored rows that one train document covers.
      train_H: int64, that train document, the first of several; -1 where none covers any.
    """

    def __init__(self, grams: Grams):
        self.grams = grams
        self.bounds_H1 = grams.bounds_D1
        self.scored_H = np.diff(self.bounds_H1) - 1
        self.found_U = np.zeros(grams.count, bool)
        self.rows_H = np.zeros(len(self.scored_H), np.int64)
        self.train_H = np.full(len(self.scored_H), -1, np.int64)
        self._short_H = np.zeros(len(self.scored_H), bool)

    def look_through(self, train: Stream) -> None:
        """Counts what each train document covers."""
        open_T, open_gram_T = (np.zeros(0, np.int64) for _ in range(2))
        for row_T, gram_T in self.grams.matches(train):
            self.found_U[gram_T] = True
            document_T = np.searchsorted(train.bounds_D1, row_T, side="right") - 1
            pair_T = np.concatenate([open_T, document_T]) * self.grams.count
            pair_T = np.unique(pair_T + np.concatenate([open_gram_T, gram_T]))
            document_T, gram_T = np.divmod(pair_T, self.grams.count)
            # The last document may go on in the next block; it must be counted as one.
            ended_T = document_T < (document_T[-1] if len(document_T) else 0)
            self._count(document_T[ended_T], gram_T[ended_T])
            open_T, open_gram_T = document_T[~ended_T], gram_T[~ended_T]
        self._count(open_T, open_gram_T)

    def _count(self, document_T: np.ndarray, gram_T: np.ndarray) -> None:
        """Takes up whole train documents: pairs of document and n-gram, sorted, none twice."""
        ends_T = np.cumsum(self.grams.occurrences(gram_T))
        start = 0
        while start < len(document_T):
            before = ends_T[start - 1] if start else 0
            stop = int(np.searchsorted(ends_T, before + _EXPANDED, side="right"))
            if stop < len(document_T):  # up to the document that is too much, but at least one
                one = np.searchsorted(document_T, document_T[start], side="right")
                stop = int(max(np.searchsorted(document_T, document_T[stop]), one))
            self._count_some(document_T[start:stop], gram_T[start:stop])
            start = stop

    def _count_some(self, document_T: np.ndarray, gram_T: np.ndarray) -> None:
        which_X, row_X = self.grams.places(gram_T)
        order_X = np.lexsort((row_X, document_T[which_X]))
        train_X, row_X = document_T[which_X][order_X], row_X[order_X]
        held_X = np.searchsorted(self.bounds_H1, row_X, side="right") - 1
        first_X = np.ones(len(row_X), bool)
        first_X[1:] = (train_X[1:] != train_X[:-1]) | (held_X[1:] != held_X[:-1])
        start_G = np.flatnonzero(first_X)
        covered_G = np.add.reduceat(self._new_rows(row_X, first_X), start_G)
        held_G, train_G = held_X[start_G], train_X[start_G]
        # Of each held-out document the most, and of equal ones the first train document.
        order_G = np.lexsort((train_G, -covered_G, held_G))
        held_G, train_G, covered_G = held_G[order_G], train_G[order_G], covered_G[order_G]
        best_G = np.ones(len(held_G), bool)
        best_G[1:] = held_G[1:] != held_G[:-1]
        best_G &= covered_G > self.rows_H[held_G]
        self.rows_H[held_G[best_G]] = covered_G[best_G]
        self.train_H[held_G[best_G]] = train_G[best_G]

    def _new_rows(self, row_X: np.ndarray, first_X: np.ndarray) -> np.ndarray:
        """Scored rows that the n-gram at each row covers and the one before it does not."""
        most = self.grams.n - 1
        new_X = np.full(len(row_X), most, np.int64)
        new_X[1:] = np.where(first_X[1:], most, np.minimum(np.diff(row_X), most))
        return new_X

    def add_short_documents(self, first: int, held_Dx2: np.ndarray, train_Dx2: np.ndarray) -> None:
        """Covers held-out documents shorter than n, from number `first` on, by equal train ones."""
        short_S = np.flatnonzero(self.scored_H[first : first + len(held_Dx2)] + 1 < self.grams.n)
        twin_S = _first_equal(np.concatenate([train_Dx2, held_Dx2[short_S]]))[len(train_Dx2) :]
        same_S = twin_S < len(train_Dx2)
        held_S = first + short_S[same_S]
        self.rows_H[held_S] = self.scored_H[held_S]
        self.train_H[held_S] = twin_S[same_S]
        self._short_H[held_S] = True

    def covered_by_any(self) -> np.ndarray:
        """int64 per held-out document: its scored rows that any train documents cover."""
        row_X = np.sort(self.grams.places(np.flatnonzero(self.found_U))[1])
        held_X = np.searchsorted(self.bounds_H1, row_X, side="right") - 1
        first_X = np.ones(len(row_X), bool)
        first_X[1:] = held_X[1:] != held_X[:-1]
        covered_H = np.where(self._short_H, self.scored_H, 0)
        np.add.at(covered_H, held_X, self._new_rows(row_X, first_X))
        return covered_H


def _split(
    coverage: _Coverage, covered_H: np.ndarray, documents: slice, stream: Stream, train: Stream
) -> dict[str, Any]:
    scored_H, most_H, train_H = (
        of_all[documents] for of_all in (coverage.scored_H, coverage.rows_H, coverage.train_H)
    )
    share_H = most_H / np.maximum(scored_H, 1)
    covered, scored = int(covered_H[documents].sum()), int(scored_H.sum())
    copies_C = np.flatnonzero((train_H >= 0) & (share_H >= COPY_SHARE))
    named = copies_C[np.argsort(-share_H[copies_C], kind="stable")][:_NAMED]
    return {
        "scored": scored,
        "covered": covered,
        "covered_share": _share(covered, scored),
        "documents": len(scored_H),
        "share_in_one_document": {
            str(p): round(float(np.percentile(share_H, p)), _DIGITS) for p in _PERCENTILES if len(share_H)
        },
        "copy_count": len(copies_C),
        "copies": [
            {
                "document": d,
                "rows": _bounds(stream, d),
                "share": _share(int(most_H[d]), int(scored_H[d])) if scored_H[d] else 1.0,
                "train_document": int(train_H[d]),
                "train_rows": _bounds(train, int(train_H[d])),
                "first_tokens": _first_tokens(stream, d),
            }
            for d in named.tolist()
        ],
    }


def _repeats(train: Stream, digests_Dx2: np.ndarray, deleted_D: np.ndarray) -> dict[str, Any]:
    first_D = _first_equal(digests_Dx2)
    copies_C = np.flatnonzero((first_D < np.arange(len(first_D))) & ~deleted_D)
    rows = int(np.diff(train.bounds_D1)[copies_C].sum())
    return {
        "documents": len(first_D),
        "copies": len(copies_C),
        "copied_rows": rows,
        "copied_share": _share(rows, len(train)),
        "pairs": [
            {
                "document": d,
                "rows": _bounds(train, d),
                "first_document": int(first_D[d]),
                "first_rows": _bounds(train, int(first_D[d])),
                "first_tokens": _first_tokens(train, d),
            }
            for d in copies_C[:_NAMED].tolist()
        ],
    }


def _first_equal(digests_Dx2: np.ndarray) -> np.ndarray:
    """int64 [D]: the number of the first document with the same digest; its own if there is none."""
    order_D = np.lexsort((digests_Dx2[:, 1], digests_Dx2[:, 0]))  # stable: equal ones by number
    sorted_Dx2 = digests_Dx2[order_D]
    new_D = np.ones(len(order_D), bool)
    new_D[1:] = (sorted_Dx2[1:] != sorted_Dx2[:-1]).any(axis=1)
    first_D = np.empty(len(order_D), np.int64)
    first_D[order_D] = order_D[np.flatnonzero(new_D)][np.cumsum(new_D) - 1]
    return first_D


def _first_tokens(stream: Stream, document: int) -> list[int]:
    start, stop = _bounds(stream, document)
    return np.asarray(stream.tokens[start : min(stop, start + _FIRST_TOKENS)]).tolist()


def _bounds(stream: Stream, document: int) -> list[int]:
    return stream.bounds_D1[document : document + 2].tolist()


def _share(part: int, whole: int) -> float:
    return round(part / whole, _DIGITS) if whole else 0.0


def _rows(bounds: list[int]) -> str:
    return f"rows {bounds[0]}..{bounds[1] - 1}"


def _per_cent(share: float) -> str:
    """Rounded down, so that what is not wholly contained is not said to be."""
    return f"{int(100 * share + 1e-6)} %"
