"""What people are shown, on a page or in a terminal: text from elsewhere made safe, and shares.

Nothing in a text that is shown is invisible, turns the line around or ends it.
"""

import unicodedata
from typing import Any

_AT_WORK = ("Cc", "Cf", "Cs", "Zl", "Zp")


def inert(text: Any) -> str:
    """The text with what is not to be seen but works spelled out; newline and tab stay.

    That is controls, direction marks, separators of lines and paragraphs, lone surrogates.
    """
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in _AT_WORK else f"\\u{ord(c):04x}" for c in str(text)
    )


def one_line(text: Any) -> str:
    """The text, inert, with ⏎ where a line ends and ⇥ for a tab."""
    return inert(str(text).replace("\n", " ⏎ ").replace("\t", "⇥"))


def visible_piece(piece: Any) -> str:
    """A vocabulary piece in which whitespace and control characters can be seen."""
    marks = {" ": "␣", "\u2581": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}
    return inert("".join(marks.get(c, c) for c in str(piece))) or "∅"


def share(p: float) -> str:
    """A probability in per cent: `<0.1%`, `4.2%`, `42%`."""
    if p < 0.001:
        return "<0.1%"
    return f"{p:.1%}" if p < 0.0995 else f"{p:.0%}"
