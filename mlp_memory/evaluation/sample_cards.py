"""A sampled context as the page shows it: distributions as bars, training positions as lines of text."""

import math
from collections.abc import Mapping
from typing import Any

from mlp_memory.evaluation.table import DASH, is_number
from mlp_memory.shown import inert, one_line, share, visible_piece

_COLUMNS = ("teacher", "memory", "base", "mixture")
_CONTEXT_CHARACTERS = 500


def sample_card(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample of results.json with bar widths in per cent and its texts made inert."""
    columns = {name: sample[name] for name in _COLUMNS if sample.get(name)}
    tallest = max((p for pairs in columns.values() for _, p in pairs), default=0) or 1
    context = str(sample.get("context", ""))
    cut = len(context) > _CONTEXT_CHARACTERS
    return {
        "row": _number(sample.get("row")),
        "document": _number(sample.get("document")),
        "context": ("… " if cut else "") + inert(context[-_CONTEXT_CHARACTERS:]),
        "next": visible_piece(sample.get("next", "")),
        "change": _change(sample.get("log_prob") or {}),
        "documents": _documents(sample),
        "support": share(sample["support"]) if is_number(sample.get("support")) else "",
        "neighbours": _number(sample.get("neighbours")),
        "drawn_on": [_position(position) for position in sample.get("drawn_on") or []],
        "columns": [
            {
                "title": name,
                "bars": [
                    {
                        "piece": visible_piece(piece),
                        "width": f"{100 * p / tallest:.1f}",
                        "share": share(p),
                        "hit": str(piece) == str(sample.get("next")),
                    }
                    for piece, p in pairs
                ],
            }
            for name, pairs in columns.items()
        ],
    }


def _change(log_prob: Mapping[str, Any]) -> str:
    """The next token's probability under base and mixture, and the difference in nats."""
    base, mixture = log_prob.get("base"), log_prob.get("mixture")
    if not (is_number(base) and is_number(mixture)):
        return ""
    before, after = (f"{100 * math.exp(value):.2g}%" for value in (base, mixture))
    return f"base {before}, mixture {after}: {mixture - base:+.2f} nats"


def _documents(sample: Mapping[str, Any]) -> list[dict[str, str]]:
    """The documents with the largest shares of the weight, the rest of them as one."""
    named = sample.get("documents") or []
    lines = [
        {"share": share(each["share"]), "title": _title(each), "document": _number(each["document"])}
        for each in named
    ]
    if count := sample.get("other_documents"):
        rest = share(max(1 - sum(each["share"] for each in named), 0))
        lines.append({"share": rest, "title": f"{count:,} other document{'s' * (count > 1)}", "document": ""})
    return lines


def _title(of: Mapping[str, Any]) -> str:
    return one_line(of.get("title") or "(no text)")


def _position(position: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "row": _number(position.get("row")),
        "document": _number(position.get("document")),
        "title": _title(position) if "title" in position else "",
        "share": share(position["weight"]),
        "supports": position.get("supports", True),
        "before": one_line(position["before"]),
        "next": visible_piece(position["next"]),
        "after": one_line(position["after"]),
    }


def _number(value: Any) -> str:
    return f"{value:,}" if is_number(value) else DASH
