import unicodedata

import numpy as np
import pytest

from mlp_memory.tracing.text import trace_text

HOSTILE = "\x1b[2J\u202egnp\r\n\t\ud800\x00\u2028中文 \u200b\x85" + "e\u0301" * 30


def trace(text, rng, **settings):
    """A trace of two rows and a prompt, every text of it from `text`."""

    def bars():
        return [[text(), p] for p in np.sort(rng.dirichlet(np.ones(5)))[::-1].tolist()]

    def prediction():
        return {
            "context": text(),
            "next": text(),
            "log_prob": {"base": -7.5, "memory": -0.1, "mixture": -1.0},
            "lambda": 0.425,
            **{name: bars() for name in ("base", "memory", "mixture", "teacher")},
            "neighbours": 256,
            "support": 0.4321,
            "documents": [{"document": n, "title": text(), "share": 0.2} for n in range(4)],
            "other_documents": 17,
            "drawn_on": [
                {
                    **{name: text() for name in ("title", "before", "next", "after")},
                    "row": 12_345_678,
                    "document": 42,
                    "rank": rank,
                    "weight": 0.5 / rank,
                    "distance": 12.3456 * rank,
                    "supports": rank % 2 == 1,
                }
                for rank in (1, 2, 31)
            ],
            **settings,
        }

    rows = [{"row": n, "document": n, "title": text(), **prediction()} for n in (7, 1_234_567)]
    prompt = {"prompt": text(), "continuation": text(), "predictions": [prediction(), prediction()]}
    return {"split": "train", "k": 256, "temperature": 1.5, "rows": rows, "prompts": [prompt]}


def columns(line: str) -> int:
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line
    )


@pytest.mark.parametrize("width", [80, 100, 240])
@pytest.mark.parametrize("words", [3, 40])
def test_no_line_of_a_trace_is_longer_than_the_terminal(rng, width, words):
    def text():
        return " ".join("".join(rng.choice(list("abcdefgh"), rng.integers(1, 12))) for _ in range(words))

    said = trace_text(trace(text, rng), width)
    long = [line for line in said.splitlines() if columns(line) > max(width, 94)]
    assert long == []


def test_hostile_text_does_nothing_to_the_terminal(rng):
    said = trace_text(trace(lambda: HOSTILE, rng), 100)
    assert all(line.isprintable() for line in said.split("\n"))
    assert "\\u001b[2J\\u202egnp" in said
    said.encode()


def test_a_trace_says_shares_weights_distances_and_whose_token_it_was(rng):
    said = " ".join(trace_text(trace(lambda: "words", rng), 200).split())
    for part in (
        "train: words (document 1234567, row 1,234,567)",
        "[words]: base <0.1%, memory 90%, mixture 37% (λ = 0.425)",
        "256 training positions (τ = 1.5), 43% of their weight goes on with [words]",
        "20% words (document 3)",
        "20% 17 other documents",
        "▸ 1 50% 12.35 words (document 42, row 12,345,678) words [words] words",
        " 2 25% 24.69 words",
        "▸ 31 1.6% 382.7 words",
        "token 2 of 2",
    ):
        assert part in said, part
    assert "▸ 2" not in said
    assert "other probabilities" not in said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"difference": 0.03}, "other probabilities than the targets have, by up to 0.03"),
        ({"neighbours": 0, "teacher": []}, "so it rests on none"),
        ({"other_documents": 1}, "1 other document\n"),
    ],
)
def test_what_is_out_of_the_ordinary_is_said(rng, settings, words):
    assert words in trace_text(trace(lambda: "words", rng, **settings), 200)


def test_a_row_whose_memory_is_not_made_yet_says_so(rng):
    traced = trace(lambda: "words", rng)
    for name in ("lambda", "memory", "mixture"):
        del traced["rows"][0][name]
    traced["rows"][0]["log_prob"] = {"base": -1.0}
    said = trace_text({**traced, "rows": traced["rows"][:1], "prompts": []}, 100)
    assert "There is no memory yet: run distill." in said
    assert "teacher                base" in said
