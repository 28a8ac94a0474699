"""Uniform integer grids and fake quantization: pure functions on tensors.

Every grid works along the last dimension: one scale a row (a weight's output channel, an activation's token, a
token's keys or values over all heads), or one scale for each group of `group` neighbours inside a row.
Scales are always fp32, so that codes stay inside their range whatever the type of the input.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_BITS, MAX_BITS, OFF = 2, 8, 16


def check_bits(bits: int, what: str = "bits") -> int:
    """Return `bits` if it is 2..8, or 16 (not quantized); else raise ValueError."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not (MIN_BITS <= bits <= MAX_BITS or bits == OFF):
        raise ValueError(f"{what}: {bits!r} is not allowed; use {MIN_BITS} to {MAX_BITS}, or {OFF} for off")
    return bits


@dataclass(frozen=True)
class BitWidths:
    """Bits of weights, activations and key/value cache, written "4-8-4"; 16 means not quantized."""

    weights: int
    activations: int
    cache: int

    def __post_init__(self):
        for name in ("weights", "activations", "cache"):
            check_bits(getattr(self, name), f"bits of the {name}")

    @classmethod
    def parse(cls, text: "str | BitWidths") -> "BitWidths":
        """From the papers' W-A-KV notation, e.g. "4-8-4"."""
        if isinstance(text, BitWidths):
            return text
        if not isinstance(text, str) or not re.fullmatch(r"\d{1,2}-\d{1,2}-\d{1,2}", text):
            raise ValueError(f"bit widths {text!r}: write weights-activations-cache, for example '4-8-4'")
        return cls(*map(int, text.split("-")))

    def __str__(self) -> str:
        return f"{self.weights}-{self.activations}-{self.cache}"


@dataclass(frozen=True)
class Grid:
    """Which integers stand for a row of numbers, and how their scale is chosen.

    symmetric: levels -(2^(b-1)-1)..2^(b-1)-1, scale = max|x| / (2^(b-1)-1), zero point 0 (LLM-QAT, Eq. 1: MinMax,
    nothing is clipped). Worked: 4 bits, row (-3.5, 1.2): scale 0.5, codes (-7, 2), values (-3.5, 1.0).
    asymmetric: levels 0..2^b-1, scale = (max - min) / (2^b-1) over a range that includes 0, integer zero point, so
    that 0 is exact (padding, ReLU-like inputs). Worked: 4 bits, row (-1, 14): scale 1, zero point 1, codes (0, 15).
    group: None for one scale a row, or the number of neighbours in a row that share a scale.
    """

    bits: int
    symmetric: bool = True
    group: int | None = None

    def __post_init__(self):
        if check_bits(self.bits) == OFF:
            raise ValueError(f"bits: a grid needs {MIN_BITS} to {MAX_BITS}; {OFF} (off) has no grid, leave it out")
        if self.group is not None and (not isinstance(self.group, int) or self.group < 1):
            raise ValueError(f"group: {self.group!r} is not allowed; use a positive integer, or None for whole rows")

    @property
    def low(self) -> int:
        return -self.high if self.symmetric else 0

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def check_width(self, width: int) -> None:
        """Raise ValueError where the group does not divide a row of `width` numbers."""
        if self.group is not None and width % self.group:
            raise ValueError(f"group: {self.group} does not divide the row length {width}")

    def rows(self, x: Tensor) -> Tensor:
        """`x` [..., D] viewed as [..., D // group, group] (as it is where a whole row shares a scale)."""
        if self.group is None:
            return x
        self.check_width(x.shape[-1])
        return x.unflatten(-1, (-1, self.group))


@dataclass(frozen=True)
class Quantized:
    """Integer codes [..., D] (int8, or uint8 for asymmetric grids) with their fp32 scales and zero points.

    scale, zero: [..., 1], or [..., D // group, 1] for a grid with groups; zero is None for symmetric grids.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    grid: Grid

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers the codes stand for: (codes - zero) * scale, [..., D]."""
        levels = self.grid.rows(self.codes).float()
        return _values(levels, self.scale, self.zero).reshape(self.codes.shape).to(dtype)


def choose_scale(rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """fp32 scale and zero point of each row of `rows` [..., D]: both [..., 1]; no zero point if symmetric.

    A row of zeros gets the smallest normal number as its scale, and codes that stand for exact zeros.
    """
    tiny = torch.finfo(torch.float32).tiny
    smallest, largest = rows.aminmax(dim=-1, keepdim=True)
    smallest, largest = smallest.float(), largest.float()
    if grid.symmetric:
        return (torch.maximum(largest, -smallest) / grid.high).clamp_min(tiny), None
    smallest, largest = smallest.clamp_max(0), largest.clamp_min(0)
    scale = ((largest - smallest) / grid.high).clamp_min(tiny)
    return scale, torch.round(-smallest / scale).clamp(0, grid.high)


def _levels(rows: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    levels = torch.round(rows.float() / scale)
    # Symmetric codes cannot leave the range: |x| / (max|x| / high) rounds to at most `high` in fp32.
    return levels if zero is None else (levels + zero).clamp(grid.low, grid.high)


def _values(levels: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    return levels * scale if zero is None else (levels - zero) * scale


def quantize(x: Tensor, grid: Grid) -> Quantized:
    """Round `x` [..., D] to the nearest level of its row's (or group's) MinMax grid; ties go to even.

    Raises ValueError where x holds NaN or infinity, or where the group does not divide D.
    """
    rows = grid.rows(x)
    scale, zero = choose_scale(rows, grid)
    if not torch.isfinite(scale).all():
        raise ValueError("quantize: the input holds NaN or infinity; integer codes exist for finite numbers only")
    codes = _levels(rows, scale, zero, grid).to(torch.int8 if grid.symmetric else torch.uint8)
    return Quantized(codes.reshape(x.shape), scale, zero, grid)


class _StraightThrough(torch.autograd.Function):
    """Forward: round to the grid. Backward: the identity, or zero where |x| >= mask."""

    @staticmethod
    def forward(ctx, x: Tensor, grid: Grid, mask: float | None) -> Tensor:
        ctx.mask = mask
        if mask is not None:
            ctx.save_for_backward(x)
        rows = grid.rows(x)
        scale, zero = choose_scale(rows, grid)
        return _values(_levels(rows, scale, zero, grid), scale, zero).reshape(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        if ctx.mask is not None:
            (x,) = ctx.saved_tensors
            gradient = gradient.masked_fill(x.abs() >= ctx.mask, 0)
        return gradient, None, None


def fake_quantize(x: Tensor, grid: Grid, mask: float | None = None) -> Tensor:
    """quantize(x, grid).dequantize(x.dtype), bit for bit, with straight-through gradients; NaN stays NaN.

    x: [..., D] of any floating type; the result has its shape and type.
    mask: None for the plain straight-through estimator; LLM-QAT's official code uses 2.0, which drops the gradient
    where |x| >= 2 although its forward pass never clips.
    """
    return _StraightThrough.apply(x, grid, mask)
