"""Weight-only number formats with a scale for each block: NormalFloat, 4-bit floats, integers; stored in real bytes.

QLoRA (arXiv 2305.14314), section 3: a weight is cut into blocks, each is divided by its largest magnitude, and every
number becomes the code of the nearest of 2^b levels in -1..1. Double quantization stores the scales in 8 bits as well.
"""

import math
from dataclasses import dataclass, fields
from functools import cache

import torch
from scipy.stats import shapiro
from torch import Tensor, nn
from torch.nn import functional as F

from studylib.layers import decoder_linears
from studylib.memory import FLOAT_BYTES
from studylib.quantizers import Grid, Quantized, quantize

FLOAT_MAGNITUDES = {
    "fp-e2m1": (0, 0.5, 1, 1.5, 2, 3, 4, 6),
    "fp-bnb": (0, 0.0625, 2, 3, 4, 6, 8, 12),
    "fp-e3m0": (0, 0.25, 0.5, 1, 2, 4, 8, 16),
}
GRIDS = {"int": "symmetric", "affine": "asymmetric"}  # formats that are a quantizers.Grid
KINDS = ("nf", *FLOAT_MAGNITUDES, *GRIDS)
DEFAULT_BLOCK = 64
SCALES_IN_BLOCK, SCALE_CODE_BITS = 256, 8  # double quantization: 8 bits a scale, one fp32 number for 256 scales
SHAPIRO_LIMIT = 5000  # numbers up to which the p-values of the Shapiro-Wilk test are accurate


@dataclass(frozen=True)
class Format:
    """Which levels stand for the numbers of a block, and how its scale is stored.

    kind "nf": NormalFloat, levels at quantiles of the normal distribution (QLoRA, section 3), 2 to 4 bits.
    "fp-e2m1": sign, two exponent bits, one mantissa bit: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, over 6.
    "fp-bnb": what bitsandbytes, QLoRA's own library, calls FP4: E2M1 but for its smallest magnitude, which is
    0.0625/12 = 0.0052 of the largest in place of 0.5/6 = 0.0833.
    "fp-e3m0": sign, three exponent bits: 0 and the powers of two 0.25 to 16 and their negatives, over 16.
    "int": the symmetric integers -(2^(b-1)-1)..2^(b-1)-1. "affine": 2^b integers from min to max with a zero point of b
    bits, over a range that includes 0 (see quantizers.Grid for both); 2, 3, 4 or 8 bits.
    block: neighbours in a row that share a scale; None for one scale an output channel. double: scales are stored in 8
    bits (QLoRA, section 3, "double quantization"). scale_bits: 32 or 16, the floating type of scales that are not.
    """

    kind: str
    bits: int = 4
    block: int | None = DEFAULT_BLOCK
    double: bool = False
    scale_bits: int = 32

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"format: {self.kind!r} is not known; use one of {', '.join(KINDS)}")
        allowed = (2, 3, 4, 8) if self.kind in GRIDS else (2, 3, 4) if self.kind == "nf" else (4,)
        if type(self.bits) is not int or self.bits not in allowed:
            choices = " or ".join(map(str, allowed))
            raise ValueError(f"bits: {self.bits!r} is not allowed for {self.kind!r}; use {choices}")
        if self.block is not None and (type(self.block) is not int or self.block < 1):
            raise ValueError(f"block: {self.block!r} is not allowed; use a positive integer, or None for whole rows")
        if self.scale_bits not in (16, 32):
            raise ValueError(f"scale_bits: {self.scale_bits!r} is not allowed; use 16 or 32")
        if self.double and (self.block is None or self.scale_bits != 32):
            raise ValueError(
                f"double: True is not allowed with block {self.block!r} and scale_bits {self.scale_bits}; "
                "use a block and scale_bits 32"
            )

    @property
    def title(self) -> str:
        """For tables and figures, e.g. "NF4 + DQ" or "NF3, block 32"; a block of 64 and fp32 scales go unsaid."""
        name = {
            "nf": f"NF{self.bits}",
            "fp-e2m1": "FP4 (E2M1)",
            "fp-bnb": "FP4 (bitsandbytes)",
            "fp-e3m0": "FP4 (E3M0)",
            "int": f"Int{self.bits}",
            "affine": f"affine Int{self.bits}",
        }[self.kind]
        block = "per channel" if self.block is None else f"block {self.block}"
        parts = [name + " + DQ" * self.double]
        parts += [block] * (self.block != DEFAULT_BLOCK) + ["16-bit scales"] * (self.scale_bits == 16)
        return ", ".join(parts)

    @property
    def grid(self) -> Grid:
        """The integer grid of "int" and "affine"."""
        return Grid(self.bits, GRIDS[self.kind], self.block)

    def check_width(self, width: int) -> None:
        """Raise ValueError unless rows of `width` numbers can be cut into blocks."""
        if width % (self.block or width):
            raise ValueError(f"block: {self.block} does not divide the input width {width}")


