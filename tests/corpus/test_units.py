import functools
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mlp_memory.artifacts import Directory, UserError
from mlp_memory.corpus import tasks, units
from mlp_memory.corpus.config import CorpusConfig
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.corpus.tokenize import tokenize
from mlp_memory.corpus.vocabulary import Vocabulary

UINT16 = np.dtype("<u2")


@pytest.fixture
def vocabulary(tmp_path) -> Directory:
    Vocabulary.from_path("bytes").save(Directory(tmp_path / "vocabulary"), {})
    return Directory(tmp_path / "vocabulary")


@pytest.fixture
def texts(make_text, rng) -> list[str]:
    return [make_text(rng.randrange(1, 60)) for _ in range(120)]


@pytest.fixture
def encode(vocabulary, texts):
    """(folder) -> the tokens of all texts, encoded into that folder."""

    def encode(folder: Path, texts: list[str] = texts, workers: int | None = 1) -> list[int]:
        directory, size = Directory(folder), sum(len(text.encode()) for text in texts)
        done = units.encode_split(directory, vocabulary, iter(texts), size, UINT16, workers)
        assert [encoded.number for encoded in done] == list(range(len(done)))
        assert sum(encoded.num_bytes for encoded in done) == size
        tokens = np.concatenate([units.read_tokens(directory, encoded) for encoded in done])
        bounds = np.cumsum([n for encoded in done for n in encoded.lengths_D])
        assert (tokens[bounds - 1] == 1).all()
        assert len(bounds) == len(texts)
        return tokens.tolist()

    return encode


@pytest.fixture
def expected(texts) -> list[int]:
    return [i for text in texts for i in (1, *(byte + 3 for byte in text.encode()), 1)]


@pytest.fixture(autouse=True)
def small_units(monkeypatch, rng):
    monkeypatch.setattr(units, "UNIT_BYTES", rng.randrange(300, 3000))


@pytest.fixture
def encoded_units(monkeypatch) -> list[int]:
    """How many texts each call of the encoder was given."""
    original, calls = tasks.Encoder.encode, []

    def encode(self, texts):
        calls.append(len(texts))
        return original(self, texts)

    monkeypatch.setattr(tasks.Encoder, "encode", encode)
    return calls


def test_units_are_the_texts_in_order_and_of_one_size(texts):
    cut = list(units.cut_units(texts, "f"))
    assert [text for unit in cut for text in unit.texts] == texts
    assert [unit.number for unit in cut] == list(range(len(cut)))
    for unit in cut[:-1]:
        last = len(unit.texts[-1].encode())
        assert unit.num_bytes - last < units.UNIT_BYTES <= unit.num_bytes
    # A key tells the vocabulary, the texts and where one ends and the next begins.
    keys = [unit.key for unit in cut]
    assert len(set(keys)) == len(keys)
    assert next(units.cut_units(texts, "g")).key != keys[0]
    one, two = (next(units.cut_units(t, "f")).key for t in (["ab", "c"], ["a", "bc"]))
    assert one != two


def test_a_unit_is_encoded_once_however_often_the_run_is_killed(
    tmp_path, encode, expected, texts, encoded_units, rng, monkeypatch
):
    class Killed(BaseException):
        pass

    write, count = Directory.write, len(list(units.cut_units(texts, "")))

    def dying_write(self: Directory, name: str, data: bytes) -> None:
        if rng.random() < 0.2:
            raise Killed
        write(self, name, data)

    kills = 0
    monkeypatch.setattr(Directory, "write", dying_write)
    for _ in range(10 * count):
        try:
            tokens = encode(tmp_path / "train")
            break
        except Killed:
            kills += 1
    assert tokens == expected
    assert len(encoded_units) == count + kills
    encode(tmp_path / "train")
    assert len(encoded_units) == count + kills


def test_units_of_other_texts_and_damaged_ones_are_made_again(
    tmp_path, encode, expected, texts, encoded_units, rng
):
    others = [*texts[:60], "another", *texts[61:]]
    encode(tmp_path / "train", others)
    assert encode(tmp_path / "train") == expected
    for path in rng.sample(sorted((tmp_path / "train/units").iterdir()), 2):
        data = bytearray(path.read_bytes())
        if rng.random() < 0.5:
            path.write_bytes(data[: rng.randrange(len(data))])
        else:
            path.write_bytes(rng.randbytes(len(data)))
    encoded_units.clear()
    assert encode(tmp_path / "train") == expected
    assert len(encoded_units) == 2


