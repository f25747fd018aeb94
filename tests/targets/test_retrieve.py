import dataclasses
import hashlib
import json

import numpy as np
import pytest

from mlp_memory.arrays import ArrayReader, ChunkWriter
from mlp_memory.artifacts import ArraySpec, Directory, UserError, begin, peek
from mlp_memory.index.config import IndexConfig
from mlp_memory.index.search import Index, open_index
from mlp_memory.index.stage import build_index
from mlp_memory.targets import units as units_module
from mlp_memory.targets.config import RetrieveConfig
from mlp_memory.targets.retrieve import Truth, Validation, retrieve
from mlp_memory.targets.units import Inputs

N, D, VOCAB = 5300, 12, 50
CONFIG = RetrieveConfig(k=16, top_m=6, chunk_rows=1000, validation_rows=64)
PARENTS = {"datastore": "datastore-1", "index": "index-1"}


class Documents:
    """Random tokens in documents of random length, one of them a single token."""

    vocab_size = VOCAB

    def __init__(self, rng):
        self.tokens = rng.integers(0, VOCAB, N).astype(np.int32)
        self.last = rng.random(N) < 0.04
        self.last[[100, 101, N - 1]] = True
        self.last[[3, 1005]] = False
        self.bounds_D1 = np.append(0, np.flatnonzero(self.last) + 1)
        self.deleted_D = np.zeros(len(self.bounds_D1) - 1, bool)

    def __len__(self):
        return N

    def document_ids(self, start, stop):
        return np.zeros(stop - start, np.int32)

    def has_next(self, start, stop):
        return ~self.last[start:stop]

    def labels(self, start, stop):
        following = np.append(self.tokens[1:], 0)
        return np.where(self.last, 0, following)[start:stop].astype(np.int32)


@dataclasses.dataclass
class World:
    stream: Documents
    keys: np.ndarray
    reader: ArrayReader
    index: Index
    validation: Validation

    def inputs(self) -> Inputs:
        return Inputs(self.stream, self.reader, self.index)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    rng = np.random.default_rng()
    path = tmp_path_factory.mktemp("retrieve")
    stream = Documents(rng)
    keys = rng.normal(size=(N, D)).astype(np.float32)
    keys[rng.integers(0, N, 500)] = keys[rng.integers(0, N, 500)]
    keys[1000:1040] = keys[3]  # more duplicates than neighbours asked for
    directory = Directory(path / "datastore")
    writer = ChunkWriter(
        directory, begin(directory, "datastore", {}, {}, {"keys": ArraySpec((N, D), "float32", 2048)})
    )
    for chunk in writer.missing():
        writer.write(chunk, keys=keys[slice(*writer.rows(chunk))])
    writer.finish()
    reader = ArrayReader(directory, "keys")
    build_index(Directory(path / "index"), reader, "datastore-1", stream, IndexConfig(recall_sample=200), 16)
    validation = Validation(
        rng.normal(size=(300, D)), np.log(rng.uniform(0.01, 0.2, 300)), rng.integers(0, VOCAB, 300)
    )
    return World(
        stream, keys, reader, open_index(Directory(path / "index"), keys, stream.has_next(0, N)), validation
    )


def run(world, path, config=CONFIG):
    retrieve(Directory(path), world.inputs, PARENTS, config, world.validation)
    return peek(Directory(path))


def digests(path):
    return {
        str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(path.rglob("*"))
        if f.is_file()
    }


def test_targets_are_what_the_other_rows_neighbours_say(world, tmp_path):
    manifest = run(world, tmp_path)
    tau = manifest.facts["temperature"]
    arrays = {name: ArrayReader(Directory(tmp_path), name)[0:N] for name in manifest.arrays}
    assert arrays["token_ids"].dtype == np.uint16
    labels = world.stream.labels(0, N)
    rng = np.random.default_rng()
    for row in [3, 1005, *rng.choice(np.flatnonzero(world.stream.has_next(0, N)), 40)]:
        rows, sqdist = world.index.search(world.keys[row : row + 1], CONFIG.k + 1)
        others = [(d, r) for d, r in zip(sqdist[0], rows[0]) if r != row][: CONFIG.k]
        mass = np.zeros(VOCAB)
        for d, r in others:
            mass[labels[r]] += np.exp(-float(d) / tau)
        mass /= mass.sum()
        kept = np.sort(mass)[::-1][: CONFIG.top_m].sum()
        probs, ids = arrays["probs"][row].astype(float), arrays["token_ids"][row]
        assert arrays["kept_mass"][row] == pytest.approx(kept, rel=1e-4)
        assert arrays["neighbours"][row] == CONFIG.k
        np.testing.assert_allclose(probs, mass[ids] / kept * (probs > 0), rtol=2e-3, atol=1e-6)
        assert probs.sum() == pytest.approx(1, abs=2**-11)


def test_rows_without_next_token_have_empty_targets_and_are_nobodys_neighbour(world, tmp_path):
    manifest = run(world, tmp_path)
    last = world.stream.last
    for name in manifest.arrays:
        array = ArrayReader(Directory(tmp_path), name)[0:N].reshape(N, -1)
        assert not array[last].any()
        if name != "token_ids":
            assert array[~last].any(axis=1).all()
    rows, _ = world.index.search(world.keys, CONFIG.k)
    assert not last[rows[rows >= 0]].any()
    assert manifest.facts["recall"] == world.index.facts["recall"]
    support = ArrayReader(Directory(tmp_path), "support")[0:N][~last]
    assert manifest.facts["mean_support"] == pytest.approx(support.mean(), abs=1e-2)


