"""Oracles: the outputs before merging, peft's own merging, bytes of tensors that are really stored."""

import copy

import pytest
import torch
from attached import AFFINE, FULL, NF4, SETTINGS, SMALL, TUNED, logits, stir, tokens, train

from studylib.config.budgets import Log
from studylib.config.settings import AT_ONCE, Adapter, Format, Scheme
from studylib.methods import attach, merge
from studylib.methods.adapters import load_trained, save_trained
from studylib.methods.base import find
from studylib.quant.formats import encode, encode_model
from studylib.quant.layers import decoder_linears, quantize_model
from studylib.quant.storage import DeployedLinear, stored_bytes

KINDS = ("lora", "dora", "pissa", "loftq")
QUANTIZED = [name for name in TUNED if not find(name).keeps_adapter]
NOT_SAME = [(method, how) for method in TUNED for how in AT_ONCE if method not in QUANTIZED or how == "adapter"]


def largest_difference(one, other):
    return (logits(one) - logits(other)).abs().max()


@pytest.mark.parametrize(("method", "how"), NOT_SAME)
def test_merging_leaves_plain_frozen_fp32_layers(tiny_model, method, how):
    original = copy.deepcopy(tiny_model)
    attach(tiny_model, method, **SETTINGS[method])
    assert merge(tiny_model, how, original=original, format=SETTINGS[method].get("format", NF4)) is tiny_model
    assert str(tiny_model).replace("DeployedLinear", "Linear") == str(original)
    assert {type(layer) for layer in decoder_linears(tiny_model).values()} == {DeployedLinear}
    assert vars(tiny_model).keys() == vars(original).keys()
    assert list(tiny_model.state_dict()) == list(original.state_dict())
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in tiny_model.parameters())
    assert tiny_model.lm_head.weight is tiny_model.model.embed_tokens.weight
    before = logits(tiny_model)
    attach(tiny_model, "lora", adapter=SMALL)  # it can be adapted anew
    torch.testing.assert_close(logits(tiny_model), before, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("method", TUNED)
def test_as_trained_the_merged_model_computes_what_was_trained(tiny_model, fp32, method):
    start = logits(attach(tiny_model, method, **SETTINGS[method]))
    train(tiny_model)
    before = logits(tiny_model)
    assert (before - start).abs().max() > 0.05
    tolerance = 1e-5 if method in QUANTIZED else 2e-3  # kept adapters are stored in bf16
    torch.testing.assert_close(logits(merge(tiny_model)), before, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", [NF4, Format("nf", 3, 32)], ids=lambda format: format.title)
def test_every_kind_of_adapter_can_be_merged(tiny_model, fp32, format, kind):
    original = copy.deepcopy(tiny_model)
    attach(tiny_model, "qlora", format=format, adapter=Adapter(4, kind=kind))
    untrained = merge(copy.deepcopy(tiny_model), "merged-16", original=original)
    for name, linear in decoder_linears(original).items():  # the adapter has changed nothing yet
        torch.testing.assert_close(untrained.get_submodule(name).weight, linear.weight, rtol=2**-7, atol=5e-4)
    train(tiny_model)
    merged = {how: merge(copy.deepcopy(tiny_model), how, original=original) for how in AT_ONCE}
    assert largest_difference(merged["adapter"], tiny_model) < 4e-3
    assert largest_difference(merged["dequantized"], tiny_model) < 6e-3
    assert largest_difference(merged["requantized"], tiny_model) > 0.01
    assert largest_difference(merged["merged-16"], tiny_model) > 0.01
    assert largest_difference(merged["merged-quantized"], merged["merged-16"]) > 0.01


def test_merged_weights_are_those_of_the_definitions(tiny_model, fp32):
    original = copy.deepcopy(tiny_model)
    stir(attach(tiny_model, "qlora", format=NF4, adapter=Adapter(4, 8.0)))
    for how in AT_ONCE:
        merged = merge(copy.deepcopy(tiny_model), how, original=original)
        for name, linear in decoder_linears(original).items():
            layer = tiny_model.get_submodule(name)
            a, b = (part.default.weight.bfloat16().double() for part in (layer.lora_A, layer.lora_B))
            base = linear.weight if how.startswith("merged") else encode(linear.weight, NF4).decode()
            expected = base.double() + 2 * b @ a
            if how.endswith("quantized") and how != "dequantized":
                expected = encode(expected.float(), NF4).decode().double()
            tolerance = 2**-8 if how in ("dequantized", "merged-16") else 1e-5
            difference = (merged.get_submodule(name).weight - expected).abs()
            assert (difference > tolerance * expected.abs() + 1e-7).double().mean() < 1e-3  # ties of rounding


def test_peft_merges_a_16_bit_base_alike(tiny_model, fp32):
    for kind in ("lora", "dora", "pissa"):
        model = stir(attach(copy.deepcopy(tiny_model), "lora", adapter=Adapter(4, kind=kind)))
        merged = merge(copy.deepcopy(model))
        for name in decoder_linears(tiny_model):
            layer = model.get_submodule(name)
            layer.merge()
            difference = merged.get_submodule(name).weight - layer.weight
            assert difference.norm() < 3e-3 * layer.weight.norm()  # ours are stored in bf16


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("method", [method for method in TUNED if method != "lora"])
def test_a_fully_quantized_model_has_few_values_in_each_group(tiny_model, fp32, method, bits):
    settings = SETTINGS[method] | {"format": Format("affine" if method == "qlora" else "int-full", bits, 32)}
    attach(tiny_model, method, **settings)
    train(tiny_model, 3)
    merge(tiny_model, "adapter" if method in QUANTIZED else "requantized")
    for linear in decoder_linears(tiny_model).values():
        for group in linear.weight.reshape(-1, 32)[:200]:
            values = group.sort().values
            assert 1 + (values.diff() > 1e-4 * (values[-1] - values[0])).sum() <= 2**bits


# --- what was trained, in a file --------------------------------------------------------------------------------------


def test_trained_parameters_come_back_as_they_were(fp32, tmp_path, tiny_model):
    fresh = copy.deepcopy(tiny_model)
    attach(tiny_model, "lora", adapter=SMALL)
    trained = {name: p for name, p in tiny_model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(1)
    log = Log([{"step": 1.0}], [{"loss": 2.0}])
    save_trained(tiny_model, log, tmp_path / "a.safetensors")
    attach(fresh, "lora", adapter=SMALL)
    assert load_trained(fresh, tmp_path / "a.safetensors") == log
    assert all(torch.equal(fresh.get_parameter(name), p) for name, p in trained.items())


# --- bytes ------------------------------------------------------------------------------------------------------------


def deployed_bytes(model, method, format, adapter, how="adapter"):
    """Of what `method` deploys of a copy of the model."""
    settings = {"format": None if method == "lora" else format, "adapter": adapter}
    settings["tokens"] = tokens if "data" in find(method).needs else None
    return stored_bytes(merge(attach(copy.deepcopy(model), method, **settings), how, format=format, original=model))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf", "fp-bnb", "int", "int-full", "affine"])
def test_bytes_are_those_of_the_stored_tensors(tiny_model, kind, double):
    for format in (Format(kind, 4, 32, double), Format(kind, 4, 32 if double else None, double)):
        base = stored_bytes(encode_model(copy.deepcopy(tiny_model), format))
        assert deployed_bytes(tiny_model, "qlora", format, SMALL, "requantized") == base
        assert deployed_bytes(tiny_model, "lora", format, SMALL, "requantized") == base
        for adapter in (SMALL, Adapter(4, kind="dora"), Adapter(2, layers="q_proj+v_proj")):
            attached = attach(copy.deepcopy(tiny_model), "qlora", format=format, adapter=adapter)
            kept = 2 * sum(p.numel() for p in attached.parameters() if p.requires_grad)
            assert deployed_bytes(tiny_model, "qlora", format, adapter) == base + kept


def test_bytes_agree_with_those_of_quantized_layers(tiny_model):
    full = 2 * sum(parameter.numel() for parameter in tiny_model.parameters())
    assert stored_bytes(tiny_model) == full
    for format, scheme in (
        (FULL, Scheme("full-range", 32)),
        (Format("affine", 3, None), Scheme("asymmetric")),
    ):
        rounded = stored_bytes(quantize_model(copy.deepcopy(tiny_model), f"{format.bits}-16-16", scheme))
        by_hand = full - sum(2 * layer.weight.numel() for layer in decoder_linears(tiny_model).values())
        for layer in decoder_linears(tiny_model).values():
            groups = layer.weight.numel() // (format.group or layer.in_features)
            zeros = groups if format.kind == "affine" else 0
            by_hand += (layer.weight.numel() + zeros) * format.bits // 8 + 4 * groups
        assert deployed_bytes(tiny_model, "qat", format, None) == rounded
        if format is FULL:
            assert deployed_bytes(tiny_model, "lsq", format, None) == rounded
        assert rounded == pytest.approx(by_hand, abs=14)  # rounded up a layer
    adapter = 2 * 4 * sum(layer.in_features + layer.out_features for layer in decoder_linears(tiny_model).values())
    assert deployed_bytes(tiny_model, "lora", None, SMALL) == full + adapter
    assert deployed_bytes(tiny_model, "lora", None, SMALL, "merged-16") == full
    assert deployed_bytes(tiny_model, "qlora", NF4, SMALL, "dequantized") == full
    assert deployed_bytes(tiny_model, "gptq+lora", AFFINE, SMALL) == deployed_bytes(tiny_model, "qlora", AFFINE, SMALL)


def test_learned_grids_have_a_scale_and_an_offset_a_group(tiny_model):
    linears = decoder_linears(tiny_model).values()
    weights = sum(layer.weight.numel() for layer in linears)
    rest = stored_bytes(tiny_model) - 2 * weights
    packed = rest + weights // 2 + weights // 32 * 8
    assert deployed_bytes(tiny_model, "l4q", AFFINE, SMALL) == packed
    assert deployed_bytes(tiny_model, "qa-lora", AFFINE, SMALL) == packed
    assert deployed_bytes(tiny_model, "gptq+qa-lora", FULL, SMALL) == packed
    assert deployed_bytes(tiny_model, "lsq", AFFINE, None) == packed
    adapter = 2 * 4 * sum(layer.in_features + layer.out_features for layer in linears)
    assert deployed_bytes(tiny_model, "qat-lora", AFFINE, SMALL) == packed + adapter
    some = deployed_bytes(tiny_model, "qa-lora", AFFINE, Adapter(4, layers="q_proj"))
    untouched = (weights - 2 * 64 * 64) // 32
    assert some == packed - untouched * 4 + untouched // 2  # their zero points are integers of 4 bits


# --- what is refused --------------------------------------------------------------------------------------------------


def test_merges_that_make_no_sense_are_refused_before_anything_changes(tiny_model):
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge(tiny_model)
    lora = attach(copy.deepcopy(tiny_model), "lora", adapter=SMALL)
    l4q = attach(copy.deepcopy(tiny_model), "l4q", **SETTINGS["l4q"])
    qlora = attach(copy.deepcopy(tiny_model), "qlora", **SETTINGS["qlora"])
    for model, how, message in (
        (
            qlora,
            "sum",
            "merge: 'sum' is not known or takes a training; use one of adapter, dequantized, requantized, merged-16",
        ),
        (
            l4q,
            "requantized",
            "merge: 'requantized' is not allowed for 'l4q', which leaves no adapter; use 'adapt",
        ),
        (lora, "requantized", "format: missing; 'requantized' rounds to one"),
        (qlora, "merged-16", "original: missing; 'merged-16' adds to the weights of the model as it was loaded"),
        (qlora, "merged-quantized", "original: missing"),
    ):
        before = str(model)
        with pytest.raises(ValueError, match=message):
            merge(model, how)
        assert str(model) == before and hasattr(model, "adaptation")
    with pytest.raises(ValueError, match="group: 64 does not divide"):
        merge(qlora, "requantized", format=Format("nf"))
    assert hasattr(qlora, "adaptation") and not isinstance(qlora.model.layers[0].mlp.up_proj, DeployedLinear)
    merge(lora)
    with pytest.raises(ValueError, match="or is merged already"):
        merge(lora)


def test_bytes_of_what_makes_no_sense_are_refused(tiny_model):
    with pytest.raises(ValueError, match="adapter: missing for 'qlora'"):
        deployed_bytes(tiny_model, "qlora", NF4, None)
    with pytest.raises(ValueError, match="'merged-16' is not allowed for 'qa-lora'"):
        deployed_bytes(tiny_model, "qa-lora", AFFINE, SMALL, "merged-16")
    with pytest.raises(ValueError, match="format: missing"):
        deployed_bytes(tiny_model, "lora", None, SMALL, "requantized")
