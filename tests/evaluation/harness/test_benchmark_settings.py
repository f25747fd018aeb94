import importlib.util
import json
import sys

import pytest

from mlp_memory import pipeline
from mlp_memory.artifacts import Directory, UserError
from mlp_memory.evaluation.harness.config import BenchmarkConfig
from mlp_memory.evaluation.harness.findings import benchmark_table, findings
from mlp_memory.evaluation.harness.ready import check
from mlp_memory.evaluation.sections import Findings
from mlp_memory.job import Job
from mlp_memory.recipes import load_config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tasks": ["sst-2"]}, "no task 'sst-2' (did you mean 'sst2'?)"),
        ({"tasks": ["zzz"]}, "no task 'zzz' (there are: sst2"),
        ({"tasks": ["cb", "cb"]}, "names 'cb' twice"),
        ({"systems": ["base", "base_plus_memry"]}, "did you mean 'base_plus_memory'?"),
        ({"systems": ["base_plus_memory"]}, "begin with 'base'"),
        ({"lambdas": [0.1, 1.0]}, "benchmark.lambdas = [0.1, 1.0]: give numbers in [0, 1)"),
        ({"generation_lambdas": 0.1}, "benchmark.generation_lambdas = 0.1"),
        ({"scoring": "luck"}, "benchmark.scoring = 'luck'"),
        ({"validation_fraction": 0.0}, "give more"),
        ({"validation_fraction": 1.0}, "below 1"),
        ({"limit": -1}, "benchmark.limit = -1"),
        ({"tasks": 3}, "benchmark.tasks = 3"),
    ],
)
def test_an_impossible_setting_is_one_line(settings, words):
    with pytest.raises(UserError) as refused:
        BenchmarkConfig(**settings)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_decoder_alone_is_always_among_the_lambdas():
    assert BenchmarkConfig(lambdas=[0.5, 0.2]).lambdas == (0.0, 0.2, 0.5)


@pytest.fixture
def without_lm_eval(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else found(name, *a)
    )
    monkeypatch.delitem(sys.modules, "mlp_memory.evaluation.harness.adapter", raising=False)


def test_without_lm_eval_one_line_says_how_to_install_it(without_lm_eval):
    with pytest.raises(UserError, match="make harness"):
        check(BenchmarkConfig(tasks=["cb"]))
    with pytest.raises(UserError, match="make harness"):
        importlib.import_module("mlp_memory.evaluation.harness.adapter")
    check(BenchmarkConfig())  # nothing is asked for


def test_data_that_is_not_there_is_told_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr("mlp_memory.evaluation.harness.ready.require_lm_eval", lambda: None)
    with pytest.raises(UserError, match=r"benchmark\.data = '' is no folder"):
        check(BenchmarkConfig(tasks=["cb"]))
    with pytest.raises(UserError, match=r"has no cb/dev\.jsonl, which cb needs"):
        check(BenchmarkConfig(tasks=["cb"], data=str(tmp_path)))


def test_no_tasks_are_one_line_and_leave_nothing_behind(tmp_path):
    job = Job(Directory(tmp_path), load_config([], [], None))
    stage = pipeline.find_stage("benchmark")
    assert not stage.wanted(job.config)
    with pytest.raises(UserError, match=r"benchmark\.tasks is empty"):
        stage.work(job, job.workdir / "benchmarks")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("systems", "parents"),
    [
        (("base",), ("decoder",)),
        (("base", "base_plus_memory"), ("decoder", "memory")),
        (("base", "joint_gated"), ("decoder", "memory", "joint", "joint_gate")),
        (("base", "knn_lm_scann"), ("decoder", "datastore", "index", "targets")),
    ],
)
def test_a_benchmark_is_made_from_what_its_systems_read_and_nothing_else(systems, parents):
    config = load_config([], [f"benchmark.systems = {systems!r}"], None)
    assert pipeline.find_stage("benchmark").parents(config) == parents


def test_the_section_enters_no_other_stages_manifest(tmp_path):
    before, after = (
        Job(Directory(tmp_path), load_config([], bindings, None))
        for bindings in ([], ["benchmark.tasks = ['cb']", "benchmark.limit = 3"])
    )
    for name in ("tokenize", "embed", "index", "retrieve", "gate", "joint_gate", "evaluate", "export"):
        stage = pipeline.find_stage(name)
        assert stage.settings(before) == stage.settings(after), name


def figures(value, weight, gained):
    found = {"lambda": weight, "value": value, "interval": None, "validation": value}
    if gained is not None:
        found["gain"] = {"difference": gained, "interval": [gained - 0.01, gained + 0.01]}
        found["gain"] |= {"wins": 3, "losses": 1, "ties": 6, "p": 0.625}
        found["curve"] = {"lambdas": [0.0, 0.5], "validation": [0.4, value], "test": [0.4, value]}
    return found


@pytest.fixture
def results():
    def task(title, base, memory, **more):
        of = {"base": {"acc": figures(base, 0.0, None)}}
        of["base_plus_memory"] = {"acc": figures(memory, 0.5, memory - base)}
        found = {"title": title, "systems": of, "metrics": ["acc"], "main_metric": "acc", "shares": ["acc"]}
        return found | {"validation": 7, "test": 10, "longer_than_the_context": 2} | more

    rows = {"f.json": {"unusable": {"empty answer": 4}}}
    return {
        "systems": {"base": "base", "base_plus_memory": "base + memory"},
        "context": 64,
        "parameters": {"decoder": 1e6, "memory": 2e6},
        "tasks": {
            "halueval_qa": task("HaluEval qa", 0.5, 0.6, rows=rows),
            "strategyqa": task("StrategyQA", 0.5, 0.45, majority=0.55),
        },
        "one_lambda": {},
    }


def test_the_table_names_every_system_its_lambda_gain_and_what_was_not_used(results):
    text = benchmark_table(results)
    assert "+10.0 (+9.0 … +11.0)" in text
    assert "3 : 1, p 0.62" in text
    assert "4 rows of f.json: empty answer" in text
    assert "2 examples longer than a window" in text
    assert "the commonest label alone has 55.0" in text


def test_findings_hold_the_papers_claims_only_where_the_interval_does(results):
    found = findings(results)
    assert [claim.held for claim in found.claims] == ["yes", "no"]
    assert found.claims[0].ours == "50.0 → 60.0"
    assert found.claims[0].paper == "53.99 → 64.07"
    again = Findings.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert [plot.title for plot in again.sections[0].plots] == ["HaluEval qa over λ", "StrategyQA over λ"]
