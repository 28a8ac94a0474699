"""The registry, what goes with a method, and a method of one's own."""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch

from studylib.config.arm import PARTS, Arm
from studylib.config.budgets import NOTHING, Evaluation, Sampling, Training, profile
from studylib.config.numerics import NUMERICS, versions
from studylib.config.settings import FLOATING, LEARNED, OF_WEIGHTS, REQUANTIZED, Adapter, Format, Grid, Scheme
from studylib.data import models
from studylib.methods import base
from studylib.methods.arms import Setting, build_arm, order, title
from studylib.methods.base import METHODS, PAPERS, Look, Method, Work, check, find, register
from studylib.methods.lora import FineTuned
from studylib.quant.layers import decoder_linears, round_to_nearest
from studylib.quant.storage import stored_bytes
from studylib.study import schedule

SMOKE = profile("smoke")
BUDGET = dataclasses.replace(SMOKE, evaluation=Evaluation(("wikipedia",), 4, 32))
GIVEN = {  # something for each part
    "data": SMOKE.sampling,
    "training": SMOKE.training,
    "format": Format("affine", 4),
    "adapter": Adapter(),
    "instructions": SMOKE.instructions,
    "tuning": SMOKE.tuning,
    "decoding": SMOKE.decoding,
    "engines": SMOKE.engines,
}


