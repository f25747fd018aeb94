"""What an experiment tells a reader, as data: claims, tables and plots that the report page draws.

An experiment (a benchmark run, a study) writes one `Findings` as JSON beside its own numbers; the
report knows nothing of experiments and draws whatever findings lie in the workdir.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper and what was measured for it.

    Attributes:
      claim: one sentence.
      paper: the paper's figure, with its size; "" where it gives none.
      ours: the figure measured.
      interval: 95 %, or what else bounds the figure; "" where nothing does.
      held: "yes", "no" or "unclear", at the size run.
      size: what it was run on: parameters, tokens, examples.
      command: what runs it again.
    """

    claim: str
    paper: str
    ours: str
    interval: str
    held: str
    size: str
    command: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells ready to print; the first column names the row, the others are set to the right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Series:
    """Points of one line; `low_N` and `high_N` draw a band where they are given, `line` joins the points."""

    name: str
    x_N: tuple[float, ...]
    y_N: tuple[float, ...]
    low_N: tuple[float, ...] = ()
    high_N: tuple[float, ...] = ()
    line: bool = True


@dataclasses.dataclass(frozen=True)
class Plot:
    """Lines over one pair of axes."""

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page: paragraphs, then tables, then plots."""

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that an experiment has to say."""

    claims: tuple[Claim, ...] = ()
    sections: tuple[Section, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Findings":
        """The findings that `to_json` wrote."""
        return cls(
            tuple(Claim(**claim) for claim in data["claims"]),
            tuple(_section(section) for section in data["sections"]),
        )


def _section(data: dict[str, Any]) -> Section:
    tables = [
        Table(t["title"], tuple(t["columns"]), tuple(map(tuple, t["rows"])), tuple(t["notes"]))
        for t in data["tables"]
    ]
    plots = [
        Plot(**{**p, "series": tuple(_series(s) for s in p["series"]), "notes": tuple(p["notes"])})
        for p in data["plots"]
    ]
    return Section(data["title"], tuple(data["text"]), tuple(tables), tuple(plots))


def _series(data: dict[str, Any]) -> Series:
    return Series(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})
