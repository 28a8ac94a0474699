"""Fine-tuned arms of a tiny model: they train, share what was trained, and deploy what their records count."""

import contextlib
import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch

from studylib.config.arm import Arm
from studylib.config.budgets import Evaluation, Tuning, profile
from studylib.config.settings import DEQUANTIZED, MERGED_DISTILLED, MERGED_QUANTIZED, REQUANTIZED, Adapter, Format
from studylib.data import models
from studylib.data.corpora import windows
from studylib.evaluate.scores import window_losses
from studylib.methods.arms import build_arm, title
from studylib.methods.base import GGUF, INTEGERS, Work, check, find
from studylib.quant.formats import decode_model, encode_model
from studylib.quant.layers import decoder_linears, trained_grids
from studylib.quant.storage import DeployedLinear
from studylib.study import run, schedule
from studylib.study.records import Store, arm_key
from studylib.train import finetuning
from studylib.train.distillation import TrainingData

EVALUATION = Evaluation(("wikipedia",), windows=4, length=32, pairs=2)
TUNING = dataclasses.replace(profile("smoke").tuning, learning_rate=5e-3)  # of four steps, each has to count
BUDGET = dataclasses.replace(profile("smoke"), evaluation=EVALUATION, tuning=TUNING)
ADAPTER, NF4 = Adapter(4, 4), Format("nf", 4, 32, double=True)


def arm(method, bits="4-16-16", seed=0, **fields):
    fields = {"adapter": ADAPTER if "adapter" in find(method).needs else None} | fields
    if method not in ("lora", *fields):
        fields.setdefault("format", NF4 if method == "qlora" else find(method).usual_format(4, 32))
    rate = {"tuning": {"learning_rate": TUNING.learning_rate}}  # the same for all: each has to count here
    return build_arm(BUDGET, "tiny-random", method, bits, seed, **rate | fields)


ARMS = {
    method: arm(method) for method in ("qlora", "qa-lora", "gptq+qa-lora", "qat-lora", "l4q", "gptq+lora", "qat", "lsq")
}
ARMS |= {"lora": arm("lora", "16-16-16", format=None), "merged": arm("qlora", merge=REQUANTIZED)}
ARMS["distilled"] = arm("qlora", merge=MERGED_DISTILLED)
ARMS["efficientqat"] = arm("efficientqat", adapter=None, tuning={"learning_rate": 5e-3, "grid_rate": 0.01})
ARMS["dora"] = arm("qlora", adapter=dataclasses.replace(ADAPTER, kind="dora", layers="q_proj+v_proj"))


def without_cost(record):
    return dataclasses.replace(record, cost={}, provenance={})


def work_on(arm, folder, **fields):
    """What run.py makes for an arm, by hand."""
    load = functools.partial(models.load_model, arm.model)
    model, tokenizer = load(), models.load_tokenizer(arm.model)
    if arm.data:
        head = model.get_output_embeddings().weight.detach().clone()
        text = windows("c4", tokenizer, arm.data.length, arm.data.count, "training")
        fields["data"] = TrainingData(text, {}, [], None, head)
    paths = {"checkpoints": folder / "checkpoints", "trained": folder / "trained.safetensors"}
    return Work(arm, model, tokenizer, load, **paths | fields)


def apply(arm, folder, **fields):
    """The deployed model, and the log of its training."""
    work = work_on(arm, folder, **fields)
    log = find(arm.method).apply(work)
    return work.model, log


@torch.no_grad()
def logits(model):
    return model(torch.arange(24).view(2, 12), use_cache=False).logits


# --- FineTuned.apply --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARMS)
def test_a_method_trains_and_leaves_what_is_deployed(fp32, tmp_path, name):
    told, phases = [], []

    def phase(name):
        phases.append(name)
        return contextlib.nullcontext()

    model, log = apply(ARMS[name], tmp_path, progress=told.append, phase=phase)
    assert phases == ["quantize"] * find(ARMS[name].method).by_gptq + ["train"]
    assert len(log.steps) == 4 and log.curve[-1]["loss"] < log.curve[0]["loss"]
    layers = decoder_linears(model).values()
    assert len(layers) == 14 and {type(layer) for layer in layers} == {DeployedLinear}
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    coded, beside = (sum(part is not None for part in parts) for parts in zip(*map(stored, layers), strict=True))
    assert coded == (0 if name == "lora" else 14)
    assert beside == {"lora": 14, "qlora": 14, "gptq+lora": 14, "qat-lora": 14, "dora": 4}.get(name, 0)
    assert (tmp_path / "trained.safetensors").exists() == find(ARMS[name].method).keeps_adapter
    steps = ARMS[name].merging.steps + 1 if ARMS[name].merging else 0
    assert len(told) == 5 + steps  # what was done before, and each step


