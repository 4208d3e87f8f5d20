"""Line charts as inline SVG that takes its text colour from the page."""

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Matplotlib cannot say "the colour of the text around me", so it is given a colour that nothing
# else has, which becomes `currentColor` afterwards: the chart then follows light and dark pages.
_INK = "#010203"
# Of middling lightness: readable on white and on black. The last ones are harder to tell apart, and
# every line has a marker of its own besides.
_COLOURS = ("#3b78e7", "#d9730d", "#2f9e63", "#b254c4", "#c9414f", "#6b7f99")
_COLOURS += ("#0f9aa8", "#a37a00", "#d4569b", "#7a8f2a")
_MARKERS = "os^DvPX<>p"
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_LEVEL = "#8a8f98"
# A longer name would leave no room for the plot.
_LONGEST_NAME = 40
# More lines than this have their names below the plot: inside it they would hide the curves.
_MOST_NAMES_INSIDE = 3
_NAMES_ABREAST = 3


@final
@dataclass(frozen=True)
class Line:
    """A measured curve: its name and its points, `joined` unless they make no curve."""

    name: str
    x: tuple[float | int, ...]
    y: tuple[float | int, ...]
    joined: bool = True

    def __post_init__(self):
        if len(self.x) != len(self.y) or not self.x:
            raise ValueError(f"{self.name!r} has {len(self.x)} x and {len(self.y)} y: give pairs")


@final
@dataclass(frozen=True)
class Level:
    """A horizontal line: what a coder without a length reaches."""

    name: str
    y: float | int


@final
@dataclass(frozen=True)
class Chart:
    """Curves and levels over one axis.

    **Fields:**

    - `alt`: says in words what it shows.
    - `y_range`: of the vertical axis; None fits it to the curves and levels.
    - `frontier`: a curve that the lines are held against, drawn as a broad band behind them.
    - `ratios`: equal steps along the horizontal axis are equal ratios instead of differences.
    """

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    levels: tuple[Level, ...]
    alt: str
    y_range: tuple[float | int, float | int] | None = None
    frontier: Line | None = None
    ratios: bool = False

    def __post_init__(self):
        lines = self.lines if self.frontier is None else (self.frontier, *self.lines)
        if self.ratios and any(x <= 0 for line in lines for x in line.x):
            raise ValueError(f"{self.title!r} has ratios along an axis with x of 0 or less")


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Positions for labels, as near their heights as a gap between neighbours allows.

    Heights and positions are in 0..1; the order is kept. Labels that would touch are gathered in
    groups, each centred on the mean of its heights (pool adjacent violators).
    """
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    groups: list[list[int]] = []

    def low(group: list[int]) -> float:
        middle = sum(heights[index] for index in group) / len(group)
        half = gap * (len(group) - 1) / 2
        return min(max(middle - half, 0.0), 1.0 - 2 * half)

    for index in order:
        groups.append([index])
        while len(groups) > 1 and low(groups[-2]) + gap * len(groups[-2]) > low(groups[-1]):
            last = groups.pop()
            groups[-1].extend(last)
    positions = [0.0] * len(heights)
    for group in groups:
        for rank, index in enumerate(group):
            positions[index] = low(group) + gap * rank
    return positions


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _names(chart: Chart) -> int:
    return len(chart.lines) + (chart.frontier is not None)


def _height(chart: Chart) -> float:
    """In inches: room for names below the plot where there are many."""
    below = _names(chart) if _names(chart) > _MOST_NAMES_INSIDE else 0
    return 3.3 + 0.2 * -(-below // _NAMES_ABREAST)


def _draw_lines(axes: "Axes", chart: Chart) -> None:
    """The frontier as a band, and the lines on it."""
    if chart.frontier is not None:
        _draw(axes, chart.frontier, _INK, 9, marker="o", markersize=9, alpha=0.22, zorder=1.5)
    for index, line in enumerate(chart.lines):
        style: dict[str, Any] = {"markersize": 4}
        if chart.frontier is not None:
            # Strategies often find the very same: of rings around each other all can be seen.
            rings = min(len(chart.lines) - 1 - index, 6)
            style = {"markersize": 4 + 1.5 * rings, "markerfacecolor": "none"}
        _draw(
            axes,
            line,
            _COLOURS[index % len(_COLOURS)],
            1.8,
            dashes=_DASHES[index // len(_COLOURS) % len(_DASHES)],
            marker=_MARKERS[index % len(_MARKERS)],
            **style,
        )


def _draw(
    axes: "Axes", line: Line, colour: str, width: float | int, dashes: Any = "-", **style: Any
) -> None:
    linestyle = dashes if line.joined else "none"
    axes.plot(line.x, line.y, color=colour, linewidth=width, linestyle=linestyle, **style)
    axes.lines[-1].set_label(_short(line.name))


def _set_axes(axes: "Axes", chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if chart.ratios:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.margins(y=0.08)
    for level in chart.levels:
        axes.update_datalim([(0, level.y)], updatex=False)
    axes.autoscale_view(scalex=chart.ratios)
    if chart.y_range is not None:
        axes.set_ylim(*chart.y_range)
    axes.set_xlabel(_short(chart.x_label), parse_math=False)
    axes.set_ylabel(_short(chart.y_label), parse_math=False)
    axes.grid(color=_LEVEL, alpha=0.2, linewidth=0.6)


def _draw_names(figure: "Figure", axes: "Axes", chart: Chart) -> None:
    if _names(chart) < 2:
        return
    if _names(chart) <= _MOST_NAMES_INSIDE:
        legend = axes.legend(frameon=False, labelcolor=_INK)
    else:
        legend = figure.legend(
            frameon=False, labelcolor=_INK, loc="outside lower center", ncols=_NAMES_ABREAST
        )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _draw_levels(axes: "Axes", levels: Sequence[Level]) -> None:
    """Dashed lines, named to the right of the plot where they cannot hide a curve."""
    bottom, top = axes.get_ylim()
    heights = [(level.y - bottom) / (top - bottom) for level in levels]
    for level, height, place in zip(levels, heights, _spread(heights, 0.085), strict=True):
        axes.axhline(level.y, color=_LEVEL, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            _short(level.name),
            xy=(1.0, height),
            xytext=(1.035, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color=_INK,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": _LEVEL, "linewidth": 0.6, "shrinkB": 0},
            parse_math=False,
        )


def _inline(svg: str, alt: str) -> str:
    """What a page needs of an SVG file: no prologue, metadata or fixed size, but a description."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', svg)
    if view is None:
        raise ValueError("matplotlib wrote an SVG without a viewBox")
    head = f'<svg class="chart" {view.group()} role="img" aria-label="{html.escape(alt)}">'
    svg = re.sub(r"^<svg[^>]*>", lambda _: head, svg)
    return svg.replace("xlink:href", "href").replace(_INK, "currentColor").strip()


def render_chart(chart: Chart) -> str:
    """The chart as an `<svg>` element for a page, its text as text."""
    # Half a second to import, which nothing but a report needs. No pyplot: no global state.
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": chart.title,
        "font.size": 9,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.6, _height(chart)), layout="constrained")
        axes = figure.subplots()
        _draw_lines(axes, chart)
        _set_axes(axes, chart)
        _draw_names(figure, axes, chart)
        _draw_levels(axes, chart.levels)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _inline(buffer.getvalue(), chart.alt)
