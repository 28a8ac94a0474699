"""What is deployed after fine-tuning: the adapter beside its base, or merged into weights of 16 or of few bits."""

import torch
from torch import Tensor, nn

from studylib.adapters import ADAPTER as PEFT_ADAPTER
from studylib.adapters import (
    DORA,
    L4Q,
    LOFTQ,
    LORA,
    PISSA,
    QA_LORA,
    QAT,
    QAT_LORA,
    Adaptation,
    Adapter,
    LearnedGridLinear,
    QALoRALinear,
    adapted_layers,
    check,
    split,
)
from studylib.formats import SCALE_CODE_BITS, SCALES_IN_BLOCK, EncodedLinear, Format, encode
from studylib.l4q import L4QLinear
from studylib.layers import QuantizedLinear, decoder_linears
from studylib.memory import FLOAT_BYTES

ADAPTER, DEQUANTIZED, REQUANTIZED, MERGED_16, MERGED_QUANTIZED = MERGES = (
    "adapter",
    "dequantized",
    "requantized",
    "merged-16",
    "merged-quantized",
)
QUANTIZED = (QA_LORA, L4Q, QAT)  # methods that train what is deployed: no 16-bit adapter is left
FROM_ORIGINAL = (MERGED_16, MERGED_QUANTIZED)
PACKED = (REQUANTIZED, MERGED_QUANTIZED)


@torch.no_grad()
def merge(
    model: nn.Module, how: str = ADAPTER, *, format: Format | None = None, original: nn.Module | None = None
) -> nn.Module:
    """Turn a model that `attach` prepared, in place, into plain nn.Linear layers with the weights that are deployed.

    With W~ the base as stored and D the adapter's change, A and B rounded to bf16 as they are stored:
    "adapter": W~ + D, fp32, the same function as base and adapter side by side; "l4q", "qa-lora" and "qat" need no
    adapter any more: the integers, scales and offsets that they trained, exactly. Products in bf16 round the sum
    W~ + D, though, where side by side they round D by itself: of a D of 0.1% of W~ about half is lost, of one of 0.5%
    about 1%. "dequantized": W~ + D in bf16.
    "requantized": W~ + D rounded to the format anew, to the nearest level. "merged-16": W + D in bf16, W from
    `original`, the model as it was loaded; under "pissa" and "loftq" W without the share that the adapter began with.
    "merged-quantized": W + D rounded to the format.
    format: what "requantized" and "merged-quantized" round to; that of the base unless given (a 16-bit base has none).
    Everything is fp32 afterwards, in evaluation mode, and frozen.
    Raises ValueError, and changes nothing, for an unknown `how`, one that the method has no use for, or what is
    missing.
    """
    made: Adaptation | None = getattr(model, "adaptation", None)
    if made is None:
        raise ValueError("the model has no adapter to merge; it was not prepared by attach, or is merged already")
    check_merge(made.method, how, format or made.format)
    if how in FROM_ORIGINAL and made.method != LORA and original is None:
        raise ValueError(f"original: missing; {how!r} adds to the weights of the model as it was loaded")
    plain = {}
    for name in made.layers:
        layer = model.get_submodule(name)
        base = stored = _stored_weight(layer)
        if how in FROM_ORIGINAL and made.method != LORA:
            base = original.get_submodule(name).weight.float().to(base.device)
            if _adapted(layer) and made.adapter.kind in (PISSA, LOFTQ):
                _, a, b = split(base, made.format, made.adapter)
                base = base - made.adapter.scaling * b @ a
        weight = _with_adapter(layer, base, stored) if _adapted(layer) else base
        if how in PACKED:
            weight = encode(weight, format or made.format).decode()
        elif how in (DEQUANTIZED, MERGED_16):
            weight = _bf16(weight)
        plain[name] = _linear(weight, getattr(layer, "base", layer).bias)
    for name, linear in plain.items():
        model.set_submodule(name, linear)
    del model.adaptation
    if hasattr(model, "peft_config"):
        del model.peft_config
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model.requires_grad_(False).eval()


def check_merge(method: str, how: str, format: Format | None) -> None:
    """Raise ValueError unless a model that `method` trained can be deployed in this way."""
    if how not in MERGES:
        raise ValueError(f"merge: {how!r} is not known; use one of {', '.join(MERGES)}")
    if method in QUANTIZED and how != ADAPTER:
        raise ValueError(
            f"merge: {how!r} is not allowed for {method!r}, which trains what is deployed; use {ADAPTER!r}"
        )
    if how in PACKED and format is None:
        raise ValueError(f"format: missing; {how!r} rounds to one")


