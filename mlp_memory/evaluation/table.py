"""The results table, from `results.json`: for a terminal, for Markdown, and as cells.

A system that is absent from the results has no row.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlp_memory.artifacts import UserError

SCHEMA = 1
DASH = "–"

# Every system that can be in the results, in the order of the table.
SYSTEMS: dict[str, str] = {
    "base": "base",
    "knn_lm_exact": "kNN-LM (exact)",
    "knn_lm_scann": "kNN-LM (ScaNN)",
    "base_plus_memory": "base + memory",
    "base_plus_memory_gated": "base + memory, gated",
    "joint": "joint",
    "joint_gated": "joint, gated",
    "decoder_equal_params": "equal-size decoder",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One system's cells, ready to print; `best` marks the lowest perplexity."""

    system: str
    label: str
    perplexity: str
    interval: str
    per_word: str
    weight: str
    parameters: str
    best: bool

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells in the order of `headings`."""
        return self.label, self.perplexity, self.interval, self.per_word, self.weight, self.parameters


def headings(split: str = "test") -> tuple[str, ...]:
    """The table's column heads."""
    return "system", f"perplexity ({split})", "95% interval", "per word", "λ", "parameters"


def table_rows(results: Mapping[str, Any], split: str = "test") -> list[Row]:
    """The table as text cells, one `Row` per system of `SYSTEMS` that was evaluated.

    Raises:
      UserError: `results` has another schema or no such split.
    """
    figures = split_figures(results, split)
    values = figures["perplexity"]
    known = {s: values[s] for s in SYSTEMS if is_number(values.get(s))}
    best = min(known, key=known.__getitem__) if known else None
    rows = []
    for system, label in SYSTEMS.items():
        if system not in values:
            continue
        detail = figures.get("details", {}).get(system) or {}
        interval = detail.get("interval") or (None, None)
        weight, mean = detail.get("lambda"), detail.get("mean_lambda")
        rows.append(
            Row(
                system=system,
                label=label,
                perplexity=format_figure(known.get(system)),
                interval=f"{format_figure(interval[0])} … {format_figure(interval[1])}"
                if all(map(is_number, interval))
                else DASH,
                per_word=format_figure(detail.get("per_word")),
                weight=f"{weight:g}" if is_number(weight) else f"⌀ {mean:.2f}" if is_number(mean) else DASH,
                parameters=_parameters(results, system) if system in known else DASH,
                best=system == best,
            )
        )
    return rows


def results_table(results: Mapping[str, Any], split: str = "test") -> str:
    """The table for a terminal, with the notes of `table_notes` below; ends in a newline.

    Raises:
      UserError: see `table_rows`.
    """
    lines = [headings(split), *(row.cells for row in table_rows(results, split))]
    return "\n".join([*boxed(lines), *table_notes(results, split), ""])


