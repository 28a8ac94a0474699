import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studylib.config.arm import Arm
from studylib.config.profiles import PROFILES, profile
from studylib.config.settings import Adapter
from studylib.config.settings import Format
from studylib.config.settings import Scheme
from studylib.study.records import arm_key

SMOKE = profile("smoke")
bit_widths = st.tuples(*[st.integers(2, 8)] * 3).map(lambda bits: "-".join(map(str, bits)))


@given(bit_widths, st.sampled_from(["rtn", "llm-qat"]), st.integers(0, 5), st.sampled_from(sorted(PROFILES)))
@settings(deadline=None, max_examples=50)
def test_an_arm_survives_json_and_keeps_its_key(bits, method, seed, name):
    arm = PROFILES[name].arm("tiny-random", method, bits, seed)
    again = Arm.from_dict(json.loads(arm.canonical()))
    assert again == arm and arm_key(again) == arm_key(arm)


@given(
    st.one_of(
        st.fixed_dictionaries({"corpus": st.sampled_from(["c4", "wikipedia"])}),
        st.fixed_dictionaries(
            {"sampling": st.sampled_from([{"strategy": "chat"}, {"top_k": 0}, {"temperature": 0.5}])}
        ),
    ),
    st.sampled_from([{}, {"loss": "kl+hidden"}, {"masters": "bf16"}, {"mask": 2.0}]),
    st.builds(Scheme, st.sampled_from(["symmetric", "statsq"]), st.none(), st.sampled_from(["token", "head"])),
)
@settings(deadline=None, max_examples=50)
def test_variants_survive_json_and_are_told_apart_in_words(data, training, scheme):
    arm = SMOKE.arm("m", "llm-qat", "4-8-4", training=training, scheme=scheme, **data)
    again = Arm.from_dict(json.loads(arm.canonical()))
    assert again == arm and arm_key(again) == arm_key(arm)
    for other in (
        SMOKE.arm("m", "llm-qat", "4-8-4"),
        SMOKE.arm("m", "llm-qat", "4-8-4", training=training),
        SMOKE.arm("m", "llm-qat", "4-8-4", scheme=scheme, **data),
    ):
        assert (other.variant == arm.variant) == (other.canonical() == arm.canonical())
    assert arm.title == f"LLM-QAT 4-8-4 ({arm.variant})"


def test_the_headline_settings_are_scored_on_few_shot_tasks_as_well():
    full = profile("full")
    for arm in (full.arm("m", "full-precision"), full.arm("m", "rtn", "4-8-4"), full.arm("m", "llm-qat", "4-8-4")):
        assert arm.evaluation.tasks == (*full.evaluation.tasks, "mmlu", "triviaqa")
    for arm in (full.arm("m", "rtn", "4-8-8"), full.arm("m", "llm-qat", "4-8-4", sampling={"strategy": "greedy"})):
        assert arm.evaluation == full.evaluation


def test_an_extended_budget_goes_on_from_where_the_shorter_one_ends():
    assert SMOKE.extended(0) == SMOKE
    longer = SMOKE.extended(4).extended(2)
    assert (longer.training.steps, longer.training.extended_from) == (10, (4, 8))
    assert longer.arm("m", "llm-qat", "4-8-4").variant == ""
    with pytest.raises(ValueError, match="extend: -1"):
        SMOKE.extended(-1)


def test_seeds_share_the_record_of_a_method_that_draws_nothing():
    assert SMOKE.arm("m", "rtn", "4-8-4", 0) == SMOKE.arm("m", "rtn", "4-8-4", 7)
    assert SMOKE.arm("m", "llm-qat", "4-8-4", 0) != SMOKE.arm("m", "llm-qat", "4-8-4", 7)


def test_everything_in_an_arm_changes_its_key():
    arm = SMOKE.arm("m", "llm-qat", "4-8-4")
    changed = [
        dataclasses.replace(arm, model="other"),
        dataclasses.replace(arm, bits="4-8-8"),
        dataclasses.replace(arm, evaluation=dataclasses.replace(arm.evaluation, windows=5)),
        dataclasses.replace(arm, evaluation=dataclasses.replace(arm.evaluation, items=None)),
        dataclasses.replace(arm, data=dataclasses.replace(arm.data, strategy="greedy")),
        dataclasses.replace(arm, scheme=Scheme(grid="asymmetric")),
        SMOKE.arm("m", "llm-qat", "4-8-4", corpus="c4"),
        SMOKE.arm("m", "smoothquant+llm-qat", "4-8-4"),
        dataclasses.replace(arm, training=dataclasses.replace(arm.training, mask=2.0)),
        SMOKE.arm("m", "rtn", "4-8-4"),
    ]
    assert len({arm_key(a) for a in [arm, *changed]}) == len(changed) + 1


