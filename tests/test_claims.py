"""Each rule against records for which the verdict is plain."""

import pytest

from studylib.arms import FULL_PRECISION, LLM_QAT, RTN, SMOOTHQUANT_QAT
from studylib.claims import CLAIMS, INCONCLUSIVE, NOT_REPRODUCED, NOT_TESTED, REPRODUCED, judge
from studylib.layers import Scheme
from studylib.records import DIVERGED


def verdicts(claim, records):
    return [finding.verdict for finding in judge(CLAIMS[claim], records)]


def replaced(records, record):
    return [record if each.arm.title == record.arm.title else each for each in records]


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_papers_picture_reproduces_every_claim(ablations, claim):
    assert set(verdicts(claim, ablations)) == {REPRODUCED}


@pytest.mark.parametrize(
    ("claim", "method", "bits", "loss", "accuracy"),
    [
        ("A1", LLM_QAT, "4-8-4", 4.1, 0.35),  # a little of the loss only
        ("A2", RTN, "8-8-4", 3.012, 0.60),  # the 4-bit cache costs nothing
        ("A3", RTN, "4-8-8", 5.0, 0.05),  # more is won at 4-8-8
        ("A4", RTN, "8-8-8", 3.2, 0.50),
        ("A6", RTN, "4-8-4", 3.2, 0.50),
        ("A11", SMOOTHQUANT_QAT, "4-4-16", 5.5, 0.2),  # it hurts at 4-4
        ("A11", SMOOTHQUANT_QAT, "4-8-4", 3.0, 0.60),  # it helps at 4-8 as well
        ("A12", LLM_QAT, "4-4-16", 3.1, 0.58),
    ],
)
def test_the_opposite_is_not_reproduced(ablations, make_record, claim, method, bits, loss, accuracy):
    changed = replaced(ablations, make_record(method, bits, loss=loss, accuracy=accuracy))
    assert set(verdicts(claim, changed)) == {NOT_REPRODUCED}


@pytest.mark.parametrize(
    ("claim", "change"),
    [
        ("A8", {"sampling": {"strategy": "greedy"}}),
        ("A9", {"training": {"loss": "labels"}}),
        ("A9", {"training": {"loss": "kl+hidden"}}),
        ("A10", {"scheme": Scheme(grid="lsq")}),
    ],
)
def test_one_better_variant_is_enough_to_contradict(ablations, make_record, claim, change):
    changed = replaced(ablations, make_record(LLM_QAT, "4-8-4", loss=3.1, accuracy=0.58, changes=change))
    assert set(verdicts(claim, changed)) == {NOT_REPRODUCED}


def test_real_text_is_not_judged_by_the_corpus_it_is_from(ablations, make_record):
    better = make_record(LLM_QAT, "4-8-4", loss=3.1, accuracy=0.3, changes={"corpus": "c4"})
    assert verdicts("A7", replaced(ablations, better)) == [NOT_REPRODUCED, REPRODUCED, REPRODUCED]


def test_noise_is_inconclusive(make_record):
    # Two arms whose windows scatter widely and independently around the same loss.
    noisy = make_record(RTN, "8-8-8", loss=3.05, spread=0.5, accuracy=0.60)
    for name, losses in noisy.scores.items():
        if name.startswith("loss/"):
            losses[:] = losses[::-1]
    records = [make_record(FULL_PRECISION, spread=0.5, accuracy=0.61), noisy]
    assert verdicts("A4", records)[:2] == [INCONCLUSIVE] * 2


def test_nothing_lost_means_nothing_to_win_back(picture, make_record):
    same = replaced(picture, make_record(RTN, "4-8-4", loss=3.0, accuracy=0.60))
    findings = judge(CLAIMS["A1"], same)
    assert {finding.verdict for finding in findings} == {INCONCLUSIVE}
    assert "cannot be told" in findings[0].sentence


def test_a_missing_arm_is_named(picture):
    (finding,) = judge(CLAIMS["A3"], [r for r in picture if r.arm.bits != "4-8-8"])
    assert finding.verdict == NOT_TESTED and finding.effect is None
    assert finding.sentence == "Not tested here: RTN at 4-8-8 and LLM-QAT at 4-8-8 were not run."


def test_a_diverged_seed_is_told_not_averaged(picture, make_record):
    (finding,) = judge(CLAIMS["A1"], [*picture, make_record(LLM_QAT, "4-8-4", seed=1, status=DIVERGED)])
    assert finding.verdict == INCONCLUSIVE
    assert finding.sentence.startswith("1 of 2 runs of LLM-QAT at 4-8-4 diverged")


def test_the_cache_claim_uses_training_where_it_was_run(picture, make_record):
    better, worse = (make_record(LLM_QAT, "8-8-4", loss=loss, accuracy=acc) for loss, acc in ((3.1, 0.58), (3.5, 0.4)))
    assert "only this half of the claim is tested" in judge(CLAIMS["A2"], picture)[0].sentence
    assert set(verdicts("A2", [*picture, better])) == {REPRODUCED}
    assert set(verdicts("A2", [*picture, worse])) == {NOT_REPRODUCED}


def test_sentences_carry_the_numbers(picture):
    sentence = judge(CLAIMS["A1"], picture)[0].sentence
    assert sentence == (
        "Perplexity on Wikipedia: full precision 20.1, RTN at 4-8-4 66.7, LLM-QAT at 4-8-4 27.1: "
        "LLM-QAT wins back 85% [85%, 85%] of what RTN loses. Reproduced."
    )


def test_several_seeds_are_shown(picture, make_record):
    more = [*picture, make_record(LLM_QAT, "4-8-4", loss=3.4, accuracy=0.5, seed=1)]
    assert "(single seeds: 79% to 85%)" in judge(CLAIMS["A1"], more)[0].sentence