def _adapted(layer: nn.Module) -> bool:
    """Whether peft put an adapter beside this layer."""
    return hasattr(layer, "lora_variant")


def _stored_weight(layer: nn.Module) -> Tensor:
    """The dense weight, fp32 [out, in], of a layer of any method without peft's adapter."""
    if _adapted(layer):
        layer = layer.base_layer
    if isinstance(layer, (QALoRALinear, L4QLinear)):
        return layer.merged().float()
    if isinstance(layer, (QuantizedLinear, LearnedGridLinear)):
        return layer.quantized_weight().float()
    if isinstance(layer, EncodedLinear):
        return layer.encoded.decode()
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.float()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight, state).float()


def _with_adapter(layer: nn.Module, base: Tensor, stored: Tensor) -> Tensor:
    """`base` [out, in] with the layer's adapter: W + scaling B A, under DoRA times m / |W~ + scaling B A| row by row.

    W~ is the `stored` base that was trained on, for any other `base` as well: an adapter that learned nothing is none.
    """
    a, b = (_bf16(part[PEFT_ADAPTER].weight) for part in (layer.lora_A, layer.lora_B))
    product = layer.scaling[PEFT_ADAPTER] * b @ a
    weight = base + product
    if layer.use_dora[PEFT_ADAPTER]:
        magnitude = _bf16(layer.lora_magnitude_vector[PEFT_ADAPTER].weight)
        weight *= (magnitude / (stored + product).norm(dim=1))[:, None]
    return weight


def _bf16(x: Tensor) -> Tensor:
    """Rounded to bf16, fp32."""
    return x.bfloat16().float()


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    linear.bias = bias
    return linear


def inference_bytes(
    model: nn.Module, method: str, format: Format | None, adapter: Adapter | None, how: str = ADAPTER
) -> int:
    """Bytes of the weights that are deployed; `model`: as it is loaded (on any device, "meta" too).

    Packed codes with their scales and zero points (as formats.stored_bytes counts them), adapters that are left and
    all else at 16 bits, tied weights once. The learned grids of "l4q" and "qat-lora", and "qa-lora" after merging, have
    an fp32 scale and an fp32 offset a group. Worked: a [64, 64] weight by "l4q" at 4 bits in groups of 32: 2048 codes'
    bytes + 128 groups * 8.
    Raises ValueError as `attach` and `merge` do.
    """
    check(method, None if method == LORA and how in PACKED else format, adapter)
    check_merge(method, how, format)
    linears = decoder_linears(model)
    packed = how in PACKED or (how == ADAPTER and method != LORA)
    kept = how == ADAPTER and method not in QUANTIZED
    quantized = {id(linear.weight) for linear in linears.values()} if packed else set()
    total = sum(p.numel() * FLOAT_BYTES for p in model.parameters() if id(p) not in quantized)
    adapted = [] if adapter is None else adapted_layers(model, adapter.layers)
    learned = {L4Q: linears, QAT_LORA: linears, QA_LORA: adapted}.get(method, ()) if how == ADAPTER else ()
    if packed:
        total += sum(_packed_bytes(*linears[name].weight.shape, format, name in learned) for name in linears)
    if kept:
        for name in adapted:
            rows, columns = linears[name].weight.shape
            numbers = adapter.rank * (rows + columns) + rows * (adapter.kind == DORA)
            total += numbers * FLOAT_BYTES
    return total


def _packed_bytes(rows: int, columns: int, format: Format, learned: bool) -> int:
    """Bytes of a weight [rows, columns] as formats.encode stores it, or with a learned scale and offset a group."""
    blocks = rows * columns // (format.block or columns)
    codes = -(-rows * columns * format.bits // 8)
    if learned:
        return codes + blocks * 8
    zeros = -(-blocks * format.bits // 8) if format.kind == "affine" else 0
    if format.double:
        return codes + zeros + blocks * SCALE_CODE_BITS // 8 + 4 * (-(-blocks // SCALES_IN_BLOCK) + 1)
    return codes + zeros + blocks * format.scale_bits // 8
