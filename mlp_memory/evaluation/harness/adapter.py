"""lm-eval's side: models and tasks as it knows them. The only importer of lm_eval, an optional extra.

Nothing is fetched: the hub is switched off unless the environment says otherwise, and what `datasets` caches
goes to a folder that ends with the process.
"""

import functools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from mlp_memory.artifacts import UserError, digest, first_line
from mlp_memory.evaluation.harness.examples import Example, Parts, Task
from mlp_memory.evaluation.harness.metrics import answer_metrics, choice_metrics
from mlp_memory.evaluation.harness.prompts import BETWEEN_DEMONSTRATIONS
from mlp_memory.evaluation.harness.ready import require_lm_eval
from mlp_memory.settings import nearest

require_lm_eval()
_CACHE = tempfile.TemporaryDirectory(prefix="mlp_memory_datasets_")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_CACHE", _CACHE.name)

import lm_eval.api.model  # noqa: E402 (the hub must be switched off before)
import lm_eval.api.task  # noqa: E402
import lm_eval.tasks  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.metrics import mean  # noqa: E402
from lm_eval.config.task import TaskConfig  # noqa: E402

# A task of its plain kind is said to lack settings, before it can be given them.
logging.getLogger("lm_eval.config.task").setLevel(logging.ERROR)

_FIRST = ("acc", "mc1", "exact_match", "bleu_acc")
"""A task's main metric is the first of these that it has, else its own first."""


