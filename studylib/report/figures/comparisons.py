"""The figures: one function each, drawn from records alone; titles are computed from the numbers."""

from collections import Counter
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from studylib.config import (
    AFTER_ROTARY,
    BEFORE_ROTARY,
    BitWidths,
    capital,
    listed,
    nats,
    number,
    percent,
    points,
    signed,
)
from studylib.evidence import (
    CONTEXT,
    EXCESS,
    FULL,
    Array,
    Cell,
    Cells,
    Interval,
    Measure,
    Scale,
    frontier,
    gather,
    identity,
    megabytes,
    perplexities,
    response_measures,
    usual_measures,
    won_back,
)
from studylib.methods import Setting, corpus_title, method_title
from studylib.report.style import (
    HALO,
    STYLE,
    axis_title,
    draw_best,
    draw_point,
    draw_reference,
    draw_row_point,
    empty_figure,
    finish,
    look_of,
    move_apart,
    name_rows,
    new_panels,
    off_scale,
    plain_ticks,
    present_methods,
    say_diverged,
    set_title,
)
from studylib.study import Record

NAMED = 5  # arms that a title names one by one: more would take three lines
PANELS_A_ROW = 4
PLACES = {BEFORE_ROTARY: "before", AFTER_ROTARY: "after"}  # of quantizing keys, in words
PERCENT = Scale(lambda change: EXCESS.to(change / 100), lambda x: 100 * EXCESS.back(x))  # of a change
MOST_CHANGE = 1.0  # changes of perplexity beyond this share stand at the edge with an arrow and their value


def bit_allocation(records: Sequence[Record]) -> Figure:
    """A row for each setting, the worst last; perplexities (log) and mean accuracy with their 95% intervals."""
    cells, panels = _defaults(records), usual_measures(records)
    if not panels:
        return empty_figure("No arm finished")
    with mpl.rc_context(STYLE):
        figure = _setting_rows(cells, panels, _by_damage(cells, panels[0]))
        finish(figure, _allocation_title(cells, panels[0]), cells)
    return figure


def _defaults(records: Sequence[Record]) -> Cells:
    """The cells of each method as it is by default, without the variants that a notebook compares besides."""
    return {setting: cell for setting, cell in gather(records).items() if not setting.changes}


def _setting_rows(cells: Cells, panels: list[Measure], settings: list[str]) -> Figure:
    """A row for each bit setting, in it a line for each method; a panel for each measure."""
    methods = [method for method in present_methods(cells) if method != FULL.method]
    height = 1.6 + (0.2 + 0.16 * len(methods)) * len(settings)
    figure, axes = new_panels(len(panels), width=12, height=height, sharey=True)
    for ax, measure in zip(axes, panels, strict=True):
        draw_reference(ax, cells, measure)
        limit = off_scale(cells, measure)
        for row, bits in enumerate(settings):
            shown = [cells[Setting(method, bits)] for method in methods if Setting(method, bits) in cells]
            for at, cell in enumerate(shown):
                draw_row_point(ax, cell, measure, row + 0.8 * ((at + 0.5) / len(shown) - 0.5), limit)
            ax.axhline(row + 0.5, color="#DDDDDD", lw=0.7)
        if measure.is_perplexity:
            ax.set_xscale("log")
            ax.set_xlim(right=limit * 1.6)
            plain_ticks(ax.xaxis)
        else:
            ax.margins(x=0.16)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(axis_title(measure, "log scale, "))
    name_rows(axes[0], settings)
    axes[0].set_ylabel("Bits: weights-activations-cache")
    return figure


def _allocation_title(cells: Cells, measure: Measure) -> str:
    full = cells.get(FULL)
    found = []
    for bits, words in (
        ("8-8-8", "at 8-8-8"),
        ("8-8-4", "with a 4-bit cache (8-8-4)"),
        ("4-16-16", "with 4-bit weights (4-16-16)"),
        ("4-8-4", "at 4-8-4"),
        ("8-4-8", "with 4-bit activations (8-4-8)"),
    ):
        cell = cells.get(Setting("rtn", bits))
        if full and full.records and cell and cell.records:
            found.append(f"{number(measure.value(lambda f, r: r / f, full, cell))} {words}")
    return f"RTN multiplies {measure.title} by {listed(found)}" if found else f"{capital(measure.title)} by bit setting"


