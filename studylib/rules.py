"""The rules that claims are judged by: from the numbers of a claim's arms to an effect, a verdict and a sentence."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from studylib.comparison import (
    Cell,
    Measure,
    identity,
    listed,
    nats,
    number,
    percent,
    points,
    speedup,
    won_back,
    won_back_share,
)
from studylib.effects import (
    ACCURACY,
    BITS,
    COST,
    INCONCLUSIVE,
    NATS,
    NEURONS,
    NOT_REPRODUCED,
    PERPLEXITY,
    REPRODUCED,
    TIMES,
    WON_BACK,
    Effect,
    Unit,
)
from studylib.execution import ADAPTED, EXECUTIONS, PACKED
from studylib.records import Record
from studylib.statistics import Interval, paired_bootstrap

POINTS = 2.0  # tolerance in points of accuracy: how far the official re-run of LLM-QAT lies from its paper (A13)
SHARE = 0.05  # tolerance in perplexity: five percent
MOST = 0.5  # "most of the loss": more than this share
NORMAL = 10.0  # "near-normal": at most this % of neurons fail a test that 5% of normal ones fail
SAVED_BITS = 0.01  # tolerance of a number of bits that a paper derives
EXPLODES = 2.0  # "explodes": at least this many times full precision's perplexity


class Outcome(NamedTuple):
    """What a rule finds. effect: where a claim has several parts, that of the part which decides the verdict."""

    effect: Effect
    verdict: str
    text: str


def together(effects: Sequence[Effect], text: str) -> Outcome:
    """What a claim's parts, the most telling first, say together: reproduced only if all are, not if any is not."""
    verdicts = [effect.verdict for effect in effects]
    verdict = next((verdict for verdict in (NOT_REPRODUCED, INCONCLUSIVE) if verdict in verdicts), REPRODUCED)
    return Outcome(effects[verdicts.index(verdict)], verdict, text)


def wins_back(measure: Measure, full: Cell, rtn: Cell, qat: Cell) -> Outcome:
    loss, share = won_back(measure, full, rtn, qat)
    if share is None:
        lost = Effect(loss, _unit(measure), f"lost by RTN at {rtn.bits}", above=0)
        text = f"RTN at {rtn.bits} loses {lost.text}, which is not clearly above zero"
        return Outcome(lost, INCONCLUSIVE, f"{text}: what share of it LLM-QAT wins back cannot be told.")
    # The share's interval is only shown: the rule is linear, so that no division can blow it up.
    rule = measure.interval(lambda f, r, q: measure.loss(q, r) - MOST * measure.loss(f, r), full, rtn, qat)
    values = ", ".join(f"{cell.title} {measure.text(measure.value(identity, cell))}" for cell in (full, rtn, qat))
    seeds = _seeds(measure, won_back_share, percent, full, rtn, qat)
    text = f"{values}: LLM-QAT wins back {share.text(percent)} of what RTN loses{seeds}."
    shown = Effect(share, WON_BACK, f"of RTN at {rtn.bits}, won back by LLM-QAT", above=MOST)
    return Outcome(shown, Effect(rule, PERPLEXITY, "", above=0).verdict, text)


def cache_breaks(measure: Measure, eight: Cell, four: Cell, weights: Cell, qat: Cell | None) -> Outcome:
    """Whether four bits for the cache cost RTN much, and more than four bits for the `weights`; and LLM-QAT less."""
    cost = _worse(measure, eight, four, f"lost by RTN from {eight.bits} to {four.bits}")
    cost = replace(cost, above=_tolerance(measure))
    where = replace(_worse(measure, weights, four, f"{four.bits} behind {weights.bits}, by RTN"), above=0)
    text = f"with RTN, going from {eight.bits} to {four.bits} costs {_tolerated(measure, cost)}; "
    text += f"{four.bits} is worse than {weights.bits} by {where.text}."
    if qat is None:
        text += f" LLM-QAT at {four.bits} was not run, so only this part of the claim is tested."
        return together([cost, where], text)

    def gained(r, q):
        return measure.loss(q, r)

    found = measure.interval(gained, four, qat)
    gain = Effect(found, _unit(measure), f"gained by LLM-QAT over RTN at {four.bits}", above=0, of=qat.setting)
    text += f" LLM-QAT wins back {gain.text}{_seeds(measure, gained, measure.text, four, qat)}."
    return together([cost, where, gain], text)


