"""Uniform integer grids and fake quantization: pure functions on tensors.

Every grid works along the last dimension: one scale a row (a weight's output channel, an activation's token, a
token's keys or values over all heads), or one scale for each group of `group` neighbours inside a row.
Scales are always fp32, so that codes stay inside their range whatever the type of the input.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from studylib.config import FLOATING, FULL_RANGE, LEARNED, LSQ, STATSQ, SYMMETRIC, Grid
from studylib.quant.floats import rounded


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
    Raises ValueError for LEARNED grids, whose scale is learned, and for those of FLOATING.
    """
    tiny = torch.finfo(torch.float32).tiny
    if grid.kind in FLOATING:
        raise ValueError(f"grid: {grid.kind!r} has no integers; use floats.rounded, or formats.encode for its codes")
    if grid.kind in LEARNED:
        raise ValueError(f"grid: the scale of {grid.kind!r} is learned, not chosen from the numbers; give it as `step`")
    if grid.kind == STATSQ:
        return (2 * mean_magnitude(rows) / grid.high).clamp_min(tiny), None
    # aminmax takes six (bf16) to fourteen times (fp32) as long on a CPU
    smallest, largest = rows.amin(-1, keepdim=True).float(), rows.amax(-1, keepdim=True).float()
    if grid.symmetric:
        steps = grid.high + 0.5 if grid.kind == FULL_RANGE else grid.high
        return (torch.maximum(largest, -smallest) / steps).clamp_min(tiny), None
    smallest, largest = smallest.clamp_max(0), largest.clamp_min(0)
    scale = ((largest - smallest) / grid.high).clamp_min(tiny)
    return scale, torch.round(-smallest / scale).clamp(0, grid.high)


def mean_magnitude(rows: Tensor) -> Tensor:
    """mean|x| of each row of `rows` [..., D], fp32 [..., 1]."""
    return rows.abs().mean(-1, keepdim=True, dtype=torch.float32)


TRIED_STEPS = 32  # scales among which the one of least error is chosen


def initial_step(x: Tensor, grid: Grid) -> Tensor:
    """The first scale of each row of a LEARNED grid, fp32 [..., 1], for numbers x [..., D].

    "paretoq": max|x| / Q with Q = 2^(b-1)-1, where nothing is clipped. "lsq": of TRIED_STEPS even steps up to that, the
    one whose squared error is least, row by row. (LSQ's own, 2 mean|x| / sqrt(Q) (Esser et al., section 2.1), clips
    what a language model needs: docs/deviations.md.)
    """
    rows = grid.rows(x)
    largest = choose_scale(rows, Grid(grid.bits))[0]
    if grid.kind != LSQ:
        return largest
    best, least = largest, torch.full_like(largest, math.inf)
    for tried in range(1, TRIED_STEPS + 1):
        step = largest * (tried / TRIED_STEPS)
        error = (_values(_levels(rows, step, None, grid), step, None) - rows).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best


def _levels(rows: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    levels = (rows.float() / scale).round_()
    if grid.kind == SYMMETRIC:  # these cannot leave the range: |x| / (max|x| / high) rounds to at most `high` in fp32
        return levels
    return (levels if zero is None else levels.add_(zero)).clamp_(grid.low, grid.high)


def _values(levels: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Overwrites `levels`."""
    return levels.mul_(scale) if zero is None else levels.sub_(zero).mul_(scale)


def quantize(x: Tensor, grid: Grid, step: Tensor | None = None) -> Quantized:
    """Round `x` [..., D] to the nearest level of its row's (or group's) grid; ties go to even.

    step: the learned scale of a LEARNED or full-range grid, of a shape that broadcasts to [..., 1]; without one a grid
    chooses its own.
    Raises ValueError where x holds NaN or infinity, or where the group does not divide D.
    """
    rows = grid.rows(x)
    scale, zero = choose_scale(rows, grid) if step is None else (step.float().expand(*rows.shape[:-1], 1), None)
    if not torch.isfinite(rows).all():
        raise ValueError("quantize: the input holds NaN or infinity; integer codes exist for finite numbers only")
    codes = _levels(rows, scale, zero, grid).to(torch.int8 if grid.symmetric else torch.uint8)
    return Quantized(codes.reshape(x.shape), scale, zero, grid)


class _StraightThrough(torch.autograd.Function):
    """Forward: round to the grid. Backward: the identity, or zero where |x| >= mask or where x was clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid, mask: float | None, whole: bool) -> Tensor:
        passed = None if mask is None else x.abs() < mask
        if grid.kind in FLOATING:
            ctx.masked = passed is not None
            if ctx.masked:
                ctx.save_for_backward(passed)
            return rounded(x, grid, whole).to(x.dtype)
        rows = grid.rows(x)
        scale, zero = choose_scale(rows, grid)
        if grid.kind == STATSQ:
            inside = ((rows.abs() / scale) <= grid.high).reshape(x.shape)
            passed = inside if passed is None else passed & inside
        ctx.masked = passed is not None
        if ctx.masked:
            ctx.save_for_backward(passed)
        return _values(_levels(rows, scale, zero, grid), scale, zero).reshape(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.masked:
            (passed,) = ctx.saved_tensors
            gradient = gradient * passed
        return gradient, None, None, None


class _LearnedStep(torch.autograd.Function):
    """LSQ: with v = x / s, x_q = s round(clip(v)); d/dx passes inside; d/ds is round(v) - v inside, the last level
    outside.

    Both as Esser et al. 2020, Eq. 3 and 5; the scale's gradient is multiplied by 1 / sqrt(D Q) (section 2.2).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.grid = grid
        rows = grid.rows(x)
        return _values(_levels(rows, step, None, grid), step, None).reshape(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, step), grid = ctx.saved_tensors, ctx.grid
        scaled = grid.rows(x).float() / step
        inside = (scaled >= grid.low) & (scaled <= grid.high)
        slope = torch.where(inside, scaled.round() - scaled, scaled.clamp(grid.low, grid.high))
        d_step = grid.rows(gradient).float() * slope / math.sqrt(scaled.shape[-1] * grid.high)
        return gradient * inside.reshape(x.shape), d_step.sum_to_size(step.shape).to(step.dtype), None


def fake_quantize(
    x: Tensor, grid: Grid, mask: float | None = None, step: Tensor | None = None, whole: bool = False
) -> Tensor:
    """quantize(x, grid, step).dequantize(x.dtype), bit for bit, with straight-through gradients; NaN stays NaN. Of
    grids of floats, floats.rounded(x, grid, whole).

    x: [..., D] of any floating type; the result has its shape and type. step: the learned scale of a grid, as
    `quantize` takes it, which gets a gradient of its own; numbers that a grid clips get none.
    mask: None for the plain straight-through estimator; LLM-QAT's official code uses 2.0, which drops the gradient
    where |x| >= 2 although its forward pass never clips.
    """
    return _StraightThrough.apply(x, grid, mask, whole) if step is None else _LearnedStep.apply(x, step, grid)
