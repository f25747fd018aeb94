import numpy as np
import pytest

from mlp_memory.studies import ablations
from mlp_memory.studies.curves import Check
from mlp_memory.studies.overfitting import Curve, rise
from mlp_memory.studies.results import Outcome, difference
from mlp_memory.studies.variants import RECIPE, Variant

IDS_N = np.repeat(np.arange(30), 4)


def outcome(value: object, nats: float, layers: int = 10) -> Outcome:
    """Of a variant whose test and validation losses are so many nats, on every token."""
    nll_N = np.full(len(IDS_N), nats)
    numbers = {
        "validation": {"perplexity": {"base_plus_memory": float(np.exp(nats))}},
        "shapes": {"base": {"layers": layers}},
    }
    return Outcome(Variant(str(value), value), numbers, {"base_plus_memory": nll_N}, IDS_N)


def judged(study: str, figures: dict[object, float], recipe: float = 4.0) -> tuple[str, str, str]:
    varied = [outcome(value, nats) for value, nats in figures.items()]
    return ablations._QUESTIONS[study].judge(
        varied, outcome(RECIPE, recipe), lambda one, other: difference(one, other, 100)
    )


@pytest.mark.parametrize(
    ("study", "figures", "held"),
    [
        ("alpha", {0.0: 4.2, 0.4: 4.0, 0.8: 4.05, 1.0: 4.1}, "yes"),
        ("alpha", {0.0: 4.2, 0.4: 4.0, 1.0: 3.9}, "no"),
        ("alpha", {0.0: 4.2, 0.4: 4.0, 1.0: 4.0}, "unclear"),
        ("alpha", {0.0: 4.2, 0.4: 4.0}, "unclear"),  # an end was not tried
        ("tap", {0: 4.5, 6: 3.9, 9: 4.0}, "yes"),
        ("tap", {0: 3.0, 6: 4.1, 9: 4.0}, "no"),  # the layer nearest 70 %, not the best one
        ("tap", {0: 4.5, 6: 3.9}, "unclear"),  # the last layer was not tried
        ("k", {1: 4.4, 64: 3.0, 1024: 4.0}, "yes"),
        ("k", {1: 4.0, 1024: 4.4}, "no"),
        ("recall", {1.0: 4.0, 0.3: 4.0}, "unclear"),
        ("depth", {4: 4.0}, "unclear"),
        ("temperature", {0.5: 4.1, 1.0: 4.0}, "yes"),
        ("temperature", {0.5: 4.1, 1.0: 3.9}, "no"),
        ("style", {"llama": 4.0, "gpt2": 4.1}, "yes"),
        ("teacher", {"large": 3.9}, "yes"),
        ("teacher", {"large": 4.1}, "no"),
        ("mixer", {"transformer": 4.1}, "yes"),
        ("mixer", {"transformer": 3.9}, "no"),
    ],
)
def test_claims_are_decided_by_the_differences(study, figures, held):
    assert judged(study, figures)[2] == held


def test_differences_that_documents_disagree_on_are_unclear(rng):
    one, other = outcome("one", 4.0), outcome("other", 4.0)
    signs_N = np.repeat(np.where(np.arange(30) % 2, 1.0, -1.0), 4)
    one.nll["base_plus_memory"][:] += signs_N
    found = difference(one, other, 200)
    assert found.nats == pytest.approx(0, abs=1e-12)
    assert found.bounds.low < 0 < found.bounds.high


def curve(validation: list[float], test: list[float], rng: np.random.Generator) -> Curve:
    """Checks of these losses; every document has its own, with that mean over tokens."""
    checks = []
    tokens_U = np.full(20, 5)
    for step, (loss, nats) in enumerate(zip(validation, test)):
        sums_U = nats * tokens_U + 0.01 * (rng.permutation(20) - 9.5)
        part = {"tokens": tokens_U, "alone": sums_U}
        found = {"alone": loss, "mixture": -loss}
        checks.append(Check(step + 1, float(step + 1), found, 0.0, {"train": part, "test": part}))
    return Curve("", checks)


def test_a_rise_is_from_the_check_of_least_validation_loss_to_the_last(rng):
    steep = curve([3.0, 2.0, 2.5], [3.1, 2.2, 2.9], rng)
    flat = curve([3.0, 2.4, 2.3], [3.1, 2.1, 2.5], rng)
    assert steep.best.step == 2
    assert steep.mean(steep.best, "test") == pytest.approx(2.2)
    found = rise(steep, None, 200)
    assert found.nats == pytest.approx(0.7)
    assert 0 < found.bounds.low < found.bounds.high
    # The best check is the last one: it has not risen, whatever test says of it.
    assert rise(flat, None, 200).nats == 0
    assert rise(flat, None, 200).bounds == (0, 0)
    # Each model's best check is its own.
    assert steep._replace(model="mixture").best.step == 1
    gap = rise(flat, steep, 200)
    assert gap.nats == pytest.approx(-0.7)
    assert gap.bounds.high < 0