class Continues(Protocol):
    """A model at one λ."""

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, in nats, and whether it is greedy."""

    def generate(self, prompts: Sequence[str], stop: tuple[str, ...], max_tokens: int) -> list[str]:
        """The greedy continuation of each prompt."""


class Generation(NamedTuple):
    """What a request to generate asks for."""

    stop: tuple[str, ...]
    max_tokens: int


class HarnessModel(lm_eval.api.model.LM):
    """A model as lm-eval's evaluator takes it: `lm_eval.simple_evaluate(model=HarnessModel(...))`.

    Texts longer than the context are read through windows that overlap by half, where lm-eval's own backends
    drop their beginning.

    Args:
      model: at one λ.
      max_tokens: of a generated text, where a task says nothing.
    """

    def __init__(self, model: Continues, max_tokens: int = 256):
        super().__init__()
        self._model, self._max_tokens = model, max_tokens

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each (context, continuation)."""
        return self._model.log_likelihoods([request.args for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of each whole text."""
        found = self._model.log_likelihoods([("", request.args[0]) for request in requests])
        return [log_prob for log_prob, _ in found]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The greedy continuation of each (context, settings)."""
        asked = [generation(request.args[1], self._max_tokens) for request in requests]
        found = [""] * len(requests)
        for one in dict.fromkeys(asked):
            places = [place for place, other in enumerate(asked) if other == one]
            texts = self._model.generate([requests[place].args[0] for place in places], *one)
            for place, text in zip(places, texts):
                found[place] = text
        return found


def generation(settings: Mapping[str, Any], max_tokens: int) -> Generation:
    """lm-eval's settings of a generation.

    Raises:
      UserError: it draws at random, which no paired comparison can use.
    """
    if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
        raise UserError("a task asks for sampled texts (do_sample): only greedy ones are compared here")
    until = settings.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    most = settings.get("max_gen_toks", settings.get("max_new_tokens", max_tokens))
    return Generation(tuple(text for text in stop if text), int(most))


class LocalTask(lm_eval.api.task.Task):
    """Examples of files on disk as a task of lm-eval's.

    Args:
      task: whose.
      examples: of it.
      scoring: how a choice is found.
      count_tokens: (context, continuation) -> tokens of the continuation, for scores per token.
      before: demonstrations, before every question.
      max_tokens: of a generated answer.
    """

    VERSION = 1

    def __init__(
        self,
        task: Task,
        examples: Sequence[Example],
        scoring: str,
        count_tokens: Callable[[str, str], int],
        before: str = "",
        max_tokens: int = 32,
    ):
        self._examples, self._task, self._scoring = list(examples), task, scoring
        self._count_tokens, self._before, self._max_tokens = count_tokens, before, max_tokens
        self.OUTPUT_TYPE = "generate_until" if task.generates else "loglikelihood"
        super().__init__()
        settings = {"generation_kwargs": self._settings} if task.generates else {}
        self._config = TaskConfig(
            task=task.name, output_type=self.OUTPUT_TYPE, num_fewshot=0, test_split="test", **settings
        )

    @property
    def _settings(self) -> dict[str, Any]:
        """Of a generation, as lm-eval writes them."""
        greedy = {"do_sample": False, "temperature": 0.0}
        return {"until": list(self._task.stop), "max_gen_toks": self._max_tokens, **greedy}

    def build(self) -> "LocalTask":
        """Makes the requests, as the evaluator would, without its bar."""
        self._instances = []
        for number, doc in enumerate(self._examples):
            metadata = (self._task.name, number, 1)
            self._instances += self.construct_requests(doc, self.doc_to_text(doc), metadata=metadata)
        return self

    def download(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the examples are here."""

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[Example]:
        """The examples."""
        return self._examples

    def doc_to_text(self, doc: Example) -> str:
        """What comes before the choices or the answer."""
        return self._before + doc.context

    def doc_to_target(self, doc: Example) -> str:
        """A right choice, or a right answer."""
        return doc.choices[doc.right[0]] if doc.choices else f" {doc.answers[0]}"

    def fewshot_context(self, doc: Example, *args: Any, **kwargs: Any) -> str:
        """The prompt; demonstrations stand in it already."""
        return self.doc_to_text(doc)

    def construct_requests(self, doc: Example, ctx: str, **kwargs: Any) -> list[Instance]:
        """Each choice after the prompt, and after the domain premise where there is one; or the prompt."""
        if self._task.generates:
            pairs = [(ctx, self._settings)]
        else:
            contexts = (ctx, doc.premise) if doc.premise else (ctx,)
            pairs = [(context, choice) for context in contexts for choice in doc.choices]
        kind = "generate_until" if self._task.generates else "loglikelihood"
        metadata = kwargs.get("metadata", (self._task.name, 0, 1))
        return [Instance(kind, doc, pair, number, metadata) for number, pair in enumerate(pairs)]

    def process_results(self, doc: Example, results: Sequence[Any]) -> dict[str, float]:
        """The example's metrics (see `metrics`); TruthfulQA's generated answers by lm-eval's own code."""
        if doc.wrong:
            from lm_eval.tasks.truthfulqa.utils import process_results_gen

            answers = {"correct_answers": list(doc.answers), "incorrect_answers": list(doc.wrong)}
            return {name: float(value) for name, value in process_results_gen(answers, results).items()}
        if self._task.generates:
            return answer_metrics(results[0], doc.answers)
        log_prob = [log_prob for log_prob, _ in results]
        choices = len(doc.choices)
        tokens = [self._count_tokens(self._before + doc.context, choice) for choice in doc.choices]
        premise = log_prob[choices:] or None
        return choice_metrics(doc, log_prob[:choices], premise, tokens, self._scoring)

    def aggregation(self) -> dict[str, Callable]:
        """The mean, of every metric."""
        return _Always(mean)

    def higher_is_better(self) -> dict[str, bool]:
        """True, of every metric."""
        return _Always(True)


class _Always(dict):
    """One value under every key."""

    def __init__(self, value: Any):
        super().__init__()
        self._value = value

    def __missing__(self, key: str) -> Any:
        return self._value


class Asked:
    """A task's requests and metrics, for models whose answers are known at many λ.

    Attributes:
      name, part_D, where_D: of the task, and of each of D examples the part and its place.
      requests: (kind, arguments, example) of each; a kind is "loglikelihood", "loglikelihood_rolling" or
        "generate_until".

    Args:
      task: of lm-eval's, its requests built.
      parts: of the examples to use, by their number in the task.
      wheres: their places, by the same number.
    """

    def __init__(self, task: Any, parts: Mapping[int, str], wheres: Mapping[int, str]):
        self.name, self._task, docs = task.config.task, task, list(parts)
        self.part_D, self.where_D = [parts[doc] for doc in docs], [wheres[doc] for doc in docs]
        number = {doc: place for place, doc in enumerate(docs)}
        kept = [instance for instance in task.instances if instance.doc_id in number]
        self._instances = sorted(kept, key=lambda one: (number[one.doc_id], one.idx))
        if any((one.repeats or 1) != 1 for one in kept):
            raise UserError(f"{self.name}: the task repeats its requests, which no paired comparison can use")
        self.requests = [(one.request_type, one.args, number[one.doc_id]) for one in self._instances]

    @property
    def generates(self) -> bool:
        """Whether text is asked for."""
        return any(kind == "generate_until" for kind, _, _ in self.requests)

    def of_part(self, part: str) -> list[int]:
        """The requests of a part's examples, by number."""
        return [n for n, (_, _, doc) in enumerate(self.requests) if self.part_D[doc] == part]

    def values(self, answers: Mapping[int, Any]) -> list[dict[str, Any]]:
        """Metrics of the examples whose requests are answered, in their order, by lm-eval's own code.

        Args:
          answers: by the number of the request; of an example all or none.
        """
        chosen = [self._instances[n] for n in sorted(answers)]
        for n, instance in zip(sorted(answers), chosen):
            instance.resps, instance.filtered_resps = [answers[n]], {}
        self._task._instances = chosen  # what apply_filters goes through
        self._task.apply_filters()
        by_doc: dict[int, list[Instance]] = {}
        for instance in chosen:
            by_doc.setdefault(instance.doc_id, []).append(instance)
        found = []
        for instances in by_doc.values():
            metrics = {}
            for name in instances[0].filtered_resps:
                results = [instance.filtered_resps[name] for instance in instances]
                suffix = "" if name == "none" else f",{name}"
                for metric, value in self._task.process_results(instances[0].doc, results).items():
                    metrics[f"{metric}{suffix}"] = value
            found.append(metrics)
        return found

    def aggregate(self, metric: str, values: Sequence[Any]) -> float:
        """The task's figure from its examples'."""
        return float(self._aggregation(metric)(list(values)))

    def is_mean(self, metric: str) -> bool:
        """Whether the figure is the mean over examples, which can be compared example by example."""
        return self._aggregation(metric) is mean

    def higher(self, metric: str) -> bool:
        """Whether more is better."""
        found = self._task.higher_is_better()
        plain = metric.split(",")[0]
        return bool(found[plain] if plain in found or isinstance(found, _Always) else True)

    def _aggregation(self, metric: str) -> Callable[[list[Any]], float]:
        found, plain = self._task.aggregation(), metric.split(",")[0]
        return found[plain] if plain in found or isinstance(found, _Always) else mean


def main_metric(names: Iterable[str]) -> str:
    """The metric that stands for a task."""
    names = list(names)
    return next((name for first in _FIRST for name in names if name.split(",")[0] == first), names[0])


def local_task(
    task: Task,
    parts: Parts,
    scoring: str,
    count_tokens: Callable[[str, str], int],
    max_tokens: int,
) -> Asked:
    """A task of files on disk, in its two parts (see `LocalTask` for the arguments)."""
    before = "".join(shot.context + shot.shot + BETWEEN_DEMONSTRATIONS for shot in parts.shots)
    examples = [*parts.validation, *parts.test]
    built = LocalTask(task, examples, scoring, count_tokens, before, max_tokens).build()
    of = ["validation"] * len(parts.validation) + ["test"] * len(parts.test)
    return Asked(built, dict(enumerate(of)), {n: example.where for n, example in enumerate(examples)})


def library_tasks(
    names: Sequence[str], include: str, fraction: float, limits: Mapping[str, int]
) -> list[Asked]:
    """Tasks of lm-eval's own, groups as their members, their examples in two parts by a hash of each.

    Args:
      names: in lm-eval.
      include: folder of further task files; "" for none.
      fraction: of the validation part.
      limits: most examples of "validation" and "test"; 0 for all.

    Raises:
      UserError: there is no such task, its data is not on this machine, or a part is empty.
    """
    if not names:
        return []
    manager = _manager(include, defaults=not include)
    if not set(names) <= set(manager.all_tasks):
        manager = _manager(include, defaults=True)
    for name in names:
        if name not in manager.all_tasks:
            hint = nearest(name, manager.all_tasks, "lm-eval ls tasks lists them")
            raise UserError(f"benchmark.lm_eval_tasks: lm-eval has no task {name!r} ({hint})")
    found = []
    for name in names:
        try:
            tasks = manager.load([name])["tasks"]
        except Exception as error:  # of `datasets`, of the hub, of a task's own code
            raise UserError(
                f"lm-eval's task {name}: its data cannot be loaded ({first_line(error)}): nothing is fetched "
                "unless HF_HUB_OFFLINE=0 and HF_DATASETS_OFFLINE=0 are set"
            ) from error
        for task in tasks.values():
            found.append(_asked(task, fraction, limits))
    return found


@functools.cache
def _manager(include: str, defaults: bool) -> lm_eval.tasks.TaskManager:
    """Knows the tasks of a folder, with lm-eval's own or without: those are thousands of files."""
    return lm_eval.tasks.TaskManager(include_path=include or None, include_defaults=defaults)


def _asked(task: Any, fraction: float, limits: Mapping[str, int]) -> Asked:
    if task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(1234)  # the evaluator's own default
    task.build_all_requests()
    docs = {instance.doc_id: instance.doc for instance in task.instances}
    keys = {number: _hash(doc) for number, doc in docs.items()}
    parts: dict[int, str] = {}
    for part in ("validation", "test"):
        of_part = [n for n in keys if (int(keys[n], 16) < fraction * 16**16) == (part == "validation")]
        of_part.sort(key=lambda n: (keys[n], n))
        if not of_part:
            raise UserError(f"lm-eval's task {task.config.task}: no example for its {part} part")
        parts |= dict.fromkeys(of_part[: limits[part] or None], part)
    return Asked(task, parts, {number: f"example {number}" for number in parts})


def _hash(doc: Any) -> str:
    """16 hex digits of an example, equal ones alike."""
    return digest(json.dumps(doc, sort_keys=True, default=str).encode())
