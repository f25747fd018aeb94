"""The report page of a workdir: gathers what lies there and has it drawn, as often as one likes.

`evaluate` draws it when it ends and `python -m mlp_memory report` draws it again, once benchmarks or
studies have left findings. The page is in no manifest, so drawing it again changes no artifact.
"""

import json
from typing import Any

from mlp_memory.artifacts import Directory, UserError, first_line, peek, seal
from mlp_memory.evaluation.report import write_report
from mlp_memory.evaluation.sections import Findings
from mlp_memory.training.metrics import read_metrics

_CURVES = {
    "pretrain": ("decoder", "base"),
    "distill": ("memory", "base_plus_memory"),
    "joint": ("joint", "joint"),
    "baseline": ("baseline", "decoder_equal_params"),
}
"""Training -> its folder, and the system that was scored if the training belongs to these results."""

_HELD = ("yes", "no", "unclear")


def draw(workdir: Directory, results: dict[str, Any] | None) -> None:
    """Writes reports/index.html from these results, the trainings' curves and all findings.

    Args:
      workdir: whose.
      results: of its evaluation; None where there is none: benchmarks and studies are then all that is drawn.

    Raises:
      UserError: as `report.write_report` and `read_findings`, or there is nothing to draw.
    """
    findings = read_findings(workdir)
    if results is None and not findings:
        raise UserError(f"{workdir} holds no results: run `python -m mlp_memory evaluate` first, or a study")
    test = (results or {}).get("test")
    scored = test.get("perplexity") if isinstance(test, dict) else None
    scored = scored if isinstance(scored, dict) else {}  # what has another shape is refused below
    curves = {
        stage: read_metrics(workdir / folder)
        for stage, (folder, system) in _CURVES.items()
        if system in scored
    }
    reports = workdir / "reports"
    try:
        write_report(reports, results, curves, findings=findings)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, IndexError) as error:
        raise UserError(
            f"{workdir}: results or findings cannot be drawn ({first_line(error)}): run again what wrote them"
        ) from error
    if (made := peek(reports)) is not None and made.finished:
        seal(reports, made)


def read_results(workdir: Directory) -> dict[str, Any]:
    """What reports/results.json holds.

    Raises:
      UserError: it is missing or no JSON table.
    """
    data = (workdir / "reports").read("results.json")
    try:
        results = None if data is None else json.loads(data)
    except (ValueError, RecursionError):
        results = None
    if not isinstance(results, dict):
        state = "is missing" if data is None else "is damaged"
        raise UserError(f"{workdir}/reports/results.json {state}: delete its folder and run evaluate again")
    return results


def read_findings(workdir: Directory) -> tuple[Findings, ...]:
    """The findings of the benchmarks and of every study in the workdir, studies by name.

    Raises:
      UserError: a file is no `Findings`; it is named.
    """
    names = ["benchmarks/findings.json"]
    names += [f"studies/{study}/findings.json" for study in (workdir / "studies").folders()]
    read = ((name, workdir.read(name)) for name in names)
    return tuple(_parsed(data, f"{workdir}/{name}") for name, data in read if data is not None)


def _parsed(data: bytes, where: str) -> Findings:
    try:
        findings = Findings.from_json(json.loads(data))
        _check(findings)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{where} is damaged ({what}): delete it, or run again what wrote it") from error
    return findings


def _check(findings: Findings) -> None:
    """Raises `ValueError` for what JSON can say and the page cannot show."""
    for claim in findings.claims:
        if claim.held not in _HELD:
            raise ValueError(f"held is {claim.held!r}, not one of {', '.join(_HELD)}")
    for section in findings.sections:
        for table in section.tables:
            for row in table.rows:
                if len(row) != len(table.columns):
                    raise ValueError(
                        f"{table.title!r} has a row of {len(row)} cells, not {len(table.columns)}"
                    )
        for series in (series for plot in section.plots for series in plot.series):
            lengths = {len(series.x_N), len(series.y_N)}
            lengths |= {len(ends) for ends in (series.low_N, series.high_N) if ends}
            if len(lengths) != 1 or bool(series.low_N) != bool(series.high_N):
                raise ValueError(f"the series {series.name!r} has lists of unequal lengths")
