"""Causal language models and their tokenizers by name."""

import contextlib
import copy
import functools
import hashlib
import os
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from studylib.config import SMOLLM2, TINY, check_known, file_sha256
from studylib.data import folders
from studylib.data.folders import FolderError
from studylib.data.sources import ARCHIVES, cached, fetch

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

NOTES = {
    SMOLLM2: "SmolLM2-135M-Instruct from a GGUF file: its weights were once rounded to Q4_1 and are dequantized here",
    TINY: "a two-layer Llama with random weights, for smoke runs: its numbers mean nothing",
}
END = "<|endoftext|>"
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
BYTE_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def _allowed() -> str:
    of_hub = "a hub id 'owner/name', or 'owner/name@revision'"
    return f"use {SMOLLM2}, {TINY}, a local folder with config.json and safetensors, or {of_hub}"


def _location(name: str) -> str | Path:
    """Where transformers finds the model: a folder, or its id on the hub. ValueError if it is neither."""
    if name == SMOLLM2:
        return _dequantized()
    if Path(name).is_dir():
        folder = Path(name)
        for wanted in ("config.json", "*.safetensors"):
            if not any(folder.glob(wanted)):
                raise ValueError(f"model: the folder {name!r} has no {wanted}; {_allowed()}")
        return folder
    hub_id, at, revision = name.partition("@")
    if re.fullmatch(r"[^./][^/]*/[^/]+", hub_id) and bool(at) == bool(revision):
        return hub_id
    raise ValueError(f"model: {name!r} is not known; {_allowed()}")


def absolute_name(name: str) -> str:
    """The name with a local folder made absolute, so that it means the same from any working directory."""
    return str(Path(name).resolve()) if name not in NOTES and Path(name).is_dir() else name


@contextlib.contextmanager
def _read(name: str) -> Iterator[dict[str, Any]]:
    """Where transformers finds the model and how it reads it, inside; what goes wrong there is a ValueError of one
    line. No code of the model's own is ever run."""
    location = _location(name)
    if isinstance(location, Path):
        _check_folder(location, contents(name))
    try:
        where: dict[str, Any] = {"pretrained_model_name_or_path": location, "trust_remote_code": False}
        yield where if isinstance(location, Path) else where | {"revision": _commit(name)}
    except FolderError:
        raise
    except Exception as error:  # transformers, safetensors and tokenizers raise errors of many kinds
        raise ValueError(f"model: {name!r} could not be read ({_line(error)}); {_allowed()}") from error


def _line(error: Exception) -> str:
    text = textwrap.shorten(str(error), 240, placeholder=" ...")
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"


@functools.lru_cache(maxsize=8)
def _check_folder(folder: Path, version: str) -> None:
    folders.check(folder)


def _commit(name: str) -> str:
    """The commit that a hub id, with a branch, tag or commit after its @ or without, means now: all files are of it."""
    return _snapshot(name).name


def _snapshot(name: str) -> Path:
    hub_id, _, revision = name.partition("@")
    return Path(transformers.utils.cached_file(hub_id, folders.CONFIG, revision=revision or None)).parent


def load_config(name: str) -> PreTrainedConfig:
    """The model's configuration, without its weights. ValueError for a name that leads to none, or to none of a decoder
    in full precision."""
    if name == TINY:
        return LlamaConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    with _read(name) as where:
        return as_decoder(AutoConfig.from_pretrained(**where), name)


def read_config(path: Path) -> PreTrainedConfig:
    """The configuration in a config.json, or in a folder that may lack weights. ValueError as `load_config`."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"model: {str(path)!r} holds no configuration that can be read ({_line(error)})") from error
    return as_decoder(config, str(path))


def as_decoder(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """The configuration, told to attend as we do and not to pad. ValueError where it is not that of a decoder in full
    precision, or has a size that no model has."""
    if (quantized := getattr(config, "quantization_config", None)) is not None:
        how = quantized.get("quant_method", "")
        raise FolderError(f"model: the weights of {name!r} are quantized already ({how}); use its full-precision ones")
    kind = f"model: {name!r} ({config.model_type})"
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise FolderError(f"{kind} is no decoder that transformers knows; use a causal language model")
    text = config.get_text_config()
    for field in SIZES:
        value = getattr(text, field, None)
        if isinstance(value, int) and value < 1:
            raise FolderError(f"{kind}: {field} is {value} in its config.json; use 1 or more")
    for end in _ids(text.eos_token_id):
        if not 0 <= end < text.vocab_size:
            raise FolderError(f"{kind}: eos_token_id is {end} in its config.json, which has {text.vocab_size} tokens")
    if text.pad_token_id is not None and not 0 <= text.pad_token_id < text.vocab_size:
        text.pad_token_id = None  # nothing is padded here, and an embedding refuses it
    config._attn_implementation = None  # as transformers chooses: scaled dot-product attention where a model has it
    return config


def _ids(given: int | list[int] | None) -> list[int]:
    return [] if given is None else [given] if isinstance(given, int) else list(given)


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """A causal LM of this configuration with weights that were not loaded; under torch.device("meta"), without any."""
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


@functools.cache
def parameter_count(name: str) -> int:
    """How many numbers the model has, by its configuration; before that is known to be one, `check` says so."""
    return parameters_of(load_config(name))


def parameters_of(config: PreTrainedConfig) -> int:
    """How many numbers a model of this configuration has; none is made."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in skeleton(config).parameters())


