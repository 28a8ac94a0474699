"""What all figures share: colours, axes, a point with its interval, titles and legends."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, Locator, LogLocator, NullLocator, StrMethodFormatter

from studylib.config import capital
from studylib.evidence import FULL, Array, Cell, Cells, Interval, Measure, identity
from studylib.methods import METHODS, Look, method_title

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
LINES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
HALO = withStroke(linewidth=2, foreground="white")
DISTANCES = (6, 10, 15, 20, 28, 38, 50, 65, 85, 110)  # points at which a label may stand from what it names
LEADER = 12  # points from which on a line leads from a label to what it names
CLEAR = 4  # points that stay free around a label
LINE_STEP = 8  # points of length between the places of a line that labels avoid
OFF_SCALE = 8  # perplexities above this many times full precision's stand at the edge with an arrow and their value


class NotebookFigure(Figure):
    """A figure that a notebook shows when a cell ends with it, without pyplot's global state."""

    def savefig(self, file: str | Path | BinaryIO, **settings) -> None:
        """As Figure's, but an SVG has no date and no random names: a figure drawn again has the same bytes."""
        if "svg" in (settings.get("format"), str(file)[-3:]):
            settings["metadata"] = {"Date": None}
        with rc_context({"svg.hashsalt": "studylib"}):
            super().savefig(file, **settings)

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()


