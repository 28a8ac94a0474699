"""Adapters on low-bit weights, on an unmodified transformers model: put in place, deployed beside their base or merged.

peft and bitsandbytes do what they do well and are imported where they are used: the imports take seconds.
"""

import copy
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from studylib.config import (
    ALL,
    AT_ONCE,
    BESIDE,
    BITSANDBYTES,
    DEQUANTIZED,
    DORA,
    FROM_ORIGINAL,
    LOFTQ,
    MERGED_16,
    MERGED_DISTILLED,
    PACKED,
    PISSA,
    Adapter,
    Format,
    Log,
    in_bitsandbytes,
    written_whole,
)
from studylib.data import models
from studylib.methods.base import Method
from studylib.quant import (
    PEFT_ADAPTER,
    Beside,
    Codes,
    DeployedLinear,
    EncodedLinear,
    RoundedLinear,
    decoder_linears,
    encode,
)

LOFTQ_STEPS = 5  # LoftQ, section 4: "we perform 5 iterations"
OVERSAMPLED = 8  # directions more than the rank, for the accuracy of the last ones


@dataclass(frozen=True)
class Adaptation:
    """What `attach` made of a model, which keeps it as `model.adaptation`; layers: the decoder's linear layers."""

    method: Method
    format: Format | None
    adapter: Adapter | None
    layers: tuple[str, ...]


def compact(model: nn.Module) -> None:
    """Put what is frozen into the type that is computed in."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(models.compute_dtype())


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


def attach_lora(model: nn.Module, format: Format | None, adapter: Adapter, names: list[str], seed: int) -> None:
    """LoRA by peft on a base in `format`, in 16 bits if that is None, with the first A and B of the adapter's kind."""
    factors = {}
    for name, linear in decoder_linears(model).items():
        if adapter.kind in (PISSA, LOFTQ) and name in names:
            rest, *factors[name] = split(linear.weight.detach(), format, adapter)
            linear.weight.data = rest
        if format is not None:
            stored = four_bit(linear, format) if in_bitsandbytes(format) else EncodedLinear(linear, format)
            model.set_submodule(name, stored)
    inject(model, adapter, names, seed)
    for name, (a, b) in factors.items():
        layer = model.get_submodule(name)
        layer.lora_A[PEFT_ADAPTER].weight.data.copy_(a)
        layer.lora_B[PEFT_ADAPTER].weight.data.copy_(b)
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
    assert format is not None
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


def four_bit(linear: nn.Linear, format: Format) -> nn.Linear:
    """bitsandbytes' Linear4bit with the rounded weight of `linear`."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, device="meta")
    layer.weight = Params4bit(
        linear.weight.detach().contiguous(),
        blocksize=format.group,
        compress_statistics=format.double,
        quant_type=BITSANDBYTES[format.kind],
        module=layer,
    ).to(linear.weight.device)  # this rounds
    layer.bias = linear.bias
    return unrepacked(layer)


def unrepacked(model: nn.Module) -> nn.Module:
    """The model with bitsandbytes' layers as they store their codes.

    On processors with AVX512-BF16 the first forward pass in eval mode would else repack them, for good, for a kernel
    without gradients that takes no number of outputs which 32 does not divide.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def bitsandbytes_weight(layer: nn.Module) -> Tensor:
    """The weight, fp32 [out, in], that bitsandbytes' layer stands for; as it is where nothing is rounded."""
    if getattr(layer.weight, "quant_state", None) is None:
        return layer.weight.float()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight, layer.weight.quant_state).float()


