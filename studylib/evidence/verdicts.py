"""Verdicts: a claim, the number that it is judged by, where the claim holds, and the paper's own number beside it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from studylib.config import capital, is_smoke, listed, nats, number, percent, points
from studylib.evidence.measures import Cell, Measure, gather, text_measures, unchanged
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
NOT_JUDGED = "not judged at smoke"
FAMILY = 31  # claims whose verdict can err: those of the page that are neither planned nor counted
LOOKS = 3  # at the verdicts while a study grows from one seed to three
RATE = 0.05 / FAMILY / LOOKS  # how often a bound that a verdict rests on may be wrong, so that a page rarely has one
MOVED = 0.01  # of learned scales: a median move of less is said


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
BITS_PER_BYTE, DIVERGENCE = Unit(number, " bits a byte"), Unit(number, " nats a token")
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
    tolerance: how far from `above` or `below` a difference is none. ways: in how many its claim may be contradicted.
    """

    interval: Interval
    unit: Unit
    what: str
    above: float = -math.inf
    below: float = math.inf
    of: Setting | None = None
    papers: bool = True
    tolerance: float = 0.0
    ways: int = 1

    @property
    def text(self) -> str:
        """With its 95% interval: "4.2 [−2.5, 10.8] points"."""
        return self.interval.text(self.unit.form) + self.unit.suffix

    @property
    def bounds(self) -> tuple[float, float]:
        """What a verdict rests on: what the true value lies above, and below. An end that would contradict the claim
        beyond its range has its share of RATE, among all ways to contradict it."""
        (low, high), (lower, higher) = self.interval.bounds(RATE), self.interval.bounds(RATE / self.ways)
        return lower if math.isfinite(self.below) else low, higher if math.isfinite(self.above) else high

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
        low, high = self.interval.bounds(RATE)
        if (low > self.above or self.above == -math.inf) and (high < self.below or self.below == math.inf):
            return REPRODUCED
        if 0 in self.ends and -self.tolerance < low and high < self.tolerance:
            return NO_DIFFERENCE
        return UNDECIDED

    def chances(self, then: Interval, ways: int) -> tuple[float, float, float]:
        """Those of "reproduced", "not reproduced" and "no difference" by `verdict`, when the errors have become those
        of `then`."""

        def on_scale(value: float) -> float:
            return self.interval.scale.to(value) if math.isfinite(value) else value

        def within(low: float, high: float, rate: float) -> tuple[float, float]:
            below, above = then.quantile(rate) * np.array(then.errors)
            return on_scale(low) + below, on_scale(high) - above

        def chance(low: float, high: float) -> float:
            return self.interval.chance_between(low, high, then)

        inside = within(self.above, self.below, RATE)
        under, over = within(self.below, self.above, RATE / ways)  # the other way round: the range of no contradiction
        wrong = (chance(under, math.inf) if self.below < math.inf else 0.0) + (
            chance(-math.inf, over) if self.above > -math.inf else 0.0
        )
        near = within(-self.tolerance, self.tolerance, RATE) if 0 in self.ends else (math.inf, -math.inf)
        both = chance(max(inside[0], near[0]), min(inside[1], near[1]))
        right = chance(*inside)
        return right, min(1.0, wrong), chance(*near) - both

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

    shown: the effect that stands for all, where it is none of the parts. of: what the numbers are, where it is not what
    the measure is called. measured: the kinds of cells that must have been run with several seeds; waiting: those of
    them whose runs do not tell yet how far they lie apart, so that parts that rest on them are undecided.
    """

    parts: tuple[Effect, ...]
    text: str
    shown: Effect | None = None
    of: str = ""
    measured: frozenset[str] = frozenset()
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

    def chance(self, share: float, free: Mapping[str, float]) -> float | None:
        """The chance that further runs decide it, as of parts that do not depend on each other; None where nothing is
        known of the errors of one.

        share: what they leave of the variance between runs. free: the degrees of freedom that each kind of cell has
        then; a part rests undecided on one that has not ENOUGH. Where a kind has not ENOUGH yet, its variance between
        runs counts as none, so that the chance is 1 or 0: by where the estimate lies, and its errors over items.
        """
        ways = sum(len(part.ends) for part in self.parts)
        found = []
        for part in self.parts:
            kinds = part.interval.kinds
            if math.inf in part.interval.errors:
                return None
            if any(free.get(kind, 0) < ENOUGH for kind in kinds & self.measured):
                found.append((0.0, 0.0, 0.0))
                continue
            if kinds & self.waiting:
                part = replace(part, interval=part.interval.with_runs(0.0, math.inf))
            own = (part.interval.runs[1] + 1) / share - 1  # where it rests on the runs of its own arms alone
            then = part.interval.with_runs(share, min((free[kind] for kind in kinds & free.keys()), default=own))
            found.append(part.chances(then, max(1, ways)))
        right, wrong, none = np.array(found).T
        alike = math.prod(right + none)
        return min(1.0, alike + 1 - math.prod(1 - wrong))

    @property
    def effect(self) -> Effect:
        """That of the first part which decides the verdict."""
        ways = max(1, sum(len(part.ends) for part in self.parts))
        return replace(self.shown or self.parts[self.verdicts.index(self.verdict)], ways=ways)


Rule = Callable[..., Outcome]  # given a measure and cells


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, the arms that test it (needs; optional: used where they were run) and its rule in words.

    reported: what the paper found, in words; effect: the paper's own number, where it has one of the kind that the rule
    rests on. test: the rule, given a measure and the cells of `needs` and `optional`. primary: what the verdict rests
    on; beside: what is shown besides. untested: what it would take to test it, for a claim that most records cannot.
    sizes: it is judged from records of several models alone (evidence.sizes).
    """

    id: str
    statement: str
    reported: str
    rule: str
    needs: tuple[Setting, ...] = ()
    test: Rule | None = None
    optional: tuple[Setting, ...] = ()
    primary: Callable[[Sequence[Record]], list[Measure]] = text_measures
    beside: Callable[[Sequence[Record]], list[Measure]] = unchanged
    untested: str = ""
    effect: PaperNumber | None = None
    sizes: bool = False