class Ternary(Method):
    """-s, 0, s with s = max|w| of a row: a user's own 2-bit rounding."""

    name, title, source = "ternary", "Ternary", "a notebook"
    look = Look("#123456", "d")

    def apply(self, work: Work) -> None:
        with work.phase("quantize"):
            round_to_nearest(work.model, work.arm.bits)


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registry that the test may change; afterwards it is as it was."""
    own = dict(base._METHODS)
    yield base._METHODS
    base._METHODS.clear()
    base._METHODS.update(own)


# --- the registry -----------------------------------------------------------------------------------------------------


def test_the_methods_are_found_by_their_names_in_the_order_of_tables():
    assert list(METHODS)[:9] == [
        "full-precision",
        "rtn",
        "smoothquant",
        "gptq",
        "awq",
        "autoround",
        "llm-qat",
        "smoothquant+llm-qat",
        "gptq+llm-qat",
    ]
    assert list(METHODS)[9:] == [
        "encoded",
        "4-bit kernel",
        "llama.cpp",
        "lora",
        "qlora",
        "gptq+lora",
        "qa-lora",
        "gptq+qa-lora",
        "qat-lora",
        "l4q",
        "qat",
        "lsq",
        "efficientqat",
    ]
    assert all(find(name) is method and method.name == name for name, method in METHODS.items())
    assert len({method.title for method in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_a_method_says_what_it_is(method):
    assert set(method.papers) <= set(PAPERS) and method.needs | method.takes <= {*PARTS, "scheme"}
    assert not method.needs & method.takes and set(method.numerics) <= NUMERICS.keys()
    assert method.version == {"gptq+llm-qat": 2}.get(method.name, 1)
    assert type(method.look) is Look and type(method).apply is not Method.apply
    assert bool(method.numerics) == method.rounds
    assert isinstance(method, FineTuned) == ("tuning" in method.needs)
    usual = method.usual_format()
    assert (usual is None) == ("format" not in method.needs or method.name == "encoded")
    assert (method.usual_adapter() is None) == ("adapter" not in method.needs)


def test_looks_are_told_apart_within_a_paper():
    for paper in PAPERS:
        looks = [(m.look.colour, m.look.marker, m.look.hollow) for m in METHODS.values() if paper in m.papers]
        assert len(set(looks)) == len(looks), paper


def test_usual_formats():
    assert find("qlora").usual_format() == Format("nf", 4, 64, True)
    assert find("qlora").usual_format(3, 32, double=False) == Format("nf", 3, 32, False)
    for name in ("l4q", "qa-lora", "gptq+qa-lora", "qat-lora", "gptq+lora", "qat", "lsq"):
        assert find(name).usual_format(3, 32) == Format("int-full", 3, 32)
    assert find("4-bit kernel").usual_format(4, 32) == Format("affine", 4, 32)
    for name in ("lora", "rtn", "llm-qat", "encoded"):
        assert find(name).usual_format(4, 32) is None
    with pytest.raises(ValueError, match="bits: 5 is not allowed"):
        find("l4q").usual_format(5)


def test_usual_adapters():
    assert find("l4q").usual_adapter() == find("qlora").usual_adapter() == Adapter()
    for name in ("qa-lora", "gptq+qa-lora"):  # the same scaling, twice the rank
        assert find(name).usual_adapter() == Adapter(2 * Adapter().rank, 2 * Adapter().alpha)


def test_an_unknown_method_is_one_line_with_the_names_there_are():
    with pytest.raises(
        ValueError, match=r"^method: 'gpt' is not known; use one of full-precision, rtn, .*l4q, qat, lsq, efficientqat$"
    ):
        find("gpt")
    arm = Arm("m", "gpt", "4-8-4", NOTHING)
    with pytest.raises(ValueError, match=r"^method: 'gpt' is not known"):
        check(arm)


def test_the_registry_is_read_through_its_functions_only():
    with pytest.raises(TypeError):
        METHODS["mine"] = Ternary()


def test_a_method_without_apply_cannot_exist():
    class Half(Method):
        name, title = "half", "half"

    with pytest.raises(TypeError, match=r"abstract.*apply"):
        Half()

    class Unprepared(FineTuned):
        name, title = "unprepared", "unprepared"

    with pytest.raises(TypeError, match=r"abstract.*prepare"):
        Unprepared()


@pytest.mark.parametrize("name", ["", "Mine", "a/b", "a_b", "-a", "ä", "../x"])
def test_a_name_that_cannot_stand_in_a_files_name_is_refused(registry, name):
    method = Ternary()
    method.name = name
    with pytest.raises(ValueError, match=r"^name: .* is not allowed; use small letters"):
        register(method)
    assert METHODS.keys() == registry.keys() and name not in METHODS


def test_the_registry_is_read_without_torch():
    code = "import sys, studylib.methods as m; assert 'torch' not in sys.modules; print(len(m.METHODS))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(len(METHODS)), "")


# --- what goes with a method ------------------------------------------------------------------------------------------


def usual(method):
    format = (method.usual_format(4) or Format("affine", 4)) if "format" in method.needs else None
    bits = "16-16-16" if not method.rounds else "4-16-16" if format else "4-8-4"
    return build_arm(SMOKE, "m", method.name, bits, format=format)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_each_part_is_there_where_it_is_needed_and_nowhere_else(method, part):
    arm = usual(method)
    method.check(arm)
    if part in method.needs:
        with pytest.raises(ValueError, match=rf"^{part}: is missing, but '.*' needs it$") as caught:
            method.check(dataclasses.replace(arm, **{part: None}))
    else:
        given = dataclasses.replace(arm, **{part: GIVEN[part]})
        if part in method.takes and method.name != "lora":  # GPTQ and AWQ, of weights alone
            method.check(dataclasses.replace(given, bits="4-16-16"))
            with pytest.raises(ValueError, match=r"^bits: 4-8-4 does not go with the format affine Int4; use 4-16-16$"):
                method.check(given)
            return
        message = (
            "format: .* is not allowed for 'lora'" if part in method.takes else f"{part}: is given, but '.*' takes"
        )
        with pytest.raises(ValueError, match=rf"^{message}") as caught:
            method.check(given)
    assert method.name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_schemes_merges_and_bits_are_checked(method):
    arm = usual(method)
    other = dataclasses.replace(arm, scheme=Scheme("statsq"))
    own_weights = method.name in ("gptq", "gptq+llm-qat")
    if own_weights:
        method.check(dataclasses.replace(arm, scheme=Scheme(rotated=True, activations="asymmetric")))
        allowed = "takes activations and rotated alone; its grid of weights is its own$"
        for scheme in (other.scheme, Scheme("asymmetric"), Scheme(group=32)):
            with pytest.raises(ValueError, match=f"^scheme: {re.escape(repr(method.name))} {allowed}"):
                method.check(dataclasses.replace(arm, scheme=scheme))
    elif "scheme" in method.takes:
        method.check(other)
        for grid in OF_WEIGHTS if "training" in method.needs else ("statsq",):
            with pytest.raises(
                ValueError, match=f"^grid: '{grid}' is one of weights, which 16-8-4 leaves as they are$"
            ):
                method.check(dataclasses.replace(arm, scheme=Scheme(grid), bits="16-8-4"))
    else:
        with pytest.raises(ValueError, match=r"^scheme: '.*' takes none; its grids are its own$"):
            method.check(other)
    for grid in LEARNED:
        learned = dataclasses.replace(arm, scheme=Scheme(grid, 32, "head", "after-rotary"))
        if "training" in method.needs and not own_weights:
            method.check(learned)
        elif "scheme" in method.takes:
            untrained = f"grid: '{grid}' is learned in training, which '.*' has none of"
            said = "scheme: " if "training" in method.needs else untrained
            with pytest.raises(ValueError, match=f"^{said}"):
                method.check(learned)
    merged = dataclasses.replace(arm, merge=REQUANTIZED)
    if isinstance(method, FineTuned) and method.keeps_adapter and method.name != "lora":
        method.check(merged)
    elif method.name == "lora":
        with pytest.raises(ValueError, match=r"^format: missing; 'requantized' rounds to one"):
            method.check(merged)
        method.check(dataclasses.replace(merged, format=Format("nf", 3)))  # which one is asked, not at which bits
    else:
        with pytest.raises(ValueError, match=r"^merge: "):
            method.check(merged)
    with pytest.raises(ValueError, match=r"^bits: .* does not go with"):
        method.check(dataclasses.replace(arm, bits="16-16-16" if method.rounds else "4-8-4"))
    if "format" in method.needs:
        with pytest.raises(ValueError, match=r"^bits: 3-16-16 does not go with the format .*; use 4-16-16"):
            method.check(dataclasses.replace(arm, bits="3-16-16"))


def test_models_that_a_method_cannot_be_applied_to_are_told_by_their_skeleton(shape):
    from transformers import GPT2Config, LlamaConfig

    with torch.device("meta"):
        llama = models.skeleton(LlamaConfig(**shape))
        gpt2 = models.skeleton(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    for name in ("smoothquant", "awq", "smoothquant+llm-qat"):
        arm = usual(find(name))
        find(name).check_model(arm, llama)
        with pytest.raises(ValueError, match="model: which norms to smooth is not known for 'gpt2'; use one of llama"):
            find(name).check_model(arm, gpt2)
    kernel = dataclasses.replace(usual(find("4-bit kernel")), format=Format("affine", 4, 16))
    with pytest.raises(ValueError, match="q_proj: group: 16 is not allowed; the 4-bit kernel takes 32"):
        find("4-bit kernel").check_model(kernel, llama)


def test_versions_are_those_of_the_components_that_an_arm_passes_through():
    def parts(method, **changes):
        return set(versions(dataclasses.replace(usual(find(method)), **changes), find(method).numerics))

    always = {"models", "corpora", "evaluation"}
    assert parts("full-precision") == always
    assert parts("rtn") == always | {"grids"}
    assert parts("gptq") == always | {"grids", "ptq", "generation"}
    trained = always | {"grids", "generation", "training", "distillation"}
    assert parts("llm-qat") == parts("llm-qat", scheme=Scheme("asymmetric", 32)) == trained
    for grid in OF_WEIGHTS:  # arms on other grids keep their keys when these change
        assert parts("llm-qat", scheme=Scheme(grid)) == trained | {"weight grids"}
    assert parts("gptq+llm-qat") == trained | {"weight grids", "ptq"}
    assert parts("encoded") == always | {"formats"}
    assert parts("4-bit kernel") == always | {"formats", "execution"}
    assert parts("lora") == always | {"training", "fine-tuning"}
    for name in ("l4q", "qat-lora", "lsq"):
        assert parts(name) == always | {"training", "fine-tuning", "formats", "learned grids"}
    assert isinstance(usual(find("gptq")).data, Sampling) and isinstance(usual(find("llm-qat")).training, Training)
    with pytest.raises(ValueError, match=r"^numerics: 'astrology' is not known; use some of models, corpora"):
        versions(usual(find("rtn")), ("astrology",))


# --- a method of one's own --------------------------------------------------------------------------------------------


def test_a_method_of_ones_own_is_run_scored_and_counted_as_any_other(fp32, registry, tmp_path):
    before = dict(METHODS)
    register(Ternary())
    assert list(METHODS) == [*before, "ternary"] and find("ternary").title == "Ternary"
    arms = [
        build_arm(BUDGET, "tiny-random", method, bits)
        for method, bits in (("full-precision", "16-16-16"), ("ternary", "2-16-16"), ("rtn", "4-16-16"))
    ]
    full, own, other = schedule.run(arms, tmp_path)
    assert title(own.arm) == "Ternary 2-16-16" and Setting.of(own.arm).title == "Ternary at 2-16-16"
    assert len({record.scores["loss/wikipedia"][0] for record in (full, own, other)}) == 3
    assert own.provenance["numerics"]["method ternary"] == 1 and own.cost["seconds"]["quantize"] >= 0
    model = models.load_model("tiny-random")
    linears = decoder_linears(model).values()
    numbers, rows = (
        sum(count(layer) for layer in linears) for count in (lambda x: x.weight.numel(), lambda x: len(x.weight))
    )
    assert own.metrics["bytes/weights"] == full.metrics["bytes/weights"] - 2 * numbers + numbers // 4 + 4 * rows
    assert own.metrics["bytes/weights"] == stored_bytes(round_to_nearest(model, "2-16-16"))
    assert all(len(row.unique()) <= 3 for layer in decoder_linears(model).values() for row in layer.weight)
    assert sorted([own.arm, other.arm, full.arm], key=order) == [full.arm, other.arm, own.arm]

    class Finer(Ternary):
        title, version = "finer", 2

    register(Finer())  # a cell that is run again
    assert find("ternary").title == "finer" and list(METHODS) == [*before, "ternary"]
    (again,) = schedule.run([own.arm], tmp_path)
    assert again.key != own.key  # its numbers may be others
    del registry["ternary"]
    assert dict(METHODS) == before
    with pytest.raises(ValueError, match="method: 'ternary' is not known"):
        schedule.run([own.arm], tmp_path / "other")
    assert title(own.arm) == "ternary 2-16-16"  # its record can still be listed
    assert Grid(2).high == 1


def test_what_work_offers(tiny_model, tiny_tokenizer):
    told = []
    work = Work(usual(find("rtn")), tiny_model, tiny_tokenizer, lambda: tiny_model, progress=told.append)
    with work.phase("anything"):
        work.progress(3)
    assert told == [3] and work.data is None and not work.keep
    Work(usual(find("rtn")), tiny_model, tiny_tokenizer, lambda: tiny_model).progress(5)  # told to nobody


@pytest.mark.parametrize("grid", FLOATING)
def test_grids_of_floats_are_for_what_quantizes_on_the_fly_and_no_container_holds_them(grid):
    arm = build_arm(SMOKE, "m", "llm-qat", "4-8-8", scheme=Scheme(grid))
    assert Setting.of(arm)["scheme.grid"] == grid and "float grids" in versions(arm)
    with pytest.raises(ValueError, match="its numbers are floats in blocks, which no container holds here"):
        find("llm-qat").container(arm)
    with pytest.raises(ValueError, match=f"bits of the weights: 3 is not allowed for the grid '{grid}'; use 4 or 16"):
        build_arm(SMOKE, "m", "llm-qat", "3-8-8", scheme=Scheme(grid))
    with pytest.raises(ValueError, match="scheme: 'gptq' takes activations and rotated alone"):
        build_arm(SMOKE, "m", "gptq", "4-8-8", scheme=Scheme(grid))


def test_a_grid_of_activations_is_for_arms_that_round_them_or_the_cache():
    own = Scheme(activations="asymmetric")
    for bits in ("4-4-16", "4-16-4"):
        assert Setting.of(build_arm(SMOKE, "m", "llm-qat", bits, scheme=own))["scheme.activations"] == "asymmetric"
    for method in ("rtn", "gptq", "llm-qat", "gptq+llm-qat"):
        with pytest.raises(ValueError, match=r"^activations: 'asymmetric' has no effect at 4-16-16, which rounds nei"):
            build_arm(SMOKE, "m", method, "4-16-16", scheme=own)


def test_what_gptq_cannot_begin_is_refused():
    with pytest.raises(ValueError, match=r"^bits of the weights: 16 \(off\) is not allowed for GPTQ \+ LLM-QAT, which"):
        build_arm(SMOKE, "m", "gptq+llm-qat", "16-8-4")
    with pytest.raises(ValueError, match=r"^mask: 2.0 does not go with the grid of 'gptq\+llm-qat', whose gradients"):
        build_arm(SMOKE, "m", "gptq+llm-qat", "4-8-4", training={"mask": 2.0})


def test_no_two_methods_look_the_same():
    looks = [(method.look.colour, method.look.marker, method.look.hollow) for method in METHODS.values()]
    assert len(set(looks)) == len(looks)
