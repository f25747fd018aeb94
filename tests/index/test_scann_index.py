import hashlib
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mlp_memory.artifacts import Directory, UserError, config_dict, peek
from mlp_memory.index import scann_shard
from mlp_memory.index.build import build_shard
from mlp_memory.index.config import IndexConfig
from mlp_memory.index.exact import exact_search
from mlp_memory.index.neighbors import exclude_self, recall_at_k
from mlp_memory.index.search import Index, open_index
from mlp_memory.index.stage import build_index
from mlp_memory.index.tuning import Structure

K = 20


class Documents:
    """A stream of documents of random length."""

    def __init__(self, rng, rows, mean_length=30):
        self.valid = rng.random(rows) >= 1 / mean_length
        self.valid[-1] = False

    def __len__(self):
        return len(self.valid)

    def has_next(self, start, stop):
        return self.valid[start:stop]

    def document_ids(self, start, stop):
        return np.append(0, np.cumsum(~self.valid))[start:stop]


def clustered_keys(rng, rows, dimension=24):
    """Points around 60 centres, with a few exact duplicates."""
    centres = rng.normal(size=(60, dimension)) * 3
    keys = centres[rng.integers(0, 60, rows)] + rng.normal(size=(rows, dimension))
    keys[rng.integers(0, rows, rows // 20)] = keys[rng.integers(0, rows, rows // 20)]
    return keys.astype(np.float32)


def built(path, keys, stream, config=None):
    build_index(Directory(path), keys, "datastore-1", stream, config or IndexConfig(), K)
    return open_index(Directory(path), keys, stream.valid)


def file_digests(path):
    return {
        str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(path.rglob("*"))
        if f.is_file()
    }


def test_measured_recall_reaches_the_target_and_is_what_a_search_gives(tmp_path):
    rng = np.random.default_rng()
    keys, stream = clustered_keys(rng, 9000), Documents(rng, 9000)
    index = built(tmp_path / "index", keys, stream, IndexConfig(recall_sample=300))
    facts = peek(Directory(tmp_path / "index")).facts
    assert facts["recall"] >= 0.95
    assert facts["keys"] == stream.valid.sum()
    assert (index.leaves_to_search, index.reorder) == (facts["leaves_to_search"], facts["reorder"])
    asked = np.flatnonzero(stream.valid)
    found, _ = exclude_self(*index.search(keys[asked], K + 1), asked, K)
    true, _ = exclude_self(*exact_search(keys, stream.valid, keys[asked], K + 1), asked, K)
    assert recall_at_k(found, true) == pytest.approx(facts["recall"], abs=0.03)


@pytest.mark.parametrize(("rows", "shards"), [(900, 1), (900, 4), (9000, 2), (3, 5)])
def test_rows_found_have_a_next_token_and_their_true_distance(tmp_path, rows, shards):
    rng = np.random.default_rng()
    keys, stream = clustered_keys(rng, rows), Documents(rng, rows)
    stream.valid[0] = True
    index = built(tmp_path / "index", keys, stream, IndexConfig(shards=shards))
    found_rows, sqdist = index.search(keys[:200], K)
    real = found_rows >= 0
    assert stream.valid[found_rows[real]].all()
    queries = np.broadcast_to(keys[:200, None], (*found_rows.shape, keys.shape[1]))
    want = ((queries[real] - keys[found_rows[real]]) ** 2).sum(1)
    # The square is expanded: rounding is relative to the norms, not to the distance.
    norms = (queries[real] ** 2).sum(1) + (keys[found_rows[real]] ** 2).sum(1)
    assert (np.abs(sqdist[real] - want) <= 1e-6 * norms).all()
    assert np.isinf(sqdist[~real]).all()
    assert (real.sum(1) == min(K, stream.valid.sum())).all()
    order = np.where(real, found_rows, np.iinfo(np.int64).max)
    assert all([*zip(d, r)] == sorted(zip(d, r)) for d, r in zip(sqdist, order))
    if rows <= 4096 * shards and rows > K:  # brute force finds all
        true_rows, _ = exact_search(keys, stream.valid, keys[:200], K)
        assert recall_at_k(found_rows, true_rows) > 0.999


@pytest.mark.parametrize(("dtype", "size", "off"), [("bfloat16", 2, 0.01), ("int8", 1, 0.06)])
def test_shards_of_rounded_keys_are_smaller_and_near_the_truth(tmp_path, dtype, size, off):
    rng = np.random.default_rng()
    keys, stream = clustered_keys(rng, 9000), Documents(rng, 9000)
    config = IndexConfig(reorder_dtype=dtype, target_recall=0.9, recall_sample=300)
    index = built(tmp_path / "index", keys, stream, config)
    assert index.leaves_to_search  # not by brute force, which keeps float32
    facts = peek(Directory(tmp_path / "index/shard-00000")).facts
    files = {name: n for name, n in facts["bytes"].items() if "dataset" in name and "hashed" not in name}
    assert files == {f"scann/{dtype}_dataset.npy": stream.valid.sum() * (24 + 8) * size + 128}
    asked = np.flatnonzero(stream.valid)
    found, sqdist = index.search(keys[asked], K + 1)
    true, _ = exact_search(keys, stream.valid, keys[asked], K + 1)
    assert recall_at_k(found, true) > 0.9
    want, there = ((keys[asked][:, None] - keys[found]) ** 2).sum(2), found >= 0
    assert np.abs(sqdist - want)[there].mean() < off * want[there].mean()


def test_a_query_finds_the_same_rows_in_any_company(tmp_path):
    rng = np.random.default_rng()
    keys = rng.normal(size=(30_000, 32)).astype(np.float32)
    config = IndexConfig(leaves=600, leaves_to_search=15, reorder=128, recall_sample=20)
    index = built(tmp_path / "index", keys, Documents(rng, 30_000), config)
    queries = keys[rng.permutation(30_000)[:700]]
    whole_rows, whole_sqdist = index.search(queries, 16)
    for size in (1, 2, 5, 8, 31, 257, 300):
        parts = [index.search(queries[first : first + size], 16) for first in range(0, 700, size)]
        rows = np.concatenate([rows for rows, _ in parts])
        np.testing.assert_array_equal(np.sort(rows, axis=1), np.sort(whole_rows, axis=1))
        # ScaNN's reordering sums in an order that depends on a candidate's place: one bit at most.
        np.testing.assert_allclose(np.concatenate([sqdist for _, sqdist in parts]), whole_sqdist, rtol=4e-7)


BUILD = """
import sys, numpy as np
from mlp_memory.artifacts import Directory
from mlp_memory.index.config import IndexConfig
from mlp_memory.index.stage import build_index
from mlp_memory.index.search import open_index
class Stream:
    valid = np.load(sys.argv[1] + "/valid.npy")
    def __len__(self): return len(self.valid)
    def has_next(self, start, stop): return self.valid[start:stop]
keys = np.load(sys.argv[1] + "/keys.npy")
config = IndexConfig(shards=2, leaves=400, dimensions_per_block=2, recall_sample=50)
build_index(Directory(sys.argv[2]), keys, "datastore-1", Stream(), config, 20)
rows, sqdist = open_index(Directory(sys.argv[2]), keys, Stream.valid).search(keys[:2000], 20)
np.savez(sys.argv[2] + "/found.npz", rows=rows, sqdist=sqdist)
assert not [m for m in sys.modules if m.split(".")[0] in ("tensorflow", "seqio")]
"""


def test_two_builds_in_different_processes_are_identical(tmp_path):
    # Far from the origin, many leaves, no clusters: two training threads disagree here on which
    # leaf rows near two of them belong to, and 12,000 clustered rows do not show it.
    rng = np.random.default_rng()
    np.save(tmp_path / "keys.npy", rng.normal(30, 1, (60_000, 96)).astype(np.float32))
    np.save(tmp_path / "valid.npy", Documents(rng, 60_000).valid)
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", BUILD, tmp_path, tmp_path / name], check=True)
    assert file_digests(tmp_path / "a") == file_digests(tmp_path / "b")


def test_an_index_can_be_moved_and_searched_again(tmp_path):
    rng = np.random.default_rng()
    keys, stream = clustered_keys(rng, 6000), Documents(rng, 6000)
    before = built(tmp_path / "index", keys, stream).search(keys[:500], K)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "index").rename(tmp_path / "elsewhere" / "moved")
    index = open_index(Directory(tmp_path / "elsewhere" / "moved"), keys, stream.valid)
    for _ in range(3):
        after = index.search(keys[:500], K)
        np.testing.assert_array_equal(before[0], after[0])
        np.testing.assert_array_equal(before[1], after[1])


def test_a_build_killed_within_a_shard_ends_in_the_same_files(tmp_path, monkeypatch):
    rng = np.random.default_rng()
    keys, stream = clustered_keys(rng, 6000), Documents(rng, 6000)
    config = IndexConfig(shards=2)
    built(tmp_path / "straight", keys, stream, config)
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "straight", broken)
    # As a kill leaves it: one shard half built in its staging folder, the index unfinished.
    (broken / "shard-00001").rename(broken / "building-shard-00001")
    (broken / "building-shard-00001" / "scann" / "dataset.npy").write_bytes(b"half")
    unfinished = peek(Directory(broken))
    unfinished.finished, unfinished.facts = False, {}
    (broken / "manifest.json").write_text(unfinished.to_json())
    built(broken, keys, stream, config)
    assert file_digests(broken) == file_digests(tmp_path / "straight")


