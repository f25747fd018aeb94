"""What a benchmark says to readers: the table, the curves over λ, the paper's claims beside it."""

from collections.abc import Mapping
from typing import Any

from mlp_memory.evaluation.harness.gains import Gain, verdict
from mlp_memory.evaluation.sections import Claim, Findings, Plot, Section, Series, Table
from mlp_memory.evaluation.table import DASH, boxed, format_count, is_number

COMMAND = "python -m mlp_memory benchmark --workdir=DIR"

# PAPER: tasks, base and base + memory of the paper's Mistral-7B and Llama-2-7B models, in percent.
_PAPER = {
    "nq_open": "20.63 → 25.20, Mistral-7B",
    "webquestions": "29.28 → 37.45, Mistral-7B",
    "triviaqa": "57.65 → 60.99, Mistral-7B",
    "truthfulqa_generation": "32.09 → 32.54, Mistral-7B",
    "hotpotqa": "20.96 → 24.14, Mistral-7B",
    "halueval_dialogue": "57.18 → 66.86",
    "halueval_qa": "53.99 → 64.07",
    "halueval_summarization": "50.27 → 52.41",
    "strategyqa": "improves",
}
_COLUMNS = ("task", "examples", "system", "λ", "figure", "gain over base", "better : worse")


def findings(results: Mapping[str, Any]) -> Findings:
    """Of a results.json of `stage`."""
    tables = [Table("At each task's own λ", _COLUMNS, tuple(_rows(results)), tuple(_notes(results)))]
    if pooled := _pooled_rows(results):
        head = ("task", *(results["systems"][system] for system in results["one_lambda"]))
        tables.append(Table("At one λ for all", head, tuple(pooled)))
    text = (
        "λ is chosen for each task on its validation part and reported on the other; the last row is the "
        "mean over tasks. Gains are over the decoder alone on the same examples, with the 95 % interval of a "
        "paired bootstrap and the p of an exact sign test.",
    )
    section = Section("Benchmarks", text, tuple(tables), tuple(_plots(results)))
    return Findings(tuple(_claims(results)), (section,))


def benchmark_table(results: Mapping[str, Any]) -> str:
    """The first table for a terminal, with its notes; ends in a newline."""
    return "\n".join([*boxed([_COLUMNS, *_rows(results)]), *_notes(results), ""])


def _rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each task, metric and system; figures that are no shares are in results.json only."""
    found = []
    for task in results["tasks"].values():
        main = task["main_metric"]
        shown = (main, *(metric for metric in task["shares"] if metric != main))
        for metric in shown:
            title = f"{task['title']}, {metric}"
            for system, label in results["systems"].items():
                figures = task["systems"][system][metric]
                cells = _cells(figures, metric in task["shares"])
                found.append((title if system == "base" else "", f"{task['test']:,}", label, *cells))
    if average := results.get("average"):
        for system, label in results["systems"].items():
            title = f"mean of {average['tasks']} tasks" if system == "base" else ""
            found.append((title, "", label, *_cells(average["systems"][system], True)))
    return found


def _cells(figures: Mapping[str, Any], share: bool) -> tuple[str, ...]:
    """λ, the figure, its gain over base with its interval, wins and losses with the sign test's p."""
    weight, found = figures.get("lambda", DASH), figures.get("gain")
    at = f"{weight:g}" if is_number(weight) else str(weight)
    value = _figure(figures["value"], share)
    if found is None:
        return at, value, DASH, DASH
    counts = f"{found['wins']} : {found['losses']}, p {found['p']:.2g}" if "p" in found else DASH
    return at, value, _gain(found, share), counts


def _figure(value: float, share: bool = True) -> str:
    """Shares in percent, other figures as they are."""
    if not is_number(value):
        return DASH
    return f"{100 * value:.1f}" if share else f"{value:.4g}"


def _gain(found: Mapping[str, Any], share: bool = True) -> str:
    if not is_number(found["difference"]):
        return DASH
    scale, digits = (100, 1) if share else (1, 3)
    text = f"{scale * found['difference']:+.{digits}f}"
    if found.get("interval"):
        low, high = (f"{scale * bound:+.{digits}f}" for bound in found["interval"])
        text += f" ({low} … {high})"
    return text


