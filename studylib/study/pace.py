"""How long arms take: their work by phase, and seconds learnt from what was measured of others."""

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from studylib import data, evaluate  # doors: what stands behind them is loaded when it is used
from studylib.config import Arm, Sampling, progress_bar
from studylib.methods import find, title
from studylib.study.records import SHARED, Record

# What a token of each phase costs, in forward passes of a token: medians of the reference records, to one digit.
COSTS = {"data": 3.0, "quantize": 3.0, "train": 3.0, "evaluate": 1.0, "decode": 300.0, "besides": 1.0}
FORWARD = 1e-11  # seconds that a forward pass takes, a token and parameter, before any is measured: two cores with bf16
SMALL = 50_000_000  # parameters more that a token takes as long as, of whatever model
BESIDES = 400  # forward tokens that an arm takes beside its phases: to load, check and save
SHORT = 0.01  # seconds: no phase is told to be shorter
ROUNDING = 0.05  # of an evaluation's time: to round weights, without text to calibrate on
WAITED_FOR = ("data", "quantize", "train")  # phases of records.SHARED that take long
FORM = "{desc}{percentage:3.0f}%|{bar}| {elapsed}{postfix}"  # of the bar: its percentage is of the time
MOMENT = 2.0  # seconds between two states of it
ITEM_WORK = 100  # forward tokens that one benchmark item takes on average


def tokens(arm: Arm) -> dict[str, float]:
    """The tokens of an arm's work by phase (records' cost["seconds"], and "besides"), as it were done alone."""
    wanted = arm.evaluation
    scored = len(wanted.corpora) * wanted.windows * wanted.length
    scored += wanted.pairs * (arm.instructions.length if arm.instructions else wanted.length)
    scored += sum(ITEM_WORK * evaluate.TASKS[task].count(wanted.items) for task in wanted.tasks)
    found: dict[str, float] = {"besides": BESIDES, "evaluate": scored}
    windows = arm.data.count * arm.data.length if arm.data else 0
    if arm.data:
        found["data"] = windows
    if arm.training and arm.data:
        found["train"] = arm.training.last * arm.training.batch * arm.data.length
    if arm.tuning and arm.instructions:
        trained = [budget for budget in (arm.tuning, arm.merging) if budget]
        found["train"] = sum(budget.last * budget.batch for budget in trained) * arm.instructions.length
    if not arm.budget or find(arm.method).by_gptq:
        found["quantize"] = windows if windows else ROUNDING * scored
    if arm.decoding and arm.format:
        found["decode"] = arm.decoding.tokens * arm.decoding.rounds
    if arm.engines and arm.format:
        found["decode"] = len(arm.engines.batches) * (1 + arm.engines.tokens) * arm.engines.rounds
    return found


def planned_work(arm: Arm) -> int:
    """All of it, in tokens of a forward pass."""
    return round(sum(COSTS[phase] * count for phase, count in tokens(arm).items()))


class Pace:
    """What arms will take, in seconds, by what those that it was shown took.

    A phase's seconds a token are those of the arm's method where they were measured, beside what all methods took in
    the phase, and that beside what all phases took of their usual costs (COSTS): each counts as one arm more of the
    next. Before anything was measured, they are of FORWARD and the model's size.
    """

    def __init__(self, records: Iterable[Record] = ()):
        self.seen: dict[tuple[str, ...], list[float]] = defaultdict(list)  # logarithms of seconds a forward token
        self.made: set[tuple[str, Any]] = set()
        self.shown: set[str] = set()  # keys of records
        for record in records:
            self.learn(record)

    def learn(self, record: Record) -> None:
        """Take what a record's arm took; what it made for others as well is there for them from now on."""
        if record.key in self.shown:
            return
        self.shown.add(record.key)
        seconds = record.cost["seconds"]
        for phase, count in tokens(record.arm).items():
            shared = _shared(phase, record.arm)
            if phase in seconds and shared not in self.made:
                self.add(record.arm, phase, seconds[phase], count)
            if shared:
                self.made.add(shared)

    def add(self, arm: Arm, phase: str, seconds: float, count: float) -> None:
        """So many tokens of a phase took so long."""
        if not count:
            return
        for names in (phase, arm.method), (phase,), ():
            self.seen[names].append(math.log(max(seconds, SHORT) / (COSTS[phase] * count)))

    def of(self, arm: Arm) -> dict[str, float]:
        """The seconds of each phase that the arm is still to go through."""
        return {
            phase: self._a_token(arm, phase) * COSTS[phase] * count
            for phase, count in tokens(arm).items()
            if _shared(phase, arm) not in self.made
        }

    def all_of(self, arms: Iterable[Arm]) -> list[dict[str, float]]:
        """`of` for each of several, one after the other: what they share is made by the first."""
        found, before = [], set(self.made)
        for arm in arms:
            found.append(self.of(arm))
            self.made |= _made_by(arm, SHARED)
        self.made = before
        return found

    def total(self, arms: Iterable[Arm]) -> float:
        """The seconds that all of them take, one after the other."""
        return sum(sum(phases.values()) for phases in self.all_of(arms))

    def _a_token(self, arm: Arm, phase: str) -> float:
        rate = math.log(FORWARD * (data.models.parameter_count(arm.model) + SMALL))
        for names in (), (phase,), (phase, arm.method):
            own = self.seen[names]
            rate = (sum(own) + rate) / (len(own) + 1)
        return math.exp(rate)


