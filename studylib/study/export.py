"""The model of a record, for other software: compressed-tensors, bitsandbytes, a peft adapter, or 16-bit weights."""

import contextlib
import dataclasses
import gc
import io
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from studylib.config.arm import TUNED, Arm
from studylib.config.settings import DEQUANTIZED, DORA, GRIDS, MERGED_16, OFF, PLAIN, BitWidths, Format, Grid
from studylib.config.words import number
from studylib.data import models
from studylib.evaluate.scores import score
from studylib.evidence.measures import perplexities, response_measures
from studylib.methods import adapters
from studylib.methods.adapters import ADAPTER, BITSANDBYTES, in_bitsandbytes
from studylib.methods.deploy import PACKED
from studylib.quant.formats import DEFAULT_BLOCK
from studylib.quant.layers import decoder_linears
from studylib.study.records import FINISHED, Record, Store
from studylib.study.run import deployed, trained_adapter

INTEGERS, FOUR_BIT, BESIDE, SIXTEEN = CONTAINERS = (
    "compressed-tensors",
    "bitsandbytes",
    "peft adapter",
    "16-bit weights",
)
NEAR = 1e-3  # of a step: what a weight may be away from its integer, less than two grids differ by (1/255)


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written: one of CONTAINERS, its bytes, and the perplexities of what transformers loads from there."""

    container: str
    bytes: int
    metrics: dict[str, float]


def export(record: Record, store: Store, folder: Path) -> Exported:
    """Write the record's model, its tokenizer and a README.md into the new folder, and score what transformers loads.

    The model is made again (see experiments.deployed). Integers keep their scales in fp32; what is not quantized is
    rounded to 16 bits. Raises ValueError, before any work, for a record that no container holds or that is of other
    weights, and for a folder that is there.
    """
    kind = container(record.arm)
    if record.status != FINISHED:
        raise ValueError(f"record: {record.key} is {record.status}; there is no model to write")
    if folder.exists() or not folder.parent.is_dir():
        why = "exists" if folder.exists() else "would be in no folder"
        raise ValueError(f"output: {folder} {why}; give a new folder in one that exists")
    if models.identity(record.arm.model)["sha256"] != record.provenance["model"]["sha256"]:
        raise ValueError(f"record: {record.key} is of other weights than {record.arm.model} has now")
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        model, tokenizer = deployed(record.arm, store)
        base = model.name_or_path
        if kind == BESIDE:
            _write_adapter(record.arm, trained_adapter(record.arm, store), base, partial)
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
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return exported


def _without_bars() -> contextlib.AbstractContextManager:
    """Inside, the libraries' progress bars are not shown."""
    return contextlib.redirect_stderr(io.StringIO())


def container(arm: Arm) -> str:
    """Which of CONTAINERS holds what the arm deploys. ValueError, with the reason, where none does."""
    bits, format = BitWidths.parse(arm.bits), arm.format

    def refused(why: str) -> ValueError:
        return ValueError(f"record: {arm.title} cannot be exported; {why}")

    if arm.method == "full-precision":
        raise refused("it is the model as it was loaded")
    if arm.method in TUNED and arm.method != "qat" and arm.merge not in PACKED:
        if arm.merge in (DEQUANTIZED, MERGED_16):
            return SIXTEEN
        if arm.method in ("l4q", "qa-lora"):
            raise refused("no format that transformers loads has an offset a group that is not a whole number of steps")
        stock = arm.method == "lora" or (
            arm.method == "qlora" and in_bitsandbytes(format) and format.block == DEFAULT_BLOCK
        )
        if not stock or arm.adapter.kind not in (PLAIN, DORA) or arm.model == models.TINY:
            raise refused("its adapter goes with a base that transformers does not make; take an arm that is merged")
        return BESIDE
    if format and in_bitsandbytes(format):
        return FOUR_BIT
    if format and format.kind not in GRIDS:
        raise refused(f"neither compressed-tensors nor bitsandbytes has {format.title}")
    if bits.weights == OFF and not format:
        raise refused("its weights are not quantized")
    if arm.scheme.grid not in GRIDS.values() and bits.activations != OFF:
        raise refused(f"other software scales activations by their largest magnitude, not by {arm.scheme.grid!r}")
    return INTEGERS


def _write_weights(kind: str, arm: Arm, model: PreTrainedModel, folder: Path) -> None:
    plain = models.load_model(arm.model)
    dtype = models.load_config(arm.model).dtype
    if dtype is None or dtype.itemsize > 2:
        dtype = torch.bfloat16
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(model.get_parameter(name))
    compressor = _compress(plain, arm) if kind == INTEGERS else None
    if kind == FOUR_BIT:
        _store_four_bits(plain, arm.format, dtype)
    for name, parameter in plain.named_parameters():
        if parameter.is_floating_point() and not name.endswith(".weight_scale"):
            parameter.data = parameter.data.to(dtype)
    plain.save_pretrained(folder)
    if compressor:
        compressor.update_config(folder)


