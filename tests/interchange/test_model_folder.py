"""Model folders: exact round trips, and one line for every way a folder can be wrong."""

import json
import pickle
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tensorstore as ts

from mlp_memory.artifacts import Directory, UserError
from mlp_memory.interchange.model_folder import load_model, make_as_saved, save_model

DTYPES = [
    np.dtype(t)
    for t in (
        *("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?", ">f4", ">i2"),
        ml_dtypes.bfloat16,
    )
]
CONFIG = {"kind": "memory", "d": 64, "blocks": 3, "rope": None, "names": ["ä", "b"]}


def random_tensors(rng: np.random.Generator, count: int = 20) -> dict[str, np.ndarray]:
    tensors = {}
    for i in range(count):
        dtype = DTYPES[rng.integers(len(DTYPES))]
        shape = tuple(map(int, rng.integers(0 if rng.random() < 0.2 else 1, 6, rng.integers(0, 5))))
        data = rng.bytes(int(np.prod(shape)) * dtype.itemsize)
        array = np.frombuffer(data, np.uint8).view(dtype) if dtype != np.bool_ else rng.random(shape) < 0.5
        tensors[f"blocks.{i}.väl {rng.integers(99)}"] = array.reshape(shape)
    tensors["not contiguous"] = rng.normal(size=(6, 5)).astype(np.float32).T[::2]
    return tensors


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, array in wanted.items():
        assert found[name].shape == array.shape, name
        assert found[name].dtype == array.dtype.newbyteorder("="), name
        little = np.asarray(array, array.dtype.newbyteorder("<"))
        # Bytes and not values: NaN payloads and -0.0 must come back as well.
        assert found[name].tobytes() == little.tobytes(), name


def in_memory_directory() -> Directory:
    """A folder that is not local, over TensorStore's memory driver."""
    directory = Directory("gs://somewhere/model")
    directory._kvstore = ts.KvStore.open("memory://model/").result()
    return directory


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 200, 1])
@pytest.mark.parametrize("remote", [False, True])
def test_round_trip_is_exact(tmp_path: Path, max_shard_bytes: int, remote: bool) -> None:
    rng = np.random.default_rng()
    for trial in range(4):
        tensors = random_tensors(rng)
        directory = in_memory_directory() if remote else Directory(tmp_path / str(trial))
        files = {"tokenizer.model": rng.bytes(50)}
        save_model(directory, CONFIG, tensors, files, max_shard_bytes)
        config, found = load_model(directory)
        assert config == CONFIG
        assert_same(found, tensors)
        assert directory.read("tokenizer.model") == files["tokenizer.model"]


def test_remote_and_local_folders_hold_the_same_bytes(tmp_path: Path) -> None:
    tensors = random_tensors(np.random.default_rng())
    remote = in_memory_directory()
    for directory in (Directory(tmp_path / "m"), remote):
        save_model(directory, CONFIG, tensors, {"a": b"1"}, 300)
    assert {name: remote.read(name) for name in remote.names()} == contents(tmp_path / "m")


