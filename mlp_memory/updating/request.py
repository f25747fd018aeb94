"""What an update was asked for: checked before any work, and recorded in WORKDIR/update.json."""

import dataclasses
import functools
import glob
import json
import os
import re
from pathlib import Path
from typing import Any

from mlp_memory.artifacts import Directory, UserError, canonical_json, digest, first_line, peek
from mlp_memory.corpus.config import PartConfig
from mlp_memory.corpus.documents import file_sha256

RECORD = "update.json"

_PACKED = (".gz", ".bz2", ".xz")
_SOURCES = {".jsonl": "jsonl", ".parquet": "parquet", ".tokens": "wikitext"}


@dataclasses.dataclass(frozen=True)
class Request:
    """Documents to add and to delete.

    Attributes:
      base: the workdir that is updated.
      add: files of documents, in reading order.
      delete: numbers of documents in the base's train stream, ascending.
      delete_files: files of documents that are to be found there.
      text_field: of JSON lines and parquet files.
    """

    base: Directory
    add: tuple[str, ...]
    delete: tuple[int, ...]
    delete_files: tuple[str, ...]
    text_field: str

    @property
    def deletes(self) -> bool:
        """Whether documents are to be deleted."""
        return bool(self.delete or self.delete_files)

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """Plain JSON that says what was asked for; files by their contents."""
        return {
            "base": self.base.location,
            "add": {name: file_sha256(Path(name)) for name in self.add},
            "delete": list(self.delete),
            "delete_files": {name: file_sha256(Path(name)) for name in self.delete_files},
            "text_field": self.text_field,
        }

    def parts(self, names: tuple[str, ...]) -> list[tuple[PartConfig, Path]]:
        """How each of these files is read."""
        return [
            (PartConfig(source=_source(name), train_files=(name,), text_field=self.text_field), Path(name))
            for name in names
        ]


def read_request(base: Directory, add: list[str], delete: list[str], text_field: str) -> Request:
    """The request that flags make.

    Args:
      base: the workdir that is updated.
      add: paths or globs of documents to add.
      delete: document numbers ("17", "3,5-9") or paths and globs of documents to delete.
      text_field: see `Request`.

    Raises:
      UserError: nothing is asked for, or a file is not there.
    """
    numbers, files = set(), []
    for text in delete:
        found = _numbers(text)
        if found is None:
            files += _files("--delete", text)
        else:
            numbers |= found
    added = [name for text in add for name in _files("--add", text)]
    if not (numbers or files or added):
        raise UserError("update: give --add=FILE or --delete=DOCUMENTS (see update --help)")
    return Request(base, tuple(added), tuple(sorted(numbers)), tuple(files), text_field)


def keep_record(workdir: Directory, request: Request) -> str:
    """Writes the record, or compares it with the one that is there; its digest.

    Raises:
      UserError: the workdir was begun with another request.
    """
    wanted = canonical_json(request.record)
    found = workdir.read(RECORD)
    if found is None:
        if workdir.names():
            raise UserError(f"--output {workdir} is not empty: give a folder of its own")
        workdir.write(RECORD, wanted.encode())
    elif found.decode(errors="replace") != wanted:
        raise UserError(
            f"--output {workdir} was begun with {_difference(found, json.loads(wanted))}: give the same "
            "again, or another folder"
        )
    return digest(wanted.encode())


def read_record(workdir: Directory) -> dict[str, Any] | None:
    """The record of a workdir that is an update; None of one that is not.

    Raises:
      UserError: it is damaged.
    """
    data = workdir.read(RECORD) if not workdir.is_local or workdir.path.is_dir() else None
    if data is None:
        return None
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{workdir}/{RECORD} is damaged ({first_line(error)}): run `update` afresh"
        ) from error


def restore_record(workdir: Directory) -> None:
    """Writes the record again as the token stream of the update has it.

    Raises:
      UserError: there is no such stream yet.
    """
    manifest = peek(workdir / "corpus/train")
    text = canonical_json(manifest.facts.get("update") if manifest else None)
    if manifest is None or digest(text.encode()) != manifest.parents.get("update"):
        raise UserError(f"{workdir}/{RECORD} is damaged: give the `update` command again, into a new folder")
    workdir.write(RECORD, text.encode())


def _difference(found: bytes, wanted: dict[str, Any]) -> str:
    try:
        before = dict(json.loads(found))
    except (ValueError, TypeError, RecursionError):
        return "something else (its update.json is damaged)"
    name = next((name for name in wanted if before.get(name) != wanted[name]), "something")
    value = before.get(name)
    return f"other {name} = {sorted(value) if isinstance(value, dict) else value}"


def _numbers(text: str) -> set[int] | None:
    """The numbers of "3,5-9"; None if it is something else."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        return None
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise UserError(f"--delete={text}: {part} is no range, its end comes first")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _files(flag: str, pattern: str) -> list[str]:
    expanded = os.path.expanduser(pattern)
    names = [expanded] if os.path.isfile(expanded) else sorted(glob.glob(expanded, recursive=True))
    names = [os.path.abspath(name) for name in names if os.path.isfile(name)]
    if not names:
        raise UserError(f"{flag}={pattern}: no such file")
    return names


def _source(name: str) -> str:
    """The kind of a file, by its name."""
    path = Path(name)
    suffix = Path(path.stem).suffix if path.suffix in _PACKED else path.suffix
    return _SOURCES.get(suffix, "text")
