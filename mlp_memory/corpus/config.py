"""What a corpus is made of: the settings of the `tokenize` stage."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from mlp_memory.artifacts import UserError, runtime

SOURCES = ("python_docs", "jsonl", "text", "parquet", "wikitext", "tfds", "hf_dataset")
MIXTURE = "mixture"
SPLITS = ("train", "validation", "test")
# pad, unk, bos, eos, newline, 256 bytes: what a trained vocabulary holds before the first learned piece.
RESERVED_PIECES = 261


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where documents are and how they are split.

    Attributes:
      source: "python_docs" (ships inside Python, no files), "jsonl" (one JSON object a
        line), "text" (one file, one document), "parquet" (one row, one document),
        "wikitext" (WikiText's .tokens files, one article, one document), "hf_dataset" (a
        folder of Hugging Face `save_to_disk`) or "tfds" (TensorFlow Datasets). Names of
        jsonl, text and wikitext files ending in .gz, .bz2 or .xz are unpacked.
      train_files, validation_files, test_files: paths or globs; with "hf_dataset" folders,
        where one of several splits gives each split to its list; with "tfds" splits
        ("train", "train[:90%]"). Without validation_files and test_files both come out of
        train_files by hash. With validation_files alone its documents are shared half and
        half between validation and test.
      text_field: the field or column that holds the text.
      max_document_mb: a line or a document of more megabytes is refused before memory is full of it: a small
        packed file can hold a line without end. Files may be of any length.
      fraction: share of the train documents kept, chosen by a stable hash; a larger share
        holds every document of a smaller one.
      validation_fraction, test_fraction: shares of the documents, by hash, where a split
        has no files.
      tfds_name: of a TensorFlow dataset, "imdb_reviews/plain_text:1.0.0" say.
      tfds_data_dir: the folder it was prepared in; None for ~/tensorflow_datasets.
      tfds_download: whether it may be downloaded and prepared there.

    Raises:
      UserError: a value is of the wrong type or out of range.
    """

    source: str = "python_docs"
    train_files: tuple[str, ...] = ()
    validation_files: tuple[str, ...] = ()
    test_files: tuple[str, ...] = ()
    text_field: str = "text"
    max_document_mb: int = runtime(1024)
    fraction: float = 1.0
    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    tfds_name: str | None = None
    tfds_data_dir: str | None = None
    tfds_download: bool = runtime(False)

    _sources: ClassVar[tuple[str, ...]] = SOURCES

    def __post_init__(self) -> None:
        if self.source not in self._sources:
            raise UserError(
                f"corpus source {self.source!r} is unknown: use one of {', '.join(self._sources)}"
            )
        for split in SPLITS:
            name = f"{split}_files"
            object.__setattr__(self, name, _as_files(name, getattr(self, name)))
        if self.source in ("python_docs", MIXTURE):
            for split in SPLITS:
                if files := getattr(self, f"{split}_files"):
                    raise UserError(
                        f"{split}_files = {files!r} with source {self.source!r}, which reads no files: "
                        "use another source, 'jsonl' say, or leave it out"
                    )
        elif not self.train_files:
            what = "a split, 'train' say" if self.source == "tfds" else "a path or a glob"
            raise UserError(f"source {self.source!r} needs train_files: give {what}")
        if not isinstance(self.text_field, str) or not self.text_field:
            raise UserError(f"text_field = {self.text_field!r}: give the name of a field or column")
        if type(self.max_document_mb) is not int or self.max_document_mb < 1:
            raise UserError(f"max_document_mb = {self.max_document_mb!r}: give a whole number, 1 or more")
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
        for name in ("tfds_name", "tfds_data_dir"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise UserError(f"{name} = {value!r}: give a text or leave it out")
        if self.source == "tfds" and self.tfds_name is None:
            raise UserError("source 'tfds' needs tfds_name: give a dataset, 'imdb_reviews:1.0.0' say")
        if not isinstance(self.tfds_download, bool):
            raise UserError(f"tfds_download = {self.tfds_download!r}: give True or False")

    @property
    def sources(self) -> "dict[str, SourceConfig]":
        """What documents are read from, by name: itself under ""."""
        return {"": self}

    @property
    def word_count(self) -> str:
        """How words are counted (see `split.count_words`): "wikitext" or "whitespace"."""
        return "wikitext" if self.source == "wikitext" else "whitespace"


@dataclasses.dataclass(frozen=True)
class PartConfig(SourceConfig):
    """One part of a mixture; in gin `NAME/part.source = ...`.

    Attributes:
      rate: its share of the mixture's train text in bytes, relative to the other parts'
        rates; None, for all parts or for none, takes every document.
    """

    rate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate is not None and (not _is_number(self.rate) or not 0 < self.rate < float("inf")):
            raise UserError(f"rate = {self.rate!r}: give a number above 0")


@dataclasses.dataclass(frozen=True)
class CorpusConfig(SourceConfig):
    """The texts of a corpus and its vocabulary.

    Attributes:
      source: also "mixture", whose parts have files and held-out fractions of their own;
        here only `fraction` then counts, on top of theirs.
      parts: of a mixture, by name.
      elsewhere: texts of other kinds, by name, that nothing is trained on: a gate can be told of them
        (`gate.guards`), and evaluation scores them. All documents of all their files are taken.
      vocab_size: pieces of the trained vocabulary, special ones counted; not used with
        vocab_file.
      vocab_file: a tokenizer to take over: a tokenizer.json, a SentencePiece model, GPT-2's
        encoder.json or vocab.bpe, a folder with one of these, or "bytes". None takes that
        of `pretrained.source`, where there is one.
      bos, eos: the tokens around a document, by name; None takes the tokenizer's own.
      lossless: extend a SentencePiece vocab_file that cannot write every text (T5's, say) by
        256 byte pieces and let it keep whitespace; its ids stay. False takes it as it is.
      chunk_rows: tokens in one stored chunk.
      workers: processes that tokenise a large corpus; None for one a usable core.

    Raises:
      UserError: a value is of the wrong type or out of range.
    """

    parts: dict[str, PartConfig] = dataclasses.field(default_factory=dict)
    # Each is an artifact of its own, so that one more changes nothing that is there.
    elsewhere: dict[str, PartConfig] = dataclasses.field(default_factory=dict, metadata={"runtime": True})
    vocab_size: int = 4096
    vocab_file: str | None = None
    bos: str | None = None
    eos: str | None = None
    lossless: bool = True
    chunk_rows: int = 65536
    workers: int | None = runtime(None)

    _sources: ClassVar[tuple[str, ...]] = (*SOURCES, MIXTURE)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "parts", _as_parts("parts", self.parts))
        object.__setattr__(self, "elsewhere", _as_parts("elsewhere", self.elsewhere))
        for name, part in self.elsewhere.items():
            if name in (*SPLITS, "vocabulary"):
                raise UserError(f"elsewhere {name!r}: the corpus has a {name} of its own, give another name")
            if part.rate is not None:
                raise UserError(f"elsewhere {name!r} has a rate: use fraction, all its documents stand alone")
        if self.source == MIXTURE and not self.parts:
            raise UserError("source 'mixture' needs parts: give {'books': @books/part(), ...}")
        if self.source != MIXTURE and self.parts:
            raise UserError(f"parts with source {self.source!r}: use source 'mixture', or leave parts out")
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

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """What documents are read from, by name: a mixture's parts, else itself under ""."""
        return dict(self.parts) if self.source == MIXTURE else super().sources


def _as_parts(setting: str, parts: Any) -> dict[str, PartConfig]:
    """Parts in the order of their names, which is the only one that JSON and gin both keep."""
    if parts is None:
        return {}
    if not isinstance(parts, Mapping) or not all(isinstance(p, PartConfig) for p in parts.values()):
        raise UserError(f"{setting} = {parts!r}: give {{'books': @books/part(), ...}}")
    for name in parts:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"part {name!r}: name it with letters, digits, '_', '-' and '.' only")
    if len({part.rate is None for part in parts.values()}) > 1:
        missing = next(name for name, part in parts.items() if part.rate is None)
        raise UserError(f"part {missing!r} has no rate, others have: give every part one, or none")
    return dict(sorted(parts.items()))


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
