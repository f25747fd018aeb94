import itertools
import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mlp_memory.artifacts import Directory, UserError
from mlp_memory.corpus import vocabulary_training
from mlp_memory.corpus.vocabulary import Vocabulary
from mlp_memory.corpus.vocabulary_files import SENTENCEPIECE


def train(texts: list[str], size: int) -> Vocabulary:
    model = vocabulary_training.train(texts, len("".join(texts).encode()), size)
    return Vocabulary({SENTENCEPIECE: model}, "trained")


def test_decoding_gives_back_every_text(rng, make_text):
    vocabulary = train([make_text(400) for _ in range(5)], 400)
    alphabets = [
        (0, 0x80),
        (0, 0x250),
        (0x2500, 0x2600),
        (0x4E00, 0x9FFF),
        (0xE000, 0x110000),
        (0xF8F0, 0xF900),
    ]
    random_texts = [
        "".join(chr(rng.randrange(*rng.choice(alphabets))) for _ in range(rng.randrange(1, 60)))
        for _ in range(500)
    ]
    for text in [*random_texts, *(make_text(60) for _ in range(100)), "", " ", "\n", "\u2581", "\r\n\t "]:
        ids = vocabulary.encode(text)
        assert vocabulary.decode(ids) == text
        assert not {0, 1, vocabulary.bos, vocabulary.eos} & set(ids)
        assert vocabulary.decode([vocabulary.bos, *ids, vocabulary.eos]) == text
        assert all(0 <= i < vocabulary.size for i in ids)


def test_source_code_survives_and_is_compressed():
    texts = [p.read_text() for p in sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py"))]
    vocabulary = train(texts, 1000)
    assert vocabulary.size == 1000
    for text in texts:
        ids = vocabulary.encode(text)
        assert vocabulary.decode(ids) == text
        assert len(ids) < len(text.encode()) / 2


def test_ids_are_as_documented(make_text):
    vocabulary = train([make_text(400)], 320)
    assert (vocabulary.bos, vocabulary.eos) == (2, 3)
    assert vocabulary.encode("\n") == [4]
    assert vocabulary.encode("\0\x01") == [5, 6]
    assert vocabulary.piece(4) == "\\n"
    assert all(vocabulary.piece(i).isprintable() for i in range(vocabulary.size))


def test_the_model_does_not_depend_on_the_process(tmp_path, make_text):
    texts = [make_text(500) for _ in range(4)]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = (
        "import json, sys; from mlp_memory.corpus import vocabulary_training as v;"
        "texts = json.load(open(sys.argv[1]));"
        "sys.stdout.buffer.write(v.train(texts, len(''.join(texts).encode()), 380))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "texts.json"], capture_output=True, check=True
    )
    assert other.stdout == train(texts, 380).files[SENTENCEPIECE]
    assert other.stderr == b""


@pytest.mark.parametrize("size", [100_000, 262])
def test_the_size_that_the_message_names_works_and_is_the_border(make_text, size):
    texts = [make_text(100)]
    with pytest.raises(UserError) as caught:
        train(texts, size)
    border = int(re.search(r"set it to (\d+)", str(caught.value))[1])
    assert "\n" not in str(caught.value)
    assert train(texts, border).size == border
    with pytest.raises(UserError):
        train(texts, border + (1 if size > border else -1))


def test_a_text_of_line_ends_alone_is_refused():
    with pytest.raises(UserError, match="no text but line ends"):
        train(["\n\n\n"], 300)


def test_the_sample_is_even_and_of_the_right_size(rng):
    share = rng.uniform(0.01, 1.0)
    lines = [str(i) for i in range(2000)]
    kept = list(map(int, vocabulary_training._sample(lines, share)))
    assert abs(len(kept) - 2000 * share) <= 1
    assert max(b - a for a, b in itertools.pairwise(kept)) <= 1 / share + 1
    assert list(vocabulary_training._sample(lines, 1.0)) == lines


def test_long_lines_reach_the_trainer_whole(make_text):
    line = make_text(3000).replace("\n", " ") * 3
    lines = list(vocabulary_training._lines([line, "a\nb"]))
    assert "".join(lines) == line + "ab"
    assert max(map(len, lines)) <= 1000
    assert max(len(piece.encode()) for piece in lines) < 4192


def test_a_damaged_or_missing_model_is_refused(tmp_path, rng, make_text):
    vocabulary = train([make_text(300)], 300)
    directory = Directory(tmp_path / "vocabulary")
    with pytest.raises(UserError, match="tokenize"):
        Vocabulary.load(directory)
    vocabulary.save(directory, {})
    assert Vocabulary.load(directory).files == vocabulary.files
    model = bytearray(vocabulary.files[SENTENCEPIECE])
    model[rng.randrange(len(model))] ^= 1 << rng.randrange(8)
    directory.write(SENTENCEPIECE, bytes(model))
    with pytest.raises(UserError, match="damaged"):
        Vocabulary.load(directory)
    (directory.path / SENTENCEPIECE).unlink()
    with pytest.raises(UserError, match="missing"):
        Vocabulary.load(directory)


def test_ids_outside_the_vocabulary_are_refused(make_text):
    vocabulary = train([make_text(300)], 300)
    for bad in (300, -1):
        with pytest.raises(IndexError):
            vocabulary.decode([5, bad])
        with pytest.raises(IndexError):
            vocabulary.piece(bad)
