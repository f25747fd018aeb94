import json

import pytest
import tokenizers

from mlp_memory.artifacts import Directory, UserError
from mlp_memory.corpus.config import CorpusConfig
from mlp_memory.corpus.json_tokenizer import byte_names
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.corpus.tokenize import tokenize
from mlp_memory.corpus.vocabulary import Vocabulary


def vocabulary_of(table: dict, **extras: object) -> Vocabulary:
    lossless = extras.pop("lossless", True)
    files = {f"{name}.json": json.dumps(value).encode() for name, value in extras.items()}
    return Vocabulary({"tokenizer.json": json.dumps(table).encode(), **files}, "it", lossless=lossless)


def without(table: dict, names: list[str]) -> dict:
    """The tokenizer less some tokens of one byte, its other ids as they were."""
    model = table["model"]
    kept = {token: i for token, i in model["vocab"].items() if not set(token) & set(names)}
    merges = [pair for pair in model["merges"] if not set("".join(pair)) & set(names)]
    return table | {"model": model | {"vocab": kept, "merges": merges}}


def test_byte_names_are_the_librarys():
    assert sorted(byte_names()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    one = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert one.pre_tokenize_str("\0 a\u00e9\U0010ffff")[0][0] == "".join(
        byte_names()[byte] for byte in "\0 a\u00e9\U0010ffff".encode()
    )


def test_hostile_texts_come_back_with_any_bytes_missing(rng, small_tokenizer, hostile):
    # Those of the escape, of hexadecimal digits and of the special token stay; a text with a P there is.
    free = sorted({*range(256)} - {*"0123456789abcdef\uf8fd<|endoftext|>P".encode()})
    missing = {ord("P"), *rng.sample(free, rng.randrange(30))}
    table = without(small_tokenizer(), [byte_names()[byte] for byte in missing])
    vocabulary, bare = vocabulary_of(table), vocabulary_of(table, lossless=False)
    assert vocabulary.size == bare.size
    whole = lost = 0
    for text in ["the", *hostile(300), "\uf8fd41\uf8fd", "\uf8fd\uf8fd", "\uf8fd"]:
        assert vocabulary.decode([vocabulary.bos, *vocabulary.encode(text), vocabulary.eos]) == text
        if missing & {*text.encode()}:
            # What is left of a lone U+FFFD decodes to U+FFFD.
            lost += bare.decode(bare.encode(text)) != text
        elif "\uf8fd" not in text:
            assert vocabulary.encode(text) == bare.encode(text)
            whole += 1
    assert lost
    assert whole


def test_truncation_padding_dropout_and_templates_of_the_file_are_not_applied(small_tokenizer, make_text):
    table = small_tokenizer()
    text = make_text(200)
    plain = vocabulary_of(table).encode(text)
    table["truncation"] = {"max_length": 5, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    table["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    table["model"]["dropout"] = 0.5
    special = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    sequence = [
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    table["post_processor"] = {
        "type": "TemplateProcessing",
        "single": sequence,
        "pair": [*sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": special},
    }
    assert vocabulary_of(table).encode(text) == plain
    assert vocabulary_of(table).encode("the") == vocabulary_of(small_tokenizer()).encode("the")


def test_ids_with_holes_count_to_the_highest(small_tokenizer):
    table = small_tokenizer()
    table["model"]["vocab"]["far"] = 1000
    vocabulary = vocabulary_of(table)
    assert vocabulary.size == 1001
    assert vocabulary.piece(999) == "<no token 999>"
    assert all(vocabulary.piece(i).isprintable() for i in range(vocabulary.size))


def test_documents_that_a_normaliser_changes_are_counted(tmp_path, small_tokenizer, write_jsonl, capsys):
    path = tmp_path / "lower.json"
    path.write_text(json.dumps(small_tokenizer(normalizer={"type": "Lowercase"})))
    texts = [f"Text {n}" if n % 3 else f"text {n}" for n in range(30)]
    held_out = [write_jsonl(tmp_path / f"{name}.jsonl", [name]) for name in ("validation", "Test")]
    directory = Directory(tmp_path / "corpus")
    train = write_jsonl(tmp_path / "train.jsonl", texts)
    tokenize(directory, CorpusConfig("jsonl", str(train), *map(str, held_out), vocab_file=str(path)))
    lossy = {s: TokenStream.open(directory / s).manifest.facts["lossy_documents"] for s in ("train", "test")}
    assert lossy == {"train": 20, "test": 1}
    error = capsys.readouterr().err
    assert "train: 20 of 30 documents" in error
    assert "validation:" not in error


def test_where_bos_and_eos_come_from(small_tokenizer):
    def added(*names: str) -> dict:
        table = small_tokenizer()
        token = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        first = len(table["model"]["vocab"])
        table["added_tokens"] += [{**token, "id": first + n, "content": c} for n, c in enumerate(names)]
        return table

    table = added("<s>", "</s>", "<a>", "<b>")
    ids = {token["content"]: token["id"] for token in table["added_tokens"]}
    config = {"bos_token": {"content": "<a>", "special": True}, "eos_token": "<b>"}
    files = {"tokenizer.json": json.dumps(table).encode()}

    def borders(vocabulary: Vocabulary) -> tuple[str, str]:
        return vocabulary.piece(vocabulary.bos), vocabulary.piece(vocabulary.eos)

    assert borders(Vocabulary(files, "it")) == ("<s>", "</s>")
    assert borders(vocabulary_of(table, tokenizer_config=config)) == ("<a>", "<b>")
    assert borders(vocabulary_of(table, special_tokens_map=config)) == ("<a>", "<b>")
    one = {"bos_token": None, "eos_token": "<b>"}
    assert borders(vocabulary_of(table, tokenizer_config=one)) == ("<b>", "<b>")
    generation = {"bos_token_id": ids["<a>"], "eos_token_id": [ids["<b>"], ids["</s>"]]}
    assert borders(vocabulary_of(table, generation_config=generation)) == ("<a>", "<b>")
    assert borders(vocabulary_of(table, generation_config=generation, tokenizer_config=one)) == ("<a>", "<b>")
    assert borders(Vocabulary(files, "it", bos="<b>", eos="<a>")) == ("<b>", "<a>")
    assert borders(Vocabulary(files, "it", eos="<a>")) == ("<a>", "<a>")
    assert borders(vocabulary_of(small_tokenizer())) == ("<|endoftext|>", "<|endoftext|>")
    with pytest.raises(UserError, match="'<c>' is no token"):
        Vocabulary(files, "it", eos="<c>")
    with pytest.raises(UserError, match="'the' is a token that texts are made of"):
        Vocabulary(files, "it", eos="the")
    with pytest.raises(UserError, match="names eos_token '<c>'"):
        vocabulary_of(table, tokenizer_config={"eos_token": "<c>"})
    nothing = small_tokenizer()
    nothing["added_tokens"] = []
    nothing["model"]["vocab"]["other"] = nothing["model"]["vocab"].pop("<|endoftext|>")
    with pytest.raises(UserError, match=r"neither a bos nor an eos token.*corpus\.eos"):
        vocabulary_of(nothing)
