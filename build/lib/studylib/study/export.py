"""The model of a record, for other software: compressed-tensors, bitsandbytes, a peft adapter, or 16-bit weights."""

import contextlib
import dataclasses
import gc
import io
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from studylib.config import BITSANDBYTES, DORA, OFF, SYMMETRIC, Arm, Format, markdown, number, written_whole
from studylib.data import models
from studylib.evaluate import score
from studylib.methods import (
    FOUR_BIT,
    INTEGERS,
    PEFT,
    container,
    corpus_title,
    four_bit,
    title,
    unrepacked,
)
from studylib.quant import Codes, DeployedLinear, coded_layers, decoder_linears, sixteen_bits
from studylib.study.records import FINISHED, Record, Store
from studylib.study.run import deployed

if TYPE_CHECKING:
    from compressed_tensors.compressors import ModelCompressor


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written: one of CONTAINERS, its bytes, and the perplexities of what transformers loads from there."""

    container: str
    bytes: int
    metrics: dict[str, float]


def export_model(record: Record, store: Store, folder: Path) -> Exported:
    """Write the record's model, its tokenizer and a README.md into the new folder, and score what transformers loads.

    The model is the one that was kept, or is made again (see run.deployed). Integers keep their scales in fp32; what is
    not quantized is rounded to 16 bits. Raises ValueError, before any work, for a record that no container holds, one
    of other weights, and a folder that is there.
    """
    kind = container(record.arm)
    if record.status != FINISHED:
        raise ValueError(f"record: {record.key} is {record.status}; there is no model to write")
    if folder.exists() or not folder.parent.is_dir():
        why = "exists" if folder.exists() else "would be in no folder"
        raise ValueError(f"output: {folder} {why}; give a new folder in one that exists")
    if models.identity(record.arm.model)["sha256"] != record.provenance["model"]["sha256"]:
        raise ValueError(f"record: {record.key} is of other weights than {record.arm.model} has now")
    with written_whole(folder) as partial:
        partial.mkdir()
        model, tokenizer = deployed(record.arm, store)
        base = model.name_or_path
        if kind == PEFT:
            _write_adapter(record.arm, model, base, partial)
        else:
            _write_weights(kind, record.arm, model, partial)
        del model
        gc.collect()
        tokenizer.save_pretrained(partial)
        wanted = dataclasses.replace(record.arm.evaluation, tasks=())
        print("Scoring what transformers loads", file=sys.stderr)
        metrics, _ = score(_load(kind, record.arm.format, base, partial), tokenizer, wanted)
        size = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
        exported = Exported(kind, size, metrics)
        (partial / "README.md").write_text(_card(record, exported, base))
    return exported


def _without_bars() -> contextlib.AbstractContextManager:
    """Inside, the libraries' progress bars are not shown."""
    return contextlib.redirect_stderr(io.StringIO())


def _write_weights(kind: str, arm: Arm, model: PreTrainedModel, folder: Path) -> None:
    plain = models.load_model(arm.model)
    dtype, stored = sixteen_bits(plain), {name: codes for name, _, codes in coded_layers(model)}
    for name, parameter in plain.named_parameters():
        owner, _, kind_of = name.rpartition(".")
        dense = stored[owner].decode() if kind_of == "weight" and owner in stored else model.get_parameter(name)
        parameter.data.copy_(dense)
    compressor = _compress(plain, arm, stored) if kind == INTEGERS else None
    if kind == FOUR_BIT and arm.format:
        _store_four_bits(plain, arm.format, dtype)
    for name, parameter in plain.named_parameters():
        if parameter.is_floating_point() and not name.endswith(".weight_scale"):
            parameter.data = parameter.data.to(dtype)
    plain.save_pretrained(folder)
    if compressor:
        compressor.update_config(folder)


def _compress(model: PreTrainedModel, arm: Arm, stored: dict[str, Codes]) -> "ModelCompressor":
    """Put compressed-tensors' packed integers in the place of the weights. Returns what writes their configuration."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    linears, bits = decoder_linears(model), arm.widths
    if stored.keys() != linears.keys():
        raise ValueError(f"record: {title(arm)} cannot be exported; its weights have no codes")
    first = next(iter(stored.values()))
    symmetric, columns = first.zeros is None, first.shape[1]
    whole = all(codes.groups == 1 for codes in stored.values())
    blocks = {"strategy": "channel"} if whole else {"strategy": "group", "group_size": columns // first.groups}
    inputs = None
    if bits.activations != OFF:
        inputs = QuantizationArgs(
            num_bits=bits.activations, symmetric=symmetric, strategy="token", dynamic=True, observer=None
        )
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=first.bits, symmetric=symmetric, observer=None, **blocks),
        input_activations=inputs,
        format="pack-quantized" if first.bits < 8 else None,  # else fewer bits take 8 beside rounded activations
    )
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in linears]
    with _without_bars():
        apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=others))
        for name, linear in linears.items():
            scale, zero = integer_grid(stored[name])
            linear.weight_scale.data = scale
            if zero is not None:
                linear.weight_zero_point.data = zero.to(linear.weight_zero_point.dtype)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
    return compressor


def integer_grid(stored: Codes) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point, [out, groups], for integers in -2^(b-1)..2^(b-1)-1: weight = scale * (integer - zero).

    Raises ValueError for codes that stand for no integers, or have an offset that is no whole number of steps.
    """
    middle = 2 ** (stored.bits - 1)
    offset = stored.offset
    if stored.levels is not None or (offset is not None and bool((offset != 0).any())):
        raise ValueError("codes: a table or a learned offset is no integer grid")
    if stored.zero is None:
        if not -middle <= stored.low < 0:
            raise ValueError(f"codes: integers from {stored.low} up do not lie around zero")
        return stored.scale, None
    return stored.scale, stored.zero - stored.low - middle


