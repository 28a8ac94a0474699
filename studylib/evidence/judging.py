"""How a claim is judged: by its rule, from the records of the arms that it names, on the measures that it speaks of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from studylib.config.words import capital, listed
from studylib.evidence.effects import INCONCLUSIVE, NOT_TESTED, Effect, PaperNumber
from studylib.evidence.measures import (
    Measure,
    Setting,
    accuracies,
    gather,
    measures,
    response_measures,
    weight_measures,
)
from studylib.evidence.memory_rules import PLANNED
from studylib.evidence.rules import Outcome
from studylib.study.records import Record

FAMILY = 60  # comparisons of a paper at most, by claim, measure and part: a true verdict of each is asked for at once


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, the arms that test it (needs; optional: used where they were run) and its rule in words.

    measures: what it is judged by. untested: what it would take to test it, for a claim that most records cannot.
    effect: the paper's own number, where it has one of the kind that the rule rests on.
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
    effect: PaperNumber | None = None


@dataclass(frozen=True)
class Finding:
    """What one measure says about a claim: one of VERDICTS, the number it rests on, and in words what was found."""

    claim: str
    measure: str
    verdict: str
    text: str
    effect: Effect | None = None

    @property
    def could(self) -> str:
        """Of an inconclusive finding, the smallest effect that the data could have shown: "7.0% or more"; else ""."""
        if self.verdict != INCONCLUSIVE or self.effect is None or self.effect.smallest is None:
            return ""
        unit, smallest = self.effect.unit, self.effect.smallest
        return f"{unit.text(smallest)} or more" if smallest <= unit.most else "no difference, however large"

    @property
    def found(self) -> str:
        """What was found, without the verdict."""
        return f"{capital(self.measure)}: {self.text}" if self.measure else self.text

    @property
    def sentence(self) -> str:
        """What was found and the verdict."""
        if self.verdict == NOT_TESTED:
            return f"{capital(NOT_TESTED)}: {self.text}"
        could = f" (could have shown {self.could})" if self.could else ""
        return f"{self.found} {capital(self.verdict)}{could}."


def judge(claim: Claim, records: Sequence[Record]) -> list[Finding]:
    """One finding a measure; a single one without an effect where an arm was not run, or diverged for any seed.

    Intervals resample the items that all arms of the claim share and count the spread over their seeds. Those shown
    are 95%; verdicts rest on wider ones, by Bonferroni for `family` comparisons of a paper.
    """
    if claim.test is None:
        return [Finding(claim.id, "", NOT_TESTED, f"{claim.untested}.")]
    cells = gather(records)
    missing = [setting.title for setting in claim.needs if setting not in cells]
    if missing:
        text = claim.untested or f"{listed(missing)} {'was' if len(missing) == 1 else 'were'} not run"
        return [Finding(claim.id, "", NOT_TESTED, f"{text}.")]
    used = [cells.get(setting) for setting in (*claim.needs, *claim.optional)]
    diverged = [cell for cell in used if cell and cell.diverged]
    if diverged:
        counts = "; ".join(
            f"{len(cell.diverged)} of {len(cell.diverged) + len(cell.records)} runs of {cell.title} diverged"
            for cell in diverged
        )
        return [Finding(claim.id, "", INCONCLUSIVE, f"{counts}.")]
    wanted = [m for m in claim.measures(records) if all(cell is None or m.covers(cell) for cell in used)]
    if not wanted:
        text = claim.untested or "nothing was measured that it speaks of"
        return [Finding(claim.id, "", NOT_TESTED, f"{text}.")]
    findings = []
    for measure in (replace(measure, family=FAMILY) for measure in wanted):
        effect, verdict, text = claim.test(measure, *used)
        findings.append(Finding(claim.id, measure.title, verdict, text, effect))
    return findings


def learned(records: Sequence[Record]) -> list[Measure]:
    """What fine-tuning is for: the responses that were held out, and the zero-shot tasks."""
    return response_measures(records) + accuracies(records)


def planned_memory(records: Sequence[Record]) -> list[Measure]:
    """Nothing that records hold: the memory that is planned for the papers' models."""
    return [PLANNED]


def timed(records: Sequence[Record]) -> list[Measure]:
    """How long trainings took, where all ran on accelerators."""
    accelerators = [r.provenance["hardware"]["accelerator"] for r in records if r.arm.tuning]
    return [Measure("seconds", "time of training", (), ())] if accelerators and all(accelerators) else []


def stored_bits(records: Sequence[Record]) -> list[Measure]:
    """Bits of a weight, counted from what is stored."""
    return [measure for measure in weight_measures(records) if measure.name == "bits"]


def normality(records: Sequence[Record]) -> list[Measure]:
    """The share of neurons that fail a test for normal weights."""
    return [measure for measure in weight_measures(records) if measure.name != "bits"]
