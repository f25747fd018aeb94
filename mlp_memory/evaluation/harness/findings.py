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


def findings(results: Mapping[str, Any]) -> Findings:
    """Of a results.json of `stage`."""
    tables = [Table("At each task's own λ", _columns(results), tuple(_rows(results)), tuple(_notes(results)))]
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
    return "\n".join([*boxed([_columns(results), *_rows(results)]), *_notes(results), ""])


def _columns(results: Mapping[str, Any]) -> tuple[str, ...]:
    systems = results["systems"]
    others = [cell for name, label in systems.items() if name != "base" for cell in (label, "gain")]
    return ("task", "metric", "examples", systems["base"], *others)


def _rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    found = []
    for task in results["tasks"].values():
        main = task["main_metric"]
        for metric in (main, *(metric for metric in task["metrics"] if metric != main)):
            cells = [task["title"] if metric == main else "", metric, f"{task['test']:,}"]
            for system in results["systems"]:
                cells += _cells(task["systems"][system][metric], system == "base")
            found.append(tuple(cells))
    if average := results.get("average"):
        cells = [f"mean of {average['tasks']}", "", ""]
        for system in results["systems"]:
            one = average["systems"][system]
            cells += [_percent(one["value"])] + ([] if system == "base" else [_gain(one["gain"])])
        found.append(tuple(cells))
    return found


def _cells(figures: Mapping[str, Any], base: bool) -> list[str]:
    if base:
        return [_percent(figures["value"])]
    weight = figures["lambda"]
    at = "gate" if weight == "gate" else f"λ {weight:g}"
    return [f"{_percent(figures['value'])} ({at})", _gain(figures["gain"])]


def _percent(value: float) -> str:
    """Shares in percent, other figures as they are."""
    if not is_number(value):
        return DASH
    return f"{100 * value:.1f}" if 0 <= value <= 1 else f"{value:.2f}"


def _gain(found: Mapping[str, Any]) -> str:
    text = f"{100 * found['difference']:+.1f}"
    if found.get("interval"):
        text += " ({:+.1f} … {:+.1f})".format(*(100 * bound for bound in found["interval"]))
    return text + (f" p {found['p']:.2g}" if "p" in found else "")


def _notes(results: Mapping[str, Any]) -> list[str]:
    tasks = results["tasks"].values()
    notes = [
        "Shares and gains in percent; λ chosen on each task's validation part "
        f"({min(t['validation'] for t in tasks):,} to {max(t['validation'] for t in tasks):,} examples).",
        f"Read through windows of {results['context']:,} tokens.",
    ]
    for task in tasks:
        if task.get("majority"):
            notes.append(f"{task['title']}: the commonest label alone has {_percent(task['majority'])}.")
        unusable = [
            f"{count} rows of {file}: {reason}"
            for file, rows in task.get("rows", {}).items()
            for reason, count in rows["unusable"].items()
        ]
        if unusable:
            notes.append(f"{task['title']}, not used: {'; '.join(unusable)}.")
        if task["longer_than_the_context"]:
            notes.append(f"{task['title']}: {task['longer_than_the_context']} examples longer than a window.")
    return notes


def _pooled_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for task in results["tasks"].values():
        if found := task.get("one_lambda"):
            figures = [found.get(system) for system in results["one_lambda"]]
            cells = [
                f"{_percent(one[task['main_metric']]['value'])} (λ {one['lambda']:g}) "
                f"{_gain(one[task['main_metric']]['gain'])}"
                if one
                else DASH
                for one in figures
            ]
            rows.append((f"{task['title']}, {task['main_metric']}", *cells))
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
            metric = task["main_metric"]
            base, memory = (task["systems"][system][metric] for system in ("base", "base_plus_memory"))
            claims.append(
                _claim(
                    f"The memory improves {task['title']} ({metric})",
                    paper,
                    f"{_percent(base['value'])} → {_percent(memory['value'])}",
                    memory["gain"],
                    f"{task['test']:,} examples, {_size(results)}",
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
                f"{_percent(base['value'])} → {_percent(one['value'])}, {nine['tasks']} of the nine",
                one["gain"],
                _size(results),
            )
        )
    return claims


def _claim(claim: str, paper: str, ours: str, found: Mapping[str, Any], size: str) -> Claim:
    bounds = found.get("interval")
    gain = Gain(found["difference"], tuple(bounds) if bounds else None, 0, 0, 0, 1.0)
    interval = f"gain {_gain(found)}" if bounds else ""
    return Claim(claim, paper, ours, interval, verdict(gain), size, COMMAND)


def _size(results: Mapping[str, Any]) -> str:
    counts = results.get("parameters", {})
    return " + ".join(f"{name} {format_count(count)}" for name, count in counts.items() if is_number(count))
