"""The number that a verdict rests on: its unit, the range in which its claim holds, and the paper's own beside it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from studylib.config.words import nats, number, percent, points
from studylib.evidence.measures import Setting
from studylib.evidence.statistics import Interval

REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE, NOT_TESTED = VERDICTS = (
    "reproduced",
    "not reproduced",
    "inconclusive",
    "not tested here",
)


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
        alike = paper and self.papers and paper.unit == self.unit and (not paper.of or self.of in paper.of)
        return paper if alike else None

    @property
    def bound(self) -> float:
        """The end of the range that effects are told from: the upper one where it has two."""
        return self.below if math.isfinite(self.below) else self.above

    @property
    def smallest(self) -> float | None:
        """The smallest effect that would have been told from `bound`, and found above it, in statistics.POWER of all
        cases; None where nothing varies."""
        return self.bound + self.interval.resolution if self.interval.resolution > 0 else None
