import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from studylib.config.settings import Grid
from studylib.quant.grids import quantize
from studylib.quant.integers import WEIGHT_BITS, IntegerProduct, exact_sums, largest_sum, multiplies
from studylib.quant.layers import QuantizedLinear, freeze_weights
from studylib.quant.storage import Codes

ROOT = Path(__file__).parents[2]
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
needs_kernel = pytest.mark.skipif(
    not multiplies(Codes.of_integers(torch.ones(4, 4), 4, -8, torch.ones(4, 1)), Grid(8)),
    reason="this processor or build of torch has no exact products of integers",
)


def check_sums(width: int, bits: int) -> None:
    """The kernel's sums beside NumPy's in 64 bits, where it is asked: random codes, and those of the largest sums."""
    rng, high = np.random.default_rng(width), 2 ** (bits - 1)
    drawn = rng.integers(-high, high, (40, width))
    extreme = np.stack([np.full(width, value) for value in (-high, high - 1)])
    weights = np.concatenate([drawn, extreme, rng.choice([-high, high - 1], (6, width))])
    codes = np.concatenate([rng.integers(-128, 128, (33, width)), rng.choice([-128, 127], (6, width))])
    codes = np.concatenate([codes, np.full((1, width), -128), np.full((1, width), 127)])
    stored = Codes.of_integers(torch.from_numpy(weights), bits, -high, torch.ones(len(weights), 1))
    if not multiplies(stored, Grid(8)):  # only what fp32 cannot hold, and only with AMX
        assert exact_sums() == 2**24 <= largest_sum(width, bits)
        return
    sums = IntegerProduct(stored).sums(torch.from_numpy(codes).to(torch.int8), stored.scale.flatten())
    exact = codes @ weights.T
    assert np.array_equal(sums.numpy(), exact.astype(np.float32))
    if width * high * 128 <= 2**24:
        assert np.array_equal(sums.numpy().astype(np.int64), exact)


@needs_kernel
@pytest.mark.parametrize("width", [8, 100, 576, 1536, 5000])
@pytest.mark.parametrize("bits", [2, 4, WEIGHT_BITS])
def test_sums_are_those_of_64_bit_integers(width, bits):
    check_sums(width, bits)


@needs_kernel
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="no AVX2")
def test_sums_are_exact_without_vnni_too():
    code = "\n".join(
        (
            "from tests.quant.test_integers import WEIGHT_BITS, check_sums, exact_sums",
            "assert exact_sums() == 2**31",
            "for width in (8, 576, 1536, 5000):",
            "    for bits in (2, 4, WEIGHT_BITS):",
            "        check_sums(width, bits)",
        )
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **AVX2}, cwd=ROOT)


def frozen(bits: int = 4, activation: Grid | None = None, weight: Grid | None = None) -> QuantizedLinear:
    torch.manual_seed(0)
    return freeze_weights(QuantizedLinear(nn.Linear(96, 40), weight or Grid(bits), activation or Grid(8), None))


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("kind", ["symmetric", "full-range", "statsq"])
def test_a_layer_multiplies_the_integers_it_answers(kind):
    layer = frozen(weight=Grid(4, kind))
    x = torch.randn(3, 7, 96) * torch.logspace(-3, 3, 7)[:, None]
    assert layer._product(x) is not None
    found, stored = quantize(x, Grid(8)), layer.codes()
    sums = found.codes.numpy().astype(np.int64) @ stored.integers.numpy().astype(np.int64).T
    exact = sums * found.scale.double().numpy() * stored.scale.double().numpy()[:, 0] + layer.bias.double().numpy()
    size = np.abs(exact).max(-1, keepdims=True)
    assert (np.abs(layer(x).double().numpy() - exact) <= 1e-6 * size).all()
    x[0, 0, 0] = torch.nan
    y = layer(x)
    assert y[0, 0].isnan().all() and y[1:].isfinite().all()


@needs_kernel
def test_what_else_is_computed_stays_as_it_was():
    x = torch.randn(5, 96)
    layer = frozen()
    assert layer._product(x) is None  # with gradients
    with torch.no_grad():
        assert layer._product(x) is not None
        assert layer._product(x.bfloat16()) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert layer._product(x) is None
        for other in (
            frozen(bits=8),
            frozen(activation=Grid(8, "asymmetric")),
            frozen(activation=Grid(8, group=32)),
            frozen(weight=Grid(4, "asymmetric")),
            frozen(weight=Grid(4, group=32)),
            QuantizedLinear(nn.Linear(96, 40), Grid(4), Grid(8), None),
        ):
            assert other._product(x) is None


@needs_kernel
@torch.no_grad()
def test_other_codes_are_multiplied_when_they_take_the_place_of_the_first():
    x, layer, other = torch.randn(5, 96), frozen(), frozen(bits=3)
    layer(x)
    layer.stored = other.stored
    assert torch.equal(layer(x), other(x))
