"""Which recipe for a model: what is best for its size of all that was run, what it costs, and how sure that is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from studylib.config import Arm, RealText, capital, listed, markdown, number, percent, points
from studylib.evidence import (
    CONTEXT,
    FULL,
    LEVEL,
    SHARE,
    Cell,
    Interval,
    Measure,
    accuracies,
    frontier,
    gather,
    identity,
    megabytes,
    response_measures,
    text_measures,
)
from studylib.methods import container, corpus_title, setting
from studylib.report.tables import as_markdown
from studylib.study import Record, seconds_alone

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


LORA = setting("lora", "16-16-16")  # what fine-tuned models are compared with
TITLE = "Which recipe for this model"
SIZES = (
    f"Sizes are those of the weights, adapters included, and of a cache of {CONTEXT:,} tokens; 1 MB is 10⁶ bytes. "
    "Speed is not compared."
)
PHASES = {"data": "text", "quantize": "rounding", "train": "training"}  # of making a model, in words
SAVING = 0.1  # of the reference's size: a recipe that saves less is no smaller model
LIMIT = 3  # times the reference's perplexity; what is above stands at the edge, or is not drawn if off the frontier
NAMED = 6  # of the recipes that are as good; how many there are besides is said


@dataclass(frozen=True, eq=False)
class Candidate:
    """An arm as it would be deployed.

    minutes: of each of PHASES, mean over seeds; what arms share (text, or a training that is deployed in several ways)
    counts in full for each of them.
    """

    cell: Cell
    minutes: dict[str, float]

    @property
    def title(self) -> str:
        return self.cell.title

    @property
    def arm(self) -> Arm:
        return self.cell.arm

    @property
    def size(self) -> float:
        """MB (10^6 bytes) of weights, adapters included, and a cache of CONTEXT tokens."""
        return megabytes(self.cell)

    @property
    def trained(self) -> bool:
        return bool(self.arm.training or self.arm.tuning)

    @property
    def effort(self) -> tuple[bool, float]:
        """Orders candidates by what making them takes: those without a training first, then by minutes."""
        return self.trained, sum(self.minutes.values())

    @property
    def peak(self) -> float:
        """GiB that making and evaluating it took at most."""
        return max(record.cost["peak_bytes"] for record in self.cell.records) / 2**30


@dataclass(frozen=True)
class Family:
    """Recipes that answer one question, and the perplexity that they are compared by.

    reference: the one of 16 bits, or the best where that was not run. accuracy: shown besides, where tasks were run.
    diverged: settings with a run that diverged; they are no candidates.
    """

    title: str
    measure: Measure
    candidates: tuple[Candidate, ...]
    reference: Candidate
    accuracy: Measure | None
    diverged: tuple[Cell, ...]

    def loss(self, candidate: Candidate) -> float:
        return self.measure.value(identity, candidate.cell)

    def above(self, candidate: Candidate, other: Candidate) -> Interval:
        """The candidate's perplexity above the other's, as a share."""
        return self.measure.above(candidate.cell, other.cell)

    def frontier(self) -> list[Candidate]:
        """The candidates that none is as small and as good as, the smallest first."""
        sizes = np.array([candidate.size for candidate in self.candidates])
        return [self.candidates[at] for at in frontier(self.measure, [c.cell for c in self.candidates], sizes)]


@dataclass(frozen=True)
class Recommendation:
    """What to take of a family, in sentences: the headline, and what stands behind it.

    budget: MB, or None. best: None where nothing fits. equals: what fits and is not surely worse, the best first.
    cheapest: of the best and its equals, what takes least to make.
    """

    family: Family
    budget: float | None
    headline: str
    details: tuple[str, ...]
    best: Candidate | None = None
    equals: tuple[Candidate, ...] = ()
    cheapest: Candidate | None = None


def families(records: Sequence[Record]) -> list[Family]:
    """Models that keep what they can do, by their perplexity on text; fine-tuned ones, by that of held-out responses.

    A family of which no arm finished is left out. Raises ValueError for records that gather cannot compare.
    """
    cells, alone = gather(records).values(), seconds_alone(records)
    accuracy = next(iter(accuracies(records)), None)
    found = []
    for title, tuned, usual, known in (
        ("To keep what the model can do", False, FULL, text_measures(records)),
        ("Fine-tuned on instructions", True, LORA, response_measures(records)),
    ):
        own = [cell for cell in cells if cell.tuned == tuned]
        for measure in known:
            finished = [cell for cell in own if measure.covers(cell) and not cell.diverged]
            candidates = tuple(Candidate(cell, _minutes(cell, alone)) for cell in finished)
            if candidates:
                best = min(candidates, key=lambda candidate: measure.value(identity, candidate.cell))
                reference = next((c for c in candidates if c.cell.setting == usual), best)
                diverged = tuple(cell for cell in own if cell.diverged)
                found.append(Family(title, measure, candidates, reference, accuracy, diverged))
    return found


def _minutes(cell: Cell, alone: dict[str, dict[str, float]]) -> dict[str, float]:
    seconds = [alone[record.key] for record in cell.records]
    return {phase: float(np.mean([own.get(phase, 0.0) for own in seconds])) / 60 for phase in PHASES}


def check_budget(budget: float | None) -> None:
    """ValueError for a budget (MB) that is not a number above 0."""
    if budget is not None and not (math.isfinite(budget) and budget > 0):
        raise ValueError(f"budget: {budget:g} MB is not allowed; use a number above 0")


def recommendations(records: Sequence[Record], budget: float | None = None) -> list[Recommendation]:
    """What to take of each family; raises ValueError as recommend and gather do."""
    return [recommend(family, budget) for family in families(records)]


def recommend(family: Family, budget: float | None = None) -> Recommendation:
    """The lowest perplexity within `budget` MB; without one, the smallest within SHARE of the reference.

    Raises ValueError for a budget that is not a number above 0.
    """
    check_budget(budget)
    by_size = sorted(family.candidates, key=lambda candidate: (candidate.size, family.loss(candidate)))
    near = [c for c in by_size if family.loss(c) <= (1 + SHARE) * family.loss(family.reference)]
    limit = near[0].size if budget is None else budget
    fitting = sorted((c for c in by_size if c.size <= limit), key=family.loss)
    if not fitting:
        smallest = f"{by_size[0].title}, takes {_size(by_size[0])}"
        text = f"Nothing that was run fits in {budget:g} MB: the smallest, {smallest}."
        return Recommendation(family, budget, text, (*_worse_than_guessing(family), *_left_out(family)))
    best, *others = fitting
    gaps = {other: family.above(other, best) for other in others}
    rate = (1 - LEVEL) / 2 / max(1, len(others))  # all of these comparisons hold at once (Bonferroni)
    equals = tuple(other for other in others if gaps[other].bounds(rate)[0] <= 0)
    cheapest = min((best, *equals), key=lambda candidate: candidate.effort)
    details = [
        *_worse_than_guessing(family),
        *_far_from_reference(family, budget, best),
        *_beside_others(budget, best, equals, cheapest, gaps),
        *(_cost(candidate) for candidate in dict.fromkeys((best, cheapest))),
        *_export(best),
        *_seeds(family, fitting),
        *_own_text(best),
        *_left_out(family),
    ]
    return Recommendation(family, budget, _headline(family, budget, best), tuple(details), best, equals, cheapest)


def _headline(family: Family, budget: float | None, best: Candidate) -> str:
    measure, reference = family.measure, family.reference
    value = f"{measure.title} {measure.text(family.loss(best))}"
    if best is not reference:
        value += f", {family.above(best, reference).text(percent)} above {reference.title}"
    if budget is not None:
        return f"The best within {budget:g} MB: {best.title}, {value}, in {_size(best)}."
    if best.size <= (1 - SAVING) * reference.size:
        return f"The smallest within {percent(SHARE)} of {reference.title}: {best.title}, {value}, in {_size(best)}."
    text = f"Nothing that saves {percent(SAVING)} of the size is within {percent(SHARE)} of {reference.title}"
    text += f"{'' if best is reference else f': {best.title}'}, {value}, in {_size(best)}"
    smaller = [candidate for candidate in family.frontier() if candidate.size < best.size]
    if not smaller:
        return f"{text}."
    above = family.above(smaller[-1], best).text(percent)
    return f"{text}; the next, {smaller[-1].title}, is {above} above it, in {_size(smaller[-1])}."


def _worse_than_guessing(family: Family) -> list[str]:
    best = family.reference
    vocabulary = best.cell.records[0].provenance["model"].get("vocabulary", math.inf)  # older records have none
    if best.cell.bits != FULL.bits or family.loss(best) < vocabulary:
        return []
    return [
        f"All of this is meaningless: {best.title} has a {family.measure.title} of {number(family.loss(best))}, more "
        f"than the {vocabulary:,} of guessing evenly among its tokens. Are these its weights and its tokenizer?"
    ]


def _far_from_reference(family: Family, budget: float | None, best: Candidate) -> list[str]:
    if budget is not None or best is family.reference:
        return []
    high = family.above(best, family.reference).high
    return [f"It may be further away than that: the interval reaches {percent(high)}."] if high > SHARE else []


def _beside_others(
    budget: float | None,
    best: Candidate,
    equals: Sequence[Candidate],
    cheapest: Candidate,
    gaps: dict[Candidate, Interval],
) -> list[str]:
    """How sure it is that nothing else is better: gaps holds the distance of all that fit, the best first."""
    those = "that are no larger" if budget is None else "that fit"
    if not gaps:
        return [f"Nothing else that was run {'is as small' if budget is None else 'fits'}."]
    runner_up, gap = next(iter(gaps.items()))
    found = [f"The next best of those {those}, {runner_up.title}, is worse by {gap.text(percent)}."]
    over = f"over {len(gaps)} comparisons at once" if len(gaps) > 1 else "by this comparison"
    if not equals:
        others = f"all {len(gaps)} others {those}" if len(gaps) > 1 else "it"
        return [*found, f"{capital(best.title)} is better than {others}, with 95% confidence {over}."]
    named = [f"{other.title} ({_size(other)})" for other in equals[:NAMED]]
    more = [f"{len(equals) - NAMED} more"] if len(equals) > NAMED else []
    found.append(f"As good, as far as these data can tell {over}: {listed([*named, *more])}.")
    return [*found, f"Of all these, {cheapest.title} costs least to make."]


def _cost(candidate: Candidate) -> str:
    parts = {PHASES[phase]: minutes for phase, minutes in candidate.minutes.items() if _time(minutes) != "0 s"}
    shares = f" ({', '.join(f'{what} {_time(own)}' for what, own in parts.items())})" if len(parts) > 1 else ""
    took = f"took {_time(sum(parts.values()))}{shares}" if parts else "takes no time"
    training = "" if candidate.trained else ", without any training"
    peak = f"with its evaluation, at most {number(candidate.peak)} GiB of memory"
    return f"Making {candidate.title} {took}{training}; {peak}."


def _time(minutes: float) -> str:
    return f"{60 * minutes:.0f} s" if minutes < 2 else f"{number(minutes)} min"


def _export(best: Candidate) -> list[str]:
    try:
        kind = container(best.arm)
    except ValueError:
        return []
    return [f"For other software, as {kind}: study export {best.cell.records[0].key[:8]} --output FOLDER"]


def _seeds(family: Family, fitting: Sequence[Candidate]) -> list[str]:
    once = [candidate.cell for candidate in fitting if candidate.trained and len(candidate.cell.records) == 1]
    if any(cell.kind not in family.measure.spreads for cell in once):
        return ["Intervals resample what was scored; with one seed they say nothing about other trainings."]
    return []


def _own_text(best: Candidate) -> list[str]:
    data = best.arm.data
    if not isinstance(data, RealText) or data.corpus not in best.arm.evaluation.corpora:
        return []
    return [f"It was made on other documents of {corpus_title(data.corpus)}, which favours it there."]


def _left_out(family: Family) -> list[str]:
    if not family.diverged:
        return []
    return [f"Left out, since a run of it diverged: {listed([cell.title for cell in family.diverged])}."]


def _size(candidate: Candidate) -> str:
    return f"{number(candidate.size)} MB"


def frontier_table(found: Recommendation) -> "pd.DataFrame":
    """A row for each candidate of the frontier, and for the cheapest of equals, as text; the smallest first."""
    import pandas as pd

    family, accuracy = found.family, found.family.accuracy
    chosen = family.frontier()
    chosen += [found.cheapest] if found.cheapest and found.cheapest not in chosen else []
    shown = []
    for candidate in sorted(chosen, key=lambda candidate: (candidate.size, family.loss(candidate))):
        notes = ["best"] if candidate is found.best else []
        notes += ["as good, costs least"] if candidate is found.cheapest and candidate is not found.best else []
        sizes = candidate.cell.records[0].metrics
        row = {
            "Recipe": capital(candidate.title) + (f" ({', '.join(notes)})" if notes else ""),
            "Size, MB": number(candidate.size),
            "Weights, MB": number(sizes["bytes/weights"] / 1e6),
            "Cache, kB/token": number(sizes["bytes/cache_per_token"] / 1e3),
            capital(family.measure.title): family.measure.interval(identity, candidate.cell).text(number),
            f"Above {family.reference.title}": family.above(candidate, family.reference).text(percent),
        }
        if accuracy:
            row[f"{capital(accuracy.title)}, %"] = accuracy.interval(identity, candidate.cell).text(accuracy.text)
        row |= {"Making it, min": points(sum(candidate.minutes.values())), "Peak, GiB": number(candidate.peak)}
        shown.append(row)
    return pd.DataFrame(shown)


def as_text(records: Sequence[Record], budget: float | None = None) -> str:
    """The recommendations for a terminal."""
    found = recommendations(records, budget)
    blocks = ["\n".join([f"{each.family.title}: {each.headline}", *map("  {}".format, each.details)]) for each in found]
    return "\n\n".join([TITLE, *blocks, SIZES])


def as_markdown_section(records: Sequence[Record], budget: float | None = None) -> str:
    """The recommendations and their frontiers in Markdown, without a heading."""
    blocks = []
    for found in recommendations(records, budget):
        blocks.append(f"**{found.family.title}.** {markdown(found.headline)}")
        blocks += ["\n".join(f"- {markdown(sentence)}" for sentence in found.details)] if found.details else []
        blocks.append(as_markdown(frontier_table(found)))
    return "\n\n".join([*blocks, SIZES] if blocks else ["No arm finished."])


def frontier_figure(found: Recommendation) -> "Figure":
    """Size against times the reference's perplexity, with paired intervals and names for the frontier; ringed: what is
    recommended."""
    import matplotlib as mpl  # what only reads a recommendation draws nothing
    from matplotlib.lines import Line2D

    from studylib.report.style import (
        STYLE,
        draw_best,
        draw_point,
        draw_times,
        finish,
        marker_style,
        new_panels,
    )

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
    ax: "Axes", found: Recommendation, named: Sequence[Candidate], height: dict[Candidate, float], line: "Line2D"
) -> None:
    """Names at the points, clear of every point that is drawn and of the line between the best."""
    from studylib.report.style import HALO, look_of, move_apart

    family, texts = found.family, []
    for candidate in named:
        y, colour = height[candidate], look_of(candidate.cell.method).colour
        text = candidate.title + (f": {number(_times(family, candidate))}" if y == LIMIT else "")
        texts.append(ax.text(candidate.size, y, text, fontsize=8, color=colour, path_effects=[HALO]))
    drawn = [candidate for candidate in family.candidates if candidate in named or height[candidate] < LIMIT]
    sizes, heights = [candidate.size for candidate in drawn], [height[candidate] for candidate in drawn]
    move_apart(ax, texts, sizes, heights, line)
