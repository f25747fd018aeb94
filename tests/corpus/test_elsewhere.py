"""Texts of other kinds beside a corpus: whole, of its vocabulary, and of no weight to its own splits."""

import dataclasses

import pytest

from mlp_memory import artifacts
from mlp_memory.artifacts import Directory, UserError
from mlp_memory.corpus.config import CorpusConfig, PartConfig
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.corpus.tokenize import require_same_corpus, tokenize
from mlp_memory.corpus.vocabulary import Vocabulary


@pytest.fixture
def config(tmp_path, make_text, write_jsonl, rng) -> CorpusConfig:
    path = write_jsonl(tmp_path / "in.jsonl", [make_text(rng.randrange(1, 60)) for _ in range(60)])
    return CorpusConfig("jsonl", str(path), validation_fraction=0.3, test_fraction=0.3, vocab_size=330)


def with_news(config: CorpusConfig, path, **settings) -> CorpusConfig:
    return dataclasses.replace(config, elsewhere={"news": PartConfig("jsonl", str(path), **settings)})


def words_of(directory: Directory, name: str) -> list[str]:
    vocabulary, stream = Vocabulary.load(directory / "vocabulary"), TokenStream.open(directory / name)
    bounds = zip(stream.bounds_D1, stream.bounds_D1[1:])
    return [vocabulary.decode(stream.tokens[start:stop]) for start, stop in bounds]


def test_a_text_elsewhere_is_added_whole_and_changes_nothing_that_is_there(
    tmp_path, config, make_text, write_jsonl
):
    directory, texts = Directory(tmp_path / "corpus"), [make_text(9) for _ in range(12)]
    tokenize(directory, config)
    before = {name: artifacts.peek(directory / name).fingerprint for name in ("vocabulary", "train", "test")}
    more = with_news(config, write_jsonl(tmp_path / "news.jsonl", [*texts, ""]))
    tokenize(directory, more)
    assert words_of(directory, "news") == texts
    assert {name: artifacts.peek(directory / name).fingerprint for name in before} == before
    made = artifacts.peek(directory / "news")
    tokenize(directory, more)
    require_same_corpus(directory, more)
    assert artifacts.peek(directory / "news") == made
    few = with_news(config, tmp_path / "news.jsonl", fraction=0.5)
    with pytest.raises(UserError, match="fraction"):
        tokenize(directory, few)
    (directory / "news").delete()
    tokenize(directory, few)
    assert 0 < len(words_of(directory, "news")) < len(texts)
    assert set(words_of(directory, "news")) < set(texts)


def test_changed_files_elsewhere_are_noticed_and_missing_ones_are_not_needed(
    tmp_path, config, make_text, write_jsonl
):
    directory, file = Directory(tmp_path / "corpus"), tmp_path / "news.jsonl"
    more = with_news(config, write_jsonl(file, [make_text(9)]))
    tokenize(directory, more)
    write_jsonl(file, [make_text(8)])
    for check in (tokenize, require_same_corpus):
        with pytest.raises(UserError, match=r'corpus.elsewhere\["news"\]'):
            check(directory, more)
    file.unlink()
    tokenize(directory, more)


@pytest.mark.parametrize("lines", [[], [""]])
def test_an_empty_text_elsewhere_is_one_line(tmp_path, config, write_jsonl, lines):
    more = with_news(config, write_jsonl(tmp_path / "news.jsonl", lines))
    with pytest.raises(UserError, match=r'corpus.elsewhere\["news"\]: '):
        tokenize(Directory(tmp_path / "corpus"), more)


def test_a_name_of_the_corpus_s_own_and_a_rate_are_refused(config):
    part = PartConfig("text", "a.txt")
    with pytest.raises(UserError, match="'train': the corpus has a train of its own"):
        dataclasses.replace(config, elsewhere={"train": part})
    with pytest.raises(UserError, match="'news' has a rate"):
        dataclasses.replace(config, elsewhere={"news": dataclasses.replace(part, rate=1.0)})
