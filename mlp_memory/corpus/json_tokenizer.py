"""Tokenizers of the `tokenizers` library: a tokenizer.json, or GPT-2's vocabulary and merges."""

import json
from typing import Any

import tokenizers

from mlp_memory.artifacts import UserError, first_line


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

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if hasattr(tokenizer.model, "dropout"):
            tokenizer.model.dropout = None  # a training device: ids would be drawn anew each time
        tokenizer.encode_special_tokens = True  # that is, as the text they are spelled with
        self.size: int = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._is_byte_level = isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel)

    @classmethod
    def from_json(cls, data: bytes, name: str) -> "JsonTokenizer":
        """A tokenizer.json."""
        try:
            return cls(tokenizers.Tokenizer.from_str(data.decode()))
        except Exception as error:  # the library raises bare ones
            raise UserError(f"{name} is not a tokenizer.json ({first_line(error)})") from error

    @classmethod
    def from_pair(cls, vocabulary: bytes, merges: bytes, name: str) -> "JsonTokenizer":
        """GPT-2's byte-level BPE: token -> id as JSON, and one merge a line."""
        try:
            token_ids: dict[str, Any] = json.loads(vocabulary)
            rules = _merges(merges.decode())
            model = tokenizers.models.BPE(token_ids, rules)
        except Exception as error:  # the library raises bare ones
            raise UserError(f"{name} are not a byte-level BPE ({first_line(error)})") from error
        if missing := sorted(set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) - set(token_ids)):
            raise UserError(
                f"{name} are not a byte-level BPE ({len(missing)} of the 256 byte characters are missing, "
                f"{missing[0]!r} say): give the model's tokenizer.json"
            )
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def piece(self, token: int) -> str:
        """The token as the file spells it, or its text where that spelling is of bytes."""
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return f"<no token {token}>"
        text = self.decode([token]) if self._is_byte_level else "\ufffd"
        return name if "\ufffd" in text else text.replace(" ", "\u2581")

    def id_of(self, token: str) -> int | None:
        """The id of a token, or None."""
        return self._tokenizer.token_to_id(token)


def _merges(text: str) -> list[tuple[str, str]]:
    lines = text.split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"the merge {' '.join(pair)[:40]!r} is not two tokens")
    return pairs
