"""Verdicts: a claim, the number that it is judged by, where the claim holds, and the paper's own number beside it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from studylib.config import capital, listed, nats, number, percent, points
from studylib.evidence.measures import Measure, gather, text_measures, usual_measures
from studylib.evidence.spread import ENOUGH
from studylib.evidence.statistics import Interval
from studylib.methods import Setting
from studylib.study import Record

REPRODUCED, NOT_REPRODUCED, NO_DIFFERENCE, UNDECIDED, NOT_TESTED = VERDICTS = (
    "reproduced",
    "not reproduced",
    "no difference",
    "undecided",
    "not tested here",
)
FAMILY = 29  # claims whose verdict can err: those of the page that are neither planned nor counted
LOOKS = 3  # at the verdicts while a study grows from one seed to three
RATE = 0.05 / FAMILY / LOOKS  # how often a bound that a verdict rests on may be wrong, so that a page rarely has one


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
    tolerance: how far from `above` or `below` a difference is none.
    """

    interval: Interval
    unit: Unit
    what: str
    above: float = -math.inf
    below: float = math.inf
    of: Setting | None = None
    papers: bool = True
    tolerance: float = 0.0

    @property
    def text(self) -> str:
        """With its 95% interval: "4.2 [−2.5, 10.8] points"."""
        return self.interval.text(self.unit.form) + self.unit.suffix

    @property
    def bounds(self) -> tuple[float, float]:
        """What a verdict rests on: what the true value lies above, and below, each at RATE."""
        return self.interval.bounds(RATE)

    @property
    def ends(self) -> list[float]:
        """The ends of the range where the claim holds."""
        return [end for end in (self.above, self.below) if math.isfinite(end)]

    def verdict(self, ways: int | None = None) -> str:
        """Reproduced where the true value surely lies inside the range; not reproduced where it surely lies outside;
        no difference where it surely lies within the tolerance of a range that begins at zero; else undecided.

        Both ends of a range must be passed for the first, which errs no more often than one of them does (Berger 1982).
        One contradiction of several that are looked for is enough for the second: of so many `ways`, the ends of all
        parts of the claim, each may err as rarely.
        """
        low, high = self.interval.bounds(RATE / (ways or max(1, len(self.ends))))
        if low > self.below or high < self.above:
            return NOT_REPRODUCED
        low, high = self.bounds
        if (low > self.above or self.above == -math.inf) and (high < self.below or self.below == math.inf):
            return REPRODUCED
        if 0 in self.ends and -self.tolerance < low and high < self.tolerance:
            return NO_DIFFERENCE
        return UNDECIDED

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
        """The smallest effect that would be told from `bound`, and found above it, in statistics.POWER of all cases;
        None where nothing varies, or nothing is known of how."""
        found = self.interval.detectable(self.bound, RATE)
        return found if self.bound < found < math.inf else None


