"""Tables and figures of number formats and of fine-tuning on low-bit weights; titles are computed from the numbers."""

import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from studylib.config import (
    ADAPTED_4_BITS,
    DECODE,
    DEFAULT_GROUP,
    EMPTY,
    ENGINES,
    EXECUTIONS,
    IN_4_BITS,
    KERNEL_4,
    LLAMA_4,
    LLAMA_16,
    OWN,
    PASSES,
    TIMED_LAYERS,
    Format,
    capital,
    listed,
    number,
    percent,
    points,
    signed,
)
from studylib.evidence import (
    FULL,
    Array,
    Cell,
    Measure,
    accuracies,
    by_process,
    covering,
    decoding_measures,
    engine_measures,
    frontier,
    gather,
    identity,
    paired_bootstrap,
    perplexities,
    response_measures,
    right_answers,
    speedup,
    tokens_a_second,
    usual_measures,
)
from studylib.methods import method_title
from studylib.report.style import (
    LINES,
    STYLE,
    axis_title,
    draw_best,
    draw_reference,
    draw_row_point,
    draw_times,
    empty_figure,
    finish,
    name_rows,
    new_panels,
    off_scale,
    plain_ticks,
    set_title,
)
from studylib.study import Record

if TYPE_CHECKING:
    import pandas as pd

Name = TypeVar("Name", bound=Hashable)
LEVELS = {
    "nf": "NF",
    "fp-e2m1": "FP4 (E2M1)",
    "fp-bnb": "FP4 (bitsandbytes)",
    "fp-e3m0": "FP4 (E3M0)",
    "mxfp4": "MXFP4",
    "mxfp4-even": "MXFP4 (even)",
    "nvfp4": "NVFP4",
    "int": "Int",
    "int-full": "full-range Int",
    "affine": "affine Int",
}  # what a format's levels are called at any width
NF4_DQ = Format("nf", 4, double=True)
COLOURS = (*LINES, "#882255", "#999933", "#888888", "#332288", "#117733", "#AA4499")  # of methods and kinds of formats
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
LEADS = 3  # widths whose leads a title has room for
NEAR_BITS = 0.3  # formats so close in size are compared as equals


def tuning_panels(records: Sequence[Record]) -> list[Measure]:
    """What a fine-tuned model is judged by, as far as all were scored on it: the responses it has not seen, what it
    forgot, and the tasks."""
    return covering(response_measures(records) + perplexities(records)[:1] + accuracies(records), records)


def rows(records: Sequence[Record], panels: Sequence[Measure]) -> Figure:
    """A row for each arm that is not full precision, in the order of its bits; a panel for each measure."""
    cells = gather(records)
    shown = [cell for cell in cells.values() if cell.setting != FULL]
    if not panels or not shown:
        return empty_figure("No arm finished")
    with mpl.rc_context(STYLE):
        figure, axes = new_panels(len(panels), width=12, height=1.8 + 0.3 * len(shown), sharey=True)
        for ax, measure in zip(axes, panels, strict=True):
            draw_reference(ax, cells, measure)
            limit = off_scale(cells, measure)
            for row, cell in enumerate(shown):
                draw_row_point(ax, cell, measure, row, limit)
                if row and cell.bits != shown[row - 1].bits:
                    ax.axhline(row - 0.5, color="#AAAAAA", lw=0.8)
            if measure.is_perplexity:
                ax.set_xscale("log")
                plain_ticks(ax.xaxis)
            ax.margins(x=0.2)
            ax.set_xlabel(axis_title(measure, "log scale, ").replace(" (", "\n("))
        name_rows(axes[0], [cell.title for cell in shown])
        finish(figure, _rows_title(panels[0], shown), cells)
    return figure


def _rows_title(measure: Measure, shown: list[Cell]) -> str:
    """The best of each width, with the interval of its lead over the next where there are not many widths."""
    found, widths = [], list(dict.fromkeys(cell.bits for cell in shown))
    for bits in widths:
        ranked = sorted(
            (cell for cell in shown if cell.bits == bits and cell.records),
            key=lambda cell: measure.value(identity, cell),
        )
        if len(ranked) > 1 and len(widths) <= LEADS:
            lead = measure.above(ranked[1], ranked[0])
            found.append(f"{ranked[0].title} ({ranked[1].title} is {lead.text(percent)} worse)")
        elif len(ranked) > 1 or (ranked and ranked[0].tuned):
            found.append(ranked[0].title)
    return f"Lowest {measure.title}: {listed(found)}" if found else capital(measure.title)


def _encoded(records: Sequence[Record]) -> list[Cell]:
    return [cell for cell in gather(records).values() if cell.method == "encoded" and cell.records]


