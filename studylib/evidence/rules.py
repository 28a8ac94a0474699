"""The rules that claims are judged by: from the numbers of a claim's arms to an effect, a verdict and a sentence."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from studylib.config import ADAPTED_4_BITS, EXECUTIONS, IN_4_BITS, listed, nats, number, percent, points
from studylib.evidence.measures import Cell, Contrast, Measure, identity, megabytes, speedup, won_back, won_back_share
from studylib.evidence.statistics import Interval, paired_bootstrap
from studylib.evidence.verdicts import (
    ACCURACY,
    BITS,
    BITS_PER_BYTE,
    COST,
    DIVERGENCE,
    NATS,
    NEURONS,
    PERPLEXITY,
    TIMES,
    WON_BACK,
    Effect,
    Outcome,
)
from studylib.methods import corpus_title, method_title
from studylib.study import Record

POINTS = 2.0  # tolerance in points of accuracy: how far the official re-run of LLM-QAT lies from its paper (A13)
SHARE = 0.05  # tolerance in perplexity: five percent
MOST = 0.5  # "most of the loss": more than this share
NORMAL = 10.0  # "near-normal": at most this % of neurons fail a test that 5% of normal ones fail
SAVED_BITS = 0.01  # tolerance of a number of bits that a paper derives
EXPLODES = 2.0  # "explodes": at least this many times full precision's perplexity
UNITS = {  # of differences by a measure, for each of its kinds
    "perplexity": PERPLEXITY,
    "accuracy": ACCURACY,
    "probability": ACCURACY,
    "bits_per_byte": BITS_PER_BYTE,
    "kl": DIVERGENCE,
}
TOLERANCES = {"perplexity": SHARE, "accuracy": POINTS}  # of what is judged, or was


def together(effects: Sequence[Effect], text: str) -> Outcome:
    """A claim's parts, the most telling first."""
    return Outcome(tuple(effects), text)


def wins_back(measure: Measure, full: Cell, rtn: Cell, qat: Cell) -> Outcome:
    """Whether training wins back more than MOST of what rounding to nearest loses."""
    loss, share = won_back(measure, full, rtn, qat)
    if share is None:
        lost = Effect(loss, UNITS[measure.kind], f"lost by {rtn.title}", above=0)
        text = f"{rtn.title} loses {lost.text}, which is not clearly above zero"
        return Outcome((lost,), f"{text}: what share of it {_name(qat)} wins back cannot be told.")
    # The share's interval is only shown: the rule is linear, so that no division can blow it up.
    rule = measure.interval(lambda f, r, q: measure.loss(q, r) - MOST * measure.loss(f, r), full, rtn, qat)
    values = ", ".join(f"{cell.title} {measure.text(measure.value(identity, cell))}" for cell in (full, rtn, qat))
    seeds = _seeds(measure, won_back_share, percent, full, rtn, qat)
    text = f"{values}: {_name(qat)} wins back {share.text(percent)} of what {_name(rtn)} loses{seeds}."
    shown = Effect(share, WON_BACK, f"of {rtn.title}, won back by {_name(qat)}", above=MOST)
    return Outcome((Effect(rule, PERPLEXITY, shown.what, above=0, of=qat.setting),), text, shown)


def cache_breaks(
    measure: Measure, eight: Cell, four: Cell, weights: Cell, qat: Cell | None, smooth: Cell | None
) -> Outcome:
    """Whether four bits for the cache cost RTN much, and more than four bits for the `weights`; and LLM-QAT less than
    SmoothQuant, or than RTN where that was not run."""
    cost = _worse(measure, eight, four, f"lost by {_name(four)} from {eight.bits} to {four.bits}")
    cost = replace(cost, above=_tolerance(measure))
    where = replace(_worse(measure, weights, four, f"{four.bits} behind {weights.bits}, by {_name(four)}"), above=0)
    text = f"with {_name(four)}, {_is(four.bits, cost, eight.bits, _tolerated(measure))}; "
    text += f"{_is(four.bits, where, weights.bits)}."
    if qat is None:
        text += f" {method_title('llm-qat')} at {four.bits} was not run, so only this part of the claim is tested."
        return together([cost, where], text)

    def gained(r: Any, q: Any) -> Any:
        return measure.loss(q, r)

    beside = smooth or four
    found = measure.interval(gained, beside, qat)
    gain = Effect(found, UNITS[measure.kind], f"gained by {_name(qat)} over {beside.title}", above=0, of=qat.setting)
    text += f" {_name(qat)} gains {gain.text} over {_name(beside)}{_seeds(measure, gained, measure.text, beside, qat)}."
    return together([cost, where, gain], text)


