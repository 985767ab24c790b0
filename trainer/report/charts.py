"""SVG charts for a page: text in the page's font, and every colour with its own marker and line style.

The same numbers give the same bytes. Colours are Okabe and Ito's palette for colour-blind readers. Charts are
small enough for a phone.
"""

import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe, Ito (2008), "Color universal design"; without the yellow, which is too pale on white.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
)  # fmt: skip
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", (0, (1, 1.2)))
INK, QUIET, BACKGROUND, FAINT = "#1f2328", "#57606a", "#a9b2bc", "#d8dee4"
VERDICT = {"rises": (BLUE, "o"), "falls": (VERMILLION, "D"), "unclear": (QUIET, "s")}

WIDTH, HEIGHT = 4.2, 2.6  # inches of 72 px
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # for the layout; the page's own font is narrower
    "font.size": 9.5,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "path.simplify": True,
    "text.parse_math": False,  # a dollar in a name is a dollar
}


class Point(NamedTuple):
    """Value at an iteration; `low` and `high` bound its interval, if known."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


class Line(NamedTuple):
    """Named series."""

    label: str
    points: Sequence[Point]


class Bar(NamedTuple):
    """Row of a forest plot: an estimate with its interval."""

    label: str
    value: float
    low: float | None
    high: float | None
    verdict: str
    summary: bool = False  # of several rows; a diamond


class Strand(NamedTuple):
    """Trial in parallel coordinates: a height from 0 to 1 on each axis, None without a value."""

    label: str
    heights: Sequence[float | None]
    shade: float | None  # 0 to 1: worst to best; None: without a result
    best: bool = False


def curves(
    name: str,
    alt: str,
    lines: Sequence[Line],
    *,
    zero: bool = True,
    mark: float | None = None,
    chosen: str = "",
) -> Markup:
    """Plot lines over iterations with their bands, and a dotted vertical line at `mark`.

    With `chosen`, a label, the other lines are grey background.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _figure(WIDTH, HEIGHT)
        if zero:
            axes.axhline(0, color=QUIET, linewidth=0.8)
        for index, line in enumerate(sorted(lines, key=lambda it: it.label == chosen) if chosen else lines):
            if chosen and line.label != chosen:
                x, y = [p.x for p in line.points], [p.y for p in line.points]
                axes.plot(x, y, color=BACKGROUND, linewidth=1.2, label=None if index else "others")
            else:
                _line(axes, 0 if chosen else index, line, alone=len(lines) == 1 or bool(chosen))
        if mark is not None:
            axes.axvline(mark, color=QUIET, linewidth=1.2, linestyle=":")
        axes.set_xlabel("iterations")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.03)
        axes.grid(axis="y", color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        if len(lines) > 1:
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9, borderpad=0
            )
        return _svg(figure, name, alt)


def _line(axes: Axes, index: int, line: Line, *, alone: bool) -> None:
    colour = COLOURS[index % len(COLOURS)]
    points = sorted(line.points)
    bounded = [(p.x, p.low, p.high) for p in points if p.low is not None and p.high is not None]
    if bounded:
        x, low, high = zip(*bounded, strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.18 if alone else 0.1, linewidth=0)
    axes.plot(
        [p.x for p in points],
        [p.y for p in points],
        color=colour,
        linestyle=DASHES[(index if not alone else 0) % len(DASHES)],
        marker=MARKERS[index % len(MARKERS)] if len(points) <= 40 else None,
        label=_short(line.label, 24),
    )


