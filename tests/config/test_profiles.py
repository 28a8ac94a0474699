"""Named budgets."""

import dataclasses

import pytest

from studylib.config.budgets import PROFILES, profile
from studylib.config.settings import Adapter, Format
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


INT4 = Format("int-full", 4, 128)


def test_the_paper_profile_has_each_papers_own_terms_where_its_comparison_is_made():
    paper, of_full = profile("paper"), profile("full")
    nf4 = build_arm(paper, "m", "qlora", "4-16-16", format=Format("nf", double=True))
    lora, uniform = build_arm(paper, "m", "lora"), build_arm(paper, "m", "qlora", "4-16-16", format=INT4)
    assert nf4.tuning == lora.tuning != uniform.tuning and nf4.adapter == lora.adapter != uniform.adapter
    assert nf4.tuning.rate(5000) == nf4.tuning.rate(9999) == 1 and uniform.tuning.rate(389) < 0.01
    l4q, pooled = (build_arm(paper, "m", name, "4-16-16", format=INT4) for name in ("l4q", "qa-lora"))
    assert pooled.tuning == uniform.tuning and pooled.adapter.rank == 2 * uniform.adapter.rank
    assert uniform.tuning.steps * uniform.tuning.batch == 2 * l4q.tuning.steps * l4q.tuning.batch == 49_920
    assert not of_full.terms and build_arm(of_full, "m", "l4q", "4-16-16", format=INT4).adapter == Adapter()


def test_an_adapter_on_a_papers_terms_is_as_usual_and_another_is_a_change():
    paper = profile("paper")
    for budget in (paper, paper.extended(100)):
        assert Setting.of(build_arm(budget, "m", "lora")).changes == ()
        few = build_arm(budget, "m", "lora", adapter=Adapter(16, 16.0), tuning={"checkpointing": True})
        changed = {"adapter.rank": 16, "adapter.scaling": 1, "adapter.dropout": 0, "tuning.checkpointing": True}
        assert dict(Setting.of(few).changes) == changed  # though this is the adapter of other profiles
        assert build_arm(budget, "m", "lora").tuning.steps == 10_000 + 100 * (budget is not paper)
    ours = build_arm(profile("full"), "m", "lora", adapter=Adapter(64, 16.0, dropout=0.1))
    assert {field for field, _ in Setting.of(ours).changes} == {"adapter.rank", "adapter.scaling", "adapter.dropout"}


def test_terms_that_are_none_are_refused():
    with pytest.raises(ValueError, match="terms: 'own' is not allowed; use Terms"):
        dataclasses.replace(SMOKE, terms=("own",))