@cache
def levels(format: Format) -> Tensor:
    """The levels in -1..1, fp32, ascending: 2^b of NormalFloat, 2^b - 1 of floats and integers (+0 and -0 are one).

    NormalFloat, as bitsandbytes makes it (the paper's Eq. 4 diverges at i = 0): 0, the normal quantiles of 2^(b-1)
    probabilities evenly spaced from delta towards 1/2, the negatives of 2^(b-1) - 1 made alike; divided by the largest.
    delta = 1 - (1/(2 * 2^b) + 1/(2 * (2^b - 1))) / 2: at 4 bits 1 - (1/32 + 1/30) / 2 = 0.9677083, the authors' offset,
    whose seven digits and fp32 steps are kept so that the levels are theirs to the last bit; for other widths this is
    the same rule, ours, not theirs. Worked: NF2 is -1, 0, 0.4358, 1.
    The tensor is shared: do not write to it. Raises ValueError for "affine", whose levels move with the zero point.
    """
    if format.kind == "affine":
        raise ValueError("format: the levels of 'affine' depend on the zero point of each block")
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


def _look_up(codes: Tensor, table: Tensor) -> Tensor:
    return table.to(codes.device).index_select(0, codes.flatten().int())


def _word(bits: int) -> tuple[int, int]:
    """How many codes fill how many whole bytes: 2 and 1 at four bits, 8 and 3 at three bits."""
    shared = math.gcd(bits, 8)
    return 8 // shared, bits // shared


def _shifts(count: int, width: int, like: Tensor) -> Tensor:
    """Bit positions of `count` fields of `width` bits, the first one highest."""
    return torch.arange(count - 1, -1, -1, dtype=like.dtype, device=like.device) * width


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits, of any shape, `bits` bits each, first code in the highest bits: uint8 [ceil(n * bits / 8)].

    Worked: codes 1, 2, 3 at 4 bits: 0x12, 0x30. At 4 bits these are the bytes of bitsandbytes.
    """
    per, width = _word(bits)
    size = math.ceil(codes.numel() * bits / 8)
    codes = F.pad(codes.flatten().int(), (0, -codes.numel() % per)).view(-1, per)
    word = (codes << _shifts(per, bits, codes)).sum(1, keepdim=True, dtype=torch.int32)
    return ((word >> _shifts(width, 8, word)) & 255).to(torch.uint8).flatten()[:size]


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of `pack`, uint8 [count]."""
    per, width = _word(bits)
    word = F.pad(packed, (0, -len(packed) % width)).view(-1, width)
    if width > 1:
        word = (word.int() << _shifts(width, 8, word.int())).sum(1, keepdim=True, dtype=torch.int32)
    return ((word >> _shifts(per, bits, word)) & (2**bits - 1)).to(torch.uint8).flatten()[:count]