@dataclass(frozen=True)
class Finding:
    """What one measure says about a claim: in words what was found, and the number that stands for it.

    verdict: one of VERDICTS by the claim's primary measure, "" by others. parts: what each part of it is of, with its
    own verdict, where there are several. learning: whether another doubling of the training would change the
    verdict. outcome: what the verdict was found from, where it was. smoke: whether the records are of that profile, so
    that the verdict is told to nobody.
    """

    claim: str
    measure: str
    verdict: str
    text: str
    effect: Effect | None = None
    parts: tuple[tuple[str, str], ...] = ()
    learning: bool = False
    outcome: Outcome | None = None
    smoke: bool = False

    @property
    def word(self) -> str:
        """The verdict, with what an undecided one's training lacks."""
        if self.smoke and self.verdict:
            return NOT_JUDGED
        return f"{self.verdict}: still learning" if self.learning and self.verdict == UNDECIDED else self.verdict

    @property
    def could(self) -> str:
        """Of what is undecided, the minimum detectable effect: "7.0% or more"; else ""."""
        if self.smoke or self.verdict != UNDECIDED or self.effect is None or self.effect.smallest is None:
            return ""
        unit, smallest = self.effect.unit, self.effect.smallest
        return f"{unit.text(smallest)} or more" if smallest <= unit.most else "no difference, however large"

    @property
    def by_part(self) -> str:
        """The verdict of each part, where they differ: "Undecided: X behind Y. Reproduced: Z behind Y."; else ""."""
        if self.smoke or len({word for _, word in self.parts}) < 2:
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
        if self.smoke:
            return f"{self.found} {capital(NOT_JUDGED)}."
        could = f" (minimum detectable effect: {self.could})" if self.could else ""
        return " ".join(filter(None, [self.found, f"{capital(self.word)}{could}.", self.by_part]))


def judge(claim: Claim, records: Sequence[Record]) -> list[Finding]:
    """What the claim's primary measure says, with a verdict (see `decide`), and what others say beside it, without."""
    main = decide(claim, records)
    if main.outcome is None or claim.test is None:
        return [main]
    return [main, *beside_it(claim, claim.test, _used(claim, records), records)]


def beside_it(claim: Claim, test: Rule, used: Sequence[Cell | None], records: Sequence[Record]) -> list[Finding]:
    """What measures besides the primary one say of a claim, by its rule given these cells."""
    primary, *others = _covering(claim.primary(records), used)
    beside = [measure for measure in _covering(claim.beside(records), used) if measure.parts != primary.parts]
    found = [(measure, test(measure, *used)) for measure in (*others, *beside)]
    return [Finding(claim.id, measure.title, "", also.text, also.effect) for measure, also in found]


