"""Arms as JSON: they come back equal, and what is wrong with one is said in a line."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studylib.config.arm import PARTS, Arm
from studylib.config.budgets import PROFILES, Evaluation, Training, profile
from studylib.config.settings import REQUANTIZED, Adapter, Format, Scheme
from studylib.methods.arms import build_arm
from studylib.methods.base import METHODS, check
from studylib.study.records import arm_key

SMOKE = profile("smoke")
bit_widths = st.tuples(*[st.integers(2, 8)] * 3).map(lambda bits: "-".join(map(str, bits)))


def usual(method, **fields):
    """An arm of a method in its usual settings."""
    own = METHODS[method]
    bits = "16-16-16" if not own.rounds else "4-16-16" if "format" in own.needs else "4-8-4"
    format = (own.usual_format(4) or Format("nf")) if "format" in own.needs else None
    return build_arm(SMOKE, "tiny-random", method, bits, **{"format": format} | fields)


@pytest.mark.parametrize("method", METHODS)
def test_an_arm_of_every_method_comes_back_from_json(method):
    for seed in (0, 3):
        arm = usual(method, seed=seed)
        again = Arm.from_dict(json.loads(arm.canonical()))
        assert again == arm and again.canonical() == arm.canonical() and hash(again) == hash(arm)
        assert Arm.from_dict(dataclasses.asdict(arm)) == arm  # as a record writes it: all fields, tuples as lists
        assert Arm.from_dict(json.loads(json.dumps(dataclasses.asdict(arm)))) == arm
        assert arm_key(again) == arm_key(arm)


@given(bit_widths, st.sampled_from(["rtn", "llm-qat"]), st.integers(0, 5), st.sampled_from(sorted(PROFILES)))
@settings(deadline=None, max_examples=50)
def test_an_arm_survives_json_and_keeps_its_key(bits, method, seed, name):
    arm = build_arm(PROFILES[name], "tiny-random", method, bits, seed)
    again = Arm.from_dict(json.loads(arm.canonical()))
    assert again == arm and arm_key(again) == arm_key(arm)


def test_what_an_arm_has_is_read_from_its_parts():
    trained, tuned, rounded = usual("llm-qat", seed=2), usual("l4q", seed=3), usual("rtn")
    assert (trained.seed, tuned.seed, rounded.seed) == (2, 3, 0)
    assert (trained.budget, tuned.budget, rounded.budget) == (trained.training, tuned.tuning, None)
    assert str(trained.widths) == trained.bits and set(PARTS) < {field.name for field in dataclasses.fields(Arm)}


def test_what_is_as_by_default_is_left_out():
    arm = usual("rtn")
    assert set(json.loads(arm.canonical())) == {"model", "method", "bits", "evaluation"}
    scheme = Scheme(grid="statsq")
    assert json.loads(usual("rtn", scheme=scheme).canonical())["scheme"] == {"grid": "statsq"}
    fields = json.loads(usual("llm-qat").canonical())
    assert fields["training"] == {"steps": 4, "batch": 2, "learning_rate": 1e-3}
    fields = json.loads(usual("qlora", merge=REQUANTIZED).canonical())
    assert fields["merge"] == REQUANTIZED and fields["adapter"] == {}
    assert fields["format"] == {"kind": "nf", "double": True}


@pytest.mark.parametrize("method", METHODS)
def test_every_field_of_an_arm_tells_it_from_others(method):
    arm = usual(method)
    changed = [dataclasses.replace(arm, model="other"), dataclasses.replace(arm, bits="2-2-2")]
    for name in (*PARTS, "evaluation", "scheme"):
        part = getattr(arm, name)
        for field in dataclasses.fields(part) if part is not None else ():
            value = getattr(part, field.name)
            if type(value) in (int, float) and field.name not in ("scale_bits", "extended_from", "bits"):
                other = value + 1 if type(value) is int else value / 2 or 0.25
                changed.append(dataclasses.replace(arm, **{name: dataclasses.replace(part, **{field.name: other})}))
    assert len({own.canonical() for own in (arm, *changed)}) == len(changed) + 1
    assert len({own for own in (arm, *changed)}) == len(changed) + 1


def test_everything_in_an_arm_changes_its_key():
    arm = build_arm(SMOKE, "tiny-random", "llm-qat", "4-8-4")
    changed = [
        dataclasses.replace(arm, model="smollm2-135m"),
        dataclasses.replace(arm, bits="4-8-8"),
        dataclasses.replace(arm, evaluation=dataclasses.replace(arm.evaluation, windows=5)),
        dataclasses.replace(arm, evaluation=dataclasses.replace(arm.evaluation, items=None)),
        dataclasses.replace(arm, data=dataclasses.replace(arm.data, strategy="greedy")),
        dataclasses.replace(arm, scheme=Scheme(grid="asymmetric")),
        build_arm(SMOKE, "tiny-random", "llm-qat", "4-8-4", corpus="c4"),
        build_arm(SMOKE, "tiny-random", "smoothquant+llm-qat", "4-8-4"),
        dataclasses.replace(arm, training=dataclasses.replace(arm.training, mask=2.0)),
        build_arm(SMOKE, "tiny-random", "rtn", "4-8-4"),
    ]
    assert len({arm_key(a) for a in [arm, *changed]}) == len(changed) + 1


def test_equal_arms_have_one_key_however_their_numbers_are_written():
    changes = {"adapter": Adapter(4, 4), "format": Format("nf")}
    written, meant = (
        build_arm(SMOKE, "tiny-random", "qlora", "4-16-16", **changes | {"adapter": adapter})
        for adapter in (Adapter(4, 4), Adapter(4, 4.0))
    )
    assert written == meant and written.canonical() == meant.canonical() and arm_key(written) == arm_key(meant)
    assert arm_key(Arm.from_dict(json.loads(written.canonical()))) == arm_key(written)
    whole = dataclasses.replace(usual("llm-qat"), training=Training(4, 2, 1, mask=2))
    point = dataclasses.replace(usual("llm-qat"), training=Training(4, 2, 1.0, mask=2.0))
    assert whole == point and whole.canonical() == point.canonical()


def fields(**changes):
    return json.loads(build_arm(SMOKE, "m", "llm-qat", "4-8-4").canonical()) | changes


BUDGET = {"steps": 4, "batch": 2, "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bits": "4-9-4"}, ["9", "2 to 8"]),
        ({"bits": 4}, ["arm.bits", "4", "string"]),
        ({"learning_rate": 1}, ["arm: unknown field 'learning_rate'", "training"]),
        ({"training": BUDGET | {"epochs": 3}}, ["arm.training: unknown field 'epochs'", "steps"]),
        ({"training": BUDGET | {"steps": "4"}}, ["arm.training.steps", "'4'", "int"]),
        ({"training": BUDGET | {"steps": True}}, ["arm.training.steps", "True", "int"]),
        ({"training": BUDGET | {"steps": 4.0}}, ["arm.training.steps", "4.0", "int"]),
        ({"training": BUDGET | {"mask": "2"}}, ["arm.training.mask", "'2'", "number"]),
        ({"training": BUDGET | {"learning_rate": float("nan")}}, ["learning_rate", "nan"]),
        ({"training": {"batch": 2, "learning_rate": 0.1}}, ["arm.training", "steps", "missing"]),
        ({"training": [1]}, ["arm.training", "[1]", "object"]),
        ({"data": {"count": 4, "length": 8, "strategy": "beam"}}, ["'beam'", "hybrid"]),
        ({"data": {"count": 4, "length": 8, "corpus": "pile"}}, ["'pile'", "wikipedia"]),
        ({"data": {"count": 0, "length": 8, "corpus": "c4"}}, ["count", "0"]),
        ({"data": {"count": "x", "length": 8, "corpus": "c4"}}, ["arm.data.count", "'x'"]),
        ({"data": {"length": 8, "corpus": "c4"}}, ["arm.data", "'count' is missing"]),
        ({"data": {"length": 8, "top_k": 0}}, ["arm.data", "'count' is missing"]),
        ({"data": {"count": 4, "length": 8, "beams": 2}}, ["arm.data: unknown field 'beams'", "strategy"]),
        ({"data": {"count": 4, "length": 8, "corpus": "c4", "beams": 2}}, ["unknown field 'beams'", "corpus, count"]),
        ({"data": 3}, ["arm.data", "3"]),
        ({"scheme": {"grid": "nf4"}}, ["'nf4'", "symmetric"]),
        ({"scheme": {"grid": ["nf4"]}}, ["arm.scheme.grid", "['nf4']"]),
        ({"evaluation": {"corpora": ["pile"], "windows": 1, "length": 8}}, ["'pile'", "wikipedia"]),
        ({"evaluation": {"corpora": "c4", "windows": 1, "length": 8}}, ["arm.evaluation.corpora", "'c4'"]),
        ({"evaluation": {"corpora": ["c4", 3], "windows": 1, "length": 8}}, ["arm.evaluation.corpora.1", "3"]),
        ({"evaluation": {"corpora": ["c4"], "windows": 0, "length": 8}}, ["windows", "0"]),
        ({"evaluation": {"corpora": ["c4"], "windows": 1, "length": 8, "tasks": ["squad"]}}, ["'squad'", "piqa"]),
        ({"evaluation": {"corpora": ["c4"], "windows": 1, "length": 8, "source": "web"}}, ["'web'", "archive"]),
        ({"evaluation": 3}, ["arm.evaluation", "3"]),
        ({"merge": "glued"}, ["merge: 'glued' is not known", "requantized"]),
        ({"format": {"bits": 4}}, ["arm.format", "'kind' is missing"]),
        ({"adapter": {"rank": 0}}, ["arm.adapter", "rank: 0 is not allowed"]),
        ({"decoding": {"shapes": ["gpt-5"]}}, ["arm.decoding", "'gpt-5'", "llama-7b"]),
    ],
)
def test_bad_fields_give_one_line_that_names_the_value_and_what_is_allowed(changes, named):
    with pytest.raises(ValueError) as caught:
        Arm.from_dict(fields(**changes))
    assert all(part in str(caught.value) for part in named) and "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize("value", [None, [], 3, "arm", {}, {"method": "rtn"}])
def test_what_is_no_arm_is_said_to_be_none(value):
    with pytest.raises(ValueError, match=r"^arm: ") as caught:
        Arm.from_dict(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "gpt"}, ["'gpt'", "llm-qat"]),
        ({"bits": "16-16-16"}, ["16-16-16", "'llm-qat'"]),
        ({"training": None}, ["training", "missing"]),
        ({"data": None}, ["data", "missing"]),
        ({"method": "rtn"}, ["data", "given"]),
        ({"method": "gptq"}, ["training", "given"]),
        ({"scheme": {"grid": "lsq"}, "method": "rtn", "data": None, "training": None}, ["'lsq'", "'rtn'"]),
        ({"scheme": {"grid": "lsq"}, "training": BUDGET | {"mask": 2.0}}, ["mask: 2.0", "'lsq'"]),
        ({"scheme": {"grid": "statsq"}, "method": "gptq", "training": None}, ["scheme", "'gptq'"]),
        (
            {"scheme": {"keys": "after-rotary"}, "training": BUDGET | {"loss": "attention"}},
            ["attention maps", "after-rotary"],
        ),
    ],
)
def test_fields_that_do_not_go_together_are_read_and_then_refused(changes, named):
    arm = Arm.from_dict(fields(**changes))  # a record of a method that is not known here can be read
    with pytest.raises(ValueError) as caught:
        check(arm)
    assert all(part in str(caught.value) for part in named) and "\n" not in str(caught.value)


def test_whole_numbers_are_accepted_where_a_float_is_meant():
    arm = Arm.from_dict(fields(training={"steps": 4, "batch": 2, "learning_rate": 1}))
    assert arm.training.learning_rate == 1.0 and json.loads(arm.canonical())["training"]["learning_rate"] == 1.0
    assert type(arm.training.learning_rate) is float
    assert arm.canonical() == Arm.from_dict(fields(training={"steps": 4, "batch": 2, "learning_rate": 1.0})).canonical()


def test_files_that_an_arm_names_need_not_be_there_to_read_it():
    evaluation = dataclasses.asdict(Evaluation(("/nowhere/own.txt",), 1, 8))
    arm = Arm.from_dict(fields(evaluation=evaluation, data={"corpus": "/nowhere/a.jsonl", "count": 1, "length": 8}))
    assert arm.evaluation.corpora == ("/nowhere/own.txt",) and arm.data.corpus == "/nowhere/a.jsonl"