@dataclass(frozen=True)
class Encoded:
    """A weight [out, in] as it is stored; `nbytes` are the bytes of its tensors.

    codes: uint8, packed (see `pack`). scales [blocks]: fp32 or fp16, the largest magnitude of a block (its step for
    "int" and "affine"); under double quantization uint8 codes of scale_levels(), the number being
    level * outer + mean with outer fp32 [ceil(blocks / 256)] and mean fp32 [1]. zeros: packed zero points ("affine").
    """

    format: Format
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    outer: Tensor | None = None
    mean: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def _scales(self) -> Tensor:
        if self.mean is None:
            return self.scales.float()
        outer = self.outer.repeat_interleave(SCALES_IN_BLOCK)[: len(self.scales)]
        return _look_up(self.scales, scale_levels()) * outer + self.mean

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that the codes stand for, [out, in], computed in fp32."""
        rows, columns = self.shape
        scales = self._scales()
        codes = unpack(self.codes, self.format.bits, rows * columns)
        if self.format.kind not in GRIDS:
            values = _look_up(codes, levels(self.format)).view(len(scales), -1) * scales[:, None]
            return values.view(self.shape).to(dtype)
        by_row = (rows, 1) if self.format.block is None else (rows, -1, 1)
        zeros = self.zeros
        if zeros is not None:
            zeros = unpack(zeros, self.format.bits, len(scales)).float().view(by_row)
        grid = self.format.grid
        integers = (codes.short() + grid.low).view(self.shape)
        return Quantized(integers, scales.view(by_row), zeros, grid).dequantize(dtype)


def _check_matrix(weight: Tensor, columns: int = 1) -> None:
    if weight.ndim != 2 or weight.shape[1] < columns or not len(weight):
        raise ValueError(
            f"weight: the shape {list(weight.shape)} is not allowed; use [out, in] with at least {columns} columns"
        )
    if not torch.isfinite(weight).all():
        raise ValueError("weight: holds NaN or infinity; use finite numbers")


def encode(weight: Tensor, format: Format) -> Encoded:
    """Round `weight` [out, in], of any floating type, to the nearest levels of each block.

    A block of zeros decodes to zeros. Under double quantization the codes are those of the exact scales, as in QLoRA.
    Raises ValueError where weight is no matrix or not finite, where the block does not divide `in`, or where a scale
    is too large for fp16 (scale_bits 16).
    """
    _check_matrix(weight)
    rows, columns = weight.shape
    format.check_width(columns)
    weight, zeros = weight.detach().float(), None
    if format.kind in GRIDS:
        integers = quantize(weight, format.grid)
        codes, scales = integers.codes.short() - format.grid.low, integers.scale.flatten()
        if integers.zero is not None:
            zeros = pack(integers.zero, format.bits)
    else:
        blocks = weight.reshape(-1, format.block or columns)
        scales = blocks.abs().amax(1)
        codes = _nearest(blocks, scales[:, None], levels(format))
    codes, outer, mean = pack(codes, format.bits), None, None
    if format.double:
        scales, outer, mean = _encode_scales(scales)
    elif format.scale_bits == 16:
        largest, scales = scales.max().item(), scales.half()
        if not torch.isfinite(scales).all():
            raise ValueError(f"scale_bits: 16 is not allowed for a scale of {largest:.3g}, which fp16 lacks; use 32")
    return Encoded(format, (rows, columns), codes, scales, zeros, outer, mean)


def _encode_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization of fp32 scales [blocks]: codes uint8 [blocks], outer scales fp32, their mean fp32 [1]."""
    mean = scales.mean().view(1)
    centred = F.pad(scales - mean, (0, -len(scales) % SCALES_IN_BLOCK)).view(-1, SCALES_IN_BLOCK)
    outer = centred.abs().amax(1)
    return _nearest(centred, outer[:, None], scale_levels()).flatten()[: len(scales)].clone(), outer, mean


def bits_per_parameter(format: Format, width: int | None = None) -> float:
    """Stored bits of one number; `width` is the length of a row, needed where a row is the block.

    Worked (QLoRA, section 3): NF4 in blocks of 64: 4 + 32/64 = 4.5; with double quantization 4 + 8/64 + 32/(64 * 256)
    = 4.127, 0.373 less. The one mean of a weight's scales and what the last block of 256 lacks are not counted.
    """
    block = format.block or width
    if block is None:
        raise ValueError("width: missing; a format with one scale an output channel needs the length of a row")
    scale = SCALE_CODE_BITS + 32 / SCALES_IN_BLOCK if format.double else format.scale_bits
    return format.bits + (scale + format.bits * (format.kind == "affine")) / block


