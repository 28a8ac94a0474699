"""The papers' claims, the rule that tests each, fixed before the runs it judges, and the verdicts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from studylib.arms import LLM_QAT, RTN, SMOOTHQUANT_QAT
from studylib.comparison import (
    FULL,
    Cell,
    Measure,
    Setting,
    capital,
    gather,
    identity,
    listed,
    measures,
    number,
    percent,
    points,
    won_back,
    won_back_share,
)
from studylib.records import Record
from studylib.statistics import Interval

REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE, NOT_TESTED = VERDICTS = (
    "reproduced",
    "not reproduced",
    "inconclusive",
    "not tested here",
)
DEFAULT = Setting(LLM_QAT, "4-8-4")
POINTS = 2.0  # tolerance in points of accuracy: how far the official re-run of LLM-QAT lies from its paper (A13)
SHARE = 0.05  # tolerance in perplexity: five percent
MOST = 0.5  # "most of the loss": more than this share
EXPLODES = 2.0  # "explodes": at least this many times full precision's perplexity

Outcome = tuple[Interval | None, str, str]


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, the arms that test it (needs; optional: used where they were run) and its rule in words."""

    id: str
    statement: str
    paper: str
    rule: str
    needs: tuple[Setting, ...]
    test: Callable[..., Outcome]
    optional: tuple[Setting, ...] = ()
    perplexity_only: bool = False


@dataclass(frozen=True)
class Finding:
    """What one measure says about a claim: verdict is one of VERDICTS, effect the number it rests on."""

    claim: str
    measure: str
    verdict: str
    effect: Interval | None
    sentence: str


def judge(claim: Claim, records: Sequence[Record]) -> list[Finding]:
    """One finding a measure; a single one without an effect where an arm was not run, or diverged for any seed.

    Intervals resample the items that all arms of the claim share; with several seeds, scores are averaged over them.
    """
    cells = gather(records)
    missing = [setting.title for setting in claim.needs if setting not in cells]
    if missing:
        text = f"Not tested here: {listed(missing)} {'was' if len(missing) == 1 else 'were'} not run."
        return [Finding(claim.id, "", NOT_TESTED, None, text)]
    used = [cells.get(setting) for setting in (*claim.needs, *claim.optional)]
    diverged = [cell for cell in used if cell and cell.diverged]
    if diverged:
        counts = "; ".join(
            f"{len(cell.diverged)} of {len(cell.diverged) + len(cell.records)} runs of {cell.title} diverged"
            for cell in diverged
        )
        return [Finding(claim.id, "", INCONCLUSIVE, None, f"{counts}. Inconclusive.")]
    wanted = [measure for measure in measures(records) if measure.is_perplexity or not claim.perplexity_only]
    if not wanted:
        return [Finding(claim.id, "", NOT_TESTED, None, "Not tested here: nothing was measured that it speaks of.")]
    findings = []
    for measure in wanted:
        effect, verdict, text = claim.test(measure, *used)
        findings.append(
            Finding(claim.id, measure.title, verdict, effect, f"{capital(measure.title)}: {text} {capital(verdict)}.")
        )
    return findings


def _above(interval: Interval, bound: float) -> str:
    """Reproduced where the whole interval lies above the bound, not reproduced where it lies below."""
    if interval.low > bound:
        return REPRODUCED
    return NOT_REPRODUCED if interval.high < bound else INCONCLUSIVE


def _wins_back(measure: Measure, full: Cell, rtn: Cell, qat: Cell) -> Outcome:
    loss, share = won_back(measure, full, rtn, qat)
    if share is None:
        text = f"RTN at {rtn.bits} loses {_interval(measure, loss)}, which is not clearly above zero"
        return loss, INCONCLUSIVE, f"{text}: what share of it LLM-QAT wins back cannot be told."
    # The share's interval is only shown: the rule is linear, so that no division can blow it up.
    rule = measure.interval(lambda f, r, q: measure.loss(q, r) - MOST * measure.loss(f, r), full, rtn, qat)
    values = ", ".join(f"{cell.title} {measure.text(measure.value(identity, cell))}" for cell in (full, rtn, qat))
    seeds = _seeds(measure, won_back_share, percent, full, rtn, qat)
    text = f"{values}: LLM-QAT wins back {share.text(percent)} of what RTN loses{seeds}."
    return share, _above(rule, 0), text


def _cache_breaks(measure: Measure, eight: Cell, four: Cell, qat: Cell | None) -> Outcome:
    effect, tolerance, cost = _cost(measure, eight, four)
    verdict, text = _above(effect, tolerance), f"with RTN, going from {eight.bits} to {four.bits} costs {cost}."
    if qat is None:
        return effect, verdict, f"{text} LLM-QAT at {four.bits} was not run, so only this half of the claim is tested."

    def gained(r, q):
        return measure.loss(q, r)

    gain = measure.interval(gained, four, qat)
    text += f" LLM-QAT wins back {_interval(measure, gain)}{_seeds(measure, gained, measure.text, four, qat)}."
    return effect, _worst([verdict, _above(gain, 0)]), text


