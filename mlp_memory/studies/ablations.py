"""What the studies of one thing found: a table, a plot, and the paper's claim held against it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from mlp_memory.evaluation.sections import Claim, Findings, Plot, Section, Series, Table
from mlp_memory.studies.config import STUDIES
from mlp_memory.studies.fit import verdict
from mlp_memory.studies.results import (
    DASH,
    Difference,
    Outcome,
    difference,
    figure,
    interval_text,
    outcomes,
    size_text,
)
from mlp_memory.studies.study import Study, is_decoder
from mlp_memory.studies.variants import RECIPE

Compare = Callable[[Outcome, Outcome], Difference]
Judged = tuple[str, str, str]
"""Ours, its interval, and whether the claim held."""


def conclude(study: Study) -> tuple[dict[str, Any], Findings]:
    """The numbers and the findings of an ablation, all its variants measured."""
    found = outcomes(study)
    recipe = next(outcome for outcome in found if outcome.variant.name == RECIPE)
    samples = study.recipe.evaluate.bootstrap
    compare: Compare = functools.partial(difference, samples=samples)
    against = {o.variant.name: compare(o, recipe) for o in found if o is not recipe}
    numbers = {o.variant.name: dict(o.numbers) for o in found}
    for name, gap in against.items():
        numbers[name]["difference_to_recipe"] = gap.to_json()
    with_memory = [o for o in found if not is_decoder(o.variant)]
    varied = [o for o in with_memory if o is not recipe]
    question = _QUESTIONS[study.name]
    ours, interval, held = question.judge(varied, recipe, compare)
    claim = Claim(question.claim, question.paper, ours, interval, held, size_text(with_memory), study.command)
    section = Section(
        f"Study: {STUDIES[study.name]}",
        (_SETTING,),
        (_table(study, found, recipe, against),),
        tuple(_plots(study, varied, recipe)),
    )
    return {"study": study.name, "variants": numbers}, Findings((claim,), (section,))


_SETTING = (
    "Each variant is the recipe with one thing changed, λ chosen on validation. Differences are of the same "
    "test tokens, intervals 95 % over documents; every training has one seed, whose chance they leave out."
)


def _table(study: Study, found: Sequence[Outcome], recipe: Outcome, against: dict[str, Difference]) -> Table:
    columns = (
        study.name,
        "parameters",
        "training FLOPs",
        "τ",
        "recall",
        "tokens a target",
        "λ",
        "memory alone",
        "perplexity",
        "95 %",
        "nats to recipe (95 %)",
    )
    rows = []
    for outcome in found:
        numbers, teacher = outcome.numbers, outcome.numbers.get("teacher", {})
        alone = numbers["test"]["perplexity"].get("memory")
        rows.append(
            (
                str(outcome.variant.value),
                figure(outcome.parameters),
                figure(outcome.train_flops),
                f"{teacher['temperature']:.4g}" if teacher else DASH,
                f"{teacher['recall']:.3f}" if teacher.get("recall") is not None else DASH,
                f"{teacher['mean_support']:.1f}" if teacher else DASH,
                f"{numbers['lambda']:.3g}" if numbers["lambda"] is not None else DASH,
                f"{alone:.2f}" if alone else DASH,
                f"{outcome.perplexity:.2f}",
                interval_text(*outcome.interval),
                str(against[outcome.variant.name]) if outcome is not recipe else DASH,
            )
        )
    base = recipe.numbers["test"]["perplexity"]["base"]
    notes = (f"The recipe's decoder alone: {base:.2f}.",)
    return Table(f"{STUDIES[study.name]}, test", columns, tuple(rows), notes)


def _plots(study: Study, varied: Sequence[Outcome], recipe: Outcome) -> list[Plot]:
    """Perplexity over the varied number; none for words."""
    points = sorted((o for o in varied if _is_number(o.variant.value)), key=lambda o: o.variant.value)
    if len(points) < 2:
        return []
    x_N = tuple(float(o.variant.value) for o in points)
    low_N, high_N = zip(*(o.interval for o in points))
    mixture = Series("decoder + memory", x_N, tuple(o.perplexity for o in points), low_N, high_N)
    alone_N = tuple(o.numbers["test"]["perplexity"]["memory"] for o in points)
    base = recipe.numbers["test"]["perplexity"]["base"]
    base_N = tuple(o.numbers["test"]["perplexity"]["base"] for o in points)
    series = (mixture, Series("memory alone", x_N, alone_N), Series("decoder alone", x_N, base_N))
    log_x = study.name in ("k", "temperature", "top_m", "depth", "width")
    notes = (
        f"The recipe's own: {recipe.perplexity:.2f}, its decoder {base:.2f}. Bands are 95 % over documents.",
    )
    return [Plot(STUDIES[study.name], study.name, "perplexity on test", series, log_x=log_x, notes=notes)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


@dataclasses.dataclass(frozen=True)
class _Question:
    """A claim, the paper's figure, and how outcomes decide it."""

    claim: str
    paper: str
    judge: Callable[[Sequence[Outcome], Outcome, Compare], Judged]


def _better(one: Outcome, other: Outcome, compare: Compare) -> Judged:
    """Whether one has less loss than the other."""
    gap = compare(one, other)
    ours = f"{one.variant.value}: {one.perplexity:.2f}, {other.variant.value}: {other.perplexity:.2f}"
    return ours, f"{gap} nats", verdict(gap.bounds)


