"""Named budgets."""

import pytest

from studylib.config.budgets import PROFILES, profile
from studylib.methods.arms import Setting, build_arm

SMOKE = profile("smoke")


def test_an_extended_budget_goes_on_from_where_the_shorter_one_ends():
    assert SMOKE.extended(0) == SMOKE
    longer = SMOKE.extended(4).extended(2)
    assert (longer.training.steps, longer.training.extended_from) == (10, (4, 8))
    assert (longer.tuning.steps, longer.tuning.extended_from) == (10, (4, 8))
    assert Setting.of(build_arm(longer, "m", "llm-qat", "4-8-4")).variant == ""
    with pytest.raises(ValueError, match="extend: -1"):
        SMOKE.extended(-1)


def test_unknown_profile_names_the_ones_there_are():
    with pytest.raises(ValueError, match="'huge' is not known; use one of smoke, quick, full, paper"):
        profile("huge")
    assert all(profile(name) is budget for name, budget in PROFILES.items())


def test_the_paper_profile_has_the_papers_hyper_parameters():
    paper = profile("paper")
    assert (paper.sampling.count, paper.sampling.length, paper.sampling.strategy) == (96_000, 2048, "hybrid")
    assert paper.training.learning_rate == 2e-5 and paper.training.steps * paper.training.batch == 96_000
    assert len(paper.evaluation.tasks) == 8 and paper.few_shot == ("mmlu", "triviaqa")
