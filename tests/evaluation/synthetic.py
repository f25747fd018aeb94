"""Results, curves and findings as a run leaves them, made up, and a reader of pages."""

import html.parser
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from mlp_memory.evaluation.sections import Claim, Findings, Plot, Section, Series, Table

HOSTILE = "</script></style><b onload=alert(1)>&amp;\"'\u202egnp\u0000\n\tשלום\ud800 {{ 7*7 }} {% raw %}"


def synthetic_results(seed: int = 0) -> dict[str, Any]:
    rng = random.Random(seed)
    values = {
        "base": 224.31,
        "knn_lm_exact": 196.84,
        "knn_lm_scann": 198.02,
        "base_plus_memory": 197.13,
        "base_plus_memory_gated": 195.52,
        "joint": 181.47,
        "joint_gated": 180.26,
        "decoder_equal_params": 209.66,
    }

    weights = {"base": 0.0, "decoder_equal_params": 0.0, "base_plus_memory_gated": None, "joint_gated": None}

    def split(factor: float) -> dict[str, Any]:
        details = {
            system: {
                "lambda": weights.get(system, 0.35),
                "mean_lambda": weights.get(system, 0.35) or 0.4321,
                "tau": 30.0 if system.startswith("knn") else None,
                "k": 256 if system.startswith("knn") else None,
                "scored_tokens": 52345,
                "per_token": value * factor,
                "per_word": (value * factor) ** 1.31,
                "interval": [value * factor * 0.965, value * factor * 1.037],
                "interval_method": "bootstrap over 47 documents",
            }
            for system, value in values.items()
        }
        return {
            "perplexity": {s: v * factor for s, v in values.items()},
            "details": details,
            "differences": {
                "joint - base": {"nats": -0.212, "interval": [-0.23, -0.19]},
                "joint - base_plus_memory": {"nats": -0.0828, "interval": [-0.0912, -0.0733]},
            },
            "gain_recovered": {"of": "knn_lm_exact", "share": 0.988},
        }

    lambdas = [i / 40 for i in range(40)]
    curves = {
        system: [
            values["base"] * (1 - 0.45 * depth * x + 0.42 * depth * x**2) * (1 + steep * x**12)
            for x in lambdas
        ]
        for system, depth, steep in (
            ("knn_lm_exact", 1.0, 9.0),
            ("knn_lm_scann", 0.95, 9.5),
            ("base_plus_memory", 0.99, 0.1),
            ("joint", 1.5, 0.1),
        )
    }

    def top(pieces: list[str]) -> list[list[Any]]:
        shares = sorted((rng.random() ** 3 for _ in pieces), reverse=True)
        return [[piece, share / sum(shares) * 0.9] for piece, share in zip(pieces, shares)]

    pieces = ["▁the", "▁of", "\n", "▁a", "ing", "▁river", "s", "▁1897", ".", "▁Northumberland"]
    samples = [
        {
            "context": "The river rises in the hills near the border and flows east through the town, where "
            "it turned several mills until the middle of the nineteenth century.\nIts largest tributary is",
            "next": "▁the",
            "row": 1234 + i,
            **{name: top(rng.sample(pieces, 5)) for name in ("base", "memory", "teacher", "mixture")},
        }
        for i in range(3)
    ]
    return {
        "schema": 1,
        "test": split(1.0),
        "validation": split(0.97),
        "news": split(1.7),
        "elsewhere": ["news"],
        "lambda_curves": {"validation": {"lambdas": lambdas, **curves}},
        "parameters": {"base": 2_345_678, "memory": 4_567_890, "decoder_equal_params": 6_900_000},
        "training_flops": {
            "base": 1.234e14,
            "memory": 2.4e14,
            "joint": 3.1e13,
            "decoder_equal_params": 3.62e14,
        },
        "recall": {"k": 256, "value": 0.9613},
        "samples": samples,
        "config": {"decoder": {"d": 192, "layers": 4, "tied": True}, "corpus": {"name": "python_docs"}},
        "corpus": {"name": "python_docs", "train": {"documents": 4321, "tokens": 412345}, "vocabulary": 4096},
    }


