"""The figures: one function each, drawn from records alone; titles are computed from the numbers."""

import io
import textwrap
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from studylib.arms import FULL_PRECISION, LLM_QAT, RTN, TITLES
from studylib.comparison import (
    Cell,
    Cells,
    Measure,
    capital,
    gather,
    identity,
    listed,
    measures,
    number,
    percent,
    won_back,
)
from studylib.records import Record
from studylib.statistics import Interval

# Okabe and Ito's colours for all kinds of colour vision; marker and filling tell the methods apart in grey.
COLOURS = {FULL_PRECISION: "#000000", RTN: "#D55E00", LLM_QAT: "#0072B2"}
MARKERS = {FULL_PRECISION: "D", RTN: "s", LLM_QAT: "o"}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "studylib",
}
HALO = withStroke(linewidth=2, foreground="white")
CONTEXT = 2048  # tokens whose cache counts as memory: the paper's sequence length
OFF_SCALE = 8  # perplexities above this many times full precision's stand at the edge with an arrow and their value


class NotebookFigure(Figure):
    """A figure that a notebook shows when a cell ends with it, without pyplot's global state."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()


def bit_allocation(records: Sequence[Record]) -> Figure:
    """A row for each setting, the worst last; perplexities (log) and mean accuracy with their 95% intervals."""
    cells, panels = gather(records), measures(records)
    if not panels:
        return _empty("No arm finished")
    settings = _by_damage(cells, panels[0])
    with mpl.rc_context(STYLE):
        figure, axes = _panels(len(panels), width=12, height=1.6 + 0.36 * len(settings), sharey=True)
        for ax, measure in zip(axes, panels, strict=True):
            _reference(ax, cells, measure)
            limit = _off_scale(cells, measure)
            for row, bits in enumerate(settings):
                shown = [cells[method, bits] for method in (RTN, LLM_QAT) if (method, bits) in cells]
                for cell, shift in zip(shown, (-0.16, 0.16) if len(shown) > 1 else (0,), strict=True):
                    _row_point(ax, cell, measure, row + shift, limit)
            if measure.is_perplexity:
                ax.set_xscale("log")
                ax.set_xlim(right=limit * 1.6)
                _plain_ticks(ax.xaxis)
            else:
                ax.margins(x=0.16)
            ax.set_xlabel(_axis_title(measure, "log scale, "))
        _setting_rows(axes[0], settings)
        _finish(figure, _allocation_title(cells, panels[0]), cells)
    return figure


def _allocation_title(cells: Cells, measure: Measure) -> str:
    full = cells.get((FULL_PRECISION, "16-16-16"))
    found = []
    for bits, words in (
        ("8-8-8", "at 8-8-8"),
        ("8-8-4", "with a 4-bit cache (8-8-4)"),
        ("4-16-16", "with 4-bit weights (4-16-16)"),
        ("4-8-4", "at 4-8-4"),
        ("8-4-8", "with 4-bit activations (8-4-8)"),
    ):
        cell = cells.get((RTN, bits))
        if full and full.records and cell and cell.records:
            found.append(f"{number(measure.value(lambda f, r: r / f, full, cell))} {words}")
    return f"RTN multiplies {measure.title} by {listed(found)}" if found else f"{capital(measure.title)} by bit setting"


def recovery(records: Sequence[Record]) -> Figure:
    """A row for each setting: what RTN loses, and an arrow to where LLM-QAT gets; a panel for each measure."""
    cells, panels = gather(records), measures(records)
    settings = [bits for method, bits in cells if method == LLM_QAT and (RTN, bits) in cells]
    if not panels or not settings:
        return _empty("No setting was both rounded and trained")
    with mpl.rc_context(STYLE):
        figure, axes = _panels(len(panels), width=12, height=1.9 + 0.55 * len(settings), sharey=True)
        for ax, measure in zip(axes, panels, strict=True):
            _reference(ax, cells, measure)
            limit = _off_scale(cells, measure)
            for row, bits in enumerate(settings):
                rtn, qat = cells[RTN, bits], cells[LLM_QAT, bits]
                for cell, shift in ((rtn, -0.2), (qat, 0.2)):
                    _row_point(ax, cell, measure, row + shift, limit)
                if rtn.records and qat.records:
                    ends = [min(measure.value(identity, cell), limit) for cell in (rtn, qat)]
                    arrow = {"arrowstyle": "->", "color": "#888888", "shrinkA": 5, "shrinkB": 5}
                    ax.annotate("", (ends[1], row + 0.2), (ends[0], row - 0.2), arrowprops=arrow)
            ax.margins(x=0.16)
            ax.set_xlabel(_axis_title(measure))
        _setting_rows(axes[0], settings)
        _finish(figure, _recovery_title(cells, panels, settings[-1]), cells)
    return figure


def _recovery_title(cells: Cells, panels: list[Measure], bits: str) -> str:
    trio = [cells.get(pair) for pair in ((FULL_PRECISION, "16-16-16"), (RTN, bits), (LLM_QAT, bits))]
    if not all(cell and cell.records for cell in trio):
        return f"RTN and LLM-QAT down to {bits}"
    found = []
    for measure in panels:
        loss, share = won_back(measure, *trio)
        what = measure.title if measure.is_perplexity else "mean accuracy"
        found.append(
            f"an undecided share of the {what} ({loss.text(measure.text)} lost)"
            if share is None
            else f"{share.text(percent)} of the {what}"
        )
    return f"At {bits}, LLM-QAT wins back, of what RTN loses: {listed(found)}"


def size_accuracy(records: Sequence[Record]) -> Figure:
    """Memory of weights and a cache of CONTEXT tokens against each measure, with 95% intervals and Pareto fronts."""
    cells, panels = gather(records), measures(records)
    shown = [cell for cell in cells.values() if cell.records]
    if not panels:
        return _empty("No arm finished")
    with mpl.rc_context(STYLE):
        figure, axes = _panels(len(panels), width=12, height=6)
        sizes = np.array([_megabytes(cell) for cell in shown])
        limits = [_off_scale(cells, measure) for measure in panels]
        for ax, measure, limit in zip(axes, panels, limits, strict=True):
            found = [measure.interval(identity, cell) for cell in shown]
            heights = np.array([min(interval.estimate, limit) for interval in found])
            for cell, size, interval in zip(shown, sizes, found, strict=True):
                _point(ax, size, min(interval.estimate, limit), cell.method, interval, "y", limit)
            front = _front(measure, shown, sizes)
            ax.plot(sizes[front], heights[front], color="#888888", lw=1, ls="--", zorder=1)
            ax.set_xlim(sizes.min() / 1.1, sizes.max() * 1.06)
            if measure.is_perplexity:
                ax.set_yscale("log")
                _plain_ticks(ax.yaxis)
                ax.set_ylim(top=limit * 1.15)
            ax.set_xlabel(f"Weights + cache of {CONTEXT:,} tokens, MB")
            ax.set_ylabel(_axis_title(measure, "log scale, "))
        best = listed([shown[i].title for i in _front(panels[0], shown, sizes)])
        title = f"By {panels[0].title}, nothing is both smaller and better than {best}"
        _finish(figure, title, cells, Line2D([], [], color="#888888", lw=1, ls="--", label="best for its size"))
        for ax, measure, limit in zip(axes, panels, limits, strict=True):
            _label_points(ax, measure, shown, sizes, limit)
    return figure


def _front(measure: Measure, shown: list[Cell], sizes: np.ndarray) -> list[int]:
    """Indices of the cells that are better than everything as small as they are, in the order of size."""
    losses = [measure.loss(0, measure.value(identity, cell)) for cell in shown]
    found, least = [], np.inf
    for index in sorted(range(len(shown)), key=lambda i: (sizes[i], losses[i])):
        if losses[index] < least:
            found.append(index)
            least = losses[index]
    return found


def _label_points(ax: Axes, measure: Measure, shown: list[Cell], sizes: np.ndarray, limit: float) -> None:
    texts, heights = [], []
    for cell, size in zip(shown, sizes, strict=True):
        value = measure.value(identity, cell)
        label = TITLES[FULL_PRECISION] if cell.method == FULL_PRECISION else cell.bits
        label += f": {measure.text(value)}" if value > limit else ""
        heights.append(min(value, limit))
        texts.append(ax.text(size, heights[-1], label, fontsize=7.5, color=COLOURS[cell.method], path_effects=[HALO]))
    arrow = {"arrowstyle": "-", "color": "#AAAAAA", "lw": 0.5}
    adjust_text(texts, x=list(sizes), y=heights, ax=ax, arrowprops=arrow, min_arrow_len=6, expand=(1.3, 1.8))


def training_curve(records: Sequence[Record]) -> Figure:
    """KL from the full-precision model at each training step (log), and its mean over the last tenth of all steps."""
    trained = [record for record in records if record.training]
    if not trained:
        return _empty("No arm was trained")
    settings = list(dict.fromkeys(record.arm.bits for record in trained))
    # One hue, from dark to light; dashes tell the settings apart without colour.
    colours = ["#08306B", "#2171B5", "#6BAED6", "#9ECAE1"]
    styles = {
        bits: {"color": colours[at % 4], "ls": ["-", "--", "-.", ":"][(at + at // 4) % 4]}
        for at, bits in enumerate(settings)
    }
    with mpl.rc_context(STYLE):
        figure, (ax,) = _panels(1, width=8, height=4.4)
        ends = {}
        for record in trained:
            style = styles[record.arm.bits]
            steps = np.array([entry["step"] for entry in record.training])
            losses = np.array([np.nan if entry["loss"] is None else entry["loss"] for entry in record.training])
            width = max(1, len(losses) // 10)
            smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
            ax.plot(steps, losses, color=style["color"], lw=0.6, alpha=0.35)
            ax.plot(steps[width - 1 :], smooth, **style)
            ends.setdefault(record.arm.bits, []).append((smooth[0], smooth[-1]))
        ax.set_yscale("log")
        _plain_ticks(ax.yaxis)
        ax.set_xlabel("Training step")
        ax.set_ylabel("KL from full precision, nats a token (log scale)")
        handles = [Line2D([], [], label=f"LLM-QAT at {bits}", **style) for bits, style in styles.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
        means = {bits: np.mean(pairs, axis=0) for bits, pairs in ends.items()}
        falls = [f"{number(first)} to {number(last)} at {bits}" for bits, (first, last) in means.items()]
        _title(figure, f"Distance from full precision on fresh generated text, over training: {listed(falls)}")
    return figure


def _panels(count: int, width: float, height: float, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure = NotebookFigure(figsize=(width, height), layout="constrained", dpi=110)
    axes = list(figure.subplots(1, count, sharey=sharey, squeeze=False)[0])
    for ax in axes:
        ax.grid(color="#E8E8E8", lw=0.7)
        ax.set_axisbelow(True)
    return figure, axes


def _plain_ticks(axis: Axis) -> None:
    """1, 2, 5, 10, ... on a log axis, without powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _axis_title(measure: Measure, scale: str = "") -> str:
    if measure.is_perplexity:
        return f"{capital(measure.title)} ({scale}lower is better)"
    return "Mean accuracy, % (higher is better)"


