"""Documents out of files: JSON lines and plain text, as they are or packed with gzip or xz."""

import glob
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mlp_memory.artifacts import UserError, first_line
from mlp_memory.corpus import python_docs
from mlp_memory.corpus.config import SPLITS, CorpusConfig

_PACKED = {".gz": gzip.open, ".xz": lzma.open}


def input_files(config: CorpusConfig) -> dict[str, list[Path]]:
    """The files of each group ("train", "validation", "test"), globs resolved and sorted.

    Raises:
      UserError: a path or glob matches no file, or one file is in two groups.
    """
    files = {group: _matches(group, getattr(config, f"{group}_files")) for group in SPLITS}
    owner: dict[str, str] = {}
    for group, paths in files.items():
        for path in paths:
            before = owner.setdefault(os.path.realpath(path), group)
            if before != group:
                raise UserError(f"{path} is in {before}_files and in {group}_files: take it out of one")
    return files


def _matches(group: str, patterns: tuple[str, ...]) -> list[Path]:
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
            if os.path.isdir(name):
                raise UserError(f"{group}_files: {name} is a folder: give its files, {name}/* say")
            found.setdefault(os.path.realpath(name), Path(name))
    return list(found.values())


def read_group(config: CorpusConfig, files: dict[str, list[Path]], group: str) -> Iterator[str]:
    """The text of every document of a group, in the order of its files; texts may be empty.

    Raises:
      UserError: with the file and the line, where a file cannot be read or understood.
    """
    if config.source == "python_docs":
        if group == "train":
            yield from python_docs.documents()
        return
    for path in files[group]:
        yield from read_file(config, path)


def read_file(config: CorpusConfig, path: Path) -> Iterator[str]:
    """The text of every document of one file (see `read_group`)."""
    if config.source == "text":
        yield _decode(path, 1, b"".join(line for _, line in _lines(path)))
        return
    for number, line in _lines(path):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield _field(path, number, _decode(path, number, line), config.text_field)


def _open(path: Path) -> BinaryIO:
    opener = _PACKED.get(path.suffix)
    if opener is not None and path.stat().st_size == 0:
        raise EOFError("0 bytes")  # gzip takes an empty file for an empty text
    return (opener or open)(path, "rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers from 1, their ends kept."""
    number = 0
    try:
        with _open(path) as file:
            for line in file:
                number += 1
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


def _field(path: Path, number: int, line: str, name: str) -> str:
    where = f"{path}, line {number}"
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
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
