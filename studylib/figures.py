"""The figures: one function each, drawn from records alone; titles are computed from the numbers."""

import textwrap
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from studylib.arms import FULL_PRECISION, LLM_QAT, METHODS, RTN, TITLES
from studylib.claims import percent
from studylib.comparison import Cell, Cells, Measure, gather, identity, measures, won_back
from studylib.labels import place_labels
from studylib.records import Record
from studylib.statistics import Interval
from studylib.tables import number, points

# Okabe and Ito's colours for all kinds of colour vision; marker and filling tell the methods apart in grey.
COLOURS = {FULL_PRECISION: "#000000", RTN: "#D55E00", LLM_QAT: "#0072B2"}
MARKERS = {FULL_PRECISION: "D", RTN: "s", LLM_QAT: "o"}
FILLS = {FULL_PRECISION: "#000000", RTN: "#FFFFFF", LLM_QAT: "#0072B2"}
GREY = "#767676"
STYLE = {"font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left",
         "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.edgecolor": "#444444",
         "axes.labelsize": 9, "xtick.color": "#444444", "ytick.color": "#444444", "xtick.labelcolor": "black",
         "ytick.labelcolor": "black", "legend.frameon": False, "svg.hashsalt": "studylib", "figure.dpi": 110}
CONTEXT = 2048  # tokens whose cache counts as memory: the paper's sequence length
OFF_SCALE = 8  # size_accuracy shows up to this many times full precision's perplexity


def bit_allocation(records: Sequence[Record]) -> Figure:
    """Dot plot: a row for each setting, perplexity (log) with its 95% interval in a panel for each corpus."""
    cells, panels = gather(records), [m for m in measures(records) if m.is_perplexity]
    if not panels:
        return _empty("No arm finished with a perplexity")
    settings = _by_damage(cells, panels[0])
    with mpl.rc_context(STYLE):
        figure, axes = _panels(len(panels), width=10, height=1.9 + 0.32 * len(settings), sharey=True)
        for ax, measure in zip(axes, panels, strict=True):
            full = _reference(ax, cells, measure, vertical=True)
            highest = full.high if full else 0.0
            for row, bits in enumerate(settings):
                ax.axhline(row, color="#EEEEEE", lw=0.8, zorder=0)
                pair = [cells[m, bits] for m in (RTN, LLM_QAT) if (m, bits) in cells]
                for cell, at in zip(pair, (row - 0.14, row + 0.14) if len(pair) > 1 else (row,), strict=True):
                    if not cell.records:
                        ax.text(0.99, at, f"{TITLES[cell.method]} diverged", transform=ax.get_yaxis_transform(),
                                ha="right", va="center", fontsize=7.5, color=COLOURS[cell.method])
                        continue
                    found = measure.interval(identity, cell)
                    highest = max(highest, found.high)
                    _point(ax, found.estimate, at, cell.method, x=found)
                    ax.annotate(number(found.estimate), (found.high, at), xytext=(5, 0), textcoords="offset points",
                                va="center", fontsize=7.5, color=COLOURS[cell.method])
            _log_axis(ax, "x")
            ax.set_xlim(right=highest * (highest / ax.get_xlim()[0]) ** 0.22)
            _log_axis(ax, "x")
            ax.set_xlabel(f"{_capital(measure.title)} (log scale)")
        axes[0].set_yticks(range(len(settings)), settings)
        axes[0].set_ylim(len(settings) - 0.4, -0.6)
        axes[0].set_ylabel("Bits: weights-activations-cache")
        _finish(figure, _allocation_title(cells, panels[0]), cells)
    return figure


def _allocation_title(cells: Cells, measure: Measure) -> str:
    full = cells.get((FULL_PRECISION, "16-16-16"))
    found = []
    for bits, words in (("8-8-8", "at 8-8-8"), ("8-8-4", "with a 4-bit cache (8-8-4)"),
                        ("4-16-16", "with 4-bit weights (4-16-16)"), ("4-8-4", "at 4-8-4"),
                        ("8-4-8", "with 4-bit activations (8-4-8)")):
        cell = cells.get((RTN, bits))
        if full and full.records and cell and cell.records:
            found.append(f"{number(measure.value(lambda f, r: r / f, full, cell))} {words}")
    return f"RTN multiplies {measure.title} by {_and(found)}" if found else f"{_capital(measure.title)} by bit setting"


def size_accuracy(records: Sequence[Record]) -> Figure:
    """Memory of weights and a cache of CONTEXT tokens against perplexity (log) and mean accuracy, with Pareto fronts.

    Perplexities above OFF_SCALE times full precision's stand at the upper edge with an arrow and their value.
    """
    cells, panels = gather(records), measures(records)
    if not panels:
        return _empty("No arm finished")
    shown = [cell for cell in cells.values() if cell.records]
    with mpl.rc_context(STYLE):
        figure, axes = _panels(len(panels), width=12.4, height=5.4)
        title = "Memory against quality"
        for ax, measure in zip(axes, panels, strict=True):
            values = [measure.interval(identity, cell) for cell in shown]
            sizes = np.array([_megabytes(cell) for cell in shown])
            estimates = np.array([found.estimate for found in values])
            limit = np.inf
            if measure.is_perplexity:
                limit = min(estimates) * OFF_SCALE
            inside = estimates <= limit
            names = []
            for cell, size, found, kept in zip(shown, sizes, values, inside, strict=True):
                if kept:
                    _point(ax, size, found.estimate, cell.method, y=found)
                else:
                    ax.plot(size, limit, marker="^", ms=6, color=COLOURS[cell.method], mfc=FILLS[cell.method], ls="")
                names.append(_bits(cell) if kept else f"{_bits(cell)}: {number(found.estimate)}")
            front = _front(sizes, -estimates if measure.is_perplexity else estimates)
            ax.plot(sizes[front], np.minimum(estimates, limit)[front], color=GREY, lw=1, ls=(0, (4, 2)), zorder=1)
            ax.set_xscale("log")
            ax.set_xlim(sizes.min() / 1.16, sizes.max() * 1.22)
            _log_axis(ax, "x")
            ax.set_xlabel(f"Weights + cache of {CONTEXT:,} tokens, MB (log scale)")
            low, high = min(f.low for f in values), max(f.high for f, kept in zip(values, inside, strict=True) if kept)
            if measure.is_perplexity:
                ax.set_yscale("log")
                top = max(high, limit if not inside.all() else 0)
                ax.set_ylim(low * 0.9, top * 1.18)
                _log_axis(ax, "y")
            else:
                ax.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low))
            ax.set_ylabel(_axis_title(measure))
            ax.set_title(f"{_capital(measure.title)}\n({'lower' if measure.is_perplexity else 'higher'} is better)")
            if measure is panels[0]:
                best = [shown[i] for i in front if shown[i].method != FULL_PRECISION]
                title = (f"By {measure.title}, no other setting is both smaller and better than "
                         f"{_and([cell.title for cell in best])}" if best else title)
        _finish(figure, title, cells, extra=Line2D([], [], color=GREY, lw=1, ls=(0, (4, 2)), label="Pareto front"))
        for ax, measure in zip(axes, panels, strict=True):
            _label_points(ax, measure, shown)
    return figure