def _empty(why: str) -> Figure:
    figure, (ax,) = _panels(1, width=6, height=2)
    ax.set_axis_off()
    _title(figure, why)
    return figure


def _title(figure: Figure, text: str) -> None:
    width = int(figure.get_figwidth() * 11.5)
    figure.suptitle("\n".join(textwrap.wrap(text, width)), x=0.01, ha="left", fontsize=10.5, fontweight="bold")


def _finish(figure: Figure, title: str, cells: Cells, *further: Line2D) -> None:
    present = [method for method in TITLES if any(cell.method == method for cell in cells.values())]
    handles = [
        Line2D([], [], color=COLOURS[method], marker=MARKERS[method], mfc=_fill(method), ls="", label=TITLES[method])
        for method in present
    ]
    figure.legend(handles=[*handles, *further], loc="outside lower center", ncols=5, title="Bars: 95% intervals")
    _title(figure, title)


def _fill(method: str) -> str:
    return "#FFFFFF" if method == RTN else COLOURS[method]


def _point(ax: Axes, x: float, y: float, method: str, found: Interval, axis: str, limit: float) -> None:
    """A marker with its interval along `axis`, cut at `limit`; an arrow head where the value itself lies beyond it."""
    beyond = found.estimate > limit
    if not beyond:
        low, high = max(0, found.estimate - found.low), max(0, min(found.high, limit) - found.estimate)
        bar = {f"{axis}err": [[low], [high]], "color": COLOURS[method], "lw": 1.2, "capsize": 2, "zorder": 2}
        ax.errorbar(x, y, **bar, alpha=0.4 if axis == "y" else 1)  # points of equal size stand behind each other
    marker = {"x": ">", "y": "^"}[axis] if beyond else MARKERS[method]
    ax.plot(x, y, marker=marker, ms=5.5, color=COLOURS[method], mfc=_fill(method), ls="", zorder=3)


