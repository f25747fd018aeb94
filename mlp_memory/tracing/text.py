"""Traces and lists of documents as lines for a terminal; every text in them is inert."""

import math
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mlp_memory.shown import one_line, share, visible_piece
from mlp_memory.tracing.documents import Listed

_COLUMNS = ("teacher", "memory", "base", "mixture")
_PIECE, _COLUMN = 14, 23
_MARK = "▸"
# Larger differences of a stored probability are told: float16, and distances in other company, make less.
_ROUNDING = 2e-3


def trace_text(traced: Mapping[str, Any], width: int) -> str:
    """What `command.trace` found, for people.

    Args:
      traced: as it goes to JSON.
      width: of the terminal.
    """
    lines: list[str] = []
    for row in traced["rows"]:
        split = f"{traced['split']}: "
        lines += [split + _named(row, width - len(split)), *_prediction(row, traced, width), ""]
    for prompt in traced["prompts"]:
        lines += _wrapped(f"prompt: {one_line(prompt['prompt'])}", width, "")
        lines += [*_wrapped(f"goes on: {one_line(prompt['continuation'])}", width, ""), ""]
        for number, prediction in enumerate(prompt["predictions"], 1):
            lines += [f"token {number} of {len(prompt['predictions'])}"]
            lines += [*_prediction(prediction, traced, width), ""]
    return "\n".join(lines).rstrip()


def documents_text(listed: Iterable[Listed]) -> Iterator[str]:
    """A line for each document, one at a time, below a heading if there is any."""
    for place, each in enumerate(listed):
        if place == 0:
            yield "  number    tokens  title"
        if each.deleted:
            yield f"{each.number:8d}         –  (deleted)"
        else:
            yield f"{each.number:8d}  {each.tokens:8d}  {one_line(each.title) or '(no text)'}"


def _prediction(said: Mapping[str, Any], traced: Mapping[str, Any], width: int) -> list[str]:
    piece = visible_piece(said["next"])
    lines = [*_wrapped(f"… {one_line(said['context'])} [{piece}]", width), ""]
    names = [name for name in _COLUMNS if said.get(name)]
    lines.append("  " + "".join(_padded(name, _COLUMN) for name in names).rstrip())
    for place in range(max(len(said[name]) for name in names)):
        cells = (_bar(said[name][place : place + 1]) for name in names)
        lines.append("  " + "".join(_padded(cell, _COLUMN) for cell in cells).rstrip())
    lines += ["", *_wrapped(_probabilities(piece, said), width)]
    if "lambda" not in said:
        lines.append("  There is no memory yet: run distill.")
    lines += _evidence(piece, said, traced["temperature"], width)
    return lines


def _probabilities(piece: str, said: Mapping[str, Any]) -> str:
    figures = [f"{name} {share(math.exp(value))}" for name, value in said["log_prob"].items()]
    weight = f" (λ = {said['lambda']:.3g})" if "lambda" in said else ""
    return f"[{piece}]: {', '.join(figures)}{weight}"


def _evidence(piece: str, said: Mapping[str, Any], tau: float, width: int) -> list[str]:
    if not said["neighbours"]:
        return ["", "  No training position may be its neighbour, so it rests on none."]
    lines = [
        "",
        *_wrapped(
            f"drawn on: {said['neighbours']:,} training positions (τ = {tau:.4g}), "
            f"{share(said['support'])} of their weight goes on with [{piece}]",
            width,
        ),
        *(f"  {share(each['share']):>7}  {_named(each, width - 11)}" for each in said["documents"]),
    ]
    if others := said["other_documents"]:
        rest = max(1 - sum(each["share"] for each in said["documents"]), 0)
        lines.append(f"  {share(rest):>7}  {others:,} other document{'s' * (others > 1)}")
    if said.get("difference", 0) > _ROUNDING:
        lines += _wrapped(
            f"The neighbours found now give other probabilities than the targets have, by up to "
            f"{said['difference']:.2g}.",
            width,
        )
    lines += ["", f"  {'rank':>6} {'weight':>7} {'distance':>9}"]
    for position in said["drawn_on"]:
        mark = _MARK if position["supports"] else " "
        figures = f"{position['rank']:5d} {share(position['weight']):>7} {position['distance']:>9.4g}"
        where = _named(position, width - 28)
        lines.append(f"  {mark}{figures}  {where}")
        text = f"{one_line(position['before'])} [{visible_piece(position['next'])}] "
        lines += _wrapped(text + one_line(position["after"]), width, " " * 10)
    return lines


def _named(of: Mapping[str, Any], width: int) -> str:
    """Title, document and, if it is one, row; the title cut to what fits."""
    row = f", row {of['row']:,}" if "row" in of else ""
    where = f" (document {of['document']}{row})"
    return _cut(one_line(of["title"]) or "(no text)", max(width - len(where), 20)) + where


def _bar(pairs: Sequence[Sequence[Any]]) -> str:
    if not pairs:
        return ""
    piece, p = pairs[0]
    return f"{_padded(_cut(visible_piece(piece), _PIECE), _PIECE)}{share(p):>6}"


def _cut(text: str, columns: int) -> str:
    """The text, its end an ellipsis where it takes more places than these."""
    while _columns(text) > columns:
        text = f"{text.removesuffix('…')[:-1]}…"
    return text


def _wrapped(text: str, width: int, indent: str = "  ") -> list[str]:
    return textwrap.wrap(text, max(width, 40), initial_indent=indent, subsequent_indent=indent) or [indent]


def _padded(text: str, columns: int) -> str:
    return text + " " * max(columns - _columns(text), 0)


def _columns(text: str) -> int:
    """Places that a text takes on a terminal: two for a wide character, none for one that combines."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )
