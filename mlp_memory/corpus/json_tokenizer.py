"""Tokenizers of the `tokenizers` library: a tokenizer.json, or GPT-2's vocabulary and merges."""

import contextlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers

from mlp_memory.artifacts import UserError, first_line

# Some byte-level vocabularies were trained without bytes they never met, and drop these in
# silence: SmolLM2's lacks six controls and the two that begin U+40000 to U+BFFFF. A character
# with such a byte is written as its code point between two of this private one, this one as two.
_ESCAPE = "\uf8fd"
_ESCAPED = re.compile(f"{_ESCAPE}([0-9a-f]*){_ESCAPE}")
# A vocabulary that lacks more is not one of bytes.
_MOST_MISSING_BYTES = 64
# A chain of replacements, each by a longer text, multiplies a text's length; real ones hardly change it.
_MOST_GROWTH = 1 << 12
_STEPS = ("normalizer", "normalizers", "pre_tokenizer", "pretokenizers", "decoder", "decoders")


class JsonTokenizer:
    """Encodes and decodes; a special token's name in a text stays text.

    Attributes:
      size: the highest id and one.
      bos, eos: None: the file does not say which of its tokens they are.

    Raises:
      UserError: the tokenizer cannot be built.
    """

    bos: int | None = None
    eos: int | None = None

    def __init__(self, tokenizer: tokenizers.Tokenizer, name: str, lossless: bool):
        self._tokenizer, self._where = tokenizer, name
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if hasattr(tokenizer.model, "dropout"):
            tokenizer.model.dropout = None  # a training device: ids would be drawn anew each time
        tokenizer.encode_special_tokens = True  # that is, as the text they are spelled with
        self.size: int = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._is_byte_level = isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel)
        is_cut = self._is_byte_level and isinstance(tokenizer.model, tokenizers.models.BPE)
        self._missing_bytes = _missing_bytes(tokenizer.get_vocab()) if lossless and is_cut else b""

    @classmethod
    def from_json(cls, data: bytes, name: str, lossless: bool = True) -> "JsonTokenizer":
        """A tokenizer.json."""
        with _refused(f"{name} is not a tokenizer.json"):
            text = data.decode()
            if (growth := _growth(json.loads(text))) > _MOST_GROWTH:
                raise ValueError(f"its replacements make a text up to {growth} times as long")
            return cls(tokenizers.Tokenizer.from_str(text), name, lossless)

    @classmethod
    def from_pair(cls, vocabulary: bytes, merges: bytes, name: str, lossless: bool = True) -> "JsonTokenizer":
        """GPT-2's byte-level BPE: token -> id as JSON, and one merge a line."""
        with _refused(f"{name} are not a byte-level BPE"):
            token_ids: dict[str, Any] = json.loads(vocabulary)
            rules = _merges(merges.decode())
            model = tokenizers.models.BPE(token_ids, rules)
        if len(missing := _missing_bytes(token_ids)) > _MOST_MISSING_BYTES:
            raise UserError(
                f"{name} are not a byte-level BPE (they lack {len(missing)} bytes): "
                "give the model's tokenizer.json"
            )
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        return cls(tokenizer, name, lossless)

    def encode(self, text: str) -> list[int]:
        if self._missing_bytes:
            text = self._escape(text)
        # The library's fast way leaves out offsets, and is there for batches alone.
        with _refused(f"{self._where} cannot encode a text of {len(text)} characters"):
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: list[int]) -> str:
        with _refused(f"{self._where} cannot decode {len(ids)} tokens"):
            text = self._tokenizer.decode(ids, skip_special_tokens=False)
        return _ESCAPED.sub(_unescape, text) if self._missing_bytes else text

    def _escape(self, text: str) -> str:
        data = text.encode()
        if _ESCAPE not in text and len(data.translate(None, self._missing_bytes)) == len(data):
            return text
        written = {_ESCAPE: _ESCAPE * 2}
        for character in set(text) - {_ESCAPE}:
            if set(character.encode()) & set(self._missing_bytes):
                written[character] = f"{_ESCAPE}{ord(character):x}{_ESCAPE}"
        return text.translate(str.maketrans(written))

    def piece(self, token: int) -> str:
        """The token as the file spells it, or its text where that spelling is of bytes."""
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return f"<no token {token}>"
        text = self.decode([token]) if self._is_byte_level else "\ufffd"
        return name if "\ufffd" in text else text.replace(" ", "\u2581")

    def id_of(self, token: str) -> int | None:
        """The id of a token, or None."""
        with _refused(f"{self._where}: {token!r} names no token"):
            return self._tokenizer.token_to_id(token)


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Makes whatever the library raises a `UserError`: bare exceptions, and panics, which are none."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({first_line(error)}): fetch it again, or give another tokenizer") from error


def _growth(part: Any) -> int:
    """How many times as long all replacements of a tokenizer.json can make a text, at most."""
    if isinstance(part, list):
        return math.prod(map(_growth, part))
    if not isinstance(part, dict):
        return 1
    inner = math.prod(_growth(value) for key, value in part.items() if key in _STEPS)
    content = part.get("content")
    return (
        inner * max(len(content), 1) if part.get("type") == "Replace" and isinstance(content, str) else inner
    )


def _merges(text: str) -> list[tuple[str, str]]:
    lines = text.split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"the merge {' '.join(pair)[:40]!r} is not two tokens")
    return pairs


def _unescape(match: re.Match[str]) -> str:
    if not match[1]:
        return _ESCAPE
    code = int(match[1], 16)
    return chr(code) if code < 0x110000 and not 0xD800 <= code < 0xE000 else match[0]


def _missing_bytes(vocabulary: Mapping[str, int]) -> bytes:
    """Bytes that UTF-8 texts hold and a byte-level vocabulary has no token for."""
    in_texts = {*range(256)} - {0xC0, 0xC1, *range(0xF5, 256)}
    return bytes(
        byte for byte, name in enumerate(byte_names()) if byte in in_texts and name not in vocabulary
    )


def byte_names() -> list[str]:
    """The character that byte-level tokenizers write for each byte: itself, or one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
