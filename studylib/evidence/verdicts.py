"""Verdicts: a claim, the number that it is judged by, where the claim holds, and the paper's own number beside it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from studylib.config import capital, listed, nats, number, percent, points
from studylib.evidence.measures import Measure, gather, usual_measures
from studylib.evidence.statistics import Interval
from studylib.methods import Setting
from studylib.study import Record

REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE, NOT_TESTED = VERDICTS = (
    "reproduced",
    "not reproduced",
    "inconclusive",
    "not tested here",
)
FAMILY = 60  # comparisons of a paper at most, by claim, measure and part: a true verdict of each is asked for at once


@dataclass(frozen=True)
class Unit:
    """How numbers of one kind are written: each by `form`, then `suffix` once. ratio: compared on a log scale. most:
    what none of them exceeds."""

    form: Callable[[float], str]
    suffix: str = ""
    ratio: bool = False
    most: float = math.inf

    def text(self, value: float) -> str:
        return self.form(value) + self.suffix


COST = Unit(percent)  # a share of a perplexity
WON_BACK = Unit(percent, " of the loss")
ACCURACY = Unit(points, " points", most=100)
PERPLEXITY = Unit(number, " of perplexity")
TIMES = Unit(number, " times", ratio=True)
NEURONS = Unit(points, "%")
BITS, NATS, GIGABYTES = Unit(number, " bits"), Unit(nats, " nats"), Unit(number, " GB")
MEMORY = Unit(percent, " of the memory")


@dataclass(frozen=True)
class PaperNumber:
    """A paper's own effect. words: what surrounds its text. recalled: known from memory only, and marked so. of: the
    settings that it is of, where a claim has several parts."""

    value: float
    unit: Unit
    words: str = "{}"
    recalled: bool = False
    of: tuple[Setting, ...] = ()

    @property
    def text(self) -> str:
        return self.words.format(self.unit.text(self.value)) + (" (recalled)" if self.recalled else "")


@dataclass(frozen=True)
class Effect:
    """A number, in words what it is of, and where its claim holds: above `above`, below `below`, or between them.

    of: the setting that it is of. papers: whether the paper's own number, if it has one in this unit, is of the same.
    """

    interval: Interval
    unit: Unit
    what: str
    above: float = -math.inf
    below: float = math.inf
    of: Setting | None = None
    papers: bool = True

    @property
    def text(self) -> str:
        """With its 95% interval: "4.2 [−2.5, 10.8] points"."""
        return self.interval.text(self.unit.form) + self.unit.suffix

    @property
    def verdict(self) -> str:
        """Reproduced where the whole interval lies inside the range, not reproduced where it lies outside."""
        low, high = self.interval.bounds
        if low > self.below or high < self.above:
            return NOT_REPRODUCED
        inside = (low > self.above or self.above == -math.inf) and (high < self.below or self.below == math.inf)
        return REPRODUCED if inside else INCONCLUSIVE

    @property
    def holds(self) -> str:
        """The range in words: "above 50% of the loss", "from −5.0% to 5.0%"."""
        if math.isinf(self.above) or math.isinf(self.below):
            return f"{'above' if math.isinf(self.below) else 'below'} {self.unit.text(self.bound)}"
        return f"from {self.unit.form(self.above)} to {self.unit.text(self.below)}"

    def beyond(self, value: float) -> float:
        """How far a value lies on the claim's side of the range's end that is nearest to the estimate."""
        estimate = self.interval.estimate
        if estimate - self.above < self.below - estimate:
            return value - self.above
        return self.below - value

    def mark(self, paper: PaperNumber | None) -> PaperNumber | None:
        """The paper's number where it can stand on the same axis."""
        if paper is None or not self.papers or paper.unit != self.unit or (paper.of and self.of not in paper.of):
            return None
        return paper

    @property
    def bound(self) -> float:
        """The end of the range that effects are told from: the upper one where it has two."""
        return self.below if math.isfinite(self.below) else self.above

    @property
    def smallest(self) -> float | None:
        """The smallest effect that would have been told from `bound`, and found above it, in statistics.POWER of all
        cases; None where nothing varies."""
        return self.bound + self.interval.resolution if self.interval.resolution > 0 else None


class Outcome(NamedTuple):
    """What a rule finds. effect: where a claim has several parts, that of the part which decides the verdict."""

    effect: Effect
    verdict: str
    text: str


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, the arms that test it (needs; optional: used where they were run) and its rule in words.

    reported: what the paper found, in words; effect: the paper's own number, where it has one of the kind that the rule
    rests on. test: the rule, given a measure and the cells of `needs` and `optional`. measures: what it is judged by.
    untested: what it would take to test it, for a claim that most records cannot.
    """

    id: str
    statement: str
    reported: str
    rule: str
    needs: tuple[Setting, ...] = ()
    test: Callable[..., Outcome] | None = None
    optional: tuple[Setting, ...] = ()
    measures: Callable[[Sequence[Record]], list[Measure]] = usual_measures
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
    are 95%; verdicts rest on wider ones, by Bonferroni for FAMILY comparisons of a paper. Raises ValueError for records
    that cannot be compared (see measures.gather).
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