def _small_gain(measure: Measure, rtn: Cell, qat: Cell, rtn_4: Cell | None, qat_4: Cell | None) -> Outcome:
    effect, tolerance, worse = _cost(measure, qat, rtn)
    text = f"RTN at {rtn.bits} is worse than LLM-QAT by {worse}"
    if rtn_4 and qat_4:
        text += f", at {rtn_4.bits} by {_cost(measure, qat_4, rtn_4)[2]}"
    verdict = REPRODUCED if effect.high < tolerance else NOT_REPRODUCED if effect.low > tolerance else INCONCLUSIVE
    return effect, verdict, f"{text}."


def _no_loss(measure: Measure, full: Cell, rtn: Cell) -> Outcome:
    effect, tolerance, cost = _cost(measure, full, rtn)
    if -tolerance < effect.low and effect.high < tolerance:
        verdict = REPRODUCED
    else:
        verdict = NOT_REPRODUCED if effect.low > tolerance or effect.high < -tolerance else INCONCLUSIVE
    return effect, verdict, f"RTN at {rtn.bits} costs {cost}."


def _explodes(measure: Measure, full: Cell, cell: Cell) -> Outcome:
    effect = measure.interval(lambda f, c: c / f, full, cell)
    text = f"{cell.title} has {effect.text(number)} times full precision's."
    return effect, _above(effect, EXPLODES), text


def _best(measure: Measure, best: Cell, *others: Cell) -> Outcome:
    """Whether `best` is better than each of the others."""
    verdicts, texts, effects = [], [], []
    for other in others:
        effect, _, text = _cost(measure, best, other)
        verdicts.append(_above(effect, 0))
        texts.append(f"{_short(other)} by {text.partition(' (tol')[0]}")
        effects.append(effect)
    smallest = min(effects, key=lambda effect: effect.estimate)
    return smallest, _worst(verdicts), f"worse than {best.title}: {listed(texts)}."


def _short(cell: Cell) -> str:
    return cell.setting.variant or cell.title


def _worst(verdicts: Sequence[str]) -> str:
    """What parts of a claim say together: reproduced only if all are, not reproduced if any is not."""
    return next((verdict for verdict in (NOT_REPRODUCED, INCONCLUSIVE) if verdict in verdicts), REPRODUCED)


def _generalises(measure: Measure, generated: Cell, wikipedia: Cell, c4: Cell) -> Outcome:
    """Real text is compared where it was not trained on: elsewhere, and on the tasks."""
    own = {"perplexity/wikipedia": wikipedia, "perplexity/c4": c4}.get(measure.name)
    return _best(measure, generated, *(cell for cell in (wikipedia, c4) if cell is not own))


def _sampling_beats_greedy(measure: Measure, hybrid: Cell, sampled: Cell, greedy: Cell) -> Outcome:
    parts = [_cost(measure, cell, greedy) for cell in (hybrid, sampled)]
    beside = listed(
        [
            f"{text.partition(' (tol')[0]} beside {name}"
            for (*_, text), name in zip(parts, ("hybrid", "sampled"), strict=True)
        ]
    )
    return parts[0][0], _worst([_above(effect, 0) for effect, *_ in parts]), f"greedy text is worse by {beside}."


def _smoothing(measure: Measure, four: Cell, four_smooth: Cell, eight: Cell, eight_smooth: Cell) -> Outcome:
    gain, _, at_four = _cost(measure, four_smooth, four)
    other, tolerance, at_eight = _cost(measure, eight_smooth, eight)
    little = REPRODUCED if other.high < tolerance else NOT_REPRODUCED if other.low > tolerance else INCONCLUSIVE
    text = f"without SmoothQuant, LLM-QAT at {four.bits} is worse by {at_four}, at {eight.bits} by {at_eight}."
    return gain, _worst([_above(gain, 0), little]), text


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


