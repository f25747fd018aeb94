"""The benchmark stage: tasks one after another, results.json, records of every example, findings.json."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlp_memory import artifacts
from mlp_memory.artifacts import Directory, Manifest, UserError
from mlp_memory.evaluation.harness import examples
from mlp_memory.evaluation.harness.config import BenchmarkConfig
from mlp_memory.evaluation.harness.findings import findings
from mlp_memory.evaluation.harness.gains import mean_gain
from mlp_memory.evaluation.harness.kept import Kept
from mlp_memory.evaluation.harness.models import Models
from mlp_memory.evaluation.harness.names import LABELS, SYSTEM
from mlp_memory.evaluation.harness.outcome import PARTS, Outcome, Weight, pair_of, pooled_choice
from mlp_memory.evaluation.harness.ready import check
from mlp_memory.evaluation.harness.tasks import TASKS
from mlp_memory.inference.continuations import MEMORY, Scored

if TYPE_CHECKING:
    from mlp_memory.evaluation.harness.adapter import Asked
    from mlp_memory.job import Job

RESULTS = "results.json"
SCHEMA = 1


def benchmark(directory: Directory, begin: Callable[[], Manifest], job: "Job") -> dict[str, Any]:
    """Writes WORKDIR/benchmarks and returns what results.json holds.

    Args:
      directory: that folder.
      begin: starts the artifact; called once every task's data has been read.
      job: the workdir.

    Raises:
      UserError: lm-eval, a task's data or one of its parts is missing.
    """
    config = job.config.benchmark
    if not config.wanted:
        raise UserError(
            "benchmark.tasks is empty: name tasks, or give gin_configs/benchmarks/shared_data.gin"
        )
    check(config)
    models = Models(job, config.systems, config.context, config.batch_tokens, config.batch)
    gathered = _gather(config, models)
    manifest, outcomes = begin(), []
    for asked, about in gathered:
        outcome = _outcome(asked, config, models, directory)
        about["longer_than_the_context"] = _count_long(asked, models, config.max_tokens)
        about["systems"] = {
            system: {metric: outcome.figures(system, metric) for metric in outcome.metrics}
            for system in config.systems
        }
        if asked.generates:
            about["empty_answers"] = {system: _empty(outcome, system) for system in config.systems}
        about |= {"main_metric": outcome.main, "metrics": list(outcome.metrics)}
        about["shares"] = [metric for metric in outcome.metrics if _is_share(outcome, metric, config.systems)]
        outcomes.append(outcome)
    remembers = any(SYSTEM[name].partner == MEMORY for name in config.systems)
    used = ("decoder", "memory") if remembers else ("decoder",)
    results = {
        "schema": SCHEMA,
        "parameters": {name: job.manifest(name).facts.get("parameters") for name in used},
        "systems": {name: SYSTEM[name].label for name in config.systems},
        "context": models.context,
        "settings": artifacts.config_dict(config),
        "tasks": {asked.name: about for asked, about in gathered},
        "one_lambda": _pooled(config, outcomes, {asked.name: about for asked, about in gathered}),
        "average": _average(config, outcomes),
        "nine": _average(config, [outcome for outcome in outcomes if outcome.asked.name in LABELS]),
    }
    for outcome in outcomes:
        _write_records(directory, outcome, config)
    results = _finite(results)
    directory.write(RESULTS, artifacts.canonical_json(results).encode())
    directory.write("findings.json", artifacts.canonical_json(findings(results).to_json()).encode())
    artifacts.finish(directory, manifest)
    return results


def _gather(config: BenchmarkConfig, models: Models) -> list[tuple["Asked", dict[str, Any]]]:
    """Every task with what is known of it before anything is scored; a fault in the last is told first."""
    from mlp_memory.evaluation.harness import adapter

    limits = {"validation": config.validation_limit, "test": config.limit}
    found = []
    for name in config.tasks:
        task = TASKS[name]
        shots = config.shots if task.demonstrations else 0
        parts = examples.load(task, Path(config.data).expanduser(), config.validation_fraction, limits, shots)
        scoring = _scoring(task, config, parts.test[0])
        asked = adapter.local_task(task, parts, scoring, models.count_tokens, config.max_tokens)
        about = {
            "title": task.title,
            "measures": task.measures,
            "scoring": scoring,
            "shots": len(parts.shots),
            "split": parts.split,
            "files": parts.files,
            "rows": {file: counts.to_json() for file, counts in parts.counts.items()},
            "majority": _majority(parts.test),
        }
        found.append((asked, about | _sizes(asked)))
    library = (config.lm_eval_tasks, config.lm_eval_include, config.validation_fraction, limits)
    for asked in adapter.library_tasks(*library):
        about = {
            "title": asked.name,
            "measures": "as lm-eval's task of that name defines it",
            "scoring": "lm-eval",
        }
        split = f"by a hash of each example, {config.validation_fraction:g} of it validation"
        found.append((asked, about | {"split": split} | _sizes(asked)))
    names = [asked.name for asked, _ in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"benchmark: {twice[0]!r} is named twice, among lm-eval's tasks too")
    return found


def _scoring(task: examples.Task, config: BenchmarkConfig, example: examples.Example) -> str:
    """The task's own, unless the config says another and the task has what that needs."""
    if task.generates or config.scoring == "task" or (config.scoring == "pmi" and not example.premise):
        return task.scoring
    return config.scoring