def bitsandbytes_codes(layer: nn.Module, format: Format) -> Codes:
    """What bitsandbytes' layer stores, in `format`: its bytes are ours."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:  # on the meta device, for counting
        return encode(layer.weight, format)
    shape, stored = (layer.out_features, layer.in_features), layer.weight.data.view(torch.uint8).flatten()
    if not format.double:
        return Codes(4, shape, stored, state.absmax.float(), levels=state.code)
    nested = {"outer": state.state2.absmax, "mean": state.offset.float().view(1)}
    return Codes(4, shape, stored, state.absmax, **nested, levels=state.code, scale_levels=state.state2.code)


def inject(model: nn.Module, adapter: Adapter, names: list[str], seed: int) -> None:
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
        inject_adapter_in_model(config, model, PEFT_ADAPTER)
    del model.is_loaded_in_4bit


@torch.no_grad()
def merge(
    model: nn.Module, how: str = BESIDE, *, format: Format | None = None, original: nn.Module | None = None
) -> nn.Module:
    """Turn a model that `attach` prepared, in place, into DeployedLinear layers with the weights that are deployed.

    With W~ the base as stored and D the adapter's change, A and B rounded to bf16 as they are stored:
    "adapter": W~ + D, fp32, the same function as base and adapter side by side; "l4q", "qa-lora" and "qat" need no
    adapter any more: the integers, scales and offsets that they trained, exactly. Products in bf16 round the sum
    W~ + D, though, where side by side they round D by itself: of a D of 0.1% of W~ about half is lost, of one of 0.5%
    about 1%. "dequantized": W~ + D in bf16.
    "requantized": W~ + D rounded to the format anew, to the nearest level. "merged-16": W + D in bf16, W from
    `original`, the model as it was loaded; under "pissa" and "loftq" W without the share that the adapter began with.
    "merged-quantized": W + D rounded to the format. ("merged-distilled" takes a training: see merged_student.)
    format: what "requantized" and "merged-quantized" round to; that of the base unless given (a 16-bit base has none).
    Everything is fp32 afterwards, in evaluation mode, and frozen.
    Raises ValueError, and changes nothing, for an unknown `how`, one that the method has no use for, or what is
    missing.
    """
    made: Adaptation | None = getattr(model, "adaptation", None)
    if made is None:
        raise ValueError("the model has no adapter to merge; it was not prepared by attach, or is merged already")
    if how not in AT_ONCE:
        raise ValueError(f"merge: {how!r} is not known or takes a training; use one of {', '.join(AT_ONCE)}")
    wanted = format or made.format
    made.method.check_merge(how, wanted)
    quantized = made.format is not None
    if how in FROM_ORIGINAL and quantized and original is None:
        raise ValueError(f"original: missing; {how!r} adds to the weights of the model as it was loaded")
    plain = {}
    for name in made.layers:
        layer = model.get_submodule(name)
        base, codes = _base(layer, made.format)
        trained_on = base
        if how in FROM_ORIGINAL and quantized:
            assert original is not None
            base = original.get_submodule(name).weight.float().to(base.device)
            if _adapted(layer) and made.adapter is not None and made.adapter.kind in (PISSA, LOFTQ):
                _, a, b = split(base, made.format, made.adapter)
                base = base - made.adapter.scaling * b @ a
        beside = _beside(layer, base, made) if _adapted(layer) else None
        weight = base if beside is None else beside.added_to(base, trained_on)
        if how in PACKED:
            assert wanted is not None  # see check_merge
            beside, codes = None, encode(weight, wanted)
            weight = codes.decode()
        elif how in (DEQUANTIZED, MERGED_16):
            beside, codes, weight = None, None, _bf16(weight)
        plain[name] = DeployedLinear(weight, getattr(layer, "base", layer).bias, codes, beside)
    for name, linear in plain.items():
        model.set_submodule(name, linear)
    del model.adaptation
    if hasattr(model, "peft_config"):
        del model.peft_config
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model.requires_grad_(False).eval()


def merged_student(model: nn.Module, format: Format | None, original: nn.Module) -> nn.Module:
    """A copy of a model that `attach` prepared, for "merged-distilled": what "merged-16" leaves, rounded to `format`,
    that of the base unless given, in every pass. It learns from the model itself; its linear weights require gradients.

    It begins at W + D, not at W~ + D: D is smaller than half a step, so that rounding W~ + D, whose W~ lies on the
    levels, gives back W~. The rest of W lies anywhere between two levels: of W + D, D turns its share of the codes.
    Raises ValueError as `merge` does.
    """
    made: Adaptation = model.adaptation
    wanted = format or made.format
    made.method.check_merge(MERGED_DISTILLED, wanted)
    assert wanted is not None  # see check_merge
    student = merge(copy.deepcopy(model), MERGED_16, original=original)
    for name, linear in decoder_linears(student).items():
        student.set_submodule(name, RoundedLinear(linear.plain(), wanted))
    return student


def _adapted(layer: nn.Module) -> bool:
    """Whether peft put an adapter beside this layer."""
    return hasattr(layer, "lora_variant")


def _base(layer: nn.Module, format: Format | None) -> tuple[Tensor, Codes | None]:
    """The dense weight, fp32 [out, in], of a layer of any method without peft's adapter, and its codes, if any."""
    if _adapted(layer):
        layer = layer.base_layer
    if hasattr(layer, "dense"):
        return layer.dense().float(), layer.codes()
    if format is not None and hasattr(layer, "support_avx512bf16_for_cpu"):
        return bitsandbytes_weight(layer), bitsandbytes_codes(layer, format)
    return layer.weight.float(), None


def _beside(layer: nn.Module, base: Tensor, made: Adaptation) -> Beside:
    """peft's adapter beside a layer, rounded to bf16 as it is deployed; with the 16-bit base that PiSSA left."""
    assert made.adapter is not None
    changed = made.format is None and made.adapter.kind == PISSA
    a, b = (part[PEFT_ADAPTER].weight.bfloat16() for part in (layer.lora_A, layer.lora_B))
    dora = layer.use_dora[PEFT_ADAPTER]
    magnitude = layer.lora_magnitude_vector[PEFT_ADAPTER].weight.bfloat16() if dora else None
    return Beside(a, b, layer.scaling[PEFT_ADAPTER], magnitude, base if changed else None)


def _bf16(x: Tensor) -> Tensor:
    """Rounded to bf16, fp32."""
    return x.bfloat16().float()


def save_trained(model: PreTrainedModel, log: Log, path: Path) -> None:
    """Write what was trained, and the log of that, to the safetensors file `path`, whole or not at all."""
    own = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    with written_whole(path, sealed=True, size=sum(tensor.nbytes for tensor in own.values())) as partial:
        save_file(own, partial, {"log": json.dumps(dataclasses.asdict(log))})


def load_trained(model: PreTrainedModel, path: Path) -> Log:
    """Put what `save_trained` wrote into a model that was prepared alike."""
    own = dict(model.named_parameters())
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            own[name].data.copy_(file.get_tensor(name))
        return Log(**json.loads(file.metadata()["log"]))