def test_two_processes_write_what_one_writes(tmp_path, encode, expected, monkeypatch, encoded_units):
    monkeypatch.setattr(units, "PARALLEL_BYTES", 0)
    assert encode(tmp_path / "two", workers=2) == expected
    assert not encoded_units  # in this process
    assert encode(tmp_path / "one", workers=1) == expected
    one, two = ({p.name for p in (tmp_path / name / "units").iterdir()} for name in ("one", "two"))
    assert one == two


def test_little_text_starts_no_process(monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 4 << 20)
    assert units._processes(64, units.PARALLEL_BYTES - 1) == 1
    assert units._processes(64, units.PARALLEL_BYTES) == 8
    assert units._processes(3, 1 << 40) == 3
    assert units._processes(1, 1 << 40) == 1
    assert 1 <= units._processes(None, 1 << 40) <= os.cpu_count()


def test_an_error_in_a_process_is_one_line(tmp_path, texts):
    absent = Directory(tmp_path / "absent")
    make = functools.partial(units.encode_unit, str(tmp_path / "train"), absent.location, "", UINT16.str)
    with pytest.raises(UserError) as caught:
        list(units._in_processes(make, units.cut_units(texts, ""), 2))
    assert f"{absent} is missing" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_process_that_is_killed_is_one_line():
    with pytest.raises(UserError, match=r"set corpus\.workers to less") as caught:
        list(units._in_processes(os._exit, [9, 9, 9], 2))
    assert "\n" not in str(caught.value)


PROGRAM = """
import sys
from mlp_memory.artifacts import Directory
from mlp_memory.corpus import units
from mlp_memory.corpus.config import CorpusConfig
from mlp_memory.corpus.tokenize import tokenize

if __name__ == "__main__":
    units.UNIT_BYTES, units.PARALLEL_BYTES = int(sys.argv[3]), 0
    config = CorpusConfig("jsonl", sys.argv[2], vocab_file="bytes", workers=2)
    tokenize(Directory(sys.argv[1]), config)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds child processes in /proc")
def test_a_killed_run_leaves_no_process_and_goes_on_from_its_units(
    tmp_path, write_jsonl, make_text, encoded_units, monkeypatch
):
    path = write_jsonl(tmp_path / "in.jsonl", [make_text(60) for _ in range(4000)])
    (tmp_path / "program.py").write_text(PROGRAM)
    size = path.stat().st_size // 60
    command = [sys.executable, tmp_path / "program.py", tmp_path / "killed", path, str(size)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=environment)
    store = tmp_path / "killed/train/units"
    deadline = time.monotonic() + 120
    while not (store.is_dir() and any(store.glob("*.npz"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    children = list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
    threads = Path(f"/proc/{process.pid}/task").iterdir()
    children += [int(c) for t in threads for c in (t / "children").read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(set(children)) >= 2
    for _ in range(1000):
        if not any(map(alive, children)):
            break
        time.sleep(0.01)
    assert not any(map(alive, children))

    kept = len(list(store.glob("*.npz")))
    monkeypatch.setattr(units, "UNIT_BYTES", size)
    config = CorpusConfig("jsonl", str(path), vocab_file="bytes", workers=1)
    tokenize(Directory(tmp_path / "killed"), config)
    resumed = len(encoded_units)
    encoded_units.clear()
    tokenize(Directory(tmp_path / "whole"), config)
    assert resumed == len(encoded_units) - kept

    def contents(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert len(TokenStream.open(Directory(tmp_path / "whole/train"))) > 10_000
    assert not any("units" in name for name in contents(tmp_path / "whole"))


def test_chunks_do_not_depend_on_units(rng):
    from mlp_memory.corpus.tokenize import _rechunk

    values = np.arange(rng.randrange(1, 2000))
    cuts = sorted(rng.choices(range(len(values)), k=rng.randrange(9)))
    pieces, rows = np.split(values, cuts), rng.randrange(1, 300)
    found = list(_rechunk(pieces, rows))
    assert all(len(part) == rows for part in found[:-1])
    assert list(itertools.chain(*found)) == values.tolist()
