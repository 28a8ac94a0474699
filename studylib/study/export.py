"""The model of a record, for other software: GGUF, compressed-tensors, bitsandbytes, a peft adapter, 16-bit weights."""

import copy
import dataclasses
import gc
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from studylib.config import BITSANDBYTES, DORA, Arm, Format, written_whole
from studylib.data import models
from studylib.evaluate import score
from studylib.methods import (
    ADAPTED,
    DENSE,
    FOUR_BIT,
    GGUF,
    INTEGERS,
    PEFT,
    SIXTEEN_BITS,
    container,
    find,
    four_bit,
    unrepacked,
)
from studylib.quant import Codes, DeployedLinear, coded_layers, sixteen_bits
from studylib.study import cards, compressed, gguf
from studylib.study.cards import Exported
from studylib.study.machine import give_back_freed_memory
from studylib.study.records import FINISHED, Record, Store
from studylib.study.run import deployed


def export_model(
    record: Record,
    store: Store,
    folder: Path,
    wanted: str | None = None,
    base_id: str | None = None,
    scored: bool = False,
) -> Exported:
    """Write the record's model, its tokenizer, README.md and study.json into the new folder.

    wanted: which of CONTAINERS, None for the usual one. base_id: the public name of the model that it was made of.
    scored: score what is loaded from there, too, which takes longer than all else; `study run-check` can do it later.
    The model is the one that was kept, or is made again (see run.deployed). Integers keep their scales in fp32 (in GGUF
    fp16); what is not quantized is rounded to 16 bits. Raises ValueError, before any work, for a record that the
    container does not hold, one of other weights, an adapter whose base has no public name, and a folder that is there.
    """
    arm, kind = record.arm, container(record.arm, wanted)
    if record.status != FINISHED:
        raise ValueError(f"record: {record.key} is {record.status}; there is no model to write")
    if folder.exists() or not folder.parent.is_dir():
        why = "exists" if folder.exists() else "would be in no folder"
        raise ValueError(f"output: {folder} {why}; give a new folder in one that exists")
    if models.identity(arm.model)["sha256"] != record.provenance["model"]["sha256"]:
        raise ValueError(f"record: {record.key} is of other weights than {arm.model} has now")
    public = cards.base_id(arm.model, base_id)
    if kind == PEFT and public is None:
        raise ValueError("base-id: missing; an adapter names its base, and this is a local folder: give --base-id")
    if kind == GGUF:
        gguf.check_arm(arm, models.load_config(arm.model), models.load_tokenizer(arm.model))
    give_back_freed_memory()
    with written_whole(folder) as partial:
        partial.mkdir()
        model, tokenizer = deployed(arm, store, dense=find(arm.method).deploys(arm) in (ADAPTED, DENSE))
        base, config, file, moved = model.name_or_path, model.config, None, None
        if kind == PEFT:
            _write_adapter(arm, model, str(public), partial)
        elif kind == GGUF:
            file, moved = _write_gguf(arm, model, tokenizer, cards.base_title(arm.model, base_id), partial)
        else:
            plain, stored = taken_over(model)
            del model
            _write_weights(kind, arm, plain, stored, partial)
            del plain, stored
        model = None
        gc.collect()
        tokenizer.save_pretrained(partial)
        metrics: dict[str, float] = {}
        if scored:
            print("Scoring what is loaded from there", file=sys.stderr)
            loaded = _to_score(kind, arm.format, base, partial, config)
            metrics, _ = score(loaded, tokenizer, dataclasses.replace(arm.evaluation, tasks=()), batch=1)
        size = sum(path.stat().st_size for ending in ("safetensors", "gguf") for path in partial.glob(f"*.{ending}"))
        exported = Exported(kind, size, metrics, moved)
        (partial / "README.md").write_text(cards.card(record, exported, base_id, file))
        (partial / cards.NOTE).write_text(cards.note(record, exported, public, file))
    return exported


def _write_gguf(
    arm: Arm, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, folder: Path
) -> tuple[str, float | None]:
    """The file's name, and how far a weight is from its codes. An adapter beside integers has a file of its own."""
    kind, moved = gguf.write(folder / "model.gguf", model, tokenizer, name)
    file = f"model-{kind}.gguf"  # which llama.cpp's own downloader goes by
    (folder / "model.gguf").rename(folder / file)
    if find(arm.method).deploys(arm) == ADAPTED and arm.adapter and next(coded_layers(model), None):
        gguf.write_adapter(folder / gguf.ADAPTER, model, arm.adapter.alpha, name)
    return file, moved


