"""What is deployed after fine-tuning: the adapter beside its base, or merged into weights of 16 or of few bits."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from studylib.config.files import written_whole
from studylib.config.settings import (
    BESIDE,
    DEQUANTIZED,
    FROM_ORIGINAL,
    LOFTQ,
    MERGED_16,
    MERGES,
    PACKED,
    PISSA,
    Format,
)
from studylib.methods.adapters import Adaptation, bitsandbytes_codes, bitsandbytes_weight, split
from studylib.quant.formats import encode
from studylib.quant.storage import PEFT_ADAPTER, Beside, Codes, DeployedLinear
from studylib.train.log import Log


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
    "merged-quantized": W + D rounded to the format.
    format: what "requantized" and "merged-quantized" round to; that of the base unless given (a 16-bit base has none).
    Everything is fp32 afterwards, in evaluation mode, and frozen.
    Raises ValueError, and changes nothing, for an unknown `how`, one that the method has no use for, or what is
    missing.
    """
    made: Adaptation | None = getattr(model, "adaptation", None)
    if made is None:
        raise ValueError("the model has no adapter to merge; it was not prepared by attach, or is merged already")
    if how not in MERGES:
        raise ValueError(f"merge: {how!r} is not known; use one of {', '.join(MERGES)}")
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
    with written_whole(path) as partial:
        save_file(own, partial, {"log": json.dumps(dataclasses.asdict(log))})


def load_trained(model: PreTrainedModel, path: Path) -> Log:
    """Put what `save_trained` wrote into a model that was prepared alike."""
    own = dict(model.named_parameters())
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            own[name].data.copy_(file.get_tensor(name))
        return Log(**json.loads(file.metadata()["log"]))
