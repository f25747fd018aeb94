"""The report page: one HTML file that needs no network, no script and no other file.

It is a pure function of the results, the training curves and the findings: the same numbers give the
same bytes, whatever the machine, the day or the order of keys. Only importer of jinja2.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mlp_memory.artifacts import Directory, canonical_json
from mlp_memory.evaluation import plots
from mlp_memory.evaluation.claims import measured_claims
from mlp_memory.evaluation.experiments import claim_rows, claim_summary, experiment_sections
from mlp_memory.evaluation.sample_cards import sample_card
from mlp_memory.evaluation.sections import Findings
from mlp_memory.evaluation.table import (
    SYSTEMS,
    format_count,
    format_figure,
    format_flops,
    headings,
    is_number,
    split_figures,
    table_notes,
    table_rows,
)
from mlp_memory.shown import inert
from mlp_memory.targets.certificate import certificate_lines
from mlp_memory.targets.overlap import audit_warnings

_STAGES = {
    "pretrain": "Decoder, pretraining",
    "distill": "Memory, distillation",
    "joint": "Decoder, joint training",
    "baseline": "Equal-size decoder, pretraining",
}
_MODELS = {
    "base": "base",
    "memory": "memory",
    "joint": "joint training, on top",
    "decoder_equal_params": "equal-size decoder",
}
# Below this relative change, one decimal of a per cent shows nothing.
_NO_CHANGE = 0.0005
_EXPERIMENTS = "What the experiments found."


def write_report(
    directory: Directory,
    results: Mapping[str, Any] | None,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    split: str = "test",
    findings: Sequence[Findings] = (),
) -> None:
    """Writes `index.html` into the reports folder.

    Args:
      directory: WORKDIR/reports.
      results: what `results.json` holds; any system or section may be absent. None where nothing was
        evaluated: the page then holds the findings.
      curves: lines of metrics.jsonl by stage (`pretrain`, `distill`, `joint`, `baseline`).
      split: the split of the headline and the table.
      findings: of benchmarks and studies, in the order of the page.

    Raises:
      UserError: the results have another schema or no such split, or the disk refuses.
    """
    page = report_html(results, curves, split, findings)
    directory.write("index.html", page.encode("utf-8", "backslashreplace"))


def report_html(
    results: Mapping[str, Any] | None,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    split: str = "test",
    findings: Sequence[Findings] = (),
) -> str:
    """The page as text; see `write_report`."""
    verdict, sentences = _EXPERIMENTS, []
    claims = [claim for each in findings for claim in each.claims]
    if results is not None:
        verdict, sentences = headline(results, split)
        claims = [*measured_claims(results, split), *claims]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text("utf-8"))
    return template.render(
        verdict=verdict,
        sentences=sentences,
        claims=claim_rows(claims),
        claim_summary=claim_summary(claims),
        sections=experiment_sections(findings),
        evaluated=None if results is None else _evaluated(results, split),
        stages=_stages(curves),
        colours=plots.COLOUR_VARIABLES,
    )


def _evaluated(results: Mapping[str, Any], split: str) -> dict[str, Any]:
    """What the page says of the pipeline's own evaluation."""
    systems = split_figures(results, split)["perplexity"]
    with_neighbors = any(system.startswith("knn") for system in systems)
    lambda_curves = (results.get("lambda_curves") or {}).get("validation") or {}
    return dict(
        split=split,
        headings=headings(split),
        rows=table_rows(results, split),
        with_neighbors=with_neighbors,
        others=_other_splits(results, with_neighbors),
        notes=table_notes(results, split),
        perplexity_svg=_svg(plots.perplexity_plot(results, split)),
        lambda_svg=_svg(plots.lambda_plot(lambda_curves)),
        certificate=[(inert(name), inert(text)) for name, text in _certificate(results)],
        differing=_differing(results),
        traced=any(sample.get("drawn_on") for sample in results.get("differing") or []),
        samples=[sample_card(sample) for sample in results.get("samples") or []],
        costs=_costs(results),
        corpus=_facts(results.get("corpus") or {}),
        config=canonical_json(results["config"]) if results.get("config") else "",
    )


def _other_splits(results: Mapping[str, Any], with_neighbors: bool) -> list[dict[str, Any]]:
    """The same table on validation and on the texts elsewhere."""
    chosen = "λ and τ were" if with_neighbors else "λ was"
    titles = {
        "validation": (
            "The same table on the validation split",
            f"{chosen} chosen here, so these figures flatter.",
        )
    }
    for name in results.get("elsewhere") or []:
        titles[name] = (
            f"The same table on another kind of text: {name}",
            f"Nothing was trained on it; {chosen} chosen on the validation split.",
        )
    return [
        {
            "title": title,
            "note": note,
            "headings": headings(name),
            "rows": table_rows(results, name),
            "notes": [] if name == "validation" else table_notes(results, name),
        }
        for name, (title, note) in titles.items()
        if name in results
    ]


