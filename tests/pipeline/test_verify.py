"""`verify` by the command line: every flipped byte is found, and what is made again is what it was."""

import json
import os
import shutil

import numpy as np
import pytest

from mlp_memory.artifacts import Directory, Seal
from mlp_memory.job import Job
from mlp_memory.recipes import load_config
from mlp_memory.verify.repair import repair
from mlp_memory.verify.verify import check, saved_config

FLIPS = 6


def files_of(folder):
    """All that verify speaks for."""
    left_out = {"tensorboard", ".lock", "times.jsonl"}
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not left_out & set(path.relative_to(folder).parts)
    )


def flip(path, rng):
    data = bytearray(path.read_bytes())
    place = int(rng.integers(len(data)))
    data[place] ^= 1 << int(rng.integers(8))
    path.unlink()  # a name of its own, should it be linked
    path.write_bytes(bytes(data))
    return place


def faults(folder):
    return [str(fault) for one in check(job_of(folder)) for fault in one.faults]


def job_of(folder):
    workdir = Directory(folder)
    return Job(workdir, load_config([], [], workdir, saved_config(workdir)))


def compared(folder):
    """By file; Orbax's own files, whose names are random, are left to the manifests' checksums."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files_of(folder)
        if "model" not in path.relative_to(folder).parts and path.name != "checksums.json"
    }


def test_a_sound_run_is_said_to_be(mlp_memory, small_run):
    answer = mlp_memory("verify", f"--workdir={small_run}")
    assert answer.code == 0, answer.out + answer.error
    assert "fault" not in answer.out
    for name in ("corpus/train", "decoder", "datastore", "index/shard-00000", "targets", "memory", "reports"):
        assert name in answer.out
    bytes_read = {line.split()[0]: line.split()[3] for line in answer.out.splitlines() if "sound" in line}
    assert int(bytes_read["datastore"].replace(",", "")) > 100_000


def test_a_flipped_byte_in_any_file_is_found(workdir, rng):
    """In each file in turn: sound but for that one."""
    paths = files_of(workdir)
    chosen = [paths[i] for i in sorted(rng.choice(len(paths), 40, replace=False))]
    for path in chosen:
        name = str(path.relative_to(workdir))
        kept = path.read_bytes()
        if not kept:
            continue
        place = flip(path, rng)
        found = faults(workdir)
        assert found, f"byte {place} of {name}"
        assert all(line.startswith(name) for line in found), (name, place, found)
        path.write_bytes(kept)
    assert faults(workdir) == []


def test_repair_gives_back_the_bytes(mlp_memory, workdir, small_run, rng):
    """Several files damaged at once, each of another artifact, and one cut off."""
    by_top = {}
    for path in files_of(workdir):
        by_top.setdefault(path.relative_to(workdir).parts[0], []).append(path)
    tops = sorted(top for top in by_top if top != "checksums.json")
    damaged = []
    for top in rng.choice(tops, FLIPS, replace=False):
        paths = [path for path in by_top[top] if path.stat().st_size]
        path = paths[int(rng.integers(len(paths)))]
        flip(path, rng)
        damaged.append(str(path.relative_to(workdir)))
    path = max((workdir / "memory/model").rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)
    print("damaged:", *damaged, path.relative_to(workdir))
    answer = mlp_memory("verify", f"--workdir={workdir}", "--repair")
    assert answer.code == 0, answer.out + answer.error
    assert "is not what it was" not in answer.out
    assert faults(workdir) == []
    expected, found = compared(small_run), compared(workdir)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


def test_repair_makes_a_chunk_alone(mlp_memory, workdir, rng):
    chunks = sorted((workdir / "datastore/keys/c").rglob("*"))
    chunks = [path for path in chunks if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in chunks}
    bad = chunks[int(rng.integers(len(chunks)))]
    kept = bad.read_bytes()
    flip(bad, rng)
    answer = mlp_memory("verify", f"--workdir={workdir}", "--repair")
    assert answer.code == 0, answer.out + answer.error
    assert "taken away: 1 of its chunks" in answer.out
    assert bad.read_bytes() == kept
    assert [path for path in chunks if path.stat().st_mtime_ns != before[path]] == [bad]


def test_a_damaged_last_chunk_which_is_written_in_part_is_made_again(mlp_memory, workdir):
    """Writing a part of a chunk reads the rest of what is there."""
    scores = workdir / "reports/rows/other/base_memory/c"
    bad = max((path for path in scores.iterdir() if path.is_file()), key=lambda path: int(path.name))
    kept = bad.read_bytes()
    bad.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    answer = mlp_memory("verify", f"--workdir={workdir}", "--repair")
    assert answer.code == 0, answer.out + answer.error
    assert bad.read_bytes() == kept


def test_a_repair_that_was_killed_is_gone_on_with(mlp_memory, workdir, rng):
    chunk = next(path for path in (workdir / "targets/probs/c").rglob("*") if path.is_file())
    kept = chunk.read_bytes()
    flip(chunk, rng)
    table = workdir / "export/memory/config.json"
    kept_table = table.read_bytes()
    flip(table, rng)
    job = job_of(workdir)
    for one in check(job):
        if one.faults:
            repair(job, one.folder, one.faults)  # and then the kill
    assert not table.exists()
    answer = mlp_memory("verify", f"--workdir={workdir}")
    assert answer.code == 1
    for folder, stage in (("targets", "retrieve"), ("export", "export")):
        assert f"{folder}/manifest.json: was taken away to be made again (made by {stage})" in answer.out
    answer = mlp_memory("verify", f"--workdir={workdir}", "--repair")
    assert answer.code == 0, answer.out + answer.error
    assert chunk.read_bytes() == kept
    assert table.read_bytes() == kept_table


def test_without_repair_nothing_is_changed_and_the_code_is_1(mlp_memory, workdir, rng):
    flip(workdir / "corpus/train/bounds.i64", rng)
    before = compared(workdir)
    answer = mlp_memory("verify", f"--workdir={workdir}")
    assert answer.code == 1
    assert "fault: corpus/train/bounds.i64: is not as it was written (made by tokenize)" in answer.out
    assert compared(workdir) == before


def test_a_damaged_config_is_told_and_written_again(mlp_memory, workdir):
    kept = (workdir / "config.gin").read_bytes()
    (workdir / "config.gin").write_bytes(kept.replace(b"retrieve.k", b"retrieve.\x6a", 1) + b"}")
    answer = mlp_memory("verify", f"--workdir={workdir}")
    assert answer.code == 1
    assert "fault: config.gin: is not as it was written" in answer.out
    assert answer.out.count("fault: ") == 1
    answer = mlp_memory("verify", f"--workdir={workdir}", "--repair")
    assert answer.code == 0, answer.out + answer.error
    assert (workdir / "config.gin").read_bytes() == kept


def test_another_parent_is_told(mlp_memory, workdir):
    path = workdir / "decoder/manifest.json"
    fields = json.loads(path.read_text())
    fields["facts"]["step"] += 1
    text = json.dumps(fields, sort_keys=True, indent=1) + "\n"
    path.write_text(text)
    seal = Seal.read(Directory(workdir / "decoder"))
    (workdir / "decoder/checksums.json").write_text(Seal(seal.files, text).to_json())
    answer = mlp_memory("verify", f"--workdir={workdir}")
    assert answer.code == 1
    assert "fault: datastore/manifest.json: was made from decoder" in answer.out
    keys = (workdir / "datastore/keys/c/0/0").read_bytes()
    answer = mlp_memory("verify", f"--workdir={workdir}", "--repair")
    assert answer.code == 1
    assert "repair: datastore: left as it is: it was made from decoder" in answer.out
    assert (workdir / "datastore/keys/c/0/0").read_bytes() == keys


def test_contents_are_looked_at_whatever_their_checksums(workdir):
    """A teacher that does not sum to 1, checksums and all as if it had been written so."""
    from mlp_memory.arrays import ArrayReader, ChunkWriter
    from mlp_memory.artifacts import begin, peek

    targets = Directory(workdir / "targets")
    found = peek(targets)
    arrays = {name: ArrayReader(targets, name)[0 : spec.shape[0]] for name, spec in found.arrays.items()}
    taught = int(np.flatnonzero(arrays["neighbours"] > 0)[0])
    arrays["probs"][taught] *= 0.5
    shutil.rmtree(workdir / "targets")
    manifest = begin(targets, found.kind, found.config, found.parents, found.arrays)
    writer = ChunkWriter(targets, manifest)
    for chunk in writer.missing():
        start, stop = writer.rows(chunk)
        writer.write(chunk, **{name: values[start:stop] for name, values in arrays.items()})
    writer.finish(**found.facts)
    assert any(f"row {taught} does not sum to 1" in line for line in faults(workdir))


@pytest.mark.parametrize("flags", [[], ["--repair"]])
def test_an_empty_folder_is_told(mlp_memory, tmp_path, flags):
    answer = mlp_memory("verify", f"--workdir={tmp_path}", *flags)
    assert answer.code == 2
    assert "is empty: check --workdir" in answer.error


def test_a_shard_that_is_gone_is_missed_and_made_again(mlp_memory, workdir, small_run):
    shutil.rmtree(workdir / "index/shard-00000")
    assert faults(workdir) == ["index/shard-00000/manifest.json: is missing"]
    answer = mlp_memory("verify", f"--workdir={workdir}", "--repair")
    assert answer.code == 0, answer.out + answer.error
    assert compared(workdir) == compared(small_run)


def test_where_inputs_are_gone_nothing_is_taken_away(mlp_memory, workdir, rng, tmp_path):
    """A text for the corpus; the decoder and its streams for the datastore's chunk."""
    elsewhere = tmp_path / "gone.jsonl"
    text = (workdir / "config.gin").read_text()
    recipe = tmp_path / "gone.gin"
    source = next(line for line in text.splitlines() if line.startswith("corpus.train_files")).split("'")[1]
    recipe.write_text(text.replace(source, str(elsewhere)))
    flip(workdir / "corpus/train/tokens/c/0", rng)
    flip(workdir / "datastore/keys/c/0/0", rng)
    before = compared(workdir)
    answer = mlp_memory("verify", f"--workdir={workdir}", "--repair", f"--gin_file={recipe}")
    assert answer.code == 1
    told = [line for line in answer.out.splitlines() if line.startswith("repair: ")]
    assert len(told) == 2
    assert told[0].startswith("repair: corpus/train: left as it is: ")
    assert str(elsewhere) in told[0]
    assert told[1].startswith("repair: datastore: left as it is: corpus/train")
    assert compared(workdir) == before