def test_bytes_do_not_depend_on_order_or_process(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    tensors = {f"t{i}": rng.normal(size=(3, i)).astype(np.float32) for i in range(9)}
    backwards = dict(reversed(tensors.items()))
    save_model(Directory(tmp_path / "a"), CONFIG, tensors, max_shard_bytes=100)
    save_model(Directory(tmp_path / "b"), dict(reversed(CONFIG.items())), backwards, max_shard_bytes=100)
    code = (
        "import sys, numpy as np\n"
        "from mlp_memory.artifacts import Directory\n"
        "from mlp_memory.interchange.model_folder import save_model\n"
        "rng = np.random.default_rng(5)\n"
        "tensors = {f't{i}': rng.normal(size=(3, i)).astype(np.float32) for i in range(9)}\n"
        f"save_model(Directory(sys.argv[1]), {CONFIG!r}, tensors, max_shard_bytes=100)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], check=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_shards_follow_the_hugging_face_layout(tmp_path: Path) -> None:
    tensors = {f"t{i:02d}": np.full(10, i, np.float32) for i in range(10)} | {
        "big": np.zeros(500, np.float32)
    }
    save_model(Directory(tmp_path / "m"), CONFIG, tensors, max_shard_bytes=120)
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    # "big" alone, then ten tensors of 40 bytes, three to a file.
    assert files == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for file in files:
        held = safetensors.numpy.load_file(tmp_path / "m" / file)
        assert set(held) == {name for name, where in index["weight_map"].items() if where == file}
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 120


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 200])
def test_tensors_are_made_in_the_same_order_where_nothing_is_written(
    tmp_path: Path, max_shard_bytes: int
) -> None:
    arrays = random_tensors(np.random.default_rng())
    made = []
    tensors = {name: lambda name=name: made.append(name) or arrays[name] for name in arrays}
    save_model(Directory(tmp_path / "m"), CONFIG, tensors, max_shard_bytes=max_shard_bytes)
    saved = made.copy()
    made.clear()
    make_as_saved(tensors, max_shard_bytes)
    assert made == saved
    assert sorted(made) == sorted([*arrays, *arrays])
    assert_same(load_model(Directory(tmp_path / "m"))[1], arrays)


