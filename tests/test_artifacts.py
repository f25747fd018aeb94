import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from mlp_memory import artifacts
from mlp_memory.arrays import ArrayReader, ChunkWriter
from mlp_memory.artifacts import ArraySpec, Directory, Manifest, UserError

SPECS = {
    "keys": ((3,), "bfloat16"),
    "probs": ((2,), "float16"),
    "tokens": ((), "uint16"),
    "mass": ((), "float32"),
}


def random_arrays(rng, rows: int) -> dict[str, np.ndarray]:
    return {
        "keys": rng.normal(size=(rows, 3)).astype(ml_dtypes.bfloat16),
        "probs": rng.random((rows, 2)).astype(np.float16),
        "tokens": rng.integers(0, 65536, rows).astype(np.uint16),
        "mass": rng.normal(size=rows).astype(np.float32),
    }


def specs(rows: int, chunk_rows: int) -> dict[str, ArraySpec]:
    found = {name: ArraySpec((rows, *rest), dtype, chunk_rows) for name, (rest, dtype) in SPECS.items()}
    for name in ("keys", "mass"):  # in blocks, where a chunk divides
        whole = found[name].chunk_shape[0]
        block = next((block for block in (3, 2, 1) if whole % block == 0), 0)
        found[name] = dataclasses.replace(found[name], block_rows=block)
    return found


def start(folder, rows: int, chunk_rows: int, config=None, parents=None) -> ChunkWriter:
    directory = Directory(folder)
    manifest = artifacts.begin(directory, "test", config or {}, parents or {}, specs(rows, chunk_rows))
    return ChunkWriter(directory, manifest)


def write(writer: ChunkWriter, arrays: dict[str, np.ndarray], chunks) -> None:
    for chunk in chunks:
        a, b = writer.rows(chunk)
        writer.write(chunk, **{name: array[a:b] for name, array in arrays.items()})


def written(folder, arrays, rows, chunk_rows, **facts) -> Directory:
    writer = start(folder, rows, chunk_rows)
    write(writer, arrays, writer.missing())
    writer.finish(**facts)
    return Directory(folder)