def forest(name: str, alt: str, rows: Sequence[Bar], unit: str) -> Markup:
    """Plot an estimate and its interval on each row, with a line at 0."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure(WIDTH, 0.72 + 0.3 * len(rows))
        axes.axvline(0, color=QUIET, linewidth=1)
        for y, row in enumerate(rows):
            colour, marker = VERDICT.get(row.verdict, VERDICT["unclear"])
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [y, y], color=colour, linewidth=2.4, solid_capstyle="round")
            size = 9 if row.summary else 6
            axes.plot([row.value], [y], marker="D" if row.summary else marker, color=colour, markersize=size)
        axes.set_yticks(range(len(rows)), [_short(row.label, 26) for row in rows])
        for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
            tick.set_color(INK if row.summary else QUIET)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.06)
        axes.grid(axis="x", color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_xlabel(unit)
        return _svg(figure, name, alt)


def bars(name: str, alt: str, values: Sequence[tuple[str, float]], unit: str) -> Markup:
    """Plot one bar a row with its share beside it."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure(WIDTH, 0.72 + 0.32 * len(values))
        places = range(len(values))
        axes.barh(places, [value for _, value in values], color=BLUE, height=0.56)
        for place, (_, value) in zip(places, values, strict=True):
            axes.annotate(
                f"{value:.0%}", (value, place), (4, 0), textcoords="offset points", va="center", color=INK
            )
        axes.set_yticks(places, [_short(label, 30) for label, _ in values])
        axes.set_ylim(len(values) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 1.18 * max((value for _, value in values), default=1) or 1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(unit)
        return _svg(figure, name, alt)


def parallel(
    name: str, alt: str, axes_labels: Sequence[tuple[str, str, str]], strands: Sequence[Strand]
) -> Markup:
    """Plot trials as lines across vertical axes (label, lowest, highest); the best is bold and on top."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure(max(WIDTH, 1.9 * len(axes_labels) + 0.6), 3.4)
        shades = mpl.colormaps["cividis"]
        order = sorted(strands, key=lambda it: (it.best, -1.0 if it.shade is None else it.shade))
        for strand in order:
            at = [(x, y) for x, y in enumerate(strand.heights) if y is not None]
            without = strand.shade is None
            colour = VERMILLION if strand.best else QUIET if without else shades(0.9 * (strand.shade or 0.0))
            axes.plot(
                *zip(*at, strict=True),
                color=colour,
                linewidth=3 if strand.best else 1.4,
                linestyle=":" if without else "-",
                marker="D" if strand.best else "o",
                markersize=6 if strand.best else 3,
                alpha=0.7 if without else 1,
            )
        for x, (_, low, high) in enumerate(axes_labels):
            axes.plot([x, x], [0, 1], color=QUIET, linewidth=0.8, zorder=0)
            axes.annotate(
                low, (x, 0), (0, -9), textcoords="offset points", ha="center", va="top", color=QUIET
            )
            axes.annotate(high, (x, 1), (0, 9), textcoords="offset points", ha="center", color=QUIET)
        axes.set_xlim(-0.45, len(axes_labels) - 0.55)
        axes.set_ylim(-0.16, 1.14)
        axes.set_xticks(
            range(len(axes_labels)),
            [_short(label.replace(".", ".\n", 1), 40) for label, _, _ in axes_labels],
        )
        axes.tick_params(length=0)
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
        return _svg(figure, name, alt)


# ----------------------------------------------------------------------------------------------- svg


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _svg(figure: Figure, name: str, alt: str) -> Markup:
    """Return the figure as an <svg> element with ids that are unique in the page."""
    buffer = io.StringIO()
    # Lay out once; savefig would render everything a second time to do it again.
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.execute(figure)
    figure.set_layout_engine("none")
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    for unused in (r"<metadata>.*?</metadata>", r"<style[^>]*>.*?</style>", r"<!--.*?-->"):
        body = re.sub(unused, "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    # The font is the page's; only the size is the chart's.
    body = re.sub(r"font: (?:\d+ )?([\d.]+px)[^;\"]*", r"font-size: \1", body)
    width, height = (72 * side for side in figure.get_size_inches())
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{math.ceil(width)}" role="img" '
        f'aria-label="{escape(alt)}" stroke-linejoin="round">{body}</svg>'
    )


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"
