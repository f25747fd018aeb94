"""Random texts, written in every form the corpus reads."""

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

# Indentation, line ends, SentencePiece's own space sign and its escape, control pieces as plain
# text, combining and astral characters, a byte order mark, NUL.
ODD = ["    ", "\t", "\r\n", "\n\n", "\u2581", "\uf8fd", "\uf8fd1", "</s>", "<0x41>", "e\u0301", "ﬁ", "😀"]
ODD += ["\ufeff", "\0", "\u2028", "\u2585", "\ufffd", "中文", "  ", "\x0b"]

# What a special token is spelled with is text like any other.
SPELLED = ["<|endoftext|>", "<s>", "<unk>", "<pad>", "[INST]", "<|im_start|>", "<extra_id_0>"]
# Marks without a letter, directions, what is no character, wide and composed ones, controls.
MARKS = "\u0301\u200f\u202e\ufe0f\u0378\uffff\ufdd0\U0010ffff\xe9\u212b\xc5\uff41\xa0\u3000"
MARKS += "\x85\r\x1b\x7f\x80\u200b"
# Joined emoji, spaces of all lengths, a word without end.
LONG = ["\U0001f468\u200d\U0001f469\u200d\U0001f467", " ", "   ", "\t\t", "\n", "\n\n\n", " \n "]
LONG += [" <extra_id_7>", " \u2047 ", "x" * 500, "the", "Paris", "1234567"]
HOSTILE = [*SPELLED, *MARKS, "\ue000", *LONG, *ODD]


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


@pytest.fixture
def hostile(rng) -> Callable[[int], list[str]]:
    """count -> texts of what tokenizers trip over, and of any code points at all."""

    def text() -> str:
        parts = rng.choices(HOSTILE, k=rng.randrange(1, 10))
        for _ in range(rng.randrange(4)):
            code = rng.choice([rng.randrange(0x3000), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
            parts.insert(rng.randrange(len(parts) + 1), chr(code))
        return "".join(parts)

    return lambda count: [*HOSTILE, *(text() for _ in range(count))]


@pytest.fixture
def small_tokenizer() -> Callable[..., dict]:
    """A tokenizer.json as a table: byte-level BPE over some words; keywords replace its parts."""

    def make(words: str = "the theme of them all", **parts: object) -> dict:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator([words] * 3, trainer)
        return json.loads(tokenizer.to_str()) | parts

    return make
