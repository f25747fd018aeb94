"""Blocks chosen of two streams, against rows taken one by one."""

import numpy as np
import pytest

from mlp_memory.artifacts import Manifest
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.targets.asked import ChosenBlocks, EveryRow, Source
from mlp_memory.updating.choice import choose
from mlp_memory.updating.config import UpdateConfig
from mlp_memory.updating.train import ChosenSource, _draw

BLOCK = 4


def stream_of(tokens, bounds, deleted=()):
    facts = {"vocab_size": 50, "words": 1, "bytes": 1}
    manifest = Manifest("corpus", {}, {}, facts=facts)
    return TokenStream(manifest, np.asarray(tokens), np.asarray(bounds), np.array(deleted, np.int64))


class World:
    """A stream of 103 rows, and one of 130 that has lost documents 2 and 5."""

    def __init__(self, rng):
        cuts = np.sort(rng.choice(np.arange(1, 103), 9, replace=False))
        bounds = np.array([0, *cuts, 103])
        self.tokens = rng.integers(1, 50, 130)
        self.before = stream_of(self.tokens[:103], bounds)
        gone = np.isin(np.searchsorted(bounds, np.arange(103), side="right") - 1, [2, 5])
        self.gone = np.append(gone, np.zeros(27, bool))
        self.now = stream_of(np.where(self.gone, 0, self.tokens), [*bounds, 117, 130], [2, 5])
        self.old_keys = rng.normal(size=(103, 6)).astype("f4")
        new = rng.normal(size=(27, 6)).astype("f4")
        self.keys = np.concatenate([np.where(gone[:, None], 0, self.old_keys), new]).astype("f4")

    @property
    def sources(self):
        return Source(self.before, self.old_keys), Source(self.now, self.keys)


@pytest.fixture
def rng():
    return np.random.default_rng()


def test_rows_one_by_one(rng):
    world = World(rng)
    starts = np.array([0, 8, 40, 96, 100, 103, 107, 127])
    asked = ChosenBlocks(starts, BLOCK, *world.sources)
    assert len(asked) == 32
    rows = [start + i for start in starts for i in range(BLOCK)]
    np.testing.assert_array_equal(asked.rows(0, 32), rows)
    for first, last in [(0, 32), (3, 18), (5, 6), (29, 32)]:
        asks, labels, deleted = (f(first, last) for f in (asked.asks, asked.labels, asked.is_deleted))
        queries = asked.queries(first, last)
        for place in range(first, last):
            row, i = rows[place], place - first
            start = starts[place // BLOCK]
            old = start + BLOCK <= 103
            stream, keys = (world.before, world.old_keys) if old else (world.now, world.keys)
            inside = row < len(stream)
            assert asks[i] == (inside and stream.has_next(row, row + 1)[0])
            assert labels[i] == (stream.labels(row, row + 1)[0] if inside else 0)
            np.testing.assert_array_equal(queries[i], keys[row] if inside else 0)
            assert deleted[i] == (asks[i] and world.gone[row])


def test_every_row_is_its_own(rng):
    world = World(rng)
    every = EveryRow(world.now, world.keys)
    assert len(every) == 130
    np.testing.assert_array_equal(every.rows(5, 9), [5, 6, 7, 8])
    np.testing.assert_array_equal(every.asks(0, 130), world.now.has_next(0, 130))
    np.testing.assert_array_equal(every.queries(3, 50), world.keys[3:50])


class Nearest:
    """Brute force over the rows that are left."""

    def __init__(self, world):
        self.keys, self.valid = world.keys, world.now.has_next(0, 130)

    def search(self, queries, k):
        sqdist = ((queries[:, None] - self.keys[None]) ** 2).sum(-1)
        sqdist[:, ~self.valid] = np.inf
        return np.argsort(sqdist, axis=1, kind="stable")[:, :k], np.sort(sqdist, axis=1)[:, :k]


def test_the_choice_covers_what_changed_and_repeats(rng):
    world, config = World(rng), UpdateConfig(affected=0.5, replay=0.25, probe_neighbours=3)
    first, again = (choose(*world.sources, Nearest(world), BLOCK, config, 0) for _ in range(2))
    for name in ("added_A", "deleted_B", "affected_C", "replay_D"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    starts = first.starts_B
    assert len(np.unique(starts)) == len(starts)
    covered = set((starts[:, None] + np.arange(BLOCK)).reshape(-1).tolist())
    assert set(range(103, 130)) <= covered
    scored_gone = np.flatnonzero(world.before.has_next(0, 103) & world.gone[:103])
    assert {row for row in scored_gone.tolist() if row < 100} <= covered
    changed = (len(scored_gone) + 27) / BLOCK
    assert len(first.affected_C) <= round(0.5 * changed)
    assert len(first.replay_D) == round(0.25 * changed)
    # The nearest blocks are those that a search of every changed row names most often.
    asked = np.concatenate([world.old_keys[scored_gone], world.keys[103:]])
    found, _ = Nearest(world).search(asked, 3)
    blocks, hits = np.unique(found // BLOCK, return_counts=True)
    whole = [b for b in blocks if b < 103 // BLOCK and b * BLOCK not in first.deleted_B]
    ranked = sorted(whole, key=lambda b: (-hits[list(blocks).index(b)], b))
    assert set(first.affected_C // BLOCK) == set(ranked[: len(first.affected_C)])


def test_a_token_is_drawn_as_often_as_its_probability_says(rng):
    probs = np.array([[0.5, 0.3, 0.2, 0.0]] * 20_000, np.float16)
    ids = np.array([[7, 3, 9, 0]] * 20_000)
    drawn = _draw(ids, probs, rng)
    for token, share in ((7, 0.5), (3, 0.3), (9, 0.2)):
        assert (drawn == token).mean() == pytest.approx(share, abs=0.02)
    assert (_draw(ids[:3], np.zeros((3, 4), np.float16), rng) == ids[:3, 0]).all()


class Teachers:
    """What `ArrayReader` gives, from memory."""

    def __init__(self, array):
        self.array = array

    def __getitem__(self, rows):
        return self.array[rows]


class Rows:
    def __init__(self, world, starts):
        self.world, self.starts = world, starts

    def block(self, start, rows):
        old = start + rows <= 103
        found = (self.world.old_keys if old else self.world.keys)[start : start + rows]
        return {"h": np.pad(found, ((0, rows - len(found)), (0, 0)))}


def test_elements_teach_deleted_rows_what_their_teacher_says(rng, monkeypatch):
    world, starts = World(rng), np.arange(0, 103, BLOCK)
    asked = ChosenBlocks(starts, BLOCK, *world.sources)
    ids = rng.integers(1, 50, (len(asked), 3))
    probs = rng.dirichlet(np.ones(3), len(asked)).astype(np.float16)
    arrays = {"token_ids": ids, "probs": probs}
    monkeypatch.setattr("mlp_memory.updating.train.ArrayReader", lambda _, name: Teachers(arrays[name]))
    source = ChosenSource(asked, Rows(world, starts), None, BLOCK, seed=0)
    changed = 0
    for index in range(len(source)):
        element, rows = source[index], range(index * BLOCK, (index + 1) * BLOCK)
        for i, row in enumerate(rows):
            assert element["weight"][i] == asked.asks(row, row + 1)[0]
            if asked.is_deleted(row, row + 1)[0]:
                assert element["labels"][i] in ids[row]
                changed += element["labels"][i] != world.before.labels(row, row + 1)[0]
            elif element["weight"][i]:
                assert element["labels"][i] == world.tokens[row + 1]
        np.testing.assert_array_equal(source[index]["labels"], element["labels"])
    assert changed
