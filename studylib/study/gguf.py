"""GGUF files: codes in blocks of 32 as llama.cpp reads them, with norms, embeddings, tokenizer and chat template.

A block holds 32 neighbours of a row. Integers around 0 go as they are into Q4_0, Q5_0 or Q8_0 (d * q), integers with a
zero point or an offset into Q4_1 or Q5_1 (d * q + m): 2 and 3 bits into those of 4. Scale d and minimum m are fp16
there, which is all that changes (see `rounding_bound`). The layout is that of ggml's `ggml-common.h`, the names and the
order of query and key rows those of llama.cpp's `convert_hf_to_gguf.py`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFType,
    GGUFWriter,
    Keys,
    LlamaFileType,
    RopeScalingType,
    TensorNameMap,
    TokenType,
    dequantize,
    get_tensor_name_map,
    quant_shape_to_byte_shape,
)
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from studylib.config import OFF, Arm, Grid, listed
from studylib.data import beginning, models
from studylib.methods import ADAPTED, DENSE, SHIFTED, find
from studylib.quant import Codes, DeployedLinear, coded_layers, decoder_linears

BLOCK = 32  # neighbours of a row that share a scale
KIND = GGMLQuantizationType
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
PERMUTED = (MODEL_ARCH.LLAMA,)  # whose rotary embedding turns neighbours, where transformers turns halves
AROUND_ZERO = ((KIND.Q4_0, 8), (KIND.Q5_0, 16), (KIND.Q8_0, 128))  # kinds of d * q, q in -n..n-1, the smallest first
WITH_MINIMUM = ((KIND.Q4_1, 16), (KIND.Q5_1, 32))  # kinds of d * q + m, q in 0..n-1
FILES = {
    KIND.F16: LlamaFileType.MOSTLY_F16,
    KIND.BF16: LlamaFileType.MOSTLY_BF16,
    KIND.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    KIND.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    KIND.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    KIND.Q5_1: LlamaFileType.MOSTLY_Q5_1,
    KIND.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
TYPES = {KIND.F32: torch.float32, KIND.F16: torch.float16, KIND.BF16: torch.bfloat16}
FP16 = torch.finfo(torch.float16)
ADAPTER = "adapter.gguf"
ROPE = "rope_freqs.weight"  # by how much the frequencies of Llama 3's rotary embedding are divided
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # llama.cpp's name for how a byte-level tokenizer cuts a text before it merges, by the steps of it
    ("bytes by words",): "gpt-2",
    ("digits", "bytes by words"): "smollm",
    (CONTRACTIONS + "{1,3}" + REST, "bytes"): "llama-bpe",
    (CONTRACTIONS + REST, "bytes"): "qwen2",
}
NORMAL = {"qwen2": [[], ["NFC"]]}  # steps before that, which llama.cpp leaves out, as its own converter does
WHOLE_WORDS = ("llama-bpe",)  # in which a word that is a token is not merged from parts


def check(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError where llama.cpp would compute something else than transformers does, or cut a text elsewhere."""
    name, of = config.model_type, "is one that llama.cpp's models here do not have; use another --format"
    if name not in ARCHITECTURES:
        known = listed(sorted(ARCHITECTURES))
        raise ValueError(f"format: GGUF is written for {known}, and this is {name}; use another --format")
    if getattr(config, "hidden_act", "silu") != "silu":
        raise ValueError(f"format: the activation {config.hidden_act!r} {of}")
    rope = config.rope_parameters
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ValueError(f"format: the rotary embedding {rope['rope_type']!r} {of}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"format: a rotary embedding of a part of each head {of}")
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or []) or name == "mistral"
    if window and slides and window < config.max_position_embeddings:
        raise ValueError(f"format: attention to the last {window} tokens {of}")
    _split(tokenizer)
    _ends(tokenizer)


