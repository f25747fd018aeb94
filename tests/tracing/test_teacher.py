"""A training row's neighbours are found again as the targets were made."""

import dataclasses

import numpy as np
import pytest

from mlp_memory.artifacts import Directory
from mlp_memory.index.neighbors import nearest_first
from mlp_memory.targets.config import RetrieveConfig
from mlp_memory.targets.retrieve import retrieve
from mlp_memory.targets.units import Inputs
from mlp_memory.tracing.documents import Documents
from mlp_memory.tracing.teacher import Teacher

CONFIG = RetrieveConfig(
    k=9, top_m=4, temperature=1.3, chunk_rows=100, certificate_rows=20, goal_recall=0, audit_ngram=0
)
EXCLUSIONS = {
    "itself": {},
    "a window": {"exclude_window": 3},
    "its document": {"exclude_document": True},
    "its context": {"exclude_context": 2},
}


class BruteForce:
    """An index of one shard that looks at every row."""

    shards, facts = 1, {"recall": 1.0}

    def __init__(self, keys_NxD, valid_N):
        self.keys_NxD, self.valid_N, self.ranges = keys_NxD, valid_N, [(0, len(valid_N))]

    def shard(self, s):
        return self

    def search(self, queries_QxD, k):
        sqdist_QxN = ((queries_QxD[:, None] - self.keys_NxD) ** 2).sum(-1).astype(np.float32)
        sqdist_QxN[:, ~self.valid_N] = np.inf
        rows_QxN = np.broadcast_to(np.arange(len(self.valid_N)), sqdist_QxN.shape).astype(np.int64)
        return nearest_first(rows_QxN, sqdist_QxN, k)


@pytest.fixture
def taught(stream_of, random_text, vocabulary, rng, tmp_path):
    """exclusions -> a stream, its keys, the targets made from them, and what traces these."""

    def make(exclusions):
        config = dataclasses.replace(CONFIG, **exclusions)
        stream = stream_of([random_text() for _ in range(9)])
        stream.manifest.facts["words"] = 1
        keys_NxD = rng.normal(size=(len(stream), 3)).astype(np.float32)
        index = BruteForce(keys_NxD, stream.has_next(0, len(stream)))
        inputs = Inputs(stream, keys_NxD, index)
        retrieve(Directory(tmp_path / "targets"), lambda: inputs, {}, config)
        documents = Documents(stream, vocabulary)
        return stream, keys_NxD, Teacher(Directory(tmp_path / "targets"), documents, keys_NxD, index, shown=9)

    return make


def slow_neighbours(stream, keys_NxD, row, exclusions):
    """The rows that may teach a row, nearest first, with their weights."""
    document_N = np.searchsorted(stream.bounds_D1, np.arange(len(stream)), side="right") - 1

    def context(of):
        first = stream.bounds_D1[document_N[of]]
        return stream.tokens[max(first, of + 1 - exclusions["exclude_context"]) : of + 1].tolist()

    def may_teach(other):
        if other == row or other + 1 in stream.bounds_D1:
            return False
        if abs(other - row) <= exclusions.get("exclude_window", 0):
            return False
        if exclusions.get("exclude_document") and document_N[other] == document_N[row]:
            return False
        return not (exclusions.get("exclude_context") and context(other) == context(row))

    sqdist_N = ((keys_NxD[row] - keys_NxD) ** 2).sum(1)
    near = sorted((other for other in range(len(stream)) if may_teach(other)), key=lambda o: sqdist_N[o])[:9]
    weights = np.exp(-sqdist_N[near].astype(np.float64) / CONFIG.temperature)
    return near, weights / weights.sum()


@pytest.mark.parametrize("exclusions", EXCLUSIONS.values(), ids=EXCLUSIONS)
def test_the_neighbours_found_again_are_the_allowed_ones_and_give_the_stored_teacher(
    taught, rng, vocabulary, exclusions
):
    stream, keys_NxD, teacher = taught(exclusions)
    rows = rng.choice(np.flatnonzero(stream.has_next(0, len(stream))), 25, replace=False)
    for row, found in zip(rows.tolist(), teacher(rows)):
        near, weights = slow_neighbours(stream, keys_NxD, row, exclusions)
        assert [position["row"] for position in found["drawn_on"]] == near
        np.testing.assert_allclose([p["weight"] for p in found["drawn_on"]], weights, rtol=1e-4)
        label = int(stream.tokens[row + 1])
        assert found["support"] == pytest.approx(weights[stream.tokens[np.array(near) + 1] == label].sum())
        masses = np.bincount(stream.tokens[np.array(near) + 1], weights)
        kept = np.argsort(-masses, kind="stable")[: CONFIG.top_m]
        kept = kept[masses[kept] > 0]
        stored = teacher.stored(row)
        np.testing.assert_allclose(
            [stored[t] for t in kept.tolist()], masses[kept] / masses[kept].sum(), rtol=2**-10, atol=1e-7
        )
        assert found["teacher"] == [[vocabulary.piece(t), p] for t, p in stored.items()]
        assert found["difference"] < 2**-11


def test_an_index_that_is_another_one_is_told_by_the_difference(taught, rng):
    stream, keys_NxD, teacher = taught({})
    rows = np.flatnonzero(stream.has_next(0, len(stream)))[:30]
    teacher._index.keys_NxD = rng.normal(size=keys_NxD.shape).astype(np.float32)
    assert max(found["difference"] for found in teacher(rows)) > 0.05
    assert teacher(rows[:0]) == []
