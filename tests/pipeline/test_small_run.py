import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import mlp_memory as mlp_memory_package
from mlp_memory.arrays import ArrayReader
from mlp_memory.artifacts import Directory, UserError, peek
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.decoder.pretrain import load_decoder
from mlp_memory.inference.scoring import Scorer
from mlp_memory.interchange.source import load, open_source
from mlp_memory.memory.distill import load_memory
from mlp_memory.targets.interpolation import mixture_rows

GATED = {"base_plus_memory_gated", "joint_gated"}
SYSTEMS = {
    "base",
    "knn_lm_exact",
    "knn_lm_scann",
    "base_plus_memory",
    "joint",
    "decoder_equal_params",
    *GATED,
}


@pytest.fixture(scope="module")
def results(small_run):
    return json.loads((small_run / "reports/results.json").read_text())


@pytest.mark.parametrize("split", ["validation", "test", "other"])
def test_results_hold_every_system_with_its_choices_and_interval(results, split):
    assert set(results[split]["perplexity"]) == SYSTEMS
    for name, details in results[split]["details"].items():
        value = results[split]["perplexity"][name]
        assert 1 < value < 1000
        np.testing.assert_allclose(details["per_token"], value)
        assert details["interval"][0] <= value <= details["interval"][1]
        assert details["per_word"] > value
        assert 0 <= details["mean_lambda"] < 1
        assert details["lambda"] == (None if name in GATED else details["mean_lambda"])
        assert (details["tau"] is None) == (details["k"] is None) == (not name.startswith("knn"))
    scored = {details["scored_tokens"] for details in results[split]["details"].values()}
    assert len(scored) == 1
    assert {d["lambda"] for d in results["test"]["details"].values()} == {
        d["lambda"] for d in results["validation"]["details"].values()
    }


def test_the_best_mixture_is_no_worse_than_its_decoder_on_validation(results):
    perplexity = results["validation"]["perplexity"]
    for name in ("knn_lm_exact", "knn_lm_scann", "base_plus_memory"):
        assert perplexity[name] <= perplexity["base"] * (1 + 1e-6)


def test_a_gate_is_fitted_for_both_decoders_and_is_each_tokens_own_where_that_pays(results, small_run):
    assert set(results["gates"]) == {"gate", "joint_gate"}
    rows = Directory(small_run / "reports/rows/test")
    for name, stage in (("base", "gate"), ("joint", "joint_gate")):
        facts, weights = results["gates"][stage], ArrayReader(rows, f"{name}_gate")
        weight_N = weights[0 : len(weights)]
        assert set(facts["texts"]) == {"validation", "other"}
        assert (weight_N <= facts["share"]).all()
        assert (weight_N >= 0).all()
        if facts["signals"]:
            assert facts["gained"][1] < 0
            assert facts["share"] == 0 or len(np.unique(weight_N)) > 100
        else:  # no gain by cross-fitting: the fixed λ, and 0 where nothing is scored
            fixed = facts["share"] * facts["texts"]["validation"]["fixed_lambda"]
            np.testing.assert_allclose(np.unique(weight_N)[-1], fixed, atol=2e-4)
            assert len(np.unique(weight_N)) <= 2
    assert set(results["test"]["differences"]) >= {"joint - base_plus_memory", "joint_gated - base"}


def test_the_gate_says_in_decoding_what_it_said_in_evaluation(small_run):
    gated = mlp_memory_package.load(str(small_run), interpolation="gate")
    stream = TokenStream.open(Directory(small_run / "corpus/test"))
    stop = min(20, int(stream.bounds_D1[1]) - 1)
    tokens, rows = stream.tokens[0 : stop + 1].tolist(), Directory(small_run / "reports/rows/test")
    names = ("base", "base_memory", "base_gate")
    base, memory, weight = (ArrayReader(rows, name)[0:stop] for name in names)
    found = Scorer(gated.mixture, 32)([tokens])[0].log_prob_T
    np.testing.assert_allclose(found, -mixture_rows(base, memory, weight), rtol=1e-4, atol=1e-4)