def check_arm(arm: Arm, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError, before any work, where `write` would refuse what the arm deploys."""
    check(config, tokenizer)
    deployed = find(arm.method).deploys(arm)
    if deployed == DENSE or (deployed == ADAPTED and arm.widths.weights == OFF):
        return
    grid = arm.format.grid if arm.format else Grid(arm.widths.weights, arm.scheme.grid, arm.scheme.group)
    shifted = deployed == SHIFTED
    low = -(2 ** (grid.bits - 1)) if shifted else grid.low
    with torch.device("meta"):
        widths = {linear.in_features for linear in decoder_linears(models.skeleton(config)).values()}
    for width in sorted(widths):
        kind_of(grid.bits, low, shifted or not grid.symmetric, not shifted, grid.group or width)


def kind_of(bits: int, low: int, affine: bool, whole: bool, group: int) -> KIND:
    """The kind of block that holds integers of `bits` bits from `low` up, with a scale for `group` neighbours.

    affine: with a zero point or an offset as well, which is `whole` where it is a whole number of steps. Integers from
    below 0 up end at 2^(bits-1) - 1, as all grids have it. ValueError where no kind does.
    """
    if group % BLOCK:
        raise ValueError(f"format: groups of {group} do not fill GGUF's blocks of {BLOCK}; use another --format")
    if affine:
        for kind, count in WITH_MINIMUM:
            if 2**bits <= count:
                return kind
    lowest, highest = (1 - 2**bits, 2**bits - 1) if affine else (low, 2 ** (bits - 1) - 1 if low < 0 else 2**bits - 1)
    if not affine or whole:
        for kind, least in AROUND_ZERO:
            if -least <= lowest and highest < least:
                return kind
    what = "integers" if not affine else "a zero point" if whole else "a learned offset"
    raise ValueError(f"format: no block of GGUF has {bits} bits with {what}; use another --format")


def pack(codes: Codes) -> tuple[KIND, np.ndarray]:
    """The kind of block that holds the codes [out, in], and the blocks, uint8 [out, in / 32 * bytes of a block].

    Worked: integers -7..7 with a scale for each 32: Q4_0, whose d is the scale and q the integer plus 8. ValueError
    where no kind of block holds them.
    """
    rows, columns = codes.shape
    kind, integers, scale = _kind(codes), codes.integers.int(), codes.scale.double()
    if kind in dict(WITH_MINIMUM):
        numbers, levels = [scale, _minimum(codes)], integers - codes.low
    else:
        zero = 0 if codes.zero is None else codes.zero.int().repeat_interleave(columns // codes.groups, 1)
        numbers, levels = [scale], integers - zero + (0 if kind is KIND.Q8_0 else dict(AROUND_ZERO)[kind])
    if any((number.abs() > FP16.max).any() for number in numbers):
        raise ValueError("format: a scale is larger than fp16, which GGUF has for it; use another --format")
    blocks = columns // codes.groups // BLOCK  # in a group
    heads = [number.half().cpu().repeat_interleave(blocks, 1)[..., None].numpy().view(np.uint8) for number in numbers]
    quants = levels.view(rows, -1, BLOCK).to(torch.int8 if kind is KIND.Q8_0 else torch.uint8).cpu().numpy()
    if kind is KIND.Q8_0:
        return kind, np.concatenate([*heads, quants.view(np.uint8)], -1).reshape(rows, -1)
    fifth = [np.packbits(quants >> 4, axis=-1, bitorder="little")] if kind in (KIND.Q5_0, KIND.Q5_1) else []
    nibbles = (quants[..., : BLOCK // 2] & 15) | (quants[..., BLOCK // 2 :] & 15) << 4
    return kind, np.concatenate([*heads, *fifth, nibbles], -1).reshape(rows, -1)


def _kind(codes: Codes) -> KIND:
    if codes.levels is not None:
        raise ValueError("format: no block of GGUF has such a table of levels; use another --format")
    affine = codes.zeros is not None or codes.offsets is not None
    return kind_of(codes.bits, codes.low, affine, codes.offsets is None, codes.shape[1] // codes.groups)


def _minimum(codes: Codes) -> Tensor:
    """What the lowest level of each group stands for, [out, groups], fp64."""
    zero, offset = codes.zero, codes.offset
    lowest = codes.scale.double() * (codes.low - (0 if zero is None else zero.double()))
    return lowest if offset is None else lowest + offset.double()


def rounding_bound(codes: Codes) -> Tensor:
    """How far fp16 moves a weight of each group at most, [out, groups], fp64: by 2^-11 of the scale in each step and of
    the minimum, or by half the smallest fp16 number where that is more."""
    kind, scale = _kind(codes), codes.scale.double().abs()
    relative, least = FP16.eps / 2, FP16.smallest_normal * FP16.eps / 2
    moved = (scale * relative).clamp_min(least)
    if kind in dict(WITH_MINIMUM):
        return (2**codes.bits - 1) * moved + (_minimum(codes).abs() * relative).clamp_min(least)
    return float(codes.integers.abs().max()) * moved if codes.zeros is None else 2**codes.bits * moved


@torch.no_grad()
def write(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> tuple[str, float | None]:
    """Write the deployed model to the file, one tensor at a time, and read it back.

    name: what the model is called. Returns the kind of most of its matrices ("Q4_1"), and how far the weight that moved
    most is from what its codes say, in steps of its grid; None where there are no codes. An adapter beside codes is
    left out (see write_adapter), one beside 16 bits is in them. Raises ValueError for what `check` and `pack` refuse.
    """
    check(model.config, tokenizer)
    config, stored = model.config, {own: codes for own, _, codes in coded_layers(model)}
    names = get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    kinds = []
    for own, tensor, codes in _tensors(model, stored):
        kind, shape = _layout(tensor, codes)
        kinds += [kind] * (tensor.ndim > 1)
        size = int(np.prod(quant_shape_to_byte_shape(shape, kind)))
        writer.add_tensor_info(_name(names, own), shape, np.dtype(np.float32), size, kind)
    most = max(set(kinds), key=kinds.count)
    _describe(writer, config, name, most)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for own, tensor, codes in _tensors(model, stored):
        if codes is None:
            kind, _ = _layout(tensor, codes)
            rows = (
                tensor.to(TYPES[kind]).cpu().contiguous().view(torch.uint8 if tensor.ndim > 1 else TYPES[kind]).numpy()
            )
        else:
            _, rows = pack(codes)
        writer.write_tensor_data(_turned(rows, own, config))
    writer.close()
    return most.name, _moved(path, config, names, stored) if stored else None


@torch.no_grad()
def read(folder: Path, config: PreTrainedConfig, multiplied: torch.dtype = torch.float32) -> PreTrainedModel:
    """What the files in the folder say, in transformers' model of this configuration: the file of weights and, where
    there is one, the adapter beside it. fp32, one tensor at a time; multiplied: what weights of linear layers are
    rounded to, but for one that embeds tokens as well.

    transformers' own reader leaves out scaled rotary embeddings and biases (findings/gguf-loaded-without-rope-scaling).
    """
    (path,) = folder.glob("model-*.gguf")
    names = get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    with init_empty_weights(include_buffers=False):
        model = models.skeleton(config).eval()
    model.tie_weights()  # which the empty ones are no longer
    written = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    adapters, scaling = _read_adapters(folder / ADAPTER)
    for own, parameter in list(model.named_parameters()):
        (owner, _, part), name = own.rpartition("."), _name(names, own)
        tensor = written[name]
        numbers = _turned(dequantize(tensor.data, tensor.tensor_type), own, config, back=True)
        found = torch.from_numpy(np.require(numbers, requirements=["C", "W"])).view(parameter.shape)
        if f"{name}.lora_a" in adapters:
            a, b = adapters[f"{name}.lora_a"], _turned(adapters[f"{name}.lora_b"], own, config, back=True)
            found += scaling / len(a) * torch.from_numpy(b @ a)
        module = model.get_submodule(owner)
        dtype = multiplied if isinstance(module, nn.Linear) else torch.float32
        setattr(module, part, nn.Parameter(found.to(dtype), requires_grad=False))
    model.tie_weights()
    return model


def _read_adapters(path: Path) -> tuple[dict[str, np.ndarray], float]:
    """A and B by name, and alpha; nothing where there is no such file."""
    if not path.exists():
        return {}, 0.0
    reader = GGUFReader(path)
    found = {tensor.name: np.array(dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    return found, float(reader.fields[Keys.Adapter.LORA_ALPHA].contents())


def write_adapter(path: Path, model: PreTrainedModel, alpha: float, name: str) -> None:
    """Write the adapters beside the layers of a deployed model to a file for llama.cpp's --lora: A and B in fp16."""
    config = model.config
    names = get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    writer.add_type(GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    for own, layer in model.named_modules():
        if isinstance(layer, DeployedLinear) and layer.beside is not None:
            found, (a, b) = (
                _name(names, f"{own}.weight"),
                (part.half().cpu().numpy() for part in (layer.beside.a, layer.beside.b)),
            )
            writer.add_tensor(f"{found}.lora_a", a)
            writer.add_tensor(f"{found}.lora_b", np.ascontiguousarray(_turned(b, f"{own}.weight", config)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: PreTrainedModel, stored: dict[str, Codes]) -> Iterator[tuple[str, Tensor, Codes | None]]:
    """Name as in transformers, tensor and, of a weight in low bits, codes: what the file holds, in its order."""
    with torch.device("meta"):
        plain = models.skeleton(model.config)
    for name, parameter in plain.named_parameters():
        owner, _, part = name.rpartition(".")
        if part == "weight" and owner in stored:
            yield name, parameter, stored[owner]
        else:
            yield name, model.get_parameter(name), None
    rope = model.config.rope_parameters
    if rope["rope_type"] == "llama3":
        own = model.base_model.rotary_emb.inv_freq.float().cpu()
        yield ROPE, 1 / (rope["rope_theta"] ** (torch.arange(len(own)) / len(own))) / own, None


def _layout(tensor: Tensor, codes: Codes | None) -> tuple[KIND, tuple[int, ...]]:
    if codes is not None:
        return _kind(codes), codes.shape
    if tensor.ndim < 2:
        return KIND.F32, tuple(tensor.shape)
    return KIND.BF16 if tensor.abs().max() > FP16.max else KIND.F16, tuple(tensor.shape)


def _name(names: TensorNameMap, own: str) -> str:
    found = own if own == ROPE else names.get_name(own, (".weight", ".bias"))
    if found is None:
        raise ValueError(f"format: GGUF has no name for {own}; use another --format")
    return found


def _turned(rows: np.ndarray, own: str, config: PreTrainedConfig, back: bool = False) -> np.ndarray:
    """Rows of queries and keys, of which the halves of each head are put one into the other, or back."""
    if ARCHITECTURES[config.model_type] not in PERMUTED:
        return rows
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(own.split(".")[-2])
    if heads is None:
        return rows
    halves = (-1, 2) if back else (2, -1)
    return rows.reshape(heads, *halves, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _moved(path: Path, config: PreTrainedConfig, names: TensorNameMap, stored: dict[str, Codes]) -> float:
    written = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    largest = 0.0
    for own, codes in stored.items():
        tensor = written[_name(names, f"{own}.weight")]
        rows = _turned(dequantize(tensor.data, tensor.tensor_type), f"{own}.weight", config, back=True)
        away = (torch.from_numpy(rows) - codes.decode(torch.float32).cpu()).abs().view(*codes.scale.shape, -1)
        largest = max(largest, float((away.amax(-1) / codes.scale.abs().cpu()).max()))
    return largest


def _describe(writer: GGUFWriter, config: PreTrainedConfig, name: str, kind: KIND) -> None:
    rope = config.rope_parameters
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_file_type(FILES[kind])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _split(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name for how the tokenizer cuts a text into words. ValueError where it has none."""
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    steps: list[str] = []
    for step in _parts(told["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            steps.append("bytes by words" if step["use_regex"] else "bytes")
        elif step["type"] == "Digits" and step["individual_digits"]:
            steps.append("digits")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            steps.append(step["pattern"].get("Regex", ""))
        else:
            steps.append(step["type"])
    found, bpe = SPLITS.get(tuple(steps)), told["model"]
    normal = [step["type"] for step in _parts(told["normalizer"], "normalizers")]
    merges = bpe["type"] == "BPE" and not bpe.get("continuing_subword_prefix")
    if (
        not merges
        or bpe.get("ignore_merges", False) != (found in WHOLE_WORDS)
        or normal not in NORMAL.get(found or "", [[]])
    ):
        found = None
    if found is None:
        raise ValueError("format: llama.cpp has no name here for how this tokenizer cuts a text; use another --format")
    return found


def _parts(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    return [] if step is None else step[name] if step["type"] == "Sequence" else [step]


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before a text and EOS behind it. ValueError where it puts something else."""
    first, plain = beginning(tokenizer), tokenizer("text", add_special_tokens=False).input_ids
    last = tokenizer("text").input_ids[len(first) + len(plain) :]
    if first not in ([], [tokenizer.bos_token_id]) or last not in ([], [tokenizer.eos_token_id]):
        raise ValueError("format: this tokenizer puts more around a text than BOS and EOS; use another --format")
    return bool(first), bool(last)


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    told, added = json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.added_tokens_decoder
    named = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens = [named.get(number, f"[PAD{number}]") for number in range(size)]
    types = [
        TokenType.UNUSED
        if number not in named
        else TokenType.NORMAL
        if number not in added
        else TokenType.CONTROL
        if added[number].special
        else TokenType.USER_DEFINED
        for number in range(size)
    ]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in told["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # llama.cpp refuses a file without merges, and gguf writes no empty list: two whole tokens never stand side by side.
    writer.add_token_merges(merges or [f"{tokens[0]} {tokens[0]}"])
    starts, stops = _ends(tokenizer)
    writer.add_add_bos_token(starts)
    writer.add_add_eos_token(stops)
    for number, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if number is not None:
            add(number)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
