"""A profile that scores no more than claims are judged by: what is made of arms that differ in their scores."""

import dataclasses

import pytest

from studylib.config import Evaluation, Format
from studylib.config.budgets import profile
from studylib.evidence import covering, gather, judge, of_profile, perplexities, response_measures
from studylib.methods import METHODS, build_arm, setting
from studylib.report import figures, ledger, recipes, tables
from studylib.report.page import write_report
from studylib.study import schedule

SMOKE = profile("smoke")
BUDGET = dataclasses.replace(SMOKE, evaluation=Evaluation(("wikipedia", "c4"), 4, 64, pairs=4), apart=True)
NF4 = {"format": METHODS["qlora"].usual_format(4, 32)}


def arm(method, bits="16-16-16", seed=0, **changes):
    return build_arm(BUDGET, "tiny-random", method, bits, seed, **changes)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    arms = [arm("full-precision"), arm("rtn", "4-8-4"), arm("rtn", "8-8-8"), arm("llm-qat", "4-8-4")]
    arms += [arm("lora"), arm("qlora", "4-16-16", **NF4), arm("encoded", "4-16-16", format=Format("nf", 4, 32))]
    return schedule.run(arms, tmp_path_factory.mktemp("results"))


def test_each_is_scored_on_what_it_is_judged_by(records):
    scored = {record.arm.method: {name for name in record.scores if "loss/" in name} for record in records}
    text, pairs = {"loss/wikipedia", "loss/c4"}, {"loss/responses"}
    assert scored["full-precision"] == text | pairs
    assert scored["rtn"] == scored["llm-qat"] == scored["encoded"] == text
    assert scored["lora"] == scored["qlora"] == pairs
    assert {own.key for own in of_profile(records, "tiny-random", BUDGET)} == {own.key for own in records}
    assert not of_profile(records[1:], "tiny-random", dataclasses.replace(BUDGET, apart=False))


def test_a_measure_speaks_of_what_was_scored_on_it(records):
    cells = gather(records)
    (responses,) = response_measures(records)
    assert responses.covers(cells[setting("lora", "16-16-16")]) and not responses.covers(cells[setting("rtn", "4-8-4")])
    assert covering([responses], records) == [] and covering([responses], [records[0], *records[4:6]]) == [responses]
    assert [measure.of for measure in perplexities(records[4:6] + records[:1])] == ["wikipedia", "c4"]
    assert perplexities(records[4:6]) == []
    assert [measure.of for measure in figures.tuning_panels([records[0], *records[4:6]])] == ["responses"]


def test_tables_recommendations_and_the_page_leave_out_what_was_not_scored(records, tmp_path):
    shown = tables.readable(tables.scoreboard(records))
    by_method = shown[shown["Method"] == "QLoRA"].iloc[0]
    assert by_method["Perplexity, Wikipedia"] == "–" and "[" in by_method["Perplexity, responses"]
    text, tuned = recipes.recommendations(records)
    assert {c.arm.method for c in text.family.candidates} == {"full-precision", "rtn", "llm-qat", "encoded"}
    assert {c.arm.method for c in tuned.family.candidates} == {"lora", "qlora"}
    page = write_report(tmp_path, records, [], "study run").read_text()
    assert "on 4 windows of 64 tokens of each corpus; of responses, on 4 held-out Alpaca pairs" in page
    alone = write_report(tmp_path, records[4:6], [], "study run").read_text()
    assert "of responses, on 4 held-out Alpaca pairs" in alone and "windows of" not in alone


def test_claims_are_judged_by_what_their_arms_have(records):
    (first, *_) = judge(ledger.CLAIMS["A6"], records)
    assert first.effect is not None and first.measure == "perplexity on Wikipedia and C4"


def test_other_windows_cannot_be_compared(records):
    other = dataclasses.replace(BUDGET, evaluation=dataclasses.replace(BUDGET.evaluation, windows=8))
    changed = dataclasses.replace(records[1], arm=build_arm(other, "tiny-random", "rtn", "4-8-4"))
    with pytest.raises(ValueError, match="cannot be compared"):
        gather([records[0], changed])
