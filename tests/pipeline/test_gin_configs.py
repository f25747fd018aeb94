import dataclasses
import re
from pathlib import Path

import pytest

from mlp_memory.artifacts import Directory, UserError
from mlp_memory.dry_run import resolved_shapes, shapes_table
from mlp_memory.parallel.chips import find_topology
from mlp_memory.recipes import load_config

REPOSITORY = Path(__file__).parents[2]
FILES = sorted((REPOSITORY / "gin_configs").rglob("*.gin"))
RECIPES = [path for path in FILES if path.parent.name == "recipes"]


def name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY / "gin_configs"))


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {"demo", "enwiki_small_cpu"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_gin_file_parses_and_has_shapes(path, tmp_path):
    config = load_config([str(path)], [], Directory(tmp_path))
    topology = path.stem.replace("_", "-")
    devices = find_topology(topology).chips if path.parent.name == "scale" else None
    table = shapes_table(config, devices)
    assert "# decoder.embedding" in table
    assert "# memory.head" in table
    for line in path.read_text().splitlines():
        if binding := re.match(r"(\w+)\.(\w+) *= *([\w.\"+-]+)$", line):
            section, field, value = binding.groups()
            assert getattr(getattr(config, section), field) == eval(value)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_every_recipe_dry_runs_by_the_command_in_its_header(path, mlp_memory, tmp_path):
    header = path.read_text().split("\n\n")[0]
    assert "python -m mlp_memory run" in header
    assert f"--gin_file=gin_configs/recipes/{path.name}" in header
    answer = mlp_memory("run", f"--workdir={tmp_path / 'w'}", f"--gin_file={path}", "--dry_run")
    assert answer.code == 0, answer.error
    assert not answer.error
    assert "parameters" in answer.out
    assert not (tmp_path / "w").exists()


def test_every_other_gin_file_is_part_of_a_recipe_or_says_how_it_is_used():
    included = {
        include for path in RECIPES for include in re.findall(r"^include '([^']+)'", path.read_text(), re.M)
    }
    for path in set(FILES) - set(RECIPES):
        header = path.read_text().split("\n\n")[0]
        assert name(path) in included or f"--gin_file=gin_configs/{name(path)}" in header


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "corpora"], ids=name)
def test_a_corpus_given_after_a_recipe_replaces_the_recipes_files(path, tmp_path):
    recipe = next(recipe for recipe in RECIPES if recipe.stem == "enwiki_small_cpu")
    alone, after = (
        load_config([*map(str, files)], [], Directory(tmp_path)).corpus for files in ([path], [recipe, path])
    )
    for field in ("source", "parts", "train_files", "validation_files", "test_files"):
        assert getattr(alone, field) == getattr(after, field)


SCALES = [path for path in FILES if path.parent.name == "scale"]
SCALED = ("paper_mistral_7b_wikipedia", "paper_llama2_7b_wikipedia", "memory_10b_wikipedia")


@pytest.mark.parametrize("path", SCALES, ids=name)
@pytest.mark.parametrize("recipe", SCALED)
def test_a_scale_file_lays_out_a_recipe_without_changing_its_rows(path, recipe):
    files = [str(REPOSITORY / f"gin_configs/recipes/{recipe}.gin")]
    alone, scaled = load_config(files, [], None), load_config([*files, str(path)], [], None)
    _, data, fsdp, _ = scaled.mesh.sizes(find_topology(path.stem.replace("_", "-")).chips)
    assert scaled.distill.batch_size // scaled.distill.accumulate % (data * fsdp) == 0
    assert scaled.joint.batch_size % (data * fsdp) == 0
    changed = {"accumulate": 1, "remat": "dots"}
    assert dataclasses.replace(scaled.distill, **changed) == dataclasses.replace(alone.distill, **changed)


# Parameters of the memories in millions: PAPER.md, "memory sizes"; those of the 7 B bases are
# given without the head, 1.1 to 1.4 billion.
PAPER_MEMORIES = {
    "paper_gpt2_small_wikitext103": (124, True),
    "paper_gpt2_medium_wikitext103": (354, True),
    "paper_gpt2_large_wikitext103": (773, True),
    "paper_llama2_7b_wikipedia": (1100, False),
    "paper_mistral_7b_wikipedia": (1400, False),
}
# Parameters of the decoders in millions, as their makers give them.
PAPER_DECODERS = {"small": 124.4, "medium": 354.8, "large": 774.0, "llama2": 6738.4, "mistral": 7248.0}


@pytest.mark.parametrize("name", PAPER_MEMORIES)
def test_paper_recipes_have_the_papers_sizes_and_settings(name, tmp_path):
    config = load_config([str(REPOSITORY / f"gin_configs/recipes/{name}.gin")], [], Directory(tmp_path))
    table = shapes_table(config)
    counted = {
        model: int(re.search(rf"# {model}: ([\d,]+) parameters", table).group(1).replace(",", ""))
        for model in ("decoder", "memory")
    }
    wanted, with_head = PAPER_MEMORIES[name]
    head = config.decoder.dim * config.decoder.vocab_size
    assert (counted["memory"] - (0 if with_head else head)) / 1e6 == pytest.approx(wanted, rel=0.02)
    decoder = next(size for part, size in PAPER_DECODERS.items() if part in name)
    assert counted["decoder"] / 1e6 == pytest.approx(decoder, rel=0.001)
    assert (config.distill.alpha, config.retrieve.k, config.distill.decay) == (0.4, 1024, "linear")
    gpt2 = "gpt2" in name
    assert config.distill.learning_rate == (5e-4 if gpt2 else 4e-4)
    assert config.retrieve.temperature == (16.0 if gpt2 else "auto")
    rows = config.distill.steps * config.distill.batch_size * config.distill.block_rows
    assert rows == pytest.approx(50 * 117e6 if gpt2 else 5 * 5e9, rel=0.001)


def test_the_memory_of_the_large_recipe_has_ten_billion_parameters():
    config = load_config([str(REPOSITORY / "gin_configs/recipes/memory_10b_wikipedia.gin")], [], None)
    _, memory = resolved_shapes(config)
    assert memory.matmul_parameters() == pytest.approx(10e9, rel=0.05)
    rows = config.distill.steps * config.distill.batch_size * config.distill.block_rows
    assert rows == pytest.approx(5 * 5e9, rel=0.001)


@pytest.mark.parametrize("line", ["import os", "  from os import path", "include 'other.gin'"])
def test_a_workdirs_own_config_sets_values_and_runs_nothing(line, tmp_path):
    """Nobody has to have read it before it is used; a recipe that is given by name may include others."""
    saved = "decoder.layers = 3\n"
    (tmp_path / "config.gin").write_text(saved)
    assert load_config([], [], Directory(tmp_path)).decoder.layers == 3
    (tmp_path / "config.gin").write_text(f"{saved}{line}\n")
    with pytest.raises(UserError, match=r"config\.gin holds .*: give the recipe by --gin_file"):
        load_config([], [], Directory(tmp_path))