def small_gain(measure: Measure, rtn: Cell, qat: Cell, rtn_4: Cell | None, qat_4: Cell | None) -> Outcome:
    effect = replace(_worse(measure, qat, rtn), below=_tolerance(measure))
    text = _is(rtn.title, effect, _name(qat), _tolerated(measure))
    if rtn_4 and qat_4:
        text += f"; {_is(f'at {rtn_4.bits} it', _worse(measure, qat_4, rtn_4), '', _tolerated(measure))}"
    return together([effect], f"{text}.")


def explodes(measure: Measure, full: Cell, cell: Cell) -> Outcome:
    return _beside_full(measure, full, cell, above=EXPLODES)


def stays_below(measure: Measure, full: Cell, cell: Cell) -> Outcome:
    """Whether a perplexity does not reach EXPLODES times full precision's."""
    return _beside_full(measure, full, cell, below=EXPLODES)


def _beside_full(
    measure: Measure, full: Cell, cell: Cell, above: float = -math.inf, below: float = math.inf
) -> Outcome:
    if not measure.is_perplexity:  # full precision has none of it
        lost = _worse(measure, full, cell)
        return together([lost], f"{_is(cell.title, lost, full.title)}.")
    found = measure.interval(np.divide, cell, full)
    effect = Effect(found, TIMES, f"full precision's, by {cell.title}", above, below, cell.setting)
    return together([effect], f"{cell.title} has {effect.text} full precision's.")


def is_best(measure: Measure, best: Cell, *others: Cell) -> Outcome:
    """Whether `best` is better than each of the others."""
    effects = [replace(_worse(measure, best, other), above=0) for other in others]
    nearest = sorted(effects, key=lambda effect: effect.interval.estimate)
    return together(nearest, f"{_are([_short(other, best) for other in others], effects, best.title)}.")


def loses_little(most: float, measure: Measure, reference: Cell, cell: Cell) -> Outcome:
    """Whether `cell` is worse than `reference` by less than `most`, a share of the perplexity."""
    effect = replace(_worse(measure, reference, cell), below=most)
    return together([effect], f"{_is(cell.title, effect, reference.title)}.")


def matches(measure: Measure, reference: Cell, cell: Cell, other: Cell | None = None) -> Outcome:
    """Whether `cell` is as good as `reference`; and, where it was run, `other` worse than `cell`."""
    effects = [_within(measure, reference, cell)]
    text = _is(cell.title, effects[0], reference.title, _tolerated(measure))
    if other:
        effects.append(replace(_worse(measure, cell, other), above=0))
        text += f"; {_is(other.title, effects[1], cell.title)}"
    return together(effects, f"{text}.")


def doubles_for_free(measure: Measure, reference: Cell, cell: Cell, other: Cell) -> Outcome:
    """`matches`, and how many scales of `cell` double quantization turned negative, if any."""
    found = matches(measure, reference, cell, other)
    turned = sum(int(count or 0) for record in cell.records for count in record.scores.get("negative_scales", []))
    if turned:
        found = replace(
            found, text=f"{found.text} {turned:,} of its scales turned negative: their weights have the opposite sign."
        )
    return found


def alike(measure: Measure, reference: Cell, *others: Cell) -> Outcome:
    """Whether none of the others is worse or better than `reference` by more than the tolerance."""
    effects, text = _all_within(measure, reference, others)
    return together(sorted(effects, key=lambda effect: -abs(effect.interval.estimate)), text)