def synthetic_curves() -> dict[str, list[dict[str, Any]]]:
    rng = np.random.default_rng(0)

    def stage(steps: int, start: float, end: float, names: dict[str, float]) -> list[dict[str, Any]]:
        lines = []
        for step in range(1, steps + 1):
            loss = end + (start - end) * np.exp(-6 * step / steps) + 0.05 * rng.standard_normal()
            line = {"step": step, "loss": float(loss), "learning_rate": 1e-3}
            if step % (steps // 8) == 0:
                line |= {k: v * float(np.exp(loss - end)) for k, v in names.items()}
            lines.append(line)
        return lines

    return {
        "pretrain": stage(2000, 8.3, 5.2, {"validation_perplexity": 224.0}),
        "distill": stage(
            900, 7.9, 4.1, {"validation_perplexity": 201.0, "validation_memory_perplexity": 215.0}
        ),
        "joint": stage(300, 5.2, 5.0, {"validation_perplexity": 181.0}),
        "baseline": stage(1500, 8.3, 5.1, {"validation_perplexity": 209.0}),
    }


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not nest."""

    VOID = frozenset({"meta", "br", "path", "use"})

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def with_differing(results: dict[str, Any], text: Callable[[], str]) -> dict[str, Any]:
    """The results with contexts where memory and base differ, every text of them from `text`."""
    bars = [[text(), 0.7], [text(), 0.002]]
    for number, effect in enumerate(("better", "worse")):
        results.setdefault("differing", []).append(
            {
                "effect": effect,
                "row": 7000 + number,
                "document": 12 + number,
                "context": text(),
                "next": text(),
                "log_prob": {"base": -5.0 + 4 * number, "memory": -1.0, "mixture": -1.5 - number},
                **{name: bars for name in ("base", "memory", "teacher", "mixture")},
                "neighbours": 256,
                "support": 0.43,
                "documents": [
                    {"document": 345 + n, "title": text(), "share": share}
                    for n, share in enumerate((0.72, 0.11, 0.0001))
                ],
                "other_documents": 31,
                "drawn_on": [
                    {"row": 90_001, "document": 345, "weight": weight, "supports": weight < 0.1}
                    | {part: text() for part in ("title", "before", "next", "after")}
                    for weight in (0.61, 0.07, 0.0001)
                ],
            }
        )
    return results


def synthetic_findings(text: Callable[[], str], rng: np.random.Generator) -> Findings:
    """Claims of every outcome, two tables and three plots, every text from `text`."""
    claims = [
        Claim(text(), text(), text(), text(), held, text(), text()) for held in ("yes", "no", "unclear")
    ]
    claims.append(Claim(text(), "", text(), "", "unclear", "", ""))
    tables = [
        Table(
            text(),
            tuple(text() for _ in range(columns)),
            tuple(tuple(text() for _ in range(columns)) for _ in range(5)),
            (text(), text()),
        )
        for columns in (2, 14)
    ]

    def series(line: bool, band: bool) -> Series:
        x_N = np.sort(rng.uniform(1e3, 1e9, 9))
        y_N = rng.uniform(1, 300, 9)
        ends = (tuple(y_N * 0.9), tuple(y_N * 1.1)) if band else ((), ())
        return Series(text(), tuple(x_N), tuple(y_N), *ends, line=line)

    plots = [
        Plot(text(), text(), text(), (series(True, True), series(True, False)), True, True, (text(),)),
        Plot(text(), text(), text(), (series(False, False),)),
        Plot(text(), text(), text(), tuple(series(True, False) for _ in range(11)), True),
    ]
    return Findings(tuple(claims), (Section(text(), (text(), text()), tuple(tables), tuple(plots)),))
