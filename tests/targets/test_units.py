"""Units of retrieve: what may be done twice, in any order, after damage and in rounds of any size."""

import dataclasses
import itertools

import numpy as np
import pytest

from mlp_memory.arrays import ChunkWriter, written_chunks
from mlp_memory.artifacts import Directory, begin, config_dict, peek
from mlp_memory.index.exact import exact_search
from mlp_memory.index.neighbors import nearest_first
from mlp_memory.targets.candidates import CandidateLists, bytes_per_candidate
from mlp_memory.targets.config import RetrieveConfig
from mlp_memory.targets.retrieve import _arrays, retrieve
from mlp_memory.targets.units import UNITS, Inputs, Merge, NextTokens, Search, Worker, merged

CONFIG = RetrieveConfig(k=5, top_m=4, temperature=3.0, chunk_rows=64)
ROWS, DIM = 500, 6
# What retrieve writes besides what units write; of these the certificate lists the shards.
OF_THE_DRIVER = ("manifest.json", "certificate.json", "checksums.json")
TAU = 3.0


class Searcher:
    """Exact search of a row range, as a shard of an index searches its own."""

    def __init__(self, keys, valid, first):
        self.keys, self.valid, self.first = keys, valid, first

    def search(self, queries, k):
        assert len(queries)
        rows, sqdist = exact_search(self.keys, self.valid, queries, k)
        return np.where(rows >= 0, rows + self.first, -1), sqdist