def stored(layer):
    return layer.codes(), layer.beside


def test_what_was_trained_is_read_and_not_trained_again(fp32, tmp_path, monkeypatch):
    beside, log = apply(ARMS["qlora"], tmp_path)
    monkeypatch.setattr("studylib.train.fine_tune", lambda *args, **kwargs: pytest.fail("trained again"))
    told = []
    again, read = apply(ARMS["qlora"], tmp_path, progress=told.append)
    assert read == log and torch.equal(logits(again), logits(beside))
    assert sum(told) == 4 * 2 * 128  # all of its work at once
    merged, _ = apply(ARMS["merged"], tmp_path)
    dense, _ = apply(dataclasses.replace(ARMS["qlora"], merge=DEQUANTIZED), tmp_path)
    from_original, _ = apply(dataclasses.replace(ARMS["qlora"], merge="merged-quantized"), tmp_path)
    outputs = [logits(model) for model in (beside, merged, dense, from_original)]
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    assert ARMS["qlora"] != ARMS["merged"]
    method = find("qlora")
    assert method.as_trained(ARMS["qlora"]) == method.as_trained(ARMS["merged"])
    assert method.as_trained(ARMS["qlora"]) != method.as_trained(ARMS["dora"])
    lora = find("lora")
    packed = dataclasses.replace(ARMS["lora"], merge=REQUANTIZED, format=NF4)
    check(packed)
    assert lora.as_trained(packed) == lora.as_trained(ARMS["lora"])


def test_the_seed_changes_the_order_and_the_adapter(fp32, tmp_path):
    (_, first), (_, second) = (apply(arm("l4q", seed=seed), tmp_path / str(seed)) for seed in (0, 1))
    assert ARMS["l4q"].seed == 0 and arm("l4q", seed=1).seed == 1
    assert [s["loss"] for s in first.steps] != [s["loss"] for s in second.steps]


@pytest.mark.parametrize("method", ["qlora", "l4q", "qat"])
def test_a_diverged_training_is_not_deployed(fp32, tmp_path, method):
    model, log = apply(arm(method, tuning={"learning_rate": 1e30}), tmp_path)
    assert not math.isfinite(log.steps[-1]["loss"]) and hasattr(model, "adaptation")


@pytest.mark.parametrize("method", ["qlora", "l4q", "qat"])
def test_a_training_that_its_last_step_ruined_has_diverged(fp32, tmp_path, monkeypatch, method):
    original = finetuning.fine_tune

    def ruined(model, *args, **kwargs):
        log = original(model, *args, **kwargs)
        next(parameter for parameter in model.parameters() if parameter.requires_grad).data[0] = math.nan
        return log

    monkeypatch.setattr("studylib.train.fine_tune", ruined)
    record = schedule.run([ARMS[method]], tmp_path)[0]
    assert record.status == "diverged" and record.training[-1]["loss"] is None and record.training[0]["loss"] > 0


@pytest.mark.parametrize("method", ["l4q", "efficientqat"])
def test_a_killed_training_goes_on_from_its_checkpoint(fp32, tmp_path, monkeypatch, method):
    class Stopped(Exception):
        pass

    monkeypatch.setattr("studylib.train.loop.CHECKPOINT_SECONDS", -1)
    whole, log = apply(ARMS[method], tmp_path / "whole")
    told = []

    def cut(tokens):
        told.append(tokens)
        if len(told) == 4:
            raise Stopped

    with pytest.raises(Stopped):
        apply(ARMS[method], tmp_path / "cut", progress=cut)
    assert list((tmp_path / "cut" / "checkpoints").glob("checkpoint-*"))
    resumed, read = apply(ARMS[method], tmp_path / "cut")
    assert read == log and torch.equal(logits(resumed), logits(whole))


# --- merged and distilled ---------------------------------------------------------------------------------------------


