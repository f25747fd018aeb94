from types import SimpleNamespace

import numpy as np
import pytest

from mlp_memory.artifacts import Manifest
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.corpus.vocabulary import Vocabulary


class WithDeleted(TokenStream):
    """A stream some of whose documents are taken out: no row of them has a next token."""

    deleted: frozenset[int] = frozenset()

    def has_next(self, start, stop):
        gone = np.isin(self.document_ids(start, stop), sorted(self.deleted))
        return super().has_next(start, stop) & ~gone


@pytest.fixture
def vocabulary() -> Vocabulary:
    """A token a byte."""
    return Vocabulary.from_path("bytes")


@pytest.fixture
def stream_of(vocabulary):
    """texts -> a stream of them as documents; `deleted` numbers are taken out."""

    def make(texts: list[str], deleted: tuple[int, ...] = ()) -> TokenStream:
        documents = [[vocabulary.bos, *vocabulary.encode(text), vocabulary.eos] for text in texts]
        bounds_D1 = np.cumsum([0, *map(len, documents)])
        facts = {"vocab_size": vocabulary.size, "words": 1, "bytes": 1}
        tokens_N = np.array([t for tokens in documents for t in tokens], np.uint16)
        stream = WithDeleted(Manifest("corpus", {}, {}, facts=facts), tokens_N, bounds_D1)
        stream.deleted = frozenset(deleted)
        return stream

    return make


@pytest.fixture
def random_text(rng):
    """() -> a text of words of few letters, so that next tokens repeat."""

    def make() -> str:
        words = ("".join(rng.choice(list("abcde"), rng.integers(1, 6))) for _ in range(rng.integers(2, 30)))
        return " ".join(words)

    return make


@pytest.fixture
def predictor(rng, vocabulary):
    """Random distributions and states for every text, remembered by it."""

    class Predictor:
        context = 12

        def __init__(self):
            self.said = {}

        def __call__(self, tokens):
            key = tuple(tokens[-self.context :])
            if key not in self.said:
                names = ("base_NxV", "memory_NxV", "mixture_NxV")
                log_probs = {name: np.log(rng.dirichlet(np.ones(vocabulary.size))) for name in names}
                state = rng.normal(size=5).astype(np.float32)
                self.said[key] = SimpleNamespace(weight_N=np.float32(0.25), tap_NxD=state, **log_probs)
            return self.said[key]

    return Predictor()
