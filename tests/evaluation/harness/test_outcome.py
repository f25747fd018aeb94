import numpy as np
import pytest

from mlp_memory.evaluation.harness.config import BenchmarkConfig
from mlp_memory.evaluation.harness.outcome import Outcome, pooled_choice
from mlp_memory.inference.continuations import Partner, Scored

LAMBDAS = (0.0, 0.2, 0.5, 0.8)
SYSTEMS = ("base", "base_plus_memory", "base_plus_memory_gated", "knn_lm_exact")


class Toy:
    """A task of two choices of one token each, the first right; the first half is validation."""

    def __init__(self, examples, generates=False):
        self.name, self.generates = "toy", generates
        self.part_D = ["validation"] * (examples // 2) + ["test"] * (examples - examples // 2)
        self.requests = [
            ("generate_until", (f"q{d}", {}), d) if generates else ("loglikelihood", (f"q{d}", f" {c}"), d)
            for d in range(examples)
            for c in range(1 if generates else 2)
        ]

    def of_part(self, part):
        return [n for n, (_, _, doc) in enumerate(self.requests) if self.part_D[doc] == part]

    def values(self, answers):
        if self.generates:
            return [{"exact_match": float(text == "right")} for text in answers.values()]
        log_prob = [log_prob for log_prob, _ in answers.values()]
        return [{"acc": float(a > b)} for a, b in zip(log_prob[::2], log_prob[1::2])]

    def aggregate(self, metric, values):
        return float(np.mean(values))

    def is_mean(self, metric):
        return True

    def higher(self, metric):
        return True


def scores_of(rng, examples):
    """Random scores of the decoder, the memory (with a gate) and a datastore."""
    tokens = 2 * examples

    def partner():
        zeros = np.zeros(tokens, np.float32)
        weight = rng.uniform(0, 1, tokens).astype(np.float32)
        return Partner(rng.normal(size=tokens).astype(np.float32) - 3, weight, zeros, zeros)

    base = rng.normal(size=tokens).astype(np.float32) - 3
    partners = {"memory": partner(), "knn_lm_exact": partner()}
    return Scored(np.ones(tokens, np.int64), base, np.zeros(tokens, bool), partners)


def make(rng, examples=60, toy=None, scored=None, generate=None):
    config = BenchmarkConfig(systems=SYSTEMS, lambdas=LAMBDAS, generation_lambdas=(0.5,), bootstrap=20)
    scored = scored or scores_of(rng, examples)
    return Outcome(toy or Toy(examples), config, lambda names: names[0], lambda *_: scored, generate)


def accuracy(scored, weights, chosen):
    mixed = np.log(
        weights * np.exp(scored.partners["memory"].log_prob_T.astype(np.float64))
        + (1 - weights) * np.exp(scored.base_T.astype(np.float64))
    )
    return (mixed[::2] > mixed[1::2])[chosen]


def test_lambda_is_the_best_on_validation_and_the_figure_is_the_test_parts(rng):
    scored = scores_of(rng, 60)
    figures = make(rng, scored=scored).figures("base_plus_memory", "acc")
    validation, test = slice(0, 30), slice(30, 60)
    curve = [accuracy(scored, weight, validation).mean() for weight in LAMBDAS]
    assert figures["curve"]["validation"] == pytest.approx(curve)
    assert figures["lambda"] == LAMBDAS[int(np.argmax(curve))]
    assert figures["value"] == pytest.approx(accuracy(scored, figures["lambda"], test).mean())
    base = accuracy(scored, 0.0, test)
    assert figures["gain"]["difference"] == pytest.approx(figures["value"] - base.mean())


def test_what_the_test_part_holds_does_not_change_the_choice(rng):
    scored = scores_of(rng, 60)
    choices = make(rng, scored=scored).choice("base_plus_memory", "acc")
    for name in ("base_T", "partners"):
        values = scored.base_T if name == "base_T" else scored.partners["memory"].log_prob_T
        values[60:] = rng.normal(size=60) * 5
    assert make(rng, scored=scored).choice("base_plus_memory", "acc") == choices


def test_a_gate_has_each_tokens_lambda_and_no_curve(rng):
    scored = scores_of(rng, 60)
    figures = make(rng, scored=scored).figures("base_plus_memory_gated", "acc")
    weights = scored.partners["memory"].weight_T.astype(np.float64)
    assert figures["value"] == pytest.approx(accuracy(scored, weights, slice(30, 60)).mean())
    assert figures["lambda"] == "gate"
    assert "curve" not in figures


def test_one_lambda_for_several_tasks_is_the_best_over_their_examples_together(rng):
    all_scored = [scores_of(rng, size) for size in (20, 80)]
    outcomes = [make(rng, size, scored=scored) for size, scored in zip((20, 80), all_scored)]
    sums = [
        sum(accuracy(scored, weight, slice(0, size // 2)).sum() for size, scored in zip((20, 80), all_scored))
        for weight in LAMBDAS
    ]
    assert pooled_choice(outcomes, "base_plus_memory") == LAMBDAS[int(np.argmax(sums))]


def test_texts_are_generated_once_for_each_lambda_and_the_test_part_only_at_the_chosen_one(rng):
    asked = []

    def generate(system, weight, part, numbers):
        asked.append((system, weight, part))
        good = 0.9 if system == "base_plus_memory" else 0.0
        return ["right" if n < good * 40 else "wrong" for n in numbers]

    outcome = make(rng, toy=Toy(40, generates=True), generate=generate)
    for _ in range(2):
        figures = outcome.figures("base_plus_memory", "exact_match")
    assert (figures["lambda"], figures["value"]) == (0.5, pytest.approx(16 / 20))
    assert sorted(asked) == sorted(
        [
            ("base", 0.0, "validation"),
            ("base_plus_memory", 0.5, "validation"),
            ("base_plus_memory", 0.5, "test"),
            ("base", 0.0, "test"),
        ]
    )
    assert figures["gain"]["wins"] == 16