@torch.no_grad()
def divergence(model, other):
    """Mean KL(other || model) in nats of the tokens of responses that neither was trained on."""
    _, pairs = finetuning.training_pairs("alpaca")
    batch = finetuning.collate(finetuning.encode(models.load_tokenizer("tiny-random"), pairs, 128))
    own, given = (each(batch["tokens"]).logits.log_softmax(-1) for each in (model, other))
    return (given.exp() * (given - own)).sum(-1)[batch["labels"] != finetuning.IGNORED].mean().item()


@pytest.mark.parametrize("format", [NF4, Format("affine", 3, 32)], ids=lambda format: format.title)
def test_distilling_brings_a_merged_model_nearer_to_the_unmerged_one(fp32, tmp_path, format):
    own = arm("qlora", f"{format.bits}-16-16", format=format, adapter=Adapter(4, 64.0))
    beside, log = apply(own, tmp_path)
    merged, _ = apply(dataclasses.replace(own, merge=MERGED_QUANTIZED), tmp_path)
    budget = Tuning(steps=12, batch=4, learning_rate=1e-4)
    distilled, read = apply(dataclasses.replace(own, merge=MERGED_DISTILLED, merging=budget), tmp_path)
    assert read == log  # that of the adapter, which was not trained again
    assert divergence(distilled, beside) < 0.6 * divergence(merged, beside)  # which is what it began with
    for name, layer in decoder_linears(distilled).items():
        codes = layer.codes()
        assert layer.beside is None and torch.equal(layer.weight, codes.decode())
        assert codes.nbytes == merged.get_submodule(name).codes().nbytes


