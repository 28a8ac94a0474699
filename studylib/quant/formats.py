"""Weight-only number formats with a scale for each group, stored in real bytes: NormalFloat, floats, integers.

QLoRA (arXiv 2305.14314), section 3: a weight is cut into groups of neighbours (blocks), each is divided by its largest
magnitude, and every number becomes the code of the nearest of 2^b levels in -1..1. Double quantization stores the
scales in 8 bits as well.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studylib.config import INTEGER_FORMATS, MICROSCALING, Format, in_bitsandbytes
from studylib.quant import floats
from studylib.quant.grids import quantize
from studylib.quant.layers import decoder_linears
from studylib.quant.storage import SCALES_IN_GROUP, Codes, DeployedLinear, pack

FLOAT_MAGNITUDES = {
    "fp-e2m1": (0, 0.5, 1, 1.5, 2, 3, 4, 6),
    "fp-bnb": (0, 0.0625, 2, 3, 4, 6, 8, 12),
    "fp-e3m0": (0, 0.25, 0.5, 1, 2, 4, 8, 16),
}
SCALE_CODE_BITS = 8  # double quantization: of a scale, beside one fp32 number for SCALES_IN_GROUP of them


@cache
def levels(format: Format) -> Tensor:
    """The levels for numbers in -1..1, fp32, ascending: 2^b of NormalFloat and full-range integers, 2^b - 1 of floats
    and symmetric integers (+0 and -0 are one). Full-range ones begin half a step below -1 and end half a step below 1;
    those of microscaling formats are E2M1's own, from -6 to 6.

    NormalFloat, as bitsandbytes makes it (the paper's Eq. 4 diverges at i = 0): 0, the normal quantiles of 2^(b-1)
    probabilities evenly spaced from delta towards 1/2, the negatives of 2^(b-1) - 1 made alike; divided by the largest.
    delta = 1 - (1/(2 * 2^b) + 1/(2 * (2^b - 1))) / 2: at 4 bits 1 - (1/32 + 1/30) / 2 = 0.9677083, the authors' offset,
    whose seven digits and fp32 steps are kept so that the levels are theirs to the last bit; for other widths this is
    the same rule, ours, not theirs. Worked: NF2 is -1, 0, 0.4358, 1.
    The tensor is shared: do not write to it. Raises ValueError for "affine", whose levels move with the zero point.
    """
    if format.kind == "affine":
        raise ValueError("format: the levels of 'affine' depend on the zero point of each group")
    if format.kind == "int-full":
        half = 2 ** (format.bits - 1)
        return torch.arange(-half, half).float() / (half - 0.5)
    if format.kind in MICROSCALING:
        return floats.levels()
    if format.kind == "nf":
        half = 2 ** (format.bits - 1)
        delta = round(1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2, 7)
        positive, negative = (
            torch.special.ndtri(torch.linspace(delta, 0.5, count + 1)[:-1].double()).float()
            for count in (half, half - 1)
        )
        ascending = torch.cat([-negative, torch.zeros(1), positive.flip(0)])
    else:
        magnitudes = torch.tensor(FLOAT_MAGNITUDES.get(format.kind) or range(2 ** (format.bits - 1))).float()
        ascending = torch.cat([-magnitudes.flip(0), magnitudes[1:]])
    return ascending / ascending.max()


@cache
def scale_levels() -> Tensor:
    """The 256 levels of double quantization, fp32, ascending: bitsandbytes' signed dynamic map. Do not write to it.

    Dynamic tree quantization (Dettmers 2016, arXiv 1511.04561, section 2): for each decade 10^(i-6), i = 0..6, the 2^i
    midpoints of even steps from 0.1 to 1, both signs; 0; and 1. The largest negative level is -0.993.
    """
    positive = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6))
    positive = torch.cat(positive)
    return torch.cat([-positive.flip(0), torch.zeros(1), positive, torch.ones(1)])


def _nearest(x: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """uint8 codes of the levels nearest to x / scale; a number midway goes to the lower level, as in bitsandbytes."""
    table = table.to(x.device)
    normal = x * (1 / scale.clamp_min(torch.finfo(torch.float32).tiny))
    return torch.bucketize(normal, (table[:-1] + table[1:]) / 2).to(torch.uint8)


def check_matrix(weight: Tensor, columns: int = 1) -> None:
    """Raise ValueError unless `weight` is a finite matrix [out, in] of at least so many columns."""
    if weight.ndim != 2 or weight.shape[1] < columns or not len(weight):
        raise ValueError(
            f"weight: the shape {list(weight.shape)} is not allowed; use [out, in] with at least {columns} columns"
        )
    if not torch.isfinite(weight).all():
        raise ValueError("weight: holds NaN or infinity; use finite numbers")


def encode(weight: Tensor, format: Format) -> Codes:
    """Round `weight` [out, in], of any floating type, to the nearest levels of each group.

    A group of zeros decodes to zeros. Under double quantization the codes are those of the exact scales, as in QLoRA,
    and scales that are far smaller than the others would turn negative, and their numbers change sign: they get the
    smallest scale that does not, except in formats that are bitsandbytes' to the bit.
    Raises ValueError where weight is no matrix or not finite, where the group does not divide `in`, or where a scale
    is too large for fp16 (scale_bits 16).
    """
    check_matrix(weight)
    rows, columns = weight.shape
    format.check_width(columns)
    weight, zeros = weight.detach().float(), None
    if format.kind in MICROSCALING:
        return floats.encode(weight, format.kind)
    low, table, outer, mean = 0, None, None, None
    if format.kind in INTEGER_FORMATS:
        low = format.grid.low
        integers = quantize(weight, format.grid)
        codes, scales = integers.codes.short() - low, integers.scale.flatten()
        if integers.zero is not None:
            zeros = pack(integers.zero, format.bits)
    else:
        groups, table = weight.reshape(-1, format.group or columns), levels(format)
        scales = groups.abs().amax(1)
        codes = _nearest(groups, scales[:, None], table)
    codes, scale_table = pack(codes, format.bits), None
    if format.double:
        scale_table = scale_levels()
        scales, outer, mean = _encode_scales(scales, negative=in_bitsandbytes(format))
    elif format.scale_bits == 16:
        largest, scales = scales.max().item(), scales.half()
        if not torch.isfinite(scales).all():
            raise ValueError(f"scale_bits: 16 is not allowed for a scale of {largest:.3g}, which fp16 lacks; use 32")
    further = {"outer": outer, "mean": mean, "levels": table, "scale_levels": scale_table}
    return Codes(format.bits, (rows, columns), codes, scales, low, zeros, **further)


def _encode_scales(scales: Tensor, negative: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization of fp32 scales [groups]: codes uint8 [groups], outer scales fp32, their mean fp32 [1].

    negative: leave scales that turn negative so, as bitsandbytes does.
    """
    mean = scales.mean().view(1)
    centred = F.pad(scales - mean, (0, -len(scales) % SCALES_IN_GROUP)).view(-1, SCALES_IN_GROUP)
    outer = centred.abs().amax(1)
    codes = _nearest(centred, outer[:, None], scale_levels())
    if not negative:
        decoded = scale_levels().to(scales.device) * outer[:, None] + mean  # as Codes.scale has it, so that signs agree
        codes = codes.maximum((decoded < 0).sum(1, keepdim=True).to(torch.uint8))
    return codes.flatten()[: len(scales)].clone(), outer, mean


def bits_per_parameter(format: Format, width: int | None = None) -> float:
    """Stored bits of one number; `width` is the length of a row, needed where a row is the group.

    Worked (QLoRA, section 3): NF4 in groups of 64: 4 + 32/64 = 4.5; with double quantization 4 + 8/64 + 32/(64 * 256)
    = 4.127, 0.373 less. MXFP4: 4 + 8/32 = 4.25; NVFP4: 4 + 8/16 = 4.5. One mean or outer scale of a whole
    weight, and what the last group of 256 lacks, are not counted.
    """
    group = format.group or width
    if group is None:
        raise ValueError("width: missing; a format with one scale an output channel needs the length of a row")
    scale = SCALE_CODE_BITS + 32 / SCALES_IN_GROUP if format.double else format.scale_bits
    scale = SCALE_CODE_BITS if format.kind in MICROSCALING else scale
    return format.bits + (scale + format.bits * (format.kind == "affine")) / group


class _Multiply(torch.autograd.Function):
    """x W^T with W decoded anew for either pass: nothing is kept but the layer itself. W gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "EncodedLinear") -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.codes().decode(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient @ ctx.layer.codes().decode(gradient.dtype), None


class _Decoded(Tensor):
    """A weight decoded for reading; writing to its `data`, as peft does to merge, would be lost and is refused."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ValueError("weight: an encoded layer cannot take another weight; use decode_model before merging")


INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.uint8: torch.uint8}
STORED = {integer: stored for stored, integer in INTEGERS.items()}


