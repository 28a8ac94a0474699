"""The figure of a recommendation: what each recipe takes, what it loses, and which are the best of their size."""

from collections.abc import Sequence

import matplotlib as mpl
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from studylib.comparison import identity, number, percent
from studylib.drawing import (
    COLOURS,
    HALO,
    MARKERS,
    STYLE,
    axis_title,
    draw_point,
    fill_of,
    finish,
    new_panels,
    plain_ticks,
)
from studylib.figures import CONTEXT
from studylib.recipes import Candidate, Family, Recommendation
from studylib.rules import SHARE

SCALE = 3  # perplexities above this many times the best stand at the edge, those off the frontier are not drawn


def frontier_figure(found: Recommendation) -> Figure:
    """Size against perplexity, with intervals and names for the frontier; ringed: what is recommended."""
    family, front = found.family, found.family.frontier()
    marked = [candidate for candidate in (found.best, found.cheapest) if candidate]
    named = list(dict.fromkeys([*front, *marked]))
    limit = SCALE * min(map(family.loss, family.candidates))
    with mpl.rc_context(STYLE):
        figure, (ax,) = new_panels(1, width=9, height=6.5)
        for candidate in family.candidates:
            if candidate not in named and family.loss(candidate) <= limit:
                colour, fill = COLOURS[candidate.cell.method], fill_of(candidate.cell.method)
                style = {"marker": MARKERS[candidate.cell.method], "color": colour, "mfc": fill, "ms": 4, "alpha": 0.4}
                ax.plot(candidate.size, family.loss(candidate), **style)
        for candidate in named:
            interval = family.measure.interval(identity, candidate.cell)
            draw_point(ax, candidate.size, min(interval.estimate, limit), candidate.cell.method, interval, "y", limit)
        for candidate in marked:
            ax.plot(candidate.size, min(family.loss(candidate), limit), "o", ms=13, mfc="none", mec="#444444", zorder=4)
        heights = [min(family.loss(candidate), limit) for candidate in front]
        ax.plot([candidate.size for candidate in front], heights, color="#888888", lw=1, ls="--", zorder=1)
        further = [Line2D([], [], color="#888888", lw=1, ls="--", label="best for its size")]
        if marked:
            further.append(Line2D([], [], color="#444444", marker="o", ms=11, mfc="none", ls="", label="recommended"))
        if found.budget is None:
            reference = family.loss(family.reference)
            ax.axhspan(reference, (1 + SHARE) * reference, color="#000000", alpha=0.08, lw=0, zorder=0)
            further.append(Line2D([], [], color="#000000", alpha=0.08, lw=6, label=f"within {percent(SHARE)}"))
        elif found.budget <= max(candidate.size for candidate in family.candidates):
            ax.axvline(found.budget, color="#000000", lw=1, ls=":")
            further.append(Line2D([], [], color="#000000", lw=1, ls=":", label=f"budget, {found.budget:g} MB"))
        ax.set_yscale("log")
        plain_ticks(ax.yaxis)
        ax.margins(x=0.12)
        ax.set_xlabel(f"Weights + cache of {CONTEXT:,} tokens, MB")
        ax.set_ylabel(axis_title(family.measure, "log scale, "))
        cells = {candidate.cell.setting: candidate.cell for candidate in family.candidates}
        finish(figure, found.headline.removesuffix("."), cells, *further)
        _label(ax, family, named, limit)
    return figure


def _label(ax: Axes, family: Family, named: Sequence[Candidate], limit: float) -> None:
    x, y, texts = [candidate.size for candidate in named], [], []
    for candidate in named:
        value = family.loss(candidate)
        text = candidate.title + (f": {number(value)}" if value > limit else "")
        y.append(min(value, limit))
        texts.append(
            ax.text(candidate.size, y[-1], text, fontsize=8, color=COLOURS[candidate.cell.method], path_effects=[HALO])
        )
    arrow = {"arrowstyle": "-", "color": "#AAAAAA", "lw": 0.5}
    adjust_text(texts, x=x, y=y, ax=ax, arrowprops=arrow, min_arrow_len=6, expand=(1.2, 1.8))
