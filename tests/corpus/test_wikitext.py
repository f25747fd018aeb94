import random
from pathlib import Path

import pytest

from mlp_memory.corpus.config import CorpusConfig
from mlp_memory.corpus.documents import read_file
from mlp_memory.corpus.split import count_words
from mlp_memory.corpus.wikitext import articles

WIKITEXT = Path(__file__).parents[3] / "shared/data/corpora/wikitext103"


def lines_of_article(rng: random.Random, title: str) -> list[str]:
    lines = [" \n", f" = {title} = \n", " \n"]
    for _ in range(rng.randrange(4)):
        lines.append(" A paragraph , with = signs = and <unk> . \n" * rng.randrange(1, 3))
        lines += rng.choice([[" \n"], [" \n", " \n"], [" \n", " = = Section = = \n", " \n"], []])
        lines += rng.choice([[], [" \n", " = a = b", " = = = Deep = = = \n", " \n"], ["x \n", " = y = \n"]])
    return "".join(lines).splitlines(keepends=True)


def test_articles_begin_at_titles_and_joined_are_the_file(rng):
    wanted = ["".join(lines_of_article(rng, f"Title {n} ( x )")) for n in range(30)]
    text = "".join(wanted)
    found = list(articles(text.splitlines(keepends=True)))
    assert found == wanted


@pytest.mark.parametrize(
    "text", ["", "\n", " = T = \n", " \n = T = ", "a\nb", " \n = T = \nx\n", " \n = = \n \n"]
)
def test_any_text_comes_back_whole(text):
    assert "".join(articles(text.splitlines(keepends=True))) == text


def test_words_are_tokens_and_one_end_for_every_line(rng):
    words = [rng.randrange(5) for _ in range(50)]
    text = "".join(" " + "w " * count + "\n" for count in words)
    assert count_words(text, "wikitext") == sum(words) + len(words)
    assert count_words(text[:-1], "wikitext") == sum(words) + len(words)
    assert count_words(text, "whitespace") == sum(words)


@pytest.mark.skipif(not WIKITEXT.is_dir(), reason="the shared WikiText-103 files are not here")
def test_wikitext103_validation_has_the_published_articles_and_words():
    path = WIKITEXT / "wiki.valid.tokens"
    config = CorpusConfig("wikitext", str(path))
    texts = list(read_file(config, path))
    assert "".join(texts) == path.read_text("utf-8")
    assert len(texts) == 60
    # 213,886 tokens between spaces and 3,760 lines: what papers divide by.
    assert sum(count_words(text, config.word_count) for text in texts) == 217_646
