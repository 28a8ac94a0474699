"""compressed-tensors: integers with scales and zero points, and how activations and cache are rounded beside them."""

import contextlib
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PreTrainedModel

from studylib.config import OFF, SYMMETRIC, Arm
from studylib.methods import title
from studylib.quant import Codes, decoder_linears, head_width

if TYPE_CHECKING:
    from compressed_tensors.compressors import ModelCompressor

MOST_BITS = 8
OFFSET_BOUND = 1 / 32  # how far a zero point may be from the learned offset it stands for, in steps of the grid


def without_bars() -> contextlib.AbstractContextManager[object]:
    """Inside, the libraries' progress bars are not shown."""
    return contextlib.redirect_stderr(io.StringIO())


def compress(model: PreTrainedModel, arm: Arm, stored: dict[str, Codes]) -> "ModelCompressor":
    """Put packed integers in the place of the weights. Returns what writes their configuration.

    model: changed in place; its decoder's weights may be without numbers (meta). stored: the codes of each linear layer
    of the decoder, by name.
    Learned offsets become zero points: of the codes' own bits where these are near enough (see OFFSET_BOUND), else of
    8 bits, with scales that are as much finer. Raises ValueError where there are no codes, or no such zero points.
    """
    from compressed_tensors.compressors import ModelCompressor, compress_module
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    linears, bits = decoder_linears(model), arm.widths
    if stored.keys() != linears.keys():
        raise ValueError(f"record: {title(arm)} cannot be exported; its weights have no codes")
    width, symmetric = _grid(stored)
    first = next(iter(stored.values()))
    whole = all(codes.groups == 1 for codes in stored.values())
    blocks = {"strategy": "channel"} if whole else {"strategy": "group", "group_size": first.shape[1] // first.groups}
    on_the_fly = arm.scheme.on_the_fly == SYMMETRIC

    def rounded(bits: int, **how: str | int) -> QuantizationArgs | None:
        if bits == OFF:
            return None
        return QuantizationArgs(num_bits=bits, symmetric=on_the_fly, dynamic=True, observer=None, **how)

    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=width, symmetric=symmetric, observer=None, **blocks),
        input_activations=rounded(bits.activations, strategy="token"),
        format="pack-quantized" if width < MOST_BITS else None,  # else fewer bits take 8 beside rounded activations
    )
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in linears]
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=others,
        # "token" would share a scale among all tokens: the first would know the last
        kv_cache_scheme=rounded(bits.cache, strategy="group", group_size=head_width(model)),
    )
    with without_bars():
        apply_quantization_config(model, config)
        for name, linear in linears.items():
            values, scale, zero = integer_grid(stored[name], width)
            found = {"weight": _decoded(values, scale, zero), "weight_scale": scale}
            if zero is not None:
                found["weight_zero_point"] = zero.to(linear.weight_zero_point.dtype)
            for part, tensor in found.items():
                setattr(linear, part, nn.Parameter(tensor, requires_grad=False))
            compress_module(linear)  # one at a time: all weights in fp32 are twice the model in 16 bits
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model, skip_compressed=True)
    return compressor


def unpack(model: PreTrainedModel, then: Callable[[nn.Module], object]) -> None:
    """What the first pass would do with all layers at once: put the weights, fp32, in the place of their integers,
    one layer at a time. then: what is done with each layer after that."""
    from compressed_tensors.compressors import decompress_module

    model.ct_decompress_hook.remove()  # of ModelCompressor.add_decompress_hook
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None and isinstance(module, nn.Linear):
            decompress_module(module)
            then(module)


def _grid(stored: dict[str, Codes]) -> tuple[int, bool]:
    """Bits of the integers, the codes' own or 8 where offsets are near no zero points, and whether none has a zero
    point. Raises what `integer_grid` raises."""
    own = next(iter(stored.values())).bits
    try:
        return own, all([integer_grid(codes, own)[2] is None for codes in stored.values()])
    except OffsetError:
        return MOST_BITS, all([integer_grid(codes, MOST_BITS)[2] is None for codes in stored.values()])


class OffsetError(ValueError):
    """A learned offset that is near no zero point."""


def integer_grid(stored: Codes, bits: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integers [out, in] of -2^(bits-1)..2^(bits-1)-1, scale and zero point [out, groups] of
    weight = scale * (integer - zero), in `bits`, which may be more than the codes have where these have offsets.

    Worked: 4 bits, low -8, scale 1 and offset 0.3: in 8 bits scale 1/16, zero point -5, integers 16 times the codes.
    Raises ValueError for codes that stand for no integers, OffsetError where a zero point is further than OFFSET_BOUND
    steps of the codes' grid from its offset, or would lie outside the integers.
    """
    if stored.levels is not None:
        raise ValueError("codes: a table of levels is no integer grid")
    integers, offset, middle = stored.integers.int(), stored.offset, 2 ** (bits - 1)
    if offset is None or not bool((offset != 0).any()):
        if stored.zero is None and not -middle <= stored.low < 0:
            raise ValueError(f"codes: integers from {stored.low} up do not lie around zero")
        if stored.zero is None:
            return integers, stored.scale, None
        lowest = -stored.low - middle
        return integers + lowest, stored.scale, stored.zero + lowest
    finer = 2 ** (bits - stored.bits)
    scale = stored.scale / finer
    minimum = offset / scale + finer * (stored.low - (0 if stored.zero is None else stored.zero))  # in finer steps
    nearest = minimum.round()
    first = nearest.clamp(0, finer - 1)  # the integer of the lowest code, from 0 up
    zero = first - nearest
    away = ((minimum - nearest).abs() / finer).max().item()
    if not away <= OFFSET_BOUND or zero.min() < 0 or zero.max() >= 2 * middle:
        raise OffsetError(
            f"codes: an offset is {away:.2g} steps from a zero point of {bits} bits, or outside of them; use --format "
            "gguf, which has offsets"
        )
    values = finer * (integers - stored.low).view(*scale.shape, -1) + first[..., None].int()
    return values.view(stored.shape) - middle, scale, zero - middle


def _decoded(values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    numbers = values.float().view(*scale.shape, -1)
    return ((numbers if zero is None else numbers - zero[..., None]) * scale[..., None]).view(values.shape)