def small_gain(measure: Measure, rtn: Cell, qat: Cell, rtn_4: Cell | None, qat_4: Cell | None) -> Outcome:
    effect = replace(_worse(measure, qat, rtn), below=_tolerance(measure))
    text = f"RTN at {rtn.bits} is worse than LLM-QAT by {_tolerated(measure, effect)}"
    if rtn_4 and qat_4:
        text += f", at {rtn_4.bits} by {_tolerated(measure, _worse(measure, qat_4, rtn_4))}"
    return together([effect], f"{text}.")


def no_loss(measure: Measure, full: Cell, rtn: Cell) -> Outcome:
    effect = _within(measure, full, rtn)
    return together([effect], f"RTN at {rtn.bits} costs {_tolerated(measure, effect)}.")


def explodes(measure: Measure, full: Cell, cell: Cell) -> Outcome:
    found = measure.interval(np.divide, cell, full)
    effect = Effect(found, TIMES, f"full precision's, by {cell.title}", above=EXPLODES)
    return together([effect], f"{cell.title} has {effect.text} full precision's.")


def is_best(measure: Measure, best: Cell, *others: Cell) -> Outcome:
    """Whether `best` is better than each of the others."""
    effects = [replace(_worse(measure, best, other), above=0) for other in others]
    texts = [f"{_short(other)} by {effect.text}" for other, effect in zip(others, effects, strict=True)]
    nearest = sorted(effects, key=lambda effect: effect.interval.estimate)
    return together(nearest, f"worse than {best.title}: {listed(texts)}.")


def matches(measure: Measure, reference: Cell, cell: Cell, other: Cell | None = None) -> Outcome:
    """Whether `cell` is as good as `reference`; and, where it was run, `other` worse than `cell`."""
    effects = [_within(measure, reference, cell)]
    text = f"{cell.title} is worse than {reference.title} by {_tolerated(measure, effects[0])}"
    if other:
        effects.append(replace(_worse(measure, cell, other), above=0))
        text += f"; {other.title} is worse than {cell.title} by {effects[1].text}"
    return together(effects, f"{text}.")


def alike(measure: Measure, reference: Cell, *others: Cell) -> Outcome:
    """Whether none of the others is worse or better than `reference` by more than the tolerance."""
    effects, text = _all_within(measure, reference, others)
    return together(sorted(effects, key=lambda effect: -abs(effect.interval.estimate)), text)


def layers_matter(measure: Measure, every: Cell, few: Cell, *ranks: Cell) -> Outcome:
    """Whether adapters on all layers beat those on few, while their rank hardly matters."""
    gain = replace(_worse(measure, every, few), above=0)
    effects, beside = _all_within(measure, every, ranks)
    return together([gain, *effects], f"{_short(few)} is worse than all layers by {gain.text}; {beside}")


def small_groups_help(measure: Measure, usual: Cell, small: Cell) -> Outcome:
    effect = replace(_worse(measure, small, usual), above=0, below=_tolerance(measure))
    text = f"{usual.title} is worse than {small.setting.variant} by {_tolerated(measure, effect)}."
    return together([effect], text)


def keeps_up(measure: Measure, full: Cell, *cells: Cell | None) -> Outcome:
    """Whether every cell that was run loses less than the tolerance against `full`."""
    run = [cell for cell in cells if cell]
    effects = [replace(_worse(measure, full, cell), below=_tolerance(measure)) for cell in run]
    texts = [f"{cell.title} by {_tolerated(measure, effect)}" for cell, effect in zip(run, effects, strict=True)]
    worst = sorted(effects, key=lambda effect: -effect.interval.estimate)
    return together(worst, f"worse than {full.title}: {listed(texts)}.")


