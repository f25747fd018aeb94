import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlp_memory import artifacts
from mlp_memory.artifacts import Directory, UserError
from mlp_memory.corpus import sentencepiece_model, tasks, units, vocabulary_training
from mlp_memory.corpus.config import SPLITS, CorpusConfig
from mlp_memory.corpus.documents import input_files
from mlp_memory.corpus.split import read_split
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.corpus.tokenize import tokenize
from mlp_memory.corpus.vocabulary import Vocabulary
from mlp_memory.corpus.vocabulary_files import SENTENCEPIECE


def contents(directory: Directory) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory.path)): p.read_bytes() for p in directory.path.rglob("*") if p.is_file()
    }


@pytest.fixture
def config(tmp_path, make_text, write_jsonl, rng) -> CorpusConfig:
    path = write_jsonl(
        tmp_path / "in.jsonl", [make_text(rng.randrange(1, 60)) for _ in range(60)] + ["", "\n"]
    )
    return CorpusConfig(
        "jsonl",
        str(path),
        validation_fraction=0.3,
        test_fraction=0.3,
        vocab_size=330,
        chunk_rows=rng.randrange(200, 900),
    )


@pytest.fixture
def corpus(tmp_path, config) -> Directory:
    directory = Directory(tmp_path / "corpus")
    tokenize(directory, config)
    return directory


def test_not_one_token_is_dropped(corpus, config):
    vocabulary = Vocabulary.load(corpus / "vocabulary")
    for split in SPLITS:
        texts = list(read_split(config, input_files(config), split))
        expected = [[vocabulary.bos, *vocabulary.encode(text), vocabulary.eos] for text in texts]
        stream = TokenStream.open(corpus / split)
        assert stream.tokens[0 : len(stream)].tolist() == [i for ids in expected for i in ids]
        assert np.diff(stream.bounds_D1).tolist() == [len(ids) for ids in expected]
        for text, start, stop in zip(texts, stream.bounds_D1, stream.bounds_D1[1:]):
            assert vocabulary.decode(stream.tokens[start:stop]) == text
        facts = stream.manifest.facts
        assert facts["documents"] == len(texts)
        assert facts["tokens"] == len(stream)
        assert facts["bytes"] == sum(len(text.encode()) for text in texts)
        assert facts["words"] == sum(len(text.split()) for text in texts)
        assert stream.manifest.parents == {"vocabulary": vocabulary.fingerprint}
        assert stream.vocab_size == vocabulary.size == 330
        assert stream.tokens.dtype == np.uint16
    empty = [TokenStream.open(corpus / split).manifest.facts["empty_documents"] for split in SPLITS]
    assert sum(empty) == 1


def test_seqio_gives_the_ids_of_the_vocabulary_bos_and_eos_around(rng, make_text):
    texts = [make_text(rng.randrange(1, 400)) for _ in range(10)] + ["\n" * 300, "\0", "a\0\0", "\ufeff"]
    model = vocabulary_training.train(texts, len("".join(texts).encode()), 330)
    for vocabulary in (
        Vocabulary({SENTENCEPIECE: model}, "trained"),
        Vocabulary.from_path("bytes"),
    ):
        expected = [[vocabulary.bos, *vocabulary.encode(text), vocabulary.eos] for text in texts]
        encoder = tasks.Encoder(vocabulary)
        for some in (slice(0, 5), slice(0, 0), slice(None)):
            assert [ids_T.tolist() for ids_T in encoder.encode(texts[some])] == expected[some]
        adapter = tasks.SeqioVocabulary(vocabulary)
        assert (adapter.vocab_size, adapter.bos_id, adapter.eos_id) == (
            vocabulary.size,
            vocabulary.bos,
            vocabulary.eos,
        )
        for text in texts:
            ids_T = adapter.encode_tf(text)
            assert adapter.decode(ids_T) == text
            assert adapter.decode_tf(ids_T).numpy().decode() == text


def test_long_documents_encoded_in_parts_are_the_same_tokens(rng, make_text, monkeypatch):
    texts = [make_text(rng.randrange(1, 400)) for _ in range(10)]
    texts += ["\n" * 300, "x" * 500, "\n" + "y" * 300 + "\n"]
    model = vocabulary_training.train(texts, len("".join(texts).encode()), 330)
    vocabulary = Vocabulary({SENTENCEPIECE: model}, "trained")
    whole = [vocabulary.encode(text) for text in texts]
    monkeypatch.setattr(sentencepiece_model, "SEGMENT_CHARACTERS", rng.randrange(1, 200))
    assert [vocabulary.encode(text) for text in texts] == whole


