"""Oracles: torch's float8, torchao's MXTensor, compressed-tensors' NVFP4, our own codes of weights, autograd."""

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as compressed_tensors_rounding
from compressed_tensors.quantization.quant_scheme import NVFP4
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import DTYPE_FP6_E2M3, MXTensor

from studylib.config.settings import FLOAT_BITS, FLOATING, MXFP, NVFP, Format, Grid, Scheme
from studylib.quant.floats import E2M1, E2M3, E4M3, nearest, rounded
from studylib.quant.formats import encode
from studylib.quant.grids import fake_quantize, quantize
from studylib.quant.layers import (
    QuantizedLinear,
    cache_bytes_per_token,
    decoder_linears,
    freeze_weights,
    quantize_model,
    round_to_nearest,
)
from studylib.quant.storage import keep_model, restore_model, stored_bytes

ALL = [Grid(bits, kind) for kind in FLOATING for bits in FLOAT_BITS[kind]]


def rows(columns=128, seed=0):
    """Numbers whose blocks differ in size by far, some of them zeros."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(-12, 4, (64, columns // 16), generator=generator).float().exp2()
    x = torch.randn(64, columns, generator=generator) * sizes.repeat_interleave(16, 1)
    x[3, :64] = 0
    return x


def test_elements_of_eight_bits_are_torchs_and_all_are_symmetric_and_their_own_nearest():
    x = torch.cat([rows().flatten() * 500, torch.tensor([464.0, 465, 1e9, 2**-10, 2**-9, 3 * 2**-10, 0.0])])
    assert torch.equal(nearest(x, E4M3), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    for element in (E2M1, E2M3, E4M3):
        assert torch.equal(nearest(-x, element), -nearest(x, element))
        assert torch.equal(nearest(nearest(x, element), element), nearest(x, element))
    assert nearest(torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7]), E2M1).tolist() == [0, 1, 1, 2, 2, 4, 4, 6]


@pytest.mark.parametrize(
    ("bits", "theirs"), [(4, torch.float4_e2m1fn_x2), (6, DTYPE_FP6_E2M3), (8, torch.float8_e4m3fn)]
)
def test_mxfp_is_torchaos_to_the_bit(bits, theirs):
    x = rows()
    expected = MXTensor.to_mx(x, theirs, 32, ScaleCalculationMode.FLOOR).dequantize(torch.float32)
    assert torch.equal(rounded(x, Grid(bits, MXFP)), expected)


def test_nvfp4_is_that_of_compressed_tensors_for_one_token_to_the_bit():
    arguments = NVFP4["input_activations"]
    for x in rows()[[0, 1, 2, 5]]:
        x, outer = x[None], generate_gparam(x.min(), x.max())
        groups = x.view(1, -1, arguments.group_size)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments, outer)
        theirs = compressed_tensors_rounding(x, scale, zero, arguments, global_scale=outer)
        assert torch.equal(rounded(x, Grid(4, NVFP)), theirs)


@pytest.mark.parametrize("kind", FLOATING)
def test_weights_are_those_of_the_format_of_that_name(kind):
    format = Format(f"{kind}4", 4, {MXFP: 32, NVFP: 16}[kind])
    assert torch.equal(rounded(rows(), Grid(4, kind), whole=True), encode(rows(), format).decode())


@pytest.mark.parametrize("grid", ALL, ids=lambda grid: f"{grid.kind}{grid.bits}")
def test_a_token_is_rounded_by_itself_and_gradients_pass_straight_through(grid):
    x = rows().view(4, 16, 128).requires_grad_()
    y = fake_quantize(x, grid)
    assert y.shape == x.shape and not torch.equal(y, x)
    assert all(torch.equal(fake_quantize(token, grid), y[2, at]) for at, token in enumerate(x[2]))
    y.backward(gradient := torch.randn_like(x))
    assert torch.equal(x.grad, gradient)
    assert fake_quantize(x.bfloat16(), grid).dtype == torch.bfloat16
    masked = x.detach().requires_grad_()
    fake_quantize(masked, grid, mask=1.0).sum().backward()
    assert torch.equal(masked.grad, (masked.abs() < 1).float())
    bad = x.detach().clone()
    bad[0, 0, 5] = torch.nan
    assert fake_quantize(bad, grid).isnan().any()
    with pytest.raises(ValueError, match=f"{grid.kind!r} has no integers"):
        quantize(x.detach(), grid)


@given(st.integers(-30, 30))
def test_scales_follow_the_numbers(power):
    for grid in (Grid(4, MXFP), Grid(6, MXFP), Grid(8, MXFP)):
        assert torch.equal(rounded(rows() * 2.0**power, grid), rounded(rows(), grid) * 2.0**power)
    for grid in (Grid(4, NVFP), Grid(8, NVFP)):
        found = rounded(rows() * 2.0**power, grid)
        torch.testing.assert_close(found, rounded(rows(), grid) * 2.0**power, rtol=0.3, atol=0.3 * 2.0**power)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bits"), [(MXFP, "4-4-16"), (MXFP, "4-6-8"), (NVFP, "4-4-4"), (NVFP, "4-8-8")])
def test_a_model_computes_with_rounded_weights_inputs_and_cache(fp32, tiny_model, tmp_path, kind, bits):
    tokens, scheme = torch.arange(24).view(2, 12), Scheme(kind)
    original = {name: linear.weight.detach().clone() for name, linear in decoder_linears(tiny_model).items()}
    quantize_model(tiny_model, bits, scheme)
    seen = {}
    name = "model.layers.1.self_attn.k_proj"
    layer = tiny_model.get_submodule(name)
    layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    latent = tiny_model(tokens).logits
    grids = [None if width == "16" else Grid(int(width), kind) for width in bits.split("-")]
    x = rounded(seen["x"], grids[1])
    y = nn.functional.linear(x, rounded(original[name], grids[0], whole=True))
    torch.testing.assert_close(seen["y"], y if grids[2] is None else rounded(y, grids[2]), rtol=0, atol=1e-6)
    freeze_weights(tiny_model)
    torch.testing.assert_close(tiny_model(tokens).logits, latent, rtol=0, atol=1e-6)
    for stored in decoder_linears(tiny_model).values():
        assert isinstance(stored, QuantizedLinear) and torch.equal(stored.codes().decode(), stored.weight)
    full = 2 * sum(parameter.numel() for parameter in tiny_model.parameters())
    weights = sum(weight.numel() for weight in original.values())
    outer = 4 * len(original) * (kind == NVFP)
    assert stored_bytes(tiny_model) == full - 2 * weights + weights // 2 + weights // {MXFP: 32, NVFP: 16}[kind] + outer


def test_bytes_of_a_cached_token(tiny_model):
    keys = 2 * tiny_model.config.num_key_value_heads * tiny_model.config.head_dim * tiny_model.config.num_hidden_layers
    layers = 2 * tiny_model.config.num_hidden_layers
    for kind, bits, expected in (
        (MXFP, 8, keys + keys // 32),
        (MXFP, 6, keys * 6 // 8 + keys // 32),
        (NVFP, 8, keys + 4 * layers),
        (NVFP, 4, keys // 2 + keys // 16 + 4 * layers),
    ):
        assert cache_bytes_per_token(tiny_model, f"4-8-{bits}", Scheme(kind)) == expected


def test_what_was_rounded_to_floats_is_kept_and_restored(fp32, tiny_model, tmp_path):
    from studylib.data import models

    round_to_nearest(tiny_model, "4-8-8", Scheme(NVFP))
    keep_model(tiny_model, models.load_model("tiny-random"), tmp_path / "kept")
    restored = quantize_model(models.load_model("tiny-random"), "16-8-8", Scheme(NVFP))
    restore_model(restored, tmp_path / "kept")
    tokens = torch.arange(12)[None]
    assert torch.equal(restored(tokens).logits, tiny_model(tokens).logits)
    assert stored_bytes(restored) == stored_bytes(tiny_model)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid(6, NVFP), "bits: 6 .* not allowed for the grid 'nvfp'; use 4 or 8"),
        (lambda: Grid(4, MXFP, 64), "group 64 is not allowed for the grid 'mxfp'"),
        (lambda: Scheme(MXFP, group=32), "group: 32 .* whose blocks are its own; leave both out"),
        (lambda: Scheme(NVFP, cache_scale="head"), "cache_scale 'head' is not allowed for the grid 'nvfp'"),
        (lambda: rounded(torch.ones(2, 48), Grid(4, MXFP)), "group: 32 does not divide the row length 48"),
    ],
)
def test_what_floats_have_not_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "bits", "message"),
    [
        (MXFP, "8-8-16", "bits of the weights: 8 is not allowed for the grid 'mxfp'; use 4 or 16"),
        (NVFP, "4-6-16", "bits of the activations: 6 is not allowed for the grid 'nvfp'; use 4, 8 or 16"),
        (MXFP, "4-8-3", "bits of the cache: 3 is not allowed for the grid 'mxfp'; use 4, 6, 8 or 16"),
    ],
)
def test_widths_that_floats_have_not_are_refused_before_anything_changes(tiny_model, kind, bits, message):
    before = str(tiny_model)
    with pytest.raises(ValueError, match=message):
        quantize_model(tiny_model, bits, Scheme(kind))
    assert str(tiny_model) == before
