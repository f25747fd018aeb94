"""What a corpus is made of: the settings of the `tokenize` stage."""

import dataclasses
import os
from typing import Any

from mlp_memory.artifacts import UserError, runtime

SOURCES = ("python_docs", "jsonl", "text")
SPLITS = ("train", "validation", "test")
# pad, unk, bos, eos, newline, 256 bytes: what a trained vocabulary holds before the first learned piece.
RESERVED_PIECES = 261


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """Where the text is, how it is split, and the vocabulary.

    Attributes:
      source: "python_docs" (ships inside Python, no files), "jsonl" (one JSON object a
        line) or "text" (one file, one document). Names ending in .gz or .xz are unpacked.
      train_files, validation_files, test_files: paths or globs. Without validation_files
        and test_files both come out of train_files by hash. With validation_files alone
        its documents are shared half and half between validation and test.
      text_field: the field of a JSON line that holds the text.
      fraction: share of the train documents kept, chosen by a stable hash; a larger share
        holds every document of a smaller one.
      validation_fraction, test_fraction: shares of the documents, by hash, where a split
        has no files.
      vocab_size: pieces of the trained vocabulary, special ones counted; not used with
        vocab_file.
      vocab_file: a tokenizer to take over: a tokenizer.json, a SentencePiece model, GPT-2's
        encoder.json or vocab.bpe, a folder with one of these, or "bytes".
      bos, eos: the tokens around a document, by name; None takes the tokenizer's own.
      lossless: extend a SentencePiece vocab_file that cannot write every text (T5's, say) by
        256 byte pieces and let it keep whitespace; its ids stay. False takes it as it is.
      chunk_rows: tokens in one stored chunk.
      workers: processes that tokenise a large corpus; None for one a usable core.

    Raises:
      UserError: a value is of the wrong type or out of range.
    """

    source: str = "python_docs"
    train_files: tuple[str, ...] = ()
    validation_files: tuple[str, ...] = ()
    test_files: tuple[str, ...] = ()
    text_field: str = "text"
    fraction: float = 1.0
    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    vocab_size: int = 4096
    vocab_file: str | None = None
    bos: str | None = None
    eos: str | None = None
    lossless: bool = True
    chunk_rows: int = 65536
    workers: int | None = runtime(None)

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise UserError(f"corpus source {self.source!r} is unknown: use one of {', '.join(SOURCES)}")
        for split in SPLITS:
            name = f"{split}_files"
            object.__setattr__(self, name, _as_files(name, getattr(self, name)))
        if self.source == "python_docs":
            for split in SPLITS:
                if files := getattr(self, f"{split}_files"):
                    raise UserError(
                        f"{split}_files = {files!r} with source 'python_docs', which reads no files: "
                        "use source 'jsonl' or 'text', or leave it out"
                    )
        elif not self.train_files:
            raise UserError(f"source {self.source!r} needs train_files: give a path or a glob")
        if not isinstance(self.text_field, str) or not self.text_field:
            raise UserError(f"text_field = {self.text_field!r}: give the name of a JSON field")
        if not _is_number(self.fraction) or not 0 < self.fraction <= 1:
            raise UserError(f"fraction = {self.fraction!r}: give a number above 0 and at most 1")
        for name in ("validation_fraction", "test_fraction"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                raise UserError(f"{name} = {value!r}: give a number from 0 to below 1")
        if self.validation_fraction + self.test_fraction >= 1:
            raise UserError(
                f"validation_fraction + test_fraction = {self.validation_fraction + self.test_fraction:g} "
                "leaves nothing to train on: make their sum smaller than 1"
            )
        if not _is_int(self.vocab_size) or not RESERVED_PIECES < self.vocab_size < 2**31:
            raise UserError(f"vocab_size = {self.vocab_size!r}: give a whole number above {RESERVED_PIECES}")
        if self.vocab_file is not None:
            if not isinstance(self.vocab_file, str | os.PathLike) or not os.fspath(self.vocab_file):
                raise UserError(f'vocab_file = {self.vocab_file!r}: give the path of a tokenizer or "bytes"')
            object.__setattr__(self, "vocab_file", os.fspath(self.vocab_file))
        for name in ("bos", "eos"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise UserError(f"{name} = {value!r}: give a token of the tokenizer by its name, or None")
        if not isinstance(self.lossless, bool):
            raise UserError(f"lossless = {self.lossless!r}: give True or False")
        if self.workers is not None and (not _is_int(self.workers) or self.workers < 1):
            raise UserError(f"workers = {self.workers!r}: give a whole number above 0, or None for all cores")
        if not _is_int(self.chunk_rows) or self.chunk_rows < 1:
            raise UserError(f"chunk_rows = {self.chunk_rows!r}: give a whole number above 0")


def _as_files(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    items = [value] if isinstance(value, str | os.PathLike) else value
    if not isinstance(items, list | tuple) or not all(isinstance(i, str | os.PathLike) for i in items):
        raise UserError(f"{name} = {value!r}: give a path, a glob or a list of them")
    if not all(os.fspath(item) for item in items):
        raise UserError(f"{name} = {value!r} has an empty path: leave it out or fill it in")
    return tuple(os.fspath(item) for item in items)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