def _largest_beats_smallest(varied: Sequence[Outcome], recipe: Outcome, compare: Compare) -> Judged:
    ordered = sorted(varied, key=lambda o: o.variant.value)
    if len(ordered) < 2:
        return _too_few(varied)
    return _better(ordered[-1], ordered[0], compare)


def _too_few(varied: Sequence[Outcome]) -> Judged:
    return f"{len(varied)} value(s) tried", "", "unclear"


def _mixed_alpha(varied: Sequence[Outcome], recipe: Outcome, compare: Compare) -> Judged:
    """Whether the best α between 0 and 1, chosen on validation, beats both ends."""
    ends = [o for o in varied if o.variant.value in (0, 1)]
    inner = [o for o in varied if 0 < o.variant.value < 1]
    if len(ends) < 2 or not inner:
        return _too_few(varied)
    best = min(inner, key=_on_validation)
    gaps = {end.variant.value: compare(best, end) for end in ends}
    verdicts = {verdict(gap.bounds) for gap in gaps.values()}
    held = "no" if "no" in verdicts else "yes" if verdicts == {"yes"} else "unclear"
    ours = f"best α = {best.variant.value}: {best.perplexity:.2f}; " + ", ".join(
        f"α = {end.variant.value}: {end.perplexity:.2f}" for end in ends
    )
    return ours, "; ".join(f"to α = {value}: {gap} nats" for value, gap in gaps.items()), held


def _on_validation(outcome: Outcome) -> float:
    return outcome.numbers["validation"]["perplexity"]["base_plus_memory"]


def _tap_depth(varied: Sequence[Outcome], recipe: Outcome, compare: Compare) -> Judged:
    """Whether the layer nearest 70 % of the depth beats the last."""

    def layer(outcome: Outcome) -> int:
        return outcome.variant.value % outcome.numbers["shapes"]["base"]["layers"]

    def depth(outcome: Outcome) -> float:
        return (layer(outcome) + 1) / outcome.numbers["shapes"]["base"]["layers"]

    last = max(varied, key=depth)
    inner = [o for o in varied if layer(o) != layer(last)]
    if depth(last) < 1 or not inner:
        return _too_few(varied)
    return _better(min(inner, key=lambda o: abs(depth(o) - 0.7)), last, compare)


def _not_beaten(varied: Sequence[Outcome], recipe: Outcome, compare: Compare) -> Judged:
    """Whether no value beats the recipe's: no if one does, yes if none is ahead at all."""
    gaps = {o.variant.value: compare(o, recipe) for o in varied}
    best = min(varied, key=lambda o: gaps[o.variant.value].nats)
    gap = gaps[best.variant.value]
    if any(verdict(other.bounds) == "yes" for other in gaps.values()):
        held = "no"
    else:
        held = "yes" if gap.nats >= 0 else "unclear"
    ours = f"recipe: {recipe.perplexity:.2f}, best of the others, {best.variant.value}: {best.perplexity:.2f}"
    return ours, f"{gap} nats", held


def _other_beats_recipe(varied: Sequence[Outcome], recipe: Outcome, compare: Compare) -> Judged:
    """Whether the best of the variants, chosen on validation, beats the recipe."""
    return _better(min(varied, key=_on_validation), recipe, compare)


_QUESTIONS = {
    "alpha": _Question(
        "The teacher and the next token together make a better memory than either alone",
        "α = 0.4 best of 0 … 1 (GPT-2, WikiText-103)",
        _mixed_alpha,
    ),
    "tap": _Question(
        "About 70 % of the decoder's depth is a better input for the memory than the last layer",
        "layer 25 of 36 (GPT2-large)",
        _tap_depth,
    ),
    "k": _Question(
        "More neighbours make a better memory",
        "1, 64, 1024, 2048 neighbours: 10.30, 9.57, 9.43, 9.42 (kNN-LM, GPT2-large, WikiText-103)",
        _largest_beats_smallest,
    ),
    "temperature": _Question(
        "No τ makes a better memory than the one that serves kNN-LM best on validation",
        "",
        _not_beaten,
    ),
    "top_m": _Question(
        "The largest number of teacher tokens makes a better memory than the smallest",
        "95 % of the mass in 68 tokens, 99 % in 126 (GPT2-large, k = 1024)",
        _largest_beats_smallest,
    ),
    "recall": _Question(
        "A teacher from exact search makes a better memory than one of the lowest recall",
        "",
        _largest_beats_smallest,
    ),
    "depth": _Question("A deeper memory is better", "", _largest_beats_smallest),
    "width": _Question("A wider memory is better", "", _largest_beats_smallest),
    "mixer": _Question(
        "An MLP memory is better than a transformer memory of as many parameters, over as many rows",
        "",
        lambda varied, recipe, compare: _better(recipe, varied[0], compare),
    ),
    "style": _Question("No block style beats the recipe's own", "", _not_beaten),
    "teacher": _Question(
        "A larger decoder's teacher makes a better memory for the small decoder",
        "12.91 to 12.84 from a small to an xl teacher (small memory)",
        _other_beats_recipe,
    ),
}
