"""Which contexts are shown, and which training positions the teacher drew on there."""

from types import SimpleNamespace

import numpy as np
import pytest

from mlp_memory.evaluation.samples import differing_rows, sample_predictions, spread_rows

DIM, K, TAU = 5, 7, 1.7


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


@pytest.fixture
def systems(make_stream, rng):
    """A train stream with random keys, exact search over them, and what reads queries of a held-out one."""
    train, held_out = make_stream(200), make_stream(90)
    keys_NxD, taps_NxD = rng.normal(size=(200, DIM)), rng.normal(size=(90, DIM))
    valid_N = train.has_next(0, 200)

    def exact(queries_QxD, k):
        sqdist_QxN = ((queries_QxD[:, None] - keys_NxD) ** 2).sum(-1)
        sqdist_QxN[:, ~valid_N] = np.inf
        rows_Qxk = sqdist_QxN.argsort(1, kind="stable")[:, :k]
        return rows_Qxk, np.take_along_axis(sqdist_QxN, rows_Qxk, 1).astype(np.float32)

    searches = []
    neighbors = SimpleNamespace(
        keys=SimpleNamespace(queries=lambda taps: taps),
        exact=lambda queries, k: searches.append(len(queries)) or exact(queries, k),
        labels_N=train.labels(0, 200),
        k=K,
    )

    def taps_and_log_probs(stream, ranges):
        rows = np.concatenate([np.arange(start, stop) for start, stop in ranges])
        return taps_NxD[rows], np.zeros(len(rows))

    return SimpleNamespace(
        neighbors=neighbors,
        base=SimpleNamespace(taps_and_log_probs=taps_and_log_probs),
        train=train,
        held_out=held_out,
        sqdist=lambda row, other: ((taps_NxD[row] - keys_NxD[other]) ** 2).sum(),
        searches=searches,
    )


class Vocabulary:
    """Tokens as their numbers."""

    def decode(self, ids):
        return " ".join(map(str, ids))

    def piece(self, token):
        return f"<{token}>"


class Predictor:
    """Random distributions, remembered by the text."""

    context = 12

    def __init__(self, rng):
        self.rng, self.said = rng, {}

    def __call__(self, tokens):
        assert 1 <= len(tokens) <= self.context
        if tuple(tokens) not in self.said:
            log_prob = [np.log(self.rng.dirichlet(np.ones(37))) for _ in range(3)]
            names = ("base_NxV", "memory_NxV", "mixture_NxV")
            self.said[tuple(tokens)] = SimpleNamespace(**dict(zip(names, log_prob)))
        return self.said[tuple(tokens)]


def test_training_positions_are_the_nearest_with_their_share_of_the_teachers_weight(systems, rng) -> None:
    train, stream = systems.train, systems.held_out
    rows = spread_rows(stream, 6)
    found = sample_predictions(stream, rows, Predictor(rng), systems, TAU, Vocabulary(), train)
    assert systems.searches == [6]  # one pass over the datastore for all
    tokens = train.tokens[0:200].astype(int)
    valid = np.flatnonzero(train.has_next(0, 200))
    for row, sample in zip(rows, found):
        sqdist = np.array([systems.sqdist(row, other) for other in valid])
        nearest = valid[sqdist.argsort()[:K]]
        weights = np.exp(-np.sort(sqdist)[:K] / TAU)
        weights /= weights.sum()
        assert [position["row"] for position in sample["drawn_on"]] == nearest[:5].tolist()
        np.testing.assert_allclose([p["weight"] for p in sample["drawn_on"]], weights[:5], rtol=1e-4)
        for position, at in zip(sample["drawn_on"], nearest):
            document = int(train.document_ids(at, at + 1)[0])
            first, end = train.bounds_D1[document : document + 2]
            assert position["document"] == document
            assert position["next"] == f"<{tokens[at + 1]}>"
            assert position["before"] == Vocabulary().decode(tokens[max(first, at - 23) : at + 1])
            assert position["after"] == Vocabulary().decode(tokens[at + 2 : min(at + 10, end)])
        by_token = dict(sample["teacher"])
        for token in by_token:
            mass = sum(w for w, at in zip(weights, nearest) if f"<{tokens[at + 1]}>" == token)
            assert by_token[token] == pytest.approx(mass, rel=1e-4)


def test_a_sample_says_how_likely_the_next_token_was(systems, rng) -> None:
    stream, predictor = systems.held_out, Predictor(rng)
    rows = spread_rows(stream, 4)
    for row, sample in zip(rows, sample_predictions(stream, rows, predictor, systems, TAU, Vocabulary())):
        first, label = int(stream.bounds_D1[sample["document"]]), int(stream.labels(row, row + 1)[0])
        said = predictor.said[tuple(stream.tokens[max(first, row - 11) : row + 1].tolist())]
        assert sample["next"] == f"<{label}>"
        for name in ("base", "memory", "mixture"):
            assert sample["log_prob"][name] == getattr(said, f"{name}_NxV")[label]
        assert "drawn_on" not in sample  # no train stream was given


def test_without_a_datastore_there_is_no_teacher(systems, rng) -> None:
    stream = systems.held_out
    imported = SimpleNamespace(neighbors=None)
    rows = spread_rows(stream, 2)
    for sample in sample_predictions(stream, rows, Predictor(rng), imported, None, Vocabulary()):
        assert not {"teacher", "drawn_on"} & set(sample)
    assert sample_predictions(stream, rows[:0], Predictor(rng), imported, None, Vocabulary()) == []