def test_the_equal_decoder_has_the_parameters_and_flops_of_decoder_and_memory(results):
    parameters, flops = results["parameters"], results["training_flops"]
    together = parameters["base"] + parameters["memory"]
    assert abs(parameters["decoder_equal_params"] / together - 1) < 0.02
    assert abs(flops["decoder_equal_params"] / (flops["base"] + flops["memory"]) - 1) < 0.05


def test_the_report_needs_no_other_file(small_run):
    text = (small_run / "reports/index.html").read_text()
    assert "<html" in text
    assert len(text) > 5000
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)[^"']+\.(?:js|css|png|svg)""", text)
    assert not re.search(r"<(?:script|link|img)[^>]+https?://", text)


def test_a_second_run_does_nothing_and_shows_the_table(small_run, recipe, mlp_memory):
    before = {p: p.stat().st_mtime_ns for p in small_run.rglob("*") if p.is_file()}
    answer = mlp_memory("run", f"--workdir={small_run}", f"--gin_file={recipe}")
    assert answer.code == 0, answer.error
    assert answer.seconds < 10
    for name in ("base + memory", "joint", "reports/index.html"):
        assert name in answer.out
    assert {p: p.stat().st_mtime_ns for p in small_run.rglob("*") if p.is_file()} == before


def test_status_shows_every_stage_done_and_an_unfinished_one(workdir, mlp_memory):
    answer = mlp_memory("status", f"--workdir={workdir}")
    lines = answer.out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == (
        [
            "tokenize",
            "pretrain",
            "embed",
            "index",
            "retrieve",
            "distill",
            "gate",
            "joint",
            "joint_gate",
            "baseline",
            "evaluate",
            "export",
        ]
    )
    assert all(line.endswith("done") for line in lines)
    (workdir / "joint/manifest.json").unlink()
    answer = mlp_memory("status", f"--workdir={workdir}")
    states = {line.split()[0]: line for line in answer.out.splitlines()[2:]}
    assert states["joint"].endswith("missing")
    assert states["distill"].endswith("done")
    assert not states["evaluate"].endswith("done")
    assert answer.code == 0


def test_text_goes_on_from_the_prompt_and_repeats(small_run, mlp_memory):
    def generate(model, *bindings):
        words = [f"--gin={b}" for b in ("generate.max_tokens=6", *bindings)]
        answer = mlp_memory(
            "generate", f"--workdir={small_run}", "--prompt=abc def", f"--model={model}", *words
        )
        assert answer.code == 0, answer.error
        return answer.out

    both = generate("both")
    assert both.startswith("[base] abc def")
    for name in ("base", "base_plus_memory"):
        said = mlp_memory_package.load(str(small_run), name).generate("abc def", max_tokens=6)
        assert said
        assert f"[{name}] abc def{said}".split() == re.search(rf"\[{name}\][^\[]*", both).group().split()
    drawn = [generate("joint", "generate.temperature=1.0", f"generate.seed={seed}") for seed in (3, 3)]
    assert drawn[0] == drawn[1]
    assert drawn[0].startswith("[joint] abc def")


@pytest.fixture(scope="module")
def model(small_run):
    return mlp_memory_package.load(str(small_run))


def test_a_batch_says_what_each_prompt_says_alone_and_a_stream_says_it_piece_by_piece(model):
    prompts = ["abc def", "", "a longer beginning of a text"]
    texts = model.generate(prompts, max_tokens=9)
    assert texts == [model.generate(prompt, max_tokens=9) for prompt in prompts]
    assert "".join(model.stream(prompts[2], max_tokens=9)) == texts[2]
    ended = model.generate(prompts, max_tokens=9, stop=texts[0][2:4])
    assert ended[0] == texts[0][: texts[0].index(texts[0][2:4])]
    assert model.generate([]) == []


@pytest.mark.parametrize("name", ["knn_lm_exact", "knn_lm_scann"])
def test_the_datastore_continues_texts_too_and_does_only_that(small_run, name):
    model = mlp_memory_package.load(str(small_run), name)
    prompts = ["abc def", "a longer beginning of a text"]
    texts = model.generate(prompts, max_tokens=6)
    assert texts == [model.generate(prompt, max_tokens=6) for prompt in prompts]
    assert all(texts)
    for wrong in ({"beams": 2}, None):
        with pytest.raises(UserError, match="kNN-LM continues texts only"):
            model.generate("abc", **wrong) if wrong else model.score(["abc"])


