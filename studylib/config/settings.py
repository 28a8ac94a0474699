"""What a model is turned into: bit widths, grids, number formats, adapters, as frozen values that need no library."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from studylib.config.values import (
    check_flag,
    check_known,
    check_positive,
    check_share,
    check_whole,
    is_line,
    shown,
)

if TYPE_CHECKING:
    from torch import Tensor

MIN_BITS, MAX_BITS, OFF = 2, 8, 16
MAX_GROUP, MAX_RANK = 2**16, 1024


def check_bits(bits: Any, what: str = "bits") -> int:
    """Return `bits` if it is 2..8, or 16 (not quantized); else raise ValueError."""
    if type(bits) is not int or not (MIN_BITS <= bits <= MAX_BITS or bits == OFF):
        raise ValueError(f"{what}: {shown(bits)} is not allowed; use {MIN_BITS} to {MAX_BITS}, or {OFF} for off")
    return bits


@dataclass(frozen=True)
class BitWidths:
    """Bits of weights, activations and key/value cache, written "4-8-4"; 16 means not quantized."""

    weights: int
    activations: int
    cache: int

    def __post_init__(self) -> None:
        for name in ("weights", "activations", "cache"):
            check_bits(getattr(self, name), f"bits of the {name}")

    @classmethod
    def parse(cls, text: "str | BitWidths") -> "BitWidths":
        """From the papers' W-A-KV notation, e.g. "4-8-4"."""
        if isinstance(text, BitWidths):
            return text
        if not isinstance(text, str) or not re.fullmatch(r"(0|[1-9][0-9]?)(-(0|[1-9][0-9]?)){2}", text):
            raise ValueError(f"bit widths {shown(text)}: write weights-activations-cache, for example '4-8-4'")
        return cls(*map(int, text.split("-")))

    def __str__(self) -> str:
        return f"{self.weights}-{self.activations}-{self.cache}"


SYMMETRIC, ASYMMETRIC, FULL_RANGE, STATSQ, LSQ, PARETOQ = GRIDS = (
    "symmetric",
    "asymmetric",
    "full-range",
    "statsq",
    "lsq",
    "paretoq",
)
MIN_MAX = (SYMMETRIC, ASYMMETRIC, FULL_RANGE)  # grids from the numbers' own range
MXFP, NVFP = FLOATING = ("mxfp", "nvfp")  # grids of floats in blocks
FLOAT_BITS = {MXFP: (4, 6, 8), NVFP: (4, 8)}  # of activations and cache; weights have 4
LEARNED = (LSQ, PARETOQ)  # grids whose scales are trained
OF_WEIGHTS = (STATSQ, *LEARNED)  # grids of weights alone; activations and cache beside them are symmetric
BEFORE_ROTARY, AFTER_ROTARY = KEYS = ("before-rotary", "after-rotary")
PER_TOKEN, PER_HEAD = CACHE_SCALES = ("token", "head")


