"""One task under every system: its examples' metrics at any λ, and the figures that come of them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlp_memory.evaluation.harness.config import BenchmarkConfig
from mlp_memory.evaluation.harness.gains import best, gain, interval
from mlp_memory.evaluation.harness.names import SYSTEM
from mlp_memory.inference.continuations import Scored

if TYPE_CHECKING:
    from mlp_memory.evaluation.harness.adapter import Asked

PARTS = ("validation", "test")
Weight = float | str
Values = dict[str, list[Any]]
"""Of each metric the examples' values."""


class Outcome:
    """Metrics of a task's examples, part by part, made when first asked for.

    Args:
      asked: the task.
      config: systems and λ.
      main: the metric that λ is chosen by where one must do for all.
      scores: decoder -> scores of `pairs`; for tasks that score.
      generate: (system, λ, part, requests by number) -> their answers; for tasks that generate.
    """

    def __init__(
        self,
        asked: "Asked",
        config: BenchmarkConfig,
        main: Callable[[Sequence[str]], str],
        scores: Callable[[str, list[tuple[str, str]]], Scored],
        generate: Callable[[str, Weight, str, list[int]], list[str]],
    ):
        self.asked, self._config, self._generate = asked, config, generate
        pairs = [pair_of(kind, arguments) for kind, arguments, _ in asked.requests]
        self.pairs = list(dict.fromkeys(pair for pair in pairs if pair is not None))
        number = {pair: n for n, pair in enumerate(self.pairs)}
        self._pair_R = [None if pair is None else number[pair] for pair in pairs]
        self._scores = functools.cache(lambda decoder: scores(decoder, self.pairs))
        self._values = functools.cache(self._of_part)
        self._answers = functools.cache(self._answered)
        self.metrics = tuple(self.values("base", 0.0, "validation"))
        self.main = main(self.metrics)

    def grid(self, system: str) -> tuple[Weight, ...]:
        """The λ that are tried."""
        if SYSTEM[system].partner is None:
            return (0.0,)
        if SYSTEM[system].gated:
            return ("gate",)
        return self._config.generation_lambdas if self.asked.generates else self._config.lambdas

    def values(self, system: str, weight: Weight, part: str) -> Values:
        """The examples' metrics."""
        return self._values(_unmixed(system, weight), weight, part)

    def answers(self, system: str, weight: Weight, part: str) -> Mapping[int, Any]:
        """Of the part's requests, by number: (log-likelihood, greedy), a log-likelihood alone, or a text."""
        return self._answers(_unmixed(system, weight), weight, part)

    def value(self, system: str, weight: Weight, part: str, metric: str) -> float:
        """The task's figure."""
        return self.asked.aggregate(metric, self.values(system, weight, part)[metric])

    def choice(self, system: str, metric: str) -> Weight:
        """The λ that is best on the validation part, the least of several.

        Generated answers cost a pass for each λ, so there the main metric's λ is every metric's.
        """
        metric = self.main if self.asked.generates else metric
        grid = self.grid(system)
        found = [self.value(system, weight, "validation", metric) for weight in grid]
        order = [0.0 if weight == "gate" else weight for weight in grid]
        return grid[best(found, order, self.asked.higher(metric))]

    def figures(self, system: str, metric: str) -> dict[str, Any]:
        """What results.json says of a system: λ, the figure on the test part, its gain, the curve."""
        weight, grid = self.choice(system, metric), self.grid(system)
        found: dict[str, Any] = {
            "lambda": weight,
            **self.at(system, metric, weight),
            "validation": self.value(system, weight, "validation", metric),
        }
        if len(grid) > 1:
            found["curve"] = {
                "lambdas": list(grid),
                "validation": [self.value(system, one, "validation", metric) for one in grid],
            }
            if not self.asked.generates:
                found["curve"]["test"] = [self.value(system, one, "test", metric) for one in grid]
        return found

    def at(self, system: str, metric: str, weight: Weight) -> dict[str, Any]:
        """The figure on the test part at one λ, with its interval and its gain over base."""
        values_E = self.values(system, weight, "test")[metric]
        found: dict[str, Any] = {"value": self.asked.aggregate(metric, values_E), "interval": None}
        settings = (self._config.bootstrap, self._config.seed)
        paired = self.asked.is_mean(metric)
        if paired:
            found["interval"] = interval(values_E, *settings)
        if system != "base":
            base_E = self.values("base", 0.0, "test")[metric]
            if paired:
                found["gain"] = gain(values_E, base_E, *settings, self.asked.higher(metric)).to_json()
            else:
                found["gain"] = {"difference": found["value"] - self.asked.aggregate(metric, base_E)}
        return found

    def _of_part(self, system: str, weight: Weight, part: str) -> Values:
        found = self.asked.values(self.answers(system, weight, part))
        names = list(dict.fromkeys(name for metrics in found for name in metrics))
        return {name: [metrics[name] for metrics in found] for name in names}

    def _answered(self, system: str, weight: Weight, part: str) -> Mapping[int, Any]:
        numbers = self.asked.of_part(part)
        texts = [n for n in numbers if self._pair_R[n] is None]
        found: dict[int, Any] = {}
        if texts:
            found |= zip(texts, self._generate(system, weight, part, texts))
        if len(texts) < len(numbers):
            log_prob_P, greedy_P = self._at(system, weight)
            for n in numbers:
                if (pair := self._pair_R[n]) is None:
                    continue
                whole = self.asked.requests[n][0] == "loglikelihood_rolling"
                log_prob = float(log_prob_P[pair])
                found[n] = log_prob if whole else (log_prob, bool(greedy_P[pair]))
        return found

    @functools.lru_cache(maxsize=2)  # noqa: B019 (both parts of one λ)
    def _at(self, system: str, weight: Weight) -> tuple[np.ndarray, np.ndarray]:
        return self._scores(SYSTEM[system].decoder).at(SYSTEM[system].partner, weight)


def _unmixed(system: str, weight: Weight) -> str:
    """The system, or the decoder alone where nothing is mixed into it."""
    return "base" if weight == 0.0 and SYSTEM[system].decoder == "base" else system


def pair_of(kind: str, arguments: tuple[Any, ...]) -> tuple[str, str] | None:
    """(context, continuation) of a request that scores; None for one that generates."""
    if kind == "generate_until":
        return None
    return ("", arguments[0]) if kind == "loglikelihood_rolling" else (arguments[0], arguments[1])


def pooled_choice(outcomes: Sequence[Outcome], system: str) -> float | None:
    """One λ for several tasks: best for the main metric over their validation examples together.

    None where no task has figures that are means, of which more is better.
    """
    usable = [one for one in outcomes if one.asked.is_mean(one.main) and one.asked.higher(one.main)]
    if not usable:
        return None
    grid = usable[0].grid(system)
    sums = [
        float(np.sum([np.sum(one.values(system, weight, "validation")[one.main]) for one in usable]))
        for weight in grid
    ]
    return grid[best(sums, grid)]