def files(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_arrays_of_every_dtype_read_back_bit_for_bit(tmp_path, rng):
    for trial in range(8):
        rows, chunk_rows = int(rng.integers(1, 40)), int(rng.integers(1, 45))
        arrays = random_arrays(rng, rows)
        directory = written(tmp_path / str(trial), arrays, rows, chunk_rows)
        artifacts.require(directory, "test")
        for name, array in arrays.items():
            reader = ArrayReader(directory, name)
            assert (len(reader), reader.shape, reader.dtype) == (rows, array.shape, array.dtype)
            a, b = np.sort(rng.integers(0, rows + 1, 2))
            for rows_slice in (slice(0, rows), slice(int(a), int(b))):
                found = reader[rows_slice]
                assert found.dtype == array.dtype
                assert found.tobytes() == array[rows_slice].tobytes()


def test_a_value_that_is_not_finite_is_refused_by_row(tmp_path, rng):
    for name, bad in (("keys", np.nan), ("probs", np.inf), ("mass", -np.inf)):
        arrays, row = random_arrays(rng, 20), int(rng.integers(7, 20))
        arrays[name][row] = bad
        writer = start(tmp_path / name, 20, 7)
        write(writer, arrays, [0] if row >= 14 else [])
        with pytest.raises(UserError) as refused:
            write(writer, arrays, [row // 7])
        assert f"{name}: row {row} is not finite" in one_line(refused)
        assert row // 7 in start(tmp_path / name, 20, 7).missing()


def test_rows_of_another_shape_are_refused(tmp_path, rng):
    writer = start(tmp_path / "a", 10, 4)
    with pytest.raises(ValueError, match="tokens"):
        writer.write(0, **{**{n: a[:4] for n, a in random_arrays(rng, 10).items()}, "tokens": np.zeros(3)})


def chunk_files(directory: Directory, name: str):
    return sorted(p for p in (directory.path / name / "c").rglob("*") if p.is_file())


def test_any_flipped_bit_of_a_chunk_is_found_on_reading(tmp_path, rng):
    arrays = random_arrays(rng, 30)
    directory = written(tmp_path / "a", arrays, 30, 8)
    for name in SPECS:
        for path in chunk_files(directory, name):
            whole = path.read_bytes()
            data = bytearray(whole)
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            artifacts.require(directory, "test")  # the length is right
            with pytest.raises(UserError, match="is damaged") as refused:
                ArrayReader(directory, name)[0:30]
            one_line(refused)
            path.write_bytes(whole)


@pytest.mark.parametrize("damage", ["truncated", "extended", "emptied", "removed"])
def test_a_chunk_of_the_wrong_length_is_found_without_reading(tmp_path, rng, damage):
    directory = written(tmp_path / "a", random_arrays(rng, 30), 30, 8)
    paths = [p for name in SPECS for p in chunk_files(directory, name)]
    path = paths[int(rng.integers(len(paths)))]
    if damage == "removed":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes({"truncated": data[:-1], "extended": data + b"x", "emptied": b""}[damage])
    with pytest.raises(UserError) as refused:
        artifacts.require(directory, "embed")
    message = one_line(refused)
    assert str(path) in message
    assert "run `embed` again" in message


def test_a_chunk_that_is_gone_is_not_read_as_zeros(tmp_path, rng):
    directory = written(tmp_path / "a", random_arrays(rng, 30), 30, 8)
    chunk_files(directory, "keys")[1].unlink()
    with pytest.raises(UserError, match="is damaged"):
        ArrayReader(directory, "keys")[0:30]


def test_an_array_without_its_metadata_is_one_line(tmp_path, rng):
    directory = written(tmp_path / "a", random_arrays(rng, 30), 30, 8)
    (directory.path / "keys/zarr.json").unlink()
    with pytest.raises(UserError) as refused:
        ArrayReader(directory, "keys")[0:30]
    one_line(refused)
    with pytest.raises(UserError, match="has no array 'values'"):
        ArrayReader(directory, "values")


def test_an_interrupted_write_goes_on_to_the_same_bytes(tmp_path, rng):
    for trial in range(5):
        rows, chunk_rows = int(rng.integers(2, 60)), int(rng.integers(1, 20))
        arrays = random_arrays(rng, rows)
        straight, stopped = tmp_path / f"straight-{trial}", tmp_path / f"stopped-{trial}"
        written(straight, arrays, rows, chunk_rows, seen=rows)
        first = start(stopped, rows, chunk_rows)
        done = rng.permutation(len(first))[: int(rng.integers(0, len(first) + 1))].tolist()
        write(first, arrays, done)
        again = start(stopped, rows, chunk_rows)
        assert again.missing() == sorted(set(range(len(again))) - set(done))
        write(again, arrays, again.missing())
        again.finish(seen=rows)
        assert files(straight) == files(stopped)
        assert {name.split("/")[0] for name in files(straight)} == {*SPECS, "manifest.json", "checksums.json"}


def test_a_chunk_written_but_not_marked_is_written_again(tmp_path, rng):
    """Killed between the arrays and the mark, with half of the arrays there."""
    arrays = random_arrays(rng, 20)
    straight = written(tmp_path / "straight", arrays, 20, 8)
    writer = start(tmp_path / "a", 20, 8)
    write(writer, random_arrays(rng, 20), [0, 1, 2])
    for mark in (tmp_path / "a/chunks").iterdir():
        mark.unlink()
    again = start(tmp_path / "a", 20, 8)
    assert again.missing() == [0, 1, 2]
    write(again, arrays, [2, 0, 1])
    again.finish()
    assert files(straight.path) == files(tmp_path / "a")


def test_an_artifact_is_whole_only_when_every_chunk_is(tmp_path, rng):
    writer = start(tmp_path / "a", 20, 8)
    write(writer, random_arrays(rng, 20), [0, 2])
    with pytest.raises(ValueError, match=r"chunks \[1\] are missing"):
        writer.finish()
    with pytest.raises(UserError, match="is unfinished: run `python -m mlp_memory embed` first"):
        artifacts.require(Directory(tmp_path / "a"), "embed")
    with pytest.raises(UserError, match="is missing: run `python -m mlp_memory embed` first"):
        artifacts.require(Directory(tmp_path / "b"), "embed")


def test_a_change_of_config_parent_or_shape_is_refused_by_name(tmp_path):
    config, parents = {"a": {"steps": 5, "rate": 0.1}}, {"decoder": "3fa2", "corpus": "77aa"}
    start(tmp_path / "a", 20, 8, config, parents)
    start(tmp_path / "a", 20, 8, config, parents)  # the same again is taken up
    cases = [
        (dict(config={"a": {"steps": 6, "rate": 0.1}}, parents=parents), ["a.steps = 5", "6"]),
        (dict(config={"a": {"steps": 5}}, parents=parents), ["a.rate = 0.1", "None"]),
        (dict(config=config, parents={**parents, "decoder": "91bc"}), ["decoder 3fa2", "91bc"]),
        (dict(config=config, parents={**parents, "index": "1"}), ["index None"]),
    ]
    for changed, words in cases:
        with pytest.raises(UserError) as refused:
            start(tmp_path / "a", 20, 8, **changed)
        assert all(word in one_line(refused) for word in words)
    for rows, chunk_rows in ((21, 8), (20, 9)):
        with pytest.raises(UserError, match="arrays of other shapes"):
            start(tmp_path / "a", rows, chunk_rows, config, parents)


def test_manifests_read_back_and_depend_on_content_alone(tmp_path):
    a = Manifest("k", {"x": 1, "y": [1.5, None]}, {"p": "1", "q": "2"}, specs(5, 2), True, {}, {"n": 3})
    b = Manifest("k", {"y": [1.5, None], "x": 1}, {"q": "2", "p": "1"}, specs(5, 2), True, {}, {"n": 3})
    assert a.to_json() == b.to_json()
    assert a.fingerprint == b.fingerprint
    assert Manifest.from_json(a.to_json(), "here") == a
    assert len(a.fingerprint) == 12
    for field, value in (("kind", "l"), ("config", {}), ("parents", {}), ("finished", False), ("facts", {})):
        changed = Manifest.from_json(a.to_json(), "here")
        setattr(changed, field, value)
        assert changed.fingerprint != a.fingerprint


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: "null",
        lambda text: '"manifest"',
        lambda text: text.replace('"kind"', '"sort"'),
        lambda text: text.replace('"shape"', '"form"'),
        lambda text: text.replace('"parents": {}', '"parents": 7'),
        lambda text: text.replace('"facts": {}', '"facts": null'),
        lambda text: text.replace("3", "three", 1),
    ],
)
def test_a_damaged_manifest_is_one_line(tmp_path, rng, damage):
    directory = written(tmp_path / "a", random_arrays(rng, 30), 30, 8)
    path = directory.path / "manifest.json"
    before = path.read_text()
    path.write_text(damage(before))
    assert path.read_text() != before
    with pytest.raises(UserError) as refused:
        artifacts.require_same(
            directory, artifacts.require(directory, "test"), Manifest("test", {}, {}, specs(30, 8))
        )
    assert str(directory) in one_line(refused)


def test_a_manifest_that_is_not_utf8_is_one_line(tmp_path, rng):
    directory = written(tmp_path / "a", random_arrays(rng, 30), 30, 8)
    (directory.path / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is damaged"):
        artifacts.peek(directory)


def test_a_manifest_of_another_schema_is_refused(tmp_path, rng):
    directory = written(tmp_path / "a", random_arrays(rng, 30), 30, 8)
    path = directory.path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(UserError, match="has schema 99, this version reads 1"):
        artifacts.require(directory, "test")


def test_facts_are_kept_and_numbers_that_json_lacks_are_refused(tmp_path):
    directory = Directory(tmp_path / "a")
    manifest = artifacts.begin(directory, "test", {}, {})
    with pytest.raises(ValueError, match="JSON"):
        artifacts.finish(directory, manifest, loss=float("nan"))
    assert not artifacts.peek(directory).finished
    artifacts.finish(directory, manifest, loss=0.1 + 0.2)
    assert artifacts.require(directory, "test").facts == {"loss": 0.1 + 0.2}


def test_what_a_kill_leaves_beside_a_finished_artifact_is_swept(tmp_path, rng):
    arrays = random_arrays(rng, 20)
    straight = files(written(tmp_path / "a", arrays, 20, 8).path)
    (tmp_path / "a/chunks").mkdir()
    (tmp_path / "a/chunks/00000000.json").write_text("{}")
    (tmp_path / "a/keys/c/0/0.__lock").write_text("")
    artifacts.sweep(Directory(tmp_path / "a"))
    assert files(tmp_path / "a") == straight


def test_writing_where_nothing_can_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as refused:
        artifacts.begin(Directory(tmp_path / "file/below"), "test", {}, {})
    one_line(refused)


def test_folders_with_odd_names_are_read_and_listed(tmp_path, rng):
    for name in ("with space", "per%cent", "ünïcode", "hash#tag", "question?mark", "a+b=c"):
        arrays = random_arrays(rng, 5)
        directory = written(tmp_path / name, arrays, 5, 2)
        assert (tmp_path / name / "manifest.json").is_file()
        assert ArrayReader(directory, "tokens")[0:5].tolist() == arrays["tokens"].tolist()
        assert "manifest.json" in directory.names()
        directory.delete()
        assert not (tmp_path / name).exists()


def test_blocks_divide_a_chunk_and_are_small(rng):
    for _ in range(50):
        rows, width, chunk = (int(x) for x in rng.integers(1, [5000, 3000, 2000]))
        spec = ArraySpec.in_blocks((rows, width), "float16", chunk)
        whole = min(rows, chunk)
        if not spec.block_rows:
            assert 2 * whole * width <= 1 << 19
            continue
        assert whole % spec.block_rows == 0
        larger = [b for b in range(spec.block_rows + 1, whole + 1) if whole % b == 0]
        assert spec.block_rows == 1 or 2 * spec.block_rows * width <= 1 << 19
        assert all(2 * b * width > 1 << 19 for b in larger)


def test_reading_a_few_rows_of_a_large_chunk_reads_little_of_its_file(tmp_path, rng):
    values = rng.normal(size=(4096, 512)).astype(np.float32)
    spec = ArraySpec.in_blocks(values.shape, "float32", 4096)
    directory = Directory(tmp_path / "a")
    writer = ChunkWriter(directory, artifacts.begin(directory, "test", {}, {}, {"keys": spec}))
    writer.write(0, keys=values)
    writer.finish()
    file = tmp_path / "a/keys/c/0/0"
    damaged = bytearray(file.read_bytes())
    damaged[1 << 20] ^= 1  # in the third of the chunk's sixteen blocks
    file.write_bytes(damaged)
    reader = ArrayReader(directory, "keys")
    np.testing.assert_array_equal(reader[3000:3010], values[3000:3010])
    with pytest.raises(UserError, match="damaged"):
        reader[0:4096]


def test_only_known_schemes_are_taken():
    with pytest.raises(UserError, match=r"only local paths, file://, gs:// and s3://"):
        Directory("ftp://host/folder")
    assert str(Directory("file:///tmp/x")) == "/tmp/x"
    assert str(Directory("gs://bucket/folder/") / "part") == "gs://bucket/folder/part"
    with pytest.raises(UserError, match="not on this machine"):
        _ = Directory("gs://bucket").path


def test_runtime_settings_stay_out_of_the_manifest():
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Settings:
        steps: tuple[int, ...] = (1, 2)
        threads: int = artifacts.runtime(4)

    assert artifacts.config_dict(Settings()) == {"steps": [1, 2]}


def test_a_later_setting_is_in_the_manifest_only_where_it_is_not_the_default():
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Settings:
        steps: int = 3
        kind: str = artifacts.later("plain")

    assert artifacts.config_dict(Settings()) == {"steps": 3}
    assert artifacts.config_dict(Settings(kind="new")) == {"steps": 3, "kind": "new"}


def test_folders_are_those_directly_below(tmp_path):
    directory = Directory(tmp_path / "all")
    assert directory.folders() == []
    for name in ("file", "b/one", "a/deep/two"):
        directory.write(name, b"x")
    assert directory.folders() == ["a", "b"]
    assert (directory / "a").folders() == ["deep"]
