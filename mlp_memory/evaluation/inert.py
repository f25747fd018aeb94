"""Text from elsewhere made safe to show: nothing in it is invisible, turns the line around or ends it."""

import unicodedata
from typing import Any


def inert(text: Any) -> str:
    """The text with controls, direction marks and lone surrogates spelled out (newline and tab stay)."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else f"\\u{ord(c):04x}"
        for c in str(text)
    )


def visible_piece(piece: Any) -> str:
    """A vocabulary piece in which whitespace and control characters can be seen."""
    marks = {" ": "␣", "\u2581": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}
    return inert("".join(marks.get(c, c) for c in str(piece))) or "∅"
