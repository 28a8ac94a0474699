"""One frontier of bytes against perplexity over the sizes of a family, bits and methods; its title is computed."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoLocator

from studylib.config import listed
from studylib.evidence import (
    CONTEXT,
    FULL,
    Cell,
    Measure,
    equal_pairs,
    frontier,
    gather_family,
    identity,
    megabytes,
    text_measures,
)
from studylib.methods import method_title
from studylib.report.style import (
    HALO,
    LINES,
    STYLE,
    axis_title,
    draw_best,
    empty_figure,
    look_of,
    move_apart,
    new_panels,
    off_scale,
    plain_ticks,
    present_methods,
    set_title,
)
from studylib.study import Record

UNTOLD = "neither better nor worse, as far as windows tell"
NAMED = 4  # settings of the frontier that a title names
STEPS = 24  # places along a dotted line that labels avoid
DOTTED: dict[str, Any] = {"color": "#000000", "lw": 1.2, "ls": ":"}
WIDTH = 1.25  # of the horizontal axis beyond the smallest and the largest: labels stand there


def family_frontier(records: Sequence[Record]) -> Figure:
    """MB of weights and a cache of CONTEXT tokens against perplexity on all corpora, with 95% intervals: a colour for
    each model, a marker for each method, bits beside them. The dashed line joins what nothing is both smaller and
    better than; dotted ones the pairs that are compared at equal bytes (evidence.equal_pairs)."""
    cells = {own: cell for own, cell in gather_family(records).items() if cell.records}
    measures = text_measures(records)
    if not cells or not measures:
        return empty_figure("No arm finished")
    measure, shown = measures[0], list(cells.values())
    sizes = np.array([megabytes(cell) for cell in shown])
    colours = {own.model: LINES[at % len(LINES)] for at, own in enumerate({own.model: own for own in cells}.values())}
    with mpl.rc_context(STYLE):
        figure, (ax,) = new_panels(1, width=11, height=6.5)
        limit = off_scale(cells, measure)
        heights = np.array([_draw(ax, cell, measure, colours[cell.setting.model], limit) for cell in shown])
        line = draw_best(ax, *(values[frontier(measure, shown, sizes)] for values in (sizes, heights)))
        at = {cell.setting: (size, height) for cell, size, height in zip(shown, sizes, heights, strict=True)}
        joined = [
            np.geomspace(at[pair.larger.setting], at[pair.smaller.setting], STEPS) for pair in equal_pairs(records)
        ]
        for places in joined:  # straight on these scales
            ax.plot(*places.T, **DOTTED, zorder=1.5)
        for axis, name in ((ax.xaxis, "x"), (ax.yaxis, "y")):
            ax.set(**{f"{name}scale": "log"})
            plain_ticks(axis, AutoLocator())
        ax.set_xlim(sizes.min() / WIDTH, sizes.max() * WIDTH)
        ax.set_ylim(heights.min() / 1.1, heights.max() * 1.1)
        ax.set_xlabel(f"Weights + cache of {CONTEXT:,} tokens, MB (log scale)")
        ax.set_ylabel(axis_title(measure, "log scale, "))
        handles = [Line2D([], [], color=colour, lw=5, label=model) for model, colour in colours.items()]
        handles += [
            Line2D([], [], **_marker(method, "#444444"), ls="", label=method_title(method))
            for method in present_methods(cells)
        ]
        handles += [line, *[Line2D([], [], **DOTTED, label="compared at equal bytes")] * bool(joined)]
        figure.legend(handles=handles, loc="outside lower center", ncols=5, title="Bars: 95% intervals")
        set_title(figure, _title(measure, [shown[i] for i in frontier(measure, shown, sizes)], records))
        texts = [
            _label(ax, cell, measure, x, y, limit, colours) for cell, (x, y) in zip(shown, at.values(), strict=True)
        ]
        covered = np.concatenate([np.column_stack([sizes, heights]), *joined])
        move_apart(ax, texts, *covered.T, line)
    return figure


def _marker(method: str, colour: str) -> dict[str, str]:
    look = look_of(method)
    return {"color": colour, "marker": look.marker, "mfc": "#FFFFFF" if look.hollow else colour}


def _draw(ax: Axes, cell: Cell, measure: Measure, colour: str, limit: float) -> float:
    """Where the cell stands on the vertical axis: at `limit`, with an arrow head, if it lies beyond."""
    found = measure.interval(identity, cell)
    x, y, style = megabytes(cell), min(found.estimate, limit), _marker(cell.method, colour)
    if found.estimate > limit:
        style["marker"] = "^"
    else:
        ax.plot([x, x], [found.low, min(found.high, limit)], color=colour, lw=1.2, alpha=0.4, zorder=2)
    ax.plot(x, y, **style, ms=6.5, ls="", zorder=3)
    return y


def _label(ax: Axes, cell: Cell, measure: Measure, x: float, y: float, limit: float, colours: dict[str, str]):
    value = measure.value(identity, cell)
    text = "16 bits" if cell.bits == FULL.bits else cell.bits
    text += f": {measure.text(value)}" if value > limit else ""
    return ax.text(x, y, text, fontsize=7.5, color=colours[cell.setting.model], path_effects=[HALO])


def _title(measure: Measure, best: list[Cell], records: Sequence[Record]) -> str:
    found = [measure.above(pair.smaller, pair.larger) for pair in equal_pairs(records)]
    if found:
        better, worse = sum(above.low > 0 for above in found), sum(above.high < 0 for above in found)
        counts = {"better": better, "worse": worse, UNTOLD: len(found) - better - worse}
        of = f"of {len(found)} pair{'s' * (len(found) > 1)}"
        said = listed([f"{word} ({count} {of})" for word, count in counts.items() if count])
        return f"At equal bytes, the larger model at fewer bits is {said}, by {measure.title}"
    named = listed([cell.title for cell in best], NAMED)
    return f"No two sizes take equal bytes; by {measure.title}, nothing is both smaller and better than {named}"