class Clock:
    """A progress bar in time: what went by and, by a Pace, about what is left, of so many arms at a time."""

    def __init__(self, pace: Pace, jobs: int = 1, hidden: bool = False):
        self.pace, self.jobs, self.begun, self.later = pace, jobs, time.monotonic(), 0.0
        self.planned: dict[str, float] = {}
        self.others: dict[Arm, tuple[float, float]] = {}  # begun when, planned how long
        self.shown = -math.inf
        self.bar = progress_bar(total=1.0, bar_format=FORM, disable=hidden, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self.planned, self.others, self.later = {}, {}, 0.0
            self._show()
        self.bar.close()

    def begin(self, arm: Arm, later: Sequence[Arm] = ()) -> None:
        """An arm is carried out from now on, and others afterwards."""
        self.planned, *others = self.pace.all_of([arm, *later])
        self.arm, self.later, self.since = arm, sum(sum(phases.values()) for phases in others), time.monotonic()
        self.whole, self.done = tokens(arm), dict.fromkeys(self.planned, 0.0)
        self.bar.set_description(title(arm), refresh=False)
        self._show()

    def progress(self, phase: str, count: int) -> None:
        """So many tokens more are done of a phase of the arm."""
        if phase in self.done:
            self.done[phase] = min(1.0, self.done[phase] + count / max(1.0, self.whole[phase]))
        if time.monotonic() > self.shown + MOMENT:
            self._show()

    def watch(self, begun: Mapping[Arm, float], later: Sequence[Arm] | None = None) -> None:
        """Other processes carry out these arms, since so long (of time.monotonic); later: others come afterwards, None
        for those that are known."""
        if later is not None:
            self.later = self.pace.total(later)
        self.others = {
            arm: self.others.get(arm) or (since, sum(self.pace.of(arm).values())) for arm, since in begun.items()
        }
        if self.others and time.monotonic() > self.shown + MOMENT:
            first, *more = self.others
            self.bar.set_description(title(first) + f" and {len(more)} more" * bool(more), refresh=False)
            self._show()

    def end(self, record: Record) -> None:
        """The arm was carried out, to this record."""
        self.planned = {}
        self.learn(record, self.since)

    def learn(self, record: Record, begun: float) -> None:
        """Take what an arm took that was begun then (of time.monotonic) and has ended now."""
        self.pace.learn(record)
        took = time.monotonic() - begun - sum(record.cost["seconds"].values())
        self.pace.add(record.arm, "besides", took, tokens(record.arm)["besides"])

    @property
    def left(self) -> float:
        """Seconds."""
        own = sum(seconds * (1 - self.done[phase]) for phase, seconds in self.planned.items())
        now = time.monotonic()
        others = sum(max(0.0, begun + planned - now) for begun, planned in self.others.values())
        return (own + others + self.later) / self.jobs

    def _show(self) -> None:
        self.shown = time.monotonic()
        gone, left = self.shown - self.begun, self.left
        self.bar.n = gone / (gone + left) if left else 1.0
        self.bar.set_postfix_str(f"{time_text(left)} left" if left else "done")


def time_text(seconds: float) -> str:
    """As people say it: "under a minute", "about 12 min", "about 3.5 h"."""
    if seconds < 60:
        return "under a minute"
    return f"about {seconds / 60:.0f} min" if seconds < 90 * 60 else f"about {seconds / 3600:.1f} h"


def waited_for(arm: Arm) -> set[tuple[str, Any]]:
    """What the arm makes for others as well, and what these would wait for: text, GPTQ's integers, an adapter."""
    return _made_by(arm, WAITED_FOR)


def _made_by(arm: Arm, phases: Iterable[str]) -> set[tuple[str, Any]]:
    """What the arm makes in these phases for others as well."""
    return {shared for phase in phases if (shared := _shared(phase, arm))}


def _shared(phase: str, arm: Arm) -> tuple[str, Any] | None:
    """What the arm makes in this phase for others as well, if anything."""
    if phase == "data" and not isinstance(arm.data, Sampling):
        return None
    if phase not in SHARED or (phase == "train" and not (arm.tuning and find(arm.method).keeps_adapter)):
        return None
    if phase == "quantize" and not find(arm.method).by_gptq:
        return None
    return phase, SHARED[phase](arm)
