import hashlib
import subprocess
import sys

import numpy as np
import pytest

from mlp_memory import artifacts
from mlp_memory.arrays import ChunkWriter
from mlp_memory.artifacts import ArraySpec, Directory, UserError
from mlp_memory.corpus.stream import BOUNDS_NAME, KIND, TokenStream


def write_stream(
    directory: Directory, tokens: np.ndarray, bounds: list[int], vocab_size: int, chunk_rows: int
) -> None:
    spec = ArraySpec(tokens.shape, tokens.dtype.name, chunk_rows)
    writer = ChunkWriter(directory, artifacts.begin(directory, KIND, {}, {}, {"tokens": spec}))
    for chunk in range(len(writer)):
        start, stop = writer.rows(chunk)
        writer.write(chunk, tokens=tokens[start:stop])
    data = np.array(bounds, "<i8").tobytes()
    directory.write(BOUNDS_NAME, data)
    sha256 = hashlib.sha256(data).hexdigest()
    writer.finish(vocab_size=vocab_size, words=11, bytes=22, bounds_sha256=sha256)


@pytest.fixture
def made(tmp_path, rng) -> tuple[TokenStream, np.ndarray, list[int], Directory]:
    lengths = [rng.choice([1, 2, 3, 20]) for _ in range(rng.randrange(1, 40))]
    bounds = [0, *np.cumsum(lengths).tolist()]
    tokens = np.array([rng.randrange(70_000) for _ in range(bounds[-1])], np.uint32)
    directory = Directory(tmp_path / "train")
    write_stream(directory, tokens, bounds, 70_000, rng.randrange(1, 17))
    return TokenStream.open(directory), tokens, bounds, directory


def test_every_range_is_what_a_walk_over_the_documents_gives(made, rng):
    stream, tokens, bounds, _ = made
    rows = len(tokens)
    document = [d for d in range(len(bounds) - 1) for _ in range(bounds[d], bounds[d + 1])]
    follows = [i + 1 < rows and document[i] == document[i + 1] for i in range(rows)]
    labels = [int(tokens[i + 1]) if follows[i] else 0 for i in range(rows)]
    ranges = [(0, rows), (0, 0), (rows, rows), (rows - 1, rows)]
    ranges += [tuple(sorted((rng.randrange(rows + 1), rng.randrange(rows + 1)))) for _ in range(40)]
    for start, stop in ranges:
        assert stream.has_next(start, stop).tolist() == follows[start:stop]
        assert stream.document_ids(start, stop).tolist() == document[start:stop]
        assert stream.labels(start, stop).tolist() == labels[start:stop]
        assert stream.tokens[start:stop].tolist() == tokens[start:stop].tolist()
    assert stream.labels(0, rows).dtype == stream.document_ids(0, rows).dtype == np.int32
    assert stream.has_next(0, rows).dtype == np.bool_
    assert (len(stream), stream.num_scored) == (rows, sum(follows))
    assert (stream.words, stream.num_bytes, stream.vocab_size) == (11, 22, 70_000)


def test_rows_outside_the_stream_are_refused(made):
    stream = made[0]
    for start, stop in [(-1, 1), (0, len(stream) + 1), (1, 0)]:
        for method in (stream.has_next, stream.document_ids, stream.labels):
            with pytest.raises(IndexError):
                method(start, stop)


def test_a_damaged_part_is_refused(made, rng):
    directory = made[3]
    # Of checksums.json only `verify` asks.
    files = [p for p in directory.path.rglob("*") if p.is_file() and p.name != "checksums.json"]
    assert len(files) >= 4
    for path in files:
        whole = path.read_bytes()
        for damaged in (whole[: rng.randrange(len(whole))], None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(UserError) as caught:
                TokenStream.open(directory)
            assert "\n" not in str(caught.value)
            path.write_bytes(whole)
    TokenStream.open(directory)


def test_a_changed_byte_of_tokens_or_bounds_is_refused(made, rng):
    directory = made[3]
    for path in [*(directory.path / "tokens" / "c").iterdir(), directory.path / BOUNDS_NAME]:
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(UserError):
            TokenStream.open(directory)
        path.write_bytes(whole)


@pytest.mark.parametrize("bounds", [[0, 3, 9], [1, 3, 10], [0, 5, 5, 10], [0, 7, 3, 10]])
def test_bounds_that_do_not_fit_are_refused(tmp_path, bounds):
    directory = Directory(tmp_path / "train")
    write_stream(directory, np.zeros(10, np.uint16), bounds, 5, 4)
    with pytest.raises(UserError, match="does not fit 10 tokens"):
        TokenStream.open(directory)


def test_a_token_beyond_the_vocabulary_is_refused_at_open_and_while_reading(tmp_path, rng, monkeypatch):
    tokens = np.full(20, 4, np.uint16)
    bad = rng.randrange(1, 20)
    tokens[bad] = 5
    directory = Directory(tmp_path / "train")
    write_stream(directory, tokens, [0, 20], 5, 6)
    with pytest.raises(UserError, match="token 5"):
        TokenStream.open(directory)
    monkeypatch.setattr("mlp_memory.corpus.stream._CHECKED_ROWS", 19)
    stream = TokenStream.open(directory)
    assert stream.tokens[0:bad].tolist() == [4] * bad
    for read in (lambda: stream.tokens[bad - 1 : bad + 1], lambda: stream.labels(bad - 1, bad)):
        with pytest.raises(UserError, match="token 5"):
            read()


def test_a_missing_or_other_artifact_is_refused(tmp_path):
    with pytest.raises(UserError, match="run `python -m mlp_memory tokenize`"):
        TokenStream.open(Directory(tmp_path / "train"))
    other = Directory(tmp_path / "other")
    artifacts.finish(other, artifacts.begin(other, "vocabulary", {}, {}))
    with pytest.raises(UserError, match="not a token stream"):
        TokenStream.open(other)


def test_reading_a_stream_imports_no_tensorflow_seqio_or_sentencepiece():
    code = (
        "import sys; import mlp_memory.corpus.stream, mlp_memory.corpus.config;"
        "heavy = {'tensorflow', 'tensorflow_text', 'seqio', 'sentencepiece', 'jax', 'scann'};"
        "sys.exit(len(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
