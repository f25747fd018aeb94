"""Documents out of files of every kind, in a fixed order, a document or a few in memory at a time."""

import bz2
import contextlib
import glob
import gzip
import hashlib
import itertools
import json
import lzma
import os
import platform
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from mlp_memory.artifacts import UserError, first_line
from mlp_memory.corpus import arrow, python_docs, tfds, wikitext
from mlp_memory.corpus.config import SPLITS, SourceConfig

_PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

_MEGABYTE = 1_000_000

Files = dict[str, list[Path | str]]
"""Group -> its files, or its splits with "tfds". A group is "train", "validation" or "test",
after "NAME/" for a mixture's part."""


def input_files(config: SourceConfig) -> Files:
    """The files of each group, globs and folders resolved, in reading order.

    Raises:
      UserError: a path or glob matches no file, or one file is in two groups.
    """
    files: Files = {}
    for name, source in config.sources.items():
        with naming_part(name):
            for group in SPLITS:
                files[f"{name}/{group}" if name else group] = _source_files(source, group)
    owner: dict[str, str] = {}
    for name, source in config.sources.items():
        for group, paths in files_of_source(files, name).items():
            label = f"{name}/{group}_files" if name else f"{group}_files"
            for path in paths:
                key = f"{source.tfds_name}:{path}" if source.source == "tfds" else os.path.realpath(path)
                before = owner.setdefault(key, label)
                if before != label:
                    raise UserError(f"{path} is in {before} and in {label}: take it out of one")
    return files


def files_of_source(files: Files, name: str) -> Files:
    """The files of one of `SourceConfig.sources`, by group."""
    return {group: files[f"{name}/{group}" if name else group] for group in SPLITS}


@contextlib.contextmanager
def naming_part(name: str, setting: str = "parts") -> Iterator[None]:
    """Says which of a mixture's parts or texts elsewhere a `UserError` is about; "" is the corpus itself."""
    try:
        yield
    except UserError as error:
        if not name:
            raise
        raise UserError(f'corpus.{setting}["{name}"]: {error}') from error


def fingerprints(config: SourceConfig, files: Files) -> dict[str, str]:
    """What the texts come from: each file's sha256, and the version of Python where it is read.

    Raises:
      UserError: a file cannot be read.
    """
    found = {}
    for name, source in config.sources.items():
        if source.source == "python_docs":
            found["python"] = platform.python_version()
        with naming_part(name):
            for path in itertools.chain(*files_of_source(files, name).values()):
                for file in tfds.split_files(source, path) if source.source == "tfds" else [path]:
                    found[str(file)] = file_sha256(file)
    return found