SAMPLE_LAYERS, SAMPLE_ROWS = 2, 512


def sample(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of this configuration with random weights, few layers and a small vocabulary, on the CPU: it computes as
    the whole one does, in a moment."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = min(SAMPLE_LAYERS, text.num_hidden_layers)
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = kinds[: text.num_hidden_layers]
    text.vocab_size, text.pad_token_id = min(SAMPLE_ROWS, text.vocab_size), None
    config.dtype = torch.float32
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return skeleton(config).eval()


def check(name: str) -> None:
    """ValueError where the model would not be loaded as its files say; nothing of its weights is read."""
    if name != TINY:
        _check(name, contents(name))


@functools.lru_cache(maxsize=8)
def _check(name: str, version: str | None) -> None:
    config, location = load_config(name), _location(name)
    with _read(name), torch.device("meta"):
        described = skeleton(config).state_dict()
    if isinstance(location, Path):  # before anything of an absurd size is made
        held = folders.shapes(location)
        for tensor in sorted(held.keys() & described.keys()):
            if held[tensor] != described[tensor].shape:
                raise FolderError(_mismatch(name, tensor, held[tensor], described[tensor].shape))
    _from_files(name, torch.float32, device_map="meta")


def _mismatch(name: str, tensor: str, held: Iterable[int], described: Iterable[int]) -> str:
    return (
        f"model: {tensor} is {'x'.join(map(str, held))} in the safetensors of {name!r}, and "
        f"{'x'.join(map(str, described))} by its config.json"
    )


def _from_files(name: str, dtype: torch.dtype, **settings: Any) -> PreTrainedModel:
    """What transformers loads. ValueError where that is not what the files hold."""
    config = load_config(name)
    with _read(name) as where:
        if transformers.utils.cached_file(
            where["pretrained_model_name_or_path"],
            folders.ADAPTER,
            revision=where.get("revision"),
            _raise_exceptions_for_missing_entries=False,
        ):
            raise FolderError(f"model: {name!r} is an adapter; merge it into its base, and use that")
        model, loaded = AutoModelForCausalLM.from_pretrained(
            **where,
            **settings,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        for tensor, held, described in sorted(loaded["mismatched_keys"]):
            raise FolderError(_mismatch(name, tensor, held, described))
        # transformers fills the missing with random numbers, and drops the unexpected
        for tensors, wrong in (
            (loaded["missing_keys"], "lack {} of the weights that its config.json describes"),
            (loaded["unexpected_keys"], "hold {} weights that its config.json does not describe"),
        ):
            if tensors:
                few = ", ".join(sorted(tensors)[:4]) + (", ..." if len(tensors) > 4 else "")
                raise FolderError(f"model: the safetensors of {name!r} {wrong.format(len(tensors))}: {few}")
        tied = model.get_expanded_tied_weights_keys(all_submodels=True)
        stored = folders.read_tensors(_folder(name), {*tied, *tied.values()}) if tied else {}
        for one, other in tied.items():
            if {one, other} <= stored.keys() and not torch.equal(stored[one], stored[other]):
                raise FolderError(
                    f"model: {one} in the safetensors of {name!r} is not {other}, which its config.json says it is "
                    "(tie_word_embeddings)"
                )
        _make_savable(model, name)
    return model


def _make_savable(model: PreTrainedModel, name: str) -> None:
    """Mend a generation_config.json that sets a temperature and does not sample, which cannot be saved."""
    config = model.generation_config
    for end in _ids(config.eos_token_id):
        if not isinstance(end, int):
            raise FolderError(f"model: eos_token_id is {end!r} in the generation_config.json of {name!r}; use numbers")
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
        config.validate(strict=True)


def load_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal LM in evaluation mode, on the GPU where there is one.

    name: smollm2-135m (fetched once, about 93 MB), tiny-random, a local folder of safetensors, or a hub id, whose
    branch, tag or commit may stand after an @.
    Raises ValueError for a name that leads to no such model, for files that lack some of its weights, hold others, or
    hold numbers that are not finite, SourceError where the archive cannot be had.
    """
    if name == TINY:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = skeleton(load_config(name)).to(dtype)
    else:
        model = _from_files(name, dtype)
        for tensor, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise FolderError(f"model: {tensor} of {name!r} holds numbers that are not finite")
    return model.to(device()).eval()


def mapped_model(name: str) -> PreTrainedModel:
    """The model as its files have it, bf16 or fp32, each tensor a view of a mapped file: what nobody reads takes no
    memory. That numbers are finite is not looked at, which would read them all. Raises what load_model does else."""
    if name == TINY:
        return load_model(name)
    held = load_config(name).dtype
    return _from_files(name, held if held == torch.bfloat16 else torch.float32).to(device()).eval()


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer. ValueError for a name that leads to none."""
    return _load_tokenizer(name, contents(name))


@functools.lru_cache(maxsize=8)
def _load_tokenizer(name: str, version: str | None) -> PreTrainedTokenizerBase:
    if name == TINY:
        return _byte_tokenizer()
    with _read(name) as where:
        try:
            tokenizer = AutoTokenizer.from_pretrained(**where)
            made = tokenizer("text").input_ids
        except Exception as error:
            raise FolderError(f"model: {name!r} has no tokenizer that can be read ({_line(error)})") from error
        if not made:
            raise FolderError(f"model: the tokenizer of {name!r} makes no tokens of a text")
    return tokenizer


def identity(name: str) -> dict[str, str]:
    """Which weights these are: name, note, and the SHA-256 of the weight files (of the tensors of tiny-random)."""
    sha256 = _tiny_sha256() if name == TINY else _files_sha256(_folder(name))
    return {"name": name, "note": NOTES.get(name, ""), "sha256": sha256}


@functools.cache
def _tiny_sha256() -> str:
    digest = hashlib.sha256()
    for tensor in load_model(TINY).cpu().state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def contents(name: str) -> str | None:
    """What is another when anything of the model is: a SHA-256 of the files of its folder (weights, configuration,
    tokenizer, template) or, of a hub id, its commit. None for a name of ours, which is pinned."""
    if name in NOTES:
        return None
    location = _location(name)
    try:
        return folders.contents(location) if isinstance(location, Path) else _commit(name)
    except OSError as error:
        raise ValueError(f"model: {name!r} could not be read ({_line(error)}); {_allowed()}") from error


def _folder(name: str) -> Path:
    """Where the model's files are, of a hub id in the hub's cache."""
    location = _location(name)
    return location if isinstance(location, Path) else _snapshot(name)


def _files_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()


def device() -> torch.device:
    """What models are computed on: STUDY_DEVICE (cpu, cuda or mps), else CUDA where it is, else the CPU. Of several
    GPUs the first that CUDA_VISIBLE_DEVICES shows, as transformers' Trainer takes it.

    ValueError for a device that is not here.
    """
    there = {"cuda": torch.cuda.is_available(), "cpu": True, "mps": torch.backends.mps.is_available()}
    usable = [name for name, is_there in there.items() if is_there]
    name = os.environ.get("STUDY_DEVICE") or usable[0]
    check_known("STUDY_DEVICE", name, usable)
    return torch.device(name)


def gpu_count() -> int:
    """How many CUDA devices models could be on: none where they are on something else (see device)."""
    return torch.cuda.device_count() if device().type == "cuda" else 0


@functools.cache
def compute_dtype(on: torch.device | None = None) -> torch.dtype:
    """bf16 where the hardware multiplies bf16 matrices natively, else fp32 (emulated bf16 is several times slower).

    on: the device that computes; None for that of models.
    """
    kind = (on or device()).type
    if kind == "mps":
        return torch.float32
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        have = torch.cpu.get_capabilities()
        native = any(have.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """bf16 autocast where the device computes in bf16, nothing elsewhere."""
    dtype = compute_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: 256 symbols after the end-of-text token."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({END: 0} | {symbol: i + 1 for i, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, chat_template=BYTE_TEMPLATE
    )


def _dequantized() -> Path:
    """The folder with SmolLM2's weights as fp32 safetensors, made from the GGUF archive the first time."""
    return cached(f"models/{SMOLLM2}-{ARCHIVES[SMOLLM2].sha256[:12]}", 540, _write_dequantized)


def _write_dequantized(folder: Path) -> None:
    (gguf,) = fetch(SMOLLM2).rglob("*.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # left by the GGUF loader; the weights are plain fp32 now
    plain: nn.Module = skeleton(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    tokenizer.save_pretrained(folder)
