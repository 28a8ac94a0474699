"""Which recipe for a model: what is best for its size of all that was run, what it costs, and how sure that is."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
from studylib.methods import GGUF, container, corpus_title, setting
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
MORE = 2  # times the minutes of what is made fastest: the difference in time decides nothing
NAMED = 6  # of the recipes that are as good; how many there are besides is said


@dataclass(frozen=True, eq=False)
class Candidate:
    """An arm as it would be deployed.

    minutes: of each of PHASES, mean over seeds; what arms share (text, or a training that is deployed in several ways)
    counts in full for each of them. slower: how many times as long the machine takes as the fastest that made others.
    """

    cell: Cell
    minutes: dict[str, float]
    slower: float = 1.0

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
        """What making it takes: whether it has to be trained, and minutes, as if of the fastest machine."""
        return self.trained, sum(self.minutes.values()) / self.slower

    @property
    def peak(self) -> float:
        """GiB that making and evaluating it took at most."""
        return max(record.cost["peak_bytes"] for record in self.cell.records) / 2**30


@dataclass(frozen=True)
class Family:
    """Recipes that answer one question, and the perplexity that they are compared by.

    reference: the one of 16 bits, or the best where that was not run. accuracy: shown besides, where tasks were run.
    diverged: settings with a run that diverged; they are no candidates. untuned: the model as it is, beside fine-tuned
    ones, where the same was measured of it.
    """

    title: str
    measure: Measure
    candidates: tuple[Candidate, ...]
    reference: Candidate
    accuracy: Measure | None
    diverged: tuple[Cell, ...]
    untuned: Cell | None = None

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

    budget: MB, or None. chosen: of the best and its equals, the first that takes little to make (see _cheapest); None
    where nothing fits. best: the lowest perplexity of what fits. equals: what fits, is not surely worse and is within
    SHARE of the best, the best first.
    """

    family: Family
    budget: float | None
    headline: str
    details: tuple[str, ...]
    chosen: Candidate | None = None
    best: Candidate | None = None
    equals: tuple[Candidate, ...] = ()


def families(records: Sequence[Record]) -> list[Family]:
    """Models that keep what they can do, by their perplexity on text; fine-tuned ones, by that of held-out responses.

    A family of which no arm finished is left out. Raises ValueError for records that gather cannot compare.
    """
    cells, alone = gather(records), seconds_alone(records)
    accuracy = next(iter(accuracies(records)), None)
    found = []
    for title, tuned, usual, known in (
        ("Served as it is", False, FULL, text_measures(records)),
        ("Fine-tuned and deployed", True, LORA, response_measures(records)),
    ):
        own = [cell for cell in cells.values() if cell.tuned == tuned]
        full = cells.get(FULL) if tuned else None
        slower = _slower([record for cell in own for record in cell.records])
        for measure in known:
            finished = [cell for cell in own if measure.covers(cell) and not cell.diverged]
            candidates = tuple(
                Candidate(cell, _minutes(cell, alone), float(np.mean([slower[_machine(own)] for own in cell.records])))
                for cell in finished
            )
            if candidates:
                best = min(candidates, key=lambda candidate: measure.value(identity, candidate.cell))
                reference = next((c for c in candidates if c.cell.setting == usual), best)
                diverged = tuple(cell for cell in own if cell.diverged)
                untuned = full if full and measure.covers(full) else None
                found.append(Family(title, measure, candidates, reference, accuracy, diverged, untuned))
    return found


def _minutes(cell: Cell, alone: dict[str, dict[str, float]]) -> dict[str, float]:
    seconds = [alone[record.key] for record in cell.records]
    return {phase: float(np.mean([own.get(phase, 0.0) for own in seconds])) / 60 for phase in PHASES}


def _machine(record: Record) -> tuple[Any, ...]:
    """What tells apart how fast it was made."""
    hardware = record.provenance.get("hardware", {})
    parts = (hardware.get(name) for name in ("processor", "cores", "accelerator"))
    return (*parts, record.provenance.get("compute_dtype"))


def _slower(records: Sequence[Record]) -> dict[tuple[Any, ...], float]:
    """By machine, how many times as long it takes as the fastest of them: to evaluate, which all of these do alike. The
    median, as methods differ and a machine may have had other work."""
    seconds: dict[tuple[Any, ...], list[float]] = {}
    for record in records:
        seconds.setdefault(_machine(record), []).append(record.cost["seconds"].get("evaluate", 0.0))
    medians = {machine: float(np.median(own)) for machine, own in seconds.items()}
    least = min((value for value in medians.values() if value > 0), default=1.0)
    return {machine: max(1.0, value / least) for machine, value in medians.items()}