def _in_formats(records: Sequence[Record]) -> list[Cell]:
    """Rounded to the nearest level, and by methods that choose."""
    return [cell for cell in gather(records).values() if cell.arm.format and not cell.tuned and cell.records]


def _errors(cell: Cell) -> dict[str, Array]:
    """Relative errors of the decoder's layers, by the kind of layer."""
    scores = cell.records[0].scores
    return {name.partition("/")[2]: np.array(scores[name]) for name in scores if name.startswith("error/")}


def _mean_error(cell: Cell) -> float:
    """In percent, over all layers."""
    return float(100 * np.mean(np.concatenate(list(_errors(cell).values()))))


def _chosen(cell: Cell) -> bool:
    """Whether its method chooses where each weight goes; else to the nearest level."""
    return cell.method != "encoded"


def _by_method(cell: Cell, format: str) -> str:
    """What a format is called, with the method that chooses: "GPTQ, affine Int4"."""
    return f"{method_title(cell.method)}, {format}" if _chosen(cell) else format


def format_table(records: Sequence[Record]) -> "pd.DataFrame":
    """One row a format, as text: bits by formula and as stored, errors on normal numbers and weights, what it costs."""
    import pandas as pd

    from studylib.evaluate import normal_error
    from studylib.quant import bits_per_parameter

    full, cells, shown = gather(records).get(FULL), sorted(_in_formats(records), key=_bits, reverse=True), []
    compared = [*cells, *([full] if full and full.records else [])]
    measures = usual_measures(records)
    measures += [own for own in right_answers(records)[:1] if all(own.covers(cell) for cell in compared)]
    for cell in cells:
        format = _format(cell)
        row = {
            "Format": _by_method(cell, format.title),
            "Bits, formula": EMPTY if format.group is None else f"{bits_per_parameter(format):.3f}",
            "Bits, stored": f"{_bits(cell):.3f}",
            "Error, N(0,1)": EMPTY if format.group is None or _chosen(cell) else f"{normal_error(format):.4f}",
            "Error, weights, %": EMPTY if _chosen(cell) else points(_mean_error(cell)),
        }
        for measure in measures:
            name = capital(measure.title)
            if full is None or not full.records:
                row[name] = measure.text(measure.value(identity, cell))
            elif measure.is_perplexity:
                row[name] = measure.text(measure.value(identity, cell))
                row[f"{name}: cost"] = measure.above(cell, full).text(percent)
            else:
                unit = ", points" if measure.kind == "accuracy" else ""
                row[f"{name}: loss{unit}"] = measure.interval(measure.loss, full, cell).text(measure.text)
        shown.append(row)
    return pd.DataFrame(shown)


def format_frontier(records: Sequence[Record]) -> Figure:
    """Stored bits of a weight against each perplexity beside full precision's (or the best's, where that was not run),
    with paired intervals; dashed: the formats that none is smaller and better than.

    Colours tell the levels, markers what scales them. Formats off the scale are named in the corner.
    """
    cells, panels = gather(records), perplexities(records)
    shown = _in_formats(records)
    if not panels or not shown:
        return empty_figure("No weights were rounded")
    colours = _styles(map(_levels, shown), COLOURS)
    markers = _styles((_scales(_format(cell)) for cell in shown), MARKERS)
    with mpl.rc_context(STYLE):
        figure, axes = new_panels(len(panels), width=12, height=6.5)
        for ax, measure in zip(axes, panels, strict=True):
            limit = off_scale(cells, measure)
            near = [cell for cell in shown if measure.value(identity, cell) <= limit]
            line = _draw_frontier(ax, measure, near, cells.get(FULL), colours, markers)
            far = [c for c in shown if measure.value(identity, c) > limit]
            if far:
                texts = [
                    f"{_by_method(cell, _format(cell).title)} {measure.text(measure.value(identity, cell))}"
                    for cell in far
                ]
                text = "\n".join(["Perplexity off the scale:", *texts])
                place = {"transform": ax.transAxes, "ha": "right", "va": "top"}
                ax.text(0.99, 0.99, text, fontsize=7.5, color="#444444", **place)
        keys = [Line2D([], [], ls="", marker="o", color=colour, label=levels) for levels, colour in colours.items()]
        keys += [
            Line2D([], [], ls="", marker=marker, color="#666666", label=_scale_words(scales))
            for scales, marker in markers.items()
        ]
        figure.legend(handles=[*keys, line], loc="outside lower center", ncols=7, title="Bars: 95% intervals")
        set_title(figure, _frontier_title(panels[0], shown))
    return figure


def _styles(names: Iterable[Name], styles: Sequence[str]) -> dict[Name, str]:
    return dict(zip(dict.fromkeys(names), itertools.cycle(styles), strict=False))


