"""The rules that claims are judged by: from the numbers of a claim's arms to an effect, a verdict and a sentence."""

from collections.abc import Callable, Sequence

import numpy as np

from studylib.comparison import Cell, Measure, identity, listed, number, percent, points, won_back, won_back_share
from studylib.statistics import Interval

REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE, NOT_TESTED = VERDICTS = (
    "reproduced",
    "not reproduced",
    "inconclusive",
    "not tested here",
)
POINTS = 2.0  # tolerance in points of accuracy: how far the official re-run of LLM-QAT lies from its paper (A13)
SHARE = 0.05  # tolerance in perplexity: five percent
MOST = 0.5  # "most of the loss": more than this share
NORMAL = 10.0  # "near-normal": at most this % of neurons fail a test that 5% of normal ones fail
BITS = 0.01  # tolerance of a number of bits that a paper derives
EXPLODES = 2.0  # "explodes": at least this many times full precision's perplexity

Outcome = tuple[Interval | None, str, str]


def above(interval: Interval, bound: float) -> str:
    """Reproduced where the whole interval lies above the bound, not reproduced where it lies below."""
    low, high = interval.bounds
    if low > bound:
        return REPRODUCED
    return NOT_REPRODUCED if high < bound else INCONCLUSIVE


def below(interval: Interval, bound: float) -> str:
    """Reproduced where the whole interval lies below the bound, not reproduced where it lies above."""
    return {REPRODUCED: NOT_REPRODUCED, NOT_REPRODUCED: REPRODUCED}.get(above(interval, bound), INCONCLUSIVE)


def wins_back(measure: Measure, full: Cell, rtn: Cell, qat: Cell) -> Outcome:
    loss, share = won_back(measure, full, rtn, qat)
    if share is None:
        text = f"RTN at {rtn.bits} loses {_interval(measure, loss)}, which is not clearly above zero"
        return loss, INCONCLUSIVE, f"{text}: what share of it LLM-QAT wins back cannot be told."
    # The share's interval is only shown: the rule is linear, so that no division can blow it up.
    rule = measure.interval(lambda f, r, q: measure.loss(q, r) - MOST * measure.loss(f, r), full, rtn, qat)
    values = ", ".join(f"{cell.title} {measure.text(measure.value(identity, cell))}" for cell in (full, rtn, qat))
    seeds = _seeds(measure, won_back_share, percent, full, rtn, qat)
    text = f"{values}: LLM-QAT wins back {share.text(percent)} of what RTN loses{seeds}."
    return share, above(rule, 0), text


def cache_breaks(measure: Measure, eight: Cell, four: Cell, qat: Cell | None) -> Outcome:
    effect, tolerance, cost = _cost(measure, eight, four)
    verdict, text = above(effect, tolerance), f"with RTN, going from {eight.bits} to {four.bits} costs {cost}."
    if qat is None:
        return effect, verdict, f"{text} LLM-QAT at {four.bits} was not run, so only this half of the claim is tested."

    def gained(r, q):
        return measure.loss(q, r)

    gain = measure.interval(gained, four, qat)
    text += f" LLM-QAT wins back {_interval(measure, gain)}{_seeds(measure, gained, measure.text, four, qat)}."
    return effect, _worst([verdict, above(gain, 0)]), text


def small_gain(measure: Measure, rtn: Cell, qat: Cell, rtn_4: Cell | None, qat_4: Cell | None) -> Outcome:
    effect, tolerance, worse = _cost(measure, qat, rtn)
    text = f"RTN at {rtn.bits} is worse than LLM-QAT by {worse}"
    if rtn_4 and qat_4:
        text += f", at {rtn_4.bits} by {_cost(measure, qat_4, rtn_4)[2]}"
    verdict = below(effect, tolerance)
    return effect, verdict, f"{text}."


def no_loss(measure: Measure, full: Cell, rtn: Cell) -> Outcome:
    effect, tolerance, cost = _cost(measure, full, rtn)
    return effect, _within(effect, tolerance), f"RTN at {rtn.bits} costs {cost}."