def test_equal_arms_have_one_key_however_their_numbers_are_written():
    changes = {"adapter": Adapter(4, 4), "format": Format("nf")}
    written, meant = (
        SMOKE.arm("m", "qlora", "4-16-16", **changes | {"adapter": adapter})
        for adapter in (Adapter(4, 4), Adapter(4, 4.0))
    )
    assert written == meant and arm_key(written) == arm_key(meant)
    assert arm_key(Arm.from_dict(json.loads(written.canonical()))) == arm_key(written)


def fields(**changes):
    return json.loads(SMOKE.arm("m", "llm-qat", "4-8-4").canonical()) | changes


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "gpt"}, ["'gpt'", "llm-qat"]),
        ({"bits": "4-9-4"}, ["9", "2 to 8"]),
        ({"bits": "16-16-16"}, ["16-16-16"]),
        ({"learning_rate": 1}, ["learning_rate", "training"]),
        ({"training": {"steps": 4, "batch": 2, "learning_rate": 0.1, "epochs": 3}}, ["epochs", "steps"]),
        ({"training": {"steps": "4", "batch": 2, "learning_rate": 0.1}}, ["'4'", "int"]),
        ({"training": {"steps": True, "batch": 2, "learning_rate": 0.1}}, ["True", "int"]),
        ({"training": {"batch": 2, "learning_rate": 0.1}}, ["steps", "missing"]),
        ({"training": None}, ["training", "missing"]),
        ({"data": None}, ["data", "missing"]),
        ({"method": "rtn"}, ["data", "given"]),
        ({"method": "gptq"}, ["training", "given"]),
        ({"data": {"count": 4, "length": 8, "strategy": "beam"}}, ["'beam'", "hybrid"]),
        ({"data": {"count": 4, "length": 8, "corpus": "pile"}}, ["'pile'", "wikipedia"]),
        ({"data": {"count": 0, "length": 8, "corpus": "c4"}}, ["count", "0"]),
        ({"scheme": {"grid": "nf4"}}, ["'nf4'", "symmetric"]),
        ({"scheme": {"grid": "lsq"}, "method": "rtn", "data": None, "training": None}, ["'lsq'", "llm-qat"]),
        ({"scheme": {"grid": "statsq"}, "method": "gptq", "training": None}, ["scheme", "'gptq'"]),
        (
            {
                "scheme": {"keys": "after-rotary"},
                "training": {"steps": 4, "batch": 2, "learning_rate": 1.0, "loss": "attention"},
            },
            ["attention maps", "after-rotary"],
        ),
        ({"evaluation": {"corpora": ["pile"], "windows": 1, "length": 8}}, ["'pile'", "wikipedia"]),
        ({"evaluation": {"corpora": ["c4"], "windows": 0, "length": 8}}, ["windows", "0"]),
        ({"evaluation": {"corpora": ["c4"], "windows": 1, "length": 8, "tasks": ["squad"]}}, ["'squad'", "piqa"]),
        ({"evaluation": {"corpora": ["c4"], "windows": 1, "length": 8, "source": "web"}}, ["'web'", "archive"]),
        ({"evaluation": 3}, ["3"]),
    ],
)
def test_bad_fields_give_one_line_that_names_the_value_and_what_is_allowed(changes, named):
    with pytest.raises(ValueError) as caught:
        Arm.from_dict(fields(**changes))
    assert all(part in str(caught.value) for part in named) and "\n" not in str(caught.value)


def test_whole_numbers_are_accepted_where_a_float_is_meant():
    arm = Arm.from_dict(fields(training={"steps": 4, "batch": 2, "learning_rate": 1}))
    assert arm.training.learning_rate == 1.0


def test_unknown_profile_names_the_ones_there_are():
    with pytest.raises(ValueError, match="'huge' is not known; use one of smoke, quick, full, paper"):
        profile("huge")


def test_the_paper_profile_has_the_papers_hyper_parameters():
    paper = profile("paper")
    assert (paper.sampling.count, paper.sampling.length, paper.sampling.strategy) == (96_000, 2048, "hybrid")
    assert paper.training.learning_rate == 2e-5 and paper.training.steps * paper.training.batch == 96_000
    assert len(paper.evaluation.tasks) == 8 and paper.few_shot == ("mmlu", "triviaqa")
