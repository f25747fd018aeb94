"""Which split a document belongs to, and what each split holds.

The choice hashes the text itself, so exact duplicates share a split, and order, file
names and other documents do not matter.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

from mlp_memory.artifacts import UserError
from mlp_memory.corpus.config import SPLITS, CorpusConfig
from mlp_memory.corpus.documents import read_group
from mlp_memory.training.progress import Progress


def unit_hash(salt: str, text_sha256: bytes) -> float:
    """A number in [0, 1), uniform over texts and independent between salts."""
    return int.from_bytes(hashlib.sha256(salt.encode() + b"\0" + text_sha256).digest()[:8], "big") / 2.0**64


def split_of(text: str, group: str, config: CorpusConfig) -> str | None:
    """ "train", "validation" or "test"; None for a train document that `fraction` leaves out.

    Args:
      text: the document.
      group: which of the config's file lists it came from.
      config: fractions, and which lists are given.
    """
    sha256 = hashlib.sha256(text.encode()).digest()
    split = _whole_split_of(sha256, group, config)
    if split == "train" and unit_hash("fraction", sha256) >= config.fraction:
        return None
    return split


def _whole_split_of(sha256: bytes, group: str, config: CorpusConfig) -> str:
    if group == "test" or (group == "validation" and config.test_files):
        return group
    if group == "validation":
        return "validation" if unit_hash("half", sha256) < 0.5 else "test"
    position = unit_hash("split", sha256)
    validation = 0.0 if config.validation_files else config.validation_fraction
    test = 0.0 if config.validation_files or config.test_files else config.test_fraction
    if position < validation:
        return "validation"
    return "test" if position < validation + test else "train"


def groups_of(split: str, config: CorpusConfig) -> tuple[str, ...]:
    """The file lists that feed a split, in reading order."""
    if split == "train":
        return ("train",)
    if config.test_files and split == "test":
        return ("test",)
    return ("validation",) if config.validation_files else ("train",)


def read_split(config: CorpusConfig, files: dict[str, list[Path]], split: str) -> Iterator[str]:
    """The texts of a split in a fixed order, empty ones left out.

    Raises:
      UserError: a file cannot be read (see `documents.read_group`).
    """
    for group in groups_of(split, config):
        for text in read_group(config, files, group):
            if text and split_of(text, group, config) == split:
                yield text


@dataclasses.dataclass
class SplitFacts:
    """Counts over the documents of one split.

    Attributes:
      documents: with text.
      empty_documents: without any; they are left out of the token stream.
      words: separated by whitespace.
      bytes: of the texts in UTF-8.
      duplicated_documents: of validation or test, whose exact text is in train too.
    """

    documents: int = 0
    empty_documents: int = 0
    words: int = 0
    bytes: int = 0
    duplicated_documents: int = 0


def scan(config: CorpusConfig, files: dict[str, list[Path]]) -> dict[str, SplitFacts]:
    """Reads every document once, before anything is written, and counts.

    Raises:
      UserError: a document cannot be read, there is none with text, or a split is empty.
    """
    facts = {split: SplitFacts() for split in SPLITS}
    # Held-out texts by hash: how many documents of each split have it. Train is read last
    # and takes them out, so memory grows with the held-out texts alone.
    held_out: dict[bytes, dict[str, int]] = {}
    with Progress("read documents", sum(map(len, files.values())), "files") as progress:
        for group in ("validation", "test", "train"):
            for one_file in [{group: [path]} for path in files[group]] or [{group: []}]:
                for text in read_group(config, one_file, group):
                    _count(text, group, config, facts, held_out)
                progress.advance(len(one_file[group]))
    if not any(f.documents for f in facts.values()):
        where = ", ".join(config.train_files[:3]) or config.source
        raise UserError(f"no document with text in {where}: give files that hold text")
    for split in SPLITS:
        if not facts[split].documents:
            raise UserError(_empty_split(split, config, sum(f.documents for f in facts.values())))
    return facts


def _count(
    text: str,
    group: str,
    config: CorpusConfig,
    facts: dict[str, SplitFacts],
    held_out: dict[bytes, dict[str, int]],
) -> None:
    split = split_of(text, group, config)
    if split is None:
        return
    if not text:
        facts[split].empty_documents += 1
        return
    data = text.encode()
    facts[split].documents += 1
    facts[split].words += len(text.split())
    facts[split].bytes += len(data)
    if config.validation_files or config.test_files:
        sha256 = hashlib.sha256(data).digest()
        if split != "train":
            counts = held_out.setdefault(sha256, {})
            counts[split] = counts.get(split, 0) + 1
        else:
            for other, count in held_out.pop(sha256, {}).items():
                facts[other].duplicated_documents += count


def _empty_split(split: str, config: CorpusConfig, documents: int) -> str:
    found = f"the {split} split is empty ({documents} documents with text in all)"
    if split == "train":
        return f"{found}: raise fraction (now {config.fraction:g}) or give more train_files"
    if groups_of(split, config) == ("train",):
        value = getattr(config, f"{split}_fraction")
        return f"{found}: raise {split}_fraction (now {value:g}), give {split}_files or more documents"
    if getattr(config, f"{split}_files") and (split == "test" or config.test_files):
        return f"{found}: {split}_files hold no text, give others"
    return f"{found}: validation and test share validation_files; add documents to them or give test_files"