@torch.no_grad()
def taken_over(model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Codes]]:
    """A plain model with all that codes do not say, in 16 bits, and the codes by layer. Where there are codes its
    weights have no numbers yet. The deployed model is used up: its numbers are rounded in their place, one by one, so
    that no two copies of them are in memory."""
    dtype = sixteen_bits(model)
    beside = {name for name, layer in model.named_modules() if getattr(layer, "beside", None) is not None}
    stored = {name: codes for name, _, codes in coded_layers(model) if name not in beside}
    with torch.device("meta"):
        plain = models.skeleton(copy.deepcopy(model.config))
    plain.generation_config = model.generation_config
    for name, _ in list(plain.named_parameters()):
        owner, _, part = name.rpartition(".")
        if owner in stored and part == "weight":
            continue
        own = model.get_parameter(name)
        own.data = own.data.to(dtype)
        setattr(plain.get_submodule(owner), part, nn.Parameter(own.data, requires_grad=False))
    for name, _ in list(plain.named_buffers()):
        owner, _, part = name.rpartition(".")
        setattr(plain.get_submodule(owner), part, model.get_buffer(name))
    plain.tie_weights()
    return plain.eval(), stored


@torch.no_grad()
def _write_weights(kind: str, arm: Arm, plain: PreTrainedModel, stored: dict[str, Codes], folder: Path) -> None:
    """What `taken_over` left, with the codes' numbers put into their places one layer at a time."""
    compressor = compressed.compress(plain, arm, stored) if kind == INTEGERS else None
    dtype = sixteen_bits(plain)
    if kind != INTEGERS:
        for name, codes in stored.items():
            linear = plain.get_submodule(name)
            linear.weight = nn.Parameter(codes.decode(torch.float32), requires_grad=False)
            if kind == FOUR_BIT and arm.format:
                plain.set_submodule(name, four_bit(linear, arm.format))
            else:
                linear.weight.data = linear.weight.data.to(dtype)
    if kind == FOUR_BIT and arm.format:
        others = [name for name, module in plain.named_modules() if type(module) is nn.Linear]
        plain.config.quantization_config = _bitsandbytes(arm.format, dtype, others)
    plain.save_pretrained(folder)
    if compressor:
        compressor.update_config(folder)


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


def load(kind: str, format: Format | None, base: str, folder: Path) -> nn.Module:
    """What transformers, and peft for an adapter, load from the folder, in fp32."""
    model = _from_folder(kind, format, base, folder, torch.float32)
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))  # the first pass unpacks
    return model


def _from_folder(
    kind: str, format: Format | None, base: str, folder: Path, dtype: torch.dtype | str
) -> PreTrainedModel:
    where = {"dtype": dtype, "trust_remote_code": False, "device_map": {"": models.device()}}
    with compressed.without_bars():
        if kind == PEFT:
            from peft import PeftModel

            quantized = format and _bitsandbytes(format, torch.float32)
            plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantized, **where)
            return unrepacked(PeftModel.from_pretrained(plain, folder).eval())
        return unrepacked(AutoModelForCausalLM.from_pretrained(folder, **where).eval())


@torch.no_grad()
def _to_score(kind: str, format: Format | None, base: str, folder: Path, config: PreTrainedConfig) -> nn.Module:
    """What `load` and gguf.read give, to the same scores, in less memory: a linear layer has its weight in the type
    that it is multiplied in, where autocast would make that of fp32 in every pass."""
    if kind == GGUF:
        return gguf.read(folder, config, models.compute_dtype())
    model = _from_folder(kind, format, base, folder, "auto" if kind == SIXTEEN_BITS else torch.float32)
    model.requires_grad_(False)  # of what has a gradient, autocast keeps its copies
    if kind == PEFT:  # which computes with its weights, not by linear layers alone
        return model
    _in_computed_types(model)
    if kind == INTEGERS:
        compressed.unpack(model, _in_computed_types)
    return model


def _in_computed_types(model: nn.Module) -> nn.Module:
    """In place: weights of linear layers in the type that products are computed in, and all other numbers in fp32; but
    embeddings of tokens in that type as well where they lose nothing, and what they give in fp32."""
    multiplied, lossless, others = models.compute_dtype(), set(), set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            own = module.weight
            if type(module) is nn.Embedding and torch.equal(own.to(multiplied).to(own.dtype), own):
                module.register_forward_hook(lambda module, given, found: found.float())
                lossless.add(id(own))
            else:
                others.add(id(own))
    for module in model.modules():
        for name, own in module.named_parameters(recurse=False):
            if own.is_floating_point():
                linear = isinstance(module, nn.Linear) and name in ("weight", "bias") and id(own) not in others
                own.data = own.data.to(multiplied if linear or id(own) in lossless else torch.float32)
    return model
