"""Claims first, the cheapest before all, and what no claim reads last."""

import dataclasses
import math

import numpy as np
import pytest

from studylib.config.budgets import profile
from studylib.config.settings import Scheme
from studylib.evidence import order, verdicts
from studylib.evidence.measures import response_measures
from studylib.evidence.order import ENOUGH, Plan, Prospect, claims_first, lacking_measures
from studylib.evidence.statistics import Interval, freedom
from studylib.evidence.verdicts import COST, REPRODUCED, UNDECIDED, Claim, Effect, Finding, Outcome
from studylib.methods.arms import Setting, build_arm, setting

BUDGET = profile("smoke")
WORK = {"full-precision": 1, "rtn": 2, "gptq": 5, "llm-qat": 50}


def arm(method, bits="4-8-4", seed=0, **changes):
    return build_arm(BUDGET, "tiny-random", method, bits, seed, **changes)


def claim(name, *needs, optional=()):
    return Claim(name, name, "", "", tuple(needs), optional=tuple(optional))


FULL, RTN, GPTQ, QAT = arm("full-precision", "16-16-16"), arm("rtn"), arm("gptq"), arm("llm-qat")
AGAIN, GRID = arm("llm-qat", seed=1), arm("llm-qat", scheme=Scheme(grid="asymmetric"))
CLAIMS = (
    claim("trained", Setting.of(RTN), Setting.of(QAT)),
    claim("calibrated", Setting.of(FULL), Setting.of(GPTQ), optional=[Setting.of(RTN)]),
    claim("rounded", Setting.of(FULL), Setting.of(RTN)),
    claim("elsewhere", Setting.of(RTN), setting("llm-qat", "2-2-2")),
    claim("planned"),
)


@pytest.mark.parametrize("turned", [False, True])
def test_the_cheapest_answer_comes_first_and_what_no_claim_reads_last(turned):
    arms = [GRID, AGAIN, QAT, GPTQ, arm("rtn", "8-8-8"), RTN, FULL]
    found = claims_first(reversed(arms) if turned else arms, CLAIMS, lambda each: WORK[each.method])
    assert set(found[:2]) == {FULL, RTN}
    assert found[2:] == [GPTQ, QAT, AGAIN, GRID, arm("rtn", "8-8-8")]


def test_each_arm_comes_once_and_a_claim_that_lacks_one_gives_no_order():
    found = claims_first([QAT, RTN, QAT, RTN], CLAIMS[1:], lambda each: WORK[each.method])
    assert found == [QAT, RTN]  # as what no claim reads: the longest first
    assert claims_first([], CLAIMS, lambda each: 1) == []


def runs(*arms):
    """Seeds 1 and 2 of them."""
    data = [{"data": dataclasses.replace(each.data, seed=seed)} for seed in (1, 2) for each in arms]
    return [dataclasses.replace(each, **own) for each, own in zip(2 * arms, data, strict=True)]


def finding(name, verdict, *parts, waiting=frozenset()):
    outcome = Outcome(tuple(parts), "", measured=frozenset({"text"}), waiting=waiting)
    return Finding(name, "perplexity", verdict, "", outcome=outcome)


def effect(middle, items=0.01, between=0.01, free=30.0):
    """Above zero or not; one run, with these standard errors over items and between runs."""
    error = math.hypot(items, between)
    kinds, parts = frozenset({"text"}), {"items": (items**2, 30.0), "runs": (between**2, free)}
    return Effect(Interval(middle, (error, error), freedom(*parts.values()), kinds=kinds, **parts), COST, "", above=0)


def test_a_claim_that_has_its_word_gets_further_seeds_last(make_record):
    known = {"trained": finding("trained", REPRODUCED, effect(1.0))}
    there = [make_record(each.method, each.bits) for each in (RTN, QAT)]
    found = claims_first([*runs(QAT), *runs(GRID), GRID], CLAIMS[:1], lambda each: WORK[each.method], there, known)
    assert found == [GRID, *runs(QAT), *runs(GRID)]
    assert claims_first([*runs(QAT), GRID], CLAIMS[:1], lambda each: 1, there, known, alone=True) == []