def decide(claim: Claim, records: Sequence[Record]) -> Finding:
    """What the claim's primary measure says; without an effect where an arm was not run, or diverged for any seed.

    Intervals resample the items that all arms of the claim share and count the spread between runs. Those shown are
    95%; verdicts rest on bounds at RATE, so that a page has a false one in 5% of cases at most. Where trained arms are
    compared and too few runs say how far runs lie apart, the verdict waits. Where one more doubling of the training
    would change it (see `_doubled`), the finding says so, and which learned grids hardly moved. Raises ValueError for
    records that cannot be compared (see measures.gather).
    """
    if claim.test is None:
        return Finding(claim.id, "", NOT_TESTED, f"{claim.untested}.")
    cells = gather(records)
    missing = [setting.title for setting in claim.needs if setting not in cells]
    if missing:
        text = claim.untested or f"{listed(missing)} {'was' if len(missing) == 1 else 'were'} not run"
        return Finding(claim.id, "", NOT_TESTED, f"{text}.")
    return by_rule(claim, claim.test, _used(claim, records), records)


def by_rule(claim: Claim, test: Rule, used: Sequence[Cell | None], records: Sequence[Record]) -> Finding:
    """What the claim's primary measure says by a rule, given the cells that it judges (see `decide`)."""
    diverged = [cell for cell in used if cell and cell.diverged]
    if diverged:
        counts = "; ".join(
            f"{len(cell.diverged)} of {len(cell.diverged) + len(cell.records)} runs of {cell.title} diverged"
            for cell in diverged
        )
        return Finding(claim.id, "", UNDECIDED, f"{counts}.")
    primary = _covering(claim.primary(records), used)
    if not primary:
        text = claim.untested or "nothing was measured that it speaks of"
        return Finding(claim.id, "", NOT_TESTED, f"{text}.")
    main = primary[0]
    free = {kind: spread.free for kind, spread in main.spreads.items()}
    kinds = frozenset({cell.kind for cell in used if cell and cell.kind} if main.is_perplexity else ())
    waiting = frozenset(kind for kind in kinds if free.get(kind, 0) < ENOUGH)

    def tested(cells: Sequence[Cell | None]) -> Outcome:
        return replace(test(main, *cells), measured=kinds, waiting=waiting)

    found = tested(used)
    words = tuple(zip([part.what for part in found.parts], found.verdicts, strict=True))
    text = found.text
    if any(part.interval.kinds & waiting for part in found.parts) and found.verdict == UNDECIDED:
        least = min(free.get(kind, 0) for kind in waiting)
        text += (
            f" The verdict waits for runs with other seeds: how far runs lie apart rests on {least:.0f} degrees of "
            f"freedom, and {ENOUGH} are needed."
        )
    learning = bool(kinds) and tested([cell and _doubled(cell) for cell in used]).verdict != found.verdict
    if learning:
        text += " Still learning: another doubling of the training would change this."
    still = [f"{cell.title} by {percent(moved)}" for cell in used if cell and (moved := _moved(cell)) < MOVED]
    if still:
        text += f" Learned scales moved by little from where they began: {listed(still)}."
    smoke = is_smoke(record.arm.evaluation for record in records)
    return Finding(claim.id, found.of or main.title, found.verdict, text, found.effect, words, learning, found, smoke)


def _used(claim: Claim, records: Sequence[Record]) -> list[Cell | None]:
    cells = gather(records)
    return [cells.get(setting) for setting in (*claim.needs, *claim.optional)]


def _covering(measures: Sequence[Measure], used: Sequence[Cell | None]) -> list[Measure]:
    """Those that all cells of a claim were scored on."""
    return [measure for measure in measures if all(cell is None or measure.covers(cell) for cell in used)]


def _doubled(cell: Cell) -> Cell:
    """The cell as it would be after twice its training, if that changed its loss by as much as the last doubling did.

    The last doubling is from half of the steps to the end, on validation text, averaged over the seeds; the loss of
    every text that it was scored on changes by it. A loss that falls with the logarithm of the steps does so; one that
    levels off falls by less.
    """
    gains = []
    for record in cell.records:
        points = {int(point["step"] or 0): point["loss"] for point in record.curve}
        last = max(points, default=0)
        half = min(points, key=lambda step: abs(2 * step - last), default=0)
        begun, ended = points.get(half), points.get(last)
        gains.append(0.0 if begun is None or ended is None else begun - ended)
    gain = float(np.mean(gains))
    return replace(cell, records=tuple(_with_losses(record, gain) for record in cell.records))


def _with_losses(record: Record, gain: float) -> Record:
    """The record with every loss less by `gain`."""
    scores = {
        name: [None if value is None else value - gain for value in values] if name.startswith("loss/") else values
        for name, values in record.scores.items()
    }
    return replace(record, scores=scores)


def _moved(cell: Cell) -> float:
    """The share by which learned scales are others than at the start, a median over the seeds; infinite where none
    is on record."""
    found = [moved for record in cell.records if (moved := record.metrics.get("moved/scales")) is not None]
    return float(np.median(found)) if found else math.inf