def new_panels(
    count: int, width: float, height: float, sharey: bool = False, rows: int = 1
) -> tuple[Figure, list[Axes]]:
    figure = NotebookFigure(figsize=(width, height), layout="constrained", dpi=110)
    columns = -(-count // rows)
    axes = list(figure.subplots(rows, columns, sharex=rows > 1, sharey=sharey, squeeze=False).flat)
    while len(axes) > count:
        axes.pop().remove()
    for ax in axes[-columns:]:
        ax.tick_params(labelbottom=True)  # also above a place that is left empty
    for ax in axes:
        ax.grid(color="#E8E8E8", lw=0.7)
        ax.set_axisbelow(True)
    return figure, axes


def plain_ticks(axis: Axis, at: Locator | None = None) -> None:
    """1, 2, 5, 10, ... on a log axis, or what `at` finds, without powers of ten."""
    axis.set_major_locator(at or LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def draw_times(ax: Axes, measure: Measure, reference: Cell) -> None:
    """Make the vertical axis that of a perplexity beside the reference's, on a log scale."""
    ax.set_yscale("log")
    plain_ticks(ax.yaxis, FixedLocator((0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 1.7, 2, 2.5, 3, 4, 5, 6, 8)))
    ax.set_ylabel(f"{capital(measure.title)},\ntimes that of {reference.title} (log scale, lower is better)")


def axis_title(measure: Measure, scale: str = "") -> str:
    if measure.is_perplexity:
        return f"{capital(measure.title)} ({scale}lower is better)"
    return f"{capital(measure.short_title)}, % (higher is better)"


def empty_figure(why: str) -> Figure:
    figure, (ax,) = new_panels(1, width=6, height=2)
    ax.set_axis_off()
    set_title(figure, why)
    return figure


def set_title(figure: Figure, text: str) -> None:
    width = int(figure.get_figwidth() * 10.8)
    lines = textwrap.wrap(text, width, break_on_hyphens=False)  # which bits such as 4-8-4 have
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10.5, fontweight="bold")


def finish(figure: Figure, title: str, cells: Cells, *further: Line2D) -> None:
    """Give the figure its title, and a legend of the methods of `cells` and of `further`."""
    handles = [
        Line2D([], [], **marker_style(method), ls="", label=method_title(method)) for method in present_methods(cells)
    ]
    figure.legend(handles=[*handles, *further], loc="outside lower center", ncols=5, title="Bars: 95% intervals")
    set_title(figure, title)


def present_methods(cells: Cells) -> list[str]:
    """The names of the methods of `cells` in the order of tables and legends; last, those that are not registered."""
    names, known = dict.fromkeys(cell.method for cell in cells.values()), list(METHODS)
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def look_of(method: str) -> Look:
    """How a method is drawn; as any other is, where it is not registered here."""
    return METHODS[method].look if method in METHODS else Look()


def marker_style(method: str) -> dict[str, Any]:
    """Colour, marker and filling; marker and filling tell methods apart in grey."""
    look = look_of(method)
    return {"color": look.colour, "marker": look.marker, "mfc": "#FFFFFF" if look.hollow else look.colour}


def draw_point(ax: Axes, x: float, y: float, method: str, found: Interval, axis: str, limit: float) -> None:
    """A marker with its interval along `axis`, cut at `limit`; an arrow head where the value itself lies beyond it."""
    beyond, style = found.estimate > limit, marker_style(method)
    if not beyond:
        low, high = max(0, found.estimate - found.low), max(0, min(found.high, limit) - found.estimate)
        bar = {f"{axis}err": [[low], [high]], "color": style["color"], "lw": 1.2, "capsize": 2, "zorder": 2}
        ax.errorbar(x, y, **bar, alpha=0.4 if axis == "y" else 1)  # points of equal size stand behind each other
    if beyond:
        style["marker"] = {"x": ">", "y": "^"}[axis]
    ax.plot(x, y, **style, ms=5.5, ls="", zorder=3)


def draw_row_point(ax: Axes, cell: Cell, measure: Measure, row: float, limit: float) -> None:
    if not cell.records:
        say_diverged(ax, cell, row)
        return
    found = measure.interval(identity, cell)
    x = min(found.estimate, limit)
    draw_point(ax, x, row, cell.method, found, "x", limit)
    ax.annotate(
        measure.text(found.estimate),
        (x if found.estimate > limit else min(found.high, limit), row),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        color=look_of(cell.method).colour,
        path_effects=[HALO],
    )


def say_diverged(ax: Axes, cell: Cell, row: float) -> None:
    ax.text(0.99, row, f"{method_title(cell.method)} diverged", transform=ax.get_yaxis_transform(), ha="right",
            va="center", fontsize=7.5, color=look_of(cell.method).colour)  # fmt: skip


def name_rows(ax: Axes, names: Sequence[str], **style) -> None:
    """Rows 0, 1, 2, ... of the axes, by name, the first on top. style: of their labels."""
    ax.set_yticks(range(len(names)), names, **style)
    ax.set_ylim(len(names) - 0.5, -0.5)


def draw_reference(ax: Axes, cells: Cells, measure: Measure) -> None:
    """Full precision as a line with its interval as a band."""
    full = cells.get(FULL)
    if full and full.records:
        found = measure.interval(identity, full)
        ax.axvspan(found.low, found.high, color="#000000", alpha=0.06, lw=0, zorder=0)
        ax.axvline(found.estimate, color="#000000", lw=1, zorder=1)
        ax.plot(found.estimate, 1, marker="D", ms=5, color="#000000", transform=ax.get_xaxis_transform(), clip_on=False)


def off_scale(cells: Cells, measure: Measure) -> float:
    """Where the scale ends: OFF_SCALE times the best perplexity, if any is above that; accuracies have no end."""
    if not measure.is_perplexity:
        return np.inf
    found = [measure.interval(identity, cell) for cell in cells.values() if cell.records]
    return min(max(interval.high for interval in found), min(interval.estimate for interval in found) * OFF_SCALE)


def draw_best(ax: Axes, x: Sequence[float], y: Sequence[float]) -> Line2D:
    """The dashed line through those that nothing is both smaller and better than; its own handle in a legend."""
    (line,) = ax.plot(x, y, color="#888888", lw=1, ls="--", label="best for its size", zorder=1)
    return line


def move_apart(ax: Axes, texts: list[Text], x: Sequence[float], y: Sequence[float], line: Line2D | None = None) -> None:
    """Put each label where it covers least: of the points (x, y), of `line` and of other labels; a thin line leads to
    where it stood, if that is far. Twice in turn, so that the first know of the last; limits must be settled."""
    if not texts:
        return
    ax.figure.draw_without_rendering()  # before that, limits and lengths on the page are not settled
    to_page, points = ax.transData, ax.figure.dpi / 72
    places = np.column_stack([x, y])
    if line:
        places = np.concatenate([places, _places_along(line)])
    places = to_page.transform(places)
    anchors = to_page.transform([text.get_position() for text in texts])
    sizes = np.array([text.get_window_extent().size for text in texts])
    corners: dict[int, Array] = {}  # the lower left one of each label that has a place
    for at in 2 * list(range(len(texts))):
        others = [other for other in corners if other != at]
        boxes = np.array([[corners[other], corners[other] + sizes[other]] for other in others]).reshape(-1, 2, 2)
        possible = anchors[at] + points * _around(sizes[at] / points)
        corners[at] = possible[np.argmin(_covered(possible, sizes[at], places, boxes, ax.bbox.extents, points))]
    for at, text in enumerate(texts):
        text.set(ha="left", va="bottom", position=to_page.inverted().transform(corners[at]))
        end = np.clip(anchors[at], corners[at], corners[at] + sizes[at])
        if np.hypot(*(end - anchors[at])) > LEADER * points:
            xs, ys = to_page.inverted().transform([anchors[at], end]).T
            ax.add_artist(Line2D(xs, ys, color="#AAAAAA", lw=0.5, zorder=1.5))


def _around(size: Array) -> Array:
    """(n, 2): where the lower left corner of a label of this size may lie from its point, in points, the nearest first:
    to its right above all."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    away = np.column_stack([np.cos(angles), np.sin(angles)])
    # At a distance in all directions, the label's side or corner that is nearest to the point lies there.
    return np.concatenate([distance * away + (away - 1) / 2 * size for distance in DISTANCES])


def _covered(corners: Array, size: Array, places: Array, boxes: Array, frame: Array, points: float) -> Array:
    """(n,): what a label would cover at each place of its lower left corner, and how far that is: less is better."""
    low, high = corners[:, None] - CLEAR * points, corners[:, None] + size + CLEAR * points
    on_places = ((low < places) & (places < high)).all(-1).sum(1)
    shared = np.clip(np.minimum(high, boxes[:, 1]) - np.maximum(low, boxes[:, 0]), 0, None).prod(-1).sum(1)
    outside = np.clip(frame[:2] - corners, 0, None).sum(1) + np.clip(corners + size - frame[2:], 0, None).sum(1)
    far = np.repeat(DISTANCES, len(corners) // len(DISTANCES))
    return 10 * on_places + 100 * shared / size.prod() + 100 * (outside > 0) + outside + far / 5


def _places_along(line: Line2D) -> Array:
    """(n, 2): positions in data coordinates, evenly spaced on the page."""
    to_page = line.axes.transData
    corners = to_page.transform(line.get_xydata())
    reached = np.cumsum([0, *np.hypot(*np.diff(corners, axis=0).T)])
    steps = np.arange(0, reached[-1], LINE_STEP * line.figure.dpi / 72)
    places = np.column_stack([np.interp(steps, reached, corners[:, axis]) for axis in (0, 1)])
    return to_page.inverted().transform(places)
