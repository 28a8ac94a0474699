"""Low-bit weights at work: 4-bit integers multiplied as they are stored, by the kernel that PyTorch has for processors.

Everywhere else in this study a low-bit weight is decoded before it is multiplied, which shows what it costs in accuracy
but not what it saves. Activations stay in 16 (or 32) bits here.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studylib.config import INTEGER_FORMATS, Format
from studylib.quant.layers import cast_parameters, decoder_linears
from studylib.quant.storage import PEFT_ADAPTER, Codes

BITS = 4
MIDDLE = 2 ** (BITS - 1)  # the code that stands for the offset
GROUPS = (32, 64, 128, 256)  # weights that may share a scale,
ROWS = 16  # and what the number of outputs must be a multiple of: PyTorch's kernel takes no other
# In any other type PyTorch's kernel multiplies number by number, 15 to 100 times slower, also on processors without
# instructions for bf16 (findings/int4-kernel-is-fast-in-bf16-alone.sh).
KERNEL = torch.bfloat16


class Int4Linear(nn.Linear):
    """A frozen linear layer of 4-bit integers, multiplied as they are stored: input [..., in] -> output [..., out].

    stored: the weight's codes. What is kept: `packed`, two codes a byte, and `grid` [in // group, out, 2], for each
    group the scale and the number that code 8 stands for, in `kernel`, the type that the kernel is entered in (bf16
    rounds them and the input; fp32 changes nothing). dtype: of the output, the bias and the adapter, A [rank, in] and
    B [out, rank] of LoRA, its scaling in B. The kernel is made for few rows of input, as when one token is decoded at
    a time.
    Raises ValueError for codes that are no plain 4-bit integers, a group that is none of GROUPS, an `out` that is no
    multiple of ROWS, or codes that are not on the CPU.
    """

    def __init__(
        self,
        stored: Codes,
        bias: Tensor | None,
        dtype: torch.dtype,
        adapter: tuple[Tensor, Tensor] | None = None,
        kernel: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)
        if stored.bits != BITS:
            raise ValueError(f"bits: {stored.bits} is not allowed; the 4-bit kernel takes {BITS}")
        if stored.levels is not None or stored.mean is not None:
            raise ValueError("codes: tables and double quantization are not allowed; the 4-bit kernel takes integers")
        self.out_features, self.in_features = stored.shape
        self.group = self.in_features // stored.groups
        check_kernel(self.out_features, self.group)
        if stored.codes.device.type != "cpu":
            raise ValueError(
                f"device: {stored.codes.device.type!r} is not allowed; this kernel is for processors, use 'cpu'"
            )
        codes, scale = (stored.integers - stored.low).int().contiguous(), stored.scale
        offset = scale * (MIDDLE + stored.low - (0.0 if stored.zero is None else stored.zero))
        offset = offset if stored.offset is None else offset + stored.offset
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        self.register_buffer("grid", torch.stack([scale.T, offset.T], -1).to(kernel or dtype).contiguous())
        self._codes, self.dtype = stored.codes, dtype
        for name, tensor in (("bias", bias), *zip(("lora_A", "lora_B"), adapter or (None, None), strict=True)):
            self.register_buffer(name, None if tensor is None else tensor.detach().to(dtype))

    def codes(self) -> Codes:
        """The weight as it is multiplied: scales and offsets in the type that the kernel is entered in."""
        scale, middle = self.grid.transpose(0, 1).unbind(-1)  # [out, groups]
        shape = (self.out_features, self.in_features)
        return Codes(BITS, shape, self._codes, scale.flatten(), -MIDDLE, offsets=middle.flatten())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).to(self.dtype)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.to(self.grid.dtype), self.packed, self.group, self.grid)
        y = y.to(self.dtype)
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


def check_format(format: Format | None) -> None:
    """Raise ValueError unless the kernel multiplies what is stored in `format`."""
    if format is None or format.kind not in INTEGER_FORMATS or format.bits != BITS or format.double:
        raise ValueError(
            f"format: {format and format.title} is not allowed; the 4-bit kernel takes {', '.join(INTEGER_FORMATS)} of "
            f"{BITS} bits with plain scales"
        )


def check_executable(model: nn.Module, format: Format | None) -> None:
    """Raise ValueError unless the kernel takes every linear layer of the decoder in `format`; on any device."""
    check_format(format)
    assert format is not None
    for name, linear in decoder_linears(model).items():
        try:
            check_kernel(linear.out_features, format.group or linear.in_features)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


@torch.no_grad()
def int4_model(model: nn.Module, dtype: torch.dtype, kernel: torch.dtype = KERNEL) -> nn.Module:
    """Replace the low-bit layers of a model in place by Int4Linear, put all else into `dtype`, and freeze it.

    Every layer whose codes() are 4-bit integers, with LoRA's adapter beside it, if it has one.
    dtype: the type that the hardware computes in (see models.compute_dtype). kernel: the one of 4-bit products.
    Raises ValueError, and changes nothing, for a model without such layers or one that the kernel does not take: other
    bits, NormalFloat or double quantization, a group or a number of outputs that Int4Linear refuses, DoRA.
    """
    replaced, inside = {}, set()
    for name, layer in model.named_modules():
        base = getattr(layer, "base_layer", layer)
        if layer in inside or not callable(getattr(base, "codes", None)) or base.codes() is None:
            continue
        inside |= set(layer.modules())
        try:
            if hasattr(base, "format"):
                check_format(base.format)
            adapter = None if base is layer else _adapter(layer)
            replaced[name] = Int4Linear(base.codes(), getattr(base, "base", base).bias, dtype, adapter, kernel)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if not replaced:
        raise ValueError(
            f"{type(model).__name__} has no layers of 4-bit integers; attach 'l4q', 'qa-lora' or 'qlora' on 'affine'"
        )
    for name, layer in replaced.items():
        model.set_submodule(name, layer)
    return cast_parameters(model, dtype).requires_grad_(False).eval()


def _adapter(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A and scaling * B of a linear layer of peft's."""
    if layer.use_dora[PEFT_ADAPTER]:
        raise ValueError("kind: 'dora' is not allowed beside 4-bit integers, whose rows it would rescale; merge it")
    return layer.lora_A[PEFT_ADAPTER].weight, layer.scaling[PEFT_ADAPTER] * layer.lora_B[PEFT_ADAPTER].weight
