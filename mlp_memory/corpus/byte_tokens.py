"""One token a byte of UTF-8: the vocabulary that needs no file."""

_SPECIAL = ("<pad>", "</s>", "<unk>")


class ByteTokens:
    """Ids 0 pad, 1 eos, 2 unknown, then byte b is b + 3: those of seqio's ByteVocabulary and of ByT5.

    Attributes:
      size: 259.
      bos, eos: None and 1.
    """

    size = len(_SPECIAL) + 256
    bos: int | None = None
    eos: int | None = 1

    def encode(self, text: str) -> list[int]:
        return [byte + len(_SPECIAL) for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        return bytes(i - len(_SPECIAL) for i in ids if i >= len(_SPECIAL)).decode(errors="replace")

    def piece(self, token: int) -> str:
        """The special token's name or the byte as a Latin-1 character, U+2581 for a space."""
        if token < len(_SPECIAL):
            return _SPECIAL[token]
        return "\u2581" if token == ord(" ") + len(_SPECIAL) else chr(token - len(_SPECIAL))

    def id_of(self, token: str) -> int | None:
        """The id of a special token, or None."""
        return _SPECIAL.index(token) if token in _SPECIAL else None
