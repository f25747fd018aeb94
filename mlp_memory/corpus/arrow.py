"""Text columns of parquet files and of Hugging Face `datasets` folders; the one importer of pyarrow.

A Hugging Face folder (`Dataset.save_to_disk`) names Arrow streams in state.json, or the
folders of its splits in dataset_dict.json, so that the `datasets` library is not needed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlp_memory.artifacts import UserError, first_line

_BATCH_ROWS = 256
_READ_BYTES = 1 << 20
# Ends a whole Arrow stream; without it the reader takes a file cut between batches for whole.
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def parquet_values(path: Path, column: str) -> Iterator[tuple[int, bytes]]:
    """(row from 1, UTF-8) of a text column; a batch of rows is in memory at a time.

    Raises:
      UserError: with file and row, where the file is damaged, has no such column of text, or
        a text is null.
    """
    import pyarrow.parquet as pq

    # Pages are read as they are needed, instead of a row group's whole column at once.
    lazily = {"buffer_size": _READ_BYTES, "pre_buffer": False}
    with _damage(path) as rows:
        with pq.ParquetFile(path) as file:
            _check_column(path, file.schema_arrow, column)
        # A text that a dictionary holds once stays there once, however many rows say it.
        once = {"read_dictionary": [column], "page_checksum_verification": True}
        with pq.ParquetFile(path, **lazily, **once) as file:
            yield from rows.values(file.iter_batches(_BATCH_ROWS, columns=[column]), column)


def arrow_values(path: Path, column: str) -> Iterator[tuple[int, bytes]]:
    """(row from 1, UTF-8) of a text column of an Arrow stream, batch by batch (see `parquet_values`)."""
    import pyarrow as pa

    with _damage(path) as rows:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - len(_END_OF_STREAM)))
            whole = file.read() == _END_OF_STREAM
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            _check_column(path, stream.schema, column)
            yield from rows.values(stream, column)
        if not whole:
            raise EOFError("no end of stream")


class _damage:
    """Counts rows, and turns pyarrow's errors into one line with file and row."""

    def __init__(self, path: Path):
        self._path, self._row = path, 0

    def __enter__(self) -> "_damage":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        import pyarrow as pa

        if isinstance(error, pa.ArrowException | OSError | EOFError | ValueError | KeyError):
            raise UserError(
                f"{self._path}, row {self._row + 1}: cannot be read ({first_line(error)}): "
                "the file is cut off or damaged, fetch or make it again"
            ) from error

    def values(self, batches: Any, column: str) -> Iterator[tuple[int, bytes]]:
        """Rows of the batches, with their numbers from 1."""

        for batch in batches:
            for data in _bytes_of(batch.column(column)):
                if data is None:
                    raise UserError(
                        f"{self._path}, row {self._row + 1}: column {column!r} is null: "
                        "fill it in or delete the row"
                    )
                self._row += 1
                yield self._row, data


def _bytes_of(texts: Any) -> Iterator[bytes | None]:
    """The values of an array of texts as bytes: pyarrow does not check that a text is UTF-8.

    Nor does it check an Arrow file's offsets, unless asked: those of a damaged one lead anywhere in memory.
    """
    import pyarrow as pa

    if pa.types.is_dictionary(texts.type):
        texts.indices.validate(full=True)
        held = list(_bytes_of(texts.dictionary))
        for place in texts.indices:
            index = place.as_py()
            if index is not None and not 0 <= index < len(held):
                raise pa.ArrowInvalid(f"text {index} of a dictionary of {len(held)}")
            yield None if index is None else held[index]
        return
    plain = {
        pa.string(): pa.binary(),
        pa.large_string(): pa.large_binary(),
        pa.string_view(): pa.binary_view(),
    }
    texts = texts.view(plain.get(texts.type, texts.type))
    texts.validate(full=True)
    for value in texts:
        yield value.as_py()


def _check_column(path: Path, schema: Any, column: str) -> None:
    import pyarrow as pa

    found = schema.get_all_field_indices(column)
    if len(found) != 1:
        columns = ", ".join(sorted(set(schema.names))[:8]) or "none"
        how_many = "no column" if not found else f"{len(found)} columns"
        raise UserError(f"{path}, row 1: {how_many} {column!r} (its columns: {columns}): set text_field")
    kind = schema.field(found[0]).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    texts = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary())
    if kind not in texts:
        raise UserError(f"{path}, row 1: column {column!r} is {kind}, not text: set text_field")


def is_dataset_dict(folder: Path) -> bool:
    """Whether the folder holds several splits (`DatasetDict.save_to_disk`)."""
    return (folder / "dataset_dict.json").is_file()


def dataset_files(folder: Path, split: str) -> list[Path]:
    """The Arrow files of a folder in their order; of several splits those of `split`, if there.

    Raises:
      UserError: it is no such folder, a file is missing, or it is a view of other rows.
    """
    if is_dataset_dict(folder):
        names = _read_json(folder / "dataset_dict.json").get("splits") or []
        if not isinstance(names, list):
            raise UserError(f"{folder}/dataset_dict.json names no splits: save the dataset again")
        return dataset_files(folder / split, split) if split in names else []
    if not (folder / "state.json").is_file():
        raise UserError(f"{folder} has no state.json: give a folder that Dataset.save_to_disk wrote")
    state = _read_json(folder / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise UserError(f"{folder} is a selection of rows: call flatten_indices() and save_to_disk again")
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
        if outside := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
            raise UserError(
                f"{folder}/state.json names {outside[0]!r}, a file elsewhere: save the dataset again"
            )
        files = [folder / name for name in names]
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}/state.json names no data files: save the dataset again") from error
    for file in files:
        if len(file.name.encode(errors="replace")) > 255 or not file.is_file():
            raise UserError(f"{file}, which state.json names, does not exist: save the dataset again")
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): save the dataset again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is a JSON {type(value).__name__}, not an object: save the dataset again")
    return value
