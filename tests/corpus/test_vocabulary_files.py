import json
import pickle

import pytest

from mlp_memory.artifacts import UserError
from mlp_memory.corpus import vocabulary_training
from mlp_memory.corpus.vocabulary import Vocabulary


@pytest.fixture
def model(make_text) -> bytes:
    return vocabulary_training.train([make_text(400)], 4000, 320)


@pytest.fixture
def pair(small_tokenizer) -> tuple[bytes, bytes]:
    """GPT-2's two files with a small vocabulary."""
    table = small_tokenizer()["model"]
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in table["merges"])
    return json.dumps(table["vocab"]).encode(), merges.encode()


def test_the_content_and_not_the_name_says_what_a_file_is(tmp_path, model, pair, small_tokenizer):
    files = {"a.txt": model, "b.model": json.dumps(small_tokenizer()).encode()}
    files |= {"my-encoder.json": pair[0], "my-vocab.bpe": pair[1]}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    kinds = {name: Vocabulary.from_path(str(tmp_path / name)).kind for name in files}
    assert kinds == {
        "a.txt": "sentencepiece",
        "b.model": "tokenizers",
        "my-encoder.json": "gpt2",
        "my-vocab.bpe": "gpt2",
    }


def test_a_folder_gives_its_tokenizer_and_what_names_its_borders(tmp_path, model, pair, small_tokenizer):
    table = json.dumps(small_tokenizer()).encode()
    for name, data in zip(("encoder.json", "vocab.bpe"), pair):
        (tmp_path / name).write_bytes(data)
    gpt2 = Vocabulary.from_path(str(tmp_path))
    assert gpt2.files == dict(zip(("vocab.json", "merges.txt"), pair))
    assert gpt2.encode("them all\n") == Vocabulary({"tokenizer.json": table}, "it").encode("them all\n")
    (tmp_path / "spiece.model").write_bytes(model)
    assert Vocabulary.from_path(str(tmp_path)).files == {"tokenizer.model": model}
    (tmp_path / "tokenizer.json").write_bytes(table)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    whole = Vocabulary.from_path(str(tmp_path))
    assert sorted(whole.files) == ["tokenizer.json", "tokenizer_config.json"]
    assert Vocabulary.from_path(str(tmp_path / "tokenizer.json")).files == whole.files


def test_bytes_need_no_file():
    vocabulary = Vocabulary.from_path("bytes")
    assert (vocabulary.size, vocabulary.bos, vocabulary.eos) == (259, 1, 1)
    assert vocabulary.encode("\0a\u00e9") == [3, 100, 198, 172]
    assert vocabulary.piece(100) == "a"
    assert vocabulary.piece(35) == "\u2581"


def test_added_tokens_come_after_the_models(tmp_path, model, hostile):
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "added_tokens.json").write_text('{"<tool>": 320, "<end>": 322}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    vocabulary = Vocabulary.from_path(str(tmp_path))
    assert (vocabulary.size, vocabulary.bos, vocabulary.eos) == (323, 2, 322)
    assert (
        vocabulary.decode([2, *vocabulary.encode("a "), 320, *vocabulary.encode(" b"), 322]) == "a <tool> b"
    )
    for text in hostile(50):
        assert vocabulary.decode(vocabulary.encode(text)) == text
    assert all(vocabulary.piece(i).isprintable() for i in (*range(321), 322))


def damaged(name: str, model: bytes, pair: tuple[bytes, bytes], table: bytes) -> dict[str, bytes]:
    return {
        "empty file": {"x.model": b""},
        "garbage": {"x.model": b"garbage"},
        "binary garbage": {"x.model": b"\n\x00"},
        "pickle": {"x.model": pickle.dumps({"vocab": [1]})},
        "half a model": {"x.model": model[: len(model) // 2]},
        "half a tokenizer.json": {"tokenizer.json": table[: len(table) // 2]},
        "an unknown kind of model": {"tokenizer.json": b'{"version": "1.0", "model": {"type": "Magic"}}'},
        "other JSON": {"tokenizer.json": b'{"text": "hello"}'},
        "a JSON list": {"tokenizer.json": b"[1, 2]"},
        "deep JSON": {"tokenizer.json": b"[" * 100_000},
        "vocabulary alone": {"encoder.json": pair[0]},
        "merges alone": {"vocab.bpe": pair[1]},
        "vocabulary without a telling name": {"words.json": pair[0]},
        "merges of three": {"vocab.json": pair[0], "merges.txt": pair[1] + b"a b c\n"},
        "merges of unknown tokens": {"merges.txt": pair[1] + b"qqq zzz\n", "vocab.json": pair[0]},
        "a vocabulary of words": {"merges.txt": b"#version: 0.2\n", "vocab.json": b'{"the": 0}'},
        "a damaged config": {"tokenizer.json": table, "tokenizer_config.json": b'{"eos_token": '},
        "a config that is a list": {"tokenizer.json": table, "tokenizer_config.json": b"[]"},
        "damaged added tokens": {"tokenizer.json": table, "added_tokens.json": b'{"<x>": "1"}'},
    }[name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("empty file", "is empty"),
        ("garbage", "not a SentencePiece model"),
        ("binary garbage", "not a SentencePiece model"),
        ("pickle", "pickle"),
        ("half a model", "not a SentencePiece model"),
        ("half a tokenizer.json", "not whole JSON"),
        ("an unknown kind of model", "not a tokenizer.json"),
        ("other JSON", "neither a tokenizer.json nor"),
        ("a JSON list", "neither a tokenizer.json nor"),
        ("deep JSON", "not whole JSON"),
        ("vocabulary alone", "merges.txt"),
        ("merges alone", "vocab.json"),
        ("vocabulary without a telling name", "...merges.txt"),
        ("merges of three", "not two tokens"),
        ("merges of unknown tokens", "not a byte-level BPE"),
        ("a vocabulary of words", "not a byte-level BPE"),
        ("a damaged config", "tokenizer_config.json is not JSON"),
        ("a config that is a list", "tokenizer_config.json is a JSON list"),
        ("damaged added tokens", "added_tokens.json"),
    ],
)
def test_wrong_files_are_one_line_that_names_them(tmp_path, model, pair, small_tokenizer, name, said):
    files = damaged(name, model, pair, json.dumps(small_tokenizer()).encode())
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    with pytest.raises(UserError) as caught:
        Vocabulary.from_path(str(tmp_path / next(iter(files))))
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_files_empty_folders_and_two_kinds_are_refused(tmp_path, model, small_tokenizer):
    with pytest.raises(UserError, match=r"absent\.model"):
        Vocabulary.from_path(str(tmp_path / "absent.model"))
    with pytest.raises(UserError, match="folder has no tokenizer"):
        Vocabulary.from_path(str(tmp_path))
    files = {"tokenizer.model": model, "tokenizer.json": json.dumps(small_tokenizer()).encode()}
    with pytest.raises(UserError, match="two tokenizers, sentencepiece and tokenizers"):
        Vocabulary(files, "it")
    with pytest.raises(UserError, match=r"vocab\.json without merges\.txt"):
        Vocabulary({"vocab.json": b"{}"}, "it")
    with pytest.raises(UserError, match="no tokenizer"):
        Vocabulary({"tokenizer_config.json": b"{}"}, "it")
