"""An index made of another one: what it finds, what it shares, what is gone."""

import numpy as np
import pytest

from mlp_memory.artifacts import Directory, peek
from mlp_memory.index.config import IndexConfig
from mlp_memory.index.exact import exact_search
from mlp_memory.index.extend import extend_index
from mlp_memory.index.neighbors import recall_at_k
from mlp_memory.index.search import open_index
from mlp_memory.index.stage import build_index

K = 10
OLD, NEW = 9000, 5200


class Stream:
    """Rows that have a next token or not."""

    def __init__(self, valid):
        self.valid = valid

    def __len__(self):
        return len(self.valid)

    def has_next(self, start, stop):
        return self.valid[start:stop]

    def document_ids(self, start, stop):
        return np.append(0, np.cumsum(~self.valid))[start:stop]


class World:
    def __init__(self, folder, rng, config, added=NEW, deleted=(), dimension=24):
        centres = rng.normal(size=(60, dimension)) * 3
        rows = OLD + added
        self.keys = (centres[rng.integers(0, 60, rows)] + rng.normal(size=(rows, dimension))).astype("f4")
        self.before = Stream(rng.random(OLD) >= 0.03)
        self.now = Stream(np.concatenate([self.before.valid, rng.random(added) >= 0.03]))
        for start, stop in deleted:
            self.now.valid[start:stop] = False
        self.folder, self.config = folder, config
        build_index(folder / "a", self.keys[:OLD], "datastore-1", self.before, config, K)
        self.extend(folder / "b")

    def extend(self, directory):
        found = peek(self.folder / "a")
        work = (self.keys, "datastore-2", self.now, self.config, K)
        extend_index(directory, self.folder / "a", found, OLD, *work)

    @property
    def old(self):
        return open_index(self.folder / "a", self.keys[:OLD], self.before.valid)

    @property
    def index(self):
        return open_index(self.folder / "b", self.keys, self.now.valid)


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_all_that_is_left_is_found_as_well_as_before_and_nothing_else(tmp_path, rng, dtype):
    config = IndexConfig(recall_sample=300, reorder_dtype=dtype, target_recall=0.9)
    world = World(Directory(tmp_path), rng, config, deleted=[(100, 180), (4000, 4700)])
    facts = peek(Directory(tmp_path / "b")).facts
    assert facts["ranges"] == [[0, OLD], [OLD, OLD + NEW]]
    assert facts["keys"] == world.now.valid.sum()
    queries = world.keys[rng.integers(0, OLD + NEW, 500)]
    found, _ = world.index.search(queries, K)
    assert world.now.valid[found[found >= 0]].all()
    exact, _ = exact_search(world.keys, world.now.valid, queries, K)
    before, _ = world.old.search(queries, K)
    before_exact, _ = exact_search(world.keys[:OLD], world.before.valid, queries, K)
    assert recall_at_k(found, exact) > min(recall_at_k(before, before_exact), 0.95) - 0.05
    assert facts["recall"] == pytest.approx(recall_at_k(found, exact), abs=0.05)
    # Rows that no key of theirs stands for any more are not in the files either.
    shard = peek(Directory(tmp_path / "b/shard-00000")).facts
    assert shard["keys"] == world.now.valid[:OLD].sum()


def test_a_shard_that_loses_nothing_is_the_same_files(tmp_path, rng):
    config = IndexConfig(shards=3, recall_sample=50)
    World(Directory(tmp_path), rng, config, deleted=[(3500, 3600)])
    names = list(peek(Directory(tmp_path / "a/shard-00000")).facts["bytes"])
    same = [
        [
            (tmp_path / f"a/shard-0000{shard}" / name).samefile(tmp_path / f"b/shard-0000{shard}" / name)
            for name in names
        ]
        for shard in range(3)
    ]
    assert all(same[0])
    assert not all(same[1])
    assert all(same[2])