CLAIMS = {
    claim.id: claim
    for claim in (
        Claim(
            "A1",
            "LLM-QAT recovers most of what 4-8-4 loses",
            "LLaMA-7B, mean of 8 zero-shot tasks: full precision 66.2, RTN 41.2, LLM-QAT 60.7",
            "LLM-QAT wins back more than half of what RTN loses at 4-8-4; undecided unless that loss is above 0",
            (FULL, Setting(RTN, "4-8-4"), Setting(LLM_QAT, "4-8-4")),
            _wins_back,
        ),
        Claim(
            "A2",
            "The 4-bit key/value cache is where post-training quantization breaks",
            "LLaMA-30B at 8-8-4, zero-shot: SmoothQuant 50.7, LLM-QAT 69.7 (RTN stands in for SmoothQuant here)",
            "From 8-8-8 to 8-8-4 RTN loses more than 5% perplexity, or 2 points; LLM-QAT there, where run, is better",
            (Setting(RTN, "8-8-8"), Setting(RTN, "8-8-4")),
            _cache_breaks,
            optional=(Setting(LLM_QAT, "8-8-4"),),
        ),
        Claim(
            "A3",
            "With an 8-bit cache the gain of training is small",
            "LLaMA-30B at 4-8-8, zero-shot: RTN 69.1, LLM-QAT 70.5",
            "RTN's perplexity at 4-8-8 is less than 5% above LLM-QAT's, or its accuracy less than 2 points below",
            (Setting(RTN, "4-8-8"), Setting(LLM_QAT, "4-8-8")),
            _small_gain,
            optional=(Setting(RTN, "4-8-4"), Setting(LLM_QAT, "4-8-4")),
        ),
        Claim(
            "A4",
            "At 8 bits post-training quantization is enough",
            "LLaMA-7B at 8-8-8, zero-shot: RTN 65.6, SmoothQuant 66.3, LLM-QAT 66.0 (recalled); full precision 66.2",
            "RTN at 8-8-8 stays within 5% of full precision's perplexity, or 2 points: the whole interval inside is "
            "reproduced, the whole interval outside is not",
            (FULL, Setting(RTN, "8-8-8")),
            _no_loss,
        ),
        Claim(
            "A6",
            "Post-training quantization's perplexity explodes at 4-8-4",
            "LLaMA-7B, WikiText-2: full precision 10.4, RTN 151.4",
            "RTN's perplexity at 4-8-4 is at least twice full precision's",
            (FULL, Setting(RTN, "4-8-4")),
            _explodes,
            perplexity_only=True,
        ),
        Claim(
            "A7",
            "Generated data generalise better than a subset of real data",
            "LLaMA-7B at 4-6-16, zero-shot: hybrid generation 63.1, ahead of WikiText and C4 subsets (direction only)",
            "LLM-QAT on generated text is better than on as many tokens of Wikipedia or C4, on the tasks and on the "
            "corpus that the real text was not from",
            (DEFAULT, Setting(LLM_QAT, "4-8-4", "Wikipedia text"), Setting(LLM_QAT, "4-8-4", "C4 text")),
            _generalises,
        ),
        Claim(
            "A8",
            "Sampled data beat greedy data",
            "direction only; the hybrid (first 3 to 5 tokens greedy, then sampled) is the default",
            "LLM-QAT on greedy text is worse than on hybrid and than on sampled text",
            (DEFAULT, Setting(LLM_QAT, "4-8-4", "sampled"), Setting(LLM_QAT, "4-8-4", "greedy")),
            _sampling_beats_greedy,
        ),
        Claim(
            "A9",
            "Soft logits alone are the best target",
            "LLaMA-7B, zero-shot: logits 63.1, with attention maps 61.1, with hidden states 34.9",
            "LLM-QAT with KL on logits is better than with labels, and than with attention maps or hidden states added",
            (
                DEFAULT,
                *(Setting(LLM_QAT, "4-8-4", f"loss {loss}") for loss in ("labels", "kl+attention", "kl+hidden")),
            ),
            _best,
        ),
        Claim(
            "A10",
            "Symmetric MinMax beats grids that clip",
            "LSQ about 13 points worse; clipping starts at perplexity above 10,000",
            "LLM-QAT on symmetric MinMax grids is better than on StatsQ and on LSQ",
            (DEFAULT, Setting(LLM_QAT, "4-8-4", "StatsQ clipping"), Setting(LLM_QAT, "4-8-4", "LSQ")),
            _best,
        ),
        Claim(
            "A11",
            "SmoothQuant before training helps at 4-4 and not at 4-8",
            "LLaMA-7B, six tasks at W4A4: LLM-QAT 41.3, after SmoothQuant 46.4",
            "Without SmoothQuant, LLM-QAT at 4-4-16 is worse; at 4-8-4 by less than 5% of perplexity or 2 points",
            (
                Setting(LLM_QAT, "4-4-16"),
                Setting(SMOOTHQUANT_QAT, "4-4-16"),
                DEFAULT,
                Setting(SMOOTHQUANT_QAT, "4-8-4"),
            ),
            _smoothing,
        ),
        Claim(
            "A12",
            "4-bit activations are not solved by training",
            "LLaMA-7B, six tasks at W4A4: LLM-QAT 41.3",
            "LLM-QAT's perplexity at 4-4-16 is at least twice full precision's",
            (FULL, Setting(LLM_QAT, "4-4-16")),
            _explodes,
            perplexity_only=True,
        ),
    )
}
