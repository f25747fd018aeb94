"""The report's plots as inline SVG; the only importer of matplotlib.

A plot is a pure function of its numbers: no date, no path, no font file and no user
setting enters the SVG. Colours are written as CSS variables (`COLOUR_VARIABLES`), so one
SVG serves light and dark pages, and text is real text in the page's own typeface.
"""

import io
import itertools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from xml.sax.saxutils import quoteattr

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mlp_memory.evaluation.sections import Plot, Series
from mlp_memory.evaluation.table import SYSTEMS, format_figure, is_number, split_figures
from mlp_memory.shown import inert

MAX_POINTS = 300

# matplotlib wants a colour, the page wants a CSS value: each stand-in is unique and is
# replaced in the finished SVG.
_TEXT, _GRID, _PAGE = "#fe0001", "#fe0002", "#fe0003"
_COLOURS = {system: f"#fe00{16 + i:02x}" for i, system in enumerate(SYSTEMS)}
COLOUR_VARIABLES = {system: f"--{system.replace('_', '-')}" for system in SYSTEMS}
_CSS = {
    _TEXT: "currentColor",
    _GRID: "var(--grid)",
    _PAGE: "var(--card)",
    **{_COLOURS[system]: f"var({COLOUR_VARIABLES[system]})" for system in SYSTEMS},
}
# Lines of experiments take the systems' colours, the most different ones first.
_PALETTE = (
    "base_plus_memory",
    "knn_lm_exact",
    "joint",
    "decoder_equal_params",
    "base_plus_memory_gated",
    "base",
    "joint_gated",
    "knn_lm_scann",
)
_STROKES = ((None, None), (4, 2), (1, 1.5))
_DASHES = {"knn_lm_scann": (3, 1.5), "decoder_equal_params": (1, 1.5)}

# A viewBox of 331 units shows 10-unit text at a readable size on a phone (about 10 px)
# and in two columns of a desktop page (about 15 px).
_WIDTH_INCHES = 4.6
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mlp-memory",
    "text.parse_math": False,
    "font.size": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "axes.edgecolor": _GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "path.simplify": False,
}


def perplexity_plot(results: Mapping[str, Any], split: str = "test") -> str | None:
    """A dot with its interval per system, against base as a line; None without figures."""
    figures = split_figures(results, split)
    shown = [s for s in SYSTEMS if is_number(figures["perplexity"].get(s))]
    if not shown:
        return None
    with _style():
        figure = _figure(0.5 + 0.34 * len(shown))
        axes = figure.subplots()
        for height, system in enumerate(reversed(shown)):
            value, colour = figures["perplexity"][system], _COLOURS[system]
            interval = (figures.get("details", {}).get(system) or {}).get("interval") or ()
            if len(interval) == 2 and all(map(is_number, interval)):
                axes.plot(interval, [height, height], color=colour, linewidth=3, alpha=0.45)
            axes.plot([value], [height], "o", color=colour, markersize=7)
            axes.annotate(
                format_figure(value), (value, height), (0, 6), textcoords="offset points", ha="center", size=9
            )
        if "base" in shown:
            base = figures["perplexity"]["base"]
            axes.plot(
                [base, base], [-0.6, len(shown) - 1], color=_COLOURS["base"], linewidth=1, dashes=(3, 3)
            )
        axes.set_yticks(range(len(shown)), [SYSTEMS[s] for s in reversed(shown)])
        axes.set_ylim(-0.6, len(shown) - 0.3)
        axes.margins(x=0.12)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
        axes.set_xlabel(f"{split} perplexity (lower is better)")
        return _svg(figure, f"perplexity-{split}", f"Perplexity of each system on the {split} split")


