"""Fine-tuned arms of a tiny model: they run, share what was trained, and their records count what is deployed."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from studylib.config.arm import Arm
from studylib.config.profiles import profile
from studylib.data import models
from studylib.data.corpora import instruction_pairs, windows
from studylib.config.budgets import Evaluation
from studylib.evaluate.scores import window_losses
from studylib.methods import deploy as merging
from studylib.methods import tuned
from studylib.methods.adapters import attach, usual_format
from studylib.config.settings import Adapter
from studylib.config.settings import Format
from studylib.quant.formats import decode_model, encode_model
from studylib.study import run as experiments
from studylib.study.records import Store, arm_key

EVALUATION = Evaluation(("wikipedia",), windows=4, length=32, pairs=2)
TUNING = dataclasses.replace(profile("smoke").tuning, learning_rate=5e-3)  # of four steps, each has to count
BUDGET = dataclasses.replace(profile("smoke"), evaluation=EVALUATION, tuning=TUNING)
ADAPTER, NF4 = Adapter(4, 4), Format("nf", 4, 32, double=True)


def arm(method, bits="4-16-16", seed=0, **fields):
    fields = {"adapter": None if method == "qat" else ADAPTER} | fields
    if method not in ("lora", *fields):
        fields.setdefault("format", NF4 if method == "qlora" else usual_format(method, 4, 32))
    return BUDGET.arm("tiny-random", method, bits, seed, **fields)


ARMS = {method: arm(method) for method in ("qlora", "qa-lora", "qat-lora", "l4q", "gptq+lora", "qat")}
ARMS |= {"lora": arm("lora", "16-16-16", format=None), "merged": arm("qlora", merge=merging.REQUANTIZED)}
ARMS["dora"] = arm("qlora", adapter=dataclasses.replace(ADAPTER, kind="dora", layers="q_proj+v_proj"))


def without_cost(record):
    return dataclasses.replace(record, cost={}, provenance={})


def test_every_method_runs_and_comes_back_from_its_file(fp32, tmp_path):
    made = dict(zip(ARMS, experiments.run(list(ARMS.values()), tmp_path), strict=True))
    assert len({record.key for record in made.values()}) == len(made)
    for name, record in made.items():
        assert record.status == "finished" and np.isfinite(record.metrics["perplexity/responses"]), name
        assert len(record.training) == 4 and record.curve[-1]["loss"] < record.curve[0]["loss"], name
        assert Arm.from_dict(json.loads(record.arm.canonical())) == record.arm
        assert "bitsandbytes" in record.provenance["code"]
        assert ("studylib.l4q" in record.provenance["code"]) == (name in ("l4q", "qat-lora"))
    # The merged arm was not trained again; what is deployed is smaller by the adapter.
    assert made["merged"].training == made["qlora"].training
    assert made["merged"].metrics["bytes/weights"] < made["qlora"].metrics["bytes/weights"]
    assert made["merged"].scores["loss/wikipedia"] != made["qlora"].scores["loss/wikipedia"]
    kept = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert len(kept) == 5  # methods that can be deployed in several ways; the merged arm shares one
    assert not list((tmp_path / "checkpoints").iterdir())


def test_an_arm_that_shares_its_training_equals_one_that_was_trained_alone(fp32, tmp_path):
    experiments.run([ARMS["qlora"]], tmp_path / "shared")
    shared = experiments.run([ARMS["merged"]], tmp_path / "shared")[0]
    alone = experiments.run([ARMS["merged"]], tmp_path / "alone")[0]
    assert without_cost(shared) == without_cost(alone)
    assert shared.cost["seconds"]["train"] < alone.cost["seconds"]["train"]


def test_the_seed_changes_the_order_and_the_adapter(fp32, tmp_path):
    first, second = experiments.run([ARMS["l4q"], arm("l4q", seed=1)], tmp_path)
    assert first.arm.seed == 0 and second.arm.seed == 1
    assert [s["loss"] for s in first.training] != [s["loss"] for s in second.training]


def test_encoded_weights_are_scored_as_they_decode(fp32, tmp_path, tiny_tokenizer):
    encoded = BUDGET.arm("tiny-random", "encoded", "4-16-16", format=NF4)
    record = experiments.run([encoded], tmp_path)[0]
    model = decode_model(encode_model(models.load_model("tiny-random"), NF4))
    losses = window_losses(model, windows("wikipedia", tiny_tokenizer, 32, 4, "evaluation"))
    assert record.scores["loss/wikipedia"] == losses.tolist()
    assert {"bits", "non_normal", "error/down_proj"} <= set(record.scores)
    assert encoded.title == "rounded weights 4-16-16 (NF4 + DQ, block 32)"


def test_validation_pairs_are_never_trained_on():
    training, validation = tuned.training_pairs("alpaca")
    held_out = instruction_pairs("evaluation")
    assert len(validation) == 8 and len(training) == 492 - 8
    assert not set(training) & set(validation) and not set(held_out) & {*training, *validation}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format": Format("nf", 4, 48)}, "block: 48 does not divide the input width 64"),
        ({"adapter": Adapter(layers="w_proj")}, "layers: the model has no 'w_proj'"),
        ({"instructions": dataclasses.replace(ARMS["qlora"].instructions, length=3)}, "length: 3 tokens hold nothing"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_any_other_arm_is_computed(tmp_path, monkeypatch, changes, named):
    monkeypatch.setattr(experiments, "carry_out", lambda *args: pytest.fail("computed"))
    with pytest.raises(ValueError, match=named):
        experiments.run([ARMS["lora"], dataclasses.replace(ARMS["qlora"], **changes)], tmp_path)


@pytest.mark.parametrize("rows", ["[]", '[{"instruction": "a", "output": "b"}]', "{"])
def test_an_instruction_file_without_enough_pairs_is_refused_first(tmp_path, rows):
    (tmp_path / "own.json").write_text(rows)
    instructions = dataclasses.replace(ARMS["lora"].instructions, source=str(tmp_path / "own.json"))
    with pytest.raises(ValueError, match=r"instructions .*own\.json"):
        experiments.check(dataclasses.replace(ARMS["lora"], instructions=instructions))


@pytest.mark.parametrize(
    ("method", "changes", "named"),
    [
        ("qlora", {"format": None}, "format: missing for 'qlora'"),
        ("qlora", {"bits": "3-16-16"}, "bits: 3-16-16 does not go with the format NF4"),
        ("qlora", {"adapter": None}, "adapter: missing for 'qlora'"),
        ("qlora", {"tuning": None}, "tuning: is missing"),
        ("qlora", {"merge": "glued"}, "merge: 'glued' is not known"),
        ("l4q", {"merge": "requantized"}, "'requantized' is not allowed for 'l4q'"),
        ("l4q", {"format": NF4}, "format: 'nf' is not allowed for 'l4q'"),
        ("lora", {"bits": "4-16-16"}, "bits: 4-16-16 does not go with 'lora'"),
        ("qat", {"adapter": ADAPTER}, "adapter: not allowed for 'qat'"),
    ],
)
def test_fields_that_do_not_go_together_are_named(method, changes, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(ARMS[method], **changes)


def test_a_killed_fine_tuning_goes_on_from_its_checkpoint(fp32, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    monkeypatch.setattr("studylib.training_loop.CHECKPOINT_SECONDS", -1)
    whole = experiments.run([ARMS["l4q"]], tmp_path / "whole")[0]
    original, told = tuned.fine_tune, []

    def cut(*args, progress, **kwargs):
        def counted(tokens):
            told.append(tokens)
            if len(told) == 4:
                raise Stopped

        return original(*args, progress=counted, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tuned, "fine_tune", cut)
        with pytest.raises(Stopped):
            experiments.run([ARMS["l4q"]], tmp_path / "cut")
    assert list(Store(tmp_path / "cut").checkpoint_folder(arm_key(ARMS["l4q"])).glob("checkpoint-*"))
    assert without_cost(experiments.run([ARMS["l4q"]], tmp_path / "cut")[0]) == without_cost(whole)


def test_a_fine_tuning_is_extended_from_its_kept_checkpoint(fp32, tmp_path, monkeypatch):
    longer = dataclasses.replace(ARMS["l4q"].tuning, steps=6, extended_from=(ARMS["l4q"].tuning.steps,))
    longer = dataclasses.replace(ARMS["l4q"], tuning=longer)
    (alone,) = experiments.run([longer], tmp_path / "alone")
    experiments.run([ARMS["l4q"]], tmp_path / "kept", keep_checkpoints=True)
    original, told = tuned.fine_tune, []

    def watched(*args, progress, **kwargs):
        return original(*args, progress=lambda n: (told.append(n), progress(n)), **kwargs)

    monkeypatch.setattr(tuned, "fine_tune", watched)
    (extended,) = experiments.run([longer], tmp_path / "kept")
    assert len(told) == 3 and told[0] == 4 * told[1]  # it began with four steps done
    assert without_cost(extended) == without_cost(alone)


@pytest.mark.parametrize("method", ["qlora", "l4q", "qat"])
def test_a_diverged_fine_tuning_is_recorded_as_such(fp32, tmp_path, method):
    wild = arm(method, tuning={"learning_rate": 1e30})
    record = experiments.run([wild], tmp_path)[0]
    assert record.status == "diverged" and record.metrics.get("perplexity/wikipedia") is None


def test_trained_parameters_come_back_as_they_were(fp32, tmp_path, tiny_model):
    attach(tiny_model, "lora", adapter=ADAPTER)
    trained = {name: p for name, p in tiny_model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(1)
    log = tuned.Log([{"step": 1.0}], [{"loss": 2.0}])
    tuned._save_trained(tiny_model, log, tmp_path / "a.safetensors")
    fresh = attach(models.load_model("tiny-random"), "lora", adapter=ADAPTER)
    assert tuned._load_trained(fresh, tmp_path / "a.safetensors") == log
    assert all(torch.equal(fresh.get_parameter(name), p) for name, p in trained.items())