def test_a_distillation_that_was_killed_goes_on_and_one_that_diverges_is_said_so(fp32, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    monkeypatch.setattr("studylib.train.loop.CHECKPOINT_SECONDS", -1)
    own = dataclasses.replace(ARMS["distilled"], merging=Tuning(steps=4, batch=2, learning_rate=1e-3))
    whole, _ = apply(own, tmp_path / "whole")
    told, again = [], []

    def cut(tokens):
        told.append(tokens)
        if len(told) == 8:  # the adapter's five, and three of the five of the distillation
            raise Stopped

    with pytest.raises(Stopped):
        apply(own, tmp_path / "cut", progress=cut)
    resumed, _ = apply(own, tmp_path / "cut", progress=again.append)
    assert again[0] == 4 * 2 * 128 and again[1] > 0 and len(again) < 6  # all of the adapter's work; some of the other
    assert torch.equal(logits(resumed), logits(whole))
    wild = dataclasses.replace(own, merging=Tuning(steps=4, batch=2, learning_rate=1e30))
    _, log = apply(wild, tmp_path / "wild")
    assert not math.isfinite(log.steps[-1]["loss"])


# --- EfficientQAT -----------------------------------------------------------------------------------------------------


def test_integers_are_those_of_the_first_phase_and_scales_those_of_the_second(fp32, tmp_path, monkeypatch):
    begun = {}
    original = finetuning.fine_tune

    def watched(model, *args, **kwargs):
        stored = {name: layer.codes() for name, layer in decoder_linears(model).items()}
        begun.update({name: (codes.codes, codes.scales.clone()) for name, codes in stored.items()})
        log = original(model, *args, **kwargs)
        begun["trained"] = logits(model)
        assert [len(own) for own in trained_grids(model)] == [1] * 14
        return log

    monkeypatch.setattr("studylib.train.fine_tune", watched)
    model, log = apply(ARMS["efficientqat"], tmp_path)
    torch.testing.assert_close(logits(model), begun.pop("trained"), rtol=0, atol=0)
    assert log.moved > 0
    for name, layer in decoder_linears(model).items():
        found, (integers, scales) = layer.codes(), begun[name]
        assert torch.equal(found.codes, integers) and not torch.equal(found.scales, scales)
        assert torch.equal(layer.weight, found.decode())


@pytest.mark.parametrize(("kind", "held"), [("int-full", INTEGERS), ("affine", GGUF)])
def test_other_software_holds_its_integers_and_gguf_their_offsets(kind, held):
    own = dataclasses.replace(ARMS["efficientqat"], format=Format(kind, 4, 32))
    assert find("efficientqat").container(own) == held


# --- records of fine-tuned arms ---------------------------------------------------------------------------------------


def test_every_method_runs_and_comes_back_from_its_file(fp32, tmp_path):
    made = dict(zip(ARMS, schedule.run(list(ARMS.values()), tmp_path), strict=True))
    assert len({record.key for record in made.values()}) == len(made)
    for name, record in made.items():
        assert record.status == "finished" and np.isfinite(record.metrics["perplexity/responses"]), name
        assert len(record.training) == 4 and record.curve[-1]["loss"] < record.curve[0]["loss"], name
        assert Arm.from_dict(json.loads(record.arm.canonical())) == record.arm
        assert "bitsandbytes" in record.provenance["libraries"]
        learns = name in ("l4q", "qat-lora", "lsq", "efficientqat")
        assert ("learned grids" in record.provenance["numerics"]) == ("moved/scales" in record.metrics) == learns
        assert {"training", "fine-tuning"} <= set(record.provenance["numerics"])
    # The merged arm was not trained again; what is deployed is smaller by the adapter.
    assert made["merged"].training == made["qlora"].training
    assert made["merged"].metrics["bytes/weights"] < made["qlora"].metrics["bytes/weights"]
    assert made["merged"].scores["loss/wikipedia"] != made["qlora"].scores["loss/wikipedia"]
    kept = list((tmp_path / "adapters").glob("*.safetensors"))
    assert len(kept) == 5  # methods that can be deployed in several ways; the merged arm shares one
    assert not list((tmp_path / "checkpoints").iterdir())


def test_an_arm_that_shares_its_training_equals_one_that_was_trained_alone(fp32, tmp_path):
    schedule.run([ARMS["qlora"]], tmp_path / "shared")
    shared = schedule.run([ARMS["merged"]], tmp_path / "shared")[0]
    alone = schedule.run([ARMS["merged"]], tmp_path / "alone")[0]
    assert without_cost(shared) == without_cost(alone)
    assert shared.cost["seconds"]["train"] < alone.cost["seconds"]["train"]


def test_encoded_weights_are_scored_as_they_decode(fp32, tmp_path, tiny_tokenizer):
    encoded = build_arm(BUDGET, "tiny-random", "encoded", "4-16-16", format=NF4)
    record = schedule.run([encoded], tmp_path)[0]
    model = decode_model(encode_model(models.load_model("tiny-random"), NF4))
    losses = window_losses(model, windows("wikipedia", tiny_tokenizer, 32, 4, "evaluation"))
    assert record.scores["loss/wikipedia"] == losses.tolist()
    assert {"bits", "non_normal", "error/down_proj"} <= set(record.scores)
    assert title(encoded) == "rounded weights 4-16-16 (NF4 + DQ, groups of 32)"


@pytest.mark.parametrize("method", ["qlora", "l4q", "qat"])
def test_a_diverged_fine_tuning_is_recorded_as_such(fp32, tmp_path, method):
    wild = arm(method, tuning={"learning_rate": 1e30})
    record = schedule.run([wild], tmp_path)[0]
    assert record.status == "diverged" and record.metrics.get("perplexity/wikipedia") is None


def test_a_killed_fine_tuning_ends_with_the_same_record(fp32, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    monkeypatch.setattr("studylib.train.loop.CHECKPOINT_SECONDS", -1)
    whole = schedule.run([ARMS["l4q"]], tmp_path / "whole")[0]
    original, told = finetuning.fine_tune, []

    def cut(*args, progress, **kwargs):
        def counted(tokens):
            told.append(tokens)
            if len(told) == 4:
                raise Stopped

        return original(*args, progress=counted, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("studylib.train.fine_tune", cut)
        with pytest.raises(Stopped):
            schedule.run([ARMS["l4q"]], tmp_path / "cut")
    assert list(Store(tmp_path / "cut").checkpoint_folder(arm_key(ARMS["l4q"])).glob("checkpoint-*"))
    assert without_cost(schedule.run([ARMS["l4q"]], tmp_path / "cut")[0]) == without_cost(whole)


def test_a_fine_tuning_is_extended_from_its_kept_checkpoint(fp32, tmp_path, monkeypatch):
    longer = dataclasses.replace(ARMS["l4q"].tuning, steps=6, extended_from=(ARMS["l4q"].tuning.steps,))
    longer = dataclasses.replace(ARMS["l4q"], tuning=longer)
    (alone,) = schedule.run([longer], tmp_path / "alone")
    schedule.run([ARMS["l4q"]], tmp_path / "kept", keep_checkpoints=True)
    original, told = finetuning.fine_tune, []

    def watched(*args, progress, **kwargs):
        return original(*args, progress=lambda n: (told.append(n), progress(n)), **kwargs)

    monkeypatch.setattr("studylib.train.fine_tune", watched)
    (extended,) = schedule.run([longer], tmp_path / "kept")
    assert len(told) == 3 and told[0] == 4 * told[1]  # it began with four steps done
    assert without_cost(extended) == without_cost(alone)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format": Format("nf", 4, 48)}, "group: 48 does not divide the row length 64"),
        ({"adapter": Adapter(layers="w_proj")}, "layers: the model has no 'w_proj'"),
        ({"instructions": dataclasses.replace(ARMS["qlora"].instructions, length=3)}, "length: 3 tokens hold nothing"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_any_other_arm_is_computed(tmp_path, monkeypatch, changes, named):
    monkeypatch.setattr(run, "carry_out", lambda *args: pytest.fail("computed"))
    with pytest.raises(ValueError, match=named):
        schedule.run([ARMS["lora"], dataclasses.replace(ARMS["qlora"], **changes)], tmp_path)


@pytest.mark.parametrize("rows", [None, "[]", '[{"instruction": "a", "output": "b"}]', "{"])
def test_an_instruction_file_without_enough_pairs_is_refused_first(tmp_path, rows):
    if rows is not None:
        (tmp_path / "own.json").write_text(rows)
    instructions = dataclasses.replace(ARMS["lora"].instructions, source=str(tmp_path / "own.json"))
    with pytest.raises(ValueError, match=r"instructions.*own\.json") as caught:
        run.check(dataclasses.replace(ARMS["lora"], instructions=instructions))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "changes", "named"),
    [
        ("qlora", {"format": None}, "format: is missing, but 'qlora' needs it"),
        ("qlora", {"bits": "3-16-16"}, "bits: 3-16-16 does not go with the format NF4"),
        ("qlora", {"adapter": None}, "adapter: is missing, but 'qlora' needs it"),
        ("qlora", {"tuning": None}, "tuning: is missing"),
        ("qlora", {"instructions": None}, "instructions: is missing"),
        ("qlora", {"merge": "glued"}, "merge: 'glued' is not known"),
        ("l4q", {"merge": "requantized"}, "'requantized' is not allowed for 'l4q'"),
        ("l4q", {"format": NF4}, "format: 'nf' is not allowed for 'l4q'"),
        (
            "l4q",
            {"format": Format("int-full", 4, 32), "adapter": Adapter(4, init="l4q")},
            "init: 'l4q' is how scales of full-range Int4, .* leave it out",
        ),
        ("qa-lora", {"adapter": Adapter(4, init="l4q")}, "init: 'l4q' is not allowed for 'qa-lora'; use None"),
        ("lora", {"bits": "4-16-16"}, "bits: 4-16-16 does not go with 'lora'"),
        ("lora", {"format": NF4}, "format: NF4 .* DQ, groups of 32 is not allowed for 'lora'"),
        ("lora", {"merge": "requantized"}, "format: missing; 'requantized' rounds to one"),
        ("qlora", {"merge": MERGED_DISTILLED}, "merging: missing with merge 'merged-distilled'"),
        ("qlora", {"merging": TUNING}, "merging: not allowed with merge 'adapter'; it is the distillation of"),
        ("l4q", {"merge": MERGED_DISTILLED, "merging": TUNING}, "'merged-distilled' is not allowed for 'l4q'"),
        ("lora", {"merge": MERGED_DISTILLED, "merging": TUNING}, "format: missing; 'merged-distilled' rounds to one"),
        ("qat", {"adapter": ADAPTER}, "adapter: is given, but 'qat' takes none"),
        ("qat", {"adapter": ADAPTER, "merge": "dequantized"}, "adapter: is given, but 'qat' takes none"),
    ],
)
def test_fields_that_do_not_go_together_are_named(method, changes, named):
    with pytest.raises(ValueError, match=named) as caught:
        check(dataclasses.replace(ARMS[method], **changes))
    assert "\n" not in str(caught.value)
