import gzip
import json
import lzma

import pytest

from mlp_memory.artifacts import UserError
from mlp_memory.evaluation.harness import rows

OBJECTS = [{"a": "one\u2028line", "n": 1}, {"a": "zwei", "n": 2}, {"a": "", "n": 3}]


@pytest.mark.parametrize("packed", ["", ".gz", ".xz"])
@pytest.mark.parametrize("form", ["array", "lines", "Data"])
def test_json_is_read_as_an_array_as_lines_and_inside_an_object(tmp_path, form, packed):
    path = tmp_path / f"set.json{packed}"
    text = {
        "array": json.dumps(OBJECTS, indent=1),
        "lines": "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in OBJECTS),
        "Data": json.dumps({"Version": 1, "Data": OBJECTS}),
    }[form]
    write = {"": lambda x: x, ".gz": gzip.compress, ".xz": lzma.compress}[packed]
    path.write_bytes(write(text.encode()))
    found = rows.read(path)
    assert [row.fields for row in found] == OBJECTS
    assert found[1].where == f"set.json{packed}, {'line' if form == 'lines' else 'item'} 2"
    assert rows.find(tmp_path, ("other.json", "set.json")) == path


def test_tables_have_a_head_or_names_given_for_them_or_both(tmp_path):
    path = tmp_path / "t.csv"
    wanted = [{"label": "0", "text": "a, b\nc"}, {"label": "1", "text": 'say "x"'}]
    for head in ("", "label,text\n"):
        path.write_text(f'\ufeff{head}0,"a, b\nc"\n1,"say ""x"""\n')
        assert [row.fields for row in rows.read(path, ("label", "text"))] == wanted
    assert [row.fields for row in rows.read(path)] == wanted
    assert [row.where for row in rows.read(path)] == ["t.csv, line 2", "t.csv, line 4"]


def test_in_tables_set_apart_by_tabs_quotation_marks_are_text(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text('x\t"never closed\ny\tand on\n')
    assert [row.fields["b"] for row in rows.read(path, ("a", "b"))] == ['"never closed', "and on"]


def test_a_row_that_is_no_row_is_a_fault_of_its_own(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3\n4,5,6\n7,8\n")
    assert [row.fault for row in rows.read(tmp_path / "t.csv")] == [
        "",
        "1 columns, not 2",
        "3 columns, not 2",
        "",
    ]
    (tmp_path / "j.json").write_text('[{"a": 1}, 2]')
    assert [row.fault for row in rows.read(tmp_path / "j.json")] == ["", "not an object"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n{"a": 3}\n', "line 2: not JSON"),
        ("a.json", b'[{"a": 1},\n {"a" 2}]', "line 2: not JSON"),
        ("a.json", b"17", "line 1: a JSON int"),
        ("a.csv", b'a,b\n1,"2"x\n', "line 2: not a table"),
        ("a.csv", b'a,b\n1,2\n3,"never closed\n', "line 3: not a table"),
        ("a.csv", b"a,b\n1,\xff\n", "line 2: byte 0xff is not UTF-8"),
        ("a.json.xz", lzma.compress(b"[]")[:-5], "cannot be read"),
        ("a.json.gz", b"[]", "cannot be read"),
        ("a.txt", b"", "give a .json"),
    ],
)
def test_a_malformed_file_is_refused_in_one_line_that_names_it(tmp_path, name, data, words):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError) as refused:
        rows.read(path)
    assert str(path) in str(refused.value)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
