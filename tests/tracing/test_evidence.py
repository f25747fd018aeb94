"""Evidence against brute force: distances, weights, shares and texts each computed the slow, obvious way."""

from types import SimpleNamespace

import numpy as np
import pytest

from mlp_memory.targets.knn import neighbour_weights
from mlp_memory.tracing.documents import Documents
from mlp_memory.tracing.evidence import Evidence, described
from mlp_memory.tracing.predictions import prompt_predictions, rows_predictions

DIM, K, TAU = 5, 17, 1.7


@pytest.fixture
def world(stream_of, random_text, vocabulary, rng):
    """A train stream with a random key a row, exact search over them, and a held-out stream."""
    train, held_out = (stream_of([random_text() for _ in range(12)]) for _ in range(2))
    keys_NxD = rng.normal(size=(len(train), DIM)).astype(np.float32)
    valid_N = train.has_next(0, len(train))
    searches = []

    def search(queries_QxD, k):
        searches.append(len(queries_QxD))
        sqdist_QxN = ((queries_QxD[:, None] - keys_NxD) ** 2).sum(-1)
        sqdist_QxN[:, ~valid_N] = np.inf
        rows_Qxk = sqdist_QxN.argsort(1, kind="stable")[:, :k]
        return rows_Qxk, np.take_along_axis(sqdist_QxN, rows_Qxk, 1).astype(np.float32)

    keys = SimpleNamespace(queries=lambda states: states)
    documents = Documents(train, vocabulary)
    return SimpleNamespace(
        train=train,
        held_out=held_out,
        keys_NxD=keys_NxD,
        searches=searches,
        documents=documents,
        evidence=lambda **settings: Evidence(documents, keys, search, K, TAU, **settings),
    )


def slow_neighbours(world, state_D):
    """Of a state its K nearest rows, their squared distances, weights and next tokens."""
    stream = world.train
    tokens, bounds = stream.tokens, set(stream.bounds_D1.tolist())
    near = [
        (float(((state_D - world.keys_NxD[row]) ** 2).sum()), row)
        for row in range(len(stream))
        if row + 1 not in bounds
    ]
    distances, rows = map(np.array, zip(*sorted(near)[:K]))
    weights = np.exp(-distances / TAU)
    return rows, distances, weights / weights.sum(), tokens[rows + 1]


def check(found, world, state_D, token, vocabulary, order=None):
    rows, distances, weights, labels = slow_neighbours(world, state_D)
    shown = list(range(K)) if order is None else order(labels == token)
    shown = shown[: len(found["drawn_on"])]
    assert [position["rank"] for position in found["drawn_on"]] == [at + 1 for at in shown]
    for position, at in zip(found["drawn_on"], shown):
        assert world.documents.position(int(rows[at])).items() <= position.items()
        assert position["supports"] == (labels[at] == token)
    np.testing.assert_allclose([p["weight"] for p in found["drawn_on"]], weights[shown], rtol=1e-4)
    np.testing.assert_allclose([p["distance"] for p in found["drawn_on"]], distances[shown], rtol=1e-4)
    assert found["support"] == pytest.approx(weights[labels == token].sum(), rel=1e-4)
    assert found["neighbours"] == K
    shares = {}
    for row, weight in zip(rows, weights):
        number = int(np.flatnonzero(world.train.bounds_D1 <= row)[-1])
        shares[number] = shares.get(number, 0) + weight
    ranked = sorted(shares, key=lambda number: -shares[number])
    assert [each["document"] for each in found["documents"]] == ranked[:5]
    assert found["other_documents"] == max(len(ranked) - 5, 0)
    for each in found["documents"]:
        assert each["share"] == pytest.approx(shares[each["document"]], rel=1e-4)
        assert each["title"] == world.documents.title(each["document"])
    masses = {}
    for label, weight in zip(labels, weights):
        piece = vocabulary.piece(int(label))
        masses[piece] = masses.get(piece, 0) + weight
    assert len(found["teacher"]) == min(len(masses), 5)
    np.testing.assert_allclose([p for _, p in found["teacher"]], sorted(masses.values())[::-1][:5], rtol=1e-4)
    for piece, p in found["teacher"]:
        assert p == pytest.approx(masses[piece], rel=1e-4)


