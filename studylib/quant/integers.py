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
WIDEST = 2**31 // (SHIFT * 2 * 2 ** (WEIGHT_BITS - 1))  # inputs whose products fit into 32 bits
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
        in 32 bits, and rounded to fp32 (above 2^24) before they are multiplied."""
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
    if stored.bits > WEIGHT_BITS or stored.groups != 1 or stored.shape[1] >= WIDEST:
        return False
    return stored.zeros is None and stored.offsets is None and stored.codes.device.type == "cpu" and _exact_here()


@functools.cache
def _exact_here() -> bool:
    """Whether the kernel is there and exact where its sums are largest."""
    high = 2 ** (WEIGHT_BITS - 1)
    integers = torch.tensor([-high, high - 1]).repeat_interleave(8)[:, None].expand(16, 64)
    ones = torch.ones(16)
    codes = torch.tensor([-128, 127]).repeat(8)[:, None].expand(16, 64)
    try:
        product = IntegerProduct(Codes.of_integers(integers, WEIGHT_BITS, -high, ones[:, None]))
        sums = product.sums(codes.to(torch.int8), ones)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False  # another processor, or a build of torch without oneDNN
    return torch.equal(sums.long(), codes @ integers.T)