def saves_bits(claimed: float) -> Callable[..., Outcome]:
    """A rule: the first cell's weights are stored in `claimed` bits more than the second's, to within SAVED_BITS."""

    def rule(measure: Measure, plain: Cell, double: Cell) -> Outcome:
        found = measure.interval(np.subtract, plain, double)
        effect = Effect(found, BITS, "saved", above=claimed - SAVED_BITS, below=claimed + SAVED_BITS)
        texts = [f"{cell.title} {cell.records[0].scores['bits'][0]:.3f}" for cell in (plain, double)]
        verdict = REPRODUCED if abs(found.estimate - claimed) < SAVED_BITS else NOT_REPRODUCED
        return Outcome(effect, verdict, f"{listed(texts)}: {found.estimate:.3f} saved, counted from what is stored.")

    return rule


def near_normal(measure: Measure, cell: Cell) -> Outcome:
    found = measure.interval(identity, cell)
    effect = Effect(found, NEURONS, "of the neurons fail Shapiro-Wilk", below=NORMAL)
    return together([effect], f"{found.text(points)} of the neurons tested fail Shapiro-Wilk at 5%.")


def converges_faster(measure: Measure, fast: Cell, slow: Cell) -> Outcome:
    """Whether the validation loss of `fast` is below that of `slow` at half of the training, wherever both began."""

    def behind(own: Record, other: Record, at: float) -> float:
        ours, theirs = (record.curve[int(at * len(record.curve))]["loss"] for record in (own, other))
        return theirs - ours

    found, seeds, decided = _by_seed(measure, partial(behind, at=0.5), fast, slow)
    began, *_ = _by_seed(measure, partial(behind, at=0), fast, slow)
    effect = Effect(found, NATS, f"{slow.title} behind {fast.title}, half-way, {seeds}", above=0)
    text = f"half-way, the validation loss of {slow.title} is {effect.text} above that of {fast.title} ({seeds}); "
    text += f"before training, {began.text(nats)}."
    return Outcome(effect, effect.verdict if decided else INCONCLUSIVE, text)


def takes_at_most(times: float) -> Callable[..., Outcome]:
    """A rule: training the second cell takes at most so many times as long as the first, for as many steps."""

    def rule(measure: Measure, usual: Cell, cell: Cell) -> Outcome:
        found, seeds, decided = _by_seed(
            measure, lambda own, other: other.cost["seconds"]["train"] / own.cost["seconds"]["train"], usual, cell
        )
        effect = Effect(found, TIMES, f"the time of {usual.title}, by {cell.title}, {seeds}", below=times, papers=False)
        text = f"{cell.title} takes {effect.text} that of {usual.title} ({seeds})."
        return Outcome(effect, effect.verdict if decided else INCONCLUSIVE, text)

    return rule


def decodes_faster(times: float) -> Callable[..., Outcome]:
    """A rule: integers alone decode at least so many times as fast as with an adapter beside them."""

    def rule(measure: Measure, cell: Cell) -> Outcome:
        found = speedup(measure, cell, PACKED, ADAPTED)
        what = "as fast without an adapter beside 4 bits"
        effect = Effect(found, TIMES, what, above=times)
        medians = [1000 * np.median(cell.scores(part)) for part in measure.parts]
        texts = [f"{number(median)} ms in {kind}" for median, kind in zip(medians, EXECUTIONS, strict=True)]
        return together([effect], f"{listed(texts)}: {effect.text} {what}.")

    return rule


