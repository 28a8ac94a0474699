"""Oracles: bitsandbytes' tables, codes, statistics and published errors, torchao's float decoding, SciPy, autograd."""

import copy
import dataclasses
import math

import peft
import pytest
import torch
from bitsandbytes import functional as bnb
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as compressed_tensors_rounding
from compressed_tensors.quantization.quant_scheme import MXFP4A16, NVFP4A16
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_model, save_model
from scipy import stats
from torch import nn
from torch.nn import functional as F
from torchao.prototype.custom_fp_utils import _floatx_unpacked_to_f32
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from transformers import AutoModelForCausalLM, LlamaConfig

from studylib.config.settings import INTEGER_FORMATS, Format, Grid, Scheme
from studylib.quant import formats
from studylib.quant.formats import (
    EncodedLinear,
    _encode_scales,
    bits_per_parameter,
    decode_model,
    encode,
    encode_model,
    levels,
    scale_levels,
)
from studylib.quant.grids import fake_quantize
from studylib.quant.layers import decoder_linears, quantize_model
from studylib.quant.storage import DeployedLinear, stored_bytes, unpack

NF4 = Format("nf")
IN_BITSANDBYTES = {"nf": "nf4", "fp-bnb": "fp4"}
ALL = [
    *(Format("nf", bits) for bits in (2, 3, 4)),
    *(Format(kind) for kind in formats.FLOAT_MAGNITUDES),
    *(Format(kind, bits) for kind in INTEGER_FORMATS for bits in (2, 3, 4, 8)),
]
VARIANTS = [*ALL, *(dataclasses.replace(format, double=True) for format in ALL)]
VARIANTS += [dataclasses.replace(format, group=None) for format in ALL]
VARIANTS += [dataclasses.replace(format, scale_bits=16) for format in ALL]
MICRO = [Format("mxfp4", 4, 32), Format("mxfp4-even", 4, 32), Format("nvfp4", 4, 16)]
OWN_SCALES, VARIANTS = VARIANTS, VARIANTS + MICRO


def title(format):
    return format.title


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- levels -----------------------------------------------------------------------------------------------------------


