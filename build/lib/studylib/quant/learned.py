"""Layers whose grid is learned or takes an adapter in: L4Q's, QAT-LoRA's, QA-LoRA's and those of learned steps.

L4Q: a weight, its adapter and its grid are trained as one, so that only integers are deployed.

Jeon et al., "L4Q: Parameter Efficient Quantization-Aware Fine-Tuning on Large Language Models" (arXiv 2402.04902).
With W = W0 + scaling * B A (W0 frozen), and a scale s and an offset b for each group of neighbours in a row of W,

    w = (W - b) / s,    w~ = round(clamp(w, QN, QP)),    Wq = s w~ + b,    Y = X Wq^T.

Trained are A, B, s and b. QN = -2^(bits-1) and QP = 2^(bits-1) - 1, so -8..7 at 4 bits.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studylib.config import AFFINE, ASYMMETRIC, INITS, Adapter, Grid, check_known
from studylib.quant.grids import choose_scale
from studylib.quant.layers import decoder_linears
from studylib.quant.storage import Codes

BITS = (2, 3, 4, 8)


def levels_of(bits: int) -> tuple[int, int]:
    """The smallest and the largest integer, QN and QP: -8 and 7 at 4 bits. ValueError for bits that are not allowed."""
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"bits: {bits!r} is not allowed; use one of {', '.join(map(str, BITS))}")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def initial_grid(weight: Tensor, bits: int, group: int | None, init: str = "l4q") -> tuple[Tensor, Tensor]:
    """The first scales and offsets of a weight [out, in]: both [out, in // group, 1], fp32 (fp64 for fp64 weights).

    With the minimum, maximum, mean mu and (population) standard deviation sd of each group, the paper's four (L4Q,
    section 4.3), and one of ours:
    "l4q": s = max(|min / QN|, |max / QP|), b = 0: nothing is clipped, and one end of the range is used.
    "lsq+": s = max(|mu - 3 sd|, |mu + 3 sd|) / 2^(bits-1), b = 0.
    "symmetric": s = max|W| / 2^(bits-1), b = 0: a maximum that is positive is clipped to QP.
    "asymmetric": s = (max - min) / (QP - QN), b = max - s QP: no level at 0.
    "affine": the grid of the format "affine", which has one: its s, and b = s (2^(bits-1) - its zero point). An end of
    the range is clipped by up to half a step, as there.
    Worked, 4 bits, group (-4, 14): l4q s = 2; symmetric s = 1.75; asymmetric s = 1.2, b = 5.6.
    The paper's scales are four rounding errors larger than these formulas: rounding would else push the largest number
    of every second group out of the range, where its gradients are other ones. A group of zeros gets the smallest
    normal scale.
    group: how many neighbours share a scale; None for a whole row.
    Raises ValueError for bits, a group or an init that is not allowed.
    """
    low, high = levels_of(bits)
    width = weight.shape[1]
    group = width if group is None else group
    if type(group) is not int or group < 1 or width % group:
        raise ValueError(f"group: {group!r} does not divide the input width {width}; use a divisor, or None")
    check_known("init", init, (*INITS, AFFINE))
    rows = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).unflatten(1, (-1, group))
    if init == AFFINE:
        scale, zero = choose_scale(rows, Grid(bits, ASYMMETRIC))
        assert zero is not None
        return scale.to(rows.dtype), ((-low - zero) * scale).to(rows.dtype)
    smallest, largest = rows.aminmax(dim=-1, keepdim=True)
    if init == "l4q":
        scale = torch.maximum((smallest / low).abs(), (largest / high).abs())
    elif init == "lsq+":
        mean, spread = rows.mean(-1, keepdim=True), 3 * rows.std(-1, correction=0, keepdim=True)
        scale = torch.maximum((mean - spread).abs(), (mean + spread).abs()) / -low
    elif init == "symmetric":
        scale = torch.maximum(largest, -smallest) / -low
    else:
        scale = (largest - smallest) / (high - low)
    numbers = torch.finfo(scale.dtype)
    scale = (scale * (1 + 4 * numbers.eps)).clamp_min(numbers.tiny)
    if init != "asymmetric":
        return scale, torch.zeros_like(scale)
    return scale, (largest + smallest) / 2 - scale * (high + low) / 2  # max - s QP, its rounding error at both ends


@torch.library.custom_op("studylib::after", mutates_args=())
def _after(weight: Tensor, gradient: Tensor) -> Tensor:
    """A copy of `weight` that a compiler cannot make before it has `gradient`.

    Without it torch.compile sees that the backward pass repeats work of the forward pass and keeps that work's result,
    which has the weight's size in fp32, from one to the other.
    """
    return weight.clone()


@_after.register_fake
def _(weight: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(weight)


def _scaled(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: Tensor, offset: Tensor, scaling: float) -> Tensor:
    """w [out, in // group, group]: fp32 (or fp64), whatever the type of the weight."""
    w = weight.to(scale.dtype, copy=True).addmm_(lora_B * scaling, lora_A)
    return w.unflatten(1, (scale.shape[1], -1)).sub_(offset).div_(scale)


def _values(levels: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """s w~ + b, [out, in]."""
    return levels.mul(scale).add_(offset).flatten(1)


def _nonzero(scale: Tensor) -> Tensor:
    """The scale, but for one within the smallest normal number of zero: that number, with its sign."""
    tiny = torch.finfo(scale.dtype).tiny
    return torch.where(scale.abs() < tiny, torch.full_like(scale, tiny).copysign(scale), scale)


class _JointlyQuantized(torch.autograd.Function):
    """Y = X Wq^T + bias; for the backward pass it keeps X and parameters, and computes W and w anew, as in the paper.

    With G = dY^T X and M = [QN <= w <= QP], both ends included, as in torch.clamp: a w on QN or QP counts as inside.
    d s = sum of G * (w~ - w inside, QN below, QP above); d b = sum of G outside; both over the group.
    d A = scaling B^T (G * M); d B = scaling (G * M) A^T; d X = dY Wq; and G * M for W0, should it not be frozen.
    The products with X and dY are made in `dtype`, all else in the scale's type.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scale: Tensor,
        offset: Tensor,
        bias: Tensor | None,
        bits: int,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, lora_A, lora_B, scale, offset)
        ctx.bits, ctx.scaling, ctx.dtype = bits, scaling, dtype
        low, high = levels_of(bits)
        with torch.autocast(x.device.type, enabled=False):
            scale = _nonzero(scale)
            levels = _scaled(weight, lora_A, lora_B, scale, offset, scaling).clamp_(low, high).round_()
            quantized = _values(levels, scale, offset).to(dtype)
            return F.linear(x.to(dtype), quantized, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, scale, offset = ctx.saved_tensors
        low, high = levels_of(ctx.bits)
        needs_x, needs_weight, *_, needs_bias = ctx.needs_input_grad[:7]
        with torch.autocast(x.device.type, enabled=False):
            scale = _nonzero(scale)
            w = _scaled(_after(weight, gradient), lora_A, lora_B, scale, offset, ctx.scaling)
            clipped = w.clamp(low, high)
            inside = w.eq_(clipped)  # 1 where w is not clipped, else 0: multiplying is faster than a mask
            levels = clipped.round()
            d_x = None
            if needs_x:
                d_x = (gradient @ _values(levels, scale, offset).to(ctx.dtype)).to(x.dtype)
            rows = gradient.reshape(-1, gradient.shape[-1])
            g = torch.mm(rows.T, x.reshape(-1, x.shape[-1]).to(ctx.dtype)).to(w.dtype).view_as(w)
            slope = levels.sub_(clipped.mul_(inside))
            d_scale = slope.mul_(g).sum(-1, keepdim=True)
            inside = inside.mul_(g)
            d_offset = g.sub_(inside).sum(-1, keepdim=True)
            g = inside.flatten(1)
            d_A = torch.mm(lora_B.T * ctx.scaling, g)
            d_B = torch.mm(g, lora_A.T * ctx.scaling)
        d_weight = g.to(weight.dtype) if needs_weight else None
        d_bias = rows.sum(0) if needs_bias else None
        return d_x, d_weight, d_A, d_B, d_scale, d_offset, d_bias, None, None, None


class L4QLinear(nn.Linear):
    """A linear layer whose weight and adapter are quantized together: input [..., in] -> output [..., out].

    Parameters: weight [out, in] and bias [out] of the layer it replaces; lora_A [rank, in], Kaiming-uniform as in
    LoRA; lora_B [out, rank], zero; scale and offset [out, in // group, 1] (see initial_grid). The last four are fp32
    (fp64 beside an fp64 weight). It computes in the type of its input, or autocast's; the weight is quantized in fp32.
    alpha: B A is multiplied by scaling = alpha / rank, as in LoRA. The paper multiplies by alpha, and does not give it.
    generator: of the numbers in lora_A. Nothing keeps a learned scale above zero, as in the paper: beyond zero the grid
    is mirrored, and at zero it counts as the smallest normal number, so that no 0 / 0 appears.
    Raises ValueError for bits, group, rank, alpha or init that are not allowed.
    """

    def __init__(
        self,
        linear: nn.Linear,
        bits: int,
        *,
        group: int | None = None,
        rank: int = 4,
        alpha: float = 8.0,
        init: str = "l4q",
        generator: torch.Generator | None = None,
    ):
        nn.Module.__init__(self)
        if type(rank) is not int or rank < 1:
            raise ValueError(f"rank: {rank!r} is not allowed; use 1 or more")
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha: {alpha!r} is not allowed; use a number above 0")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.rank, self.scaling = bits, rank, alpha / rank
        self.weight, self.bias = linear.weight, linear.bias
        scale, offset = initial_grid(linear.weight, bits, group, init)
        first = torch.empty(rank, self.in_features)
        nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(first.to(scale))
        self.lora_B = nn.Parameter(scale.new_zeros(self.out_features, rank))
        self.scale, self.offset = nn.Parameter(scale), nn.Parameter(offset)

    @property
    def group(self) -> int:
        """Neighbours in a row that share a scale."""
        return self.in_features // self.scale.shape[1]

    @property
    def grid_parameters(self) -> list[nn.Parameter]:
        """What is trained of the grid, in units of the layer's scales."""
        return [self.scale, self.offset]

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        learned = self.lora_A, self.lora_B, self.scale, self.offset
        return _JointlyQuantized.apply(x, self.weight, *learned, self.bias, self.bits, self.scaling, dtype)

    @torch.no_grad()
    def codes(self) -> Codes:
        """The integers that the layer multiplies with. ValueError where weight, adapter or grid are not finite."""
        scale, offset = _nonzero(self.scale), self.offset.detach()
        with torch.autocast("cpu" if scale.is_meta else scale.device.type, enabled=False):  # meta: to be counted
            w = _scaled(self.weight, self.lora_A, self.lora_B, scale, offset, self.scaling)
        if not (w.isfinite().all() and offset.isfinite().all()):
            raise ValueError("the weight, its adapter or its grid hold NaN or infinity; the training has diverged")
        low, high = levels_of(self.bits)
        return Codes.of_integers(w.clamp_(low, high).round_().flatten(1), self.bits, low, scale, offset=offset)

    def dense(self) -> Tensor:
        """The weight that the layer multiplies with, Wq [out, in], fp32 (fp64 beside an fp64 weight)."""
        return self.codes().decode()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, group={self.group}, rank={self.rank}"


def l4q_model(
    model: nn.Module,
    bits: int,
    *,
    group: int | None = 128,
    rank: int = 4,
    alpha: float = 8.0,
    init: str = "l4q",
    seed: int = 0,
    targets: Iterable[str] | None = None,
) -> nn.Module:
    """Replace the decoder's linear layers in place by L4QLinear, and freeze all but their adapters and grids.

    The defaults are the paper's (rank 4, group 128; alpha is not given there). See L4QLinear for the other arguments.
    seed: of every layer's lora_A, together with the layer's name: neither the order of layers nor what was drawn before
    matters. targets: the ends of the names of the layers to replace, for example ("q_proj", "v_proj"); None for all.
    Checkpointing with use_reentrant=True trains nothing unless model.enable_input_require_grads() is called, as for any
    model whose embeddings are frozen.
    Raises ValueError, and changes nothing, for arguments that are not allowed, layers that do not exist or are not
    plain nn.Linear.
    """
    linears = decoder_linears(model)
    if targets is not None:
        ends = tuple(f".{end}" for end in targets)
        for end in ends:
            if not any(f".{name}".endswith(end) for name in linears):
                have = sorted({name.rpartition(".")[2] for name in linears})
                raise ValueError(f"targets: the model has no {end[1:]!r}; use ends of names such as {', '.join(have)}")
        linears = {name: linear for name, linear in linears.items() if f".{name}".endswith(ends)}
    replaced = {}
    for name, linear in linears.items():
        if type(linear) is not nn.Linear:
            raise ValueError(f"{name}: {type(linear).__name__} cannot be quantized; load the model anew")
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        replaced[name] = L4QLinear(linear, bits, group=group, rank=rank, alpha=alpha, init=init, generator=generator)
    model.requires_grad_(False)
    for name, layer in replaced.items():
        model.set_submodule(name, layer.train(model.training))
    return model


class QALoRALinear(nn.Module):
    """QA-LoRA (Xu et al., arXiv 2309.14717): an adapter that can be merged into the zero points of the base.

    input [..., in] -> [..., out]: base(x) + scaling * B A pool(x), A [rank, in // group], B [out, rank]. pool sums the
    inputs of each group, as the paper's Algorithm 1 does (AvgPool1d times the group's size); its authors' code leaves
    the average, which is the same at alpha / group. base: a layer in low bits, whose integers and groups `codes()`
    gives.
    """

    def __init__(self, base: nn.Linear, adapter: Adapter):
        super().__init__()
        self.base, self.scaling, self.dropout = base, adapter.scaling, nn.Dropout(adapter.dropout)
        stored = base.codes()
        self.group, device = base.in_features // stored.groups, stored.codes.device
        self.lora_A = nn.Parameter(torch.empty(adapter.rank, base.in_features // self.group, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, adapter.rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        pooled = self.dropout(x).unflatten(-1, (-1, self.group)).sum(-1, dtype=self.lora_A.dtype)
        return y + (self.scaling * F.linear(F.linear(pooled, self.lora_A), self.lora_B)).to(y.dtype)

    @torch.no_grad()
    def codes(self) -> Codes:
        """Base and adapter as they are stored: the codes and scales of the base, and an offset for each group.

        scale * (code - zero) + D with D = scaling * B A, which is one number a group: offset = D - scale * zero.
        """
        base = self.base.codes()
        offset = self._change().to(base.scale.dtype)
        offset = offset if base.zero is None else offset - base.scale * base.zero
        return replace(base, zeros=None, offsets=offset.flatten())

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The weight of base and adapter, fp32 [out, in]."""
        change = self._change()
        return self.base.codes().decode(change.dtype) + change.repeat_interleave(self.group, 1)

    def _change(self) -> Tensor:
        return self.scaling * self.lora_B @ self.lora_A


class LearnedGridLinear(nn.Linear):
    """A weight rounded to a grid whose scale and offset are learned: the base of QAT-LoRA (L4Q, section 4), where the
    weight is frozen, and QAT with learned steps, where it trains.

    W_q = s round(clamp((W - b) / s, -2^(bits-1), 2^(bits-1) - 1)) + b with s, b [out, in // group, 1] that start as
    `initial_grid` has them; gradients through the rounding as in LSQ (Esser et al. 2020). Unlike L4Q's, this backward
    pass is plain autograd and keeps tensors of the weight's size. dtype: the type that the weight is computed with.
    offsets: whether there is a b; without, it is 0, and neither trained nor stored.
    Raises ValueError for bits, a group or an init that is not allowed, and for an init that offsets belong to without
    them.
    """

    def __init__(
        self,
        linear: nn.Linear,
        bits: int,
        group: int | None,
        dtype: torch.dtype,
        init: str = "l4q",
        offsets: bool = True,
    ):
        nn.Module.__init__(self)
        if init in (AFFINE, "asymmetric") and not offsets:
            raise ValueError(f"init: {init!r} is not allowed without offsets, which are part of it")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.bits = linear.weight, linear.bias, bits
        scale, offset = initial_grid(linear.weight.detach().to(dtype), bits, group, init)
        self.scale, self.offset = nn.Parameter(scale), nn.Parameter(offset) if offsets else None

    @property
    def grid_parameters(self) -> list[nn.Parameter]:
        """What is trained of the grid, in units of the layer's scales."""
        return [self.scale] if self.offset is None else [self.scale, self.offset]

    @torch.no_grad()
    def codes(self) -> Codes:
        """The integers that the layer multiplies with. ValueError where the weight or its grid are not finite."""
        levels = self._clamped().round()
        if not all(part.isfinite().all() for part in (levels, *self.grid_parameters)):
            raise ValueError("the weight or its grid hold NaN or infinity; the training has diverged")
        return Codes.of_integers(levels.flatten(1), self.bits, levels_of(self.bits)[0], self.scale, offset=self.offset)

    def dense(self) -> Tensor:
        """The weight that the layer multiplies with, [out, in]."""
        w = self._clamped()
        values = (w + (w.round() - w).detach()) * self.scale
        return (values if self.offset is None else values + self.offset).flatten(1)

    def _clamped(self) -> Tensor:
        """(W - b) / s inside the range of the integers, [out, in // group, group]."""
        w = self.weight.to(self.scale.dtype).unflatten(1, (self.scale.shape[1], -1))
        return ((w if self.offset is None else w - self.offset) / self.scale).clamp(*levels_of(self.bits))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(), self.bias)


class FixedIntegersLinear(nn.Linear):
    """Integers that are fixed and scales that train: EfficientQAT's second phase (Chen et al., arXiv 2407.11062, 3.3).

    W_q = s q + s z with q the integers of `layer`, s its scales, the one parameter, and z its offsets in steps, if it
    has any, which stay as they are: the whole grid grows with its scale. Forward passes keep a tensor of the
    weight's size.
    Raises ValueError where the layer is not finite.
    """

    def __init__(self, layer: LearnedGridLinear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias, self.bits = layer.bias, layer.bits
        self.scale = nn.Parameter(layer.scale.detach().clone())
        self.register_buffer("integers", layer.codes().integers.to(torch.int8))
        self.register_buffer("zero", None if layer.offset is None else layer.offset.detach() / self.scale.detach())

    @property
    def grid_parameters(self) -> list[nn.Parameter]:
        """What is trained of the grid, in units of the layer's scales."""
        return [self.scale]

    @torch.no_grad()
    def codes(self) -> Codes:
        """The integers that the layer multiplies with. ValueError where a scale is not finite."""
        if not self.scale.isfinite().all():
            raise ValueError("the scales hold NaN or infinity; the training has diverged")
        return Codes.of_integers(self.integers, self.bits, levels_of(self.bits)[0], self.scale, offset=self._offset())

    def dense(self) -> Tensor:
        """The weight that the layer multiplies with, [out, in]."""
        values = self.integers.unflatten(1, (self.scale.shape[1], -1)) * self.scale
        return (values if self.zero is None else values + self._offset()).flatten(1)

    def _offset(self) -> Tensor | None:
        return None if self.zero is None else self.scale * self.zero

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(), self.bias)


def qa_lora_model(model: nn.Module, adapter: Adapter, names: list[str], seed: int) -> nn.Module:
    """Put QA-LoRA's adapters, drawn by `seed`, on the low-bit layers of `names`, in place."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name in names:
            model.set_submodule(name, QALoRALinear(model.get_submodule(name), adapter))
    return model


def learned_grid_model(
    model: nn.Module, bits: int, group: int | None, dtype: torch.dtype, init: str = "l4q", offsets: bool = True
) -> nn.Module:
    """Replace the decoder's linear layers in place by LearnedGridLinear."""
    for name, linear in decoder_linears(model).items():
        model.set_submodule(name, LearnedGridLinear(linear, bits, group, dtype, init, offsets))
    return model


def train_grids(model: nn.Module) -> None:
    """Let the scales and offsets of LearnedGridLinear require gradients."""
    for module in model.modules():
        if isinstance(module, LearnedGridLinear):
            for parameter in module.grid_parameters:
                parameter.requires_grad_(True)
