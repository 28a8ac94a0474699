"""Where a claim holds, what decides it, and how numbers are written."""

import math
from dataclasses import replace

import pytest
import scipy.stats

from studylib.evidence.statistics import POWER, Interval
from studylib.evidence.verdicts import (
    ACCURACY,
    COST,
    NEURONS,
    NO_DIFFERENCE,
    NOT_REPRODUCED,
    RATE,
    REPRODUCED,
    TIMES,
    UNDECIDED,
    Effect,
    Outcome,
    PaperNumber,
)


def effect(low, high, **holds):
    """Whose bounds at RATE are these."""
    error = (high - low) / 2 / scipy.stats.norm.isf(RATE)
    return Effect(Interval((low + high) / 2, (error, error)), COST, "of something", **holds)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (effect(1, 2, above=0), REPRODUCED),
        (effect(-2.1, -1, above=0), NOT_REPRODUCED),
        (effect(-1, 1, above=0), UNDECIDED),
        (effect(0, 1, above=0), UNDECIDED),  # the bound itself is on neither side
        (effect(0, 0, above=0), UNDECIDED),
        (effect(1, 2, below=3), REPRODUCED),
        (effect(4, 5, below=3), NOT_REPRODUCED),
        (effect(2, 4, below=3), UNDECIDED),
        (effect(-0.5, 0.5, above=-1, below=1), REPRODUCED),
        (effect(0.5, 1.5, above=-1, below=1), UNDECIDED),
        (effect(-3, -2, above=-1, below=1), NOT_REPRODUCED),
        (effect(-2, 2, above=-1, below=1), UNDECIDED),
        (effect(-1, 1, above=0, tolerance=2), NO_DIFFERENCE),
        (effect(-3, 1, above=0, tolerance=2), UNDECIDED),
        (effect(0.5, 1, above=0, tolerance=2), REPRODUCED),  # small, but surely there
        (effect(-1, -0.5, above=0, tolerance=2), NOT_REPRODUCED),
        (effect(-0.5, 1, above=0, below=2, tolerance=2), NO_DIFFERENCE),
        (effect(4.5, 5.5, above=5, tolerance=2), UNDECIDED),  # a range that does not begin at zero
        (effect(math.nan, math.nan, above=0, tolerance=2), UNDECIDED),
    ],
)
def test_a_verdict_is_where_the_true_value_surely_lies(found, verdict):
    assert found.verdict() == verdict


def test_one_contradiction_of_many_that_are_looked_for_must_be_surer():
    found = effect(-2, -0.001, above=0)
    assert found.verdict() == NOT_REPRODUCED and found.verdict(ways=5) == UNDECIDED
    alone, together = Outcome((found,), ""), Outcome((found, *[effect(1, 2, above=0)] * 4), "")
    assert alone.verdict == NOT_REPRODUCED and together.verdict == UNDECIDED
    assert together.verdicts == [UNDECIDED, *[REPRODUCED] * 4] and together.effect == replace(found, ways=5)
    assert effect(1, 2, above=0).verdict(ways=5) == REPRODUCED  # all must hold: that needs no correction


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        ([REPRODUCED, REPRODUCED], REPRODUCED),
        ([REPRODUCED, NO_DIFFERENCE], NO_DIFFERENCE),
        ([NO_DIFFERENCE, UNDECIDED, REPRODUCED], UNDECIDED),
        ([UNDECIDED, NOT_REPRODUCED, NO_DIFFERENCE], NOT_REPRODUCED),
    ],
)
def test_the_parts_of_a_claim_make_one_word(words, verdict):
    kinds = {
        REPRODUCED: effect(1, 2, above=0),
        NOT_REPRODUCED: effect(-9, -8, above=0),
        NO_DIFFERENCE: effect(-0.01, 0.01, above=0, tolerance=0.05),
        UNDECIDED: effect(-1, 1, above=0),
    }
    outcome = Outcome(tuple(kinds[word] for word in words), "")
    assert outcome.verdicts == words and outcome.verdict == verdict
    assert outcome.effect == replace(kinds[verdict], ways=len(words))


def test_the_smallest_effect_is_counted_from_the_bound():
    spread = effect(-1, 1, above=0).smallest
    assert spread == pytest.approx(1 + scipy.stats.norm.ppf(POWER) / scipy.stats.norm.isf(RATE))
    assert effect(-1, 1, above=0.5).smallest == pytest.approx(0.5 + spread)
    assert effect(-1, 1, below=3).smallest == pytest.approx(3 + spread)
    assert effect(-1, 1, above=-2, below=2).smallest == pytest.approx(2 + spread)
    assert effect(1, 1, above=0).smallest is None


def test_distances_are_positive_on_the_claims_side():
    assert [effect(1, 3, above=0).beyond(value) for value in (-1, 2)] == [-1, 2]
    assert [effect(1, 3, below=4).beyond(value) for value in (5, 2)] == [-1, 2]
    assert effect(0.5, 0.7, above=-1, below=1).beyond(0.6) == pytest.approx(0.4)
    assert effect(-0.7, -0.5, above=-1, below=1).beyond(-2) == pytest.approx(-1)


def test_texts():
    ends = (0.01 / scipy.stats.norm.ppf(0.975),) * 2
    assert Effect(Interval(0.02, ends), COST, "", above=0.005).text == "2.0% [1.0%, 3.0%]"
    assert effect(0, 1, above=0.5).holds == "above 50%" and effect(0, 1, below=0.05).holds == "below 5.0%"
    assert effect(0, 1, above=-0.05, below=0.05).holds == "from −5.0% to 5.0%"
    ends = (3 / scipy.stats.norm.ppf(0.975),) * 2
    assert Effect(Interval(33.0, ends), NEURONS, "").text == "33.0 [30.0, 36.0]%"
    assert PaperNumber(1.5, ACCURACY, "{} of MMLU", recalled=True).text == "1.5 points of MMLU (recalled)"


def test_only_numbers_of_one_kind_share_an_axis():
    own, other = PaperNumber(0.1, COST), PaperNumber(2.0, TIMES)
    found = effect(0, 1, above=0)
    assert found.mark(own) == own and found.mark(other) is None and found.mark(None) is None
    assert effect(0, 1, above=0, papers=False).mark(own) is None