def test_files_open_with_the_reference_library(tmp_path: Path) -> None:
    tensors = {"w": np.random.default_rng().normal(size=(4, 3)).astype(np.float32)}
    save_model(Directory(tmp_path / "m"), CONFIG, tensors)
    with safetensors.safe_open(tmp_path / "m/model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(file.get_tensor("w"), tensors["w"])
    assert (tmp_path / "m/model.safetensors").stat().st_mode == (tmp_path / "m/config.json").stat().st_mode


@pytest.mark.parametrize("remote", [False, True])
def test_saving_again_replaces_the_model_and_keeps_other_files(tmp_path: Path, remote: bool) -> None:
    rng = np.random.default_rng()
    directory = in_memory_directory() if remote else Directory(tmp_path / "m")
    directory.write("notes.txt", b"mine")
    for shard_bytes in (100, 10**9, 300):
        tensors = random_tensors(rng)
        save_model(directory, {"run": shard_bytes}, tensors, max_shard_bytes=shard_bytes)
        config, found = load_model(directory)
        assert config == {"run": shard_bytes}
        assert_same(found, tensors)
        assert directory.read("notes.txt") == b"mine"
    if not remote:
        assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_save_that_stops_anywhere_leaves_no_model_that_loads_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {f"t{i}": np.full((2, 3), i, np.float32) for i in range(4)}
    new = {name: array + 100 for name, array in old.items()}
    real, directory = Path.replace, Directory(tmp_path / "m")
    save_model(Directory(tmp_path / "clean"), CONFIG, new, max_shard_bytes=30)
    for allowed in range(12):
        save_model(directory, CONFIG, old)
        moves = iter(range(allowed))

        def replace(self: Path, target: Path, moves: object = moves) -> Path:
            if next(moves, None) is None:
                raise KeyboardInterrupt
            return real(self, target)

        monkeypatch.setattr(Path, "replace", replace)
        stopped = False
        try:
            save_model(directory, CONFIG, new, max_shard_bytes=30)
        except KeyboardInterrupt:
            stopped = True
        monkeypatch.setattr(Path, "replace", real)
        if stopped:
            with pytest.raises(UserError, match=r"config\.json is missing"):
                load_model(directory)
        save_model(directory, CONFIG, new, max_shard_bytes=30)
        assert contents(tmp_path / "m") == contents(tmp_path / "clean")
        assert {p.name for p in tmp_path.iterdir()} == {"m", "clean"}
    assert not stopped


def edit_list(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        listing = json.loads((folder / "mlp_memory.json").read_text())
        change(listing["tensors"])
        (folder / "mlp_memory.json").write_text(json.dumps(listing))

    return edit


def edit_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / old).rename(folder / new) and None


SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("shard_bytes", "damage", "words"),
    [
        (999, edit_list(lambda t: t.pop("w")), ["'w'", "(4, 3)", "not in mlp_memory.json"]),
        (999, edit_list(lambda t: t.update(x=t["w"])), ["'x'", "(4, 3)", "in no file"]),
        (999, edit_list(lambda t: t["w"].update(shape=[3, 4])), ["'w'", "(4, 3)", "(3, 4)"]),
        (
            999,
            edit_list(lambda t: t["w"].update(dtype="bfloat16")),
            ["'w'", "(4, 3)", "float32", "bfloat16"],
        ),
        (999, edit_list(lambda t: t["w"].update(sha256="0" * 16)), ["'w'", "checksum"]),
        (999, edit_list(lambda t: t["w"].pop("shape")), ["mlp_memory.json is damaged"]),
        (999, edit_list(lambda t: t["w"].update(shape="43")), ["mlp_memory.json is damaged"]),
        (999, edit_bytes("config.json", lambda b: b"[" * 100_000), ["config.json is damaged"]),
        (999, edit_bytes("config.json", lambda b: b"{}"), ["config.json is damaged (checksum)"]),
        (999, edit_bytes("config.json", lambda b: b"[]"), ["config.json is damaged"]),
        (
            999,
            edit_bytes("mlp_memory.json", lambda b: b"{}"),
            ["mlp_memory.json is damaged or not from export"],
        ),
        (999, edit_bytes("mlp_memory.json", lambda b: b"[" * 100_000), ["mlp_memory.json is damaged"]),
        (999, rename("mlp_memory.json", "x"), ["mlp_memory.json is missing"]),
        (999, edit_bytes("config.json", lambda b: b[:-20]), ["config.json is damaged"]),
        (999, edit_bytes("model.safetensors", lambda b: b[:-1]), ["model.safetensors is truncated"]),
        (999, edit_bytes("model.safetensors", lambda b: b""), ["model.safetensors is truncated"]),
        (999, edit_bytes("model.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])), ["'w'", "checksum"]),
        (999, edit_bytes("model.safetensors", lambda b: pickle.dumps([1])), ["truncated or damaged"]),
        (999, rename("config.json", "other.json"), ["config.json is missing"]),
        (999, rename("model.safetensors", "x.safetensors"), ["model.safetensors is missing"]),
        (
            999,
            rename("model.safetensors", "pytorch_model.bin"),
            ["pytorch_model.bin", "weights_only=True"],
        ),
        (9, rename(SHARD, "x.safetensors"), [SHARD, "is missing"]),
        (9, edit_bytes(SHARD, lambda b: b[:40]), [SHARD, "truncated"]),
        (9, edit_bytes(INDEX, lambda b: b"{}"), [INDEX, "is damaged"]),
        (9, edit_bytes(INDEX, lambda b: b.replace(SHARD.encode(), b"../../secret")), ["'../../secret'"]),
        (9, edit_bytes(INDEX, lambda b: b.replace(SHARD.encode(), b"a.pt")), ["'a.pt'", "convert it first"]),
        (9, edit_bytes(INDEX, lambda b: b.replace(b"00002-of", b"00001-of")), [INDEX, "'w'"]),
    ],
)
def test_damage_is_named_in_one_line(
    tmp_path: Path, shard_bytes: int, damage: Callable, words: list[str]
) -> None:
    tensors = {"b": np.ones(2, np.float32), "w": np.arange(12, dtype=np.float32).reshape(4, 3)}
    save_model(Directory(tmp_path / "m"), CONFIG, tensors, max_shard_bytes=shard_bytes)
    damage(tmp_path / "m")
    with pytest.raises(UserError) as caught:
        load_model(Directory(tmp_path / "m"))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "weights.pkl"])
