import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest

from mlp_memory.artifacts import Directory
from mlp_memory.config import Config
from mlp_memory.pipeline import Job


@pytest.fixture
def refused(mlp_memory):
    """Runs a command that must end in one line with exit code 2 within 10 seconds; returns the line.

    Where the fault shows only at work, lines of progress may come before.
    """

    def run(*words: object, at_work: bool = False) -> str:
        answer = mlp_memory(*words)
        assert "Traceback" not in answer.error, answer.error[-2000:]
        assert answer.code == 2, (answer.code, answer.out[-500:], answer.error[-500:])
        *before, last = answer.error.splitlines()
        assert last.startswith("error: "), answer.error
        assert at_work or not before, answer.error
        assert answer.seconds < 10
        return last

    return run


@pytest.fixture
def fresh(tmp_path: Path) -> str:
    return f"--workdir={tmp_path / 'fresh'}"


def test_a_gin_file_that_does_not_exist_is_named(refused, fresh):
    assert "'nowhere.gin' does not exist" in refused("run", fresh, "--gin_file=nowhere.gin")


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("decodr.layers=3", ["decodr", "decoder"]),
        ("decoder.layer=3", ["layer", "did you mean 'layers'?"]),
        ("nonsense.x=1", ["nonsense"]),
        ('decoder.layers="three"', ["decoder.layers = 'three'"]),
        ('pretrain.learning_rate="fast"', ["learning_rate", "fast"]),
        ("decoder.heads=5", ["192", "heads = 5"]),
        ("pretrain.steps=-1", ["steps = -1"]),
        ("corpus.fraction=1.5", ["fraction = 1.5"]),
        ('corpus.source="web"', ["'web'", "jsonl"]),
        ("embed.stride=100000", ["embed.stride = 100000"]),
        ('embed.tap_kind="head"', ["head", "ffn_input"]),
        ("embed.tap_layer=4", ["4"]),
        ("embed.chunk_rows=0", ["chunk_rows", "0"]),
        ('retrieve.k="many"', ["retrieve"]),
        ('retrieve.temperature="warm"', ["warm"]),
        ("memory.dropout=1.0", ["dropout = 1.0"]),
        ("distill.alpha=2", ["alpha = 2"]),
        ("distill.batch_size=0", ["batch_size = 0"]),
        ("joint.interpolation=1.0", ["interpolation = 1.0"]),
        ("mesh.data=3", ["data=3", "1 device"]),
        ("mesh.tensor=2", ["tensor=2", "1 device"]),
        ("decoder.layers=", ["line 1"]),
        ("decoder layers 3", ["line 1"]),
        ("decoder.layers=[1", ["EOF"]),
    ],
)
def test_a_bad_binding_is_told_before_any_work(refused, fresh, tmp_path, binding, words):
    message = refused("run", fresh, f"--gin={binding}")
    assert all(word in message for word in words)
    assert not (tmp_path / "fresh/corpus").exists()


def test_a_context_longer_than_the_learned_positions_is_told_before_any_work(refused, fresh, tmp_path):
    bindings = ['decoder.positions="learned"', "decoder.max_positions=64", "pretrain.context=128"]
    message = refused("run", fresh, *(f"--gin={b}" for b in bindings))
    assert "64" in message
    assert not (tmp_path / "fresh/corpus").exists()


@pytest.mark.parametrize(
    "text", ["decoder.layers ==== 3\n", "include 'nowhere.gin'\n", "\x00\x01", "a.b.c.d = \n"]
)
def test_a_gin_file_that_does_not_parse_is_one_line(refused, fresh, tmp_path, text):
    (tmp_path / "bad.gin").write_text(text)
    refused("run", fresh, f"--gin_file={tmp_path / 'bad.gin'}")


def corpus(path: object) -> list[str]:
    return ['--gin=corpus.source="jsonl"', f'--gin=corpus.train_files=["{path}"]']


def test_text_that_cannot_be_used_is_one_line(refused, fresh, tmp_path):
    assert "nowhere.jsonl" in refused("run", fresh, *corpus(tmp_path / "nowhere.jsonl"))
    for content in (b"", b"\n\n", b"not json\n", b'{"title": "x"}\n', b"\xff\xfe\x00\n", b'{"text": 5}\n'):
        (tmp_path / "bad.jsonl").write_bytes(content)
        assert "bad.jsonl" in refused("run", fresh, *corpus(tmp_path / "bad.jsonl"))


def test_too_few_documents_for_a_split_are_one_line(refused, fresh, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "a single document"}\n')
    refused("run", fresh, *corpus(tmp_path / "one.jsonl"))


