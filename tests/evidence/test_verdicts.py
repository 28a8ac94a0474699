"""Where a claim holds, what decides it, and how numbers are written."""

import math

import pytest

from studylib.evidence.statistics import Interval
from studylib.evidence.verdicts import (
    ACCURACY,
    COST,
    INCONCLUSIVE,
    NEURONS,
    NOT_REPRODUCED,
    REPRODUCED,
    TIMES,
    Effect,
    PaperNumber,
)


def effect(low, high, sure=None, **holds):
    return Effect(Interval((low + high) / 2, low, high, surely=sure), COST, "of something", **holds)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (effect(1, 2, above=0), REPRODUCED),
        (effect(-2, -1, above=0), NOT_REPRODUCED),
        (effect(-1, 1, above=0), INCONCLUSIVE),
        (effect(0, 1, above=0), INCONCLUSIVE),  # the bound itself is on neither side
        (effect(0, 0, above=0), INCONCLUSIVE),
        (effect(1, 2, below=3), REPRODUCED),
        (effect(4, 5, below=3), NOT_REPRODUCED),
        (effect(2, 4, below=3), INCONCLUSIVE),
        (effect(-0.5, 0.5, above=-1, below=1), REPRODUCED),
        (effect(0.5, 1.5, above=-1, below=1), INCONCLUSIVE),
        (effect(-3, -2, above=-1, below=1), NOT_REPRODUCED),
        (effect(-2, 2, above=-1, below=1), INCONCLUSIVE),
        (effect(1, 2, sure=(-1, 3), above=0), INCONCLUSIVE),  # the wider interval decides
        (effect(math.nan, math.nan, above=0), INCONCLUSIVE),
    ],
)
def test_a_verdict_is_where_the_whole_interval_lies(found, verdict):
    assert found.verdict == verdict


def test_the_smallest_effect_is_counted_from_the_bound():
    spread = effect(-1, 1).interval.resolution
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
    assert effect(0.01, 0.03, above=0.005).text == "2.0% [1.0%, 3.0%]"
    assert effect(0, 1, above=0.5).holds == "above 50%" and effect(0, 1, below=0.05).holds == "below 5.0%"
    assert effect(0, 1, above=-0.05, below=0.05).holds == "from −5.0% to 5.0%"
    assert Effect(Interval(33.0, 30.0, 36.0), NEURONS, "").text == "33.0 [30.0, 36.0]%"
    assert PaperNumber(1.5, ACCURACY, "{} of MMLU", recalled=True).text == "1.5 points of MMLU (recalled)"


def test_only_numbers_of_one_kind_share_an_axis():
    own, other = PaperNumber(0.1, COST), PaperNumber(2.0, TIMES)
    found = effect(0, 1, above=0)
    assert found.mark(own) == own and found.mark(other) is None and found.mark(None) is None
    assert effect(0, 1, above=0, papers=False).mark(own) is None
