"""The adapter to lm-eval against lm-eval's own backend and metrics, and a whole benchmark (make parity)."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import lm_eval.tasks.truthfulqa.utils as truthfulqa
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from flax import nnx
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from mlp_memory import pipeline
from mlp_memory.artifacts import Directory, UserError
from mlp_memory.evaluation.harness import adapter
from mlp_memory.evaluation.harness.examples import Example, load
from mlp_memory.evaluation.harness.metrics import choice_metrics
from mlp_memory.evaluation.harness.models import Models, SystemAt
from mlp_memory.evaluation.harness.tasks import TASKS
from mlp_memory.evaluation.sections import Findings
from mlp_memory.interchange.export import export_model
from mlp_memory.job import Job
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory
from mlp_memory.recipes import load_config

WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "tu", "re") for b in ("n", "sa", "po", "ti", "", "ve")]
DIM = 48


def sentence(rng, least=3, most=9):
    return " ".join(rng.choice(WORDS, int(rng.integers(least, most)))).capitalize() + "."


@pytest.fixture(scope="module")
def rng():
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"rng seed {seed}")
    return np.random.default_rng(seed)


def random_memory(vocab_size: int, rng) -> Memory:
    """A memory with no weight at what it begins with."""
    model = Memory(MemoryConfig("llama", 2, 16, 24, 0.0, 1e-6, DIM, vocab_size), nnx.Rngs(0))
    state = nnx.to_flat_state(nnx.state(model))
    for _, variable in state:
        value = variable.get_value()
        variable.set_value(value + jnp.asarray(0.3 * rng.normal(size=value.shape), value.dtype))
    nnx.update(model, nnx.from_flat_state(state))
    return model


@pytest.fixture(scope="module")
def folder(rng, tmp_path_factory) -> Path:
    """A decoder of random weights and its tokenizer as transformers saves them, a memory, benchmark files."""
    folder = tmp_path_factory.mktemp("harness")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    bpe.train_from_iterator([sentence(rng) for _ in range(200)], trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "decoder")
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=DIM,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(int(rng.integers(1 << 31)))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(
                1 + 0.2 * torch.randn_like(value) if value.ndim == 1 else 0.15 * torch.randn_like(value)
            )
    model.save_pretrained(folder / "decoder")
    export_model(Directory(folder / "memory"), random_memory(len(fast), rng), {}, {}, {})
    write_benchmarks(folder / "data", rng)
    return folder


def write_benchmarks(data: Path, rng) -> None:
    for name, rows in (("train", 30), ("dev", 12)):
        lines = [
            {
                "premise": sentence(rng),
                "hypothesis": f"{number} {sentence(rng)}",
                "label": str(rng.choice(["entailment", "contradiction", "neutral"])),
            }
            for number in range(rows)
        ]
        lines.append({**lines[0], "label": "perhaps"})
        write(data / f"cb/{name}.jsonl", lines)
    pairs = [
        {
            "knowledge": sentence(rng),
            "question": f"{number} {sentence(rng)}",
            "right_answer": sentence(rng, 1, 4),
            "hallucinated_answer": f"not {sentence(rng, 1, 4)}",
        }
        for number in range(40)
    ]
    write(data / "halueval/qa_data.json", [*pairs, {**pairs[0], "right_answer": " "}])
    questions = [{"question": f"{n} {sentence(rng)}", "answer": [str(rng.choice(WORDS))]} for n in range(40)]
    write(data / "qa/NQ-open.dev.jsonl", questions)
    toys = [
        {
            "text": f"{number} {sentence(rng)}",
            "choices": [sentence(rng, 1, 3) for _ in range(3)],
            "gold": int(rng.integers(3)),
        }
        for number in range(40)
    ]
    write(data / "toy.jsonl", toys)
    source = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}/toy.jsonl\ntest_split: test\n"
    )
    means = "".join(
        f"  - metric: {name}\n    aggregation: mean\n" for name in ("acc", "acc_norm", "acc_bytes")
    )
    (data / "toy_choice.yaml").write_text(
        f"task: toy_choice\n{source}output_type: multiple_choice\ndoc_to_text: '{{{{text}}}}'\n"
        f"doc_to_choice: choices\ndoc_to_target: gold\nmetric_list:\n{means}"
    )
    (data / "toy_rolling.yaml").write_text(
        f"task: toy_rolling\n{source}output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{text}}'\nmetric_list:\n  - metric: byte_perplexity\n"
    )


def write(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_job(folder: Path, workdir: Path, *bindings: str) -> Job:
    sources = [
        f"pretrained.{name} = '{folder / kind}'"
        for name, kind in (("source", "decoder"), ("memory", "memory"))
    ]
    data = f"benchmark.data = '{folder / 'data'}'"
    return Job(Directory(workdir), load_config([], [*sources, data, *bindings], None))


@pytest.fixture(scope="module")
def imported(folder, tmp_path_factory) -> Path:
    """A workdir of the decoder and the memory."""
    workdir = tmp_path_factory.mktemp("imported")
    job = make_job(folder, workdir)
    for stage in ("import", "import_memory"):
        found = pipeline.find_stage(stage)
        found.work(job, job.workdir / found.folder)
    return workdir


@pytest.fixture(scope="module")
def models(folder, imported) -> Models:
    return Models(make_job(folder, imported), ("base", "base_plus_memory"), 256, 512, 4)


@pytest.fixture(scope="module")
def theirs(folder) -> HFLM:
    """lm-eval's own backend over the same files."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "decoder", attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "decoder")
    return HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=True, batch_size=4, device="cpu")