def _notes(results: Mapping[str, Any]) -> list[str]:
    tasks = results["tasks"].values()
    sizes = sorted({task["validation"] for task in tasks})
    chosen_on = " to ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1])))
    notes = [
        f"Shares and gains in percent; λ chosen on each task's validation part ({chosen_on} examples).",
        f"Read through windows of {results['context']:,} tokens.",
    ]
    for task in tasks:
        if task.get("majority"):
            notes.append(f"{task['title']}: the commonest label alone has {_figure(task['majority'])}.")
        unusable = [
            f"{count} rows of {file}: {reason}"
            for file, rows in task.get("rows", {}).items()
            for reason, count in rows["unusable"].items()
        ]
        if unusable:
            notes.append(f"{task['title']}, not used: {'; '.join(unusable)}.")
        if long := task["longer_than_the_context"]:
            notes.append(f"{task['title']}: {long} examples longer than a window.")
        if empty := {system: count for system, count in task.get("empty_answers", {}).items() if count}:
            counted = ", ".join(f"{results['systems'][system]} {count}" for system, count in empty.items())
            notes.append(f"{task['title']}, nothing answered: {counted}.")
    return notes


def _pooled_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for task in results["tasks"].values():
        metric, found = task["main_metric"], task.get("one_lambda", {})
        share, cells = metric in task["shares"], []
        for system in results["one_lambda"]:
            if (one := found.get(system)) is None:
                cells.append(DASH)
                continue
            figure, gain = _figure(one[metric]["value"], share), _gain(one[metric]["gain"], share)
            cells.append(f"{figure} (λ {one['lambda']:g}), {gain}")
        if found:
            rows.append((f"{task['title']}, {metric}", *cells))
    return rows


def _plots(results: Mapping[str, Any]) -> list[Plot]:
    plots = []
    for task in results["tasks"].values():
        metric, series = task["main_metric"], []
        for system, label in results["systems"].items():
            if curve := task["systems"][system][metric].get("curve"):
                for part in ("validation", "test"):
                    if part in curve:
                        points = (tuple(curve["lambdas"]), tuple(curve[part]))
                        series.append(Series(f"{label}, {part}", *points))
        if series:
            plots.append(Plot(f"{task['title']} over λ", "λ", metric, tuple(series)))
    return plots


def _claims(results: Mapping[str, Any]) -> list[Claim]:
    if "base_plus_memory" not in results["systems"]:
        return []
    claims = []
    for name, paper in _PAPER.items():
        if (task := results["tasks"].get(name)) is not None:
            metric, share = task["main_metric"], task["main_metric"] in task["shares"]
            base, memory = (task["systems"][system][metric] for system in ("base", "base_plus_memory"))
            claims.append(
                _claim(
                    f"The memory improves {task['title']} ({metric})",
                    paper,
                    f"{_figure(base['value'], share)} → {_figure(memory['value'], share)}",
                    memory["gain"],
                    f"{task['test']:,} examples, {_size(results)}",
                    share,
                )
            )
    nine = results.get("nine")
    if nine:
        one = nine["systems"]["base_plus_memory"]
        base = nine["systems"]["base"]
        claims.append(
            _claim(
                "The memory improves zero-shot classification, the mean of nine tasks",
                "67.86 → 73.07",
                f"{_figure(base['value'])} → {_figure(one['value'])}, {nine['tasks']} of the nine",
                one["gain"],
                _size(results),
            )
        )
    if (task := results["tasks"].get("strategyqa")) is not None:
        base = task["systems"]["base"]["acc"]
        for system in ("knn_lm_exact", "knn_lm_scann"):
            if (one := task["systems"].get(system)) is not None:
                ours = f"{_figure(base['value'])} → {_figure(one['acc']['value'])}"
                size = f"{task['test']:,} examples, {_size(results)}"
                claim = f"{results['systems'][system]} harms StrategyQA (acc)"
                claims.append(_claim(claim, "harmed", ours, one["acc"]["gain"], size, harms=True))
    return claims


def _claim(
    claim: str,
    paper: str,
    ours: str,
    found: Mapping[str, Any],
    size: str,
    share: bool = True,
    harms: bool = False,
) -> Claim:
    bounds = found.get("interval")
    gain = Gain(found["difference"], tuple(bounds) if bounds else None, 0, 0, 0, 1.0)
    interval, held = f"gain {_gain(found, share)}" if bounds else "", verdict(gain)
    if harms:
        held = {"yes": "no", "no": "yes"}.get(held, held)
    return Claim(claim, paper, ours, interval, held, size, COMMAND)


def _size(results: Mapping[str, Any]) -> str:
    counts = results.get("parameters", {})
    return " + ".join(f"{name} {format_count(count)}" for name, count in counts.items() if is_number(count))