def recovery(records: Sequence[Record]) -> Figure:
    """A row for each setting with every method that was run at it: what rounding loses and what each wins back."""
    cells, panels = _defaults(records), usual_measures(records)
    settings = [s.bits for s in cells if s.method == "llm-qat" and Setting("rtn", s.bits) in cells]
    if not panels or not settings:
        return empty_figure("No setting was both rounded and trained")
    with mpl.rc_context(STYLE):
        figure = _setting_rows(cells, panels, _by_damage(cells, panels[0]))
        headline = "4-8-4" if "4-8-4" in settings else settings[-1]
        finish(figure, _recovery_title(cells, panels[0], headline), cells)
    return figure


def _recovery_title(cells: Cells, measure: Measure, bits: str) -> str:
    full, rtn = cells.get(FULL), cells[Setting("rtn", bits)]
    others = [cell for cell in cells.values() if cell.bits == bits and cell.method != rtn.method and cell.records]
    if not (full and full.records and rtn.records and others):
        return f"What RTN loses down to {bits}"
    loss = measure.interval(measure.loss, full, rtn)
    found = [(method_title(cell.method), won_back(measure, full, rtn, cell)[1]) for cell in others]
    if any(share is None for _, share in found):
        return f"At {bits} RTN loses an undecided amount of {measure.title}: {loss.text(measure.text)}"
    shares = listed([f"{title} {share.text(percent)}" for title, share in found])
    return f"Won back of the {measure.title} that RTN loses at {bits}: by {shares}"


def size_accuracy(records: Sequence[Record]) -> Figure:
    """Memory of weights and a cache of CONTEXT tokens against each measure, with 95% intervals and Pareto fronts."""
    cells, panels = _defaults(records), usual_measures(records)
    shown = [cell for cell in cells.values() if cell.records]
    if not panels or not shown:
        return empty_figure("No arm finished")
    with mpl.rc_context(STYLE):
        figure, axes = new_panels(len(panels), width=12, height=6)
        sizes = np.array([megabytes(cell) for cell in shown])
        limits, lines = [off_scale(cells, measure) for measure in panels], []
        for ax, measure, limit in zip(axes, panels, limits, strict=True):
            found = [measure.interval(identity, cell) for cell in shown]
            heights = np.array([min(interval.estimate, limit) for interval in found])
            for cell, size, interval in zip(shown, sizes, found, strict=True):
                draw_point(ax, size, min(interval.estimate, limit), cell.method, interval, "y", limit)
            front = frontier(measure, shown, sizes)
            lines.append(draw_best(ax, sizes[front], heights[front]))
            ax.set_xlim(sizes.min() / 1.1, sizes.max() * 1.06)
            if measure.is_perplexity:
                ax.set_yscale("log")
                plain_ticks(ax.yaxis)
                ax.set_ylim(top=limit * 1.15)
            ax.set_xlabel(f"Weights + cache of {CONTEXT:,} tokens, MB")
            ax.set_ylabel(axis_title(measure, "log scale, "))
        best = [shown[i].title for i in frontier(panels[0], shown, sizes)]
        title = f"By {panels[0].title}, none of these is both smaller and better than {listed(best, NAMED)}"
        finish(figure, title, cells, lines[0])
        for ax, measure, limit, line in zip(axes, panels, limits, lines, strict=True):
            _label_points(ax, measure, shown, sizes, limit, line)
    return figure


def after_deployment(records: Sequence[Record]) -> Figure:
    """A row for each fine-tuned model as it is deployed, the smallest first: its memory (weights and a cache of CONTEXT
    tokens), and its paired difference of the perplexity of responses from QLoRA with its adapter beside the base."""
    tuned = [cell for cell in gather(records).values() if cell.tuned]
    finished = [cell for cell in tuned if cell.records]
    base = next((cell for cell in finished if cell.method == "qlora" and not cell.setting.changes), None)
    panels = response_measures(records)
    if not panels or base is None:
        return empty_figure("No QLoRA to compare with")
    (measure,) = panels
    sizes = {cell: megabytes(cell) for cell in finished}
    ranked = sorted((cell for cell in finished if cell is not base), key=lambda cell: measure.value(identity, cell))
    if not ranked:
        return empty_figure(f"Nothing to compare with {base.title}")
    smaller = [cell for cell in ranked if sizes[cell] <= sizes[base]]
    told = smaller or ranked
    ends = [_named_change(measure, base, cell) for cell in dict.fromkeys((told[0], told[-1]))]
    of = ", of what is no larger" * bool(smaller)
    title = f"{capital(measure.title)} beside {base.title} ({sizes[base]:.0f} MB){of}: {', '.join(ends)}"
    others = [*sorted(ranked, key=sizes.__getitem__), *(cell for cell in tuned if not cell.records)]  # which diverged
    names = [", ".join(filter(None, (method_title(cell.method), cell.setting.variant))) for cell in others]
    labels = [
        name + (f": {sizes[cell]:.0f} MB" if cell in sizes else "") for name, cell in zip(names, others, strict=True)
    ]
    return _changes(panels, base, others, labels, title, "Deployed as, with its memory")


