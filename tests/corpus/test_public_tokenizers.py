"""Tokenizers that people use, on real and on hostile text. MLP_MEMORY_WIKI_BYTES sets how much of it."""

import json
import lzma
import os
import time
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from mlp_memory.artifacts import Directory
from mlp_memory.corpus.config import SPLITS, CorpusConfig
from mlp_memory.corpus.documents import input_files
from mlp_memory.corpus.split import read_split
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.corpus.tokenize import tokenize
from mlp_memory.corpus.vocabulary import Vocabulary

DATA = Path(__file__).parents[3] / "shared/data"
WIKI = DATA / "corpora/enwiki2015/validation.jsonl.xz"
# With T5's 256 byte pieces; its second file has <s> and 100 sentinels more than its first.
SIZES = {
    "gpt2_encoder.json": 50257,
    "llama2_tokenizer.model": 32000,
    "mistral_v1_tokenizer.model": 32000,
    "mistral_v3_tokenizer.model": 32768,
    "smollm2_tokenizer.json": 49152,
    "t5_spiece.model": 32000 + 256,
    "t5_cc_all.32000.100extra.model": 32101 + 256,
    "bytes": 259,
}
# "Hello world" in each, as the models' users know it; Mistral's third has 768 control ids before the
# rest, and T5's second <s>.
HELLO_WORLD = {
    "gpt2_encoder.json": [15496, 995],
    "llama2_tokenizer.model": [15043, 3186],
    "mistral_v1_tokenizer.model": [22557, 1526],
    "mistral_v3_tokenizer.model": [22557 + 768, 1526 + 768],
    "smollm2_tokenizer.json": [19556, 905],
    "t5_spiece.model": [8774, 296],
    "t5_cc_all.32000.100extra.model": [8774 + 1, 296 + 1],
    "bytes": [byte + 3 for byte in b"Hello world"],
}
SENTENCEPIECE = [name for name in SIZES if name.endswith(".model")]


def path_of(name: str) -> str:
    if name == "bytes":
        return name
    path = DATA / "tokenizers" / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return str(path)


@pytest.fixture(params=SIZES)
def name(request) -> str:
    return request.param


@pytest.fixture
def vocabulary(name) -> Vocabulary:
    return Vocabulary.from_path(path_of(name))


@pytest.fixture(scope="module")
def wiki() -> list[str]:
    """The first articles of enwiki2015's validation file, cut to the wanted number of bytes."""
    if not WIKI.exists():
        pytest.skip(f"{WIKI} is not here")
    left, texts = int(os.environ.get("MLP_MEMORY_WIKI_BYTES", 1_000_000)), []
    with lzma.open(WIKI, "rt", encoding="utf-8") as file:
        for line in file:
            data = json.loads(line)["text"].encode()[:left]
            texts.append(data.decode(errors="ignore"))
            left -= len(data)
            if left <= 0:
                break
    return texts


def test_what_tokenize_wrote_is_the_text(name, wiki, hostile, tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "train.jsonl", wiki)
    odd = write_jsonl(tmp_path / "odd.jsonl", hostile(60))
    directory = Directory(tmp_path / "corpus")
    config = CorpusConfig("jsonl", str(path), str(odd), vocab_file=path_of(name))
    start = time.monotonic()
    tokenize(directory, config)
    seconds = time.monotonic() - start
    vocabulary = Vocabulary.load(directory / "vocabulary")
    for split in SPLITS:
        stream, texts = (
            TokenStream.open(directory / split),
            list(read_split(config, input_files(config), split)),
        )
        tokens_T, bounds = stream.tokens[0 : len(stream)], stream.bounds_D1.tolist()
        assert len(bounds) - 1 == len(texts)
        for text, a, b in zip(texts, bounds, bounds[1:]):
            assert vocabulary.decode(tokens_T[a:b]) == text
            assert (tokens_T[a], tokens_T[b - 1]) == (vocabulary.bos, vocabulary.eos)
            assert not {vocabulary.bos, vocabulary.eos} & set(tokens_T[a + 1 : b - 1].tolist())
        assert stream.manifest.facts["lossy_documents"] == 0
    count, size = len(TokenStream.open(directory / "train")), sum(len(text.encode()) for text in wiki)
    print(f"{name}: {size:,} bytes, {count:,} tokens, {size / count:.2f} bytes a token, {seconds:.1f} s")