def lambda_plot(curves: Mapping[str, Any]) -> str | None:
    """Perplexity against λ per system, the minimum marked; None without curves.

    Args:
      curves: `lambdas` [L] and, by system, perplexities [L].
    """
    lambdas = curves.get("lambdas") or []
    lines = {s: _series(zip(lambdas, curves[s])) for s in SYSTEMS if curves.get(s)}
    lines = {s: line for s, line in lines.items() if line}
    if not lines:
        return None
    with _style():
        figure = _figure(3.1)
        axes = figure.subplots()
        for system, line in lines.items():
            x, y = zip(*line)
            (drawn,) = axes.plot(x, y, color=_COLOURS[system], label=SYSTEMS[system])
            if system in _DASHES:
                drawn.set_dashes(_DASHES[system])
            best = min(line, key=lambda point: (point[1], point[0]))
            axes.plot(*best, "o", color=_COLOURS[system], markeredgecolor=_PAGE, markersize=7)
        # Near λ = 1 a sparse distribution's perplexity has no bound; what matters lies
        # at and below λ = 0.
        starts, lows = [line[0][1] for line in lines.values()], [min(p[1] for p in v) for v in lines.values()]
        spread = max(max(starts) - min(lows), 0.02 * max(starts))
        axes.set_ylim(min(lows) - 0.15 * spread, max(starts) + 0.8 * spread)
        axes.set_xlabel("λ, the weight of memory or neighbours")
        axes.set_ylabel("validation perplexity")
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        _legend(figure, axes)
        return _svg(figure, "lambda", "Validation perplexity against lambda, per system")


def stage_plot(stage: str, title: str, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Training loss against step, and below it the validation perplexities there are.

    Args:
      stage: the stage's name; makes the SVG's ids unique.
      title: what the plot shows, for screen readers.
      rows: lines of metrics.jsonl in file order; fields `step`, `loss` (nats a token) and,
        on evaluation steps, `validation_*`. A step that occurs twice (written again
        after an interruption) counts once, with its last values.

    Returns:
      The SVG; None where no row has a loss or a validation perplexity.
    """
    loss = metric_series(rows, "loss")
    validation = {
        name: series
        for name in sorted({key for row in rows for key in row if key.startswith("validation")})
        if name.endswith(("validation", "perplexity")) and (series := metric_series(rows, name))
    }
    if not loss and not validation:
        return None
    with _style():
        panels = bool(loss) + bool(validation)
        figure = _figure(2.0 * panels + 0.3)
        axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
        if loss:
            # One point is no line, and would not be seen without its mark.
            axes[0].plot(
                *zip(*thin(loss)),
                "o-" if len(loss) == 1 else "-",
                markersize=3.5,
                color=_COLOURS["base_plus_memory"],
                linewidth=1.2,
            )
            axes[0].set_ylabel("training loss")
        palette = itertools.cycle(("joint", "knn_lm_exact", "decoder_equal_params", "base"))
        for name, series in validation.items():
            label = name.removeprefix("validation_").replace("_", " ")
            axes[-1].plot(
                *zip(*thin(series)), "o-", color=_COLOURS[next(palette)], markersize=3.5, label=label
            )
        if validation:
            axes[-1].set_ylabel("validation ppl.")
            if len(validation) > 1:
                axes[-1].legend(loc="upper right")
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        for panel in axes:
            panel.yaxis.set_major_locator(MaxNLocator(5))
            panel.yaxis.set_major_formatter(FuncFormatter(_tick))
        figure.align_ylabels()
        return _svg(figure, f"stage-{stage}", title)


class LinePlot(NamedTuple):
    """The SVG, None where no point can be drawn, and what was left out of it."""

    svg: str | None
    notes: tuple[str, ...]


def line_plot(plot: Plot, name: str) -> LinePlot:
    """An experiment's lines, with bands where they have one.

    A point that is not finite, or not positive on a logarithmic axis, is left out and counted in the notes.

    Args:
      plot: any texts, any numbers.
      name: makes the SVG's ids unique.
    """
    lines = [(series, _drawable(series, plot)) for series in plot.series]
    missing = sum(len(series.x_N) - len(points_Px4) for series, points_Px4 in lines)
    why = "not finite, or not positive on a logarithmic axis" if plot.log_x or plot.log_y else "not finite"
    notes = (f"Left out: {missing:,} point{'s' if missing > 1 else ''}, {why}.",) if missing else ()
    lines = [(series, points_Px4) for series, points_Px4 in lines if len(points_Px4)]
    if not lines:
        return LinePlot(None, notes)
    with _style():
        labels = [_wrapped(series.name, 42) for series, _ in lines]
        figure = _figure(3.1 + 0.18 * sum(label.count("\n") + 1 for label in labels))
        axes = figure.subplots()
        handles = []
        for number, (series, points_Px4) in enumerate(lines):
            turn, place = divmod(number, len(_PALETTE))
            colour, (x, y, low, high) = _COLOURS[_PALETTE[place]], points_Px4.T
            if series.low_N:
                axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
            (drawn,) = axes.plot(
                x, y, "o-" if series.line else "o", color=colour, markersize=3.5 if len(x) <= 60 else 0.5
            )
            if turn:
                drawn.set_dashes(_STROKES[turn % len(_STROKES)])
            handles.append(drawn)
        axes.set_xscale("log" if plot.log_x else "linear")
        axes.set_yscale("log" if plot.log_y else "linear")
        whole = all((points_Px4[:, 0] == np.rint(points_Px4[:, 0])).all() for _, points_Px4 in lines)
        _ticks(axes.xaxis, plot.log_x, whole)
        _ticks(axes.yaxis, plot.log_y)
        axes.set_xlabel(_wrapped(plot.x, 46))
        axes.set_ylabel(_wrapped(plot.y, 30))
        if len(lines) > 1 or labels[0]:
            columns = 2 if max(map(len, labels)) <= 20 else 1
            figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.8)
        return LinePlot(_svg(figure, name, " ".join(inert(plot.title).split())), notes)


def _drawable(series: Series, plot: Plot) -> np.ndarray:
    """x, y and the band's ends of the points that can be drawn, float64 [P, 4], by x if joined."""
    ends = (series.low_N or series.y_N, series.high_N or series.y_N)
    points = list(zip(series.x_N, series.y_N, *ends))
    positive = (plot.log_x, plot.log_y, plot.log_y, plot.log_y)
    kept = [
        tuple(map(float, point))
        for point in points
        if all(is_number(value) and (value > 0 or not least) for value, least in zip(point, positive))
    ]
    return np.array(sorted(kept) if series.line else kept, np.float64).reshape(-1, 4)


def _ticks(axis: Axis, is_log: bool, whole: bool = False) -> None:
    """Few round ticks; between whole numbers none at a fraction."""
    if not is_log:
        axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10), integer=whole))
    else:
        low, high = axis.get_view_interval()
        # Over less than two decades whole powers alone would be one or two ticks.
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=7))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(_short_tick))