def layers_matter(measure: Measure, every: Cell, few: Cell, *ranks: Cell) -> Outcome:
    """Whether adapters on all layers beat those on few, while their rank hardly matters."""
    gain = replace(_worse(measure, every, few), above=0)
    effects, beside = _all_within(measure, every, ranks)
    return together([gain, *effects], f"{_is(_short(few, every), gain, 'all layers')}; {beside}")


def small_groups_help(measure: Measure, usual: Cell, small: Cell) -> Outcome:
    effect = replace(_worse(measure, small, usual), above=0, below=_tolerance(measure))
    return together([effect], f"{_is(usual.title, effect, small.setting.variant, _tolerated(measure))}.")


def keeps_up(measure: Measure, full: Cell, *cells: Cell | None) -> Outcome:
    """Whether every cell that was run loses less than the tolerance against `full`."""
    run = [cell for cell in cells if cell]
    effects = [replace(_worse(measure, full, cell), below=_tolerance(measure)) for cell in run]
    worst = sorted(effects, key=lambda effect: -effect.interval.estimate)
    titles = [cell.title for cell in run]
    return together(worst, f"{_are(titles, effects, full.title, _tolerated(measure))}.")


def saves_bits(claimed: float, measure: Measure, plain: Cell, double: Cell) -> Outcome:
    """Whether the weights of `plain` are stored in `claimed` bits more than those of `double`, to within SAVED_BITS."""
    found = measure.interval(np.subtract, plain, double)
    effect = Effect(found, BITS, "saved", above=claimed - SAVED_BITS, below=claimed + SAVED_BITS)
    texts = [f"{cell.title} {cell.records[0].scores['bits'][0]:.3f}" for cell in (plain, double)]
    return together([effect], f"{listed(texts)}: {found.estimate:.3f} saved, counted from what is stored.")


def near_normal(measure: Measure, cell: Cell) -> Outcome:
    found = measure.interval(identity, cell)
    effect = Effect(found, NEURONS, "of the neurons fail Shapiro-Wilk", below=NORMAL)
    return together([effect], f"{found.text(points)} of the neurons tested fail Shapiro-Wilk at 5%.")


def converges_faster(measure: Measure, fast: Cell, slow: Cell) -> Outcome:
    """Whether the validation loss of `fast` is below that of `slow` at half of the training, wherever both began."""
    found, seeds = _behind(0.5, fast, slow)
    began, _ = _behind(0, fast, slow)
    effect = Effect(found, NATS, f"{slow.title} behind {fast.title}, half-way, {seeds}", above=0)
    text = f"half-way, the validation loss of {slow.title} minus that of {fast.title} is {effect.text} ({seeds}); "
    text += f"before training, {began.text(nats)}."
    return replace(together([effect], text), of="validation loss of fine-tuning")


def _behind(at: float, fast: Cell, slow: Cell) -> tuple[Interval, str]:
    """How far the validation loss of `slow` is above that of `fast` at a share of the training, over validation pairs
    and seeds; over seeds alone where a record does not tell the loss of each pair. How many seeds, in words."""

    def point(record: Record) -> dict[str, Any]:
        return record.curve[int(at * len(record.curve))]

    def behind(own: Record, other: Record) -> float:
        ours, theirs = point(own)["loss"], point(other)["loss"]
        return math.nan if ours is None or theirs is None else theirs - ours

    found, seeds = _by_seed(behind, fast, slow)
    by_seed = [{record.arm.seed: point(record) for record in cell.records} for cell in (fast, slow)]
    common = sorted(by_seed[0].keys() & by_seed[1].keys())
    points = [[own[seed] for seed in common] for own in by_seed]
    if len(common) < 2 or not all("pairs" in own for of_cell in points for own in of_cell):
        return found, seeds
    ours, theirs = (np.array([own["pairs"]["loss"] for own in of_cell]) for of_cell in points)
    tokens = points[0][0]["pairs"]["tokens"]
    interval = paired_bootstrap(
        lambda a, b, weights: ((b - a) * weights).sum(-1) / weights.sum(-1), ours, theirs, tokens
    )
    return interval, f"{len(tokens)} validation pairs, {seeds}"


