"""Claims first, the cheapest before all, and what no claim reads last."""

import pytest

from studylib.config.budgets import profile
from studylib.config.settings import Scheme
from studylib.evidence.order import claims_first
from studylib.evidence.verdicts import Claim
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