def _by_seed(
    measure: Measure, contrast: Callable[[Record, Record], float], a: Cell, b: Cell
) -> tuple[Interval, str, bool]:
    """One number for each seed of both: their mean with Student's interval; how many, in words; if they say more than
    one run does."""
    own, other = ({record.arm.seed: record for record in cell.records} for cell in (a, b))
    found = [[contrast(own[seed], other[seed])] for seed in sorted(own.keys() & other.keys())]
    seeds = f"{len(found)} {'seed' if len(found) == 1 else 'seeds'}"
    return paired_bootstrap(partial(np.mean, axis=-1), found, family=measure.family), seeds, len(found) > 1


def generalises(measure: Measure, generated: Cell, wikipedia: Cell, c4: Cell) -> Outcome:
    """Real text is compared where it was not trained on: elsewhere, and on the tasks."""
    own = {"perplexity/wikipedia": wikipedia, "perplexity/c4": c4}.get(measure.name)
    return is_best(measure, generated, *(cell for cell in (wikipedia, c4) if cell is not own))


def sampling_beats_greedy(measure: Measure, hybrid: Cell, sampled: Cell, greedy: Cell) -> Outcome:
    names = ("hybrid", "sampled")
    effects = [
        replace(_worse(measure, cell, greedy, f"greedy text behind {name}"), above=0)
        for cell, name in zip((hybrid, sampled), names, strict=True)
    ]
    beside = listed([f"{effect.text} beside {name}" for effect, name in zip(effects, names, strict=True)])
    return together(effects, f"greedy text is worse by {beside}.")


def smoothing(measure: Measure, four: Cell, four_smooth: Cell, eight: Cell, eight_smooth: Cell) -> Outcome:
    gain, other = (
        _worse(measure, smooth, cell, f"lost without SmoothQuant by LLM-QAT at {cell.bits}")
        for cell, smooth in ((four, four_smooth), (eight, eight_smooth))
    )
    at_four, at_eight = _tolerated(measure, gain), _tolerated(measure, other)
    text = f"without SmoothQuant, LLM-QAT at {four.bits} is worse by {at_four}, at {eight.bits} by {at_eight}."
    return together([replace(gain, above=0), replace(other, below=_tolerance(measure))], text)


def _worse(measure: Measure, a: Cell, b: Cell, what: str = "") -> Effect:
    """How much worse b is than a, as a share of the perplexity or in points of accuracy."""
    what = what or f"{_short(b)} behind {_short(a)}"
    if measure.is_perplexity:
        return Effect(measure.above(b, a), COST, what, of=b.setting)
    return Effect(measure.interval(measure.loss, a, b), ACCURACY, what, of=b.setting)


def _within(measure: Measure, a: Cell, b: Cell) -> Effect:
    """How much worse b is than a, where it may be neither worse nor better by more than the tolerance."""
    tolerance = _tolerance(measure)
    return replace(_worse(measure, a, b), above=-tolerance, below=tolerance)


def _all_within(measure: Measure, reference: Cell, others: Sequence[Cell]) -> tuple[list[Effect], str]:
    """`_within` for each of the others, and all of them in words."""
    effects = [_within(measure, reference, other) for other in others]
    texts = [f"{_short(other)} by {_tolerated(measure, e)}" for other, e in zip(others, effects, strict=True)]
    return effects, f"worse than {reference.title}: {listed(texts)}."


def _tolerance(measure: Measure) -> float:
    return SHARE if measure.is_perplexity else POINTS


def _tolerated(measure: Measure, effect: Effect) -> str:
    return f"{effect.text} (tolerance {percent(SHARE) if measure.is_perplexity else points(POINTS)})"


def _unit(measure: Measure) -> Unit:
    return PERPLEXITY if measure.is_perplexity else ACCURACY


def _short(cell: Cell) -> str:
    return cell.setting.variant or cell.title


def _seeds(measure: Measure, contrast, form: Callable[[float], str], *cells: Cell) -> str:
    found = measure.over_seeds(contrast, *cells)
    return f" (single seeds: {form(found[0])} to {form(found[1])})" if found else ""
