"""Low-bit weights times low-bit activations, multiplied as the integers that they are stored as: sums are exact.

oneDNN's kernel for processors takes activations in uint8 and weights in int8 and adds in 32 bits. Beside products in
fp32 it is two times as fast on AVX2, four times with VNNI.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from studylib.config import SYMMETRIC, Grid
from studylib.quant.grids import choose_scale
from studylib.quant.storage import Codes

# Without VNNI the kernel adds pairs of products in 16 bits: of 7-bit weights 255 * (64 + 64) = 32,640 fits, of 8-bit
# ones it does not, and is cut.
WEIGHT_BITS = 7
ACTIVATION_BITS = 8
SHIFT = 128  # from int8 to uint8. The kernel takes int8 as well, up to 3,000 times as slowly
ROWS = 256  # for which weights are laid out; any number can be multiplied


class IntegerProduct:
    """Multiplies rows with one weight's integers.

    stored: the weight, [out, in], one that `multiplies` allows. Kept beside it: its integers as the kernel has them
    laid out, a byte each.
    """

    def __init__(self, stored: Codes):
        out, width = stored.shape
        self.packed = torch.ops.onednn.qlinear_prepack(stored.integers.to(torch.int8), [ROWS, width])
        self.scale, self.zeros = stored.scale.flatten(), torch.zeros(out, dtype=torch.int32)

    def sums(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Integers [N, in] (int8) times the weight's, fp32 [N, out], each column times its scale [out]: sums are exact
        as far as `multiplies` allows, and rounded to fp32 (above 2^24) before they are multiplied."""
        shifted = codes.view(torch.uint8).bitwise_xor(SHIFT)
        settings: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
        return torch.ops.onednn.qlinear_pointwise(shifted, 1.0, SHIFT, self.packed, scale, self.zeros, *settings)

    def __call__(self, x: Tensor, grid: Grid) -> Tensor:
        """x [..., in] in fp32, rounded to `grid`, times the weight, [..., out]; what F.linear has of both, dequantized,
        but for the rounding of its sums in fp32."""
        rows = x.reshape(-1, x.shape[-1])
        step, _ = choose_scale(rows, grid)
        sums = self.sums((rows / step).round_().to(torch.int8), self.scale)
        return sums.mul_(step).view(*x.shape[:-1], -1)


def multiplies(stored: Codes | None, activation: Grid | None) -> bool:
    """Whether codes of a weight and of activations on this grid can be multiplied as integers, exactly: both without
    zero points, one scale a row, and this processor does it right."""
    if stored is None or activation is None or stored.levels is not None or stored.mean is not None:
        return False
    if activation.kind != SYMMETRIC or activation.group is not None or activation.bits > ACTIVATION_BITS:
        return False
    if stored.bits > WEIGHT_BITS or stored.groups != 1 or stored.zeros is not None or stored.offsets is not None:
        return False
    return stored.codes.device.type == "cpu" and largest_sum(stored.shape[1], stored.bits) < exact_sums()


def largest_sum(width: int, bits: int) -> int:
    """Of the kernel's products of `width` activations, shifted to uint8, with weights of so many bits."""
    return width * 2 * SHIFT * 2 ** (bits - 1)


@functools.cache
def exact_sums() -> int:
    """How large sums of shifted activations may become for the kernel's results to be exact: 32 bits where it takes the
    shift away in integers, 24 where it does so in fp32 (with AMX), 0 where there is no such kernel, or none that is
    exact."""
    if not _exact(64):
        return 0
    return 2**31 if _exact(2**13) else 2**24


def _exact(width: int) -> bool:
    """Whether the kernel's sums are exact for weights that are all of the largest size."""
    high = 2 ** (WEIGHT_BITS - 1)
    integers = torch.tensor([-high, high - 1]).repeat_interleave(8)[:, None].expand(16, width)
    ones = torch.ones(16)
    drawn = torch.randint(-128, 128, (16, width), generator=torch.Generator().manual_seed(0))
    codes = torch.cat([torch.tensor([-128, 127])[:, None].expand(2, width), drawn])
    try:
        product = IntegerProduct(Codes.of_integers(integers, WEIGHT_BITS, -high, ones[:, None]))
        sums = product.sums(codes.to(torch.int8), ones)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False  # another processor, or a build of torch without oneDNN
    return torch.equal(sums, (codes @ integers.T).float())
