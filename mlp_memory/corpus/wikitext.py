"""WikiText's .tokens files: text that is tokenised already, article after article.

Words are counted as its literature does: whitespace separates tokens, and each line, also
an empty one, ends with one more (`<eos>`, `</s>`). WikiText-103 has 217,646 in validation and
245,569 in test so.
"""

from collections.abc import Iterable, Iterator


def articles(lines: Iterable[str], most: int | None = None) -> Iterator[str]:
    """The articles; joined they are the file again.

    An article begins at the blank line before its heading: ` = Title = ` between blank
    lines, where ` = = Section = = ` is a section's.

    Raises:
      OverflowError: an article has more than `most` characters.
    """
    article: list[str] = []
    pending: list[str] = []  # a blank line, and the heading that may follow it
    size = 0
    for line in lines:
        size += len(line)
        if most is not None and size > most:
            raise OverflowError("a long article")
        if len(pending) == 2 and not line.strip():
            if article:
                yield "".join(article)
            article, pending = pending, [line]
            size = sum(map(len, (*article, line)))
        elif not line.strip():
            article += pending
            pending = [line]
        elif len(pending) == 1 and _is_heading(line):
            pending.append(line)
        else:
            article += [*pending, line]
            pending = []
    article += pending
    if article:
        yield "".join(article)


def _is_heading(line: str) -> bool:
    words = line.split()
    return len(words) > 2 and words[0] == words[-1] == "=" and "=" not in (words[1], words[-2])


def count_words(text: str) -> int:
    """Tokens between whitespace, and one more for every line."""
    return len(text.split()) + text.count("\n") + (not text.endswith("\n"))
