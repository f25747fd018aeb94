import bz2
import gzip
import json
import lzma

import pytest

from mlp_memory.artifacts import UserError
from mlp_memory.corpus.config import CorpusConfig
from mlp_memory.corpus.documents import input_files, read_file, read_group


def jsonl(*files, **values) -> CorpusConfig:
    return CorpusConfig(source="jsonl", train_files=tuple(map(str, files)), **values)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz"])
def test_json_lines_are_read_exactly_in_every_packing(tmp_path, make_text, write_jsonl, ending):
    texts = [make_text(50) for _ in range(7)] + ["", " \n"]
    path = write_jsonl(tmp_path / f"a{ending}", texts, field="body")
    assert list(read_file(jsonl(path, text_field="body"), path)) == texts


@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".txt.bz2", ".txt.xz", ".tokens"])
def test_a_text_file_is_one_document_with_its_line_ends_kept(tmp_path, make_text, ending):
    text = "\r\n first\r" + make_text(200) + "\n\n"
    path = tmp_path / f"a{ending}"
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(packed(text.encode()))
    assert list(read_file(CorpusConfig(source="text", train_files=str(path)), path)) == [text]


def test_globs_are_sorted_and_a_file_is_read_once(tmp_path, write_jsonl):
    for name in ("b", "a", "c[1]"):
        write_jsonl(tmp_path / f"{name}.jsonl", [name])
    config = jsonl(tmp_path / "c[1].jsonl", tmp_path / "*.jsonl", tmp_path / "a.jsonl")
    assert list(read_group(config, input_files(config), "train")) == ["c[1]", "a", "b"]


def test_blank_lines_and_a_byte_order_mark_are_no_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n  \n{"text": "two"}')
    assert list(read_file(jsonl(path), path)) == ["one", "two"]


def expect(message_parts: list[str], call) -> None:
    with pytest.raises(UserError) as caught:
        call()
    for part in message_parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "cut', "not JSON"),
        (b'["text"]', "list"),
        (b'{"body": "x"}', "body"),
        (b'{"text": null}', "NoneType"),
        (b'{"text": "\\ud800"}', "\\ud800"),
        (b'{"text": "\xff"}', "0xff"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_json_line_is_named_by_file_and_number(tmp_path, rng, line, why):
    before = rng.randrange(5)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n' * before + line + b'\n{"text": "x"}\n')
    expect([str(path), f"line {before + 1}:", why], lambda: list(read_file(jsonl(path), path)))


def test_the_line_of_an_undecodable_byte_is_named(tmp_path, rng):
    before = rng.randrange(1, 9)
    path = tmp_path / "a.txt"
    path.write_bytes("é\r\n".encode() * before + b"caf\xe9\n")
    config = CorpusConfig(source="text", train_files=str(path))
    expect([str(path), f"line {before + 1}:", "0xe9"], lambda: list(read_file(config, path)))


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz"])
def test_a_packed_file_cut_anywhere_is_an_error(tmp_path, rng, make_text, ending):
    lines = "".join(json.dumps({"text": make_text(30)}) + "\n" for _ in range(40)).encode()
    data = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[ending].compress(lines)
    path = tmp_path / f"a.jsonl{ending}"
    for size in [0, 1, len(data) - 1, *rng.sample(range(2, len(data) - 1), 5)]:
        path.write_bytes(data[:size])
        expect([str(path), "line "], lambda: list(read_file(jsonl(path), path)))


def test_a_damaged_packed_file_is_an_error(tmp_path, make_text):
    data = bytearray(lzma.compress(make_text(500).encode()))
    data[len(data) // 2] ^= 0xFF
    path = tmp_path / "a.txt.xz"
    path.write_bytes(data)
    config = CorpusConfig(source="text", train_files=str(path))
    expect([str(path), "damaged"], lambda: list(read_file(config, path)))


def test_paths_that_match_nothing_or_a_folder_are_named(tmp_path):
    for path in ("absent.jsonl", "*.jsonl"):
        expect([path, "train_files"], lambda path=path: input_files(jsonl(tmp_path / path)))
    expect([str(tmp_path), "folder"], lambda: input_files(jsonl(tmp_path)))
    expect(["gs://bucket/a.jsonl"], lambda: input_files(jsonl("gs://bucket/a.jsonl")))


def test_one_file_in_two_splits_is_refused(tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    config = jsonl(path, validation_files=f"{tmp_path}/../{tmp_path.name}/*.jsonl")
    expect(["train_files", "validation_files"], lambda: input_files(config))