def test_a_remote_shard_is_copied_with_its_manifest_last(tmp_path):
    log = []

    class Remote(Directory):
        """A local folder that answers as a remote one."""

        def __init__(self, location):
            super().__init__(location)
            self._kvstore = Directory(location).kvstore
            self.is_local = False

        def __truediv__(self, name):
            return Remote(f"{self.location}/{name}")

        def write(self, name, data):
            log.append(name)
            super().write(name, data)

    rng = np.random.default_rng()
    keys, stream = clustered_keys(rng, 5000), Documents(rng, 5000)
    trained = scann_shard.train_codes(scann_shard.train_tree(keys, 60), keys, 2)
    for directory in (Remote(tmp_path / "remote"), Directory(tmp_path / "local")):
        build_shard(directory, 0, 1, keys, stream, "datastore-1", Structure(60, 2), trained)
    assert log[-1] == "manifest.json"
    assert log.count("manifest.json") == 1
    assert file_digests(tmp_path / "remote") == file_digests(tmp_path / "local")
    facts = {"leaves_to_search": 60, "reorder": 100}
    found = [
        Index(directory, keys, stream.valid, None, 1, config_dict(IndexConfig()), facts).search(keys[:9], K)
        for directory in (Remote(tmp_path / "remote"), Directory(tmp_path / "local"))
    ]
    np.testing.assert_array_equal(found[0][0], found[1][0])


