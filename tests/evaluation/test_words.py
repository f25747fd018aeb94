import math
import random

import numpy as np
import pytest

from mlp_memory.artifacts import Manifest
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.evaluation.stage import words_of
from mlp_memory.evaluation.table import results_table
from mlp_memory.statistics import perplexity


@pytest.fixture
def stream() -> TokenStream:
    lengths = [random.randrange(2, 400) for _ in range(50)]
    facts = {"vocab_size": 9, "words": random.randrange(3000, 8000), "bytes": 1, "word_count": "wikitext"}
    return TokenStream(Manifest("corpus", {}, {}, facts=facts), None, np.cumsum([0, *lengths]))


def test_all_scored_rows_have_the_words_of_the_split(stream):
    assert stream.num_scored == len(stream) - 50
    assert words_of(stream, stream.num_scored) == stream.words


def test_a_part_of_the_rows_has_its_share_so_that_per_word_follows_from_per_token(stream):
    nats = 2.5
    for rows in (1, 100, stream.num_scored // 2, stream.num_scored):
        words = words_of(stream, rows)
        assert abs(words - stream.words * rows / stream.num_scored) <= 1
        if rows >= 100:
            per_word = math.log(perplexity(nats * rows, words))
            whole = math.log(perplexity(nats * stream.num_scored, stream.words))
            assert per_word == pytest.approx(whole, rel=1 / words)


def test_the_table_says_how_many_words_there_were_and_how_they_were_counted():
    detail = {"per_word": 20.0, "words": 217_646, "scored_tokens": 3}
    split = {"perplexity": {"base": 9.0}, "details": {"base": detail}, "word_count": "wikitext"}
    assert "217,646 words, counted as wikitext" in results_table({"schema": 1, "test": split})