def check_budget(budget: float | None) -> None:
    """ValueError for a budget (MB) that is not a number above 0."""
    if budget is not None and not (math.isfinite(budget) and budget > 0):
        raise ValueError(f"budget: {budget:g} MB is not allowed; use a number above 0")


def recommendations(records: Sequence[Record], budget: float | None = None) -> list[Recommendation]:
    """What to take of each family; raises ValueError as recommend and gather do."""
    return [recommend(family, budget) for family in families(records)]


@dataclass(frozen=True)
class Choice:
    """What is chosen of a family, and of what: see Recommendation.

    fitting: what may be chosen, `those` in words. gaps: how far each of these is above the best, the best first.
    """

    those: str
    fitting: list[Candidate]
    gaps: dict[Candidate, Interval]
    best: Candidate
    equals: tuple[Candidate, ...]
    chosen: Candidate


def by_size(family: Family) -> list[Candidate]:
    """The candidates, the smallest first."""
    return sorted(family.candidates, key=lambda candidate: (candidate.size, family.loss(candidate)))


def recommend(family: Family, budget: float | None = None) -> Recommendation:
    """What fits in `budget` MB; without one, what is as small as the smallest within SHARE of the reference.

    Where nothing smaller is within SHARE, what is nearest of all that saves SAVING. Of those as good as the best, the
    one that takes least to make. Raises ValueError for a budget that is not a number above 0.
    """
    check_budget(budget)
    found = choose(family, budget)
    if found is None:
        smallest = by_size(family)[0]
        text = f"Nothing that was run fits in {budget:g} MB: the smallest, {smallest.title}, takes {_size(smallest)}."
        return Recommendation(family, budget, text, (*_worse_than_guessing(family), *_left_out(family)))
    best, chosen = found.best, found.chosen
    details = [
        *_worse_than_guessing(family),
        *_far_from_reference(family, budget, chosen),
        *_untuned(family),
        *_beside_others(found.those, best, found.equals, chosen, found.gaps),
        *(_cost(candidate) for candidate in dict.fromkeys((chosen, best))),
        *_export(chosen),
        *_seeds(family, found.fitting),
        *_own_text(chosen),
        *_left_out(family),
    ]
    return Recommendation(family, budget, _headline(family, budget, chosen), tuple(details), chosen, best, found.equals)


def choose(family: Family, budget: float | None = None, tolerance: float = SHARE) -> Choice | None:
    """The rule of `recommend`, for any tolerance in the place of SHARE; None where nothing fits. The page has the same
    rule in explorer.js, which a test compares."""
    ordered = by_size(family)
    near = [c for c in ordered if family.loss(c) <= (1 + tolerance) * family.loss(family.reference)]
    smaller = [c for c in ordered if c.size <= (1 - SAVING) * family.reference.size]
    if budget is not None:
        fitting, those = [c for c in ordered if c.size <= budget], "that fit"
    elif near[0] in smaller:
        fitting, those = [c for c in ordered if c.size <= near[0].size], "that are no larger"
    else:
        fitting, those = smaller or [c for c in near if c.size <= family.reference.size], "that save as much"
    if not fitting:
        return None
    best, *others = sorted(fitting, key=family.loss)
    gaps = {other: family.above(other, best) for other in others}
    rate = comparisons_rate(len(others))
    equals = tuple(
        other
        for other in others
        if gaps[other].bounds(rate)[0] <= 0
        and family.loss(other) <= (1 + tolerance) * family.loss(best)
        and (other in near or best not in near)
    )
    return Choice(those, fitting, gaps, best, equals, _cheapest((best, *equals)))


def comparisons_rate(count: int) -> float:
    """In what share of cases each of so many comparisons may err, so that all hold at once (Bonferroni)."""
    return (1 - LEVEL) / 2 / max(1, count)


def _cheapest(candidates: Sequence[Candidate]) -> Candidate:
    """The first of those that take about as little to make as any: no training where one needs none, and no more than
    MORE times the least minutes, or a second."""
    trained, least = min(candidate.effort for candidate in candidates)
    return next(c for c in candidates if c.trained == trained and c.effort[1] <= MORE * max(least, 1 / 60))