def test_a_workdir_of_an_earlier_version_is_checked_as_far_as_it_says_what_it_holds(workdir, rng):
    for seal in workdir.rglob("checksums.json"):
        seal.unlink()
    assert faults(workdir) == []
    notes = [note for one in check(job_of(workdir)) for note in one.notes]
    assert any("not covered: export/decoder/config.json and" in note for note in notes)
    weights = max((workdir / "memory/model").rglob("*"), key=lambda path: path.stat().st_size)
    shards = sorted((workdir / "index/shard-00000").rglob("*.npy"))
    for path, told in (
        (weights, "memory/model: "),
        (shards[0], "index/shard-00000/"),
        (workdir / "targets/certificate.json", "targets/certificate.json: is not as it was written"),
        (workdir / "corpus/test/bounds.i64", "corpus/test/bounds.i64: is not as it was written"),
    ):
        kept = path.read_bytes()
        data = bytearray(kept)
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
        assert any(line.startswith(told) for line in faults(workdir)), told
        path.write_bytes(kept)


def test_files_that_no_stage_wrote_are_named(workdir):
    (workdir / "decoder/mine.txt").write_text("mine")
    notes = [note for one in check(job_of(workdir)) for note in one.notes]
    assert notes == ["not covered: decoder/mine.txt: its stage has not written it"]


def test_a_damaged_record_of_times_costs_the_times_alone(mlp_memory, workdir):
    record = workdir / "times.jsonl"
    record.write_bytes(
        record.read_bytes().replace(b'{"stage": "gate"', b'{"stbge": "gate"').replace(b"}", b"\xff", 1)
    )
    answer = mlp_memory("status", f"--workdir={workdir}")
    assert answer.code == 0, answer.error
    assert "not usable" not in answer.out
