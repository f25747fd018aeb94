"""`update` by the command line: what it takes over, what it makes, what it leaves of deleted documents."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from mlp_memory.arrays import ArrayReader
from mlp_memory.artifacts import Directory, UserError
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.index.search import open_index
from mlp_memory.job import Job
from mlp_memory.recipes import load_config
from mlp_memory.updating import choice

STAGES = ("embed", "index", "retrieve", "distill")


def job_of(workdir):
    return Job(Directory(workdir), load_config([], [], Directory(workdir)))


def text_of(job, document):
    stream = job.stream("train")
    return job.vocabulary().decode(stream.tokens[stream.bounds_D1[document] : stream.bounds_D1[document + 1]])


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("update")


@pytest.fixture(scope="module")
def update_recipe(recipe, folder):
    """The small recipe with exact search, so that teachers can be compared bit for bit."""
    path = folder / "update.gin"
    text = recipe.read_text() + '\nindex.backend = "exact"\nretrieve.temperature = 1.0\n'
    text += "distill.alpha = 0.5\ndistill.block_rows = 8\nembed.chunk_rows = 256\n"
    path.write_text(text + 'update.memory = "trained_on"\n')
    return path


@pytest.fixture(scope="module")
def added(folder, base):
    """New documents; before them one that is in the train stream, behind them the first of them again."""
    known = text_of(job_of(base), 0)
    rng, words = np.random.default_rng(7), known.replace(".", "").split()
    new = [" ".join(rng.choice(words, 40)) + " new." for _ in range(9)]
    return write_texts(folder / "added.jsonl", [known, *new, new[0]])


@pytest.fixture(scope="module")
def base(mlp_memory, update_recipe, folder):
    for stage in ("tokenize", "pretrain", *STAGES):
        answer = mlp_memory(stage, f"--workdir={folder}/base", f"--gin_file={update_recipe}")
        assert answer.code == 0, answer.error
    return folder / "base"


@pytest.fixture(scope="module")
def words(base, added):
    """The update's command, less its --output."""
    return ("update", f"--workdir={base}", f"--add={added}", "--delete=2,5-6")


@pytest.fixture(scope="module")
def updated(mlp_memory, words, folder):
    answer = mlp_memory(*words, f"--output={folder}/updated")
    assert answer.code == 0, answer.error
    (folder / "said.txt").write_text(answer.out + answer.error)
    return folder / "updated"


def test_the_stream_goes_on_and_keeps_nothing_of_what_was_deleted(base, updated, folder):
    before, now = TokenStream.open(Directory(base) / "corpus/train"), job_of(updated).stream("train")
    assert len(now.bounds_D1) - len(before.bounds_D1) == 9  # one was there, one came twice
    assert "2 of 11 documents are in the train stream already" in (folder / "said.txt").read_text()
    np.testing.assert_array_equal(np.flatnonzero(now.deleted_D), [2, 5, 6])
    np.testing.assert_array_equal(now.bounds_D1[: len(before.bounds_D1)], before.bounds_D1)
    old, kept = before.tokens[0 : len(before)], now.tokens[0 : len(before)]
    gone = now.is_deleted(0, len(before))
    np.testing.assert_array_equal(gone, np.isin(before.document_ids(0, len(before)), [2, 5, 6]))
    np.testing.assert_array_equal(kept, np.where(gone, 0, old))
    assert not now.has_next(0, len(before))[gone].any()
    np.testing.assert_array_equal(now.has_next(0, len(before))[~gone], before.has_next(0, len(before))[~gone])
    facts = now.manifest.facts
    assert facts["documents"] == before.manifest.facts["documents"] + 9 - 3
    assert now.num_scored == int(now.has_next(0, len(now)).sum())


def test_keys_are_those_of_embedding_the_whole_stream(mlp_memory, updated, tmp_path):
    """And rows of deleted documents are zero."""
    whole = tmp_path / "whole"
    whole.mkdir()
    for name in ("corpus", "decoder"):
        shutil.copytree(updated / name, whole / name)
    shutil.copy(updated / "config.gin", whole)
    answer = mlp_memory("embed", f"--workdir={whole}")
    assert answer.code == 0, answer.error
    stream = job_of(updated).stream("train")
    found = ArrayReader(Directory(updated) / "datastore", "keys")[0 : len(stream)]
    np.testing.assert_array_equal(found, ArrayReader(Directory(whole) / "datastore", "keys")[0 : len(stream)])
    gone = stream.is_deleted(0, len(stream))
    assert gone.any()
    assert not found[gone].any()
    assert (np.abs(found[~gone]).sum(axis=1) > 0).all()
    manifests = [(run / "datastore/manifest.json").read_bytes() for run in (whole, updated)]
    assert manifests[0] == manifests[1]