def test_faults_are_one_line_that_says_what_to_do(tmp_path):
    rng = np.random.default_rng()
    keys, stream = clustered_keys(rng, 800), Documents(rng, 800)
    with pytest.raises(UserError, match=r"run `python -m mlp_memory index` first"):
        open_index(Directory(tmp_path / "nothing"), keys, stream.valid)
    with pytest.raises(UserError, match="700 rows, the token stream 800"):
        build_index(Directory(tmp_path / "short"), keys[:700], "datastore-1", stream, IndexConfig(), K)
    built(tmp_path / "index", keys, stream)
    with pytest.raises(UserError, match="made from datastore datastore-1, this datastore is datastore-2"):
        build_index(Directory(tmp_path / "index"), keys, "datastore-2", stream, IndexConfig(), K)
    with pytest.raises(UserError, match="leaves = 0, now it is 7"):
        build_index(Directory(tmp_path / "index"), keys, "datastore-1", stream, IndexConfig(leaves=7), K)
    dataset = tmp_path / "index" / "shard-00000" / "scann" / "dataset.npy"
    size = dataset.stat().st_size
    dataset.write_bytes(dataset.read_bytes()[:-40])
    with pytest.raises(UserError, match=rf"dataset.npy has {size - 40} bytes, not {size}"):
        open_index(Directory(tmp_path / "index"), keys, stream.valid).search(keys[:9], K)
    stream.valid[:] = False
    with pytest.raises(UserError, match="none of the stream's 800 rows has a next token"):
        build_index(Directory(tmp_path / "empty"), keys, "datastore-1", stream, IndexConfig(), K)


def test_a_key_that_is_not_finite_is_named_before_anything_is_built(tmp_path):
    rng = np.random.default_rng()
    keys, stream = clustered_keys(rng, 5000), Documents(rng, 5000)
    row = int(rng.integers(0, 5000))
    keys[row, 3] = rng.choice([np.nan, np.inf, -np.inf])
    document = int((~stream.valid[:row]).sum())
    for backend in ("scann", "exact"):
        with pytest.raises(UserError, match=rf"the key of row {row} \(document {document}\) is not finite"):
            built(tmp_path / backend, keys, stream, IndexConfig(backend=backend))
        assert not list((tmp_path / backend).glob("*shard*"))


def test_no_pickle_is_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    rng = np.random.default_rng()
    keys, stream = clustered_keys(rng, 5000), Documents(rng, 5000)
    before = built(tmp_path / "index", keys, stream).search(keys[:9], K)
    (tmp_path / "index/shard-00000/scann/scann_docids.pkl").write_bytes(pickle.dumps(Trap()))
    after = open_index(Directory(tmp_path / "index"), keys, stream.valid).search(keys[:9], K)
    np.testing.assert_array_equal(before[0], after[0])
    assert not (tmp_path / "sprung").exists()


