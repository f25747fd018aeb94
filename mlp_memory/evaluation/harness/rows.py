"""Rows of benchmark files: JSON, JSON lines, CSV and TSV, plain or packed.

A file that cannot be read is refused with its line; a row that no task can use is another matter (`tasks`).
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlp_memory.artifacts import UserError, first_line

_PACKED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_MOST_FIELD = 1 << 24
_MOST_BYTES = 1 << 28


class Row(NamedTuple):
    """Fields of one row, or what is wrong with it, and where it stands."""

    where: str
    fields: dict[str, Any]
    fault: str = ""


def find(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of the files that is there, packed or not; None where none is."""
    for name in names:
        for suffix in ("", *_PACKED):
            if (path := folder / f"{name}{suffix}").is_file():
                return path
    return None


def read(path: Path, columns: Sequence[str] = ()) -> list[Row]:
    """Every row of a file, in order.

    Args:
      path: ends in .json, .jsonl, .csv or .tsv, then perhaps .gz, .xz or .bz2.
      columns: names of the columns of a table that may have no head; a first row of just these names is one.

    Raises:
      UserError: the file is damaged, no UTF-8, or not what its name says; with the line.
    """
    suffixes = [s for s in path.suffixes if s not in _PACKED]
    kind = suffixes[-1] if suffixes else ""
    text = _text(path)
    if kind in (".csv", ".tsv"):
        return list(_table(path, text, "\t" if kind == ".tsv" else ",", columns))
    if kind in (".json", ".jsonl"):
        return list(_json(path, text))
    raise UserError(f"{path}: give a .json, .jsonl, .csv or .tsv file, or one of them packed")


def _text(path: Path) -> str:
    try:
        if path.suffix in _PACKED and not path.stat().st_size:
            raise EOFError("0 bytes")  # gzip takes an empty file for an empty text
        with _PACKED.get(path.suffix, open)(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES >> 20} MiB, too much for a benchmark")
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): fetch or make it again") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8: convert the file to UTF-8"
        ) from error


def _json(path: Path, text: str) -> Iterator[Row]:
    """An array, an object whose "Data" or "data" is one, or an object on each line."""
    try:
        whole = json.loads(text)
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply: mend the file") from error
    except ValueError as error:
        if not isinstance(error, json.JSONDecodeError):  # a number of thousands of digits
            raise UserError(f"{path}: not JSON ({first_line(error)}): mend the file") from error
        # Lines of objects look, as a whole, like an object with something after it.
        if not text.lstrip().startswith("{") or not error.msg.startswith("Extra data"):
            raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}): mend the file") from error
        yield from _json_lines(path, text)
        return
    if isinstance(whole, dict):
        inner = next((whole[key] for key in ("Data", "data") if isinstance(whole.get(key), list)), [whole])
    else:
        inner = whole
    if not isinstance(inner, list):
        raise UserError(
            f"{path}, line 1: a JSON {type(inner).__name__}, not an array or objects: mend the file"
        )
    for number, item in enumerate(inner, 1):
        yield _row(f"{path.name}, item {number}", item)


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    # Not splitlines(): texts may hold other characters that it takes for ends of lines.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}, line {number}: not JSON ({first_line(error)}): mend the line"
                ) from error
            yield _row(f"{path.name}, line {number}", item)


def _row(where: str, item: Any) -> Row:
    return Row(where, item) if isinstance(item, dict) else Row(where, {}, "not an object")


def _table(path: Path, text: str, delimiter: str, columns: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(_MOST_FIELD)
    # Quotation marks in tables set apart by tabs are text.
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    head, line, seen = list(columns), 1, False
    try:
        for cells in reader:
            where, line = f"{path.name}, line {line}", reader.line_num + 1
            if not cells:
                continue
            first, seen = not seen, True
            if not head or (first and set(cells) == set(head)):
                head = cells
            elif len(cells) != len(head):
                yield Row(where, {}, f"{len(cells)} columns, not {len(head)}")
            else:
                yield Row(where, dict(zip(head, cells)))
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: not a table ({first_line(error)}): mend the file") from error