def test_chunks_without_a_deleted_row_are_the_same_files(base, updated):
    chunks = [path for path in (base / "datastore/keys/c").rglob("*") if path.is_file()]
    same = [path.samefile(updated / path.relative_to(base)) for path in chunks]
    assert any(same)
    assert not all(same)


def test_the_index_finds_new_rows_and_no_deleted_one(updated):
    job = job_of(updated)
    stream, keys = job.stream("train"), job.keys()
    valid = stream.has_next(0, len(stream))
    index = open_index(job.workdir / "index", keys, valid)
    rows, _ = index.search(np.asarray(keys[0 : len(stream)], np.float32)[valid], 8)
    assert not np.isin(rows, np.flatnonzero(stream.is_deleted(0, len(stream)))).any()
    assert (rows >= len(stream) - 50).any()


def test_chosen_rows_have_the_teachers_of_the_whole_stream(mlp_memory, updated, base, tmp_path):
    """Of rows that are deleted: what the other rows say at the key that the base has there."""
    whole = tmp_path / "whole"
    whole.mkdir()
    for name in ("corpus", "decoder", "datastore", "index"):
        shutil.copytree(updated / name, whole / name)
    shutil.copy(updated / "config.gin", whole)
    answer = mlp_memory("retrieve", f"--workdir={whole}")
    assert answer.code == 0, answer.error
    job, block = job_of(updated), job_of(updated).config.distill.block_rows
    stream, old = job.stream("train"), job_of(base).stream("train")
    gone = stream.is_deleted(0, len(stream))
    chosen = choice.read(job.workdir / "targets")
    rows = (chosen.starts_B[:, None] + np.arange(block)).reshape(-1)
    inside = (rows < len(stream)) & ~gone[np.minimum(rows, len(stream) - 1)]
    assert inside.sum() > 100
    for name in ("token_ids", "probs", "kept_mass", "neighbours", "support"):
        found = ArrayReader(job.workdir / "targets", name)[0 : len(rows)]
        full = ArrayReader(Directory(whole) / "targets", name)[0 : len(stream)]
        np.testing.assert_array_equal(found[inside], full[rows[inside]])
    # Deleted rows, against brute force over the rows that are left.
    keys, base_keys = job.keys()[0 : len(stream)], job_of(base).keys()[0 : len(old)]
    valid = np.flatnonzero(stream.has_next(0, len(stream)))
    labels = stream.labels(0, len(stream))
    probs, ids = (ArrayReader(job.workdir / "targets", n)[0 : len(rows)] for n in ("probs", "token_ids"))
    places = np.flatnonzero((rows + block <= len(old)) & np.isin(rows, np.flatnonzero(gone)))
    places = [p for p in places if old.has_next(int(rows[p]), int(rows[p]) + 1)[0]]
    assert len(places) > 50
    k, tau = job.config.retrieve.k, 1.0
    for place in places[::7]:
        sqdist = ((keys[valid] - base_keys[rows[place]]) ** 2).sum(axis=1)
        near = np.lexsort((valid, sqdist))[:k]
        weight = np.exp(-(sqdist[near] - sqdist[near].min()) / tau)
        expected = np.bincount(labels[valid[near]], weight / weight.sum(), minlength=stream.vocab_size)
        got = np.zeros(stream.vocab_size)
        np.add.at(got, ids[place], probs[place].astype(np.float64))
        np.testing.assert_allclose(got, expected, atol=2e-3)


def test_every_changed_row_is_trained_on_and_others_beside(updated, base):
    job = job_of(updated)
    stream, old = job.stream("train"), job_of(base).stream("train")
    chosen, block = choice.read(job.workdir / "targets"), job.config.distill.block_rows
    rows = (chosen.starts_B[:, None] + np.arange(block)).reshape(-1)
    assert len(np.unique(chosen.starts_B)) == len(chosen.starts_B)
    assert np.isin(np.arange(len(old), len(stream)), rows).all()
    gone = np.flatnonzero(stream.is_deleted(0, len(stream)))
    assert np.isin(gone[gone < len(old) - block], rows).all()
    assert len(chosen.affected_C) > 0
    assert len(chosen.replay_D) > 0
    facts = job.manifest("memory").facts
    assert facts["update"]["steps"] >= 1
    before = job_of(base).manifest("memory").facts
    assert facts["checksums"] != before["checksums"]