def _format(cell: Cell) -> Format:
    format = cell.arm.format
    assert format is not None  # see _in_formats
    return format


def _bits(cell: Cell) -> float:
    """Stored for a weight; by the formula where it was not counted."""
    from studylib.quant import bits_per_parameter

    counted = cell.records[0].scores.get("bits")
    return counted[0] if counted else bits_per_parameter(_format(cell))


def _levels(cell: Cell) -> str:
    """What its levels are called, and who chooses among them."""
    return _by_method(cell, LEVELS[_format(cell).kind])


def _scales(format: Format) -> tuple[int | None, bool, int]:
    """What scales a format's levels: its group, whether by scales that are quantized as well, and their bits."""
    return format.group, format.double, format.scale_bits


def _scale_words(scales: tuple[int | None, bool, int]) -> str:
    """In words, as "DQ, groups of 32"; groups of 64 go unsaid beside something else."""
    group, double, bits = scales
    words = ["DQ"] * double + ["16-bit scales"] * (bits == 16)
    if group != DEFAULT_GROUP or not words:
        words.insert(double, "per channel" if group is None else f"groups of {group}")
    return ", ".join(words)


def _draw_frontier(
    ax: Axes,
    measure: Measure,
    shown: list[Cell],
    full: Cell | None,
    colours: dict[str, str],
    markers: dict[tuple[int | None, bool, int], str],
) -> Line2D:
    reference = full if full and full.records else min(shown, key=lambda cell: measure.value(identity, cell))
    found = [measure.interval(np.divide, cell, reference) for cell in shown]
    x, y = np.array([_bits(cell) for cell in shown]), np.array([interval.estimate for interval in found])
    for cell, at, interval in zip(shown, x, found, strict=True):
        colour, marker = colours[_levels(cell)], markers[_scales(_format(cell))]
        ax.plot([at, at], [interval.low, interval.high], color=colour, lw=1.5, alpha=0.2, zorder=2)
        ax.plot(at, interval.estimate, marker=marker, ms=6, color=colour, zorder=3)
    best = frontier(measure, shown, x)
    line = draw_best(ax, x[best], y[best])
    ax.axhline(1, color="#000000", lw=1)
    draw_times(ax, measure, reference)
    ax.margins(x=0.12)
    ax.set_xlabel("Stored bits a weight, scales included")
    return line


def _frontier_title(measure: Measure, shown: list[Cell]) -> str:
    """The best affine integer of about NF4's bits beside it: the question that users ask."""
    normal = next((cell for cell in shown if _format(cell) == NF4_DQ), None)
    affine = [cell for cell in shown if _format(cell).kind == "affine" and not _chosen(cell)]
    if normal is None or not affine:
        return f"{capital(measure.title)} by number format"
    near = [cell for cell in affine if _bits(cell) <= _bits(normal) + NEAR_BITS]
    best = min(near or affine, key=lambda cell: measure.value(identity, cell))
    change = measure.above(best, normal)
    return (
        f"{best.title} ({_bits(best):.2f} bits) beside {normal.title} ({_bits(normal):.2f} bits): {measure.title} "
        f"{change.text(lambda share: signed(share, percent))}"
    )


def decoding_times(records: Sequence[Record]) -> Figure:
    """A panel for each model that was timed: every round of each execution, its median, and its 95% interval."""
    cell = next((cell for cell in gather(records).values() if cell.method == "4-bit kernel" and cell.records), None)
    if cell is None:
        return empty_figure("Nothing was timed")
    panels = decoding_measures(cell.records)
    found: list[str] = []
    with mpl.rc_context(STYLE):
        figure, axes = new_panels(len(panels), width=6 * len(panels), height=2.8, sharey=True)
        for ax, measure in zip(axes, panels, strict=True):
            for row, (part, colour) in enumerate(zip(measure.parts, LINES, strict=False)):
                times = 1000 * cell.scores(part)
                middle = paired_bootstrap(lambda x: np.median(x, axis=-1), 1000 * by_process(cell, part))
                ax.plot(times, np.full(len(times), row - 0.15), ".", ms=4, color=colour, alpha=0.4)
                ax.plot([middle.low, middle.high], [row, row], color=colour, lw=1.5)
                ax.plot(middle.estimate, row, "o", ms=5.5, color=colour)
                ax.annotate(
                    middle.text(number), (middle.high, row), xytext=(6, 0), textcoords="offset points", va="center"
                )
            ax.set_xlim(0, 1.5 * ax.get_xlim()[1])
            ax.set_xlabel(f"{capital(measure.title)}, ms (lower is better)")
            times_as_fast = speedup(measure, cell, IN_4_BITS, ADAPTED_4_BITS).text(number)
            where = "" if measure.of == OWN else f"in {TIMED_LAYERS} layers of {measure.of} "
            found.append(f"{where}{times_as_fast}" if found else f"{times_as_fast} times as fast as with one")
        name_rows(axes[0], EXECUTIONS)
        handle = Line2D([], [], color="#444444", marker="o", label="rounds (dots), their median and its 95% interval")
        figure.legend(handles=[handle], loc="outside lower center")
        set_title(figure, f"Without an adapter beside them, 4-bit weights decode {', '.join(found)}")
    return figure