class EncodedLinear(nn.Linear):
    """A frozen linear layer that stores an encoded weight and decodes it whenever it computes.

    input [..., in] -> [..., out], in the input's type, or autocast's. Buffers "stored_...", named as in Codes: their
    bits seen as integers, so that `model.to(torch.bfloat16)` does not round scales. `weight`: decoded, in the type it
    had.
    """

    def __init__(self, linear: nn.Linear, format: Format):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.format, self.weight_dtype = format, linear.weight.dtype
        stored = encode(linear.weight, format)
        for name, tensor in stored.tensors.items():
            self.register_buffer(f"stored_{name}", tensor.view(INTEGERS[tensor.dtype]))
        self._tables: dict[str, Any] = {"low": stored.low, "levels": stored.levels, "scale_levels": stored.scale_levels}

    def codes(self) -> Codes:
        """The weight as it is stored; shares the memory of the buffers."""
        stored = {
            name.removeprefix("stored_"): buffer.view(STORED[buffer.dtype]) for name, buffer in self.named_buffers()
        }
        return Codes(self.format.bits, (self.out_features, self.in_features), **stored, **self._tables)

    def dense(self) -> Tensor:
        """The weight that the layer multiplies with, fp32 [out, in]."""
        return self.codes().decode()

    @property
    def weight(self) -> Tensor:
        return self.codes().decode(self.weight_dtype).as_subclass(_Decoded)

    def forward(self, x: Tensor) -> Tensor:
        y = _Multiply.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format.title}"


