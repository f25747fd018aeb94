"""Text to token ids and back with a SentencePiece model, without TensorFlow."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from mlp_memory import artifacts
from mlp_memory.artifacts import Directory, UserError

MODEL_NAME = "tokenizer.model"
KIND = "vocabulary"


class Vocabulary:
    """Encodes and decodes.

    A vocabulary trained here is lossless: `decode(encode(text)) == text` for every text.
    Its ids are 0 pad, 1 unknown, 2 bos, 3 eos, 4 newline, 5..260 the 256 bytes, then
    learned pieces; pad and unknown never occur in an encoded text.

    Attributes:
      size: number of ids; every id is below it.
      bos, eos: ids that open and close a document. A model that has only one of the two
        uses it for both.
      model: the serialised SentencePiece model.
      fingerprint: of the vocabulary's manifest; "" where the model was not read from one.

    Raises:
      UserError: the model is not SentencePiece, or has neither bos nor eos.
    """

    def __init__(self, model: bytes, name: str, fingerprint: str = ""):
        self.model, self.fingerprint = model, fingerprint
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(
                f"{name} is not a SentencePiece model ({len(model)} bytes): give the .model file of one"
            ) from error
        self.size: int = self._processor.vocab_size()
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        if bos < 0 and eos < 0:
            raise UserError(f"{name} has neither a bos nor an eos piece: documents need one as their border")
        self.bos: int = bos if bos >= 0 else eos
        self.eos: int = eos if eos >= 0 else bos

    @classmethod
    def from_file(cls, path: str) -> "Vocabulary":
        """A model from anywhere on this machine.

        Raises:
          UserError: there is no such file, or it is not a SentencePiece model.
        """
        try:
            model = Path(path).expanduser().read_bytes()
        except OSError as error:
            raise UserError(f"vocab_file {path!r}: {error.strerror}, check the path") from error
        return cls(model, f"vocab_file {path!r}")

    @classmethod
    def load(cls, directory: Directory) -> "Vocabulary":
        """The vocabulary in WORKDIR/corpus/vocabulary.

        Raises:
          UserError: it is missing, unfinished or damaged.
        """
        manifest = artifacts.require(directory, "tokenize")
        model = directory.read(MODEL_NAME)
        if model is None or hashlib.sha256(model).hexdigest() != manifest.facts.get("model_sha256"):
            state = "is missing" if model is None else "is damaged"
            raise UserError(f"{directory}/{MODEL_NAME} {state}: run `python -m mlp_memory tokenize` again")
        return cls(model, f"{directory}/{MODEL_NAME}", manifest.fingerprint)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without bos and eos."""
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bos, eos and pad give no text, broken UTF-8 gives U+FFFD.

        Raises:
          IndexError: an id is negative or not below `size`.
        """
        return self._processor.decode([int(i) for i in ids])

    def piece(self, token: int) -> str:
        """One id as a printable word for reports: U+2581 for a space, escapes for control characters.

        Raises:
          IndexError: the id is negative or not below `size`.
        """
        piece = self._processor.id_to_piece(int(token))
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in piece)

    @property
    def newline_stands_alone(self) -> bool:
        """Whether a text may be cut after any newline and encoded in parts, with the same ids."""
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto.FromString(self.model)
        rules = proto.normalizer_spec
        user_defined = proto.SentencePiece.Type.USER_DEFINED
        return (
            not rules.add_dummy_prefix
            and not rules.remove_extra_whitespaces
            and not any("\n" in p.piece and p.piece != "\n" for p in proto.pieces)
            and any(p.piece == "\n" and p.type == user_defined for p in proto.pieces)
        )
