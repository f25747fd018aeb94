import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlp_memory.artifacts import UserError
from mlp_memory.corpus import arrow
from mlp_memory.corpus.config import CorpusConfig
from mlp_memory.corpus.documents import input_files, read_file, read_group
from mlp_memory.corpus.split import read_split, scan

TYPES = [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]


def write_parquet(path: Path, column: pa.Array, rows: int = 10) -> Path:
    pq.write_table(pa.table({"id": list(range(len(column))), "body": column}), path, row_group_size=rows)
    return path


def write_stream(path: Path, column: pa.Array, rows: int = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"body": column})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        for batch in table.to_batches(rows):
            writer.write_batch(batch)
    return path


def write_dataset(folder: Path, shards: list[list[str]], **state) -> Path:
    """What Dataset.save_to_disk writes."""
    names = [f"data-{n:05}-of-{len(shards):05}.arrow" for n in range(len(shards))]
    for name, texts in zip(names, shards, strict=True):
        write_stream(folder / name, pa.array(texts, pa.string()))
    state = {"_data_files": [{"filename": name} for name in names], "_format_type": None, **state}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


WRITERS = {"parquet": write_parquet, "hf_dataset": write_stream}


def read(source: str, path: Path, field: str = "body") -> list[str]:
    return list(read_file(CorpusConfig(source, str(path), text_field=field), path))


def refused(source: str, path: Path, *parts: str, field: str = "body") -> None:
    with pytest.raises(UserError) as caught:
        read(source, path, field)
    for part in (str(path), *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", WRITERS)
@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_texts_of_every_type_come_back_in_their_order(tmp_path, make_text, source, kind):
    texts = [make_text(9) for _ in range(57)] + [""]
    data = [text.encode() for text in texts] if kind == pa.binary() else texts
    path = WRITERS[source](tmp_path / "a", pa.array(data).cast(kind))
    assert read(source, path) == texts


def test_row_groups_of_a_parquet_file_are_read_as_they_are_needed(tmp_path, rng):
    texts = ["".join(rng.choices("abcdefgh", k=2000)) for _ in range(600)]
    path = write_parquet(tmp_path / "a.parquet", pa.array(texts), rows=300)
    second = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    start = second.dictionary_page_offset or second.data_page_offset
    data[start : start + second.total_compressed_size] = bytes(second.total_compressed_size)
    path.write_bytes(data)
    found = read_file(CorpusConfig("parquet", str(path), text_field="body"), path)
    assert [next(found) for _ in range(256)] == texts[:256]  # the damage further on is not yet seen
    with pytest.raises(UserError, match="damaged"):
        list(found)


@pytest.mark.parametrize("source", WRITERS)
def test_a_bad_row_is_named(tmp_path, rng, source):
    before = rng.randrange(30)
    write = WRITERS[source]
    path = write(tmp_path / "null", pa.array(["x"] * before + [None, "y"]))
    refused(source, path, f"row {before + 1}:", "null", "body")
    path = write(tmp_path / "bytes", pa.array([b"x"] * before + [b"caf\xe9"]))
    refused(source, path, f"row {before + 1}:", "0xe9")


@pytest.mark.parametrize("source", WRITERS)
def test_a_missing_column_and_one_without_text_are_named(tmp_path, source):
    path = WRITERS[source](tmp_path / "a", pa.array([1, 2]))
    refused(source, path, "no column 'text'", "body", "text_field", field="text")
    refused(source, path, "int64", "text_field")


@pytest.mark.parametrize("source", WRITERS)
def test_a_file_cut_anywhere_is_an_error(tmp_path, rng, make_text, source):
    path = WRITERS[source](tmp_path / "a", pa.array([make_text(30) for _ in range(40)]))
    data = path.read_bytes()
    # An Arrow stream less its last 8 bytes ends between two batches.
    for size in [0, 1, 8, len(data) - 8, len(data) - 1, *rng.sample(range(9, len(data) - 8), 6)]:
        path.write_bytes(data[:size])
        refused(source, path, "row ", "damaged")


def test_a_saved_dataset_is_read_shard_by_shard(tmp_path, make_text):
    shards = [[make_text(5) for _ in range(n)] for n in (13, 0, 7)]
    folder = write_dataset(tmp_path / "d", shards)
    config = CorpusConfig("hf_dataset", str(folder), text_field="body")
    files = input_files(config)
    assert list(read_group(config, files, "train")) == [text for shard in shards for text in shard]
    assert not files["validation"]
    assert not files["test"]


@pytest.mark.parametrize("named", [(), ("validation",), ("validation", "test")])
def test_the_splits_of_a_dataset_dict_are_our_splits_by_its_name_or_theirs(tmp_path, make_text, named):
    wanted = {split: [make_text(5) for _ in range(9)] for split in ("train", "validation", "test")}
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": [*wanted, "extra"]}))
    for split, texts in wanted.items():
        write_dataset(tmp_path / split, [texts])
    config = CorpusConfig(
        "hf_dataset",
        str(tmp_path),
        text_field="body",
        **{f"{split}_files": str(tmp_path / split) for split in named},
    )
    files = input_files(config)
    facts = scan(config, files)
    for split, texts in wanted.items():
        assert list(read_split(config, files, split, facts)) == texts


def test_folders_that_cannot_be_read_are_named(tmp_path):
    cases = {
        "no state.json": tmp_path,
        "flatten_indices": write_dataset(tmp_path / "view", [["x"]], _indices_data_files=[{"filename": "i"}]),
        "no data files": write_dataset(tmp_path / "none", [["x"]], _data_files=3),
        "does not exist": write_dataset(tmp_path / "gone", [["x"]], _data_files=[{"filename": "b.arrow"}]),
    }
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/state.json").write_text('{"_data')
    cases["cannot be read"] = tmp_path / "torn"
    cases["no folder"] = write_parquet(tmp_path / "a.parquet", pa.array(["x"]))
    for words, folder in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            input_files(CorpusConfig("hf_dataset", str(folder)))
        assert "\n" not in str(caught.value)


def test_a_dataset_dict_without_the_asked_split_is_refused(tmp_path):
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    folder = write_dataset(tmp_path / "train", [["x"]])
    with pytest.raises(UserError, match="no split 'validation'"):
        input_files(CorpusConfig("hf_dataset", str(folder), str(tmp_path)))
    assert arrow.dataset_files(tmp_path, "validation") == []
