"""Oracles: a NumPy version in float64, torchao's public primitives, compressed-tensors' quantizer, autograd."""

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as theirs_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchao.quantization import MappingType, choose_qparams_affine, dequantize_affine, quantize_affine

from studylib.config.settings import Grid
from studylib.quant.grids import TRIED_STEPS, fake_quantize, initial_step, quantize

BITS = range(2, 9)
rows = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.sampled_from([4, 8, 24])),
    elements=st.floats(-(2.0**99), 2.0**99, width=32),
)
grids = st.builds(
    Grid,
    bits=st.integers(2, 8),
    kind=st.sampled_from(["symmetric", "asymmetric", "full-range"]),
    group=st.sampled_from([None, 2, 4]),
)


def numpy_values(x: np.ndarray, grid: Grid) -> np.ndarray:
    """MinMax round-to-nearest in float64, written independently of studylib."""
    x = x.astype(np.float64)
    shape, x = x.shape, x.reshape(-1, grid.group or x.shape[-1])
    out = np.zeros_like(x)
    for i, row in enumerate(x):
        if grid.symmetric:
            top = 2 ** (grid.bits - 1) - 1
            step = np.abs(row).max() / top
            out[i] = np.rint(row / step) * step if step else 0
        else:
            low, high = min(row.min(), 0), max(row.max(), 0)
            step = (high - low) / (2**grid.bits - 1)
            if step:
                zero = np.rint(-low / step)
                out[i] = (np.clip(np.rint(row / step) + zero, 0, 2**grid.bits - 1) - zero) * step
    return out.reshape(shape)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [None, 16])
def test_agrees_with_float64_numpy(bits, kind, group):
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(bits)) * torch.logspace(-4, 4, 64)[:, None]
    grid = Grid(bits, kind, group)
    ours, exact = fake_quantize(x, grid).double().numpy(), numpy_values(x.numpy(), grid)
    step = (np.abs(x.numpy()).max(-1, keepdims=True)) / (2 ** (bits - 1) - 1)
    # fp32 rounding of x / scale may flip a tie between two neighbouring levels; nothing else may differ.
    off = np.abs(ours - exact) > 1e-4 * step
    assert off.mean() < 1e-3
    assert np.abs(ours - exact).max(where=off, initial=0) <= 1.001 * np.broadcast_to(step, off.shape).max()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [None, 32])