class Index:
    """An index of so many shards; `loaded` says which were opened, in order."""

    def __init__(self, keys, valid, shards):
        self.facts, self.shards, self.loaded = {"recall": 1.0}, shards, []
        self.ranges = list(itertools.pairwise(len(keys) * s // shards for s in range(shards + 1)))
        self._shards = [Searcher(keys[a:b], valid[a:b], a) for a, b in self.ranges]
        self._last = None

    def shard(self, s):
        if s != self._last:
            self.loaded.append(s)
        self._last = s
        return self._shards[s]

    def search(self, queries, k):
        lists = [self.shard(s).search(queries, k) for s in range(self.shards)]
        return nearest_first(*(np.concatenate(part, axis=1) for part in zip(*lists)), k)


@pytest.fixture
def world(make_stream, rng):
    """shards -> inputs of an index of so many shards, over the same keys and stream."""
    stream = make_stream(ROWS)
    keys = rng.normal(size=(ROWS, DIM)).astype(np.float32)
    keys[rng.integers(0, ROWS, 60)] = keys[rng.integers(0, ROWS, 60)]  # duplicates: distances tie
    valid = stream.has_next(0, ROWS)
    return lambda shards: Inputs(stream, keys, Index(keys, valid, shards))


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def made(path, inputs, **changes):
    retrieve(Directory(path), lambda: inputs, {}, dataclasses.replace(CONFIG, **changes))
    return contents(path)


@pytest.fixture
def start(world, tmp_path):
    """(name, inputs) -> a worker on targets begun there, and their folder."""

    def begun(name, inputs):
        directory = Directory(tmp_path / name)
        arrays = _arrays(len(inputs.stream), inputs.stream.vocab_size, CONFIG)
        ChunkWriter(directory, begin(directory, "targets", config_dict(CONFIG), {}, arrays))
        return Worker(directory, inputs, CONFIG, TAU, CONFIG.k + 1), directory

    return begun


def all_units(shards):
    blocks = range(-(-ROWS // CONFIG.chunk_rows))
    return [Search(s, b) for s in range(shards) for b in blocks], [Merge(b) for b in blocks]


@pytest.mark.parametrize("shards", [1, 3, 8])
def test_rounds_of_any_size_and_one_shard_or_many_give_the_same_bytes(world, tmp_path, shards):
    whole = made(tmp_path / "one", world(1))
    several = [
        made(tmp_path / f"{spill}", world(shards), spill_gigabytes=spill) for spill in (1e-9, 2e-5, 8.0)
    ]
    assert several[0] == several[1] == several[2]
    assert several[0].keys() == whole.keys()
    assert all(several[0][name] == data for name, data in whole.items() if name not in OF_THE_DRIVER)


def test_a_shard_is_loaded_once_a_round(world, tmp_path):
    inputs = world(3)
    made(tmp_path / "a", inputs)
    assert inputs.index.loaded == [0, 1, 2] * 2  # once for the certificate
    bytes_a_block = 3 * CONFIG.chunk_rows * (CONFIG.k + 1) * bytes_per_candidate(ROWS)
    inputs = world(3)
    made(tmp_path / "b", inputs, spill_gigabytes=3 * bytes_a_block / 1e9)  # 8 blocks: rounds of 3, 3, 2
    assert inputs.index.loaded == [0, 1, 2] * 4


@pytest.mark.parametrize("shards", [1, 3])
def test_units_in_any_order_and_more_than_once_give_the_bytes_of_retrieve(
    world, start, tmp_path, rng, shards
):
    inputs = world(shards)
    searches, merges = all_units(shards)
    first, directory = start("units", inputs)
    second, _ = start("units", inputs)  # another process, that does not know what the first has done
    for units in (searches, merges):
        for unit in rng.permutation(len(units)):
            first(units[unit])
        before = contents(tmp_path / "units")
        for unit in rng.integers(0, len(units), 2 * len(units)):
            (first, second)[int(rng.integers(2))](units[unit])
        assert contents(tmp_path / "units") == before
    whole = made(tmp_path / "whole", inputs)
    found = contents(tmp_path / "units")
    for name, data in whole.items():
        if name not in OF_THE_DRIVER:
            assert found[name] == data, name
    assert written_chunks(directory) == {merge.block for merge in merges}


@pytest.mark.parametrize("damage", ["truncated", "flipped", "head", "empty", "gone"])
def test_a_list_that_was_damaged_is_made_again(world, start, tmp_path, rng, damage):
    inputs = world(3)
    searches, merges = all_units(3)
    worker, _ = start("damaged", inputs)
    for unit in searches:
        worker(unit)
    whole = made(tmp_path / "whole", inputs)
    for unit in rng.choice(len(searches), 4, replace=False):
        path = tmp_path / f"damaged/{UNITS}/{searches[unit].block:08d}/shard-{searches[unit].shard:05d}"
        data = bytearray(path.read_bytes())
        if damage == "truncated":
            data = data[: int(rng.integers(len(data)))]
        elif damage == "flipped":
            data[int(rng.integers(data.index(b"\n") + 1, len(data)))] ^= 1 << int(rng.integers(8))
        elif damage == "head":
            data[: data.index(b"\n")] = b'{"queries": 3}'
        path.write_bytes(b"" if damage == "empty" else data)
        if damage == "gone":
            path.unlink()
    for unit in merges:
        worker(unit)
    found = contents(tmp_path / "damaged")
    for name, data in whole.items():
        if name not in OF_THE_DRIVER:
            assert found[name] == data, name


@pytest.mark.parametrize("stop_at", [Search, Merge])
def test_a_stop_in_search_or_merge_is_taken_up_without_doing_it_all_again(
    world, tmp_path, monkeypatch, rng, stop_at
):
    whole = made(tmp_path / "whole", world(3))
    do, done, limit = Worker.__call__, [], int(rng.integers(1, 8))

    def stopping(self, unit):
        if sum(isinstance(u, stop_at) for u in done) == limit and isinstance(unit, stop_at):
            raise KeyboardInterrupt
        done.append(unit)
        do(self, unit)

    monkeypatch.setattr(Worker, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "stopped", world(3))
    assert not peek(Directory(tmp_path / "stopped")).finished
    before = list(done)
    monkeypatch.setattr(Worker, "__call__", lambda self, unit: (done.append(unit), do(self, unit)))
    assert made(tmp_path / "stopped", world(3)) == whole
    assert len(done) == len(set(done)) == sum(map(len, all_units(3)))
    assert done[: len(before)] == before


@pytest.mark.parametrize("rows", [1000, 1 << 33])
def test_lists_are_read_as_they_were_written(tmp_path, rng, rows):
    lists = CandidateLists(Directory(tmp_path), rows)
    shape = rng.integers(0, 20), rng.integers(1, 9)
    rows_QxC = rng.integers(-1, rows, shape)
    sqdist_QxC = np.where(rows_QxC < 0, np.inf, rng.random(shape)).astype(np.float32)
    lists.write(7, 2, rows_QxC, sqdist_QxC)
    found = lists.read(7, 2)
    np.testing.assert_array_equal(found[0], rows_QxC)
    np.testing.assert_array_equal(found[1], sqdist_QxC)
    assert found[0].dtype == np.int64
    size = (tmp_path / "00000007/shard-00002").stat().st_size
    assert size - rows_QxC.size * bytes_per_candidate(rows) < 200
    assert lists.shards(7) == {2}
    assert lists.read(7, 1) is None
    lists.delete(7)
    assert lists.shards(7) == set()


def test_merging_lists_is_sorting_all_candidates_at_once(rng):
    queries, count = int(rng.integers(1, 3000)), int(rng.integers(1, 12))
    lists, total = [], 0
    for shard in range(int(rng.integers(1, 6))):
        columns = int(rng.integers(1, 12))
        rows = 1000 * shard + np.argsort(rng.random((queries, 40)), axis=1)[:, :columns]
        sqdist = rng.integers(0, 5, rows.shape).astype(np.float32)  # many ties
        none = rng.random(rows.shape) < 0.2
        lists.append((np.where(none, -1, rows), np.where(none, np.inf, sqdist).astype(np.float32)))
        total += columns
    rows, sqdist = (np.concatenate(part, axis=1) for part in zip(*lists))
    expected = nearest_first(rows, sqdist, count)
    for found, wanted in zip(merged(iter(lists), count), expected):
        np.testing.assert_array_equal(found, wanted)


def test_next_tokens_are_the_labels_of_rows_that_have_one(make_stream, rng):
    stream = make_stream(200)
    rows = rng.choice(np.flatnonzero(stream.has_next(0, 200)), (7, 5))
    labels = NextTokens(stream)[rows]
    np.testing.assert_array_equal(labels, stream.labels(0, 200)[rows])
    assert labels.dtype == np.int32
    assert NextTokens(stream)[np.array([[-1]])].shape == (1, 1)