class _Rounded(torch.autograd.Function):
    """Forward: round to the format. Backward: the identity. What is not finite stays as it is: training then stops."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, format: Format) -> Tensor:
        return encode(weight, format).decode(weight.dtype) if weight.isfinite().all() else weight.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None


class RoundedLinear(nn.Linear):
    """A linear layer whose weight trains and is rounded to a number format, any of them, in every pass.

    input [..., in] -> [..., out]. Gradients go straight through the rounding (Bengio et al. 2013, arXiv 1308.3432);
    scales are those that `encode` finds anew. The parameters are those of the layer it replaces.
    """

    def __init__(self, linear: nn.Linear, format: Format):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = nn.Parameter(linear.weight.detach().clone()), linear.bias
        format.check_width(self.in_features)
        self.format, self.weight_dtype = format, linear.weight.dtype

    def codes(self) -> Codes:
        """The weight as it is stored. ValueError where it is not finite."""
        return encode(self.weight, self.format)

    def dense(self) -> Tensor:
        """The weight that the layer multiplies with, [out, in]."""
        return _Rounded.apply(self.weight, self.format)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format.title}"


def _replace(model: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.train(model.get_submodule(name).training))
    return model


def encode_model(model: nn.Module, format: Format) -> nn.Module:
    """Replace the decoder's linear layers in place by EncodedLinear; embeddings and lm_head stay.

    Raises ValueError, and changes nothing, where a layer cannot be encoded or is quantized already.
    """
    linears = decoder_linears(model)
    for name, linear in linears.items():
        if type(linear) is not nn.Linear:
            raise ValueError(f"{name}: {type(linear).__name__} cannot be encoded; load the model anew")
    return _replace(model, {name: EncodedLinear(linear, format) for name, linear in linears.items()})


def decode_model(model: nn.Module) -> nn.Module:
    """Put DeployedLinear with decoded weights in place of every EncodedLinear, below peft's adapters too, and of every
    RoundedLinear."""
    decoded = {}
    for name, layer in model.named_modules():
        if isinstance(layer, EncodedLinear | RoundedLinear):
            stored = layer.codes()
            decoded[name] = DeployedLinear(stored.decode(layer.weight_dtype), layer.bias, stored)
    return _replace(model, decoded)