def engine_speeds(records: Sequence[Record]) -> Figure:
    """A panel for each pass and batch that was timed: tokens a second of each engine, each process and their median
    with its 95% interval."""
    measures = engine_measures(records)
    if not measures:
        return empty_figure("llama.cpp was not timed here")
    cell = next(cell for cell in gather(records).values() if cell.records and measures[0].covers(cell))
    with mpl.rc_context(STYLE):
        figure, axes = new_panels(len(measures), width=12, height=4.6, rows=len(PASSES))
        every = [tokens_a_second(measure, cell, engine) for measure in measures for engine in ENGINES]
        for ax, measure in zip(axes, measures, strict=True):
            for row, (engine, colour) in enumerate(zip(ENGINES, LINES, strict=False)):
                found = tokens_a_second(measure, cell, engine)
                ax.plot([found.low, found.high], [row, row], color=colour, lw=1.5)
                ax.plot(found.estimate, row, "o", ms=5.5, color=colour)
                ax.annotate(
                    found.text(number), (found.high, row), xytext=(6, 0), textcoords="offset points", va="center"
                )
            ax.set_xscale("log")
            ax.set_xlim(0.8 * min(own.low for own in every), 3 * max(own.high for own in every))
            plain_ticks(ax.xaxis)
            ax.set_xlabel(f"{capital(measure.title)}: tokens a second (log scale, higher is better)")
            name_rows(ax, ENGINES)
        handle = Line2D([], [], color="#444444", marker="o", label="median of the processes and its 95% interval")
        figure.legend(handles=[handle], loc="outside lower center")
        decoding = next(measure for measure in measures if measure.of.startswith(DECODE))
        kernel, own = (speedup(decoding, cell, LLAMA_4, slow).text(number) for slow in (KERNEL_4, LLAMA_16))
        set_title(
            figure,
            f"One sequence with 4-bit weights: llama.cpp decodes {kernel} times as fast as this study's kernel, "
            f"and {own} times as fast as its own 16 bits",
        )
    return figure


def error_by_layer(records: Sequence[Record]) -> Figure:
    """The relative error of each kind of layer over the depth of the model, for the four-bit formats whose scales are
    stored as the first one's are."""
    four = [cell for cell in _encoded(records) if cell.bits == "4-16-16"]
    shown = [cell for cell in four if _scales(_format(cell)) == _scales(_format(four[0]))]
    if not shown:
        return empty_figure("No weights were rounded to four bits")
    with mpl.rc_context(STYLE):
        kinds = list(_errors(shown[0]))
        figure, (by_kind, by_depth) = new_panels(2, width=12, height=4.8)
        for cell, colour in zip(shown, LINES, strict=False):
            errors = _errors(cell)
            spread = [100 * np.quantile(errors[kind], (0, 0.5, 1)) for kind in kinds]
            low, middle, high = np.transpose(spread)
            x = np.arange(len(kinds)) + 0.1 * (shown.index(cell) - len(shown) / 2)
            by_kind.errorbar(
                x, middle, [middle - low, high - middle], marker="o", ms=4, ls="", lw=1, capsize=2, color=colour
            )
            depth = 100 * np.mean([errors[kind] for kind in kinds], axis=0)
            by_depth.plot(range(len(depth)), depth, marker=".", color=colour, label=cell.title)
        by_kind.set_xticks(range(len(kinds)), kinds)
        by_kind.set_xlabel("Kind of layer (bars: lowest and highest layer)")
        by_depth.set_xlabel("Decoder layer")
        for ax in (by_kind, by_depth):
            ax.set_ylabel("Relative error of the weights, %")
            ax.set_ylim(bottom=0)
        figure.legend(loc="outside lower center", ncols=len(shown))
        means = {cell.setting: _mean_error(cell) for cell in shown}
        ranked = sorted(means, key=lambda own: means[own])
        ends = listed([f"{own.title} {points(means[own])}%" for own in dict.fromkeys((ranked[0], ranked[-1]))])
        set_title(figure, f"Mean relative error of the weights at four bits: {ends}")
    return figure
