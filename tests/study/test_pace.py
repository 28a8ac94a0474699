"""Seconds that are learnt from records, and the bar that tells what is left."""

import dataclasses

import pytest

from studylib.config.budgets import profile
from studylib.methods.arms import build_arm
from studylib.study import pace
from studylib.study.pace import COSTS, Clock, Pace, planned_work, time_text, tokens

BUDGET = profile("smoke")
RTN = build_arm(BUDGET, "tiny-random", "rtn", "4-8-4")
QAT, OTHER = (
    build_arm(BUDGET, "tiny-random", "llm-qat", "4-8-4", sampling={"strategy": how}) for how in ("hybrid", "greedy")
)


def took(make_record, arm, seconds, key="a"):
    record = make_record(arm.method, arm.bits)
    return dataclasses.replace(record, key=key, arm=arm, cost={"seconds": seconds, "tokens": {}, "peak_bytes": 0})


def test_an_arms_work_is_told_by_phase():
    assert tokens(QAT)["train"] == 4 * 2 * 32 and tokens(QAT)["data"] == 8 * 32
    assert planned_work(QAT) == round(sum(COSTS[phase] * count for phase, count in tokens(QAT).items()))
    assert planned_work(QAT) > planned_work(RTN)


def test_what_was_measured_of_a_method_says_what_its_arms_take(make_record):
    known = Pace()
    begun = known.of(OTHER)
    for key in map(str, range(200)):
        known.learn(took(make_record, RTN, {"evaluate": 6.0, "quantize": 0.5}, key))
    assert known.of(RTN)["evaluate"] == pytest.approx(6.0, rel=0.1)
    assert known.of(RTN)["quantize"] == pytest.approx(0.5, rel=0.1)
    # Another method takes about as long to score, and its training COSTS times as long a token.
    assert known.of(OTHER)["evaluate"] == pytest.approx(6.0, rel=0.1)
    assert known.of(OTHER)["train"] > 5 * begun["train"]


def test_what_arms_share_is_made_once(make_record):
    twin = dataclasses.replace(QAT, training=dataclasses.replace(QAT.training, loss="labels"))
    known = Pace()
    first, second, third = known.all_of([QAT, twin, OTHER])
    assert "data" in first and "data" not in second and "data" in third
    assert known.total([QAT, twin]) == pytest.approx(sum(first.values()) + sum(second.values()))
    known.learn(took(make_record, QAT, {"data": 3.0, "train": 2.0, "evaluate": 1.0}))
    assert "data" not in known.of(twin) and "data" in known.of(OTHER)


def test_the_bar_tells_what_is_left(monkeypatch, capsys, make_record):
    now = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    known = Pace([took(make_record, RTN, {"evaluate": 600.0, "quantize": 1.0}, str(key)) for key in range(50)])
    with Clock(known, jobs=2) as clock:
        clock.begin(RTN, [RTN, RTN])
        whole = clock.left
        assert whole == pytest.approx(3 * sum(known.of(RTN).values()) / 2)
        now[0] = whole
        clock.progress("evaluate", tokens(RTN)["evaluate"])
        assert clock.left == pytest.approx(whole - known.of(RTN)["evaluate"] / 2)
        clock.progress("evaluate", 10**9)  # more than was planned
        assert clock.left == pytest.approx(whole - known.of(RTN)["evaluate"] / 2)
    told = capsys.readouterr().err
    assert "RTN 4-8-4:   0%" in told and f"{time_text(whole)} left" in told and "100%" in told


def test_times_are_told_as_people_say_them():
    assert [time_text(seconds) for seconds in (5, 60, 1500, 5400, 12600)] == [
        "under a minute",
        "about 1 min",
        "about 25 min",
        "about 1.5 h",
        "about 3.5 h",
    ]