def _short_tick(value: float, place: int) -> str:
    """`20 M` for 20,000,000: parameters and tokens are this large, perplexities and shares are not."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size <= abs(value) < 1e15:
            return f"{value / min(size, 1e3 if unit == 'k' else size):.4g} {unit}"
    return _tick(value, place)


def _wrapped(text: str, width: int) -> str:
    """A label of a few short lines; a leading underscore would hide it from matplotlib's legend."""
    lines = textwrap.wrap(" ".join(inert(text).split()), width, max_lines=3, placeholder=" …")
    joined = "\n".join(lines)
    return f" {joined}" if joined.startswith("_") else joined


def metric_series(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have a finite `name`, by step; the last of a step counts."""
    return _series((row.get("step"), row.get(name)) for row in rows)


def thin(series: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points, each the mean of a run of neighbours; the series itself if short."""
    if len(series) <= limit:
        return list(series)
    points_Px2 = np.asarray(series, np.float64)
    return [tuple(map(float, part.mean(0))) for part in np.array_split(points_Px2, limit)]


def _series(pairs: Any) -> list[tuple[float, float]]:
    return sorted({float(x): float(y) for x, y in pairs if is_number(x) and is_number(y)}.items())


def _style() -> Any:
    # "default" first: a reader's own matplotlibrc must not change the report.
    return matplotlib.style.context(["default", _STYLE])


def _figure(height_inches: float) -> Figure:
    return Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, handlelength=1.8)


def _tick(value: float, _: int) -> str:
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.0e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{float(f'{value:.4g}'):g}"


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an `<svg>` element: ids prefixed with `name`, nothing that loads or dates."""
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue()
    width, height = (math.ceil(72 * inches) for inches in figure.get_size_inches())
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    body = body[body.index(">") + 1 :]
    # The ids of all the plots of a page share one name space.
    prefix = re.sub(r"[^a-z0-9]+", "-", name.lower())
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'\b(?:xlink:)?href="#', f'href="#{prefix}-', body)
    body = re.sub(r"url\(#", f"url(#{prefix}-", body)
    body = re.sub(r"font-family: [^;\"]*; ?", "", body)
    body = re.sub(r"#fe00[0-9a-f]{2}", lambda match: _CSS[match[0]], body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    return f'<svg role="img" aria-label={quoteattr(title)} viewBox="0 0 {width} {height}">{body.strip()}'