def test_agrees_with_torchao(bits, kind, group):
    x = torch.randn(32, 128, generator=torch.Generator().manual_seed(7))
    grid, block, symmetric = Grid(bits, kind, group), (1, group or 128), kind == "symmetric"
    mapping = MappingType.SYMMETRIC_NO_CLIPPING_ERR if symmetric else MappingType.ASYMMETRIC
    scale, zero = choose_qparams_affine(
        x,
        mapping,
        block,
        torch.int8 if symmetric else torch.uint8,
        grid.low,
        grid.high,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
    )
    codes = quantize_affine(x, block, scale, zero, torch.int8 if symmetric else torch.uint8, grid.low, grid.high)
    values = dequantize_affine(codes, block, scale, zero, codes.dtype, grid.low, grid.high)
    ours = quantize(x, grid)
    torch.testing.assert_close(ours.scale.flatten(), scale.flatten(), rtol=1e-6, atol=0)
    # torchao multiplies by 1 / scale: ties may fall on the other side.
    apart = (ours.codes.int() - codes.int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3
    same = apart == 0
    torch.testing.assert_close(ours.dequantize()[same], values[same], rtol=1e-5, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    bits=st.sampled_from(BITS),
    group=st.sampled_from([None, 8, 32]),
    scale=st.floats(1e-6, 1e6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_full_range_grids_are_compressed_tensors_to_the_bit(seed, bits, group, scale, dtype):
    x = (torch.randn(6, 64, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    blocks = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    args = QuantizationArgs(num_bits=bits, symmetric=True, **blocks)
    rows = x.float().unflatten(1, (-1, group or 64))
    step, zero = calculate_qparams(rows.amin(-1), rows.amax(-1), args)
    codes = theirs_quantize(x.float(), step, zero, args, dtype=torch.int8)
    ours = quantize(x, Grid(bits, "full-range", group))
    assert torch.equal(ours.scale.reshape(step.shape), step) and (zero == 0).all() and ours.zero is None
    assert torch.equal(ours.codes, codes)


@settings(max_examples=300, deadline=None)
@given(rows, grids)
def test_fake_quantization_is_quantize_then_dequantize(x, grid):
    x = torch.from_numpy(x)
    stored = quantize(x, grid)
    assert torch.equal(fake_quantize(x, grid), stored.dequantize())
    assert stored.codes.min() >= grid.low and stored.codes.max() <= grid.high
    assert stored.scale.dtype == torch.float32
    half = x.clamp(-3e4, 3e4).bfloat16()
    assert torch.equal(fake_quantize(half, grid), quantize(half, grid).dequantize(torch.bfloat16))


@settings(max_examples=200, deadline=None)
@given(rows, grids)
def test_error_is_at_most_half_a_step_and_the_extremes_are_kept(x, grid):
    x = torch.from_numpy(x)
    stored = quantize(x, grid)
    error = grid.rows((stored.dequantize().double() - x.double()).abs())
    slack = 1 if not grid.symmetric else 0.5  # an integer zero point shifts the range by up to half a step
    assert (error <= (slack + 1e-3) * stored.scale.double()).all()
    if grid.kind == "symmetric":
        magnitude = grid.rows(x).abs().amax(-1)
        kept = grid.rows(stored.codes.int()).abs().amax(-1)
        assert (kept[magnitude > 1e-30] == grid.high).all()


@given(rows, st.integers(2, 8))
@settings(deadline=None)
def test_symmetric_grid_is_odd_and_scales_with_its_input(x, bits):
    x = torch.from_numpy(x)
    grid = Grid(bits)
    assert torch.equal(fake_quantize(-x, grid), -fake_quantize(x, grid))
    moderate = x.clamp(-1e20, 1e20) * (x.abs() > 1e-20)
    assert torch.equal(fake_quantize(moderate * 4, grid), fake_quantize(moderate, grid) * 4)


def test_worked_examples_of_the_docstring():
    symmetric = quantize(torch.tensor([-3.5, 1.2]), Grid(4))
    assert symmetric.codes.tolist() == [-7, 2] and symmetric.scale.item() == 0.5
    full = quantize(torch.tensor([-3.75, 3.75]), Grid(4, "full-range"))
    assert full.codes.tolist() == [-8, 7] and full.scale.item() == 0.5 and full.zero is None
    asymmetric = quantize(torch.tensor([-1.0, 14.0]), Grid(4, "asymmetric"))
    assert asymmetric.codes.tolist() == [0, 15] and asymmetric.zero.item() == 1 and asymmetric.scale.item() == 1


def test_zero_rows_and_subnormal_rows_stay_finite():
    for x in (torch.zeros(2, 8), torch.full((2, 8), 1e-42)):
        for grid in (Grid(4), Grid(4, "asymmetric"), Grid(4, "full-range")):
            assert torch.equal(fake_quantize(x, grid), torch.zeros_like(x))


def test_straight_through_gradient_and_the_official_mask():
    x = torch.tensor([[-5.0, -2.0, -1.9, 0.3, 1.0, 2.5]], requires_grad=True)
    upstream = torch.arange(1.0, 7.0)[None]
    fake_quantize(x, Grid(4)).backward(upstream)
    assert torch.equal(x.grad, upstream)
    x.grad = None
    fake_quantize(x, Grid(4), mask=2.0).backward(upstream)
    assert x.grad.tolist() == [[0, 0, 3, 4, 5, 0]]


@pytest.mark.parametrize("bits", BITS)
def test_statsq_clips_at_twice_the_mean_magnitude(bits):
    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(bits), requires_grad=True)
    exact = x.detach().double().numpy()
    clip = 2 * np.abs(exact).mean(1, keepdims=True)
    step = clip / (2 ** (bits - 1) - 1)
    exact = np.rint(np.clip(exact, -clip, clip) / step) * step
    ours = fake_quantize(x, Grid(bits, "statsq"))
    assert (np.abs(ours.detach().double().numpy() - exact) > 1e-5).mean() < 1e-3
    assert torch.equal(ours, quantize(x.detach(), Grid(bits, "statsq")).dequantize())
    ours.sum().backward()
    assert torch.equal(x.grad == 0, x.detach().abs() > torch.from_numpy(clip).float())


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize(("kind", "low"), [("lsq", -7), ("paretoq", -7), ("full-range", -8)])
def test_learned_steps_have_the_gradients_of_autograd(kind, low, group):
    """LSQ written with detached roundings, as its authors' pseudo-code does, in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 96, generator=generator).requires_grad_()
    grid, shape = Grid(4, kind, group), (16, 1) if group is None else (16, 3, 1)
    step = (0.1 + 0.2 * torch.rand(shape, generator=generator)).requires_grad_()
    upstream = torch.randn(16, 96, generator=generator)
    ours = fake_quantize(x, grid, step=step)
    ours.backward(upstream)

    exact_x, exact_step = (t.detach().double().requires_grad_() for t in (x, step))
    share = 1 / ((group or 96) * 7) ** 0.5
    slowed = exact_step * share + (exact_step * (1 - share)).detach()
    clipped = (grid.rows(exact_x) / slowed).clamp(low, 7)
    exact = ((clipped + (clipped.round() - clipped).detach()) * slowed).view_as(x)
    exact.backward(upstream.double())
    beyond = grid.rows(exact_x) / exact_step
    assert (beyond > 7).float().mean() > 0.01 and (beyond < low).float().mean() > 0.01  # some are clipped
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step.grad.double(), exact_step.grad, rtol=1e-4, atol=1e-5)
    stored = quantize(x.detach(), grid, step.detach())
    assert torch.equal(stored.dequantize(), ours) and (stored.codes.min(), stored.codes.max()) == (low, 7)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    bits=st.sampled_from(BITS),
    group=st.sampled_from([None, 16]),
    tail=st.sampled_from([0.0, 3.0, 20.0]),
)
def test_learned_steps_begin_where_the_squared_error_is_least(seed, bits, group, tail):
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))
    x[:, ::7] *= 1 + tail
    high, found = 2 ** (bits - 1) - 1, initial_step(x, Grid(bits, "lsq", group)).double().numpy()[..., 0]
    numbers = x.double().numpy().reshape(4, -1, group or 32)
    largest = np.abs(numbers).max(-1) / high
    np.testing.assert_allclose(
        initial_step(x, Grid(bits, "paretoq", group)).double().numpy().reshape(largest.shape), largest, rtol=1e-6
    )

    def error(step):
        step = step.reshape(largest.shape)[..., None]
        return np.square(np.clip(np.rint(numbers / step), -high, high) * step - numbers).sum(-1)

    tried = np.stack([error(largest * i / TRIED_STEPS) for i in range(1, TRIED_STEPS + 1)])
    np.testing.assert_allclose(error(found), tried.min(0), rtol=1e-4)
    assert (error(found) <= error(largest) * (1 + 1e-4)).all()  # it was computed in fp32
    if tail == 20.0 and 2 < bits < 5 and group is None:
        assert (found.reshape(largest.shape) < largest).any()  # what is large is clipped, for the others' sake


def test_a_row_of_zeros_has_a_first_step():
    for kind in ("lsq", "paretoq"):
        step = initial_step(torch.zeros(2, 8), Grid(4, kind))
        assert (step > 0).all() and (fake_quantize(torch.zeros(2, 8), Grid(4, kind), step=step) == 0).all()


def test_a_learned_scale_must_be_given():
    for kind in ("lsq", "paretoq"):
        with pytest.raises(ValueError, match=f"'{kind}' is learned"):
            fake_quantize(torch.randn(2, 8), Grid(4, kind))


def test_not_finite_input_propagates_and_has_no_codes():
    x = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    out = fake_quantize(x, Grid(4))
    assert out[0].isnan().all() and out[1].isfinite().all()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantize(torch.tensor([1.0, bad]), Grid(4))


def test_a_group_that_does_not_divide_the_row_is_refused():
    with pytest.raises(ValueError, match="5 does not divide the row length 8"):
        fake_quantize(torch.randn(2, 8), Grid(4, group=5))