@dataclass(frozen=True)
class Grid:
    """Which integers, or floats, stand for a row of numbers, and how their scale is chosen.

    kind "symmetric": levels -(2^(b-1)-1)..2^(b-1)-1, scale = max|x| / (2^(b-1)-1), zero point 0 (LLM-QAT, Eq. 1:
    MinMax, nothing is clipped). Worked: 4 bits, row (-3.5, 1.2): scale 0.5, codes (-7, 2), values (-3.5, 1.0).
    "asymmetric": levels 0..2^b-1, scale = (max - min) / (2^b-1) over a range that includes 0, integer zero point, so
    that 0 is exact (padding, ReLU-like inputs). Worked: 4 bits, row (-1, 14): scale 1, zero point 1, codes (0, 15).
    "full-range": levels -2^(b-1)..2^(b-1)-1, scale = max|x| / (2^(b-1) - 1/2), zero point 0: all 2^b integers, as GPTQ
    and compressed-tensors have them. Worked: 4 bits, row (-3.75, 3.75): scale 0.5, codes (-8, 7): half a step is lost.
    "statsq": the symmetric levels over a range clipped at 2 mean|x| (StatsQ: Liu et al. 2023, arXiv 2302.02210).
    "lsq": the symmetric levels with a learned scale, numbers beyond them clipped (LSQ: Esser et al. 2020, Eq. 1-3); the
    scale starts where the squared error is least. "paretoq": the same, from max|x| / (2^(b-1)-1) (ParetoQ: Liu et al.
    2025, arXiv 2502.02631, section 3.2, which has it for 3 and 4 bits).
    "mxfp": E2M1, E2M3 or E4M3 at 4, 6 or 8 bits, with a power of two for each 32 (see Format, and quant.floats).
    "nvfp": NVFP4 at 4 bits, with one fp32 number a row besides; at 8 bits E4M3 with that alone.
    group: None for one scale a row, or the number of neighbours in a row that share a scale.
    """

    bits: int
    kind: str = SYMMETRIC
    group: int | None = None

    def __post_init__(self) -> None:
        if check_bits(self.bits) == OFF:
            raise ValueError(f"bits: a grid needs {MIN_BITS} to {MAX_BITS}; {OFF} (off) has no grid, leave it out")
        check_known("grid", self.kind, (*GRIDS, *FLOATING))
        check_group(self.group)
        if self.kind in FLOATING and (self.group is not None or self.bits not in FLOAT_BITS[self.kind]):
            choices = " or ".join(map(str, FLOAT_BITS[self.kind]))
            raise ValueError(
                f"bits: {self.bits} with group {self.group!r} is not allowed for the grid {self.kind!r}; use {choices} "
                "and leave the group out"
            )

    @property
    def block(self) -> int | None:
        """Neighbours that share a scale, for grids of floats; None for whole rows."""
        if self.kind == MXFP:
            return MICROSCALING["mxfp4"]
        return MICROSCALING["nvfp4"] if self.kind == NVFP and self.bits == 4 else None

    @property
    def symmetric(self) -> bool:
        return self.kind != ASYMMETRIC

    @property
    def low(self) -> int:
        if self.kind == FULL_RANGE:
            return -self.high - 1
        return -self.high if self.symmetric else 0

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def check_width(self, width: int) -> None:
        """Raise ValueError where the group, or the block, does not divide a row of `width` numbers."""
        check_width(self.block if self.kind in FLOATING else self.group, width)

    def rows(self, x: "Tensor") -> "Tensor":
        """`x` [..., D] viewed as [..., D // group, group] (as it is where a whole row shares a scale)."""
        if self.group is None:
            return x
        self.check_width(x.shape[-1])
        return x.unflatten(-1, (-1, self.group))


def check_group(group: Any) -> None:
    """Raise ValueError unless `group` is a whole number from 1 to MAX_GROUP, or None for whole rows."""
    if group is not None and (type(group) is not int or not 1 <= group <= MAX_GROUP):
        raise ValueError(
            f"group: {shown(group)} is not allowed; use a whole number from 1 to {MAX_GROUP}, or None for whole rows"
        )


def check_width(group: int | None, width: int) -> None:
    """Raise ValueError where `group` numbers that share a scale do not divide a row of `width` numbers."""
    if group is not None and width % group:
        raise ValueError(f"group: {group} does not divide the row length {width}")


@dataclass(frozen=True)
class Scheme:
    """How the numbers of a bit width are chosen and where they apply; the defaults are LLM-QAT's.

    grid: the kind of grid of weights, activations and cache (see Grid; OF_WEIGHTS are of weights alone, and the other
    two are symmetric then). activations: the kind of activations and cache where it is another one of MIN_MAX. group:
    how many input columns share a scale of the weights, None for one scale an output channel. cache_scale "token": one
    scale for a token's keys (or values) over all heads; "head": one for each of its heads. keys: quantized
    "before-rotary" or "after-rotary" embedding (values have none). rotated: numbers are rotated before they are
    rounded, and the model with them (see quant.rotation).
    """

    grid: str = SYMMETRIC
    group: int | None = None
    cache_scale: str = PER_TOKEN
    keys: str = BEFORE_ROTARY
    rotated: bool = False
    activations: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("grid", (*GRIDS, *FLOATING)), ("cache_scale", CACHE_SCALES), ("keys", KEYS)):
            check_known(name, getattr(self, name), allowed)
        check_group(self.group)
        if self.grid in FLOATING and (self.group, self.cache_scale) != (None, PER_TOKEN):
            raise ValueError(
                f"group: {self.group!r} with cache_scale {self.cache_scale!r} is not allowed for the grid "
                f"{self.grid!r}, whose blocks are its own; leave both out"
            )
        if self.activations is not None:
            check_known("activations", self.activations, MIN_MAX)
            if self.grid in FLOATING:
                raise ValueError(
                    f"activations: {self.activations!r} does not go with the floats of {self.grid!r}; leave it out"
                )
            if self.activations == self._usual:
                raise ValueError(f"activations: {self.activations!r} is what the grid {self.grid!r} has; leave it out")
        check_flag("rotated", self.rotated)
        if self.rotated and self.keys != BEFORE_ROTARY:
            raise ValueError(f"keys: {self.keys!r} does not go with rotated; its keys are quantized {BEFORE_ROTARY!r}")

    def check_widths(self, bits: BitWidths) -> None:
        """Raise ValueError for widths that the floats of the grid do not have."""
        if self.grid not in FLOATING:
            return
        allowed = FLOAT_BITS[self.grid]
        for name, width, have in (
            ("weights", bits.weights, allowed[:1]),
            ("activations", bits.activations, allowed),
            ("cache", bits.cache, allowed),
        ):
            if width not in (*have, OFF):
                choices = ", ".join(map(str, have))
                raise ValueError(
                    f"bits of the {name}: {width} is not allowed for the grid {self.grid!r}; use {choices} or {OFF}"
                )

    @property
    def on_the_fly(self) -> str:
        """The kind of grid of activations and cache."""
        return self.activations or self._usual

    @property
    def _usual(self) -> str:
        return SYMMETRIC if self.grid in OF_WEIGHTS else self.grid