def test_nf4_levels_are_those_of_the_paper_and_of_bitsandbytes():
    paper = """-1 -0.6961928 -0.5250731 -0.3949175 -0.2844414 -0.1847734 -0.0910500 0
    0.0795803 0.1609302 0.2461123 0.3379152 0.4407098 0.5626170 0.7229568 1"""
    assert [round(level, 7) for level in levels(NF4).tolist()] == [float(level) for level in paper.split()]
    assert torch.equal(levels(NF4), bnb.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize(("bits", "delta"), [(3, 1 - (1 / 16 + 1 / 14) / 2), (2, 1 - (1 / 8 + 1 / 6) / 2)])
def test_narrower_normal_floats_are_quantiles_of_scipys_normal(bits, delta):
    half, top = 2 ** (bits - 1), stats.norm.ppf(delta)
    positive = [stats.norm.ppf(delta - i * (delta - 0.5) / half) / top for i in range(half)]
    negative = [-stats.norm.ppf(delta - i * (delta - 0.5) / (half - 1)) / top for i in range(half - 1)]
    assert levels(Format("nf", bits)).tolist() == pytest.approx(sorted([*negative, 0, *positive]), abs=1e-6)


@pytest.mark.parametrize(("kind", "exponent", "mantissa"), [("fp-e2m1", 2, 1), ("fp-e3m0", 3, 0)])
def test_float_levels_are_torchaos_decoding_of_all_sixteen_codes(kind, exponent, mantissa):
    values = _floatx_unpacked_to_f32(torch.arange(16, dtype=torch.uint8), exponent, mantissa).unique()
    torch.testing.assert_close(levels(Format(kind)), values / values.max(), rtol=1e-7, atol=0)


def test_fp4_of_bitsandbytes_is_e2m1_but_for_the_smallest_magnitude():
    theirs = bnb.get_4bit_type("fp4", device="cpu").unique()
    assert torch.equal(levels(Format("fp-bnb")), theirs)
    differing = (levels(Format("fp-e2m1")) - theirs).abs() > 1e-6
    assert theirs[differing].tolist() == pytest.approx([-0.0625 / 12, 0.0625 / 12])
    assert levels(Format("fp-e2m1"))[differing].tolist() == pytest.approx([-0.5 / 6, 0.5 / 6])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integer_levels_are_even_steps(bits):
    high = 2 ** (bits - 1) - 1
    expected = [i / high for i in range(-high, high + 1)]
    assert levels(Format("int", bits)).tolist() == pytest.approx(expected)
    full = [i / (high + 0.5) for i in range(-high - 1, high + 1)]
    assert levels(Format("int-full", bits)).tolist() == pytest.approx(full)


def test_levels_of_double_quantization_are_the_dynamic_map():
    assert torch.equal(scale_levels(), bnb.create_dynamic_map())


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IN_BITSANDBYTES)
@pytest.mark.parametrize("block", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_and_values_are_those_of_bitsandbytes(kind, block, dtype):
    weight = normal(128, 512, seed=block, dtype=dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=block, quant_type=IN_BITSANDBYTES[kind])
    ours = encode(weight, Format(kind, group=block))
    assert torch.equal(ours.scales, state.absmax)
    theirs = state.code[unpack(packed.flatten(), 4, weight.numel()).int()]
    assert torch.equal(levels(Format(kind, group=block))[unpack(ours.codes, 4, weight.numel()).int()], theirs)
    if kind == "nf":
        assert torch.equal(ours.codes, packed.flatten())  # the very bytes
    values = ours.decode(dtype)
    torch.testing.assert_close(values, bnb.dequantize_4bit(packed, state), rtol=torch.finfo(dtype).eps, atol=0)


def test_numbers_midway_go_to_the_lower_level_as_in_bitsandbytes():
    table = levels(Format("fp-bnb"))
    weight = torch.cat([(table[:-1] + table[1:]) / 2, table[-1:]]).repeat(2)[None, :30].contiguous()
    weight[0, -1] = 1
    weight = F.pad(weight, (0, 2))
    packed, state = bnb.quantize_4bit(weight, blocksize=32, quant_type="fp4")
    ours = encode(weight, Format("fp-bnb", group=32)).decode()
    assert torch.equal(ours, bnb.dequantize_4bit(packed, state))
    assert torch.equal(ours[0, :14], table[:14])


@pytest.mark.parametrize("kind", IN_BITSANDBYTES)
@pytest.mark.parametrize("block", [32, 64, 128])
def test_double_quantization_is_that_of_bitsandbytes(kind, block):
    weight = normal(512, 640, seed=block)  # the last 256 scales are not all there
    packed, state = bnb.quantize_4bit(
        weight, blocksize=block, quant_type=IN_BITSANDBYTES[kind], compress_statistics=True
    )
    ours = encode(weight, Format(kind, group=block, double=True))
    assert torch.equal(ours.outer, state.state2.absmax) and torch.equal(ours.mean, state.offset.view(1))
    # On a CPU bitsandbytes rounds to 65536 even steps before it looks for the nearest level; ours is the nearest.
    table, absmax = scale_levels().double(), weight.view(-1, block).abs().amax(1)
    outer = ours.outer.double().repeat_interleave(256)[: len(absmax)]
    exact = ((absmax - ours.mean).double() / outer)[:, None]
    assert torch.equal(ours.scales.long(), (exact - table).abs().argmin(1))
    differing = ours.scales != state.absmax
    assert differing.float().mean() < 0.005
    lost = (exact[:, 0] - table[state.absmax.long()]).abs() - (exact[:, 0] - table[ours.scales.long()]).abs()
    assert lost.max() <= 2 / 65535
    same = dataclasses.replace(ours, scales=state.absmax)
    torch.testing.assert_close(same.decode(), bnb.dequantize_4bit(packed, state), rtol=1e-6, atol=1e-6)


# Mean and standard deviation over 200 samples of randn(1024, 1024): absolute error, then |error| / (|x| + 1e-8).
# From tests/test_functional.py of bitsandbytes.
PUBLISHED = {
    ("fp-bnb", 32): (0.088925, 0.000091, 0.242443, 0.000330),
    ("fp-bnb", 64): (0.096543, 0.000111, 0.260125, 0.000379),
    ("fp-bnb", 128): (0.102969, 0.000134, 0.275817, 0.000433),
    ("fp-bnb", 256): (0.108684, 0.000182, 0.289831, 0.000497),
    ("fp-bnb", 512): (0.114115, 0.000234, 0.302881, 0.000583),
    ("fp-bnb", 1024): (0.119333, 0.000320, 0.315000, 0.000757),
    ("nf", 32): (0.067746, 0.000069, 0.189726, 0.000304),
    ("nf", 64): (0.072798, 0.000074, 0.203339, 0.000340),
    ("nf", 128): (0.076831, 0.000091, 0.215237, 0.000391),
    ("nf", 256): (0.080337, 0.000102, 0.226105, 0.000398),
    ("nf", 512): (0.083547, 0.000143, 0.236079, 0.000544),
    ("nf", 1024): (0.086610, 0.000187, 0.245370, 0.000600),
}


@pytest.mark.parametrize(("kind", "block"), PUBLISHED)
def test_errors_are_those_that_bitsandbytes_publishes(kind, block):
    weight = normal(1024, 1024, seed=block)
    error = (encode(weight, Format(kind, group=block)).decode() - weight).abs()
    mean, deviation, relative, relative_deviation = PUBLISHED[kind, block]
    assert abs(error.mean().item() - mean) < 4 * deviation
    assert abs((error / (weight.abs() + 1e-8)).mean().item() - relative) < 4 * relative_deviation


def with_small_rows(group):
    """Weights of which one row is so large that the scales of four small ones are nearest to a negative number."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3)) * 0.02
    weight[0] *= {32: 100, 64: 400}[group]
    weight[5:9] *= 1e-3
    return weight


@pytest.mark.parametrize("kind", ["nf", "int", "affine", "fp-e2m1", "fp-e3m0"])
@pytest.mark.parametrize("group", [32, 64])
def test_double_quantization_turns_no_sign_in_our_own_formats(kind, group):
    weight, format = with_small_rows(group), Format(kind, 3 if kind == "nf" else 4, group, double=True)
    found, plain = encode(weight, format), encode(weight, dataclasses.replace(format, double=False))
    codes, outer, mean = _encode_scales(plain.scales, negative=True)
    assert dataclasses.replace(found, scales=codes, outer=outer, mean=mean).scale.min() < 0  # the nearest
    assert found.scale.min() >= 0 and torch.equal(found.codes, plain.codes)
    small = found.decode()[5:9]
    assert torch.cosine_similarity(small.flatten(), weight[5:9].flatten(), dim=0) > 0.8
    assert (found.scale - plain.scale).abs().max() <= 0.03 * plain.scale.max()


def test_where_bitsandbytes_turns_signs_so_does_its_format():
    weight = with_small_rows(64)
    found = encode(weight, Format("nf", 4, 64, double=True))
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    theirs = bnb.dequantize_4bit(packed, state)
    assert torch.equal(found.decode().sign(), theirs.sign())
    assert (found.scale < 0).sum() == 16 and (theirs[5:9] * weight[5:9]).sum() < 0


def test_double_quantization_costs_next_to_no_error():
    weight = normal(1024, 1024)
    plain, double = (
        (encode(weight, Format("nf", double=double)).decode() - weight).abs().mean().item() for double in (False, True)
    )
    assert plain < double < 1.002 * plain


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_double_quantization_saves_the_papers_bits_by_formula_and_in_bytes():
    double = Format("nf", double=True)
    assert bits_per_parameter(NF4) == 4.5
    assert bits_per_parameter(double) == 4 + 8 / 64 + 32 / (64 * 256)
    assert bits_per_parameter(NF4) - bits_per_parameter(double) == pytest.approx(0.373, abs=5e-4)
    weight = normal(256, 1024)
    saved = encode(weight, NF4).nbytes - encode(weight, double).nbytes
    assert saved * 8 / weight.numel() == pytest.approx(0.373, abs=1e-3)


@pytest.mark.parametrize("format", OWN_SCALES, ids=title)
def test_bits_by_formula_are_the_stored_bytes(format):
    weight = normal(64, 2048)
    stored = encode(weight, format)
    assert stored.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in stored.tensors.values())
    mean = 4 * format.double
    assert (stored.nbytes - mean) * 8 / weight.numel() == pytest.approx(bits_per_parameter(format, 2048), rel=1e-12)


# --- encode, decode ---------------------------------------------------------------------------------------------------

matrices = hnp.arrays(
    "float32",
    st.tuples(st.integers(1, 4), st.sampled_from([8, 24])),
    elements=st.floats(-(2.0**99), 2.0**99, width=32),
)


@settings(max_examples=300, deadline=None)
@given(matrices, st.sampled_from(ALL), st.sampled_from([None, 2, 8]))
def test_error_is_at_most_half_a_gap_and_the_decoded_weight_stays_as_it_is(weight, format, block):
    weight, format = torch.from_numpy(weight), dataclasses.replace(format, group=block)
    decoded = encode(weight, format).decode()
    blocks = weight.reshape(-1, block or weight.shape[1]).double()
    error = (decoded.view(blocks.shape).double() - blocks).abs()
    if format.kind == "affine":  # an integer zero point shifts the range by up to half a step
        bound = (blocks.amax(1).clamp_min(0) - blocks.amin(1).clamp_max(0)) / (2**format.bits - 1)
    else:
        bound = blocks.abs().amax(1) * levels(format).diff().max().double() / 2
        if format.kind != "int-full":  # whose largest number may be half a step less, and then sets a smaller scale
            torch.testing.assert_close(encode(decoded, format).decode(), decoded, rtol=1e-6, atol=1e-36)
    rounding = blocks.abs().amax(1) * 2.0**-22  # float32: of the scale, the level and their product
    assert (error <= (bound + rounding)[:, None] + 1e-36).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", INTEGER_FORMATS)
@pytest.mark.parametrize("block", [16, None])
def test_integer_formats_are_the_grids_of_quantizers(bits, kind, block):
    weight = normal(24, 96)
    expected = fake_quantize(weight, Grid(bits, INTEGER_FORMATS[kind], block))
    assert torch.equal(encode(weight, Format(kind, bits, block)).decode(), expected)


@pytest.mark.parametrize("format", OWN_SCALES, ids=title)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_degenerate_rows_stay_finite_and_zeros_stay_zeros(format, dtype):
    weight = normal(6, 128, dtype=dtype)
    weight[0], weight[1, 5], weight[2] = 0, 3e4, 1e-7
    weight[3], weight[4] = weight[3].abs(), -weight[4].abs()
    decoded = encode(weight, format).decode(dtype)
    assert decoded.dtype == dtype and decoded.shape == weight.shape and decoded.isfinite().all()
    assert not decoded[0].any()
    if not format.double:
        lost = 0.5 / (2 ** (format.bits - 1) - 0.5) if format.kind == "int-full" else 0  # half a step, at the top
        assert decoded[1, 5].item() == pytest.approx(3e4 * (1 - lost), rel=4e-3)


def test_sixteen_bit_scales_cost_their_rounding_only():
    weight = normal(32, 128)
    exact, rounded = (encode(weight, Format("nf", scale_bits=bits)) for bits in (32, 16))
    assert rounded.scales.dtype == torch.float16 and torch.equal(exact.codes, rounded.codes)
    torch.testing.assert_close(rounded.decode(), exact.decode(), rtol=2**-11, atol=0)


# --- layers -----------------------------------------------------------------------------------------------------------


def layer(format=NF4, bias=True, dtype=torch.float32):
    """An encoded linear layer [48, 128] and a dense one with its decoded weight."""
    torch.manual_seed(0)
    linear = nn.Linear(128, 48, bias, dtype=dtype)
    encoded = EncodedLinear(linear, format)
    dense = copy.deepcopy(linear)
    dense.weight = nn.Parameter(encoded.codes().decode(dtype), requires_grad=False)
    return encoded, dense


@pytest.mark.parametrize("format", VARIANTS, ids=title)
@pytest.mark.parametrize("bias", [True, False])
def test_encoded_layer_has_the_outputs_and_gradients_of_the_decoded_one(format, bias):
    encoded, dense = layer(format, bias)
    dense = dense.double()
    x = normal(2, 5, 128, seed=1).double().requires_grad_()
    upstream = normal(2, 5, 48, seed=2).double()
    exact = dense(x)
    (expected,) = torch.autograd.grad(exact, x, upstream, retain_graph=True)
    ours = encoded(x)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(ours, x, upstream, retain_graph=True)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    if bias:
        ours.backward(upstream)
        torch.testing.assert_close(encoded.bias.grad.double(), upstream.sum((0, 1)), rtol=1e-6, atol=1e-6)


def kept_bytes(module, x):
    """Bytes kept for backward, other than the input's."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(x)
    assert y.requires_grad
    return sum(t.nbytes for t in kept if t.data_ptr() != x.data_ptr())


def test_nothing_of_the_size_of_the_weight_is_kept_for_backward():
    encoded, dense = layer()
    x = normal(4, 128).requires_grad_()
    assert kept_bytes(dense, x) == dense.weight.nbytes
    assert kept_bytes(encoded, x) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_in_the_type_of_its_input_or_of_autocast(dtype):
    encoded, dense = layer(dtype=dtype)
    x = normal(4, 128, dtype=dtype)
    assert encoded(x).dtype == dtype and torch.equal(encoded(x), F.linear(x, dense.weight) + dense.bias)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = encoded(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == dtype
    assert torch.equal(y, F.linear(x.bfloat16(), dense.weight.bfloat16()) + dense.bias.bfloat16())
    expected = torch.ones(4, 48).bfloat16() @ dense.weight.bfloat16()
    torch.testing.assert_close(x.grad, expected.to(dtype), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("format", [NF4, Format("nf", double=True), Format("affine", 3, scale_bits=16)], ids=title)
def test_changing_the_type_of_a_model_rounds_no_scales(format):
    encoded, dense = layer(format)
    converted = nn.Sequential(copy.deepcopy(encoded)).to(torch.bfloat16)[0]
    assert torch.equal(converted.weight, dense.weight)
    assert all(torch.equal(a, b) for a, b in zip(converted.buffers(), encoded.buffers(), strict=True))


def test_the_weight_can_be_read_and_not_written():
    encoded, dense = layer()
    assert torch.equal(encoded.weight, dense.weight) and type(encoded.weight * 1) is torch.Tensor
    assert torch.equal(encoded.weight.data, dense.weight)
    with pytest.raises(ValueError, match="use decode_model before merging"):
        encoded.weight.data += 1
    assert torch.equal(encoded.weight, dense.weight)
    assert "format=NF4" in repr(encoded)


# --- models -----------------------------------------------------------------------------------------------------------

tokens = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("format", [NF4, Format("nf", 3, 32, double=True), Format("affine", 2, None)], ids=title)
def test_encoded_model_is_the_decoded_one(model, format):
    head, names = model.get_output_embeddings(), set(decoder_linears(model))
    plain = {name: linear.weight for name, linear in decoder_linears(model).items()}
    assert encode_model(model, format) is model
    assert model.get_output_embeddings() is head and type(head) is nn.Linear
    assert {name for name, m in model.named_modules() if isinstance(m, EncodedLinear)} == names
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        assert decode_model(model) is model
        decoded = model(input_ids=tokens).logits
    torch.testing.assert_close(decoded, logits, rtol=1e-5, atol=1e-5)
    for name, linear in decoder_linears(model).items():
        assert type(linear) is DeployedLinear and not linear.training
        assert torch.equal(linear.weight, encode(plain[name], format).decode()) and not linear.weight.requires_grad
        assert torch.equal(linear.codes().codes, encode(plain[name], format).codes)


def test_stored_bytes_agree_with_quantized_layers_and_with_a_count_by_hand(model):
    full = stored_bytes(model)
    assert full == 2 * sum(parameter.numel() for parameter in model.parameters())
    rounded = stored_bytes(quantize_model(copy.deepcopy(model), "4-16-16", Scheme(group=32)))
    numbers = sum(linear.weight.numel() for linear in decoder_linears(model).values())
    assert rounded == full - 2 * numbers + numbers // 2 + numbers // 32 * 4
    assert stored_bytes(encode_model(copy.deepcopy(model), Format("int", group=32))) == rounded
    assert stored_bytes(encode_model(model, NF4)) == full - 2 * numbers + numbers // 2 + numbers // 64 * 4


@pytest.mark.parametrize("format", [NF4, Format("affine", 3, 32, double=True)], ids=title)
def test_state_goes_through_safetensors(model, format, tmp_path):
    other = encode_model(AutoModelForCausalLM.from_config(model.config).eval(), format)
    encode_model(model, format)
    save_model(model, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size < 1.1 * sum(
        t.nbytes for t in [*model.parameters(), *model.buffers()]
    ) + len(model.state_dict()) * 128
    assert not torch.equal(other(input_ids=tokens).logits, model(input_ids=tokens).logits)
    load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(other(input_ids=tokens).logits, model(input_ids=tokens).logits)


@pytest.mark.parametrize("use_dora", [False, True])
def test_peft_adapts_encoded_layers_and_merges_them_once_decoded(model, use_dora):
    encode_model(model, NF4)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=use_dora, init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, model)
    dense = decode_model(copy.deepcopy(model))
    assert not any(isinstance(module, EncodedLinear) for module in dense.modules())
    for either in (model, dense):
        either(input_ids=tokens, labels=tokens).loss.backward()
    trained = {name: p for name, p in dense.named_parameters() if "lora_" in name}
    assert len(trained) == 14 * (3 if use_dora else 2)
    for name, parameter in trained.items():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        adapted = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
        for safely in (False, True):
            with pytest.raises(ValueError, match="use decode_model before merging"):
                adapted[0].merge(safe_merge=safely)
        merged = [module for module in dense.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
        for module in merged:
            module.merge()
        torch.testing.assert_close(dense(input_ids=tokens).logits, before, rtol=1e-4, atol=1e-4)
    assert len(merged) == 14


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "format", "message"),
    [
        (torch.ones(2, 96), NF4, "group: 64 does not divide the row length 96"),
        (torch.ones(64), NF4, r"weight: the shape \[64\] is not allowed; use \[out, in\]"),
        (torch.ones(0, 64), NF4, r"weight: the shape \[0, 64\] is not allowed"),
        (torch.full((2, 64), math.nan), NF4, "weight: holds NaN or infinity"),
        (torch.full((2, 64), math.inf), Format("affine"), "weight: holds NaN or infinity"),
        (torch.full((2, 64), 1e5), Format("nf", scale_bits=16), "a scale of 1e\\+05, which fp16 lacks; use 32"),
    ],
)
def test_bad_weights_are_refused(weight, format, message):
    with pytest.raises(ValueError, match=message):
        encode(weight, format)


def test_bad_questions_are_refused(model):
    with pytest.raises(ValueError, match="levels of 'affine' depend"):
        levels(Format("affine"))
    with pytest.raises(ValueError, match="width: missing"):
        bits_per_parameter(Format("nf", group=None))
    with pytest.raises(ValueError, match="group: 48 does not divide the row length 64"):
        encode_model(model, Format("nf", group=48))
    with pytest.raises(ValueError, match=r"q_proj: QuantizedLinear cannot be encoded"):
        encode_model(quantize_model(copy.deepcopy(model), "4-8-4"), NF4)
    assert not any(isinstance(module, EncodedLinear) for module in model.modules())
    with pytest.raises(ValueError, match=r"q_proj: EncodedLinear cannot be encoded; load the model anew"):
        encode_model(encode_model(model, NF4), NF4)


def blocks_of_all_sizes(columns=256):
    """Numbers whose groups differ in size by far, some of them zeros, some all that ties can be."""
    torch.manual_seed(0)
    x = torch.randn(64, columns) * torch.exp2(torch.randint(-12, 4, (64, columns // 16)).float()).repeat_interleave(
        16, 1
    )
    x[3, :64] = 0
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6])
    x[4] = torch.cat([ties, -ties]).repeat(columns // 16)
    return x


@pytest.mark.parametrize("kind", ["mxfp4-even", "nvfp4"])
def test_microscaling_is_that_of_compressed_tensors_to_the_bit(kind):
    x = blocks_of_all_sizes()
    arguments = {"mxfp4-even": MXFP4A16, "nvfp4": NVFP4A16}[kind]["weights"]
    groups = x.view(len(x), -1, arguments.group_size)
    outer = generate_gparam(x.min(), x.max()) if kind == "nvfp4" else None
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments, outer)
    theirs = compressed_tensors_rounding(x, scale, zero, arguments, global_scale=outer)
    assert torch.equal(encode(x, Format(kind, 4, arguments.group_size)).decode(), theirs)


@pytest.mark.parametrize(("kind", "mode"), [("mxfp4", "FLOOR"), ("mxfp4-even", "EVEN")])
def test_microscaling_is_that_of_torchao_to_the_bit(kind, mode):
    """FLOOR is the OCP specification's, section 6.3."""
    x = blocks_of_all_sizes()
    theirs = MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32, getattr(ScaleCalculationMode, mode)).dequantize(
        torch.float32
    )
    assert torch.equal(encode(x, Format(kind, 4, 32)).decode(), theirs)


@pytest.mark.parametrize("format", MICRO)
def test_microscaling_weights_are_stored_in_their_bits(format):
    x = blocks_of_all_sizes()
    codes = encode(x, format)
    assert 8 * codes.nbytes == bits_per_parameter(format) * x.numel() + 32 * (format.kind == "nvfp4")
    scale = codes.scale.repeat_interleave(format.group, 1)
    nearest = levels(format)[(x[..., None] / scale[..., None] - levels(format)).abs().argmin(-1)] * scale
    error = (codes.decode() - x).abs().double()
    assert (error <= (nearest - x).abs().double() * (1 + 1e-5) + 1e-30).all()  # no number of E2M1 is nearer
    again = encode(codes.decode(), format).decode()
    if format.kind != "nvfp4":
        assert torch.equal(again, codes.decode())  # whose scales are powers of two


@pytest.mark.parametrize("bad", [{"group": 64}, {"group": None}, {"double": True}, {"scale_bits": 16}, {"bits": 3}])
def test_what_a_microscaling_format_has_not_is_refused(bad):
    with pytest.raises(ValueError, match="not allowed"):
        Format(**{"kind": "nvfp4", "bits": 4, "group": 16} | bad)


def test_a_width_that_the_block_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="group"):
        encode(torch.ones(2, 48), Format("mxfp4", 4, 32))
