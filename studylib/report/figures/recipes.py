"""The figure of a recommendation: what each recipe takes, what it loses, and which are the best of their size."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from studylib.config.words import number, percent
from studylib.evidence.measures import CONTEXT
from studylib.evidence.rules import SHARE
from studylib.report.recipes import Candidate, Family, Recommendation
from studylib.report.style import (
    HALO,
    STYLE,
    draw_best,
    draw_point,
    draw_times,
    finish,
    look_of,
    marker_style,
    move_apart,
    new_panels,
)

LIMIT = 3  # times the reference's perplexity; what is above stands at the edge, or is not drawn if off the frontier


def frontier_figure(found: Recommendation) -> Figure:
    """Size against times the reference's perplexity, with paired intervals and names for the frontier; ringed: what is
    recommended."""
    family, front = found.family, found.family.frontier()
    marked = [candidate for candidate in (found.best, found.cheapest) if candidate]
    named = list(dict.fromkeys([*front, *marked]))
    height = {candidate: min(_times(family, candidate), LIMIT) for candidate in family.candidates}
    with mpl.rc_context(STYLE):
        figure, (ax,) = new_panels(1, width=9, height=6.5)
        for candidate in family.candidates:
            if candidate not in named and height[candidate] < LIMIT:
                ax.plot(candidate.size, height[candidate], **marker_style(candidate.cell.method), ms=4, alpha=0.4)
        for candidate in named:
            interval = family.measure.interval(np.divide, candidate.cell, family.reference.cell)
            draw_point(ax, candidate.size, height[candidate], candidate.cell.method, interval, "y", LIMIT)
        for candidate in marked:
            ax.plot(candidate.size, height[candidate], "o", ms=13, mfc="none", mec="#444444", zorder=4)
        line = draw_best(ax, [candidate.size for candidate in front], [height[candidate] for candidate in front])
        further = [line]
        if marked:
            further.append(Line2D([], [], color="#444444", marker="o", ms=11, mfc="none", ls="", label="recommended"))
        if found.budget is None:
            ax.axhspan(1, 1 + SHARE, color="#000000", alpha=0.08, lw=0, zorder=0)
            further.append(Line2D([], [], color="#000000", alpha=0.08, lw=6, label=f"within {percent(SHARE)}"))
        elif found.budget <= max(candidate.size for candidate in family.candidates):
            ax.axvline(found.budget, color="#000000", lw=1, ls=":")
            further.append(Line2D([], [], color="#000000", lw=1, ls=":", label=f"budget, {found.budget:g} MB"))
        draw_times(ax, family.measure, family.reference.cell)
        ax.margins(x=0.12, y=0.06)
        ax.set_xlabel(f"Weights + cache of {CONTEXT:,} tokens, MB")
        cells = {candidate.cell.setting: candidate.cell for candidate in family.candidates}
        finish(figure, found.headline.removesuffix("."), cells, *further)
        _label(ax, found, named, height, line)
    return figure


def _times(family: Family, candidate: Candidate) -> float:
    return family.loss(candidate) / family.loss(family.reference)


def _label(
    ax: Axes, found: Recommendation, named: Sequence[Candidate], height: dict[Candidate, float], line: Line2D
) -> None:
    """Names at the points, clear of every point that is drawn and of the line between the best."""
    family, texts = found.family, []
    for candidate in named:
        y, colour = height[candidate], look_of(candidate.cell.method).colour
        text = candidate.title + (f": {number(_times(family, candidate))}" if y == LIMIT else "")
        side = "top" if candidate is found.best else "bottom"  # of its equals, which stand above it, the best
        texts.append(ax.text(candidate.size, y, text, va=side, fontsize=8, color=colour, path_effects=[HALO]))
    drawn = [candidate for candidate in family.candidates if candidate in named or height[candidate] < LIMIT]
    sizes, heights = [candidate.size for candidate in drawn], [height[candidate] for candidate in drawn]
    move_apart(ax, texts, sizes, heights, line)