DEFAULT_GROUP = 64
FLOATS = ("fp-e2m1", "fp-bnb", "fp-e3m0")
INTEGER_FORMATS = {"int": SYMMETRIC, "int-full": FULL_RANGE, "affine": ASYMMETRIC}  # formats that are a Grid
BITSANDBYTES = {"nf": "nf4", "fp-bnb": "fp4"}  # its names for our formats
BITSANDBYTES_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MICROSCALING = {"mxfp4": 32, "mxfp4-even": 32, "nvfp4": 16}  # formats of E2M1 whose groups have 8-bit float scales
FORMATS = ("nf", *FLOATS, *MICROSCALING, *INTEGER_FORMATS)


@dataclass(frozen=True)
class Format:
    """Which levels stand for the numbers of a block, and how its scale is stored.

    kind "nf": NormalFloat, levels at quantiles of the normal distribution (QLoRA, section 3), 2 to 4 bits.
    "fp-e2m1": sign, two exponent bits, one mantissa bit: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, over 6.
    "fp-bnb": what bitsandbytes, QLoRA's own library, calls FP4: E2M1 but for its smallest magnitude, which is
    0.0625/12 = 0.0052 of the largest in place of 0.5/6 = 0.0833.
    "fp-e3m0": sign, three exponent bits: 0 and the powers of two 0.25 to 16 and their negatives, over 16.
    "mxfp4": E2M1 with a power of two for each 32, in E8M0 (OCP Microscaling Formats 1.0, section 6.3: rounded down, so
    that what lies beyond 6 becomes 6). "mxfp4-even": the power of two that E2M1 would round the largest number to, as
    compressed-tensors has it. "nvfp4": E2M1 with a scale in E4M3 for each 16, and one fp32 number for all. Ties go to
    the even mantissa.
    "int": the symmetric integers -(2^(b-1)-1)..2^(b-1)-1. "int-full": all 2^b integers around 0. "affine": 2^b
    integers from min to max with a zero point of b bits, over a range that includes 0. 2, 3, 4 or 8 bits; see Grid for
    all three.
    group: neighbours in a row that share a scale (QLoRA calls them a block); None for one scale an output channel.
    double: scales are stored in 8 bits (QLoRA, section 3, "double quantization"). scale_bits: 32 or 16, the floating
    type of scales that are not.
    """

    kind: str
    bits: int = 4
    group: int | None = DEFAULT_GROUP
    double: bool = False
    scale_bits: int = 32

    def __post_init__(self) -> None:
        check_known("format", self.kind, FORMATS)
        allowed = (2, 3, 4, 8) if self.kind in INTEGER_FORMATS else (2, 3, 4) if self.kind == "nf" else (4,)
        if type(self.bits) is not int or self.bits not in allowed:
            choices = " or ".join(map(str, allowed))
            raise ValueError(f"bits: {shown(self.bits)} is not allowed for {self.kind!r}; use {choices}")
        check_group(self.group)
        check_flag("double", self.double)
        own = MICROSCALING.get(self.kind)
        if own and (self.group, self.double, self.scale_bits) != (own, False, 32):
            raise ValueError(
                f"group: {self.group!r}, double: {self.double} and scale_bits: {self.scale_bits} are not allowed for "
                f"{self.kind!r}; use group {own} and leave the others out"
            )
        if type(self.scale_bits) is not int or self.scale_bits not in (16, 32):
            raise ValueError(f"scale_bits: {shown(self.scale_bits)} is not allowed; use 16 or 32")
        if self.double and (self.group is None or self.scale_bits != 32):
            raise ValueError(
                f"double: True is not allowed with group {self.group!r} and scale_bits {self.scale_bits}; "
                "use a group and scale_bits 32"
            )

    @property
    def title(self) -> str:
        """For tables and figures, e.g. "NF4 + DQ" or "NF3, groups of 32"; groups of 64 and fp32 scales go unsaid."""
        name = {
            "nf": f"NF{self.bits}",
            "fp-e2m1": "FP4 (E2M1)",
            "fp-bnb": "FP4 (bitsandbytes)",
            "fp-e3m0": "FP4 (E3M0)",
            "mxfp4": "MXFP4",
            "mxfp4-even": "MXFP4 (even)",
            "nvfp4": "NVFP4",
            "int": f"Int{self.bits}",
            "int-full": f"full-range Int{self.bits}",
            "affine": f"affine Int{self.bits}",
        }[self.kind]
        group = "per channel" if self.group is None else f"groups of {self.group}"
        parts = [name + " + DQ" * self.double]
        parts += [group] * (self.group != MICROSCALING.get(self.kind, DEFAULT_GROUP))
        parts += ["16-bit scales"] * (self.scale_bits == 16)
        return ", ".join(parts)

    @property
    def grid(self) -> Grid:
        """The integer grid of INTEGER_FORMATS."""
        return Grid(self.bits, INTEGER_FORMATS[self.kind], self.group)

    def check_width(self, width: int) -> None:
        """Raise ValueError unless rows of `width` numbers can be cut into groups."""
        check_width(self.group, width)