def local(name: str, folder: Path, models: Models) -> adapter.LocalTask:
    parts = load(TASKS[name], folder / "data", 0.3, {"validation": 0, "test": 0})
    examples = [*parts.validation, *parts.test]
    return adapter.LocalTask(TASKS[name], examples, TASKS[name].scoring, models.count_tokens)


@pytest.mark.parametrize("name", ["cb", "halueval_qa"])
def test_log_likelihoods_are_those_of_lm_evals_own_backend(name, folder, models, theirs):
    requests = local(name, folder, models).build().instances
    wanted = theirs.loglikelihood(requests, disable_tqdm=True)
    found = adapter.HarnessModel(SystemAt(models, "base")).loglikelihood(requests)
    difference = np.abs([a - b for (a, _), (b, _) in zip(found, wanted)])
    print(
        f"{name}: {len(found)} requests, largest difference {difference.max():.2e} nats of "
        f"{-min(a for a, _ in wanted):.1f}"
    )
    assert difference.max() < 1e-4
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_contexts_that_are_empty_or_end_in_space_are_read_as_lm_eval_reads_them(folder, models, theirs, rng):
    pairs = [("", " kan losa"), ("", "kan"), ("kan ", "losa"), ("kan\n\n", "losa mi"), ("kanlo", "sa")]
    requests = [adapter.Instance("loglikelihood", {}, pair, 0, ("any", n, 1)) for n, pair in enumerate(pairs)]
    wanted = theirs.loglikelihood(requests, disable_tqdm=True)
    found = adapter.HarnessModel(SystemAt(models, "base")).loglikelihood(requests)
    np.testing.assert_allclose([a for a, _ in found], [b for b, _ in wanted], atol=1e-4)


def test_a_local_task_runs_in_lm_evals_evaluator_under_either_backend(folder, models, theirs):
    tasks = {"tasks": {"cb": local("cb", folder, models)}, "groups": {}, "group_map": {}}
    figures = []
    for model in (theirs, adapter.HarnessModel(SystemAt(models, "base"))):
        found = evaluate(model, tasks, bootstrap_iters=0)
        figures.append({key: value for key, value in found["results"]["cb"].items() if key.startswith("acc")})
    assert figures[0] == figures[1]
    assert "acc,none" in figures[0]


