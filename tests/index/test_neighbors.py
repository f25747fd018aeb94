import numpy as np
import pytest

from mlp_memory.index.neighbors import exclude_self, nearest_first, recall_at_k


@pytest.mark.parametrize("offset", [0, 2**33])
def test_candidates_are_ordered_by_distance_then_row_and_padded(offset):
    rng = np.random.default_rng()
    rows = np.stack([rng.permutation(40)[:12] for _ in range(30)]).astype(np.int64) + offset
    sqdist = rng.integers(0, 4, rows.shape).astype(np.float32)
    absent = rng.random(rows.shape) < 0.3
    rows[absent], sqdist[absent] = -1, np.inf
    for k in (1, 7, 20):
        got_rows, got_sqdist = nearest_first(rows, sqdist, k)
        for q in range(len(rows)):
            pairs = sorted((d, r) for d, r in zip(sqdist[q], rows[q]) if r >= 0)[:k]
            pairs += [(np.inf, -1)] * (k - len(pairs))
            assert list(zip(got_sqdist[q], got_rows[q])) == pairs


def test_self_is_excluded_by_identity_whatever_its_rank():
    rng = np.random.default_rng()
    k, queries = 9, 200
    rows = np.stack([rng.permutation(60)[: k + 1] for _ in range(queries)]).astype(np.int64)
    # Many rows tie at distance 0 with the query's own, as repeated documents do.
    sqdist = np.sort(rng.integers(0, 3, rows.shape), axis=1).astype(np.float32)
    rows[5, 6:], sqdist[5, 6:] = -1, np.inf
    itself = rng.integers(0, 60, queries)
    got_rows, got_sqdist = exclude_self(rows, sqdist, itself, k)
    assert any(itself[q] in rows[q] for q in range(queries))
    assert any(itself[q] not in rows[q] for q in range(queries))
    for q in range(queries):
        kept = [(d, r) for d, r in zip(sqdist[q], rows[q]) if r != itself[q]][:k]
        assert list(zip(got_sqdist[q], got_rows[q])) == kept
    with pytest.raises(ValueError, match="search for 10"):
        exclude_self(rows[:, :k], sqdist[:, :k], itself, k)


def test_recall_counts_true_neighbours_found():
    true = np.array([[1, 2, 3, 4], [5, 6, -1, -1], [-1, -1, -1, -1]])
    found = np.array([[4, 9, 1, 8], [6, 5, 7, -1], [1, 2, 3, 4]])
    assert recall_at_k(found, true) == pytest.approx((0.5 + 1.0) / 2)