def in_bitsandbytes(format: Format | None) -> bool:
    """Whether bitsandbytes stores it: NF4 and its own FP4, in its block sizes."""
    if format is None or format.bits != 4 or format.scale_bits != 32:
        return False
    return format.kind in BITSANDBYTES and format.group in BITSANDBYTES_BLOCKS


PLAIN, DORA, PISSA, LOFTQ = ADAPTER_KINDS = ("lora", "dora", "pissa", "loftq")
INT, FULL, AFFINE = INTEGER_FORMATS  # kinds of Format
INITS = ("l4q", "lsq+", "symmetric", "asymmetric")  # of L4Q's scales and offsets
ALL = "all"


@dataclass(frozen=True)
class Adapter:
    """What is trained beside the base: A [rank, in] and B [out, rank], W + alpha / rank * B A (LoRA, arXiv 2106.09685).

    kind, for "lora" and "qlora" only: "lora"; "dora", the rows' lengths learned by themselves (arXiv 2402.09353);
    "pissa", A and B start as the largest singular vectors and the base holds the rest (arXiv 2404.02948); "loftq", they
    start as the best correction of the rounding error (arXiv 2310.08659, Algorithm 1, 5 iterations).
    layers: "all" linear layers of the decoder, or the ends of their names joined by "+": "q_proj+v_proj".
    init, for "l4q" only: its first scales and offsets (see quant.initial_grid); None: those of the format, "l4q" for
    full-range integers and the affine grid for affine ones. dropout: of the adapter's input.
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    kind: str = PLAIN
    layers: str = ALL
    init: str | None = None

    def __post_init__(self) -> None:
        check_whole("rank", self.rank, 1, MAX_RANK)
        check_positive("alpha", self.alpha)
        check_share("dropout", self.dropout)
        check_known("kind", self.kind, ADAPTER_KINDS)
        if self.init is not None:
            check_known("init", self.init, INITS)
        check_layers(self.layers)

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


def check_layers(layers: Any) -> None:
    """Raise ValueError unless `layers` is "all", or ends of layers' names joined by "+", each once."""
    parts = layers.split("+") if isinstance(layers, str) else []
    if not parts or len(set(parts)) < len(parts) or not all(map(is_line, parts)):
        raise ValueError(
            f"layers: {shown(layers)} is not allowed; use {ALL!r}, or ends of layers' names joined by '+', each once: "
            "'q_proj+v_proj'"
        )


BESIDE, DEQUANTIZED, REQUANTIZED, MERGED_16, MERGED_QUANTIZED, MERGED_DISTILLED = MERGES = (
    "adapter",
    "dequantized",
    "requantized",
    "merged-16",
    "merged-quantized",
    "merged-distilled",
)  # how a fine-tuned model is deployed (see methods.merge)
AT_ONCE = MERGES[:-1]  # without further training
FROM_ORIGINAL = (MERGED_16, MERGED_QUANTIZED, MERGED_DISTILLED)
PACKED = (REQUANTIZED, MERGED_QUANTIZED, MERGED_DISTILLED)
