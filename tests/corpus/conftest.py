"""Random texts, written in every form the corpus reads."""

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pytest

# Indentation, line ends, SentencePiece's own space sign and its escape, control pieces as plain
# text, combining and astral characters, a byte order mark, NUL.
ODD = ["    ", "\t", "\r\n", "\n\n", "\u2581", "\uf8fd", "\uf8fd1", "</s>", "<0x41>", "e\u0301", "ﬁ", "😀"]
ODD += ["\ufeff", "\0", "\u2028", "\u2585", "\ufffd", "中文", "  ", "\x0b"]


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # pytest shows it when the test fails
    return random.Random(seed)


@pytest.fixture
def make_text(rng) -> Callable[[int], str]:
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randrange(1, 9))) for _ in range(300)]

    def make(count: int) -> str:
        pieces = [rng.choice(words) + rng.choice([" ", " ", " ", ", ", ".\n"]) for _ in range(count)]
        for _ in range(count // 20):
            pieces[rng.randrange(count)] = rng.choice(ODD)
        return "".join(pieces)

    return make


@pytest.fixture
def write_jsonl() -> Callable[..., Path]:
    def write(path: Path, texts: list[str], field: str = "text") -> Path:
        opener = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)
        with opener(path, "wt", encoding="utf-8") as file:
            for number, text in enumerate(texts):
                file.write(json.dumps({"id": number, field: text}, ensure_ascii=number % 2 == 0) + "\n")
        return path

    return write
