"""Arms from budgets; what tells settings apart, in fields and in words."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studylib.config.arm import Arm
from studylib.config.budgets import NOTHING, Decoding, RealText, Sampling, profile
from studylib.config.settings import MERGED_16, REQUANTIZED, Adapter, BitWidths, Format, Scheme
from studylib.methods.arms import (
    CHANGES,
    Setting,
    build_arm,
    corpus_title,
    data_title,
    method_title,
    order,
    seedless,
    setting,
    title,
)
from studylib.methods.base import METHODS
from studylib.study.records import arm_key

SMOKE, FULL = profile("smoke"), profile("full")
QAT, TUNED = (
    build_arm(SMOKE, "m", "llm-qat", "4-8-4"),
    build_arm(SMOKE, "m", "l4q", "4-16-16", format=Format("int-full")),
)
QLORA = build_arm(SMOKE, "m", "qlora", "4-16-16", format=Format("nf", double=True))


def part(arm, name, **fields):
    return dataclasses.replace(arm, **{name: dataclasses.replace(getattr(arm, name), **fields)})


CHANGED = {  # for each field an arm without a change, one with this change alone, its value, and the words for it
    "data.corpus": (QAT, dataclasses.replace(QAT, data=RealText("c4", 8, 32)), "c4", "C4 text"),
    "data.strategy": (QAT, part(QAT, "data", strategy="greedy"), "greedy", "greedy"),
    "data.top_k": (QAT, part(QAT, "data", top_k=0), 0, "top-k off"),
    "data.temperature": (QAT, part(QAT, "data", temperature=0.5), 0.5, "sampled at temperature 0.5"),
    "training.loss": (QAT, part(QAT, "training", loss="labels"), "labels", "loss labels"),
    "training.temperature": (QAT, part(QAT, "training", temperature=2.0), 2.0, "KL at temperature 2"),
    "training.scale": (QAT, part(QAT, "training", scale="batchmean"), "batchmean", "loss scale batchmean"),
    "training.mask": (QAT, part(QAT, "training", mask=2.0), 2.0, "gradient mask ±2"),
    "training.masters": (QAT, part(QAT, "training", masters="bf16"), "bf16", "bf16 masters"),
    "scheme.grid": (QAT, dataclasses.replace(QAT, scheme=Scheme(grid="statsq")), "statsq", "StatsQ weights"),
    "scheme.group": (QAT, dataclasses.replace(QAT, scheme=Scheme(group=32)), 32, "weights in groups of 32"),
    "scheme.cache_scale": (
        QAT,
        dataclasses.replace(QAT, scheme=Scheme(cache_scale="head")),
        "head",
        "cache scale a head",
    ),
    "scheme.activations": (
        QAT,
        dataclasses.replace(QAT, scheme=Scheme(activations="asymmetric")),
        "asymmetric",
        "asymmetric activations",
    ),
    "scheme.rotated": (QAT, dataclasses.replace(QAT, scheme=Scheme(rotated=True)), True, "rotated"),
    "scheme.keys": (
        QAT,
        dataclasses.replace(QAT, scheme=Scheme(keys="after-rotary")),
        "after-rotary",
        "keys after rotary",
    ),
    "format": (
        QLORA,
        dataclasses.replace(QLORA, format=Format("fp-bnb", double=True)),
        Format("fp-bnb", double=True),
        "FP4 (bitsandbytes) + DQ",
    ),
    "adapter.kind": (QLORA, part(QLORA, "adapter", kind="dora"), "dora", "DoRA"),
    "adapter.rank": (QLORA, part(QLORA, "adapter", rank=8, alpha=8.0), 8, "rank 8"),
    "adapter.scaling": (QLORA, part(QLORA, "adapter", alpha=32.0), 2.0, "scaled by 2"),
    "adapter.dropout": (QLORA, part(QLORA, "adapter", dropout=0.1), 0.1, "dropout 0.1"),
    "adapter.layers": (
        QLORA,
        part(QLORA, "adapter", layers="q_proj+v_proj"),
        "q_proj+v_proj",
        "on q_proj and v_proj only",
    ),
    "adapter.init": (TUNED, part(TUNED, "adapter", init="lsq+"), "lsq+", "lsq+ initialisation"),
    "tuning.checkpointing": (QLORA, part(QLORA, "tuning", checkpointing=True), True, "checkpointing"),
    "tuning.paged": (QLORA, part(QLORA, "tuning", paged=True), True, "paged optimizer"),
    "merge": (
        QLORA,
        dataclasses.replace(QLORA, merge=MERGED_16),
        MERGED_16,
        "adapter merged into the 16-bit weights",
    ),
}


# --- settings ---------------------------------------------------------------------------------------------------------


def test_there_is_a_case_of_every_field():
    assert CHANGED.keys() == CHANGES.keys()


@pytest.mark.parametrize("field", CHANGES)
def test_each_change_alone_makes_another_setting_in_fields_and_in_words(field):
    plain, changed, value, words = CHANGED[field]
    before, after = Setting.of(plain), Setting.of(changed)
    assert before.changes == () and before.variant == "" and after.changes == ((field, value),)
    assert before != after and after == setting(changed.method, changed.bits, {field: value})
    assert after[field] == value and before[field] == CHANGES[field].default != value
    assert after.variant == words and title(changed) == f"{title(plain)} ({words})"
    assert after.title == f"{before.title} ({words})"
    assert Setting.of(Arm.from_dict(json.loads(changed.canonical()))) == after
    hash(after)


def test_a_rank_counts_as_changed_where_it_is_not_the_usual_one_of_its_method():
    usual = build_arm(SMOKE, "m", "qa-lora", "4-16-16", format=Format("int-full"))
    assert Setting.of(usual).changes == () and usual.adapter.rank == 32
    other = part(usual, "adapter", rank=16, alpha=16.0)
    assert Setting.of(other).changes == (("adapter.rank", 16),) and title(other) == "QA-LoRA 4-16-16 (rank 16)"


def test_no_two_changes_are_called_the_same():
    assert len({words for *_, words in CHANGED.values()}) == len(CHANGED)


def test_changes_together_come_in_one_order_with_a_comma():
    both = part(dataclasses.replace(QAT, scheme=Scheme(grid="lsq")), "training", loss="labels", masters="bf16")
    own = Setting.of(both)
    assert [field for field, _ in own.changes] == ["training.loss", "training.masters", "scheme.grid"]
    assert own.variant == "loss labels, bf16 masters, LSQ weights"
    given = {"scheme.grid": "lsq", "training.masters": "bf16", "training.loss": "labels"}
    assert own == setting("llm-qat", "4-8-4", given)


def test_budgets_seeds_and_the_evaluation_are_no_part_of_a_setting():
    for other in (
        build_arm(FULL, "other", "llm-qat", "4-8-4", seed=2),
        build_arm(SMOKE.extended(4), "m", "llm-qat", "4-8-4"),
        part(QAT, "training", learning_rate=1.0, steps=7, weight_decay=0.1, warmup=0.5),
        part(QAT, "evaluation", windows=7, tasks=()),
    ):
        assert Setting.of(other) == Setting.of(QAT)


def test_a_format_counts_as_changed_where_it_is_not_the_usual_one_of_its_method():
    for method, bits in (("qlora", 3), ("l4q", 2), ("qat", 4)):
        usual = METHODS[method].usual_format(bits)
        arm = build_arm(SMOKE, "m", method, f"{bits}-16-16", format=usual)
        assert Setting.of(arm).changes == ()
        other = dataclasses.replace(usual, group=32)
        assert Setting.of(dataclasses.replace(arm, format=other)).changes == (("format", other),)
    rounded = build_arm(SMOKE, "m", "encoded", "4-16-16", format=Format("nf"))  # which one it is is what is asked
    assert Setting.of(rounded).changes == (("format", Format("nf")),)
    assert Setting.of(rounded).title == "NF4" and title(rounded) == "rounded weights 4-16-16 (NF4)"


def test_fields_that_there_are_not_are_refused():
    with pytest.raises(KeyError, match=r"'training\.steps' is no field of a setting; use one of data\.corpus"):
        setting("llm-qat", "4-8-4", {"training.steps": 3})
    with pytest.raises(KeyError, match=r"'seed' is no field of a setting"):
        Setting.of(QAT)["seed"]


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
    arm = build_arm(SMOKE, "tiny-random", "llm-qat", "4-8-4", training=training, scheme=scheme, **data)
    again = Arm.from_dict(json.loads(arm.canonical()))
    assert again == arm and arm_key(again) == arm_key(arm)
    own = Setting.of(arm)
    for other in (
        build_arm(SMOKE, "tiny-random", "llm-qat", "4-8-4"),
        build_arm(SMOKE, "tiny-random", "llm-qat", "4-8-4", training=training),
        build_arm(SMOKE, "tiny-random", "llm-qat", "4-8-4", scheme=scheme, **data),
    ):
        assert (Setting.of(other).variant == own.variant) == (other.canonical() == arm.canonical())
        assert (Setting.of(other) == own) == (other.canonical() == arm.canonical())
    assert title(arm) == f"LLM-QAT 4-8-4 ({own.variant})"


# --- arms from budgets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_an_arm_has_the_parts_that_its_method_needs_and_no_others(method):
    own = METHODS[method]
    format = (own.usual_format(4) or Format("affine")) if "format" in own.needs else None
    bits = "16-16-16" if not own.rounds else "4-16-16" if format else "4-8-4"
    arm = build_arm(SMOKE, "m", method, bits, 5, format=format)
    own.check(arm)
    given = {
        name for name in ("data", "training", "format", "adapter", "instructions", "tuning", "decoding", "engines")
    }
    assert {name for name in given if getattr(arm, name) is not None} == own.needs
    assert (
        arm.evaluation == (NOTHING if arm.engines else SMOKE.evaluation) and arm.model == "m" and arm.method == method
    )
    if arm.data or arm.instructions:
        assert arm.seed == 5
    for trained, usual in ((arm.training, SMOKE.training), (arm.tuning, SMOKE.tuning)):
        assert trained is None or trained == dataclasses.replace(
            usual,
            learning_rate=usual.learning_rate * own.relative_rate,
            grid_rate=usual.grid_rate if own.trains_grid(arm.scheme) else None,
        )
    assert arm.decoding in (None, SMOKE.decoding) and isinstance(SMOKE.decoding, Decoding)
    assert arm.engines in (None, SMOKE.engines) and arm.timed == bool(own.needs & {"decoding", "engines"})
    assert arm.adapter == own.usual_adapter() and Setting.of(arm).changes == (("format", format),) * (
        method == "encoded"
    )


def test_fields_of_a_budget_can_be_changed():
    arm = build_arm(
        SMOKE, "m", "llm-qat", "4-8-4", 3, sampling={"top_k": 7, "seed": 9}, training={"steps": 2, "loss": "labels"}
    )
    assert arm.data == dataclasses.replace(SMOKE.sampling, top_k=7, seed=9)
    assert arm.training == dataclasses.replace(SMOKE.training, steps=2, loss="labels", grid_rate=None)
    tuned = build_arm(SMOKE, "m", "l4q", "4-16-16", format=Format("affine"), tuning={"learning_rate": 0.5, "steps": 9})
    assert (tuned.tuning.learning_rate, tuned.tuning.steps) == (0.5, 9)
    real = build_arm(SMOKE, "m", "gptq", "4-8-4", 4, corpus="c4", sampling={"count": 3})
    assert real.data == RealText("c4", 3, SMOKE.sampling.length, 4)
    lora = build_arm(SMOKE, "m", "lora", merge=REQUANTIZED, format=Format("nf"))
    assert lora.bits == "16-16-16" and (lora.merge, lora.format) == (REQUANTIZED, Format("nf"))
    assert isinstance(QAT.data, Sampling)


def test_seeds_share_the_record_of_a_method_that_draws_nothing():
    assert build_arm(SMOKE, "m", "rtn", "4-8-4", 0) == build_arm(SMOKE, "m", "rtn", "4-8-4", 7)
    assert build_arm(SMOKE, "m", "llm-qat", "4-8-4", 0) != build_arm(SMOKE, "m", "llm-qat", "4-8-4", 7)


def test_what_does_not_go_together_is_refused():
    for method, bits, changes, named in (
        ("gpt", "4-8-4", {}, "method: 'gpt' is not known; use one of full-precision, rtn"),
        ("rtn", "16-16-16", {}, "bits: 16-16-16 does not go with 'rtn', which quantizes something"),
        ("full-precision", "4-8-4", {}, "bits: 4-8-4 does not go with 'full-precision', which is 16-16-16"),
        ("qlora", "4-16-16", {}, "format: is missing, but 'qlora' needs it"),
        ("rtn", "4-8-4", {"format": Format("nf")}, "format: is given, but 'rtn' takes none"),
        ("rtn", "4-8-4", {"merge": "dequantized"}, "merge: is given, but 'rtn' is not fine-tuned"),
        ("gptq", "4-8-4", {"scheme": Scheme("statsq")}, "scheme: 'gptq' takes activations and rotated alone"),
        ("gptq", "16-8-4", {}, r"bits of the weights: 16 \(off\) is not allowed for GPTQ"),
        ("awq", "16-8-4", {}, r"bits of the weights: 16 \(off\) is not allowed for AWQ"),
        (
            "rtn",
            "4-8-16",
            {"scheme": Scheme(keys="after-rotary")},
            "cache_scale: 'token' with keys 'after-rotary'",
        ),
        ("rtn", "4-8-4", {"seed": 2**32}, "seed: 4294967296 is not allowed; use a whole number from 0 to 4294967295"),
        ("rtn", "4-8-4", {"training": {"loss": "kl"}}, "training: is given, but 'rtn' takes none"),
        ("rtn", "4-8-4", {"corpus": "c4"}, "corpus: is given, but 'rtn' takes none"),
        ("llm-qat", "4-8-4", {"tuning": {"steps": 3}}, "tuning: is given, but 'llm-qat' takes none"),
        ("llm-qat", "4-8-4", {"sampling": {"beams": 3}}, "sampling: field: 'beams' is not known; use one of count"),
        ("llm-qat", "4-8-4", {"sampling": {3: 3}}, "sampling: field: 3 is not known"),
        ("llm-qat", "4-8-4", {"sampling": {"top_k": 5.0}}, "top_k: 5.0 is not allowed; use a whole number from 0"),
        ("llm-qat", "4-8-4", {"sampling": ["top_k"]}, r"sampling: \['top_k'\] is not allowed; use a dictionary"),
        ("llm-qat", "4-8-4", {"sampling": {"top_k": 5}, "corpus": "c4"}, "sampling: 'top_k' has no effect on the text"),
        ("llm-qat", "4-8-4", {"training": {"epochs": 3}}, "training: field: 'epochs' is not known; use one of steps"),
        ("lora", "16-16-16", {"tuning": {"paged": 1}}, "paged: 1 is not allowed; use True or False"),
        ("lora", "16-16-16", {"adapter": "dora"}, "adapter: 'dora' is not allowed; use Adapter or None"),
        ("encoded", "4-16-16", {"format": "nf"}, "format: 'nf' is not allowed; use Format or None"),
        ("rtn", "4-8-4", {"scheme": "statsq"}, "scheme: 'statsq' is not allowed; use Scheme"),
        ("rtn", BitWidths(4, 8, 4), {}, r"bits: BitWidths\(.*\) is not allowed; use one line of text"),
        (["rtn"], "4-8-4", {}, r"method: \['rtn'\] is not known"),
    ):
        with pytest.raises(ValueError, match=named) as caught:
            build_arm(SMOKE, "m", method, bits, **changes)
        assert "\n" not in str(caught.value)


def test_the_headline_settings_are_scored_on_few_shot_tasks_as_well():
    for arm in (
        build_arm(FULL, "m", "full-precision"),
        build_arm(FULL, "m", "rtn", "4-8-4"),
        build_arm(FULL, "m", "llm-qat", "4-8-4"),
    ):
        assert arm.evaluation.tasks == (*FULL.evaluation.tasks, "mmlu", "triviaqa")
    for method, bits in (("lora", "16-16-16"), ("qlora", "4-16-16"), ("l4q", "4-16-16")):
        format = None if method == "lora" else METHODS[method].usual_format(4)
        arm = build_arm(FULL, "m", method, bits, format=format)
        assert arm.evaluation.tasks == (*FULL.evaluation.tasks, "mmlu")  # L4Q's and QLoRA's own
    for arm in (
        build_arm(FULL, "m", "rtn", "4-8-8"),
        build_arm(FULL, "m", "rtn", "4-8-4", scheme=Scheme("statsq")),
        build_arm(FULL, "m", "llm-qat", "4-8-4", sampling={"strategy": "greedy"}),
        build_arm(FULL, "m", "llm-qat", "4-8-4", training={"loss": "labels"}),
        build_arm(FULL, "m", "gptq", "4-8-4"),
        build_arm(FULL, "m", "smoothquant+llm-qat", "4-8-4"),
        build_arm(FULL, "m", "qlora", "3-16-16", format=Format("nf", 3, double=True)),
        build_arm(FULL, "m", "qlora", "4-16-16", format=Format("nf", double=True), adapter=Adapter(4, 4)),
        build_arm(FULL, "m", "l4q", "4-16-16", format=Format("affine", 4, 32)),
        build_arm(FULL, "m", "qat", "4-16-16", format=Format("affine")),
    ):
        assert arm.evaluation == FULL.evaluation


# --- titles and order -------------------------------------------------------------------------------------------------


def test_titles():
    full, rtn = build_arm(SMOKE, "m", "full-precision"), build_arm(SMOKE, "m", "rtn", "4-8-4")
    assert (title(full), title(rtn), title(QLORA)) == ("full precision", "RTN 4-8-4", "QLoRA 4-16-16")
    titles = [Setting.of(arm).title for arm in (full, rtn, QLORA)]
    assert titles == ["full precision", "RTN at 4-8-4", "QLoRA at 4-16-16"]
    assert title(build_arm(SMOKE, "m", "lora")) == "LoRA 16-16-16"
    assert method_title("l4q") == "L4Q" and method_title("of somebody else") == "of somebody else"
    stranger = dataclasses.replace(rtn, method="somebody's")
    assert title(stranger) == "somebody's 4-8-4" and Setting.of(stranger).title == "somebody's at 4-8-4"
    assert (corpus_title("wikipedia"), corpus_title("c4"), corpus_title("/a/b/news.txt")) == ("Wikipedia", "C4", "news")


def test_data_goes_by_what_it_is():
    assert data_title(QAT) == "hybrid"
    assert data_title(CHANGED["data.corpus"][1]) == "C4 text"
    assert data_title(part(QAT, "data", strategy="sampled", top_k=0)) == "sampled, top-k off"


def test_arms_come_in_the_order_of_tables():
    full = build_arm(SMOKE, "m", "full-precision")
    wanted = [
        full,
        build_arm(SMOKE, "m", "rtn", "8-8-8"),
        build_arm(SMOKE, "m", "llm-qat", "8-8-8"),
        build_arm(SMOKE, "m", "rtn", "4-8-4"),
        QAT,
        dataclasses.replace(QAT, data=dataclasses.replace(QAT.data, seed=1)),
        part(QAT, "training", loss="labels"),
        dataclasses.replace(build_arm(SMOKE, "m", "rtn", "4-8-4"), method="somebody's"),
    ]
    assert sorted(reversed(wanted), key=order) == wanted


def test_seedless_arms_are_equal_where_they_differ_in_no_more():
    first, second = (build_arm(SMOKE, "m", "llm-qat", "4-8-4", seed) for seed in (0, 1))
    assert first != second and seedless(first) == seedless(second) == first
    tuned = build_arm(SMOKE, "m", "l4q", "4-16-16", 4, format=Format("int-full"))
    assert seedless(tuned) == TUNED and seedless(build_arm(SMOKE, "m", "rtn", "4-8-4")).data is None


def test_what_lora_is_rounded_to_afterwards_does_not_change_how_it_is_trained():
    paper = profile("paper")
    plain = build_arm(paper, "m", "lora")
    for kind in ("nf", "affine", "int-full"):
        rounded = build_arm(paper, "m", "lora", format=Format(kind, 4), merge="merged-quantized")
        assert (rounded.tuning, rounded.adapter) == (plain.tuning, plain.adapter), kind
