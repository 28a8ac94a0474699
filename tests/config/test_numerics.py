"""Golden values: numbers that move without their component's version are found, and the component is named."""

import json
import math
import runpy
from pathlib import Path

import golden_values
import pytest
import torch
from golden_values import VALUES, problem

from studylib.config import budgets, numerics
from studylib.config.numerics import NUMERICS, Version
from studylib.data import corpora, generation, models
from studylib.evaluate import packing, scores
from studylib.methods import adapters, ptq
from studylib.quant import floats, formats, grids, kernel, learned, rotation
from studylib.train import finetuning, losses


@pytest.mark.parametrize("component", NUMERICS)
def test_the_numbers_of_a_component_are_those_of_its_version(component):
    wrong = problem(component)
    assert wrong is None, wrong


def test_every_component_has_values_and_no_others_are_kept():
    assert VALUES.keys() == NUMERICS.keys() == golden_values.read().keys()
    for name, kept in golden_values.read().items():
        assert kept["version"] == NUMERICS[name].number >= 1 and NUMERICS[name].why and "\n" not in NUMERICS[name].why
        assert len(kept["values"]) > 20 and all(map(math.isfinite, kept["values"]))


# --- numbers that change ----------------------------------------------------------------------------------------------


def a_larger_scale(patch):
    original = grids.choose_scale

    def changed(rows, grid):
        scale, zero = original(rows, grid)
        return (scale * 1.01, zero) if grid.symmetric else (scale, zero)

    patch.setattr(grids, "choose_scale", changed)


def levels_that_round_down(patch):
    original = grids._levels
    patch.setattr(grids, "_levels", lambda rows, *rest: original(rows - 0.02 * rows.abs().amax(-1, True), *rest))


def another_start_of_learned_steps(patch):
    patch.setattr(grids, "TRIED_STEPS", 6)


def a_loss_of_the_other_direction(patch):
    original = losses.soft_logit_loss

    def changed(hidden, head, teacher_hidden, teacher_head, kind="kl", temperature=1.0):
        return original(hidden, head, teacher_hidden, teacher_head, "reverse-kl" if kind == "kl" else kind, temperature)

    patch.setattr(losses, "soft_logit_loss", changed)


def states_that_are_not_divided(patch):
    patch.setattr(losses, "hidden_loss", losses.raw_hidden_loss)


def another_first_scale(patch):
    original = learned.initial_grid

    def changed(weight, bits, group, init="l4q"):
        scale, offset = original(weight, bits, group, init)
        return (scale * 1.05, offset) if init == "l4q" else (scale, offset)

    patch.setattr(learned, "initial_grid", changed)


def a_schedule_that_ends_above_zero(patch):
    original = budgets.Budget.rate
    patch.setattr(budgets.Budget, "rate", lambda self, step: 0.1 + 0.9 * original(self, step))


def another_prompt(patch):
    patch.setattr(corpora, "INPUT", "\n\nInput: ")


def rows_that_are_packed_otherwise(patch):
    patch.setattr(packing, "_longest_packed", lambda model: math.inf)
    original = packing._Row.inputs

    def changed(self, model):
        inputs = original(self, model)
        if "attention_mask" in inputs:  # what another sequence holds is seen
            inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"]).triu(1).mul(-1e9)
        return inputs

    patch.setattr(packing._Row, "inputs", changed)


def shorter_windows_of_responses(patch):
    patch.setattr(scores, "PAIR_TOKENS", 300)


def another_middle(patch):
    original = formats._nearest
    patch.setattr(formats, "_nearest", lambda x, scale, table: original(x * 1.02, scale, table))


def samples_of_more_tokens(patch):
    original = generation._pick

    def changed(logits, settings, generator):
        return original(logits * 1.3, settings, generator)

    patch.setattr(generation, "_pick", changed)


def another_strength(patch):
    original = ptq.smoothquant
    patch.setattr(ptq, "smoothquant", lambda model, text, strength=0.45: original(model, text, strength))


def adapters_that_are_scaled_otherwise(patch):
    original = adapters._beside

    def changed(layer, *rest):
        beside = original(layer, *rest)
        return type(beside)(beside.a, beside.b, beside.scaling * 1.01, beside.magnitude, beside.base)

    patch.setattr(adapters, "_beside", changed)


def adapters_of_another_seed(patch):
    original = adapters.inject
    patch.setattr(adapters, "inject", lambda model, adapter, names, seed: original(model, adapter, names, seed + 1))


def a_divergence_of_the_other_direction(patch):
    original = finetuning.soft_logit_loss
    patch.setattr(finetuning, "soft_logit_loss", lambda *args: original(*args, "reverse-kl"))


def another_random_model(patch):
    original = models.skeleton

    def changed(config):
        torch.manual_seed(1)
        return original(config)

    patch.setattr(models, "skeleton", changed)