class _Multiply(torch.autograd.Function):
    """x W^T with W decoded anew for either pass: nothing is kept but the layer itself. W gets no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "EncodedLinear") -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.encoded.decode(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient @ ctx.layer.encoded.decode(gradient.dtype), None


class _Decoded(Tensor):
    """A weight decoded for reading; writing to its `data`, as peft does to merge, would be lost and is refused."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor):
        raise ValueError("weight: an encoded layer cannot take another weight; use decode_model before merging")


INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.uint8: torch.uint8}
STORED = {integer: stored for stored, integer in INTEGERS.items()}


class EncodedLinear(nn.Linear):
    """A frozen linear layer that stores an encoded weight and decodes it whenever it computes.

    input [..., in] -> [..., out], in the input's type, or autocast's. Buffers, named as in Encoded: their bits seen as
    integers, so that `model.to(torch.bfloat16)` does not round scales. `weight`: decoded, in the type that it had.
    """

    def __init__(self, linear: nn.Linear, format: Format):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.format, self.weight_dtype = format, linear.weight.dtype
        for name, tensor in encode(linear.weight, format).tensors.items():
            self.register_buffer(name, tensor.view(INTEGERS[tensor.dtype]))

    @property
    def encoded(self) -> Encoded:
        """The weight as it is stored; shares the memory of the buffers."""
        stored = {name: buffer.view(STORED[buffer.dtype]) for name, buffer in self.named_buffers()}
        return Encoded(self.format, (self.out_features, self.in_features), **stored)

    @property
    def weight(self) -> Tensor:
        return self.encoded.decode(self.weight_dtype).as_subclass(_Decoded)

    def forward(self, x: Tensor) -> Tensor:
        y = _Multiply.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

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
    """Put nn.Linear with frozen, decoded weights in place of every EncodedLinear, below peft's adapters too."""
    decoded = {}
    for name, layer in model.named_modules():
        if isinstance(layer, EncodedLinear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(layer.encoded.decode(layer.weight_dtype), requires_grad=False)
            linear.bias = layer.bias
            decoded[name] = linear
    return _replace(model, decoded)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters: encoded weights as they are stored, all else at 16 bits (tied ones once).

    Worked: an NF4 layer [64, 64] with a bias: 2048 + 64 * 4 for the weight, 128 for the bias.
    """
    encoded = sum(layer.encoded.nbytes for layer in model.modules() if isinstance(layer, EncodedLinear))
    return encoded + sum(parameter.numel() * FLOAT_BYTES for parameter in model.parameters())


def non_normal_share(weight: Tensor, level: float = 0.05) -> float:
    """The share of the rows (output neurons) of `weight` [out, in] that fail the Shapiro-Wilk test at `level`.

    QLoRA, appendix F, tests LLaMA-7B's neurons so: 7.5% fail at 5%, where 5% of exactly normal ones would. Of a row of
    more than 5000 numbers, for which the test's p-values are not accurate, every k-th is used, with the least k that
    leaves at most 5000. A row of equal numbers fails.
    Raises ValueError for a weight that is no matrix, not finite, or has rows of fewer than 3 numbers.
    """
    _check_matrix(weight, columns=3)
    if not 0 < level < 1:
        raise ValueError(f"level: {level!r} is not allowed; use a number between 0 and 1")
    rows = weight.detach().double().cpu()[:, :: math.ceil(weight.shape[1] / SHAPIRO_LIMIT)]
    varied = rows[rows.amin(1) < rows.amax(1)]
    passed = (shapiro(varied.numpy(), axis=1).pvalue >= level).sum() if len(varied) else 0
    return 1 - float(passed) / len(rows)