@pytest.mark.parametrize(
    ("stage", "first"),
    [
        ("pretrain", "tokenize"),
        ("embed", "pretrain"),
        ("index", "embed"),
        ("retrieve", "tokenize"),
        ("distill", "tokenize"),
        ("joint", "tokenize"),
        ("baseline", ""),
        ("evaluate", ""),
        ("export", ""),
    ],
)
def test_a_stage_before_its_parents_names_one_to_run(refused, fresh, stage, first):
    assert f"run `python -m mlp_memory {first}" in refused(stage, fresh)


def test_text_from_a_workdir_without_models_is_one_line(refused, fresh):
    assert "python -m mlp_memory" in refused("generate", fresh, "--prompt=a")


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("decoder.layers=2", ["decoder.layers = 1", "now it is 2"]),
        ("pretrain.seed=7", ["pretrain.seed = 0", "7"]),
        ('embed.tap_kind="residual"', ["embed.tap_kind = 'ffn_input'", "residual"]),
        ("retrieve.k=9", ["k = 8", "9"]),
        ("memory.layers=2", ["memory.layers = 1", "2"]),
        ("distill.alpha=0.5", ["distill.alpha", "0.5"]),
        ("joint.steps=11", ["joint.steps = 10", "11"]),
        ("corpus.vocab_size=310", ["vocab_size = 300", "310"]),
        ("corpus.fraction=0.5", ["fraction = 1.0", "0.5"]),
    ],
)
def test_another_config_on_a_finished_workdir_is_refused_by_name(refused, small_run, recipe, binding, words):
    message = refused("run", f"--workdir={small_run}", f"--gin_file={recipe}", f"--gin={binding}")
    assert all(word in message for word in words)


def test_other_texts_under_a_finished_workdir_are_refused(refused, workdir, recipe, tmp_path):
    changed = tmp_path / "other.jsonl"
    changed.write_text((recipe.parent / "train.jsonl").read_text().replace("a", "b"))
    refused("run", f"--workdir={workdir}", f"--gin_file={recipe}", f'--gin=corpus.train_files=["{changed}"]')


def remove(workdir: Path, *folders: str) -> None:
    for folder in folders:
        shutil.rmtree(workdir / folder)


MADE = {"distill": "memory", "joint": "joint", "evaluate": "reports"}


@pytest.mark.parametrize(
    ("stage", "binding"),
    [
        ("distill", 'embed.tap_kind="residual"'),
        ("joint", "embed.context=64"),
        ("joint", 'embed.tap_kind="residual"'),
        ("evaluate", "embed.stride=8"),
    ],
)
def test_rows_are_not_read_in_another_way_than_the_datastores_were(refused, workdir, stage, binding):
    """Each of these stages reads rows through `embed`'s settings."""
    remove(workdir, MADE[stage])
    assert binding.split("=")[0] in refused(stage, f"--workdir={workdir}", f"--gin={binding}")


def test_text_does_not_come_from_another_tap_than_the_memory_was_trained_on(small_run, mlp_memory):
    words = ("generate", f"--workdir={small_run}", "--prompt=abc", "--model=base_plus_memory")
    words = (*words, "--gin=generate.max_tokens=12")
    usual, other = (mlp_memory(*words, *more) for more in ([], ['--gin=embed.tap_kind="residual"']))
    assert other.code == 2 or other.out == usual.out


@pytest.mark.parametrize("stage", ["distill", "joint", "evaluate"])
def test_a_decoder_that_the_datastore_was_not_made_from_is_refused(workdir, refused, stage):
    """The decoder was made anew; its grandchildren are still those of the old one."""
    path = workdir / "decoder/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["pretrain"]["seed"] = 1
    path.write_text(json.dumps(manifest))
    remove(workdir, MADE[stage])
    message = refused(stage, f"--workdir={workdir}", "--gin=pretrain.seed=1")
    assert "decoder" in message
    assert "datastore" in message


def chunk(workdir: Path, array: str) -> Path:
    return sorted(p for p in (workdir / array / "c").rglob("*") if p.is_file())[-1]