@pytest.mark.parametrize(("middle", "comes"), [(0.06, True), (0.001, False)])
def test_an_undecided_claim_gets_further_seeds_where_they_may_decide_it(middle, comes, make_record, monkeypatch):
    monkeypatch.setattr(order, "ENOUGH", 1)
    monkeypatch.setattr(verdicts, "ENOUGH", 1)
    known = {"trained": finding("trained", UNDECIDED, effect(middle))}
    there = [make_record(each.method, each.bits) for each in (RTN, QAT)]
    arms = [GRID, *runs(QAT)]
    found = claims_first(arms, CLAIMS[:1], lambda each: WORK[each.method], there, known)
    assert set(found) == set(arms) and found[0] == (runs(QAT)[0] if comes else GRID)
    alone = claims_first(arms, CLAIMS[:1], lambda each: 1, there, known, alone=True)
    assert alone[:1] == (runs(QAT)[:1] if comes else []) and GRID not in alone


def test_the_degrees_of_freedom_that_lack_are_brought_by_what_gives_them_soonest(make_record):
    known = {"trained": finding("trained", UNDECIDED, effect(0.2), waiting=frozenset({"text"}))}
    others = [arm("llm-qat", f"{bits}-8-8") for bits in range(2, 9)]
    more = [arm("llm-qat", f"{bits}-8-4", seed) for bits in (2, 3, 5, 6, 7, 8) for seed in (0, 1, 2)]
    there = [make_record(each.method, each.bits) for each in (RTN, QAT, *others)]
    arms = [*more, *runs(*others, QAT)]
    plan = Plan(arms, CLAIMS[:1], lambda each: 1, there, known)
    places = plan.decisive()
    found = [plan.arms[at] for at in places]
    assert set(found) >= set(runs(QAT)) and plan.degrees(places)["text"] == ENOUGH == 20
    first = [each for each in found if Setting.of(each) in {Setting.of(other) for other in more}]
    assert set(found) - set(first) == set(runs(*others, QAT))  # those give 2 of 3 arms, these all
    assert len({Setting.of(each) for each in first}) == 3 and plan.prospect(CLAIMS[0]).chance > 0.9
    few = Plan(arms[-4:], CLAIMS[:1], lambda each: 1, there, known)
    assert few.decisive() == [] and few.prospect(CLAIMS[0]) == Prospect((), 0.0, 0.0)  # too few for any chance
    assert [few.prospect(each) for each in CLAIMS[3:]] == 2 * [Prospect((), 0.0, 0.0)]


def test_the_chance_of_a_decision_is_how_often_further_runs_decide():
    """Given the estimate of one run of each, with errors that are known: the truth and two further runs are drawn."""
    random, middle, items, between = np.random.default_rng(0), 0.033, 0.008, 0.012
    now = effect(middle, items, between, free=1e6)
    now = dataclasses.replace(now, interval=dataclasses.replace(now.interval, items=(items**2, 1e6), free=1e6))
    drawn = between * random.normal(size=(4_000, 3))
    later = middle - drawn[:, 0] + drawn.mean(1)  # the truth is the estimate without what items and the run added
    error = math.hypot(items, between / math.sqrt(3))
    words = [dataclasses.replace(now, interval=Interval(value, (error, error), 1e6)).verdict() for value in later]
    often = np.mean([word != UNDECIDED for word in words])
    assert 0.2 < often < 0.8
    assert Outcome((now,), "", measured=frozenset({"text"})).chance(1 / 3, {"text": 1e6}) == pytest.approx(
        often, abs=0.02
    )
    assert Outcome((now,), "", measured=frozenset({"text"})).chance(1 / 3, {"text": 19}) == 0


def test_what_is_scored_on_too_little_is_named_with_its_claims():
    both = dataclasses.replace(BUDGET, evaluation=dataclasses.replace(BUDGET.evaluation, pairs=0, corpora=("c4",)))
    corpora = [build_arm(both, "tiny-random", "llm-qat", "4-8-4", corpus=name) for name in ("c4", "wikipedia")]
    generalises = claim("generalises", *map(Setting.of, corpora))
    tuned = dataclasses.replace(claim("tuned", Setting.of(corpora[0])), primary=response_measures)
    assert lacking_measures([generalises, tuned, CLAIMS[0]], corpora) == {
        "no corpus but the one that is trained on": ["generalises"],
        "no held-out pairs": ["tuned"],
    }
    fuller = [dataclasses.replace(each, evaluation=BUDGET.evaluation) for each in corpora]
    assert lacking_measures([generalises, tuned, CLAIMS[0]], fuller) == {}