def test_parts_of_a_text_are_the_text(rng, make_text):
    for _ in range(50):
        text, size = make_text(rng.randrange(1, 200)), rng.randrange(1, 300)
        parts = sentencepiece_model.cut(text, size)
        assert "".join(parts) == text
        assert all(part.endswith("\n") for part in parts[:-1])
        assert all("\n" not in part[size - 1 : -1] for part in parts)
        assert len(parts) > 1 or len(text) <= size or "\n" not in text[size - 1 : -1]


def test_another_process_writes_the_same_bytes(tmp_path, corpus, config):
    code = (
        "import json, sys; from mlp_memory.artifacts import Directory;"
        "from mlp_memory.corpus.config import CorpusConfig; from mlp_memory.corpus.tokenize import tokenize;"
        "tokenize(Directory(sys.argv[1]), CorpusConfig(**json.loads(sys.argv[2])))"
    )
    settings = json.dumps(artifacts.config_dict(config))
    subprocess.run([sys.executable, "-c", code, tmp_path / "other", settings], check=True)
    assert contents(Directory(tmp_path / "other")) == contents(corpus)


class Killed(BaseException):
    pass


def test_a_kill_at_any_write_and_a_second_run_give_the_same_bytes(tmp_path, corpus, config, rng, monkeypatch):
    whole, write = contents(corpus), Directory.write
    writes = 0

    def dying_write(self: Directory, name: str, data: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes == last:
            raise Killed
        write(self, name, data)

    monkeypatch.setattr(Directory, "write", dying_write)
    last = 0
    tokenize(Directory(tmp_path / "counted"), config)
    total = writes
    assert total >= 15
    for last in rng.sample(range(1, total + 1), 6):
        directory, writes = Directory(tmp_path / f"killed-{last}"), 0
        with pytest.raises(Killed):
            tokenize(directory, config)
        assert contents(directory) != whole
        tokenize(directory, config)
        assert contents(directory) == whole


def test_whatever_is_deleted_or_damaged_is_made_again(corpus, config, rng):
    whole = contents(corpus)
    # Half a manifest is for a person to decide on (a test of artifacts).
    manifests = [name for name in whole if name.endswith("manifest.json")]
    for _ in range(5):
        for name in rng.sample(sorted(whole), rng.randrange(1, 6)):
            path = corpus.path / name
            path.unlink() if name in manifests or rng.random() < 0.6 else path.write_bytes(
                whole[name][: len(whole[name]) // 2]
            )
        tokenize(corpus, config)
        assert contents(corpus) == whole


def test_finished_parts_are_not_written_again(corpus, config):
    def times() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in corpus.path.rglob("*") if p.is_file()}

    before = times()
    tokenize(corpus, config)
    assert times() == before
    (corpus.path / "test" / "bounds.i64").unlink()
    tokenize(corpus, config)
    after = times()
    assert {name for name in before if before[name] != after[name]} == {n for n in before if "/test/" in n}


def test_a_finished_corpus_needs_no_input_but_refuses_a_changed_one(corpus, config):
    path = Path(config.train_files[0])
    data = path.read_bytes()
    path.unlink()
    tokenize(corpus, config)
    path.write_bytes(data + b'{"text": "more"}\n')
    with pytest.raises(UserError) as caught:
        tokenize(corpus, config)
    assert str(path) in str(caught.value)
    assert f"delete {corpus}" in str(caught.value)


def test_another_config_is_refused_with_both_values(corpus, config):
    with pytest.raises(UserError) as caught:
        tokenize(corpus, dataclasses.replace(config, vocab_size=331))
    assert "vocab_size = 330, now it is 331" in str(caught.value)


def test_a_given_vocabulary_is_taken_over_and_wide_ids_are_uint32(tmp_path, config, make_text):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(
        vocabulary_training.train([make_text(500)], 4000, 330)
    )
    for number in range(70_000):
        proto.pieces.add(piece=f"<extra {number}>", score=-1e9)
    proto.pieces.add(piece="Z", score=-1e9)
    path = tmp_path / "wide.model"
    path.write_bytes(proto.SerializeToString())
    text = tmp_path / "z.jsonl"
    text.write_text('{"text": "Z"}\n')
    directory = Directory(tmp_path / "wide")
    tokenize(
        directory,
        dataclasses.replace(
            config, vocab_file=str(path), validation_files=config.train_files, train_files=(str(text),)
        ),
    )
    vocabulary = Vocabulary.load(directory / "vocabulary")
    assert vocabulary.files == {SENTENCEPIECE: path.read_bytes()}
    assert vocabulary.size == 70_331
    stream = TokenStream.open(directory / "train")
    assert stream.vocab_size == 70_331
    assert stream.tokens.dtype == np.uint32
    assert stream.tokens[0:3].tolist() == [2, *vocabulary.encode("Z"), 3] == [2, 70_330, 3]


def test_a_model_without_bos_uses_eos_for_both(tmp_path, config, make_text):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_text(2000).splitlines()),
        model_writer=model,
        vocab_size=100,
        bos_id=-1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    path = tmp_path / "plain.model"
    path.write_bytes(model.getvalue())
    directory = Directory(tmp_path / "plain")
    tokenize(directory, dataclasses.replace(config, vocab_file=str(path)))
    vocabulary = Vocabulary.load(directory / "vocabulary")
    assert vocabulary.bos == vocabulary.eos
    given = Vocabulary.from_path(str(path), lossless=False)
    assert [vocabulary.piece(i) for i in range(given.size)] == [given.piece(i) for i in range(given.size)]
    texts = read_split(config, input_files(config), "train")
    expected = [[vocabulary.eos, *vocabulary.encode(text), vocabulary.eos] for text in texts]
    stream = TokenStream.open(directory / "train")
    assert stream.tokens[0 : len(stream)].tolist() == [i for ids in expected for i in ids]


