"""How a claim is judged: by its rule, from the records of the arms that it names, on the measures that it speaks of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from studylib.comparison import Measure, Setting, capital, gather, listed, measures, response_measures, weight_measures
from studylib.memory_rules import PLANNED
from studylib.records import Record
from studylib.rules import INCONCLUSIVE, NOT_TESTED, Outcome
from studylib.statistics import Interval

FAMILY = 12  # claims of a paper at most: a true verdict of each is asked for at once


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, the arms that test it (needs; optional: used where they were run) and its rule in words.

    measures: what it is judged by. untested: what it would take, for a claim that no record can test yet.
    """

    id: str
    statement: str
    paper: str
    rule: str
    needs: tuple[Setting, ...] = ()
    test: Callable[..., Outcome] | None = None
    optional: tuple[Setting, ...] = ()
    measures: Callable[[Sequence[Record]], list[Measure]] = measures
    untested: str = ""


@dataclass(frozen=True)
class Finding:
    """What one measure says about a claim: verdict is one of VERDICTS, effect the number it rests on."""

    claim: str
    measure: str
    verdict: str
    effect: Interval | None
    sentence: str


def judge(claim: Claim, records: Sequence[Record], family: int = FAMILY) -> list[Finding]:
    """One finding a measure; a single one without an effect where an arm was not run, or diverged for any seed.

    Intervals resample the items that all arms of the claim share and, where there are several, their seeds. Those shown
    are 95%; verdicts rest on wider ones, by Bonferroni for `family` claims of a paper.
    """
    if claim.untested:
        return [Finding(claim.id, "", NOT_TESTED, None, f"Not tested here: {claim.untested}.")]
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
    wanted = [m for m in claim.measures(records) if all(cell is None or m.covers(cell) for cell in used)]
    if not wanted:
        return [Finding(claim.id, "", NOT_TESTED, None, "Not tested here: nothing was measured that it speaks of.")]
    findings = []
    for measure in (replace(measure, family=family) for measure in wanted):
        effect, verdict, text = claim.test(measure, *used)
        findings.append(
            Finding(claim.id, measure.title, verdict, effect, f"{capital(measure.title)}: {text} {capital(verdict)}.")
        )
    return findings


def perplexities(records: Sequence[Record]) -> list[Measure]:
    """Perplexity on each corpus."""
    return [measure for measure in measures(records) if measure.is_perplexity]


def accuracies(records: Sequence[Record]) -> list[Measure]:
    """The mean accuracy on the zero-shot tasks."""
    return [measure for measure in measures(records) if not measure.is_perplexity]


def learned(records: Sequence[Record]) -> list[Measure]:
    """What fine-tuning is for: the responses that were held out, and the zero-shot tasks."""
    return response_measures(records) + accuracies(records)


def planned(records: Sequence[Record]) -> list[Measure]:
    """Nothing that records hold: the memory that is planned for the papers' models."""
    return [PLANNED]


def stored_bits(records: Sequence[Record]) -> list[Measure]:
    """Bits of a weight, counted from what is stored."""
    return [measure for measure in weight_measures(records) if measure.name == "bits"]


def normality(records: Sequence[Record]) -> list[Measure]:
    """The share of neurons that fail a test for normal weights."""
    return [measure for measure in weight_measures(records) if measure.name != "bits"]
