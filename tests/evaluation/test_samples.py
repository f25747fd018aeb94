"""Which contexts are shown."""

import numpy as np
import pytest

from mlp_memory.evaluation.samples import differing_rows, spread_rows


@pytest.mark.parametrize("documents", [1, 2, 3, 40])
def test_differing_rows_are_the_extremes_each_of_its_own_document(rng, documents: int) -> None:
    gain_N = rng.normal(size=400)
    rows_N = np.sort(rng.choice(5000, 400, replace=False))
    documents_N = np.sort(rng.integers(0, documents, 400))
    found = differing_rows(gain_N, rows_N, documents_N, 4)
    at = {kind: np.searchsorted(rows_N, rows) for kind, rows in found.items()}
    assert rows_N[at["better"][0]] == rows_N[gain_N.argmax()]
    assert (gain_N[at["better"]] > 0).all()
    assert (gain_N[at["worse"]] < 0).all()
    used = documents_N[np.concatenate([*at.values()])]
    assert len(used) == len(set(used)) <= documents
    for kind, sign in (("better", 1), ("worse", -1)):
        chosen = sign * gain_N[at[kind]]
        assert (np.diff(chosen) <= 0).all()
        # What was passed over was of a document in use.
        larger = sign * gain_N > (chosen[-1] if len(chosen) == 4 else 0)
        assert set(documents_N[larger]) <= set(used)
    if documents == 40:
        assert [len(rows) for rows in found.values()] == [4, 4]
    order = rng.permutation(400)
    again = differing_rows(gain_N[order], rows_N[order], documents_N[order], 4)
    assert all((again[kind] == found[kind]).all() for kind in found)


def test_a_memory_that_changes_nothing_or_only_helps_has_no_worse_rows(rng) -> None:
    rows_N = np.arange(30)
    for gain_N, counts in ((np.zeros(30), [0, 0]), (rng.random(30) + 0.1, [3, 0])):
        assert [len(rows) for rows in differing_rows(gain_N, rows_N, rows_N, 3).values()] == counts


def test_equal_differences_go_by_row() -> None:
    found = differing_rows(np.array([0.5, 0.5, -1.0, -1.0]), np.array([9, 4, 7, 2]), np.arange(4), 2)
    assert found["better"].tolist() == [4, 9]
    assert found["worse"].tolist() == [2, 7]


def test_spread_rows_have_a_next_token_and_rise(make_stream) -> None:
    stream = make_stream(300)
    rows = spread_rows(stream, 9)
    assert stream.has_next(0, 300)[rows].all()
    assert (np.diff(rows) > 0).all()
    assert len(spread_rows(stream, 0)) == 0