def _label_points(ax: Axes, measure: Measure, shown: list[Cell], sizes: Array, limit: float, line: Line2D) -> None:
    texts, heights = [], []
    for cell, size in zip(shown, sizes, strict=True):
        value = measure.value(identity, cell)
        text = cell.title if cell.setting == FULL else cell.bits
        text += f": {measure.text(value)}" if value > limit else ""
        heights.append(min(value, limit))
        texts.append(
            ax.text(size, heights[-1], text, fontsize=7.5, color=look_of(cell.method).colour, path_effects=[HALO])
        )
    move_apart(ax, texts, sizes, heights, line)


def differences(records: Sequence[Record], baseline: Setting, panels: Sequence[Measure] = ()) -> Figure:
    """A row for each other setting: its paired difference from `baseline`, in % of perplexity and points of accuracy.

    Filled markers where the 95% interval excludes no difference. panels: default, perplexities and mean accuracy.
    """
    cells, panels = gather(records), list(panels) or usual_measures(records)
    base = cells.get(baseline)
    others = [cell for cell in cells.values() if cell.setting not in (baseline, FULL)]
    if not panels or not base or not base.records or not others:
        return empty_figure(f"No arm to compare with {baseline.title}")
    title = _differences_title(panels[0], base, [cell for cell in others if cell.records])
    labels = [_beside(baseline, cell.setting) for cell in others]
    return _changes(panels, base, others, labels, title, "What is changed")


def _changes(
    panels: Sequence[Measure], base: Cell, others: Sequence[Cell], labels: Sequence[str], title: str, what: str
) -> Figure:
    """A row for each of `others`: its paired difference from `base`. what: the rows are, where there are several."""
    with mpl.rc_context(STYLE):
        figure, axes = new_panels(len(panels), width=12, height=1.7 + 0.3 * len(others), sharey=True)
        for ax, measure in zip(axes, panels, strict=True):
            ax.axvline(0, color="#000000", lw=1, zorder=1)
            for row, cell in enumerate(others):
                if cell.records:
                    _difference(ax, measure, base, cell, row)
                else:
                    say_diverged(ax, cell, row)
            ax.margins(x=0.2)
            change = f"{measure.short_title}, change in {'%' if measure.is_perplexity else 'points'}"
            ax.set_xlabel(f"{capital(change)}\n({'lower' if measure.is_perplexity else 'higher'} is better)")
        name_rows(axes[0], list(labels))
        axes[0].set_ylabel(what if len(others) > 2 else "")  # for which one row has no room
        handles = [
            Line2D([], [], color="#0072B2", marker="o", mfc=fill, label=label)
            for fill, label in (("#0072B2", "differs"), ("#FFFFFF", "may be no difference"))
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, title="Bars: 95% intervals, paired")
        set_title(figure, title)
    return figure


def _beside(baseline: Setting, setting: Setting) -> str:
    """What of a setting is not as in the baseline."""
    words = [] if setting.method == baseline.method else [method_title(setting.method)]
    words += [] if setting.bits == baseline.bits else [setting.bits]
    variant = setting.variant or (f"without {baseline.variant}" if baseline.variant else "")
    return ", ".join([*words, *([variant] if variant else [])])


def _difference(ax: Axes, measure: Measure, base: Cell, cell: Cell, row: float) -> None:
    found = _change(measure, base, cell) if measure.is_perplexity else measure.interval(np.subtract, cell, base)
    limit = 100 * MOST_CHANGE if measure.is_perplexity else np.inf
    fill = "#FFFFFF" if found.low <= 0 <= found.high else "#0072B2"
    beyond = found.estimate > limit
    x = min(found.estimate, limit)
    if not beyond:
        ax.plot([found.low, min(found.high, limit)], [row, row], color="#0072B2", lw=1.2, zorder=2)
    ax.plot(x, row, marker=">" if beyond else "o", ms=5.5, color="#0072B2", mfc=fill, ls="", zorder=3)
    text = signed(found.estimate, _change_text)
    ax.annotate(text, (x if beyond else min(found.high, limit), row), xytext=(5, 0), textcoords="offset points",
                va="center", fontsize=7.5, color="#0072B2", path_effects=[HALO])  # fmt: skip