def takes_at_most(times: float, measure: Measure, usual: Cell, cell: Cell) -> Outcome:
    """Whether training `cell` takes at most so many times as long as `usual`, for as many steps."""
    found, seeds = _by_seed(
        lambda own, other: other.cost["seconds"]["train"] / own.cost["seconds"]["train"], usual, cell
    )
    effect = Effect(found, TIMES, f"the time of {usual.title}, by {cell.title}, {seeds}", below=times, papers=False)
    text = f"{cell.title} takes {effect.text} that of {usual.title} ({seeds})."
    return together([effect], text)


def decodes_faster(times: float, measure: Measure, cell: Cell) -> Outcome:
    """Whether integers alone decode at least so many times as fast as with an adapter beside them."""
    found = speedup(measure, cell, IN_4_BITS, ADAPTED_4_BITS)
    what = "as fast without an adapter beside 4 bits"
    effect = Effect(found, TIMES, what, above=times)
    medians = [1000 * np.median(cell.scores(part)) for part in measure.parts]
    texts = [f"{number(median)} ms in {kind}" for median, kind in zip(medians, EXECUTIONS, strict=True)]
    return together([effect], f"{listed(texts)}: {effect.text} {what}.")


def _by_seed(contrast: Callable[[Record, Record], float], a: Cell, b: Cell) -> tuple[Interval, str]:
    """One number for each seed of both: their mean with Student's interval, which for one is not known; how many, in
    words."""
    own, other = ({record.arm.seed: record for record in cell.records} for cell in (a, b))
    found = [[contrast(own[seed], other[seed])] for seed in sorted(own.keys() & other.keys())]
    if len(found) < 2:
        return Interval(found[0][0] if found else math.nan, (math.inf, math.inf)), "1 seed" if found else "no seed"
    return paired_bootstrap(partial(np.mean, axis=-1), found), f"{len(found)} seeds"


def generalises(measure: Measure, generated: Cell, *real: Cell) -> Outcome:
    """Whether generated text is better than each real one, by the text that was not trained on, and by the tasks."""
    effects, names = [], []
    for cell in real:
        corpus = cell.setting["data.corpus"]
        if measure.is_perplexity and measure.of == corpus:
            continue
        elsewhere = measure.besides(corpus)
        effects.append(replace(_worse(elsewhere, generated, cell), above=0))
        names.append(_short(cell, generated) + (f" (on {corpus_title(elsewhere.of)})" if elsewhere != measure else ""))
    nearest = sorted(effects, key=lambda effect: effect.interval.estimate)
    of = "perplexity on the corpus that the other was not trained on" if measure.is_perplexity else ""
    return replace(together(nearest, f"{_are(names, effects, generated.title)}."), of=of)


def sampling_beats_greedy(measure: Measure, hybrid: Cell, sampled: Cell, greedy: Cell) -> Outcome:
    names = ("hybrid", "sampled")
    effects = [
        replace(_worse(measure, cell, greedy, f"greedy text behind {name}"), above=0)
        for cell, name in zip((hybrid, sampled), names, strict=True)
    ]
    beside = [_is("greedy text", effect, name) for effect, name in zip(effects, names, strict=True)]
    return together(effects, f"{'; '.join(beside)}.")


def smoothing(measure: Measure, four: Cell, four_smooth: Cell, eight: Cell, eight_smooth: Cell) -> Outcome:
    gain, other = (
        _worse(measure, smooth, cell, f"lost without SmoothQuant by {cell.title}")
        for cell, smooth in ((four, four_smooth), (eight, eight_smooth))
    )
    text = f"without SmoothQuant, {_is(four.title, gain)}; "
    text += f"{_is(f'at {eight.bits} it', other, '', _tolerated(measure))}."
    return together([replace(gain, above=0), replace(other, below=_tolerance(measure))], text)


