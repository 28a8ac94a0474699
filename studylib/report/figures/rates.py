"""The search for learning rates as a figure."""

import math
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from studylib.config import Rate, number
from studylib.methods import method_title, rate_case
from studylib.report.style import STYLE, empty_figure, marker_style, new_panels, plain_ticks, set_title

if TYPE_CHECKING:
    from studylib.study import Record

PANELS_A_ROW = 4
TITLE_WIDTH = 34  # characters of a panel's title in a line
GIVEN_UP = {"ls": "", "marker": "x", "ms": 6}
ABOVE = 0.6  # nats above the least loss of a panel, where its scale ends, or half as much above one that was chosen
Tried = Mapping[Rate, float | None]  # None: given up


def searched_rates(records: "Sequence[Record]") -> Figure:
    """Validation loss over the learning rate of each training that a search tried, a panel for each width and grid.

    A line joins the rates that were tried with one rate for the grid; the other rates for the grid stand alone. What
    was given up early is a cross at the upper edge.
    """
    from studylib.study import rate_of, validation_loss  # torch

    panels: dict[str, dict[str, dict[Rate, float | None]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        arm = record.arm
        case = rate_case(arm.method, arm.bits, arm.format, arm.scheme).removeprefix(arm.method).strip()
        panels[case][arm.method][rate_of(arm)] = validation_loss(record)
    panels = {case: tried for case, tried in panels.items() if any(map(_finite, tried.values()))}
    if not panels:
        return empty_figure("No rate was tried")
    rows = -(-len(panels) // PANELS_A_ROW)
    with mpl.rc_context(STYLE):
        figure, axes = new_panels(len(panels), width=12, height=1.6 + 2.6 * rows, rows=rows)
        for ax, (case, methods) in zip(axes, panels.items(), strict=True):
            ax.set_xscale("log")
            plain_ticks(ax.xaxis, LogLocator())
            best = [min(_finite(tried).values()) for tried in methods.values() if _finite(tried)]
            top = max(min(best) + ABOVE, max(best) + ABOVE / 2)
            for method, tried in methods.items():
                _draw(ax, method, tried, top)
            ax.set_ylim(min(best) - 0.05, top)
            ax.set_title(textwrap.fill(case, TITLE_WIDTH), fontsize=8.5, loc="left")
            ax.set_xlabel("Learning rate (log scale)")
            ax.set_ylabel("Validation loss,\nnats a token (lower is better)")
        found = {method: None for methods in panels.values() for method in methods}
        handles = [Line2D([], [], **marker_style(name), label=method_title(name)) for name in found]
        handles.append(Line2D([], [], ls="", marker="o", mfc="none", color="#000000", ms=11, label="chosen"))
        if any(loss is None for methods in panels.values() for tried in methods.values() for loss in tried.values()):
            handles.append(Line2D([], [], color="#000000", **GIVEN_UP, label="given up after a quarter"))
        figure.legend(handles=handles, loc="outside lower center", ncols=6)
        set_title(figure, _title(panels))
    return figure


def _finite(tried: Tried) -> dict[Rate, float]:
    return {rate: loss for rate, loss in tried.items() if loss is not None and math.isfinite(loss)}


def _chosen(tried: Tried) -> Rate:
    finite = _finite(tried)
    return min(finite, key=lambda rate: finite[rate])


def _draw(ax: Axes, method: str, tried: Tried, top: float) -> None:
    style = marker_style(method)
    ended = {rate: loss for rate, loss in tried.items() if loss is not None}
    grids = [rate.grid_rate for rate in ended]
    usual = max(grids, key=grids.count)
    line = sorted((rate.learning_rate, min(loss, top)) for rate, loss in ended.items() if rate.grid_rate == usual)
    ax.plot(*zip(*line, strict=True), **style, ms=5.5, lw=1)
    others = [(rate.learning_rate, min(loss, top)) for rate, loss in ended.items() if rate.grid_rate != usual]
    if others:
        ax.plot(*zip(*others, strict=True), **style, ms=4, ls="")
    given_up = [rate.learning_rate for rate in tried if rate not in ended]
    if given_up:
        ax.plot(given_up, [top] * len(given_up), **style | GIVEN_UP)
    if best := _finite(tried):
        chosen = _chosen(tried)
        ax.plot(chosen.learning_rate, best[chosen], marker="o", mfc="none", color="#000000", ms=11)


def _title(panels: Mapping[str, Mapping[str, Tried]]) -> str:
    """How far apart the rates lie that were chosen."""
    chosen = [
        (_chosen(tried).learning_rate, f"{method_title(method)} at {case}")
        for case, methods in panels.items()
        for method, tried in methods.items()
        if _finite(tried)
    ]
    (low, slow), (high, fast) = min(chosen), max(chosen)
    if low == high:
        return f"The best of the learning rates that were tried is {low:g} for all that were searched"
    return f"The best learning rates lie {number(high / low)} times apart: {low:g} for {slow}, {high:g} for {fast}"