def floats_that_are_rounded_down(patch):
    original = floats.nearest
    patch.setattr(floats, "nearest", lambda x, element: original(x * 0.98, element))


def smaller_blocks(patch):
    patch.setattr(rotation, "block_of", lambda width: 16)


def another_middle_of_the_codes(patch):
    patch.setattr(kernel, "MIDDLE", 7)


CHANGES = [
    ("grids", a_larger_scale),
    ("grids", levels_that_round_down),
    ("weight grids", another_start_of_learned_steps),
    ("distillation", a_loss_of_the_other_direction),
    ("hidden states", states_that_are_not_divided),
    ("learned grids", another_first_scale),
    ("training", a_schedule_that_ends_above_zero),
    ("corpora", another_prompt),
    ("evaluation", rows_that_are_packed_otherwise),
    ("evaluation", shorter_windows_of_responses),
    ("formats", another_middle),
    ("float grids", floats_that_are_rounded_down),
    ("rotation", smaller_blocks),
    ("generation", samples_of_more_tokens),
    ("ptq", another_strength),
    ("fine-tuning", adapters_that_are_scaled_otherwise),
    ("fine-tuning", adapters_of_another_seed),
    ("merging", a_divergence_of_the_other_direction),
    ("models", another_random_model),
    ("execution", another_middle_of_the_codes),
]


@pytest.mark.parametrize(("component", "change"), CHANGES, ids=lambda value: getattr(value, "__name__", value))
def test_a_changed_formula_is_found_and_its_component_named(monkeypatch, component, change):
    change(monkeypatch)
    wrong = problem(component)
    assert wrong is not None and wrong.startswith(f"{component}: its numbers changed (") and "\n" not in wrong
    assert "raise its version in config/numerics.py, with one line why" in wrong
    assert f'`python tests/golden/write.py "{component}"`' in wrong


def test_every_component_has_a_change_that_is_found():
    assert {component for component, _ in CHANGES} == NUMERICS.keys()


def test_a_version_that_was_raised_asks_for_new_values_and_a_new_component_for_its_first(monkeypatch, tmp_path):
    monkeypatch.setattr(golden_values, "compute", lambda component: pytest.fail("computed for nothing"))
    monkeypatch.setitem(NUMERICS, "grids", Version(2, "rounds half up"))
    assert problem("grids") == (
        "grids: its version is 2, its golden values are of version 1; write the golden values anew with "
        '`python tests/golden/write.py "grids"`'
    )
    monkeypatch.setitem(NUMERICS, "astrology", Version(1, "new"))
    assert problem("astrology").startswith("astrology: it has no golden values; write the golden values anew")


def test_values_that_are_fewer_or_more_are_a_change(monkeypatch):
    kept = golden_values.read()["grids"]["values"]
    monkeypatch.setattr(golden_values, "compute", lambda component: kept[:-1])
    assert f"it has {len(kept) - 1} values, not {len(kept)}" in problem("grids")
    monkeypatch.setattr(golden_values, "compute", lambda component: [value * 1.001 for value in kept])
    assert problem("grids") is None
    monkeypatch.setattr(golden_values, "compute", lambda component: [value * 1.003 for value in kept])
    assert problem("grids").startswith(f"grids: its numbers changed ({len(kept)} of its {len(kept)} values moved")


def test_values_are_written_anew_for_what_is_asked_and_the_rest_stays(monkeypatch, tmp_path):
    before, file = golden_values.read(), tmp_path / "numerics.json"
    file.write_text(golden_values.FILE.read_text())
    monkeypatch.setattr(golden_values, "FILE", file)
    golden_values.write([])
    assert file.read_text() == (Path(golden_values.__file__).with_name("numerics.json")).read_text()
    raised = NUMERICS["formats"].number + 1
    monkeypatch.setitem(NUMERICS, "formats", Version(raised, "another middle"))
    assert problem("formats") is not None
    golden_values.write(["formats"])
    assert problem("formats") is None
    after = golden_values.read()
    assert after["formats"]["version"] == raised and list(after) == list(NUMERICS)
    assert {name: kept for name, kept in after.items() if name != "formats"} == {
        name: kept for name, kept in before.items() if name != "formats"
    }


def test_the_script_refuses_a_component_that_there_is_not(capsys):
    write = runpy.run_path(str(Path(golden_values.__file__).with_name("write.py")))["main"]
    with pytest.raises(SystemExit, match="component: 'astrology' is not known; use some of models, corpora"):
        write(["astrology"])
    write([])
    assert capsys.readouterr().out == "written: nothing, all are as their versions\n"


def test_versions_are_numbers_with_a_reason():
    assert all(type(version.number) is int and len(version.why) > 10 for version in NUMERICS.values())
    assert json.loads(json.dumps({name: version.number for name, version in NUMERICS.items()}))
    assert numerics.FIRST in {version.why for version in NUMERICS.values()}