def test_accuracies_and_mc2_are_lm_evals(folder, rng):
    task = adapter.lm_eval.tasks.TaskManager(include_path=str(folder / "data"), include_defaults=False).load(
        ["toy_choice"]
    )
    task = task["tasks"]["toy_choice"]
    for doc in task.test_docs():
        log_prob = rng.normal(size=3) * 10 - 30
        wanted = task.process_results(doc, [(value, False) for value in log_prob])
        example = Example("", "", tuple(f" {choice}" for choice in doc["choices"]), (doc["gold"],))
        for ours, name in (("likelihood", "acc"), ("likelihood_per_byte", "acc_bytes")):
            assert choice_metrics(example, log_prob, None, [1, 1, 1], ours)["acc"] == wanted[name]
        mc = Example("", "", (" a", " b", " c"), (0, 1), mc1=(0, 2), mc2=(0, 1, 2))
        mc2 = truthfulqa.process_results_mc2(
            {"mc2_targets": {"labels": [1, 1, 0]}}, [(value, False) for value in log_prob]
        )
        assert choice_metrics(mc, log_prob, None, [1, 1, 1], "likelihood")["mc2"] == pytest.approx(mc2["acc"])


SETTINGS = (
    "benchmark.tasks = ['cb', 'halueval_qa', 'nq_open']",
    "benchmark.lm_eval_tasks = ['toy_choice', 'toy_rolling']",
    "benchmark.lambdas = (0.25, 0.5, 0.75)",
    "benchmark.generation_lambdas = (0.5,)",
    "benchmark.context = 64",
    "benchmark.max_tokens = 4",
    "benchmark.shots = 1",
    "benchmark.bootstrap = 50",
    "benchmark.chunk = 8",
    "benchmark.batch = 4",
    "benchmark.batch_tokens = 512",
)


def run_benchmark(folder: Path, imported: Path, workdir: Path) -> Job:
    workdir.mkdir(exist_ok=True)
    for name in ("decoder", "memory"):
        if not (workdir / name).exists():
            (workdir / name).symlink_to(imported / name)
    include = f"benchmark.lm_eval_include = '{folder / 'data'}'"
    job = make_job(folder, workdir, *SETTINGS, include)
    pipeline.find_stage("benchmark").work(job, job.workdir / "benchmarks")
    return job