def _sizes(asked: "Asked") -> dict[str, int]:
    return {part: asked.part_D.count(part) for part in PARTS}


def _majority(part: list[examples.Example]) -> float | None:
    """The share of the commonest label, where all examples have the same choices."""
    if not part[0].choices or len({example.choices for example in part}) > 1:
        return None
    labels = [example.right[0] for example in part]
    return max(map(labels.count, set(labels))) / len(labels)


def _count_long(asked: "Asked", models: Models, max_tokens: int) -> int:
    """Examples of which some text is longer than the context: scored through windows, or cut to its end."""
    from mlp_memory.evaluation.harness import adapter

    long = set()
    for kind, arguments, example in asked.requests:
        if example in long:
            continue
        if (pair := pair_of(kind, arguments)) is not None:
            too_long = models.is_long(*pair)
        else:
            too_long = models.is_cut(arguments[0], adapter.generation(arguments[1], max_tokens).max_tokens)
        if too_long:
            long.add(example)
    return len(long)


def _outcome(asked: "Asked", config: BenchmarkConfig, models: Models, directory: Directory) -> Outcome:
    from mlp_memory.evaluation.harness import adapter

    settings = {"context": models.context, "systems": list(config.systems)}

    def kept(size: int) -> Kept:
        return Kept(directory / f"units/{asked.name}", size, settings)

    def scores(decoder: str, pairs: list[tuple[str, str]]) -> Scored:
        what = f"{asked.name}, {decoder}"
        return kept(config.chunk).scored(decoder, what, pairs, lambda part: models.score(decoder, part))

    def generate(system: str, weight: Weight, part: str, numbers: list[int]) -> list[str]:
        found = {}
        wanted = {n: adapter.generation(asked.requests[n][1][1], config.max_tokens) for n in numbers}
        for number, one in enumerate(dict.fromkeys(wanted.values())):
            of = [n for n in numbers if wanted[n] == one]
            prompts = [asked.requests[n][1][0] for n in of]
            name = f"{system}-{weight}-{part}-{number}"
            what = f"{asked.name}, {SYSTEM[system].label}, λ {weight}, {part}"
            keeper = Kept(directory / f"units/{asked.name}", config.batch, [settings, list(one)])

            def answered(chunk: list[str], one: adapter.Generation = one) -> list[str]:
                return models.generate(system, weight, chunk, *one)

            found |= dict(zip(of, keeper.texts(name, what, prompts, answered)))
        return [found[n] for n in numbers]

    return Outcome(asked, config, adapter.main_metric, scores, generate)