@pytest.mark.parametrize(
    ("array", "folder", "stage"),
    [
        ("corpus/train/tokens", "decoder", "pretrain"),
        ("corpus/validation/tokens", "decoder", "pretrain"),
        ("datastore/keys", "memory", "distill"),
        ("targets/token_ids", "memory", "distill"),
        ("targets/probs", "memory", "distill"),
    ],
)
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_array_is_one_line_where_it_is_read(refused, workdir, array, folder, stage, damage):
    remove(workdir, folder)
    path = chunk(workdir, array)
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[:-3]
    else:
        data[len(data) // 2] ^= 8
    path.write_bytes(data)
    assert array in refused(stage, f"--workdir={workdir}", at_work=damage == "flipped")


@pytest.mark.parametrize("array", ["corpus/train/tokens", "datastore/keys", "targets/probs"])
def test_a_truncated_array_is_told_by_run(refused, workdir, recipe, array):
    path = chunk(workdir, array)
    path.write_bytes(path.read_bytes()[:-1])
    assert str(path) in refused("run", f"--workdir={workdir}", f"--gin_file={recipe}")


@pytest.mark.parametrize(
    "artifact",
    ["corpus/train", "corpus/vocabulary", "decoder", "datastore", "index", "targets", "memory", "joint"],
)
def test_a_damaged_manifest_is_one_line(refused, workdir, recipe, artifact):
    path = workdir / artifact / "manifest.json"
    path.write_text(path.read_text()[:40])
    assert artifact in refused("run", f"--workdir={workdir}", f"--gin_file={recipe}")


def test_a_damaged_checkpoint_is_one_line(refused, workdir):
    for folder, child, stage in (("decoder", "datastore", "embed"), ("memory", "joint", "joint")):
        remove(workdir, child)
        for path in (workdir / folder / "model").rglob("d/*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:-10])
        assert folder in refused(stage, f"--workdir={workdir}")


def test_a_checkpoint_that_is_gone_is_one_line(refused, workdir):
    remove(workdir, "decoder/model", "datastore")
    assert "decoder" in refused("embed", f"--workdir={workdir}")


def test_a_damaged_vocabulary_is_one_line(refused, workdir):
    (workdir / "corpus/vocabulary/tokenizer.model").write_bytes(b"not a model")
    assert "tokenizer.model" in refused("generate", f"--workdir={workdir}", "--prompt=a")


def test_a_damaged_index_is_one_line(refused, workdir):
    remove(workdir, "targets")
    for path in (workdir / "index").rglob("hashed_dataset.npy"):
        path.write_bytes(path.read_bytes()[:-10])
    assert "index" in refused("retrieve", f"--workdir={workdir}")


def test_a_vocabulary_that_does_not_fit_is_one_line(refused, workdir):
    remove(workdir, "decoder")
    message = refused("pretrain", f"--workdir={workdir}", "--gin=decoder.vocab_size=299")
    assert "decoder.vocab_size = 299 is smaller than the corpus vocabulary's 300" in message


def test_decoder_and_memory_speak_of_the_same_vocabulary(small_run):
    """A decoder may have more ids than the corpus uses; the two are interpolated id by id."""
    import dataclasses

    config = Config(decoder=dataclasses.replace(Config().decoder, vocab_size=384))
    job = Job(Directory(small_run), config)
    assert job.decoder_config.vocab_size == 384
    assert job.memory_config.vocab_size == job.decoder_config.vocab_size


def test_a_workdir_that_cannot_be_written_is_one_line(refused, tmp_path, recipe):
    (tmp_path / "file").write_text("")
    for stage in ("run", "tokenize"):
        message = refused(stage, f"--workdir={tmp_path / 'file/below'}", f"--gin_file={recipe}")
        assert str(tmp_path / "file") in message


def test_only_known_places_are_taken(refused, recipe):
    assert "ftp://" in refused("run", "--workdir=ftp://host/x", f"--gin_file={recipe}")


def test_a_second_process_is_told_to_wait(refused, workdir):
    remove(workdir, "export")
    with (workdir / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write("4321")
        lock.flush()
        message = refused("export", f"--workdir={workdir}")
    assert "another process (pid 4321) is at work" in message


def test_a_stage_that_is_done_says_so_and_does_nothing(small_run, mlp_memory):
    before = os.stat(small_run / "decoder/manifest.json").st_mtime_ns
    answer = mlp_memory("pretrain", f"--workdir={small_run}")
    assert answer.code == 0
    assert "done before" in answer.error
    assert os.stat(small_run / "decoder/manifest.json").st_mtime_ns == before


def test_a_dry_run_writes_nothing_and_shows_every_setting_and_shape(mlp_memory, recipe, tmp_path):
    answer = mlp_memory("run", f"--workdir={tmp_path / 'w'}", f"--gin_file={recipe}", "--dry_run")
    assert answer.code == 0, answer.error
    assert not (tmp_path / "w").exists()
    for words in ("decoder.dim = 32", "memory.layers = 1", "# decoder.embedding", "(300, 32)", "parameters"):
        assert words in answer.out


def test_help_names_every_stage_and_an_example(mlp_memory):
    answer = mlp_memory("--help")
    assert answer.code == 0
    for word in ("tokenize", "pretrain", "evaluate", "generate", "status", "--gin_file=gin_configs/recipes"):
        assert word in answer.out
