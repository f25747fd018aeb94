"""A SentencePiece model as a lossless map from text to ids, and the lossless form of one that is not."""

import re
from collections.abc import Iterator

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from mlp_memory.artifacts import UserError

_SPACE = "\u2581"  # how SentencePiece writes a space
# A piece that stands for something outside the text, though users may type it.
_SENTINEL = re.compile(f"{_SPACE}?(<[^<>]+>|\\[[^\\[\\]]+\\])")
# Long texts are encoded in parts: SentencePiece takes 45 bytes of memory a character and slows down.
SEGMENT_CHARACTERS = 1 << 16


class SentencePieceModel:
    """Encodes and decodes.

    Attributes:
      size: number of ids.
      bos, eos: the model's own, None where it has none.

    Raises:
      UserError: the bytes are no SentencePiece model.
    """

    def __init__(self, model: bytes, name: str, lossless: bool = True):
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
            proto = sentencepiece_model_pb2.ModelProto.FromString(model)
            ids = range(self._processor.vocab_size())
            self._characters = {c for token in ids for c in self._processor.id_to_piece(token)}
        except (RuntimeError, DecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{name} is not a SentencePiece model ({len(model)} bytes)") from error
        self.size: int = self._processor.vocab_size()
        self.bos = _id_or_none(self._processor.bos_id())
        self.eos = _id_or_none(self._processor.eos_id())
        self._newline_stands_alone = _newline_stands_alone(proto)
        # A model of ours has a rule for U+2581, one without byte pieces has no way to write it.
        self._escapes_space_sign = (
            lossless and proto.trainer_spec.byte_fallback and not proto.denormalizer_spec.precompiled_charsmap
        )

    def encode(self, text: str) -> list[int]:
        """Token ids; a U+2581 of the text is written in its byte pieces, so that it is no space."""
        if _SPACE not in text or not self._escapes_space_sign:
            return self._encode_parts(text)
        # A character that the model knows as bytes alone takes its place, then gives way to its bytes.
        substitute = next(c for c in _private_characters() if c not in text and c not in self._characters)
        ids = self._encode_parts(text.replace(_SPACE, substitute))
        return _replace(ids, self._byte_ids(substitute), self._byte_ids(_SPACE))

    def _encode_parts(self, text: str) -> list[int]:
        if len(text) <= SEGMENT_CHARACTERS or not self._newline_stands_alone:
            return self._processor.encode(text)
        return [i for part in cut(text, SEGMENT_CHARACTERS) for i in self._processor.encode(part)]

    def _byte_ids(self, text: str) -> list[int]:
        return [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(token)

    def id_of(self, token: str) -> int | None:
        """The id of a piece, or None."""
        found = self._processor.piece_to_id(token)
        return found if self._processor.id_to_piece(found) == token else None


def _id_or_none(token: int) -> int | None:
    return token if token >= 0 else None


def _newline_stands_alone(proto: sentencepiece_model_pb2.ModelProto) -> bool:
    """Whether a text may be cut after any newline and encoded in parts, with the same ids."""
    rules = proto.normalizer_spec
    user_defined = proto.SentencePiece.Type.USER_DEFINED
    return (
        not rules.add_dummy_prefix
        and not rules.remove_extra_whitespaces
        and not any("\n" in p.piece and p.piece != "\n" for p in proto.pieces)
        and any(p.piece == "\n" and p.type == user_defined for p in proto.pieces)
    )


def cut(text: str, characters: int) -> list[str]:
    """Parts of a text that together are the text, each cut after a newline where it is long.

    A part is longer than `characters` only up to the next newline.
    """
    parts, start = [], 0
    while len(text) - start > characters:
        end = text.find("\n", start + characters - 1) + 1
        if not end or end == len(text):
            break
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def _private_characters() -> Iterator[str]:
    for first, last in ((0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD)):
        yield from map(chr, range(first, last + 1))


def _replace(ids: list[int], old: list[int], new: list[int]) -> list[int]:
    """`ids` with each run that equals `old` replaced by `new`."""
    replaced, i = [], 0
    while i < len(ids):
        if ids[i] == old[0] and ids[i : i + len(old)] == old:
            replaced += new
            i += len(old)
        else:
            replaced.append(ids[i])
            i += 1
    return replaced


def make_lossless(model: bytes) -> bytes:
    """A model that can write every text, with the old ids in their places.

    A model with byte fallback is returned as it is. Another gets the 256 byte pieces after
    its last id, keeps whitespace and characters as they are (its normaliser goes), and no
    longer reads a sentinel such as <extra_id_0> out of a text that spells it.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    if proto.trainer_spec.byte_fallback:
        return model
    types = proto.SentencePiece.Type
    for piece in proto.pieces:
        if piece.type == types.USER_DEFINED and _SENTINEL.fullmatch(piece.piece):
            piece.type = types.UNUSED  # no text is encoded as it; it still decodes to its own
    names = {piece.piece for piece in proto.pieces}
    lowest = min((p.score for p in proto.pieces if p.type == types.NORMAL), default=0.0)
    if _SPACE not in names:
        proto.pieces.add(piece=_SPACE, score=lowest, type=types.NORMAL)
    for byte in range(256):
        if (name := f"<0x{byte:02X}>") not in names:
            proto.pieces.add(piece=name, score=0.0, type=types.BYTE)
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = len(proto.pieces)
    rules = proto.normalizer_spec
    rules.name, rules.precompiled_charsmap = "identity", b""
    rules.remove_extra_whitespaces = False
    proto.denormalizer_spec.Clear()
    return proto.SerializeToString(deterministic=True)
