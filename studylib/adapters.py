"""Fine-tuning on low-bit weights: LoRA, QLoRA and the methods between it and L4Q, on an unmodified transformers model.

peft and bitsandbytes do what they do well and are imported where they are used: the imports take seconds.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studylib import models
from studylib.formats import EncodedLinear, Format, encode, encode_model
from studylib.l4q import INITS, initial_grid, l4q_model, levels_of
from studylib.layers import Scheme, decoder_linears, quantize_model
from studylib.ptq import gptq

LORA, QLORA, QA_LORA, QAT_LORA, L4Q, GPTQ_LORA, QAT = METHODS = (
    "lora",
    "qlora",
    "qa-lora",
    "qat-lora",
    "l4q",
    "gptq+lora",
    "qat",
)
PLAIN, DORA, PISSA, LOFTQ = KINDS = ("lora", "dora", "pissa", "loftq")
FORMATS = {
    QA_LORA: ("affine",),
    QAT_LORA: ("affine",),
    L4Q: ("affine",),
    GPTQ_LORA: ("int", "affine"),
    QAT: ("int", "affine"),
}
ALL = "all"
ADAPTER = "default"  # peft's name for the only adapter of a model
LOFTQ_STEPS = 5  # LoftQ, section 4: "we perform 5 iterations"
OVERSAMPLED = 8  # directions more than the rank, for the accuracy of the last ones
BITSANDBYTES = {"nf": "nf4", "fp-bnb": "fp4"}  # its names for our formats
BITSANDBYTES_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
PAGED_ADAMW = "paged_adamw_32bit"  # transformers' name for bitsandbytes' AdamW whose states are paged to the CPU


@dataclass(frozen=True)
class Adapter:
    """What is trained beside the base: A [rank, in] and B [out, rank], W + alpha / rank * B A (LoRA, arXiv 2106.09685).

    kind, for "lora" and "qlora" only: "lora"; "dora", the rows' lengths learned by themselves (arXiv 2402.09353);
    "pissa", A and B start as the largest singular vectors and the base holds the rest (arXiv 2404.02948); "loftq", they
    start as the best correction of the rounding error (arXiv 2310.08659, Algorithm 1, 5 iterations).
    layers: "all" linear layers of the decoder, or the ends of their names joined by "+": "q_proj+v_proj".
    init, for "l4q" only: its first scales and offsets (see l4q). dropout: of the adapter's input.
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    kind: str = PLAIN
    layers: str = ALL
    init: str = "l4q"

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank: {self.rank!r} is not allowed; use 1 or more")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha: {self.alpha!r} is not allowed; use a number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout!r} is not allowed; use a share from 0 to below 1")
        for name, allowed in (("kind", KINDS), ("init", INITS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not known; use one of {', '.join(allowed)}")

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Adaptation:
    """What `attach` made of a model, which keeps it as `model.adaptation`; layers: the decoder's linear layers."""

    method: str
    format: Format | None
    adapter: Adapter | None
    layers: tuple[str, ...]


class QALoRALinear(nn.Module):
    """QA-LoRA (Xu et al., arXiv 2309.14717): an adapter that can be merged into the zero points of the base.

    input [..., in] -> [..., out]: base(x) + scaling * B A pool(x), A [rank, in // group], B [out, rank]. pool sums the
    inputs of each group, as the paper's Algorithm 1 does (AvgPool1d times the group's size); its authors' code leaves
    the average, which is the same at alpha / group.
    """

    def __init__(self, base: EncodedLinear, adapter: Adapter):
        super().__init__()
        self.base, self.scaling, self.dropout = base, adapter.scaling, nn.Dropout(adapter.dropout)
        self.group = base.format.block or base.in_features
        device = base.codes.device
        self.lora_A = nn.Parameter(torch.empty(adapter.rank, base.in_features // self.group, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, adapter.rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        pooled = self.dropout(x).unflatten(-1, (-1, self.group)).sum(-1, dtype=self.lora_A.dtype)
        return y + (self.scaling * F.linear(F.linear(pooled, self.lora_A), self.lora_B)).to(y.dtype)

    def merged(self) -> Tensor:
        """The weight of base and adapter, fp32 [out, in]: codes and scales of the base with other zero points.

        scale * (code - zero) + D = scale * (code - (zero - D / scale)), D = scaling * B A being one number a group.
        """
        change = self.scaling * self.lora_B @ self.lora_A
        return self.base.encoded.decode(change.dtype) + change.repeat_interleave(self.group, 1)


class LearnedGridLinear(nn.Linear):
    """A frozen weight rounded to a grid whose scale and offset are learned, as the base of QAT-LoRA (L4Q, section 4).

    W_q = s round(clamp((W - b) / s, -2^(bits-1), 2^(bits-1) - 1)) + b with s, b [out, in // group, 1] that start as
    L4Q's do; gradients through the rounding as in LSQ (Esser et al. 2020). Unlike L4Q's, this backward pass is plain
    autograd and keeps tensors of the weight's size.
    """

    def __init__(self, linear: nn.Linear, bits: int, group: int | None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.bits = linear.weight, linear.bias, bits
        computed_with = linear.weight.detach().to(models.compute_dtype())
        scale, offset = initial_grid(computed_with, bits, group)
        self.scale, self.offset = nn.Parameter(scale), nn.Parameter(offset)

    def quantized_weight(self) -> Tensor:
        """The weight that the layer multiplies with, [out, in]."""
        low, high = levels_of(self.bits)
        w = self.weight.to(self.scale.dtype).unflatten(1, (self.scale.shape[1], -1))
        w = ((w - self.offset) / self.scale).clamp(low, high)
        return ((w + (w.round() - w).detach()) * self.scale + self.offset).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantized_weight(), self.bias)


def attach(
    model: nn.Module,
    method: str,
    *,
    format: Format | None = None,
    adapter: Adapter | None = None,
    seed: int = 0,
    tokens: Tensor | None = None,
) -> nn.Module:
    """Prepare a transformers model (fp32, as loaded) in place for fine-tuning; what requires gradients is what trains.

    "lora": 16-bit base. "qlora": base in `format`, through bitsandbytes for NF4 and its FP4. "qa-lora": see
    QALoRALinear. "qat-lora": see LearnedGridLinear. "l4q": see l4q. "gptq+lora": base rounded by GPTQ, calibrated on
    tokens [N, T]. "qat": all linear weights of the decoder train, rounded to `format` in every pass; no adapter.
    Trained parameters are fp32; frozen ones bf16 where the hardware computes in bf16: run it under models.autocast.
    Raises ValueError, and changes nothing, for anything that does not fit together.
    """
    linears = decoder_linears(model)
    if hasattr(model, "adaptation") or any(type(linear) is not nn.Linear for linear in linears.values()):
        raise ValueError("the model is quantized or adapted already; load it anew")
    check(method, format, adapter)
    if (tokens is None) == (method == GPTQ_LORA):
        raise ValueError(
            f"tokens: {'missing; GPTQ calibrates on them' if tokens is None else f'{method!r} takes none'}"
        )
    names = [] if adapter is None else adapted_layers(model, adapter.layers)
    for name, linear in linears.items():
        if format is not None:
            format.check_width(linear.in_features)
        if adapter is not None and adapter.kind in (PISSA, LOFTQ) and adapter.rank > min(linear.weight.shape):
            raise ValueError(
                f"rank: {adapter.rank} is not allowed with {adapter.kind!r}; {name} has {min(linear.weight.shape)} "
                "singular values"
            )
    model.requires_grad_(False)
    if method == L4Q:
        _compact(model)  # before scales are chosen: a weight that bf16 rounds up must not fall off its grid
    if method in (LORA, QLORA):
        _attach_lora(model, format, adapter, names, seed)
    elif method == QA_LORA:
        encode_model(model, format)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for name in names:
                model.set_submodule(name, QALoRALinear(model.get_submodule(name), adapter))
    elif method == QAT_LORA:
        for name, linear in linears.items():
            model.set_submodule(name, LearnedGridLinear(linear, format.bits, format.block))
        _inject(model, adapter, names, seed)
        for module in model.modules():
            if isinstance(module, LearnedGridLinear):
                module.scale.requires_grad_(True)
                module.offset.requires_grad_(True)
    elif method == L4Q:
        l4q_model(
            model,
            format.bits,
            group=format.block,
            rank=adapter.rank,
            alpha=adapter.alpha,
            init=adapter.init,
            seed=seed,
        )
    elif method == GPTQ_LORA:
        gptq(model, f"{format.bits}-16-16", tokens, format.block, symmetric=format.kind == "int")
        _inject(model, adapter, names, seed)
    else:
        quantize_model(model, f"{format.bits}-16-16", Scheme(format.grid.kind, format.block))
        for linear in linears.values():
            linear.weight.requires_grad_(True)
    _compact(model)
    model.adaptation = Adaptation(method, format, adapter, tuple(linears))
    return model


def _compact(model: nn.Module) -> None:
    """Put what is frozen into the type that is computed in."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(models.compute_dtype())


def check(method: str, format: Format | None, adapter: Adapter | None) -> None:
    """Raise ValueError unless method, format and adapter go together."""
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is not known; use one of {', '.join(METHODS)}")
    if (format is None) != (method == LORA):
        raise ValueError(f"format: {'missing' if format is None else format.title + ' is not allowed'} for {method!r}")
    if (adapter is None) != (method == QAT):
        raise ValueError(f"adapter: {'missing' if adapter is None else 'not allowed'} for {method!r}")
    if method in FORMATS:
        if format.kind not in FORMATS[method]:
            raise ValueError(
                f"format: {format.kind!r} is not allowed for {method!r}; use {' or '.join(map(repr, FORMATS[method]))}"
            )
        if format.double or format.scale_bits != 32:
            raise ValueError(f"format: {format.title} is not allowed for {method!r}; use fp32 scales")
    if adapter is None:
        return
    for name, allowed, given, default in (
        ("kind", (LORA, QLORA), adapter.kind, PLAIN),
        ("init", (L4Q,), adapter.init, "l4q"),
        ("dropout", tuple(m for m in METHODS if m != L4Q), adapter.dropout, 0),
        ("layers", tuple(m for m in METHODS if m != L4Q), adapter.layers, ALL),
    ):
        if given != default and method not in allowed:
            raise ValueError(f"{name}: {given!r} is not allowed for {method!r}; use {default!r}")
    if method == LORA and adapter.kind == LOFTQ:
        raise ValueError(f"kind: {LOFTQ!r} is not allowed for {LORA!r}, whose base has no rounding error; use 'qlora'")


def usual_format(method: str, bits: int = 4, block: int | None = 64, double: bool = True) -> Format | None:
    """How a method keeps its base by default: NormalFloat for "qlora", `double` quantized or not, integers for others.

    Raises ValueError for bits or a block that the format does not have.
    """
    if method == LORA:
        return None
    return Format("nf", bits, block, double) if method == QLORA else Format("affine", bits, block)


def adapted_layers(model: nn.Module, layers: str) -> list[str]:
    """The names of the decoder's linear layers that `layers` (see Adapter) means; ValueError for an end of none."""
    names = list(decoder_linears(model))
    if layers == ALL:
        return names
    ends = tuple(layers.split("+"))
    for end in ends:
        if not any(f".{name}".endswith(f".{end}") for name in names):
            have = sorted({name.rpartition(".")[2] for name in names})
            raise ValueError(
                f"layers: the model has no {end!r}; use {ALL!r}, or some of {', '.join(have)} joined by '+'"
            )
    return [name for name in names if f".{name}".endswith(tuple(f".{end}" for end in ends))]


def _attach_lora(model: nn.Module, format: Format | None, adapter: Adapter, names: list[str], seed: int) -> None:
    """LoRA by peft on a base in `format`, in 16 bits if that is None, with the first A and B of the adapter's kind."""
    factors = {}
    for name, linear in decoder_linears(model).items():
        if adapter.kind in (PISSA, LOFTQ) and name in names:
            rest, *factors[name] = split(linear.weight.detach(), format, adapter)
            linear.weight.data = rest
        if format is not None:
            stored = _four_bit(linear, format) if in_bitsandbytes(format) else EncodedLinear(linear, format)
            model.set_submodule(name, stored)
    _inject(model, adapter, names, seed)
    for name, (a, b) in factors.items():
        layer = model.get_submodule(name)
        layer.lora_A[ADAPTER].weight.data.copy_(a)
        layer.lora_B[ADAPTER].weight.data.copy_(b)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.compute_dtype = models.compute_dtype()  # not earlier: peft makes its adapters in this type


@torch.no_grad()
def split(weight: Tensor, format: Format | None, adapter: Adapter) -> tuple[Tensor, Tensor, Tensor]:
    """Share `weight` [out, in] between base and adapter before training: the base to be rounded, A and B, all fp32.

    "pissa": W = base + scaling B A with the largest singular values in B A. "loftq": rounding W - scaling B A and
    taking scaling B A from what the rounding left, in turn (LoftQ, Algorithm 1).
    """
    weight, product = weight.float(), 0.0
    if adapter.kind == PISSA:
        product, a, b = _largest(weight, adapter)
        return weight - product, a, b
    for _ in range(LOFTQ_STEPS):
        base = weight - product
        product, a, b = _largest(weight - encode(base, format).decode(), adapter)
    return base, a, b


def _largest(weight: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor, Tensor]:
    """The singular values that a rank of `adapter.rank` leaves room for, and the A, B that make them: scaling B A.

    By randomized iteration (Halko et al. 2011), 4 of them as in PiSSA's fast mode: ten times faster than the whole
    decomposition, and the same result whenever it is called.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(weight, min(adapter.rank + OVERSAMPLED, *weight.shape), niter=4)
    root = (s[: adapter.rank] / adapter.scaling).sqrt()
    a, b = root[:, None] * v.T[: adapter.rank], u[:, : adapter.rank] * root
    return adapter.scaling * b @ a, a, b


def in_bitsandbytes(format: Format) -> bool:
    """Whether bitsandbytes stores it: NF4 and its own FP4, in its block sizes."""
    known = format.bits == 4 and format.kind in BITSANDBYTES and format.block in BITSANDBYTES_BLOCKS
    return known and format.scale_bits == 32


def _four_bit(linear: nn.Linear, format: Format) -> nn.Linear:
    """bitsandbytes' Linear4bit with the rounded weight of `linear`."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, device="meta")
    layer.weight = Params4bit(
        linear.weight.detach().contiguous(),
        blocksize=format.block,
        compress_statistics=format.double,
        quant_type=BITSANDBYTES[format.kind],
        module=layer,
    ).to(linear.weight.device)  # this rounds
    layer.bias = linear.bias
    # Else the first forward pass in eval mode would repack the codes for a kernel without gradients, for good.
    layer.support_avx512bf16_for_cpu = False
    return layer


def _inject(model: nn.Module, adapter: Adapter, names: list[str], seed: int) -> None:
    """peft's LoRA on the named layers, in place; A is drawn by `seed`, the same for every base."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=names,
        use_dora=adapter.kind == DORA,
    )
    model.is_loaded_in_4bit = True  # peft then looks for bitsandbytes' layers
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER)
    del model.is_loaded_in_4bit


def check_paging() -> None:
    """Raise ValueError where there is no CUDA, which pages PAGED_ADAMW's states between GPU and CPU memory."""
    if not torch.cuda.is_available():
        raise ValueError("optimizer: paging needs CUDA, and there is none here; use AdamW without paging")