def explodes(measure: Measure, full: Cell, cell: Cell) -> Outcome:
    effect = measure.interval(lambda f, c: c / f, full, cell)
    text = f"{cell.title} has {effect.text(number)} times full precision's."
    return effect, above(effect, EXPLODES), text


def is_best(measure: Measure, best: Cell, *others: Cell) -> Outcome:
    """Whether `best` is better than each of the others."""
    verdicts, texts, effects = [], [], []
    for other in others:
        effect, _, text = _cost(measure, best, other)
        verdicts.append(above(effect, 0))
        texts.append(f"{_short(other)} by {text.partition(' (tol')[0]}")
        effects.append(effect)
    smallest = min(effects, key=lambda effect: effect.estimate)
    return smallest, _worst(verdicts), f"worse than {best.title}: {listed(texts)}."


def matches(measure: Measure, reference: Cell, cell: Cell, other: Cell | None = None) -> Outcome:
    """Whether `cell` is as good as `reference`; and, where it was run, `other` worse than `cell`."""
    effect, tolerance, cost = _cost(measure, reference, cell)
    verdicts, text = [_within(effect, tolerance)], f"{cell.title} is worse than {reference.title} by {cost}"
    if other:
        gap, _, behind = _cost(measure, cell, other)
        verdicts.append(above(gap, 0))
        text += f"; {other.title} is worse than {cell.title} by {behind.partition(' (tol')[0]}"
    return effect, _worst(verdicts), f"{text}."


def alike(measure: Measure, reference: Cell, *others: Cell) -> Outcome:
    """Whether none of the others is worse or better than `reference` by more than the tolerance."""
    found = [_cost(measure, reference, other) for other in others]
    texts = [f"{_short(other)} by {cost}" for other, (_, _, cost) in zip(others, found, strict=True)]
    largest = max(found, key=lambda part: abs(part[0].estimate))[0]
    verdict = _worst([_within(effect, tolerance) for effect, tolerance, _ in found])
    return largest, verdict, f"worse than {reference.title}: {listed(texts)}."


def layers_matter(measure: Measure, every: Cell, few: Cell, *ranks: Cell) -> Outcome:
    """Whether adapters on all layers beat those on few, while their rank hardly matters."""
    gain, _, text = _cost(measure, every, few)
    _, rank_verdict, rank_text = alike(measure, every, *ranks)
    verdict = _worst([above(gain, 0), rank_verdict])
    return gain, verdict, f"{_short(few)} is worse than all layers by {text.partition(' (tol')[0]}; {rank_text}"


def small_groups_help(measure: Measure, usual: Cell, small: Cell) -> Outcome:
    effect, tolerance, cost = _cost(measure, small, usual)
    little = below(effect, tolerance)
    text = f"{usual.title} is worse than {small.setting.variant} by {cost}."
    return effect, _worst([above(effect, 0), little]), text


def keeps_up(measure: Measure, full: Cell, *cells: Cell) -> Outcome:
    """Whether every cell loses less than the tolerance against `full`; an open question has no other direction."""
    found = [_cost(measure, full, cell) for cell in cells]
    texts = [f"{cell.title} by {cost}" for cell, (_, _, cost) in zip(cells, found, strict=True)]
    verdict = _worst([below(effect, tolerance) for effect, tolerance, _ in found])
    return (
        max((effect for effect, *_ in found), key=lambda e: e.estimate),
        verdict,
        (f"worse than {full.title}: {listed(texts)}."),
    )


def saves_bits(claimed: float) -> Callable[..., Outcome]:
    """A rule: the first cell's weights are stored in `claimed` bits more than the second's, to within BITS."""

    def rule(measure: Measure, plain: Cell, double: Cell) -> Outcome:
        effect = measure.interval(np.subtract, plain, double)
        verdict = REPRODUCED if abs(effect.estimate - claimed) < BITS else NOT_REPRODUCED
        texts = [f"{cell.title} {cell.records[0].scores['bits'][0]:.3f}" for cell in (plain, double)]
        return effect, verdict, f"{listed(texts)}: {effect.estimate:.3f} saved, counted from what is stored."

    return rule


def near_normal(measure: Measure, cell: Cell) -> Outcome:
    effect = measure.interval(identity, cell)
    verdict = below(effect, NORMAL)
    return effect, verdict, f"{effect.text(points)} of the neurons tested fail Shapiro-Wilk at 5%."