@pytest.mark.parametrize(
    ("content", "values", "named"),
    [
        (b'{"text": "x"}\n{"text": 3}\n', {}, "line 2"),
        (b'{"text": "x"}\n{"text": "\xff"}\n', {}, "line 2"),
        (b'{"text": ""}\n', {}, "no document with text"),
        (b'{"text": "x"}\n{"text": "y"}\n', {"validation_fraction": 0.0}, "validation_fraction"),
        (
            b'{"text": "some words"}\n' * 9,
            {"vocab_size": 99999, "validation_files": "v", "test_files": "s"},
            "99999",
        ),
        (b'{"text": "x"}\n', {"vocab_file": "absent.model"}, "absent.model"),
        (b'{"text": "x"}\n', {"vocab_file": "in.jsonl"}, "neither a tokenizer.json"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(tmp_path, monkeypatch, content, values, named):
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_bytes(content)
    for name in ("v", "s"):
        Path(name).write_text(json.dumps({"text": f"held out {name}"}))
    directory = Directory(tmp_path / "corpus")
    with pytest.raises(UserError) as caught:
        tokenize(directory, CorpusConfig("jsonl", "in.jsonl", **values))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not directory.path.exists()


def test_bad_input_is_found_before_tensorflow_is_imported(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{")
    code = """
import sys
from mlp_memory.artifacts import Directory, UserError
from mlp_memory.corpus.config import CorpusConfig
from mlp_memory.corpus.tokenize import tokenize
for name in ("absent.jsonl", "*.txt", "bad.jsonl"):
    try:
        tokenize(Directory(sys.argv[1] + "/corpus"), CorpusConfig("jsonl", f"{sys.argv[1]}/{name}"))
    except UserError as error:
        print(error)
sys.exit(len({"tensorflow", "seqio", "tensorflow_text"} & set(sys.modules)))
"""
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [name in line for name, line in zip(("absent.jsonl", "*.txt", "bad.jsonl, line 1"), lines)] == [
        True
    ] * 3


def test_files_changed_while_they_are_read_are_noticed(tmp_path, config, monkeypatch):
    original = units.encode_split

    def encode_split(*arguments):
        lines = Path(config.train_files[0]).read_bytes().split(b"\n")  # texts hold other separators too
        Path(config.train_files[0]).write_bytes(b"\n".join([*lines[:-11], b""]))
        return original(*arguments)

    monkeypatch.setattr(units, "encode_split", encode_split)
    with pytest.raises(UserError, match="were the files changed"):
        tokenize(Directory(tmp_path / "corpus"), config)


def test_python_docs_are_tokenised_whole(tmp_path, monkeypatch, make_text):
    from mlp_memory.corpus import python_docs

    documents = tuple(make_text(40) for _ in range(80))
    monkeypatch.setattr(python_docs, "documents", lambda: documents)
    directory = Directory(tmp_path / "corpus")
    tokenize(directory, CorpusConfig(vocab_size=320, validation_fraction=0.2, test_fraction=0.2))
    vocabulary = Vocabulary.load(directory / "vocabulary")
    found = []
    for split in SPLITS:
        stream = TokenStream.open(directory / split)
        found += [
            vocabulary.decode(stream.tokens[a:b]) for a, b in zip(stream.bounds_D1, stream.bounds_D1[1:])
        ]
    assert sorted(found) == sorted(documents)
    model = (directory / "vocabulary").read(SENTENCEPIECE)
    assert TokenStream.open(directory / "train").manifest.parents["vocabulary"] == vocabulary.fingerprint
    facts = artifacts.peek(directory / "vocabulary").facts
    assert facts["files"] == {SENTENCEPIECE: hashlib.sha256(model).hexdigest()}