@dataclass(frozen=True)
class Outcome:
    """What a rule finds: the parts of the claim, the verdict of each, and all in words.

    shown: the effect that stands for all, where it is none of the parts. waiting: kinds of cells whose runs do not tell
    yet how far they lie apart; parts that rest on them are undecided.
    """

    parts: tuple[Effect, ...]
    text: str
    shown: Effect | None = None
    waiting: frozenset[str] = frozenset()

    @property
    def verdicts(self) -> list[str]:
        ways = sum(len(part.ends) for part in self.parts)
        return [UNDECIDED if part.interval.kinds & self.waiting else part.verdict(ways) for part in self.parts]

    @property
    def verdict(self) -> str:
        """What the parts say together: reproduced only if all are, not if any is not."""
        found = self.verdicts
        return next((word for word in (NOT_REPRODUCED, UNDECIDED, NO_DIFFERENCE) if word in found), REPRODUCED)

    @property
    def effect(self) -> Effect:
        """That of the first part which decides the verdict."""
        return self.shown or self.parts[self.verdicts.index(self.verdict)]


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, the arms that test it (needs; optional: used where they were run) and its rule in words.

    reported: what the paper found, in words; effect: the paper's own number, where it has one of the kind that the rule
    rests on. test: the rule, given a measure and the cells of `needs` and `optional`. primary: what the verdict rests
    on; beside: what is shown besides. untested: what it would take to test it, for a claim that most records cannot.
    """

    id: str
    statement: str
    reported: str
    rule: str
    needs: tuple[Setting, ...] = ()
    test: Callable[..., Outcome] | None = None
    optional: tuple[Setting, ...] = ()
    primary: Callable[[Sequence[Record]], list[Measure]] = text_measures
    beside: Callable[[Sequence[Record]], list[Measure]] = usual_measures
    untested: str = ""
    effect: PaperNumber | None = None


@dataclass(frozen=True)
class Finding:
    """What one measure says about a claim: in words what was found, and the number that stands for it.

    verdict: one of VERDICTS by the claim's primary measure, "" by others. parts: what each part of it is of, with its
    own verdict, where there are several.
    """

    claim: str
    measure: str
    verdict: str
    text: str
    effect: Effect | None = None
    parts: tuple[tuple[str, str], ...] = ()

    @property
    def could(self) -> str:
        """Of what is undecided, the minimum detectable effect: "7.0% or more"; else ""."""
        if self.verdict != UNDECIDED or self.effect is None or self.effect.smallest is None:
            return ""
        unit, smallest = self.effect.unit, self.effect.smallest
        return f"{unit.text(smallest)} or more" if smallest <= unit.most else "no difference, however large"

    @property
    def by_part(self) -> str:
        """The verdict of each part, where they differ: "Undecided: X behind Y. Reproduced: Z behind Y."; else ""."""
        if len({word for _, word in self.parts}) < 2:
            return ""
        by_word = {word: [what for what, own in self.parts if own == word] for word in VERDICTS}
        return " ".join(f"{capital(word)}: {listed(parts)}." for word, parts in by_word.items() if parts)

    @property
    def found(self) -> str:
        """What was found, without the verdict."""
        return f"{capital(self.measure)}: {self.text}" if self.measure else self.text

    @property
    def sentence(self) -> str:
        """What was found, the verdict and those of its parts; or that it stands beside one."""
        if self.verdict == NOT_TESTED:
            return f"{capital(NOT_TESTED)}: {self.text}"
        if not self.verdict:
            return f"Beside it: {self.found}"
        could = f" (minimum detectable effect: {self.could})" if self.could else ""
        return " ".join(filter(None, [self.found, f"{capital(self.verdict)}{could}.", self.by_part]))


def judge(claim: Claim, records: Sequence[Record]) -> list[Finding]:
    """What the claim's primary measure says, with a verdict, and what others say beside it, without; a single finding
    without an effect where an arm was not run, or diverged for any seed.

    Intervals resample the items that all arms of the claim share and count the spread between runs. Those shown are
    95%; verdicts rest on bounds at RATE, so that a page has a false one in 5% of cases at most. Where trained arms are
    compared and too few runs say how far runs lie apart, the verdict waits. Raises ValueError for records that cannot
    be compared (see measures.gather).
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
        return [Finding(claim.id, "", UNDECIDED, f"{counts}.")]

    def covering(measures: Sequence[Measure]) -> list[Measure]:
        return [measure for measure in measures if all(cell is None or measure.covers(cell) for cell in used)]

    primary = covering(claim.primary(records))
    if not primary:
        text = claim.untested or "nothing was measured that it speaks of"
        return [Finding(claim.id, "", NOT_TESTED, f"{text}.")]
    main = primary[0]
    free = {kind: spread.free for kind, spread in main.spreads.items()}
    kinds = {cell.kind for cell in used if cell and cell.kind} if main.is_perplexity else set()
    waiting = frozenset(kind for kind in kinds if free.get(kind, 0) < ENOUGH)
    found = replace(claim.test(main, *used), waiting=waiting)
    words = tuple(zip([part.what for part in found.parts], found.verdicts, strict=True))
    text = found.text
    if any(part.interval.kinds & waiting for part in found.parts) and found.verdict == UNDECIDED:
        least = min(free.get(kind, 0) for kind in waiting)
        text += (
            f" The verdict waits for runs with other seeds: how far runs lie apart rests on {least:.0f} degrees of "
            f"freedom, and {ENOUGH} are needed."
        )
    findings = [Finding(claim.id, main.title, found.verdict, text, found.effect, words)]
    beside = [measure for measure in covering(claim.beside(records)) if measure.parts != main.parts]
    for measure in (*primary[1:], *beside):
        also = claim.test(measure, *used)
        findings.append(Finding(claim.id, measure.title, "", also.text, also.effect))
    return findings