def test_seeds_repeat_and_differ(model):
    drawn = [model.generate("abc", temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_exported_model_continues_texts_without_this_package(small_run, mlp_memory, model, tmp_path):
    words = (f"--workdir={small_run}", f"--output={tmp_path / 'served'}", "--gin=generate.max_tokens=6")
    answer = mlp_memory("export_serving", *words)
    assert answer.code == 0, answer.error
    done = subprocess.run(
        [sys.executable, "-I", tmp_path / "served/serve.py", "--text=abc def"], capture_output=True, text=True
    )
    assert done.stdout == model.generate("abc def", max_tokens=6) + "\n", done.stderr


def test_the_likelihoods_of_a_texts_parts_add_up(model):
    whole, beginning = model.score(["abc def ghi", "abc def"])
    rest = model.log_likelihoods([("abc def", " ghi")])[0]
    assert whole.tokens == beginning.tokens + rest.tokens
    assert whole.log_prob == pytest.approx(beginning.log_prob + rest.log_prob, rel=1e-4)


@pytest.mark.parametrize("wrong", [{"model": "other"}, {"interpolation": 1.5}])
def test_what_cannot_be_loaded_is_told(small_run, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        mlp_memory_package.load(str(small_run), **wrong)


def test_a_setting_that_there_is_not_is_told_with_those_there_are(model):
    with pytest.raises(UserError, match="max_tokens, temperature"):
        model.generate("abc", heat=2)


@pytest.mark.parametrize("name", ["decoder", "memory", "joint"])
def test_exported_models_compute_what_the_trained_ones_do(small_run, mesh, rng, name):
    source = open_source(str(small_run / "export" / name))
    found = load(source, mesh)
    if name == "memory":
        trained, manifest = load_memory(Directory(small_run / "memory"), mesh)
        x = rng.normal(size=(5, 32)).astype(np.float32)
        run = jax.jit(lambda x, model: model(x) @ model.head_kernel(), static_argnums=1)
    else:
        stage = {"decoder": "pretrain"}.get(name, name)
        trained, manifest = load_decoder(Directory(small_run / name), stage, mesh)
        x = rng.integers(0, 300, (2, 9))
        run = jax.jit(lambda x, model: model.logits(model(x)[0]), static_argnums=1)
    assert source.facts["fingerprint"] == manifest.fingerprint
    np.testing.assert_array_equal(run(x, found), run(x, trained))
    assert (small_run / "export" / name / "tokenizer.model").read_bytes() == (
        small_run / "corpus/vocabulary/tokenizer.model"
    ).read_bytes()


def test_every_row_of_the_stream_has_its_key_and_target(small_run):
    tokens = peek(Directory(small_run / "corpus/train")).arrays["tokens"].shape[0]
    assert peek(Directory(small_run / "datastore")).arrays["keys"].shape == (tokens, 32)
    assert peek(Directory(small_run / "targets")).arrays["probs"].shape == (tokens, 8)


def test_the_resolved_config_is_kept_and_serves_alone(small_run, recipe, mlp_memory):
    with_file, alone = (
        mlp_memory("run", f"--workdir={small_run}", *words, "--dry_run")
        for words in ([f"--gin_file={recipe}"], [])
    )
    assert with_file.code == alone.code == 0
    assert with_file.out == alone.out
    assert "pretrain.steps = 20" in alone.out
    assert re.search(r"decoder\.blocks\.attention\.query\.kernel +\(1, 32, 32\)", alone.out)


def test_no_artifact_holds_a_machine_path_or_a_time(small_run, recipe):
    for path in small_run.rglob("*.json"):
        if "model/" not in str(path):
            text = path.read_text()
            assert str(small_run) not in text, path
            assert not re.search(r"20\d\d-\d\d-\d\d", text), path
