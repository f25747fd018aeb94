"""Documents of a token stream by number: titles, texts, and the text around a row.

A document's number is its place in the stream (`TokenStream.bounds_D1`), which no later update changes.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from mlp_memory.corpus.stream import TokenStream
from mlp_memory.corpus.vocabulary import Vocabulary

_TITLE_CHARACTERS = 80
# Tokens read of a document to find its first line; more where that is longer.
_READ_TOKENS = 64
# A character at the end of what was read may be cut in its bytes, four at most.
_UNSURE_CHARACTERS = 4
# Around a row: what it had read, its own token the last, and what followed the next token.
_BEFORE, _AFTER = 24, 8


class Listed(NamedTuple):
    """A document in a list: its number, its tokens (bos and eos among them), its title.

    Of a deleted one nothing is told but its number: `tokens` and `title` are of no text.
    """

    number: int
    tokens: int
    title: str
    deleted: bool


class Documents:
    """A stream's documents; titles are decoded when asked for and remembered.

    Args:
      stream: whose.
      vocabulary: spells its tokens.
    """

    def __init__(self, stream: TokenStream, vocabulary: Vocabulary):
        self.stream, self.vocabulary = stream, vocabulary
        self._titles: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.stream.bounds_D1) - 1

    def of_row(self, row: int) -> int:
        """The number of the document that a row is in."""
        return int(self.stream.document_ids(row, row + 1)[0])

    def rows(self, number: int) -> tuple[int, int]:
        """A document's first row and one past its last."""
        start, stop = self.stream.bounds_D1[number : number + 2]
        return int(start), int(stop)

    def is_deleted(self, number: int) -> bool:
        """Whether the stream has taken the document out: no row of it has a next token."""
        start, stop = self.rows(number)
        return stop - start > 1 and not self.stream.has_next(start, start + 1)[0]

    def text(self, number: int) -> str:
        """A document's whole text."""
        return self._decoded(*self.rows(number))

    def title(self, number: int) -> str:
        """The first line of the text that is not blank, cut to 80 characters; "" where there is none."""
        if number not in self._titles:
            self._titles[number] = self._first_line(number)
        return self._titles[number]

    def _first_line(self, number: int) -> str:
        start, stop = self.rows(number)
        read = _READ_TOKENS
        while True:
            line, ended, _ = self._decoded(start, min(start + read, stop)).lstrip().partition("\n")
            if ended or len(line) >= _TITLE_CHARACTERS + _UNSURE_CHARACTERS or start + read >= stop:
                line = line.strip()
                return (
                    line if len(line) <= _TITLE_CHARACTERS else f"{line[: _TITLE_CHARACTERS - 1].rstrip()}…"
                )
            read *= 4

    def position(self, row: int) -> dict[str, Any]:
        """A row that has a next token: its document, the text before, its next token, the text after that."""
        number = self.of_row(row)
        start, stop = self.rows(number)
        return {
            "row": row,
            "document": number,
            "title": self.title(number),
            "before": self._decoded(max(start, row + 1 - _BEFORE), row + 1),
            "next": self.vocabulary.piece(int(self.stream.labels(row, row + 1)[0])),
            "after": self._decoded(min(row + 2, stop), min(row + 2 + _AFTER, stop)),
        }

    def listed(self, containing: str | None = None) -> Iterator[Listed]:
        """Every document in order, or those whose text holds a text; one in memory at a time."""
        for number in range(len(self)):
            start, stop = self.rows(number)
            if self.is_deleted(number):
                if containing is None:
                    yield Listed(number, 0, "", True)
            elif containing is None or containing in self.text(number):
                yield Listed(number, stop - start, self.title(number), False)

    def _decoded(self, start: int, stop: int) -> str:
        return self.vocabulary.decode(self.stream.tokens[start:stop])


def _cut(line: str) -> str:
    return line if len(line) <= _TITLE_CHARACTERS else f"{line[: _TITLE_CHARACTERS - 1].rstrip()}…"