def test_what_is_left_of_a_shard_is_searched_as_if_the_rest_had_never_been_there(tmp_path, rng):
    """Its files hold no value of a deleted key, and its candidates are the old ones less the deleted."""
    world = World(Directory(tmp_path), rng, IndexConfig(recall_sample=50), added=0, deleted=[(1000, 5000)])
    queries = world.keys[rng.integers(0, OLD, 200)]
    found, _ = world.index.search(queries, K)
    exact, _ = exact_search(world.keys, world.now.valid, queries, K)
    assert recall_at_k(found, exact) > 0.9
    dataset = np.load(tmp_path / "b/shard-00000/scann/dataset.npy")
    mean = np.load(tmp_path / "b/shard-00000/mean.npy")
    kept = world.keys[world.now.valid] - mean
    np.testing.assert_array_equal(dataset[:, : kept.shape[1]], kept)
    old = np.load(tmp_path / "a/shard-00000/scann/dataset.npy")
    assert len(old) == world.before.valid.sum() > len(dataset)


def test_a_shard_may_lose_all_its_keys(tmp_path, rng):
    config = IndexConfig(shards=3, recall_sample=50)
    world = World(Directory(tmp_path), rng, config, deleted=[(3000, 6000)])
    found, _ = world.index.search(world.keys[3000:3100], K)
    assert (found >= 0).all()
    assert not ((found >= 3000) & (found < 6000)).any()
    assert peek(Directory(tmp_path / "b/shard-00001")).facts["keys"] == 0


def test_many_new_rows_get_shards_no_longer_than_the_old_ones(tmp_path, rng):
    world = World(Directory(tmp_path), rng, IndexConfig(shards=3, recall_sample=50))
    ranges = peek(Directory(tmp_path / "b")).facts["ranges"]
    assert ranges[-1][1] == OLD + NEW
    assert all(stop - start <= 3000 for start, stop in ranges)
    assert [start for start, _ in ranges[1:]] == [stop for _, stop in ranges[:-1]]
    found, _ = world.index.search(world.keys[-50:], K)
    assert (found >= OLD).any(axis=1).all()


def test_new_rows_that_are_harder_to_find_are_searched_for_longer(tmp_path, rng):
    """Old rows lie in 60 clusters, new ones anywhere."""
    config, dimension = IndexConfig(recall_sample=300, target_recall=0.9), 24
    world = World(Directory(tmp_path), rng, config, dimension=dimension)
    world.keys[OLD:] = rng.normal(size=(NEW, dimension)) * 3
    world.extend(Directory(tmp_path / "c"))
    index = open_index(Directory(tmp_path / "c"), world.keys, world.now.valid)
    usual, longer = index.facts["searches"]
    assert usual == [index.facts["leaves_to_search"], index.facts["reorder"]]
    share = index.shard(1).leaves / index.facts["leaves"]
    assert longer[0] >= 1.9 * share * usual[0]
    asked = rng.choice(np.arange(OLD, OLD + NEW), 300, replace=False)
    exact, _ = exact_search(world.keys, world.now.valid, world.keys[asked], K)
    assert recall_at_k(index.search(world.keys[asked], K)[0], exact) > 0.87


def test_it_repeats_and_goes_on_after_a_kill(tmp_path, rng):
    config = IndexConfig(shards=2, recall_sample=50)
    world = World(Directory(tmp_path), rng, config, deleted=[(10, 400)])
    files = {
        path.relative_to(tmp_path / "b"): path.read_bytes()
        for path in (tmp_path / "b").rglob("*")
        if path.is_file()
    }
    again = tmp_path / "c"
    world.extend(Directory(again))
    (again / "manifest.json").unlink()
    for name in ("manifest.json", "rows_without_key.npy"):
        (again / "shard-00001" / name).unlink()
    world.extend(Directory(again))
    for name, data in files.items():
        assert (again / name).read_bytes() == data, name


def test_the_exact_backend_goes_on_too(tmp_path, rng):
    world = World(Directory(tmp_path), rng, IndexConfig(backend="exact"), deleted=[(10, 400)])
    queries = world.keys[rng.integers(0, OLD + NEW, 100)]
    found, sqdist = world.index.search(queries, K)
    exact, exact_sqdist = exact_search(world.keys, world.now.valid, queries, K)
    np.testing.assert_array_equal(found, exact)
    np.testing.assert_allclose(sqdist, exact_sqdist, rtol=1e-5)