def _store_four_bits(model: PreTrainedModel, format: Format, dtype: torch.dtype) -> None:
    """Put bitsandbytes' layers in the place of the linear ones, which rounds the scales of double quantization anew."""
    for name, linear in decoder_linears(model).items():
        model.set_submodule(name, four_bit(linear, format))
    others = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    model.config.quantization_config = _bitsandbytes(format, dtype, others)


def _bitsandbytes(format: Format, dtype: torch.dtype, others: list[str] | None = None) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=BITSANDBYTES[format.kind],
        bnb_4bit_use_double_quant=format.double,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=others,
    )


def _write_adapter(arm: Arm, model: PreTrainedModel, base: str, folder: Path) -> None:
    """What peft loads beside the base, in bf16 as it is deployed."""
    from peft import LoraConfig

    assert arm.adapter is not None
    layers = {
        name: layer.beside
        for name, layer in model.named_modules()
        if isinstance(layer, DeployedLinear) and layer.beside is not None
    }
    tensors: dict[str, Tensor] = {}
    for name, beside in layers.items():
        own = {"lora_A.weight": beside.a, "lora_B.weight": beside.b, "lora_magnitude_vector": beside.magnitude}
        prefix = f"base_model.model.{name}"
        tensors |= {f"{prefix}.{part}": tensor.contiguous() for part, tensor in own.items() if tensor is not None}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    LoraConfig(
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        r=arm.adapter.rank,
        lora_alpha=arm.adapter.alpha,
        lora_dropout=arm.adapter.dropout,
        target_modules=sorted({name.rpartition(".")[2] for name in layers}),
        use_dora=arm.adapter.kind == DORA,
        inference_mode=True,
    ).save_pretrained(folder)


def _load(kind: str, format: Format | None, base: str, folder: Path) -> nn.Module:
    """What transformers, and peft for an adapter, load from the folder, in fp32."""
    where = {
        "dtype": torch.float32,
        "trust_remote_code": False,
        "device_map": {"": "cuda" if torch.cuda.is_available() else "cpu"},
    }
    with _without_bars():
        if kind == PEFT:
            from peft import PeftModel

            quantized = format and _bitsandbytes(format, torch.float32)
            plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantized, **where)
            return unrepacked(PeftModel.from_pretrained(plain, folder).eval())
        model = unrepacked(AutoModelForCausalLM.from_pretrained(folder, **where).eval())
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))  # the first pass unpacks
        return model


def summary(record: Record, exported: Exported) -> str:
    """Size and perplexities of what was written, beside the record's, and what is left out, as Markdown."""
    lines = [f"{markdown(title(record.arm))}, {exported.container}: {exported.bytes / 1e6:.1f} MB", ""]
    lines += ["| | as transformers loads it, in fp32 | the record |", "|---|---|---|"]
    for name in (name for name in record.metrics if name.startswith("perplexity/")):
        text = name.removeprefix("perplexity/")
        what = "of held-out Alpaca responses" if text == "responses" else f"on {markdown(corpus_title(text))}"
        here, there = (number(metrics[name] or math.nan) for metrics in (exported.metrics, record.metrics))
        lines.append(f"| perplexity {what} | {here} | {there} |")
    bits = record.arm.widths
    if bits.activations != OFF and record.arm.scheme.on_the_fly == SYMMETRIC:
        lines += [
            "",
            "Activations: max|x| / (2^(b-1) - 1/2) is their scale here, max|x| / (2^(b-1) - 1) in the record.",
        ]
    here = str(models.compute_dtype()).removeprefix("torch.")
    if record.provenance["compute_dtype"] != here:
        lines += ["", f"Made and scored with products in {here}, the record in {record.provenance['compute_dtype']}."]
    if bits.cache != OFF:
        lines += ["", f"Key/value cache: 16 bits here, {bits.cache} in the record."]
    return "\n".join(lines)


def _card(record: Record, exported: Exported, base: str) -> str:
    """README.md: the summary, and how the model is loaded."""
    code = [
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="float32")',
    ]
    if exported.container == PEFT:
        format, given = record.arm.format, [f'"{base}"', 'dtype="float32"']
        if format:
            kind = BITSANDBYTES[format.kind]
            settings = f'load_in_4bit=True, bnb_4bit_quant_type="{kind}", bnb_4bit_use_double_quant={format.double}'
            given += [f"quantization_config=BitsAndBytesConfig({settings})"]
        code = [
            "from peft import PeftModel",
            f"from transformers import AutoModelForCausalLM{', BitsAndBytesConfig' if format else ''}",
            "",
            "base = AutoModelForCausalLM.from_pretrained(",
            *(f"    {argument}," for argument in given),
            ")",
            'model = PeftModel.from_pretrained(base, "FOLDER")',
        ]
    heading = f"# {markdown(f'{record.arm.model}: {title(record.arm)}')}"
    return "\n\n".join([heading, summary(record, exported), "\n".join(["```python", *code, "```"])]) + "\n"