def larger_is_better(measure: Measure, *cells: Cell) -> Outcome:
    """Whether the first of each two cells, of a larger model, is better than the second, of a smaller one."""
    pairs = list(zip(cells[::2], cells[1::2], strict=True))
    effects = [replace(_worse(measure, larger, smaller), above=0) for larger, smaller in pairs]
    texts = [
        _is(sized(smaller), effect, sized(larger)) for (larger, smaller), effect in zip(pairs, effects, strict=True)
    ]
    least = sorted(effects, key=lambda effect: effect.interval.estimate)
    return together(least, f"{'; '.join(texts)}.")


def sized(cell: Cell) -> str:
    """The title, and what the cell takes with its cache."""
    return f"{cell.title} ({number(megabytes(cell))} MB)"


def _worse(measure: Measure, a: Cell, b: Cell, what: str = "") -> Effect:
    """How much worse b is than a, as a share of the perplexity or in the measure's own unit."""
    what = what or f"{_short(b, a)} behind {_short(a, b)}"
    tolerance = _tolerance(measure)
    if measure.is_perplexity:
        return Effect(measure.above(b, a), COST, what, of=b.setting, tolerance=tolerance)
    return Effect(measure.interval(measure.loss, a, b), UNITS[measure.kind], what, of=b.setting, tolerance=tolerance)


def _within(measure: Measure, a: Cell, b: Cell) -> Effect:
    """How much worse b is than a, where it may be neither worse nor better by more than the tolerance."""
    tolerance = _tolerance(measure)
    return replace(_worse(measure, a, b), above=-tolerance, below=tolerance)


def _all_within(measure: Measure, reference: Cell, others: Sequence[Cell]) -> tuple[list[Effect], str]:
    """`_within` for each of the others, and all of them in words."""
    effects = [_within(measure, reference, other) for other in others]
    names = [_short(other, reference) for other in others]
    return effects, f"{_are(names, effects, reference.title, _tolerated(measure))}."


def _tolerance(measure: Measure) -> float:
    return TOLERANCES.get(measure.kind, 0.0)


def _tolerated(measure: Measure) -> str:
    if measure.kind not in TOLERANCES:
        return ""
    return f" (tolerance {percent(SHARE) if measure.is_perplexity else points(POINTS)})"


def _is(name: str, effect: Effect, reference: str = "", note: str = "") -> str:
    """What `_worse` found, below zero as "better": "X is better than Y by 3.2% [1.1%, 5.3%]"."""
    word, text = _turned(effect)
    return f"{name} is {word}{f' than {reference}' if reference else ''} by {text}{note}"


def _are(names: Iterable[str], effects: Sequence[Effect], reference: str, note: str = "") -> str:
    """`_is` for each of several beside the same reference, the worse ones first."""
    said: dict[str, list[str]] = {"worse": [], "better": []}
    for name, (word, text) in zip(names, map(_turned, effects), strict=True):
        said[word].append(f"{name} by {text}{note}")
    return "; ".join(f"{word} than {reference}: {listed(own)}" for word, own in said.items() if own)


def _turned(effect: Effect) -> tuple[str, str]:
    """The word "worse" and the effect's text or, of one below zero, "better" and the text of its opposite."""
    found, form = effect.interval, effect.unit.form
    if found.estimate >= 0:
        return "worse", effect.text
    return "better", f"{form(-found.estimate)} [{form(-found.high)}, {form(-found.low)}]{effect.unit.suffix}"


def _short(cell: Cell, beside: Cell) -> str:
    """What is not as by default, beside the same method at the same bits; else the whole title."""
    alike = (cell.method, cell.bits) == (beside.method, beside.bits)
    return (alike and cell.setting.variant) or cell.title


def _name(cell: Cell) -> str:
    """Of the method, where it needs no bits."""
    return method_title(cell.method)


def _seeds(measure: Measure, contrast: Contrast, form: Callable[[float], str], *cells: Cell) -> str:
    found = measure.over_seeds(contrast, *cells)
    return f" (single seeds: {form(found[0])} to {form(found[1])})" if found else ""