class Calls:
    """Counts what is scored and generated, and stops it after so many times."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.made, self.left = 0, 1 << 30
        for name in ("score", "generate"):
            patch.setattr(Models, name, self._counted(getattr(Models, name)))

    def _counted(self, whole):
        def call(*args):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            self.made += 1
            return whole(*args)

        return call


@pytest.fixture(scope="module")
def finished_and_calls(folder, imported, tmp_path_factory) -> tuple[Job, int]:
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch)
        job = run_benchmark(folder, imported, tmp_path_factory.mktemp("finished"))
        return job, calls.made


@pytest.fixture
def finished(finished_and_calls) -> Job:
    return finished_and_calls[0]


def read(job: Job, name: str) -> bytes:
    return job.workdir.read(f"benchmarks/{name}")


def test_a_benchmark_writes_every_tasks_figures_examples_and_findings(finished):
    results = json.loads(read(finished, "results.json"))
    assert list(results["tasks"]) == sorted(["cb", "halueval_qa", "nq_open", "toy_choice", "toy_rolling"])
    cb, qa = results["tasks"]["cb"], results["tasks"]["halueval_qa"]
    assert (cb["validation"], cb["test"]) == (30, 12)
    assert cb["rows"]["dev.jsonl"]["unusable"] == {"label outside the set: 'perhaps'": 1}
    assert cb["rows"]["dev.jsonl"]["first"] == {"label outside the set: 'perhaps'": ["dev.jsonl, line 13"]}
    assert qa["rows"]["qa_data.json"]["unusable"] == {"empty answer": 1}
    assert qa["validation"] + qa["test"] == 40
    memory = cb["systems"]["base_plus_memory"]["acc"]
    assert memory["curve"]["lambdas"] == [0.0, 0.25, 0.5, 0.75]
    assert memory["curve"]["validation"][0] == cb["systems"]["base"]["acc"]["validation"]
    assert memory["lambda"] == memory["curve"]["lambdas"][int(np.argmax(memory["curve"]["validation"]))]
    gain = memory["gain"]
    assert gain["wins"] + gain["losses"] + gain["ties"] == 12
    assert gain["difference"] == pytest.approx(memory["value"] - cb["systems"]["base"]["acc"]["value"])
    assert set(results["one_lambda"]["base_plus_memory"]) == {"scored", "generated"}
    rolling = results["tasks"]["toy_rolling"]["systems"]["base_plus_memory"]["byte_perplexity"]
    assert rolling["lambda"] == rolling["curve"]["lambdas"][int(np.argmin(rolling["curve"]["validation"]))]
    assert rolling["interval"] is None
    for name, task in results["tasks"].items():
        lines = read(finished, f"examples/{name}.jsonl").decode().splitlines()
        assert len(lines) == task["test"]
        assert set(json.loads(lines[0])) == {"where", "base", "base_plus_memory"}
    shown = Findings.from_json(json.loads(read(finished, "findings.json")))
    assert len(shown.sections[0].plots) == 5
    assert {claim.held for claim in shown.claims} <= {"yes", "no", "unclear"}


def test_figures_are_lm_evals_at_the_same_lambda(finished, folder, imported, models):
    results = json.loads(read(finished, "results.json"))
    toy = results["tasks"]["toy_choice"]
    manager = adapter.lm_eval.tasks.TaskManager(include_path=str(folder / "data"), include_defaults=False)
    for system, weight in (("base", 0.0), ("base_plus_memory", 0.75)):
        model = adapter.HarnessModel(SystemAt(models, system, weight))
        found = evaluate(model, manager.load(["toy_choice"]), bootstrap_iters=0)["results"]["toy_choice"]
        for metric in ("acc", "acc_norm", "acc_bytes"):
            figures = toy["systems"]["base_plus_memory"][metric]["curve"]
            at = figures["lambdas"].index(weight)
            both = figures["validation"][at] * toy["validation"] + figures["test"][at] * toy["test"]
            assert both / 40 == pytest.approx(found[f"{metric},none"])


def test_a_killed_benchmark_goes_on_and_ends_in_the_same_bytes(
    finished_and_calls, folder, imported, tmp_path, monkeypatch, rng
):
    (finished, wanted), calls = finished_and_calls, Calls(monkeypatch)
    calls.left = int(rng.integers(1, wanted))
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(folder, imported, tmp_path)
    assert read(Job(Directory(tmp_path), finished.config), "results.json") is None
    calls.left = 1 << 30
    job = run_benchmark(folder, imported, tmp_path)
    assert calls.made == wanted  # nothing twice
    for name in ("results.json", "findings.json", "examples/cb.jsonl", "examples/nq_open.jsonl"):
        assert read(job, name) == read(finished, name), name


def test_what_is_asked_of_lm_eval_and_is_not_there_is_one_line(folder, imported, tmp_path):
    limits = {"validation": 0, "test": 0}
    with pytest.raises(UserError, match=r"no task 'toy_choise' .did you mean 'toy_choice'"):
        adapter.library_tasks(["toy_choise"], str(folder / "data"), 0.3, limits)
    with pytest.raises(UserError, match=r"arc_easy: its data cannot be loaded .*nothing is fetched"):
        adapter.library_tasks(["arc_easy"], str(folder / "data"), 0.3, limits)
    sampled = {"until": ["\n"], "do_sample": True, "temperature": 0.7}
    with pytest.raises(UserError, match="do_sample"):
        adapter.generation(sampled, 8)