def test_an_update_that_is_killed_goes_on_and_ends_in_the_same_bytes(
    mlp_memory, start_command, words, updated, tmp_path, rng
):
    moments = ["corpus/train/manifest.json", "datastore/chunks/*", "targets/chunks/*", "memory/steps/*"]
    again = tmp_path / "again"
    moment = moments[int(rng.integers(len(moments)))]
    process = start_command(*words, f"--output={again}", log=tmp_path / "log")
    while not any(again.glob(moment)):
        assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
        time.sleep(0.005)
    time.sleep(float(rng.uniform(0, 0.3)))
    process.kill()
    process.wait()
    print("killed at", moment)
    answer = mlp_memory(*words, f"--output={again}")
    assert answer.code == 0, answer.error

    def compared(run):
        """Less Orbax's files, whose names are random, and the lists of them."""
        skipped = {"tensorboard", "model", ".lock", "times.jsonl"}
        return {
            str(path.relative_to(run)): path.read_bytes()
            for path in run.rglob("*")
            if path.is_file()
            and not skipped & set(path.relative_to(run).parts)
            and not (path.name == "checksums.json" and (path.parent / "model").is_dir())
        }

    expected, found = compared(updated), compared(again)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


def test_a_deletion_is_made_from_scratch_of_what_is_left(mlp_memory, words, updated, tmp_path):
    """The same memory as of the stages themselves over the same tokens; said again, it stays from scratch."""
    anew, peer = tmp_path / "anew", tmp_path / "peer"
    answer = mlp_memory(*words, f"--output={anew}", "--gin=update.memory='auto'")
    assert answer.code == 0, answer.error
    assert "made anew" in answer.out
    peer.mkdir()
    for name in ("corpus", "decoder", "datastore"):
        shutil.copytree(updated / name, peer / name)
    for stage in STAGES[1:]:
        answer = mlp_memory(stage, f"--workdir={peer}", f"--gin_file={updated}/config.gin")
        assert answer.code == 0, answer.error
    expected = job_of(peer).manifest("memory").facts["checksums"]
    assert expected != job_of(updated).manifest("memory").facts["checksums"]
    assert job_of(anew).manifest("memory").facts["checksums"] == expected
    shutil.rmtree(anew / "memory")
    answer = mlp_memory(*words, f"--output={anew}")
    assert answer.code == 0, answer.error
    assert job_of(anew).manifest("memory").facts["checksums"] == expected


def test_the_update_is_a_workdir_like_any_other(mlp_memory, updated, tmp_path):
    workdir = tmp_path / "workdir"
    shutil.copytree(updated, workdir)
    switched = [f"--gin={name}.enabled=False" for name in ("joint", "baseline", "gate")]
    answer = mlp_memory("run", f"--workdir={workdir}", *switched)
    assert answer.code == 0, answer.error
    assert json.loads((workdir / "reports/results.json").read_text())["test"]["perplexity"]
    answer = mlp_memory("generate", f"--workdir={workdir}", "--prompt=a", *switched)
    assert answer.code == 0, answer.error


def test_an_update_of_an_update_deletes_what_a_file_names(mlp_memory, updated, tmp_path):
    """The documents are found by their text, one of those that the first update brought among them."""
    job = job_of(updated)
    number = len(job.stream("train").bounds_D1) - 2
    path = write_texts(tmp_path / "old.jsonl", [text_of(job, d) for d in (0, number)])
    again = tmp_path / "again"
    answer = mlp_memory("update", f"--workdir={updated}", f"--output={again}", f"--delete={path}")
    assert answer.code == 0, answer.error
    deleted = np.flatnonzero(job_of(again).stream("train").deleted_D)
    np.testing.assert_array_equal(deleted, [0, 2, 5, 6, number])
    assert "0 added, 2 deleted" in answer.out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give --add=FILE or --delete=DOCUMENTS"),
        (["--add=nowhere.jsonl"], "no such file"),
        (["--delete=9-3"], "no range"),
        (["--delete=100000"], "there is no document 100000"),
        (["--delete={other}"], "not in the train stream"),
        (["--add={known}"], "nothing to do"),
        (["--output={base}", "--delete=1"], "--output is --workdir"),
        (["--output={full}", "--delete=1"], "is not empty"),
    ],
)
def test_bad_requests_get_one_line(mlp_memory, base, tmp_path, flags, said):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    names = {
        "base": base,
        "full": tmp_path / "full",
        "other": write_texts(tmp_path / "other.jsonl", ["nothing like it"]),
        "known": write_texts(tmp_path / "known.jsonl", [text_of(job_of(base), 0)]),
    }
    given = [flag.format(**names) for flag in flags]
    output = [] if any(flag.startswith("--output") for flag in given) else [f"--output={tmp_path / 'new'}"]
    answer = mlp_memory("update", f"--workdir={base}", *output, *given)
    assert answer.code == 2, answer.error
    assert said in answer.error
    assert answer.error.count("error: ") == 1
    assert "Traceback" not in answer.error


