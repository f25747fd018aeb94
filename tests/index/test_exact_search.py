import numpy as np
import pytest

from mlp_memory.index import exact
from mlp_memory.index.exact import exact_search
from mlp_memory.index.neighbors import recall_at_k


def naive_search(keys, valid, queries, k):
    rows = np.full((len(queries), k), -1, np.int64)
    sqdist = np.full((len(queries), k), np.inf)
    for q, query in enumerate(queries.astype(np.float64)):
        d = ((keys.astype(np.float64) - query) ** 2).sum(1)
        nearest = sorted((d[i], i) for i in np.flatnonzero(valid))[:k]
        for j, (distance, row) in enumerate(nearest):
            rows[q, j], sqdist[q, j] = row, distance
    return rows, sqdist


@pytest.mark.parametrize(("count", "k"), [(1, 3), (40, 60), (511, 17), (1500, 5)])
def test_exact_search_agrees_with_naive_search_ties_included(count, k):
    rng = np.random.default_rng()
    # Small whole numbers: distances are exact in float32 and most of them tie.
    keys = rng.integers(-2, 3, (count, 4)).astype(np.float32)
    queries = rng.integers(-2, 3, (7, 4)).astype(np.float32)
    valid = rng.random(count) < 0.8
    rows, sqdist = exact_search(keys, valid, queries, k)
    want_rows, want_sqdist = naive_search(keys, valid, queries, k)
    np.testing.assert_array_equal(rows, want_rows)
    np.testing.assert_array_equal(sqdist, want_sqdist)


def test_superblocks_and_blocks_and_query_batches_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng()
    keys = rng.normal(size=(5000, 12)).astype(np.float32)
    keys[rng.integers(0, 5000, 800)] = keys[rng.integers(0, 5000, 800)]
    queries = np.concatenate([keys[:30], rng.normal(size=(270, 12)).astype(np.float32)])
    valid = rng.random(5000) < 0.9
    whole = exact_search(keys, valid, queries, 40)
    monkeypatch.setattr(exact, "_SUPERBLOCK_ROWS", 1300)
    monkeypatch.setattr(exact, "_BLOCK_ROWS", 512)
    parts = exact_search(keys, valid, queries, 40)
    np.testing.assert_array_equal(whole[0], parts[0])
    np.testing.assert_allclose(whole[1], parts[1], rtol=1e-5)
    want_rows, want_sqdist = naive_search(keys, valid, queries, 40)
    np.testing.assert_allclose(whole[1], want_sqdist, rtol=1e-5)
    assert (whole[0] == want_rows).mean() > 0.999


def test_distance_to_a_duplicate_far_from_the_origin_is_zero_exactly():
    rng = np.random.default_rng()
    keys = (1000 + rng.normal(size=(300, 24))).astype(np.float32)
    keys[200:] = keys[:100]
    rows, sqdist = exact_search(keys, np.ones(300, bool), keys[:100], 2)
    np.testing.assert_array_equal(sqdist, 0)
    np.testing.assert_array_equal(rows, np.stack([np.arange(100), np.arange(200, 300)], 1))


def test_rows_that_are_not_valid_are_never_found():
    rng = np.random.default_rng()
    keys = rng.normal(size=(700, 8)).astype(np.float16)
    valid = np.zeros(700, bool)
    assert (exact_search(keys, valid, keys[:3].astype(np.float32), 4)[0] == -1).all()
    valid[[3, 600]] = True
    rows, sqdist = exact_search(keys, valid, keys[:50].astype(np.float32), 4)
    assert {*rows[:, :2].ravel()} == {3, 600}
    assert (rows[:, 2:] == -1).all()
    assert np.isinf(sqdist[:, 2:]).all()


def test_the_approximate_selection_reaches_its_goal(monkeypatch):
    rng = np.random.default_rng()
    keys = rng.normal(size=(9000, 12)).astype(np.float32)
    keys[rng.integers(0, 9000, 800)] = keys[rng.integers(0, 9000, 800)]
    valid, queries = rng.random(9000) < 0.9, rng.normal(size=(40, 12)).astype(np.float32)
    true_rows, _ = exact_search(keys, valid, queries, 50)
    assert exact.recall_goal(None, 0.9) == 1.0  # no TPU here: the exact selection is taken
    np.testing.assert_array_equal(exact_search(keys, valid, queries, 50, None, 0.9)[0], true_rows)
    monkeypatch.setattr(exact, "recall_goal", lambda mesh, approximate_recall: approximate_recall)
    monkeypatch.setattr(exact, "_SUPERBLOCK_ROWS", 4000)
    rows, sqdist = exact_search(keys, valid, queries, 50, None, 0.9)
    assert recall_at_k(rows, true_rows) >= 0.9
    assert valid[rows].all()
    want = ((keys[rows].astype(np.float64) - queries[:, None]) ** 2).sum(-1)
    np.testing.assert_allclose(sqdist, want, rtol=1e-5)
    assert (np.diff(sqdist, axis=1) >= 0).all()


@pytest.mark.parametrize("recall", [0.0, 1.0, -0.5])
def test_a_recall_that_is_no_share_is_refused(recall):
    keys = np.zeros((3, 2), np.float32)
    with pytest.raises(ValueError, match="approximate_recall"):
        exact_search(keys, np.ones(3, bool), keys, 1, None, recall)