def file_sha256(path: Path) -> str:
    """16 hex digits.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check the path and its permissions"
        ) from error


def _source_files(source: SourceConfig, group: str) -> list[Path | str]:
    patterns = getattr(source, f"{group}_files")
    if source.source == "tfds":
        return list(dict.fromkeys(patterns))
    if source.source != "hf_dataset":
        return _matches(group, patterns, folders=False)
    found = []
    # A folder of several splits under train_files brings the others along.
    for folder in _matches(group, patterns or source.train_files, folders=True):
        if patterns or arrow.is_dataset_dict(folder):
            files = arrow.dataset_files(folder, group)
            if patterns and not files:
                raise UserError(f"{group}_files: {folder} has no split {group!r}: give {folder}/SPLIT")
            found += files
    return found


def _matches(group: str, patterns: tuple[str, ...], folders: bool) -> list[Path]:
    found: dict[str, Path] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        if "://" in expanded:
            raise UserError(f"{group}_files: {pattern!r} is not on this machine: copy it here first")
        # A file whose name holds glob characters is meant literally.
        names = [expanded] if os.path.exists(expanded) else sorted(glob.glob(expanded, recursive=True))
        if not names:
            raise UserError(f"{group}_files: no file matches {pattern!r}: check the path")
        for name in names:
            if os.path.isdir(name) and not folders:
                raise UserError(f"{group}_files: {name} is a folder: give its files, {name}/* say")
            if folders and not os.path.isdir(name):
                raise UserError(f"{group}_files: {name} is no folder: give one that save_to_disk wrote")
            found.setdefault(os.path.realpath(name), Path(name))
    return list(found.values())


def read_group(source: SourceConfig, files: Files, group: str) -> Iterator[str]:
    """The text of every document of a group, in the order of its files; texts may be empty.

    Raises:
      UserError: with the file and the line or row, where a file cannot be read or understood.
    """
    if source.source == "python_docs":
        if group == "train":
            yield from python_docs.documents()
        return
    for path in files[group]:
        yield from read_file(source, path)


def read_file(source: SourceConfig, path: Path | str) -> Iterator[str]:
    """The text of every document of one file (see `read_group`)."""
    return _READERS[source.source](source, path)


def _whole_file(source: SourceConfig, path: Path) -> Iterator[str]:
    yield _decode(path, 1, b"".join(line for _, line in _bounded(source, path, _lines(source, path))))


def _json_lines(source: SourceConfig, path: Path) -> Iterator[str]:
    for number, line in _lines(source, path):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield _field(path, number, _decode(path, number, line), source.text_field)


def _wikitext(source: SourceConfig, path: Path) -> Iterator[str]:
    lines = (_decode(path, number, line) for number, line in _lines(source, path))
    number = 1
    try:
        for article in wikitext.articles(lines, source.max_document_mb * _MEGABYTE):
            yield article
            number += article.count("\n")
    except OverflowError as error:
        raise _too_long(source, f"{path}, line {number}: the article") from error


def _parquet(source: SourceConfig, path: Path) -> Iterator[str]:
    yield from _decode_rows(path, arrow.parquet_values(path, source.text_field))


def _hf_dataset(source: SourceConfig, path: Path) -> Iterator[str]:
    yield from _decode_rows(path, arrow.arrow_values(path, source.text_field))


def _tfds(source: SourceConfig, split: str) -> Iterator[str]:
    yield from _decode_rows(f"{source.tfds_name}, {split}", tfds.values(source, split))


_READERS: dict[str, Callable[[SourceConfig, Path | str], Iterator[str]]] = {
    "jsonl": _json_lines,
    "text": _whole_file,
    "parquet": _parquet,
    "wikitext": _wikitext,
    "hf_dataset": _hf_dataset,
    "tfds": _tfds,
}


def _open(path: Path) -> BinaryIO:
    opener = _PACKED.get(path.suffix)
    if opener is not None and path.stat().st_size == 0:
        raise EOFError("0 bytes")  # gzip takes an empty file for an empty text
    return (opener or open)(path, "rb")


def _too_long(source: SourceConfig, what: str) -> UserError:
    limit = f"max_document_mb = {source.max_document_mb}"
    return UserError(f"{what} is longer than {limit} allows: set it higher if that is meant")


def _bounded(
    source: SourceConfig, path: Path, lines: Iterator[tuple[int, bytes]]
) -> Iterator[tuple[int, bytes]]:
    """Lines that are one document."""
    size = 0
    for number, line in lines:
        size += len(line)
        if size > source.max_document_mb * _MEGABYTE:
            raise _too_long(source, f"{path}, line {number}: the document")
        yield number, line


def _lines(source: SourceConfig, path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers from 1, their ends kept."""
    number, most = 0, source.max_document_mb * _MEGABYTE
    try:
        with _open(path) as file:
            while line := file.readline(most + 1):
                number += 1
                if len(line) > most:
                    raise _too_long(source, f"{path}, line {number}: the line")
                yield number, line
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise UserError(
            f"{path}, line {number + 1}: cannot be read ({first_line(error)}): "
            "the file is cut off or damaged, fetch or make it again"
        ) from error


def _decode(path: Path, first_line_number: int, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = first_line_number + data.count(b"\n", 0, error.start)
        raise UserError(
            f"{path}, line {number}: byte 0x{data[error.start]:02x} is not UTF-8: convert the file to UTF-8"
        ) from error


def _decode_rows(where: Path | str, rows: Iterator[tuple[int, bytes]]) -> Iterator[str]:
    for number, data in rows:
        try:
            yield data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}, row {number}: byte 0x{data[error.start]:02x} is not UTF-8: mend or delete the row"
            ) from error


def _field(path: Path, number: int, line: str, name: str) -> str:
    where = f"{path}, line {number}"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({first_line(error)}): mend or delete the line") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: a JSON {type(value).__name__}, not an object: one {{...}} a line is read")
    if name not in value:
        fields = ", ".join(sorted(value)[:8]) or "none"
        raise UserError(f"{where}: no field {name!r} (its fields: {fields}): set text_field")
    text = value[name]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {name!r} is {type(text).__name__}, not text: set text_field")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field {name!r} has half of a surrogate pair (\\u{ord(text[error.start]):04x}): "
            "mend or delete the line"
        ) from error
    return text
