import math
from collections import Counter

import numpy as np
import pytest

from mlp_memory.artifacts import UserError
from mlp_memory.index.neighbors import exclude_self
from mlp_memory.targets.config import RetrieveConfig
from mlp_memory.targets.exclusion import Exclusion, candidates

N = 900


class Stream:
    """Few tokens, and documents that repeat each other's text, so that contexts recur."""

    def __init__(self, rng, dtype=np.uint16, rows=N):
        self.bounds_D1 = np.unique(np.concatenate([[0, 7, 8, rows], rng.integers(1, rows, rows // 30)]))
        self.tokens = rng.integers(0, 3, rows).astype(dtype)
        for start in self.bounds_D1[:-1]:
            self.tokens[start] = 0  # every document begins alike, as with bos
        for _ in range(10):
            a, b = rng.integers(0, rows - 60, 2)
            self.tokens[a : a + 60] = self.tokens[b : b + 60]

    def __len__(self):
        return len(self.tokens)


def random_lists(rng, queries, count):
    rows = np.stack([rng.permutation(N)[:count] for _ in range(queries)]).astype(np.int64)
    sqdist = np.sort(rng.integers(0, 30, rows.shape), axis=1).astype(np.float32)
    length = rng.integers(0, count + 1, queries)
    length[: queries // 2] = count
    absent = np.arange(count) >= length[:, None]
    rows[absent], sqdist[absent] = -1, np.inf
    return rows, sqdist


def context(stream, row, n):
    start = max(s for s in stream.bounds_D1 if s <= row)
    return tuple(stream.tokens[max(start, row - n + 1) : row + 1])


def document(stream, row):
    return sum(int(bound) <= row for bound in stream.bounds_D1)


def excluded(stream, config, row, query):
    return (
        abs(row - query) <= config.exclude_window
        or (config.exclude_document and document(stream, row) == document(stream, query))
        or (
            config.exclude_context > 0
            and context(stream, row, config.exclude_context) == context(stream, query, config.exclude_context)
        )
    )


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"exclude_window": 5},
        {"exclude_document": True},
        {"exclude_context": 1},
        {"exclude_context": 4},
        {"exclude_context": 40},
        {"exclude_window": 30, "exclude_document": True, "exclude_context": 3},
    ],
)
def test_what_remains_is_what_a_loop_over_the_candidates_keeps(settings, dtype):
    rng = np.random.default_rng()
    stream = Stream(rng, dtype)
    config = RetrieveConfig(k=20, **settings)
    rows, sqdist = random_lists(rng, 60, 300)
    queries = rng.integers(0, N, 60)
    queries[:20] = rows[np.arange(20), rng.integers(0, 300, 20)]  # found, at any rank
    queries[20], queries[21] = 0, N - 1
    got_rows, got_sqdist = Exclusion(config, stream).exclude(rows, sqdist, queries)
    dropped = 0
    for q in range(60):
        kept = [
            (d, r)
            for d, r in zip(sqdist[q], rows[q])
            if r >= 0 and not excluded(stream, config, r, queries[q])
        ]
        dropped += (rows[q] >= 0).sum() - len(kept)
        kept = kept[:20] + [(np.inf, -1)] * (20 - len(kept[:20]))
        assert list(zip(got_sqdist[q], got_rows[q])) == kept
    assert dropped > 0
    assert got_rows.dtype == np.int64
    assert got_sqdist.dtype == np.float32


def test_without_settings_it_is_the_exclusion_of_the_row_itself():
    rng = np.random.default_rng()
    rows, sqdist = random_lists(rng, 80, 33)
    queries = np.where(
        rng.random(80) < 0.5, rows[np.arange(80), rng.integers(0, 33, 80)], rng.integers(0, N, 80)
    )
    got = Exclusion(RetrieveConfig(k=32), range(N)).exclude(rows, sqdist, queries)
    want = exclude_self(rows, sqdist, queries, 32)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])


def test_short_contexts_differ_from_longer_ones_that_end_alike():
    class Two:
        bounds_D1 = np.array([0, 2, 6, 8])
        tokens = np.array([1, 2, 5, 5, 1, 2, 1, 2], np.uint16)

        def __len__(self):
            return 8

    config = RetrieveConfig(k=7, exclude_context=3)
    rows = np.arange(8)[None]
    got, _ = Exclusion(config, Two()).exclude(rows, np.zeros((1, 8), np.float32), np.array([1]))
    assert got[0].tolist() == [0, 2, 3, 4, 5, 6, -1]


def test_enough_candidates_are_asked_for():
    rng = np.random.default_rng()
    stream = Stream(rng)
    plain = RetrieveConfig(k=50)
    assert candidates(plain, range(N)) == 51
    assert candidates(RetrieveConfig(k=50, exclude_window=7), range(N)) == 51 + 14
    # Rows in documents longer than what is asked for on their account: one in a hundred at most.
    lengths = np.diff(stream.bounds_D1)
    asked = candidates(RetrieveConfig(k=N, exclude_document=True), stream) - N - 1
    assert lengths[lengths > asked].sum() <= 0.01 * N
    assert asked in lengths
    assert candidates(RetrieveConfig(k=5, exclude_document=True), stream) == 5 + 1 + min(asked, 20)


@pytest.mark.parametrize("n", [1, 2, 3, 12, 1000])
def test_so_many_candidates_are_asked_for_as_rows_have_one_context(n):
    stream = Stream(np.random.default_rng())
    counts = Counter(context(stream, row, n) for row in range(N))
    several = sorted(counts[c] for row in range(N) if len(c := context(stream, row, n)) == n)
    # N is below the sample's size: it is all rows. None has a thousand tokens before it.
    want = several[math.ceil(0.99 * (len(several) - 1))] if several else 0
    assert candidates(RetrieveConfig(k=N, exclude_context=n), stream) == N + 1 + want
    assert candidates(RetrieveConfig(k=3, exclude_context=n), stream) == 4 + min(want, 12)


def test_k_remain_of_the_candidates_asked_for_and_a_row_that_comes_short_says_so():
    rng = np.random.default_rng()
    stream = Stream(rng)
    config = RetrieveConfig(k=20, exclude_window=4)
    count = candidates(config, stream)
    rows = np.stack([rng.permutation(N)[:count] for _ in range(200)])
    queries = rows[:, 0]
    got, _ = Exclusion(config, stream).exclude(rows, np.zeros(rows.shape, np.float32), queries)
    assert (got >= 0).all()
    everything = np.tile(np.arange(N), (len(stream.bounds_D1) - 1, 1))
    config = RetrieveConfig(k=N, exclude_document=True)
    firsts = stream.bounds_D1[:-1]
    got, sqdist = Exclusion(config, stream).exclude(
        everything, np.zeros(everything.shape, np.float32), firsts
    )
    np.testing.assert_array_equal((got >= 0).sum(axis=1), N - np.diff(stream.bounds_D1))
    np.testing.assert_array_equal(np.isinf(sqdist), got < 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"exclude_window": -1},
        {"exclude_context": -3},
        {"certificate_rows": 0},
        {"goal_recall": 1.01},
        {"goal_tv": -0.1},
        {"audit_ngram": 1},
        {"audit_ngram": -1},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong):
    name = next(iter(wrong))
    with pytest.raises(UserError, match=rf"retrieve\.{name} = "):
        RetrieveConfig(**wrong)
