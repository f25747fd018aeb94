"""Claims and findings as the template draws them: texts made inert, plots as SVG."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from mlp_memory.evaluation.plots import line_plot
from mlp_memory.evaluation.sections import Claim, Findings, Table
from mlp_memory.shown import inert

_WORDS = {"yes": "held", "no": "not held", "unclear": "unclear"}


def claim_rows(claims: Sequence[Claim]) -> list[dict[str, str]]:
    """The cells of the claims table."""
    return [
        {
            "claim": inert(claim.claim),
            "paper": inert(claim.paper),
            "ours": inert(claim.ours),
            "interval": inert(claim.interval),
            "held": claim.held,
            "word": _WORDS[claim.held],
            "size": inert(claim.size),
            "command": inert(claim.command),
        }
        for claim in claims
    ]


def claim_summary(claims: Sequence[Claim]) -> str:
    """How many held, in a sentence."""
    counts = Counter(claim.held for claim in claims)
    parts = [f"{counts[held]} {_WORDS[held]}" for held in _WORDS if counts[held]]
    return f"{len(claims)} claim{'' if len(claims) == 1 else 's'}: {', '.join(parts)}."


def experiment_sections(findings: Sequence[Findings]) -> list[dict[str, Any]]:
    """Every section of every experiment, in their order."""
    sections = [section for each in findings for section in each.sections]
    return [
        {
            "title": inert(section.title),
            "text": [inert(paragraph) for paragraph in section.text],
            "tables": [_table(table) for table in section.tables],
            "plots": [
                {
                    "title": inert(plot.title),
                    "svg": Markup(drawn.svg) if drawn.svg else None,
                    "notes": [inert(note) for note in (*plot.notes, *drawn.notes)],
                }
                for number, plot in enumerate(section.plots)
                for drawn in [line_plot(plot, f"experiment-{place}-{number}")]
            ],
        }
        for place, section in enumerate(sections)
    ]


def _table(table: Table) -> dict[str, Any]:
    return {
        "title": inert(table.title),
        "columns": [inert(column) for column in table.columns],
        "rows": [[inert(cell) for cell in row] for row in table.rows],
        "notes": [inert(note) for note in table.notes],
    }