def test_pickles_are_refused_unopened(tmp_path: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (tmp_path.joinpath("fired").touch, ())

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"convert it first.*weights_only=True"):
        load_model(Directory(tmp_path))
    with pytest.raises(UserError, match="give the folder"):
        load_model(Directory(tmp_path / name))
    assert not (tmp_path / "fired").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/config\.json is missing"):
        load_model(Directory(tmp_path / "nowhere"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UserError, match="cannot write") as caught:
            save_model(Directory(place), CONFIG, {"w": np.zeros(3)})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "tensors", "files"),
    [
        ({}, {}, {"mlp_memory.json": b""}),
        ({"x": float("nan")}, {}, {}),
        ({}, {"w": np.zeros(2, np.complex64)}, {}),
        ({}, {"w": np.array(["text"])}, {}),
        ({}, {"w": np.zeros(2, ml_dtypes.float8_e4m3fn)}, {}),
        ({}, {"__metadata__": np.zeros(2)}, {}),
        ({}, {}, {"../up": b""}),
        ({}, {}, {"config.json": b""}),
        ({}, {}, {"model-00001-of-00002.safetensors": b""}),
        ({}, {}, {"a.bin": b""}),
    ],
)
def test_what_cannot_be_stored_is_refused_before_writing(tmp_path: Path, config, tensors, files) -> None:
    with pytest.raises(ValueError):
        save_model(Directory(tmp_path / "m"), config, tensors, files)
    assert not list(tmp_path.iterdir())


def header(entries: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "content",
    [
        header({}, length=2**64 - 1),
        header({}, length=2**40),
        header({}, length=99_999_999),
        header({"w": entry(0, 2**50, [2**48])}),
        header({"w": entry(0, 2**63, [2**61])}, b"\0" * 8),
        header({"w": entry(0, 8, [2**62, 2**62])}, b"\0" * 8),
        header({"w": entry(8, 0, [2])}, b"\0" * 8),
        header({"w": entry(-8, 0, [2])}, b"\0" * 8),
        header({"w": entry(0, 8, [2]), "v": entry(4, 12, [2])}, b"\0" * 12),
        header({"w": entry(0, 8, [2]), "v": entry(0, 8, [2])}, b"\0" * 8),
        header({"w": entry(0, 8, [2]), "v": entry(12, 20, [2])}, b"\0" * 20),
        header({"w": entry(0, 8, [2])}, b"\0" * 16),
        header({"w": entry(0, 4, [2])}, b"\0" * 4),
        header({"w": entry(0, 8, [2], "PICKLE")}, b"\0" * 8),
        header({"w": entry(0, 8, [8], "F8_E4M3")}, b"\0" * 8),
        header(b"[" * 100_000),
        header(b'{"w": ' * 50_000),
        header(b"\xff\xfe"),
        b"\x00",
        b"",
    ],
)
def test_hostile_headers_are_refused_without_large_allocations(tmp_path: Path, content: bytes) -> None:
    tensors = {"w": np.zeros(2, np.float32), "v": np.zeros(2, np.float32)}
    save_model(Directory(tmp_path / "m"), CONFIG, tensors)
    (tmp_path / "m/model.safetensors").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        load_model(Directory(tmp_path / "m"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10
    assert "\n" not in str(caught.value)


def load_or_refusal(folder: Path) -> dict[str, np.ndarray] | str:
    try:
        return load_model(Directory(folder))[1]
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_folders_give_the_same_tensors_or_one_line(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = random_tensors(rng, count=4)
    folder = tmp_path / "m"
    save_model(Directory(folder), CONFIG, tensors, max_shard_bytes=10**9 if seed % 2 else 60)
    names = sorted(p.name for p in folder.iterdir())
    refused = 0
    for _ in range(250):
        file = folder / names[rng.integers(len(names))]
        whole = file.read_bytes()
        data = bytearray(whole)
        kind = rng.integers(4)
        if kind == 0:
            del data[rng.integers(len(data)) :]
        elif kind == 1:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        elif kind == 2:
            start = rng.integers(len(data))
            data[start : start + rng.integers(1, 9)] = rng.bytes(int(rng.integers(0, 9)))
        else:
            data[rng.integers(min(len(data), 8))] = rng.integers(256)
        file.write_bytes(data)
        outcome = load_or_refusal(folder)
        if isinstance(outcome, str):
            refused += 1
            assert "\n" not in outcome
        else:
            assert_same(outcome, tensors)
        file.write_bytes(whole)
    assert refused > 150
    assert_same(load_model(Directory(folder))[1], tensors)
