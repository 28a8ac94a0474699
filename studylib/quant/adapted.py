"""Layers whose grid and adapter go together, beside L4Q's: QA-LoRA's, and the learned grid below QAT-LoRA's adapter."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studylib.config.settings import Adapter, Format
from studylib.quant.formats import EncodedLinear, encode_model
from studylib.quant.l4q import initial_grid, levels_of
from studylib.quant.layers import decoder_linears
from studylib.quant.storage import Codes


class QALoRALinear(nn.Module):
    """QA-LoRA (Xu et al., arXiv 2309.14717): an adapter that can be merged into the zero points of the base.

    input [..., in] -> [..., out]: base(x) + scaling * B A pool(x), A [rank, in // group], B [out, rank]. pool sums the
    inputs of each group, as the paper's Algorithm 1 does (AvgPool1d times the group's size); its authors' code leaves
    the average, which is the same at alpha / group.
    """

    def __init__(self, base: EncodedLinear, adapter: Adapter):
        super().__init__()
        self.base, self.scaling, self.dropout = base, adapter.scaling, nn.Dropout(adapter.dropout)
        self.group = base.format.group or base.in_features
        device = base.stored_codes.device
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
    """A frozen weight rounded to a grid whose scale and offset are learned, as the base of QAT-LoRA (L4Q, section 4).

    W_q = s round(clamp((W - b) / s, -2^(bits-1), 2^(bits-1) - 1)) + b with s, b [out, in // group, 1] that start as
    L4Q's do; gradients through the rounding as in LSQ (Esser et al. 2020). Unlike L4Q's, this backward pass is plain
    autograd and keeps tensors of the weight's size. dtype: the type that the weight is computed with.
    """

    def __init__(self, linear: nn.Linear, bits: int, group: int | None, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.bits = linear.weight, linear.bias, bits
        scale, offset = initial_grid(linear.weight.detach().to(dtype), bits, group)
        self.scale, self.offset = nn.Parameter(scale), nn.Parameter(offset)

    @torch.no_grad()
    def codes(self) -> Codes:
        """The integers that the layer multiplies with. ValueError where the weight or its grid are not finite."""
        low, high = levels_of(self.bits)
        w = self.weight.to(self.scale.dtype).unflatten(1, (self.scale.shape[1], -1))
        w = ((w - self.offset) / self.scale).clamp(low, high).round()
        if not (w.isfinite().all() and self.offset.isfinite().all()):
            raise ValueError("the weight or its grid hold NaN or infinity; the training has diverged")
        return Codes.of_integers(w.flatten(1), self.bits, low, self.scale, offset=self.offset)

    def dense(self) -> Tensor:
        """The weight that the layer multiplies with, [out, in]."""
        low, high = levels_of(self.bits)
        w = self.weight.to(self.scale.dtype).unflatten(1, (self.scale.shape[1], -1))
        w = ((w - self.offset) / self.scale).clamp(low, high)
        return ((w + (w.round() - w).detach()) * self.scale + self.offset).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(), self.bias)


def qa_lora_model(model: nn.Module, format: Format, adapter: Adapter, names: list[str], seed: int) -> nn.Module:
    """Encode the decoder's linear layers in place and put QA-LoRA's adapters, drawn by `seed`, on those of `names`."""
    encode_model(model, format)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name in names:
            model.set_submodule(name, QALoRALinear(model.get_submodule(name), adapter))
    return model


def learned_grid_model(model: nn.Module, bits: int, group: int | None, dtype: torch.dtype) -> nn.Module:
    """Replace the decoder's linear layers in place by LearnedGridLinear."""
    for name, linear in decoder_linears(model).items():
        model.set_submodule(name, LearnedGridLinear(linear, bits, group, dtype))
    return model


def train_grids(model: nn.Module) -> None:
    """Let the scales and offsets of LearnedGridLinear require gradients."""
    for module in model.modules():
        if isinstance(module, LearnedGridLinear):
            module.scale.requires_grad_(True)
            module.offset.requires_grad_(True)
