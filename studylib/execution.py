"""Low-bit weights at work: 4-bit integers multiplied as they are stored, by the kernel that PyTorch has for processors.

Everywhere else in this study a low-bit weight is decoded before it is multiplied, which shows what it costs in accuracy
but not what it saves. Activations stay in 16 (or 32) bits here.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from studylib import models
from studylib.adapters import ADAPTER, QLORA, Adapter, QALoRALinear, attach
from studylib.formats import FLOAT_BYTES, GRIDS, EncodedLinear, Format, encode_model, unpack
from studylib.l4q import L4QLinear
from studylib.layers import decoder_linears
from studylib.planning import SHAPES

BITS = 4
MIDDLE = 2 ** (BITS - 1)  # the code that stands for the offset
GROUPS = (32, 64, 128, 256)  # weights that may share a scale,
ROWS = 16  # and what the number of outputs must be a multiple of: PyTorch's kernel takes no other
SIXTEEN, PACKED, ADAPTED = EXECUTIONS = ("16 bits", "4 bits", "4 bits and an adapter")
OWN = "own"  # the study's model, among what is timed
LAYERS, VOCABULARY = 2, 1024  # of a shape that is timed, which stands for all of its equal layers


@dataclass(frozen=True)
class Decoding:
    """How decoding is timed: `tokens` tokens, one at a time, after `context` others, in `rounds` rounds.

    shapes: of planning.SHAPES, those whose layers are timed beside the study's model, with random weights.
    """

    context: int = 64
    tokens: int = 16
    rounds: int = 16
    shapes: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("context", "tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed; use 1 or more")
        for shape in self.shapes:
            if shape not in SHAPES:
                raise ValueError(f"shape: {shape!r} is not known; use {', '.join(SHAPES)}")


class Int4Linear(nn.Linear):
    """A frozen linear layer whose weight is scale * (code - 8) + offset: input [..., in] -> output [..., out].

    codes: integers 0..15, [out, in]; scale and offset [out, in // group]. What is kept: `packed`, two codes a byte, and
    `grid` [in // group, out, 2], scale and offset in `dtype`, the type that it computes in (bf16 rounds them; fp32
    changes nothing). adapter: A [rank, in] and B [out, rank] of LoRA, its scaling in B, computed beside it in `dtype`.
    The kernel is made for few rows of input, as when one token is decoded at a time.
    Raises ValueError for a group that is none of GROUPS, an `out` that is no multiple of ROWS, or codes that are not on
    the CPU.
    """

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        offset: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        adapter: tuple[Tensor, Tensor] | None = None,
    ):
        nn.Module.__init__(self)
        (self.out_features, self.in_features), self.group = codes.shape, codes.shape[1] // scale.shape[1]
        check_kernel(self.out_features, self.group)
        if codes.device.type != "cpu":
            raise ValueError(f"device: {codes.device.type!r} is not allowed; this kernel is for processors, use 'cpu'")
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), 1))
        self.register_buffer("grid", torch.stack([scale.T, offset.T], -1).to(dtype).contiguous())
        for name, tensor in (("bias", bias), *zip(("lora_A", "lora_B"), adapter or (None, None), strict=True)):
            self.register_buffer(name, None if tensor is None else tensor.detach().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).to(self.grid.dtype)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, self.grid)
        if self.bias is not None:
            y = y + self.bias
        if self.lora_A is not None:
            y = y + F.linear(F.linear(rows, self.lora_A), self.lora_B)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group={self.group}"


def check_kernel(out: int, group: int) -> None:
    """Raise ValueError unless the kernel takes a weight of `out` rows whose scales are shared by `group` numbers."""
    if group not in GROUPS:
        raise ValueError(f"group: {group} is not allowed; the 4-bit kernel takes {', '.join(map(str, GROUPS))}")
    if out % ROWS:
        raise ValueError(f"out: {out} rows are not allowed; the 4-bit kernel takes multiples of {ROWS}")


def check_format(format: Format) -> None:
    """Raise ValueError unless the kernel multiplies what is stored in `format`."""
    if format.kind not in GRIDS or format.bits != BITS or format.double:
        raise ValueError(
            f"format: {format.title} is not allowed; the 4-bit kernel takes 'int' and 'affine' with plain scales"
        )


def check_executable(model: nn.Module, format: Format) -> None:
    """Raise ValueError unless the kernel takes every linear layer of the decoder in `format`; on any device."""
    check_format(format)
    for name, linear in decoder_linears(model).items():
        try:
            check_kernel(linear.out_features, format.block or linear.in_features)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


@torch.no_grad()
def int4_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace the low-bit layers of a model in place by Int4Linear, put all else into `dtype`, and freeze it.

    What adapters.attach made of a model, trained or not: L4Q's layers; QA-LoRA's, with the adapter in their offsets;
    and integers as formats.encode_model stores them, with LoRA's adapters, if any, beside them.
    dtype: by default the type that the hardware computes in (see models.compute_dtype).
    Raises ValueError, and changes nothing, for a model without such layers or one that the kernel does not take: other
    bits, NormalFloat or double quantization, a group or a number of outputs that Int4Linear refuses, DoRA.
    """
    dtype, replaced, inside = dtype or models.compute_dtype(), {}, set()
    for name, layer in model.named_modules():
        base = getattr(layer, "base_layer", layer)
        if layer in inside or not isinstance(base, L4QLinear | QALoRALinear | EncodedLinear):
            continue
        inside |= set(layer.modules())
        try:
            adapter = None if base is layer else _adapter(layer)
            replaced[name] = Int4Linear(*_integers(base), getattr(base, "base", base).bias, dtype, adapter)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if not replaced:
        raise ValueError(
            f"{type(model).__name__} has no layers of 4-bit integers; attach 'l4q', 'qa-lora' or 'qlora' on 'affine'"
        )
    for name, layer in replaced.items():
        model.set_submodule(name, layer)
    return models.cast_parameters(model, dtype).requires_grad_(False).eval()


def _integers(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0..15, scale and offset of a layer, as Int4Linear takes them. ValueError where it has no such."""
    if isinstance(layer, L4QLinear):
        if layer.bits != BITS:
            raise ValueError(f"bits: {layer.bits} is not allowed; the 4-bit kernel takes {BITS}")
        deployed = layer.codes()
        return deployed.codes.int() + MIDDLE, deployed.scale[..., 0], deployed.offset[..., 0]
    if isinstance(layer, QALoRALinear):
        codes, scale, offset = _integers(layer.base)
        return codes, scale, offset + layer.scaling * layer.lora_B @ layer.lora_A
    encoded = layer.encoded
    check_format(encoded.format)
    rows, columns = encoded.shape
    codes = unpack(encoded.codes, BITS, rows * columns).view(rows, columns)
    scale = encoded.scales.float().view(rows, -1)
    zero = 0.0 if encoded.zeros is None else unpack(encoded.zeros, BITS, scale.numel()).float().view_as(scale)
    return codes, scale, scale * (MIDDLE + encoded.format.grid.low - zero)


def _adapter(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A and scaling * B of a linear layer of peft's."""
    if layer.use_dora[ADAPTER]:
        raise ValueError("kind: 'dora' is not allowed beside 4-bit integers, whose rows it would rescale; merge it")
    return layer.lora_A[ADAPTER].weight, layer.scaling[ADAPTER] * layer.lora_B[ADAPTER].weight


def executed_bytes(model: nn.Module) -> int:
    """Bytes of what int4_model made: codes, scales, offsets and adapters as they are kept, all else at 16 bits."""
    layers = [module for module in model.modules() if isinstance(module, Int4Linear)]
    packed = sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
    return packed + FLOAT_BYTES * sum(parameter.numel() for parameter in model.parameters())


def decoding_seconds(
    load: Callable[[], PreTrainedModel], format: Format, settings: Decoding
) -> dict[tuple[str, str], np.ndarray]:
    """Seconds that a decoded token takes, [rounds], of each model that is timed and each of EXECUTIONS.

    The models: OWN, which `load` gives, and settings.shapes. 4 bits: the weights rounded to `format`, as every method
    leaves them that deploys integers only; an adapter: LoRA's usual one on all layers. Executions take turns, so that
    whatever else the machine does meets all alike.
    """
    sources = {OWN: load} | {shape: lambda shape=shape: _layers_of(shape) for shape in settings.shapes}
    found = {}
    for name, source in sources.items():
        executions = (
            source().cpu().to(models.compute_dtype()).eval(),
            int4_model(encode_model(source().cpu(), format)),
            int4_model(attach(source().cpu(), QLORA, format=format, adapter=Adapter())),
        )
        rounds = [[_seconds(model, settings) for model in executions] for _ in range(settings.rounds + 1)]
        found |= {(name, kind): times for kind, times in zip(EXECUTIONS, np.array(rounds[1:]).T, strict=True)}
    return found


def _layers_of(shape: str) -> PreTrainedModel:
    config = copy.deepcopy(SHAPES[shape])
    config.num_hidden_layers, config.vocab_size = LAYERS, VOCABULARY
    return models.skeleton(config)


@torch.no_grad()
def _seconds(model: PreTrainedModel, settings: Decoding) -> float:
    """Seconds of one token, the mean over those that are decoded."""
    cache = DynamicCache(config=model.config)
    context = torch.arange(settings.context)[None] % model.config.vocab_size
    logits = model(input_ids=context, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    begun = time.perf_counter()
    for _ in range(settings.tokens):
        logits = model(input_ids=logits[:, -1].argmax(1, keepdim=True), past_key_values=cache, use_cache=True).logits
    return (time.perf_counter() - begun) / settings.tokens