def _change(measure: Measure, base: Cell, cell: Cell) -> Interval:
    """Of a perplexity, in %."""
    return measure.above(cell, base).on(PERCENT)


def _change_text(value: float) -> str:
    return points(value) if abs(value) < 99.95 else number(value)


def _differences_title(measure: Measure, base: Cell, others: list[Cell]) -> str:
    if not others:
        return f"Nothing finished beside {base.title}"
    variants = [cell for cell in others if cell.method == base.method]
    ranked = sorted(variants or others, key=lambda cell: measure.value(identity, cell))
    best = "best" if measure.above(ranked[0], base).estimate < 0 else "nearest"
    ends = [f"{best}{' variant' * bool(variants)} {_named_change(measure, base, ranked[0])}"]
    if len(ranked) > 1:
        ends.append(f"worst {_named_change(measure, base, ranked[-1])}")
    return f"{capital(measure.title)} beside {base.title}: {', '.join(ends)}"


def _named_change(measure: Measure, base: Cell, cell: Cell) -> str:
    found = _change(measure, base, cell)
    return f"{_beside(base.setting, cell.setting)} {found.text(lambda x: signed(x, _change_text) + '%')}"


def cache_cost(records: Sequence[Record]) -> Figure:
    """A row for each way of quantizing the cache: its bytes for CONTEXT tokens, and the perplexities beside them."""
    cells, panels = gather(records), perplexities(records)
    shown = [cell for cell in cells.values() if cell.records]
    if not panels or FULL not in cells or len(shown) < 2:
        return empty_figure("No arm to compare the cache of")
    with mpl.rc_context(STYLE):
        figure, (sizes, *axes) = new_panels(1 + len(panels), width=12, height=1.7 + 0.4 * len(shown), sharey=True)
        widths = [CONTEXT * cell.records[0].metrics["bytes/cache_per_token"] / 1e6 for cell in shown]
        for row, (cell, size) in enumerate(zip(shown, widths, strict=True)):
            sizes.barh(row, size, height=0.5, color=look_of(cell.method).colour, alpha=0.7)
            sizes.annotate(
                number(size), (size, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5
            )
        sizes.margins(x=0.15)
        sizes.set_xlabel(f"Cache of {CONTEXT:,} tokens, MB")
        for ax, measure in zip(axes, panels, strict=True):
            draw_reference(ax, cells, measure)
            for row, cell in enumerate(shown):
                draw_row_point(ax, cell, measure, row, off_scale(cells, measure))
            ax.margins(x=0.16)
            ax.set_xlabel(axis_title(measure))
        labels = [_cache_label(cell.setting) for cell in shown]
        name_rows(sizes, labels)
        sizes.set_ylabel("Keys and values")
        finish(figure, _cache_title(cells[FULL], shown[1:], panels[0]), cells)
    return figure


def _cache_label(setting: Setting) -> str:
    if setting == FULL:
        return "16 bits"
    bits, scale = BitWidths.parse(setting.bits).cache, setting["scheme.cache_scale"]
    return f"{bits} bits, scale a {scale},\nkeys {PLACES[setting['scheme.keys']]} rotary"


def _cache_title(full: Cell, others: list[Cell], measure: Measure) -> str:
    def text(cell: Cell) -> str:
        share = cell.records[0].metrics["bytes/cache_per_token"] / full.records[0].metrics["bytes/cache_per_token"]
        cost = measure.above(cell, full)
        way = _cache_label(cell.setting).replace("\n", " ")
        return f"{cost.text(percent)} at {percent(share)} of the bytes ({way})"

    ranked = sorted(others, key=lambda cell: measure.value(identity, cell))
    ends = [ranked[0]] if len(ranked) == 1 else [ranked[0], ranked[-1]]
    return f"A low-bit cache costs {measure.title} {listed([text(cell) for cell in ends])}"


def _panel_titles(cells: Sequence[Cell]) -> list[str]:
    """Each by its variant, or by its bits where it has none; by both where two would read alike."""
    several = len({cell.method for cell in cells}) > 1

    def short(cell: Cell) -> str:
        method, variant = method_title(cell.method), cell.setting.variant
        return (f"{method}, {variant}" if several else variant) if variant else f"{method} {cell.bits}"

    found = Counter(map(short, cells))
    return [
        f"{method_title(cell.method)} {cell.bits}, {cell.setting.variant}" if found[name] > 1 else name
        for cell, name in zip(cells, map(short, cells), strict=True)
    ]


def learning_curve(records: Sequence[Record]) -> Figure:
    """Held-out loss over the tokens seen by each training, a panel each: whether more of them would help."""
    cells = [cell for cell in gather(records).values() if cell.records and cell.records[0].curve]
    if not cells:
        return empty_figure("No arm was trained")
    curves = [_losses(cell) for cell in cells]
    tokens = [np.array([entry["tokens"] for entry in cell.records[0].curve]) for cell in cells]
    changes = [losses[:, -1] - losses[:, -2] for losses in curves]
    arm = cells[0].records[0].arm
    text = "held-out responses" if arm.tuning else listed([corpus_title(corpus) for corpus in arm.evaluation.corpora])
    rows = -(-len(cells) // PANELS_A_ROW)
    with mpl.rc_context(STYLE):
        figure, axes = new_panels(len(cells), width=12, height=1.6 + 1.9 * rows, sharey=True, rows=rows)
        panels = zip(axes, cells, _panel_titles(cells), tokens, curves, changes, strict=True)
        for ax, cell, name, seen, losses, change in panels:
            for others_seen, others in zip(tokens, curves, strict=True):
                ax.plot(others_seen, others.mean(0), color="#D0D0D0", lw=0.8)
            ax.fill_between(seen, losses.min(0), losses.max(0), color=look_of(cell.method).colour, alpha=0.25, lw=0)
            ax.plot(seen, losses.mean(0), color=look_of(cell.method).colour, marker=".", lw=1.4)
            ax.set_title(name, fontsize=8.5, loc="left")
            spread = f"\nseeds {signed(change.min(), nats)} to {signed(change.max(), nats)}" if len(change) > 1 else ""
            ax.text(0.98, 0.95, f"last {seen[-1] - seen[-2]:,} tokens:\n{signed(change.mean(), nats)} nats{spread}",
                    transform=ax.transAxes, ha="right", va="top", fontsize=7.5, path_effects=[HALO])  # fmt: skip
        means = np.concatenate([losses.mean(0) for losses in curves])
        finite = means[np.isfinite(means)]
        margin = 0.05 * np.ptp(finite)
        axes[0].set_ylim(finite.min() - margin, min(finite.max() + margin, 3 * finite.min()))
        columns = -(-len(cells) // rows)
        for ax in axes[-columns:]:
            ax.set_xlabel("Tokens seen in training")
        for ax in axes[::columns]:
            ax.set_ylabel(f"Loss on {text},\nnats a token (lower is better)")
        handles = [
            Line2D([], [], color="#444444", marker=".", label="mean of seeds"),
            Patch(color="#444444", alpha=0.25, lw=0, label="lowest to highest seed"),
            Line2D([], [], color="#D0D0D0", label="the others"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        set_title(figure, _still_learning(changes))
    return figure


def _losses(cell: Cell) -> Array:
    """[seeds, times]: the learning curves."""
    curves = [[entry["loss"] for entry in record.curve] for record in cell.records]
    return np.array(curves, dtype=float)  # None, of a training that diverged, as NaN


def _still_learning(changes: Sequence[Array]) -> str:
    """How many trainings were at their end, by all of their seeds; changes of the loss, [seeds] each."""
    falls, rises = (sum(bool((sign * change > 0).all()) for change in changes) for sign in (-1, 1))
    found = f"At the end of training the held-out loss still falls in {falls} of {len(changes)} arms, rises in {rises}"
    between = len(changes) - falls - rises
    return f"{found}; seeds differ in {between}" if between else found


def _by_damage(cells: Cells, measure: Measure) -> list[str]:
    """The settings by the worse of their methods, the least damaged first."""
    values: dict[str, float] = {}
    for setting, cell in cells.items():
        if setting != FULL:
            value = measure.value(identity, cell) if cell.records else np.inf
            values[setting.bits] = max(values.get(setting.bits, -np.inf), value)
    return sorted(values, key=values.get)