def _headline(family: Family, budget: float | None, chosen: Candidate) -> str:
    measure, reference, loss = family.measure, family.reference, family.loss(chosen)
    value = f"{chosen.title}, {measure.title} {measure.text(loss)}"
    if chosen is not reference:
        value += f", {family.above(chosen, reference).text(percent)} above {reference.title}"
    value += f", in {_size(chosen)}"
    if budget is not None:
        return f"The best within {budget:g} MB: {value}."
    if chosen.size > (1 - SAVING) * reference.size:
        return f"Nothing that was run saves {percent(SAVING)} of the size of {reference.title}: {value}."
    if loss <= (1 + SHARE) * family.loss(reference):
        return f"The smallest within {percent(SHARE)} of {reference.title}: {value}."
    return f"Nothing that saves {percent(SAVING)} of the size is within {percent(SHARE)}: the nearest is {value}."


def _worse_than_guessing(family: Family) -> list[str]:
    best = family.reference
    vocabulary = best.cell.records[0].provenance["model"].get("vocabulary", math.inf)  # older records have none
    if best.cell.bits != FULL.bits or family.loss(best) < vocabulary:
        return []
    return [
        f"All of this is meaningless: {best.title} has a {family.measure.title} of {number(family.loss(best))}, more "
        f"than the {vocabulary:,} of guessing evenly among its tokens. Are these its weights and its tokenizer?"
    ]


def _far_from_reference(family: Family, budget: float | None, chosen: Candidate) -> list[str]:
    near = family.loss(chosen) <= (1 + SHARE) * family.loss(family.reference)
    if budget is not None or chosen is family.reference or not near:
        return []
    high = family.above(chosen, family.reference).high
    return [f"It may be further away than that: the interval reaches {percent(high)}."] if high > SHARE else []


def _untuned(family: Family) -> list[str]:
    if family.untuned is None:
        return []
    value = family.measure.interval(identity, family.untuned).text(family.measure.text)
    return [f"{capital(family.untuned.title)}, which is not fine-tuned, has {value}."]


def _beside_others(
    those: str, best: Candidate, equals: Sequence[Candidate], chosen: Candidate, gaps: dict[Candidate, Interval]
) -> list[str]:
    """How sure it is that nothing else is better: gaps holds the distance of all `those` from the best, best first."""
    if not gaps:
        return [f"Nothing else was run of those {those}."]
    over = f"over {len(gaps)} comparisons at once" if len(gaps) > 1 else "by this comparison"
    if not equals:
        runner_up, gap = next(iter(gaps.items()))
        others = f"all {len(gaps)} others {those}" if len(gaps) > 1 else "it"
        return [
            f"The next best of those {those}, {runner_up.title}, is worse by {gap.text(percent)}.",
            f"{capital(best.title)} is better than {others}, with 95% confidence {over}.",
        ]
    same = [candidate for candidate in (best, *equals) if candidate is not chosen]
    named = listed([f"{other.title} ({_size(other)})" for other in same], NAMED)
    found = [f"As good, as far as these data can tell {over}: {named}."]
    if chosen is best:
        return [*found, f"{capital(best.title)} has the lowest perplexity of these, and none is much cheaper to make."]
    lowest = f"{best.title} has the lowest perplexity of those {those}. {capital(chosen.title)} is"
    return [*found, f"{capital(lowest)} {gaps[chosen].text(percent)} above it and costs much less to make."]


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
    """How other software gets it: in what holds it best, and for llama.cpp."""
    try:
        kind = container(best.arm)
    except ValueError:
        return []
    text = f"For other software, as {kind}: study export {best.cell.records[0].key[:8]} --output FOLDER"
    with contextlib.suppress(ValueError):
        if container(best.arm, GGUF) != kind:
            text += ", and with --format gguf for llama.cpp"
    return [text]


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
    """A row for each candidate of the frontier, and for what is recommended, as text; the smallest first.

    What has more than LIMIT times the reference's perplexity is left out.
    """
    import pandas as pd

    family, accuracy = found.family, found.family.accuracy
    chosen = [candidate for candidate in family.frontier() if _times(family, candidate) <= LIMIT]
    chosen += [own for own in dict.fromkeys((found.chosen, found.best)) if own and own not in chosen]
    shown = []
    for candidate in sorted(chosen, key=lambda candidate: (candidate.size, family.loss(candidate))):
        notes = ["recommended"] if candidate is found.chosen else []
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
    marked = [found.chosen] if found.chosen else []
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
