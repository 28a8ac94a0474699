"""A larger model at fewer bits beside a smaller one at more, at equal bytes: claim A5, from records of several models.

The rule was written before any record of two models was there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from studylib.evidence.measures import FULL, Cell, Cells, Measure, gather_family, megabytes
from studylib.evidence.rules import larger_is_better, sized
from studylib.evidence.verdicts import NOT_TESTED, Claim, Finding, Outcome, beside_it, by_rule
from studylib.methods import Setting, setting
from studylib.study import Record

EQUAL = 0.75  # "equal bytes": the larger model takes at least this share of what the smaller one does, at most all


@dataclass(frozen=True)
class Step:
    """A comparison that the claim makes: of the larger model at any of `few` with the smaller one at any of `many`."""

    few: tuple[Setting, ...]
    many: tuple[Setting, ...]
    words: str


EIGHT, FOUR = (setting("rtn", "8-8-8"),), (setting("llm-qat", "4-8-8"), setting("llm-qat", "4-8-4"))
STEPS = (
    Step(EIGHT, (FULL,), "8 bits beside 16"),
    Step(FOUR, EIGHT, "4 bits by LLM-QAT beside 8"),
    Step(FOUR, (FULL,), "4 bits by LLM-QAT beside 16"),
)


@dataclass(frozen=True)
class Pair:
    """A larger model at fewer bits, and a smaller one at more."""

    larger: Cell
    smaller: Cell

    @property
    def share(self) -> float:
        """Of the smaller's bytes that the larger takes, weights and a cache of CONTEXT tokens together."""
        return megabytes(self.larger) / megabytes(self.smaller)

    @property
    def is_equal(self) -> bool:
        return EQUAL <= self.share <= 1


def judge_sizes(claim: Claim, records: Sequence[Record]) -> list[Finding]:
    """What records of several models say of a claim about sizes: by its primary measure, with a verdict, and by others.

    Comparisons are paired over windows of the same text and count the spread between seeds, as everywhere
    (verdicts.decide). Not tested where no larger model at fewer bits takes as many bytes as a smaller one at more; the
    text names the nearest. Raises ValueError for records that cannot be compared (see measures.gather_family).
    """
    cells = gather_family(records)
    found = [nearest(cells, step) for step in STEPS]
    pairs = [pair for pair in found if pair and pair.is_equal]
    lacking = [_lacking(step, pair) for step, pair in zip(STEPS, found, strict=True) if pair not in pairs]
    if not pairs:
        return [Finding(claim.id, "", NOT_TESTED, f"no two sizes take equal bytes: {'; '.join(lacking)}.")]

    def test(measure: Measure, *used: Cell) -> Outcome:
        outcome = larger_is_better(measure, *used)
        return (
            replace(outcome, text=f"{outcome.text} Not at equal bytes: {'; '.join(lacking)}.") if lacking else outcome
        )

    used = [cell for pair in pairs for cell in (pair.larger, pair.smaller)]
    main = by_rule(claim, test, used, records)
    return [main] if main.outcome is None else [main, *beside_it(claim, test, used, records)]


def equal_pairs(records: Sequence[Record]) -> list[Pair]:
    """The pairs that the claim about sizes is judged by."""
    found = [nearest(gather_family(records), step) for step in STEPS]
    return [pair for pair in found if pair and pair.is_equal]


def nearest(cells: Cells, step: Step) -> Pair | None:
    """Of all pairs of two models, the one at equal bytes in which the larger takes most of what the smaller does; where
    there is none, the nearest to that. None where the arms of no pair finished.

    A model is larger where it takes more bytes in full precision.
    """
    full = {own.model: megabytes(cell) for own, cell in cells.items() if _is(own, FULL) and cell.records}
    pairs = [
        Pair(large, small)
        for larger, large in cells.items()
        for smaller, small in cells.items()
        if full.get(larger.model, 0.0) > full.get(smaller.model, 0.0) > 0 and large.records and small.records
        if any(_is(larger, own) for own in step.few) and any(_is(smaller, own) for own in step.many)
    ]
    return max(pairs, key=lambda pair: (pair.is_equal, -abs(math.log(pair.share))), default=None)


def _is(own: Setting, wanted: Setting) -> bool:
    """Whether a setting of some model is the one that is wanted."""
    return replace(own, model="") == wanted


def _lacking(step: Step, pair: Pair | None) -> str:
    """Why a step has no pair at equal bytes, in words."""
    if pair is None:
        return f"for {step.words} there are no arms of two sizes"
    return f"for {step.words} the nearest are {sized(pair.larger)} and {sized(pair.smaller)}"