def test_traces_are_of_what_is_there_now(mlp_memory, updated, tmp_path):
    """A chosen row's teacher is the stored one; of a row without one it is what its neighbours give."""
    job = job_of(updated)
    stream, block = job.stream("train"), job.config.distill.block_rows
    starts = choice.read(job.workdir / "targets").starts_B
    covered = np.zeros(len(stream) + block, bool)
    covered[(starts[:, None] + np.arange(block)).reshape(-1)] = True
    scored = stream.has_next(0, len(stream))
    chosen = int(np.flatnonzero(scored & covered[: len(stream)])[-5])
    other = int(np.flatnonzero(scored & ~covered[: len(stream)])[3])
    path = tmp_path / "trace.json"
    flags = [f"--workdir={updated}", f"--row={chosen}", f"--row={other}", f"--json={path}"]
    answer = mlp_memory("trace", *flags)
    assert answer.code == 0, answer.error
    for row in json.loads(path.read_text())["rows"]:
        assert row["difference"] < 1e-3
    gone = int(np.flatnonzero(stream.is_deleted(0, len(stream)))[0])
    answer = mlp_memory("trace", f"--workdir={updated}", f"--row={gone}")
    assert answer.code == 2
    assert "is deleted" in answer.error
    answer = mlp_memory("documents", f"--workdir={updated}")
    assert answer.out.count("(deleted)") == 3


def test_another_request_for_the_same_output_is_refused(mlp_memory, base, updated):
    answer = mlp_memory("update", f"--workdir={base}", f"--output={updated}", "--delete=4")
    assert answer.code == 2
    assert "was begun with other add" in answer.error


def test_verify_finds_an_update_sound_and_misses_nothing(mlp_memory, updated):
    answer = mlp_memory("verify", f"--workdir={updated}")
    assert answer.code == 0, answer.out
    assert "is gone" not in answer.out + answer.error
    assert "not there any more" not in answer.out + answer.error
    assert "update.json" not in answer.out + answer.error


def test_tokenize_does_not_undo_an_update(mlp_memory, updated, tmp_path):
    workdir = tmp_path / "workdir"
    shutil.copytree(updated, workdir)
    shutil.rmtree(workdir / "corpus/train")
    answer = mlp_memory("tokenize", f"--workdir={workdir}")
    assert answer.code == 2
    assert "is an update of" in answer.error


def test_a_damaged_list_of_deleted_documents_is_told(updated, tmp_path):
    train = tmp_path / "train"
    shutil.copytree(updated / "corpus/train", train)
    data = bytearray((train / "deleted.i64").read_bytes())
    data[0] ^= 1
    (train / "deleted.i64").write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"deleted\.i64 is damaged"):
        TokenStream.open(Directory(train))


def test_a_flipped_byte_in_what_base_and_update_share_is_repaired_in_both(mlp_memory, base, updated, rng):
    linked = sorted(p for p in updated.rglob("*") if p.is_file() and p.stat().st_nlink > 1)
    by_artifact = {name: [p for p in linked if name in p.parts] for name in ("keys", "test", "decoder")}
    for name, paths in by_artifact.items():
        path = (
            paths[int(rng.integers(len(paths)))] if name != "decoder" else updated / "decoder/metrics.jsonl"
        )
        before = path.read_bytes()
        place = int(rng.integers(len(before)))
        with path.open("r+b") as file:  # in place: under both names
            file.seek(place)
            file.write(bytes([before[place] ^ 1 << int(rng.integers(8))]))
        assert (base / path.relative_to(updated)).read_bytes() == path.read_bytes() != before
        answer = mlp_memory("verify", f"--workdir={updated}", "--repair")
        assert answer.code == 0, answer.out + answer.error
        assert (base / path.relative_to(updated)).read_bytes() == path.read_bytes() == before
    for run in (base, updated):
        assert mlp_memory("verify", f"--workdir={run}").code == 0


def test_a_damaged_record_of_an_update_is_written_again(mlp_memory, updated, tmp_path):
    workdir = Path(shutil.copytree(updated, tmp_path / "workdir"))
    before = (workdir / "update.json").read_bytes()
    (workdir / "update.json").write_bytes(before[:-9])
    answer = mlp_memory("verify", f"--workdir={workdir}", "--repair")
    assert answer.code == 0, answer.out + answer.error
    assert "written again: update.json" in answer.out
    assert (workdir / "update.json").read_bytes() == before
    shutil.rmtree(workdir / "corpus")
    (workdir / "update.json").write_bytes(before[:-9])
    answer = mlp_memory("verify", f"--workdir={workdir}", "--repair")
    assert answer.code == 1
    assert "give the `update` command again" in answer.out