def converges_faster(measure: Measure, fast: Cell, slow: Cell) -> Outcome:
    """Whether `fast` needs fewer steps to where `slow` ends: one number a seed, the loss at half of the training."""

    def middle(cell: Cell) -> dict[int, float]:
        curves = {record.arm.seed: [point["loss"] for point in record.curve] for record in cell.records}
        return {seed: curve[len(curve) // 2] for seed, curve in curves.items()}

    own, other = middle(fast), middle(slow)
    gaps = [other[seed] - own[seed] for seed in sorted(own.keys() & other.keys())]
    effect = Interval(float(np.mean(gaps)), min(gaps), max(gaps))
    text = (
        f"half-way, the validation loss of {slow.title} is {effect.text(number)} nats above that of {fast.title} "
        f"({len(gaps)} {'seed' if len(gaps) == 1 else 'seeds'}, lowest and highest in brackets)."
    )
    return effect, above(effect, 0) if len(gaps) > 1 else INCONCLUSIVE, text


def _within(effect: Interval, tolerance: float) -> str:
    """Reproduced where the whole interval lies inside the tolerance, not reproduced where it lies outside."""
    low, high = effect.bounds
    if -tolerance < low and high < tolerance:
        return REPRODUCED
    return NOT_REPRODUCED if low > tolerance or high < -tolerance else INCONCLUSIVE


def _short(cell: Cell) -> str:
    return cell.setting.variant or cell.title


def _worst(verdicts: Sequence[str]) -> str:
    """What parts of a claim say together: reproduced only if all are, not reproduced if any is not."""
    return next((verdict for verdict in (NOT_REPRODUCED, INCONCLUSIVE) if verdict in verdicts), REPRODUCED)


def generalises(measure: Measure, generated: Cell, wikipedia: Cell, c4: Cell) -> Outcome:
    """Real text is compared where it was not trained on: elsewhere, and on the tasks."""
    own = {"perplexity/wikipedia": wikipedia, "perplexity/c4": c4}.get(measure.name)
    return is_best(measure, generated, *(cell for cell in (wikipedia, c4) if cell is not own))


def sampling_beats_greedy(measure: Measure, hybrid: Cell, sampled: Cell, greedy: Cell) -> Outcome:
    parts = [_cost(measure, cell, greedy) for cell in (hybrid, sampled)]
    beside = listed(
        [
            f"{text.partition(' (tol')[0]} beside {name}"
            for (*_, text), name in zip(parts, ("hybrid", "sampled"), strict=True)
        ]
    )
    return parts[0][0], _worst([above(effect, 0) for effect, *_ in parts]), f"greedy text is worse by {beside}."


def smoothing(measure: Measure, four: Cell, four_smooth: Cell, eight: Cell, eight_smooth: Cell) -> Outcome:
    gain, _, at_four = _cost(measure, four_smooth, four)
    other, tolerance, at_eight = _cost(measure, eight_smooth, eight)
    little = below(other, tolerance)
    text = f"without SmoothQuant, LLM-QAT at {four.bits} is worse by {at_four}, at {eight.bits} by {at_eight}."
    return gain, _worst([above(gain, 0), little]), text


def _cost(measure: Measure, a: Cell, b: Cell) -> tuple[Interval, float, str]:
    """How much worse b is than a, as a share of the perplexity or in points; the tolerance; the cost as text."""
    if measure.is_perplexity:
        effect = measure.interval(lambda x, y: y / x - 1, a, b)
        return effect, SHARE, f"{effect.text(percent)} (tolerance {percent(SHARE)})"
    effect = measure.interval(measure.loss, a, b)
    return effect, POINTS, f"{_interval(measure, effect)} (tolerance {points(POINTS)})"


def _interval(measure: Measure, interval: Interval) -> str:
    return interval.text(measure.text) + ("" if measure.is_perplexity else " points")


def _seeds(measure: Measure, contrast, form: Callable[[float], str], *cells: Cell) -> str:
    found = measure.over_seeds(contrast, *cells)
    return f" (single seeds: {form(found[0])} to {form(found[1])})" if found else ""