def test_shards_are_the_fewest_whose_keys_fit_and_the_needs_are_said(tmp_path, capsys):
    rng = np.random.default_rng()
    keys, stream = clustered_keys(rng, 900), Documents(rng, 900)
    config = IndexConfig(shard_gigabytes=4 * 900 * 24 / 2.5 / 1e9)
    index = built(tmp_path / "index", keys, stream, config)
    assert index.shards == 3
    assert re.search(
        r"^index: 3 shards of 300 rows, .* GB of memory, .* GB of disk$", capsys.readouterr().err
    )
    rows = np.concatenate([index.shard(s).search(keys[:5], 4)[0] for s in range(3)], axis=1)
    assert [set(part) <= set(range(s * 300, s * 300 + 300)) for s, part in enumerate(rows[0].reshape(3, 4))]


@pytest.mark.parametrize("shards", [1, 3])
def test_the_exact_backend_keeps_no_files_and_finds_all(tmp_path, shards):
    rng = np.random.default_rng()
    keys, stream = clustered_keys(rng, 1000), Documents(rng, 1000)
    index = built(tmp_path / "index", keys, stream, IndexConfig(backend="exact", shards=shards))
    found = sorted(path.name for path in (tmp_path / "index").iterdir())
    assert found == ["checksums.json", "manifest.json"]
    assert (index.facts["recall"], index.shards) == (1.0, shards)
    for found, true in zip(index.search(keys[:99], K), exact_search(keys, stream.valid, keys[:99], K)):
        np.testing.assert_array_equal(found, true)


def test_keys_that_codes_serve_badly_still_reach_the_goal(tmp_path):
    # No clusters, no low dimensions: all leaves are about as far, and codes tell little.
    rng = np.random.default_rng()
    keys = (rng.normal(size=(5000, 200)) * rng.gamma(0.5, 1, 200)).astype(np.float32)
    stream = Documents(rng, 5000)
    index = built(tmp_path / "index", keys, stream, IndexConfig(target_recall=0.98, recall_sample=300))
    assert index.facts["recall_low"] >= 0.98
    asked = rng.choice(np.flatnonzero(stream.valid), 300, replace=False)
    found, _ = exclude_self(*index.search(keys[asked], K + 1), asked, K)
    true, _ = exclude_self(*exact_search(keys, stream.valid, keys[asked], K + 1), asked, K)
    assert recall_at_k(found, true) > 0.97
    table = index.facts["tuning"]
    chosen = {name: index.facts[name] for name in ("leaves", "leaves_to_search", "reorder")}
    assert any(chosen.items() <= row.items() for row in table["index"])
    assert all({"recall", "cost_us", "dimensions_per_block"} <= set(row) for row in table["pilots"])


PEAK = """
import sys, numpy as np
from mlp_memory.artifacts import Directory
from mlp_memory.index import scann_shard
from mlp_memory.index.build import build_shard
from mlp_memory.index.scann_shard import ScannShard
from mlp_memory.index.shards import shard_rows
from mlp_memory.index.tuning import Structure
rows, dimension, shards, directory = *map(int, sys.argv[1:4]), Directory(sys.argv[4])

class Keys:
    shape, pool = (rows, dimension), np.random.default_rng(0).normal(size=(4096, dimension)).astype("f4")
    def __getitem__(self, some): return self.pool[np.arange(rows)[some] % 4096] + np.float32(some.start)

class Stream:
    def __len__(self): return rows
    def has_next(self, start, stop): return np.ones(stop - start, bool)

def peak(work):
    def read(name):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
    open("/proc/self/clear_refs", "w").write("5")
    before = read("VmRSS")
    result = work()
    print((read("VmHWM") - before) * 1024)
    return result

def build(some):
    for shard in some:
        build_shard(directory, shard, shards, Keys(), Stream(), "d", Structure(100, 2), trained)

def search(shard):
    searcher = ScannShard(directory / f"shard-{shard:05d}", 20, 200, shard_rows(rows, shards, shard))
    searcher.search(Keys.pool[:512], 100)

trained = scann_shard.train_codes(scann_shard.train_tree(Keys.pool, 100), Keys.pool, 2)
peak(lambda: build(range(shards)))
peak(lambda: [search(shard) for shard in range(shards)])
"""


def test_memory_of_a_shard_is_bounded_by_its_keys_and_four_shards_need_no_more(tmp_path):
    def peaks(rows, shards):
        words = [sys.executable, "-c", PEAK, *map(str, (rows, 128, shards, tmp_path / str(shards)))]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        return [int(line) for line in done.stdout.split()]

    keys = 4 * 250_000 * 128
    build, search = peaks(250_000, 1)
    assert search >= keys  # or nothing was measured
    of_four = peaks(4 * 250_000, 4)
    for peak in (build, of_four[0]):
        assert peak <= 3 * (1 << 27)  # blocks only: 1000 MB of keys pass
    for peak in (search, of_four[1]):
        assert peak <= 1.5 * keys + (1 << 26)
