import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from mlp_memory.artifacts import Directory, UserError
from mlp_memory.config import config_json
from mlp_memory.decoder.config import DecoderConfig, parameter_count
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory
from mlp_memory.recipes import load_config
from mlp_memory.studies import sizes
from mlp_memory.studies.config import STUDIES
from mlp_memory.studies.plan import plan_table
from mlp_memory.studies.study import Study
from mlp_memory.studies.variants import variants_of

REPOSITORY = Path(__file__).parents[2]
FILES = sorted((REPOSITORY / "gin_configs/studies").glob("*.gin"))


def study(recipe: str, name: str, *bindings: str, workdir: str = "/nowhere") -> Study:
    return Study(name, [recipe], list(bindings), Directory(workdir))


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_plans_its_variants_and_makes_nothing(name, recipe, tmp_path):
    found = study(recipe, name, workdir=str(tmp_path / "w"))
    table = plan_table(found)
    assert not (tmp_path / "w").exists()
    for variant in found.variants.values():
        assert re.search(rf"^{re.escape(variant.name)} ", table, re.M)
        assert all(binding in table for binding in variant.bindings)


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_study_file_serves_every_study(name, path):
    assert "tokenize" in plan_table(study(str(path), name))


def test_there_are_study_files():
    assert "enwiki_small_cpu" in {path.stem for path in FILES}


def test_a_plan_says_what_variants_share(recipe):
    lines = {
        line.split()[0]: line for line in plan_table(study(recipe, "alpha")).splitlines() if line.strip()
    }
    assert re.search(r"tokenize, pretrain, embed, index, retrieve, distill, measure +–$", lines["recipe"])
    later = plan_table(study(recipe, "alpha"))
    assert re.search(r"^alpha_1.0 .* distill, measure +tokenize, pretrain, .*retrieve: recipe$", later, re.M)
    # The recipe's own value is the recipe over again.
    table = plan_table(study(recipe, "alpha", "study.alphas = (0.4, 1.0)"))
    assert re.search(r"^alpha_0.4 .* – +tokenize, .*distill, measure: recipe$", table, re.M)


@pytest.mark.parametrize(
    ("name", "binding", "message"),
    [
        ("alpha", "study.alphas = ()", "study.alphas is empty"),
        ("alpha", "study.alphas = 0.5", "study.alphas = 0.5: give a list"),
        ("alpha", "study.alphas = (0.5, 0.5)", "a value twice"),
        (
            "alpha",
            "study.alphas = (0.5, 1.5)",
            r"variant alpha_1.5: distill.alpha = 1.5 must lie in \[0, 1\]",
        ),
        ("k", "study.ks = (8, 0)", "variant k_0: retrieve.k = 0"),
        ("depth", "study.depths = (2, 0)", "variant depth_0: memory.layers = 0"),
        ("style", "study.styles = ('llama', 'rwkv')", "variant style_rwkv: memory.style = 'rwkv'"),
        ("tap", "study.taps = (0, 1)", "tap layer 1 is outside a decoder of 1 layers"),
        ("scaling", "study.sizes = ((1, 24),)", "dim 24 has no whole number of heads of 16"),
        ("scaling", "study.sizes = (4,)", "4 is no pair"),
        ("scaling", "study.memory_share = 1.0", "study.memory_share = 1.0"),
        ("overfitting", "study.epochs = 0", "study.epochs = 0"),
        ("overfitting", "study.checks = 1", "study.checks = 1"),
        ("scaling", 'pretrained.source = "/nowhere/model"', "leave pretrained.source out"),
        ("alpha", 'pretrained.memory = "/nowhere/memory"', "pretrained.memory"),
        ("shape", "", "study 'shape': there are scaling"),
    ],
)
def test_bad_input_is_told_before_anything_runs(name, binding, message, recipe, tmp_path):
    with pytest.raises(UserError, match=message):
        study(recipe, name, *([binding] if binding else []), workdir=str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def test_the_section_enters_no_run(recipe):
    one, other = (load_config([recipe], [f"study.alphas = ({n},)"], None) for n in (0.1, 0.2))
    assert one.study != other.study
    assert config_json(one) == config_json(other)


def test_pairs_of_the_scaling_study_match_in_parameters_and_flops():
    path = str(REPOSITORY / "gin_configs/studies/enwiki_small_cpu.gin")
    found = study(path, "scaling")
    pairs: dict[int, list] = {}
    for variant in found.variants.values():
        cost = sizes.cost(found.configs[variant.name], variant.kind == "memory")
        pairs.setdefault(variant.pair, []).append(cost)
    assert len(pairs) >= 4
    for memory, alone in pairs.values():
        assert alone.parameters == pytest.approx(memory.parameters, rel=0.011)
        assert alone.train_flops == pytest.approx(memory.train_flops, rel=0.01)
        # Blocks are whole, so the share of one half is met as far as one block allows.
        assert memory.memory / memory.parameters == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_memory_parameters_are_those_of_the_memory(style, rng):
    dim, input_dim = (16 * int(n) for n in rng.integers(1, 4, 2))
    for width in (dim, input_dim):
        config = MemoryConfig(style, int(rng.integers(1, 4)), width, 0, 0.0, 1e-5, input_dim, 37)
        state = nnx.state(nnx.eval_shape(lambda config=config: Memory(config, nnx.Rngs(0))))
        wanted = sum(leaf.size for leaf in jax.tree.leaves(state))
        assert sizes.memory_parameters(config) == wanted


def test_a_peer_has_the_parameters_asked_for_and_the_bases_heads(rng):
    heads = int(rng.integers(4, 8))  # widths of fewer heads lie too far apart to grow evenly
    base = DecoderConfig(layers=int(rng.integers(2, 6)), dim=32 * heads, heads=heads, vocab_size=2048)
    for factor in rng.uniform(1.5, 4, 3):
        wanted = int(parameter_count(base) * factor)
        found = sizes.peer(base, wanted)
        assert parameter_count(found) == pytest.approx(wanted, rel=0.01)
        assert found.head_dim == base.head_dim
        # It grows both ways: no wider or deeper than by the whole factor.
        assert 0.5 < found.dim / base.dim < factor
        assert found.layers <= np.ceil(base.layers * factor)


def test_a_size_keeps_queries_per_key():
    base = DecoderConfig(layers=2, dim=128, heads=8, kv_heads=2)
    assert sizes.sized(base, 3, 64).num_kv_heads == 1
    with pytest.raises(UserError, match="dim 48 has no whole number of heads of 16, 4 queries a key"):
        sizes.sized(base, 3, 48)


def test_scaling_rates_fall_with_width(recipe):
    config = load_config([recipe], ["study.rate_exponent = 1.0"], None)
    rates = {}
    for variant in variants_of("scaling", config):
        text = " ".join(variant.bindings)
        dim = int(re.search(r"decoder.dim = (\d+)", text).group(1))
        rates[dim] = float(re.search(r"pretrain.learning_rate = ([\d.e-]+)", text).group(1))
    for dim, rate in rates.items():
        assert rate == pytest.approx(config.pretrain.learning_rate * config.decoder.dim / dim, rel=1e-3)
    frozen = dataclasses.replace(config, study=dataclasses.replace(config.study, rate_exponent=0.0))
    for variant in variants_of("scaling", frozen):
        assert f"pretrain.learning_rate = {config.pretrain.learning_rate}" in variant.bindings
