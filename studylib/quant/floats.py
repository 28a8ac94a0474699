"""Floats of few bits in blocks that share a scale: OCP's microscaling formats, NVFP4 and FP8, on tensors.

An element is the nearest number of its float type, ties to the even mantissa; what lies beyond the largest becomes it.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from studylib.config import MICROSCALING, MXFP, Grid
from studylib.quant.storage import Codes, pack


@dataclass(frozen=True)
class Element:
    """A float of 4, 6 or 8 bits: its bits of mantissa, the exponent of its subnormals, and its largest number."""

    mantissa: int
    least: int
    largest: float

    @property
    def exponent(self) -> int:
        """That of the largest number, floor(log2)."""
        return math.frexp(self.largest)[1] - 1


E2M1, E2M3, E4M3 = Element(1, 0, 6.0), Element(3, 0, 7.5), Element(3, -6, 448.0)
ELEMENTS = {4: E2M1, 6: E2M3, 8: E4M3}  # of each width (OCP Microscaling Formats 1.0, section 5.3; E3M2 is not used)
BIAS = 127  # of E8M0
E4M3_IN_PLACE_OF_0 = 0.125  # the scale of a group that is too small for one, as compressed-tensors has it
TINY = torch.finfo(torch.float32).tiny


def nearest(x: Tensor, element: Element) -> Tensor:
    """The element nearest to each number of x, fp32, of any shape."""
    exponent = x.frexp().exponent.sub_(1).clamp_(min=element.least) - element.mantissa
    step = _power_of_two(exponent)
    return (x / step).round_().mul_(step).clamp_(-element.largest, element.largest)


def _power_of_two(exponent: Tensor) -> Tensor:
    """fp32, exactly."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def exponents(largest: Tensor, element: Element) -> Tensor:
    """int32: those of the powers of two for blocks whose largest magnitude is given (OCP, section 6.3), which E8M0 may
    lack."""
    return largest.frexp().exponent - 1 - element.exponent


def outer_scale(largest: Tensor) -> Tensor:
    """What NVFP4's scales are multiplied by before they are stored in E4M3, so that the largest one becomes its
    largest number; fp32, for the largest magnitude of all numbers that share it."""
    outer = E4M3.largest * E2M1.largest / largest.clamp_min(TINY)
    return torch.where(outer.isinf(), 1, outer)


def scales_in_e4m3(largest: Tensor, outer: Tensor) -> Tensor:
    """NVFP4's scales before they are divided by `outer`, float8_e4m3fn, for blocks whose largest magnitude is given."""
    scales = (outer * (largest / E2M1.largest)).clamp(max=E4M3.largest).to(torch.float8_e4m3fn)
    return torch.where(scales.float() == 0, E4M3_IN_PLACE_OF_0, scales.float()).to(torch.float8_e4m3fn)


def rounded(x: Tensor, grid: Grid, whole: bool = False) -> Tensor:
    """x [..., D], of any floating type, rounded to a grid of FLOATING, in fp32; NaN stays NaN.

    "mxfp": a power of two for each 32. "nvfp" at 4 bits: a scale in E4M3 for each 16, and one fp32 number; at 8 bits
    that alone. It is one for each row, for one over rows would let tokens know of those that follow; whole: for all of
    x, as weights have it. Raises ValueError where the block does not divide D.
    """
    grid.check_width(x.shape[-1])
    x, element = x.float(), ELEMENTS[grid.bits]
    blocks = x if grid.block is None else x.unflatten(-1, (-1, grid.block))
    largest = blocks.abs().amax(-1, keepdim=True)
    if grid.kind == MXFP:
        scale = _power_of_two(exponents(largest, element).clamp_(-BIAS, BIAS))
    elif grid.block is None:
        scale = (largest / element.largest).clamp_min(TINY)
    else:
        outer = outer_scale(x.abs().amax() if whole else x.abs().amax(-1, keepdim=True)[..., None])
        scale = scales_in_e4m3(largest, outer).float() / outer
    return nearest(blocks / scale, element).mul_(scale).view(x.shape)


@cache
def levels() -> Tensor:
    """The numbers of E2M1, fp32, ascending, -0 left out. Do not write to it."""
    return nearest(torch.arange(-12, 13) / 2, E2M1).unique()


@cache
def e8m0() -> Tensor:
    """What the 256 codes of E8M0 stand for, fp32: 2^(code - 127), and NaN. Do not write to it."""
    return torch.cat([torch.exp2(torch.arange(255).double() - BIAS), torch.tensor([torch.nan])]).float()


@cache
def e4m3() -> Tensor:
    """What the 256 codes of E4M3 stand for, fp32, in the order of their bits. Do not write to it."""
    return torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()


def encode(weight: Tensor, kind: str) -> Codes:
    """A weight, fp32 [out, in], as it is stored in a format of MICROSCALING, whose block divides `in`: codes of
    `levels`, and of the scales."""
    blocks = weight.reshape(-1, MICROSCALING[kind])
    largest, outer = blocks.abs().amax(1), None
    if kind == "nvfp4":
        outer = outer_scale(largest.max()).view(1)
        stored = scales_in_e4m3(largest, outer)
        scales, table, scale = stored.view(torch.uint8), e4m3(), stored.float() / outer
    else:
        powers = exponents(largest, E2M1)
        if kind == "mxfp4-even":
            powers = powers + (largest.frexp().mantissa >= 0.875)  # E2M1 rounds 1.75 to 2
        powers = powers.clamp(-BIAS, BIAS)
        scales, table, scale = (powers + BIAS).to(torch.uint8), e8m0(), _power_of_two(powers)
    codes = torch.searchsorted(levels().to(weight.device), nearest(blocks / scale[:, None], E2M1))
    further = {"outer": outer, "levels": levels(), "scale_levels": table}
    return Codes(4, (weight.shape[0], weight.shape[1]), pack(codes.to(torch.uint8), 4), scales, **further)