def _row_point(ax: Axes, cell: Cell, measure: Measure, row: float, limit: float) -> None:
    colour = COLOURS[cell.method]
    if not cell.records:
        ax.text(0.99, row, f"{TITLES[cell.method]} diverged", transform=ax.get_yaxis_transform(), ha="right",
                va="center", fontsize=7.5, color=colour)  # fmt: skip
        return
    found = measure.interval(identity, cell)
    x = min(found.estimate, limit)
    _point(ax, x, row, cell.method, found, "x", limit)
    ax.annotate(
        measure.text(found.estimate),
        (x if found.estimate > limit else min(found.high, limit), row),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        color=colour,
        path_effects=[HALO],
    )


def _reference(ax: Axes, cells: Cells, measure: Measure) -> None:
    """Full precision as a line with its interval as a band."""
    full = cells.get((FULL_PRECISION, "16-16-16"))
    if full and full.records:
        found = measure.interval(identity, full)
        ax.axvspan(found.low, found.high, color="#000000", alpha=0.06, lw=0, zorder=0)
        ax.axvline(found.estimate, color="#000000", lw=1, zorder=1)
        ax.plot(found.estimate, 1, marker="D", ms=5, color="#000000", transform=ax.get_xaxis_transform(), clip_on=False)


def _setting_rows(ax: Axes, settings: list[str]) -> None:
    ax.set_yticks(range(len(settings)), settings)
    ax.set_ylim(len(settings) - 0.5, -0.5)
    ax.set_ylabel("Bits: weights-activations-cache")


def _by_damage(cells: Cells, measure: Measure) -> list[str]:
    """The settings by the worse of their methods, the least damaged first."""
    values: dict[str, float] = {}
    for (method, bits), cell in cells.items():
        if method != FULL_PRECISION:
            value = measure.value(identity, cell) if cell.records else np.inf
            values[bits] = max(values.get(bits, 0.0), value)
    return sorted(values, key=values.get)


def _off_scale(cells: Cells, measure: Measure) -> float:
    """Where the scale ends: OFF_SCALE times the best perplexity, if any is above that; accuracies have no end."""
    if not measure.is_perplexity:
        return np.inf
    found = [measure.interval(identity, cell) for cell in cells.values() if cell.records]
    return min(max(interval.high for interval in found), min(interval.estimate for interval in found) * OFF_SCALE)


def _megabytes(cell: Cell) -> float:
    sizes = cell.records[0].metrics
    return (sizes["bytes/weights"] + CONTEXT * sizes["bytes/cache_per_token"]) / 1e6