def test_sizes_borders_and_ids_are_those_the_models_use(name, vocabulary):
    assert vocabulary.size == SIZES[name]
    assert vocabulary.encode("Hello world") == HELLO_WORLD[name]
    borders = {"gpt2": (50256, 50256), "llama": (1, 2), "mistr": (1, 2), "smoll": (0, 0), "bytes": (1, 1)}
    expected = borders | {"t5_sp": (1, 1), "t5_cc": (2, 1)}
    assert (vocabulary.bos, vocabulary.eos) == expected[next(key for key in expected if name.startswith(key))]


def test_hostile_texts_come_back(vocabulary, hostile):
    for text in [*hostile(400), ""]:
        ids = vocabulary.encode(text)
        assert vocabulary.decode([vocabulary.bos, *ids, vocabulary.eos]) == text
        assert not {vocabulary.bos, vocabulary.eos} & set(ids)
        assert all(0 <= i < vocabulary.size for i in ids)


def test_every_piece_is_printable(vocabulary):
    assert all(vocabulary.piece(i).isprintable() for i in range(vocabulary.size))


def test_what_was_saved_is_the_same_vocabulary(vocabulary, hostile, tmp_path):
    vocabulary.save(Directory(tmp_path), {})
    loaded = Vocabulary.load(Directory(tmp_path))
    assert (loaded.size, loaded.bos, loaded.eos) == (vocabulary.size, vocabulary.bos, vocabulary.eos)
    for text in hostile(20):
        assert loaded.encode(text) == vocabulary.encode(text)


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_the_name_of_a_control_piece_stays_text(vocabulary, name):
    proto = sentencepiece_model_pb2.ModelProto.FromString(Path(path_of(name)).read_bytes())
    types = proto.SentencePiece.Type
    outside = (types.CONTROL, types.USER_DEFINED)
    special = {i: p.piece.replace("\u2581", " ") for i, p in enumerate(proto.pieces) if p.type in outside}
    assert special
    for spelled in special.values():
        text = f"a{spelled}b"
        ids = vocabulary.encode(text)
        assert not special.keys() & set(ids)
        assert vocabulary.decode(ids) == text


def test_the_name_of_an_added_token_stays_text():
    vocabulary = Vocabulary.from_path(path_of("smollm2_tokenizer.json"))
    table = json.loads(Path(path_of("smollm2_tokenizer.json")).read_bytes())
    special = {token["id"]: token["content"] for token in table["added_tokens"]}
    assert len(special) > 10
    for content in special.values():
        ids = vocabulary.encode(f"a{content} b")
        assert not special.keys() & set(ids)
        assert vocabulary.decode(ids) == f"a{content} b"


@pytest.mark.parametrize("name", [name for name in SENTENCEPIECE if not name.startswith("t5")])
def test_models_with_byte_fallback_keep_their_tokenisation(name, vocabulary, hostile, wiki):
    given = sentencepiece.SentencePieceProcessor(model_file=path_of(name))
    texts = [text for text in hostile(200) if "\u2581" not in text] + wiki[:1]
    assert len(texts) > 100
    assert [vocabulary.encode(text) for text in texts] == [given.encode(text) for text in texts]


@pytest.mark.parametrize("name", [name for name in SENTENCEPIECE if name.startswith("t5")])
def test_a_lossless_t5_has_the_ids_of_t5_where_t5_loses_nothing(name, vocabulary, rng):
    given = Vocabulary.from_path(path_of(name), lossless=False)
    assert [vocabulary.piece(i) for i in range(given.size)] == [given.piece(i) for i in range(given.size)]
    letters = "abcdefghijklmnopqrstuvwxyzABCDE"
    words = ["".join(rng.choices(letters, k=rng.randrange(1, 9))) for _ in range(300)]
    for _ in range(50):
        text = " ".join(rng.choices(words, k=rng.randrange(1, 30)))
        assert vocabulary.encode(text) == given.encode(text)
    lost = "a  b\n{"
    assert given.decode(given.encode(lost)) != lost == vocabulary.decode(vocabulary.encode(lost))


def test_either_half_of_gpt2s_pair_names_both(tmp_path):
    halves = [Path(path_of("gpt2_encoder.json")), Path(path_of("gpt2_vocab.bpe"))]
    vocabularies = [Vocabulary.from_path(str(half)) for half in halves]
    for name, half in zip(("vocab.json", "merges.txt"), halves):
        (tmp_path / name).write_bytes(half.read_bytes())
    vocabularies.append(Vocabulary.from_path(str(tmp_path)))
    assert all(v.files == vocabularies[0].files for v in vocabularies)
    assert vocabularies[0].encode("a  b\n") == [64, 220, 275, 198]