def boxed(lines: Sequence[Sequence[str]]) -> list[str]:
    """Cells as lines of a box: the first are the heads; the first column stands left, the others right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:]))]
        return f"│ {' │ '.join(padded)} │"

    def rule(left: str, middle: str, right: str) -> str:
        return left + middle.join("─" * (width + 2) for width in widths) + right

    return [
        rule("┌", "┬", "┐"),
        line(lines[0]),
        rule("├", "┼", "┤"),
        *map(line, lines[1:]),
        rule("└", "┴", "┘"),
    ]


def markdown_table(results: Mapping[str, Any], split: str = "test") -> str:
    """The table in Markdown, the lowest perplexity in bold; ends in a newline.

    Raises:
      UserError: see `table_rows`.
    """
    head = headings(split)
    lines = [head, ("---", *["---:"] * (len(head) - 1))]
    for row in table_rows(results, split):
        cells = list(row.cells)
        if row.best:
            cells[1] = f"**{cells[1]}**"
        lines.append(tuple(cells))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def table_notes(results: Mapping[str, Any], split: str = "test") -> list[str]:
    """What the table's numbers rest on, a sentence each: tokens, words, intervals, k, τ, recall, gain."""
    figures = split_figures(results, split)
    details = [d for d in figures.get("details", {}).values() if d]
    notes = []
    tokens = sorted({d["scored_tokens"] for d in details if d.get("scored_tokens")})
    if tokens:
        counted = " or ".join(f"{count:,}" for count in tokens)
        chosen = "λ and τ" if any(d.get("tau") for d in details) else "λ"
        notes.append(f"{counted} scored tokens, {split} split; {chosen} chosen on validation.")
    words = sorted({d["words"] for d in details if d.get("words")})
    if words and figures.get("word_count"):
        counted = " or ".join(f"{count:,}" for count in words)
        notes.append(f"Per word: {counted} words, counted as {figures['word_count']}.")
    methods = sorted({d["interval_method"] for d in details if d.get("interval_method")})
    if methods:
        notes.append(f"Interval: {'; '.join(methods)}.")
    for system in ("knn_lm_exact", "knn_lm_scann"):
        detail = figures.get("details", {}).get(system) or {}
        if is_number(detail.get("k")) and is_number(detail.get("tau")):
            notes.append(f"{SYSTEMS[system]}: k = {detail['k']:,}, τ = {detail['tau']:g}.")
    differences = figures.get("differences") or {}
    for name, other in itertools.product(SYSTEMS, repeat=2):
        difference = differences.get(f"{name} - {other}")
        if difference is None:
            continue
        if other != "base" or name.endswith("_gated"):
            low, high = difference["interval"]
            notes.append(
                f"{SYSTEMS[name]} against {SYSTEMS[other]}, on the same tokens: "
                f"{difference['nats']:+.4f} nats a token ({low:+.4f} … {high:+.4f})."
            )
    recall = results.get("recall") or {}
    if is_number(recall.get("value")):
        notes.append(f"ScaNN recall@{recall.get('k')}: {recall['value']:.3f}.")
    gain = figures.get("gain_recovered") or {}
    if is_number(gain.get("share")):
        of = SYSTEMS.get(gain.get("of"), "kNN-LM")
        notes.append(f"Gain of {of} in log perplexity that the memory recovers: {gain['share']:.1%}.")
    return notes


def split_figures(results: Mapping[str, Any], split: str) -> Mapping[str, Any]:
    """The figures of one split.

    Raises:
      UserError: `results` has another schema or no such split.
    """
    if results.get("schema") != SCHEMA:
        raise UserError(
            f"results have schema {results.get('schema')!r}, this version reads {SCHEMA}: run evaluate again"
        )
    if not isinstance(results.get(split), Mapping) or "perplexity" not in results[split]:
        raise UserError(f"results have no split {split!r}: run evaluate again")
    return results[split]


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number (and not a bool)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def format_figure(value: Any) -> str:
    """A perplexity with four significant digits (`2.243`, `224.3`, `12,345`); a dash for None."""
    if not is_number(value):
        return DASH
    decimals = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.2e}" if abs(value) >= 1e7 else f"{value:,.{min(decimals, 6)}f}"


def format_count(value: Any) -> str:
    """A count for people: `812`, `9,120`, `12.3 M`, `1.55 B`; a dash for None."""
    if not is_number(value):
        return DASH
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        # 0.9995: the point above which three digits round up into the next unit.
        if abs(value) >= 0.9995 * size:
            scale = 1e3 if unit == "k" else size
            return f"{_three_digits(value / scale)} {unit}"
    return f"{value:,.0f}"


def format_flops(value: Any) -> str:
    """FLOPs in scientific notation: `1.23 × 10¹⁵`; a dash for None."""
    if not is_number(value):
        return DASH
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(str.maketrans('0123456789-', '⁰¹²³⁴⁵⁶⁷⁸⁹⁻'))}"


def _three_digits(value: float) -> str:
    return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"


def _parameters(results: Mapping[str, Any], system: str) -> str:
    counts = results.get("parameters") or {}
    if system == "decoder_equal_params":
        return format_count(counts.get(system))
    if system.removesuffix("_gated") in ("base_plus_memory", "joint"):
        parts = [counts.get("base"), counts.get("memory")]
        return format_count(sum(parts)) if all(map(is_number, parts)) else DASH
    text = format_count(counts.get("base"))
    return f"{text} + datastore" if system.startswith("knn") and text != DASH else text
