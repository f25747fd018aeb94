import json
from pathlib import Path

import pytest
import safetensors.numpy


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


@pytest.mark.parametrize("finetune", [False, True])
def test_a_run_over_an_imported_decoder_uses_its_tokenizer_and_has_no_equal_decoder(
    exported, small_run, recipe, mlp_memory, tmp_path, finetune
):
    source = [f"--gin=pretrained.source='{exported / 'decoder'}'", f"--gin=pretrained.finetune={finetune}"]
    command = ["run", f"--workdir={tmp_path / 'w'}", f"--gin_file={recipe}", *source]
    answer = mlp_memory(*command)
    assert answer.code == 0, answer.error
    results = json.loads((tmp_path / "w/reports/results.json").read_text())
    systems = {"base", "knn_lm_exact", "knn_lm_scann", "base_plus_memory", "joint"}
    assert set(results["test"]["perplexity"]) == systems
    assert (tmp_path / "w/corpus/vocabulary/tokenizer.model").read_bytes() == (
        exported / "decoder/tokenizer.model"
    ).read_bytes()
    before, after = (
        safetensors.numpy.load_file(folder / "decoder/model.safetensors")
        for folder in (exported, tmp_path / "w/export")
    )
    assert sorted(before) == sorted(after)
    same = all(before[name].tobytes() == after[name].tobytes() for name in before)
    base = json.loads((small_run / "reports/results.json").read_text())["test"]["perplexity"]["base"]
    if finetune:  # a different decoder, unless training on did not help
        steps = json.loads((tmp_path / "w/decoder/manifest.json").read_text())["facts"]["step"]
        assert same == (steps == 0)
        assert results["test"]["perplexity"]["base"] <= base * 1.05
    else:
        assert same
        assert results["test"]["perplexity"]["base"] == pytest.approx(base, rel=1e-6)
    again = mlp_memory(*command)
    assert "---" not in again.out + again.error.split("stage")[0]


def test_an_import_that_cannot_be_is_one_line(exported, refused_quickly, tmp_path):
    fresh = f"--workdir={tmp_path / 'fresh'}"
    assert "give --from=DIR_OR_FILE" in refused_quickly("import", fresh)
    assert "does not exist" in refused_quickly("import", "--from=nowhere", fresh)
    assert "give a model's folder" in refused_quickly("import", f"--from={tmp_path}", fresh)
    (tmp_path / "m.bin").write_bytes(b"\x80\x04")
    assert "is a pickle" in refused_quickly("import", f"--from={tmp_path / 'm.bin'}", fresh)
    words = ("run", fresh, f"--gin=pretrained.source='{exported / 'memory'}'")
    assert "is a memory, not a decoder" in refused_quickly(*words)


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


@pytest.mark.skipif(not STORIES.exists(), reason="needs shared/data/models/stories260K")
def test_stories260k_tells_its_documented_story(mlp_memory, tmp_path):
    work = f"--workdir={tmp_path / 'w'}"
    answer = mlp_memory("import", f"--from={STORIES}", work)
    assert answer.code == 0, answer.error
    settings = ("--gin=generate.max_tokens=90", "--gin=embed.context=128")
    story = mlp_memory("generate", work, "--prompt=", "--model=base", *settings).out
    # As llama2.c's own documentation prints for this checkpoint at temperature 0.
    assert story.removeprefix("[base] ").startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
    )