def test_a_run_stopped_within_a_chunk_and_resumed_gives_the_same_bytes(world, tmp_path, monkeypatch):
    run(world, tmp_path / "straight")
    real = units_module.knn_distribution
    for chunks in (0, 1, 4):
        path, calls = tmp_path / f"stopped-{chunks}", iter(range(chunks))

        def stop_after(*args, calls=calls):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(units_module, "knn_distribution", stop_after)
        with pytest.raises(KeyboardInterrupt):
            run(world, path)
        assert not peek(Directory(path)).finished
        monkeypatch.setattr(units_module, "knn_distribution", real)
        run(world, path)
        assert digests(path) == digests(tmp_path / "straight")


def test_temperature_is_taken_as_given_or_needs_validation(world, tmp_path):
    given = dataclasses.replace(CONFIG, temperature=12.5)
    retrieve(Directory(tmp_path / "a"), world.inputs, PARENTS, given)
    facts = peek(Directory(tmp_path / "a")).facts
    assert facts["temperature"] == 12.5
    assert facts["temperature_choice"] == {"how": "given"}
    with pytest.raises(UserError, match="needs a validation split"):
        retrieve(Directory(tmp_path / "b"), world.inputs, PARENTS, CONFIG)
    with pytest.raises(UserError, match=r"temperature = 12.5, now it is 3"):
        run(world, tmp_path / "a", dataclasses.replace(CONFIG, temperature=3))


@pytest.mark.parametrize(
    "wrong", [{"k": 0}, {"k": 70000}, {"temperature": "best"}, {"temperature": -1.0}, {"temperatures": ()}]
)
def test_a_config_that_cannot_work_is_refused(wrong):
    with pytest.raises(UserError, match=r"retrieve\."):
        RetrieveConfig(**wrong)


class Poor:
    """An index that finds every third of the neighbours."""

    def __init__(self, index):
        self.facts, self.shards, self.ranges = index.facts, index.shards, index.ranges
        self._index = index

    def shard(self, s):
        return Poor(self._index)

    def search(self, queries, k):
        rows, sqdist = self._index.search(queries, min(3 * k, N))
        return np.ascontiguousarray(rows[:, ::3][:, :k]), np.ascontiguousarray(sqdist[:, ::3][:, :k])


def test_a_teacher_below_the_goal_is_refused_before_anything_is_written_unless_accepted(
    world, tmp_path, capsys
):
    poor = dataclasses.replace(world, index=Poor(world.index))
    with pytest.raises(UserError, match=r"recall@16 is 0\.[0-9]+ .* below retrieve.goal_recall = 0.95"):
        run(poor, tmp_path / "poor")
    assert not (tmp_path / "poor").exists()
    run(poor, tmp_path / "poor", dataclasses.replace(CONFIG, accept_below_goal=True))
    assert "; accepted" in capsys.readouterr().err
    certificate = json.loads((tmp_path / "poor/certificate.json").read_bytes())
    assert not certificate["goal"]["met"]
    assert 0.2 < certificate["recall"]["mean"] < 0.5
    run(world, tmp_path / "good")
    good = json.loads((tmp_path / "good/certificate.json").read_bytes())
    assert good["recall"]["mean"] > 0.95
    assert good["search"]["tv"]["mean"] < certificate["search"]["tv"]["mean"]


def test_held_out_text_that_train_holds_is_named_in_the_certificate(world, tmp_path, capsys):
    longest = int(np.diff(world.stream.bounds_D1).argmax())
    start, stop = world.stream.bounds_D1[longest : longest + 2].tolist()

    class HeldOut:
        tokens = world.stream.tokens[start:stop].copy()
        bounds_D1 = np.array([0, stop - start])

        def __len__(self):
            return stop - start

    truth = Truth(splits={"test": HeldOut()})
    retrieve(Directory(tmp_path), world.inputs, PARENTS, CONFIG, world.validation, truth=truth)
    (copy,) = json.loads((tmp_path / "certificate.json").read_bytes())["overlap"]["splits"]["test"]["copies"]
    assert (copy["train_document"], copy["train_rows"]) == (longest, [start, stop])
    assert f"audit: test document 0 (rows 0..{stop - start - 1}) is 100 %" in capsys.readouterr().err


def test_the_goal_of_an_approximate_exact_backend_is_in_the_certificate(world, tmp_path):
    config = IndexConfig(backend="exact", approximate_recall=0.9)
    build_index(Directory(tmp_path / "index"), world.reader, "datastore-1", world.stream, config, CONFIG.k)
    index = open_index(Directory(tmp_path / "index"), world.reader, world.stream.has_next(0, N))
    run(dataclasses.replace(world, index=index), tmp_path / "targets")
    certificate = json.loads((tmp_path / "targets/certificate.json").read_bytes())
    assert certificate["index"] == {"approximate_recall": 0.9}
    assert certificate["recall"]["mean"] > 0.9