def _compress(model: PreTrainedModel, arm: Arm):
    """Put compressed-tensors' packed integers in the place of the weights. Returns what writes their configuration."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    bits, linears = BitWidths.parse(arm.bits), decoder_linears(model)
    grid = arm.format.grid if arm.format else Grid(bits.weights, arm.scheme.grid, arm.scheme.weight_group)
    blocks = {"strategy": "channel"} if grid.group is None else {"strategy": "group", "group_size": grid.group}
    inputs = None
    if bits.activations != OFF:
        inputs = QuantizationArgs(
            num_bits=bits.activations, symmetric=grid.symmetric, strategy="token", dynamic=True, observer=None
        )
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=grid.bits, symmetric=grid.symmetric, observer=None, **blocks),
        input_activations=inputs,
        format="pack-quantized" if grid.bits < 8 else None,  # else fewer than 8 bits take 8 beside rounded activations
    )
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in linears]
    with _without_bars():
        apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=others))
        for name, linear in linears.items():
            try:
                scale, zero = integer_grid(linear.weight.data, grid)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            linear.weight_scale.data = scale
            if not grid.symmetric:
                linear.weight_zero_point.data = zero.to(linear.weight_zero_point.dtype)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
    return compressor


def integer_grid(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point, fp32 [out, groups], of the integers that `weight` [out, in] consists of.

    weight = scale * (code - zero) with codes and zero points in -2^(b-1)..2^(b-1)-1, zero points 0 if symmetric: found
    from the weight alone, as the finest such grid, whoever rounded it. Raises ValueError where a group is on none.
    """
    rows = grid.rows(weight.float()) if grid.group else weight.float()[:, None]
    shape, rows = rows.shape[:2], rows.flatten(0, 1)
    low, high = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1
    smallest, largest = rows.amin(-1).clamp_max(0), rows.amax(-1).clamp_min(0)
    span = torch.maximum(largest, -smallest) if grid.symmetric else largest - smallest
    scale, zero = torch.ones_like(span), torch.zeros_like(span)
    found = span == 0
    for steps in range(-low if grid.symmetric else high - low, 0, -1):
        missing = (~found).nonzero()[:, 0]
        if not len(missing):
            break
        step = span[missing] / steps
        exact = rows[missing] / step[:, None]
        codes = exact.round()
        least, most = codes.amin(-1).clamp_max(0), codes.amax(-1).clamp_min(0)
        offset = torch.zeros_like(step) if grid.symmetric else low - least
        fits = ((exact - codes).abs() < NEAR).all(-1) & (least + offset >= low) & (most + offset <= high)
        fitting = missing[fits]
        scale[fitting], zero[fitting], found[fitting] = step[fits], offset[fits], True
    if not found.all():
        kind = "symmetric" if grid.symmetric else "asymmetric"
        raise ValueError(f"{int((~found).sum())} of {found.numel()} groups lie on no {kind} {grid.bits}-bit grid")
    return scale.view(shape), zero.view(shape)


def _store_four_bits(model: PreTrainedModel, format: Format, dtype: torch.dtype) -> None:
    """Put bitsandbytes' layers in the place of the linear ones, which rounds the scales of double quantization anew."""
    for name, linear in decoder_linears(model).items():
        model.set_submodule(name, adapters._four_bit(linear, format))
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


def _write_adapter(arm: Arm, trained: Path, base: str, folder: Path) -> None:
    """What peft loads beside the base, in bf16 as it is deployed."""
    from peft import LoraConfig

    tensors = {}
    for name, tensor in load_file(trained).items():
        part = name.replace(f"lora_magnitude_vector.{ADAPTER}.weight", "lora_magnitude_vector")
        tensors[f"base_model.model.{part.replace(f'.{ADAPTER}.', '.')}"] = tensor.bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    LoraConfig(
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        r=arm.adapter.rank,
        lora_alpha=arm.adapter.alpha,
        lora_dropout=arm.adapter.dropout,
        target_modules=sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors}),
        use_dora=arm.adapter.kind == DORA,
        inference_mode=True,
    ).save_pretrained(folder)


def _load(kind: str, format: Format | None, base: str, folder: Path) -> nn.Module:
    """What transformers, and peft for an adapter, load from the folder, in fp32."""
    where = {"dtype": torch.float32, "device_map": {"": "cuda" if torch.cuda.is_available() else "cpu"}}
    with _without_bars():
        if kind == BESIDE:
            from peft import PeftModel

            quantized = format and _bitsandbytes(format, torch.float32)
            plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantized, **where)
            return PeftModel.from_pretrained(plain, folder).eval()
        model = AutoModelForCausalLM.from_pretrained(folder, **where).eval()
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))  # the first pass unpacks
        return model


def summary(record: Record, exported: Exported) -> str:
    """Size and perplexities of what was written, beside the record's, and what is left out, as Markdown."""
    lines = [f"{record.arm.title}, {exported.container}: {exported.bytes / 1e6:.1f} MB", ""]
    lines += ["| | as transformers loads it, in fp32 | the record |", "|---|---|---|"]
    for measure in perplexities([record]) + response_measures([record]):
        here, there = (number(metrics[measure.name]) for metrics in (exported.metrics, record.metrics))
        lines.append(f"| {measure.title} | {here} | {there} |")
    bits = BitWidths.parse(record.arm.bits)
    if bits.activations != OFF and record.arm.scheme.grid == "symmetric":
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
    if exported.container == BESIDE:
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
    title = f"# {record.arm.model}: {record.arm.title}"
    return "\n\n".join([title, summary(record, exported), "\n".join(["```python", *code, "```"])]) + "\n"