def test_held_out_rows_have_the_nearest_training_positions_as_evidence(world, predictor, vocabulary, rng):
    stream = world.held_out
    rows = rng.choice(np.flatnonzero(stream.has_next(0, len(stream))), 6, replace=False)
    traced = rows_predictions(stream, rows, predictor, vocabulary, world.evidence(shown=7))
    assert world.searches == [6]  # one pass over the index for all
    for row, each in zip(rows.tolist(), traced):
        number = each["document"]
        first, label = int(stream.bounds_D1[number]), int(stream.tokens[row + 1])
        read = stream.tokens[max(first, row - 11) : row + 1].tolist()
        said = predictor.said[tuple(read)]
        assert each["row"] == row
        assert first <= row < stream.bounds_D1[number + 1]
        assert each["context"] == vocabulary.decode(read)
        assert each["next"] == vocabulary.piece(label)
        assert each["lambda"] == 0.25
        for name in ("base", "memory", "mixture"):
            log_prob_V = getattr(said, f"{name}_NxV")
            assert each["log_prob"][name] == log_prob_V[label]
            likeliest = sorted(range(vocabulary.size), key=lambda t: -log_prob_V[t])[:5]
            assert [piece for piece, _ in each[name]] == [vocabulary.piece(t) for t in likeliest]
        assert len(each["drawn_on"]) == 7
        check(each, world, said.tap_NxD, label, vocabulary)


def test_prompts_go_on_by_the_likeliest_tokens_whose_evidence_comes_first(world, predictor, vocabulary):
    prompts = ["ab cde", "a longer beginning of a text", "ab cde"]
    evidence = world.evidence(shown=K, supporting_first=True)
    traced = prompt_predictions(prompts, 3, predictor, vocabulary, evidence)
    assert len(world.searches) == 1
    assert [each["prompt"] for each in traced] == prompts
    assert traced[0] == traced[2]
    for each in traced:
        tokens = [vocabulary.bos, *vocabulary.encode(each["prompt"])]
        for prediction in each["predictions"]:
            said = predictor.said[tuple(tokens[-12:])]
            tokens.append(int(said.mixture_NxV.argmax()))
            assert prediction["next"] == vocabulary.piece(tokens[-1])
            assert prediction["log_prob"]["memory"] == said.memory_NxV[tokens[-1]]
            assert prediction["context"] == vocabulary.decode(tokens[:-1][-12:])
            check(prediction, world, said.tap_NxD, tokens[-1], vocabulary, supporting_first)
        assert len(each["predictions"]) == 3 or tokens[-1] == vocabulary.eos
        whole = vocabulary.decode(tokens)
        assert each["prompt"] + each["continuation"] == whole


def supporting_first(supports) -> list[int]:
    return [*np.flatnonzero(supports).tolist(), *np.flatnonzero(~supports).tolist()]


def test_a_continuation_ends_with_its_document(world, predictor, vocabulary):
    read = (vocabulary.bos, *vocabulary.encode("ab"))
    predictor(list(read)).mixture_NxV[vocabulary.eos] = 0.0
    (traced,) = prompt_predictions(["ab"], 4, predictor, vocabulary, world.evidence())
    assert [prediction["next"] for prediction in traced["predictions"]] == ["</s>"]
    assert traced["continuation"] == ""


def test_without_a_datastore_there_is_no_evidence_and_without_a_memory_the_decoders_word_alone(
    world, predictor, vocabulary
):
    stream, rows = world.held_out, np.array([0, 1])
    for each in rows_predictions(stream, rows, predictor, vocabulary):
        assert not {"teacher", "drawn_on", "documents", "support"} & set(each)
    for said in predictor.said.values():
        said.memory_NxV = said.weight_N = None
    for each in rows_predictions(stream, rows, predictor, vocabulary, world.evidence()):
        assert set(each["log_prob"]) == {"base"}
        assert not {"memory", "mixture", "lambda"} & set(each)
        assert each["drawn_on"]
    assert rows_predictions(stream, rows[:0], predictor, vocabulary, world.evidence()) == []
    assert world.evidence()(np.zeros((0, DIM)), np.zeros(0)) == []


def test_a_row_without_a_neighbour_rests_on_nothing(world):
    none = np.full(4, -1), np.full(4, np.inf, np.float32)
    found = described(*none, 3, world.documents, TAU, 5)
    empty = {"teacher": [], "documents": [], "drawn_on": []}
    assert found == {**empty, "neighbours": 0, "support": 0.0, "other_documents": 0}


def test_weights_are_the_softmax_of_distances_and_missing_neighbours_have_none(rng):
    rows_Qxk = rng.integers(0, 99, (9, 6))
    sqdist_Qxk = rng.uniform(0, 50, (9, 6)).astype(np.float32)
    rows_Qxk[2, 3:] = rows_Qxk[5] = -1
    sqdist_Qxk[rows_Qxk < 0] = np.inf
    weights = neighbour_weights(rows_Qxk, sqdist_Qxk, TAU)
    plain = np.exp(-sqdist_Qxk.astype(np.float64) / TAU)
    wanted = plain / np.maximum(plain.sum(1, keepdims=True), 1e-300)
    np.testing.assert_allclose(weights, wanted, rtol=1e-5)
    assert weights.sum(1).round(9).tolist() == [1, 1, 1, 1, 1, 0, 1, 1, 1]
    assert neighbour_weights(rows_Qxk[:, :0], sqdist_Qxk[:, :0], TAU).shape == (9, 0)
