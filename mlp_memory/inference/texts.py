"""Tokens to text as they come, ended by stop texts."""

from mlp_memory.corpus.vocabulary import Vocabulary


class GrowingText:
    """What follows a prompt.

    Args:
      vocabulary: spells tokens.
      prompt: token ids before the text.
      stop: texts that end it; they are left out.
    """

    def __init__(self, vocabulary: Vocabulary, prompt: list[int], stop: tuple[str, ...]):
        self._vocabulary, self._stop = vocabulary, stop
        self._tokens, self._before = list(prompt), len(vocabulary.decode(prompt))
        self._text, self._taken, self._ended = "", 0, False

    @property
    def whole(self) -> str:
        """The text so far."""
        return self._text

    def add(self, token: int) -> bool:
        """One more token; whether a stop text has come."""
        self._tokens.append(token)
        text = self._vocabulary.decode(self._tokens)[self._before :]
        ends = [at for at in map(text.find, self._stop) if at >= 0]
        self._ended = bool(ends)
        self._text = text[: min(ends)] if ends else text
        return self._ended

    def take(self) -> str:
        """What is sure of the text since the last call: whole characters, and no beginning of a stop text."""
        sure = self._text if self._ended else self._text.rstrip("\ufffd")
        held = 0 if self._ended else max((_overlap(sure, stop) for stop in self._stop), default=0)
        return self._advance(len(sure) - held)

    def rest(self) -> str:
        """What `take` has held back, once no token follows."""
        return self._advance(len(self._text))

    def _advance(self, to: int) -> str:
        piece = self._text[self._taken : to]
        self._taken = max(self._taken, to)
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