def _empty(outcome: Outcome, system: str) -> int:
    """Test examples to which nothing was answered: they stay, and agree with no right answer."""
    texts = outcome.answers(system, outcome.choice(system, outcome.main), "test").values()
    return sum(isinstance(text, str) and not text.strip() for text in texts)


def _pooled(
    config: BenchmarkConfig, outcomes: list[Outcome], about: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """One λ for all tasks that score and one for all that generate; each task's figures there."""
    found: dict[str, dict[str, Any]] = {}
    for kind, generates in (("scored", False), ("generated", True)):
        of = [outcome for outcome in outcomes if outcome.asked.generates == generates]
        for system in config.systems:
            if not of or len(of[0].grid(system)) < 2:
                continue
            weight = pooled_choice(of, system)
            if weight is None:
                continue
            found.setdefault(system, {})[kind] = weight
            for outcome in of:
                at = {metric: outcome.at(system, metric, weight) for metric in outcome.metrics}
                about[outcome.asked.name].setdefault("one_lambda", {})[system] = {"lambda": weight, **at}
    return found


def _is_share(outcome: Outcome, metric: str, systems: Sequence[str]) -> bool:
    """Whether a metric is a mean over examples of numbers from 0 to 1, of which more is better."""
    if not outcome.asked.is_mean(metric) or not outcome.asked.higher(metric):
        return False
    values = [outcome.values(system, outcome.choice(system, metric), "test")[metric] for system in systems]
    return all(0 <= value <= 1 for values_E in values for value in values_E)


def _average(config: BenchmarkConfig, outcomes: list[Outcome]) -> dict[str, Any] | None:
    """The mean over tasks of their main metrics, each at its own λ, where these are shares."""
    of = [one for one in outcomes if _is_share(one, one.main, config.systems)]
    if len(of) < 2:
        return None
    base = {one: np.asarray(one.values("base", 0.0, "test")[one.main], np.float64) for one in of}
    found: dict[str, Any] = {}
    for system in config.systems:
        values = [one.values(system, one.choice(system, one.main), "test")[one.main] for one in of]
        found[system] = {"value": float(np.mean([np.mean(values_E) for values_E in values]))}
        if system != "base":
            differences = [np.asarray(values_E) - base[one] for one, values_E in zip(of, values)]
            found[system]["gain"] = mean_gain(differences, config.bootstrap, config.seed)
    return {"tasks": len(of), "names": [one.asked.name for one in of], "systems": found}


def _write_records(directory: Directory, outcome: Outcome, config: BenchmarkConfig) -> None:
    """A line for each test example: where it stands, and under every system its metrics and what was said:
    log-likelihoods in nats in the order of the requests, or the text.
    """
    asked = outcome.asked
    tested = [n for n, part in enumerate(asked.part_D) if part == "test"]
    lines: list[dict[str, Any]] = [{"where": asked.where_D[n]} for n in tested]
    for system in config.systems:
        weight = outcome.choice(system, outcome.main)
        values, answers = (get(system, weight, "test") for get in (outcome.values, outcome.answers))
        said: dict[int, list[Any]] = {}
        for n, answer in sorted(answers.items()):
            said.setdefault(asked.requests[n][2], []).append(
                answer[0] if isinstance(answer, tuple) else answer
            )
        for place, (line, n) in enumerate(zip(lines, tested)):
            metrics = {name: _plain(found[place]) for name, found in values.items()}
            line[system] = {"lambda": weight, "metrics": _finite(metrics), "said": said[n]}
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    directory.write(f"examples/{asked.name}.jsonl", text.encode())


def _finite(value: Any) -> Any:
    """JSON without numbers that it has not: a figure over examples of one class may be NaN."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """A metric's value as JSON: some of lm-eval's are tuples, or NumPy's numbers."""
    return value if isinstance(value, int | float | str) else json.loads(json.dumps(value, default=float))