def headline(results: Mapping[str, Any], split: str = "test") -> tuple[str, list[str]]:
    """The outcome in plain words: one verdict, then sentences; also when memory did not help.

    Raises:
      UserError: the results have another schema or no such split.
    """
    figures = split_figures(results, split)
    value = {s: v for s, v in figures["perplexity"].items() if s in SYSTEMS and is_number(v)}
    base, memory = value.get("base"), value.get("base_plus_memory")
    if base is None or memory is None:
        known = ", ".join(f"{SYSTEMS[s]} {format_figure(value[s])}" for s in SYSTEMS if s in value)
        return "Base and memory were not both evaluated.", [f"Perplexity: {known}."] if known else []
    weight = (figures.get("details", {}).get("base_plus_memory") or {}).get("lambda")
    sentences = []
    change = memory / base - 1
    if abs(change) < _NO_CHANGE:
        verdict = f"The memory makes no difference: perplexity stays at {format_figure(base)}."
    elif change < 0:
        verdict = (
            f"The memory lowers perplexity by {-change:.1%}, from {format_figure(base)} to "
            f"{format_figure(memory)}."
        )
    else:
        verdict = (
            f"The memory did not help: perplexity rises by {change:.1%}, from {format_figure(base)} to "
            f"{format_figure(memory)}."
        )
    if weight == 0:
        sentences.append("The best λ on validation was 0, so base + memory is base alone.")
    if "joint" in value:
        sentences.append(_joint_sentence(memory, value["joint"]))
    sentences += _knn_sentences(figures, value, base)
    if "decoder_equal_params" in value:
        sentences.append(_equal_size_sentence(value))
    return verdict, sentences


def _joint_sentence(memory: float, joint: float) -> str:
    change = joint / memory - 1
    if abs(change) < _NO_CHANGE:
        return f"Joint training makes no further difference ({format_figure(joint)})."
    if change < 0:
        return f"Joint training lowers it by a further {-change:.1%}, to {format_figure(joint)}."
    return f"Joint training did not help: it ends {change:.1%} higher, at {format_figure(joint)}."


def _knn_sentences(figures: Mapping[str, Any], value: Mapping[str, float], base: float) -> list[str]:
    gain = figures.get("gain_recovered") or {}
    of = gain.get("of") if gain.get("of") in value else next((s for s in value if s.startswith("knn")), None)
    if of is None:
        return []
    reached = f"{SYSTEMS[of]}, searching the whole datastore, reaches {format_figure(value[of])}"
    if value[of] >= base:
        return [f"{reached}: no better than base, so there was no gain to recover."]
    share = gain.get("share")
    if not is_number(share):
        return [f"{reached}."]
    if share <= 0:
        return [f"{reached}; the memory recovers none of that gain."]
    return [f"{reached}; the memory has {share:.0%} of that gain in log perplexity, without any search."]


def _equal_size_sentence(value: Mapping[str, float]) -> str:
    equal = value["decoder_equal_params"]
    ours = {"base + memory": value["base_plus_memory"]}
    if "joint" in value:
        ours["joint"] = value["joint"]
    text = f"A decoder of equal size, trained with as many FLOPs, reaches {format_figure(equal)}"
    beaten = [name for name, ppl in ours.items() if ppl < equal]
    if len(beaten) == len(ours):
        return f"{text}: worse than {' and '.join(beaten)}."
    if not beaten:
        return f"{text}: the memory is not the better use of those parameters here."
    return f"{text}: worse than {beaten[0]}, but not worse than {next(n for n in ours if n not in beaten)}."


def _certificate(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Measures of the teacher and what the audit warns of; none where there is no certificate."""
    certificate = results.get("certificate")
    if not certificate:
        return []
    warnings = audit_warnings(certificate["overlap"]) if certificate.get("overlap") else []
    return certificate_lines(certificate) + [tuple(line.split(": ", 1)) for line in warnings]


def _svg(text: str | None) -> Markup | None:
    # Made by plots.py, which escapes every label itself.
    return None if text is None else Markup(text)


def _stages(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Title, plot and last figures of each stage that logged anything, in the pipeline's order."""
    stages = []
    for stage in [*_STAGES, *sorted(set(curves) - set(_STAGES))]:
        rows = curves.get(stage) or []
        title = _STAGES.get(stage) or inert(stage)
        svg = plots.stage_plot(stage, title, rows)
        if svg is None:
            continue
        names = {key for row in rows for key in row if key == "loss" or key.startswith("validation")}
        last = {name: plots.metric_series(rows, name) for name in sorted(names)}
        final = [f"{name.replace('_', ' ')} {series[-1][1]:.4g}" for name, series in last.items() if series]
        steps = max(int(series[-1][0]) for series in last.values() if series)
        stages.append({"title": title, "svg": Markup(svg), "final": f"Step {steps:,}: {', '.join(final)}."})
    return stages


def _differing(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The contexts where the memory changed most, those it served best first."""
    titles = {"better": "Where the memory helped most", "worse": "Where it harmed most"}
    samples = results.get("differing") or []
    groups = [
        {"title": title, "samples": [sample_card(s) for s in samples if s.get("effect") == effect]}
        for effect, title in titles.items()
    ]
    return [group for group in groups if group["samples"]]


def _costs(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(model, parameters, training FLOPs) of each model and of base and memory together."""
    counts, flops = results.get("parameters") or {}, results.get("training_flops") or {}

    def total(of: Mapping[str, Any]) -> float | None:
        parts = [of.get("base"), of.get("memory")]
        return sum(parts) if all(map(is_number, parts)) else None

    lines = [
        (label, format_count(counts.get(name)), format_flops(flops.get(name)))
        for name, label in _MODELS.items()
        if name in counts or name in flops
    ]
    if total(counts) is not None:
        lines.insert(2, ("base + memory", format_count(total(counts)), format_flops(total(flops))))
    return lines


def _facts(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as sorted (dotted name, text) pairs."""
    pairs = []
    for name, value in sorted(facts.items()):
        label = inert(f"{prefix}{name.replace('_', ' ')}")
        if isinstance(value, Mapping):
            pairs += _facts(value, f"{label} · ")
        elif isinstance(value, int) and not isinstance(value, bool):
            pairs.append((label, f"{value:,}"))
        elif isinstance(value, float):
            pairs.append((label, f"{value:.4g}"))
        else:
            pairs.append(
                (label, inert(", ".join(map(str, value)) if isinstance(value, list) else str(value)))
            )
    return pairs
