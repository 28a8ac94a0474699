"""Causal language models and their tokenizers by name."""

import contextlib
import functools
import hashlib
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
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
    PreTrainedTokenizerFast,
)

from studylib.config import SMOLLM2, TINY, file_sha256
from studylib.data.sources import ARCHIVES, cached, fetch

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

NOTES = {
    SMOLLM2: "SmolLM2-135M-Instruct from a GGUF file: its weights were once rounded to Q4_1 and are dequantized here",
    TINY: "a two-layer Llama with random weights, for smoke runs: its numbers mean nothing",
}
END = "<|endoftext|>"
READ = (".json", ".safetensors", ".jinja", ".model", ".txt", ".tiktoken")  # of a model's folder, by transformers
BYTE_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def _allowed() -> str:
    return f"use {SMOLLM2}, {TINY}, a local folder with config.json and safetensors, or a hub id 'owner/name'"


def _location(name: str) -> str | Path:
    """Where transformers finds the model: a folder, or the hub id itself. ValueError if it is neither."""
    if name == SMOLLM2:
        return _dequantized()
    if Path(name).is_dir():
        folder = Path(name)
        for wanted in ("config.json", "*.safetensors"):
            if not any(folder.glob(wanted)):
                raise ValueError(f"model: the folder {name!r} has no {wanted}; {_allowed()}")
        return folder
    if name.count("/") == 1 and not name.startswith((".", "/")) and not name.endswith("/"):
        return name
    raise ValueError(f"model: {name!r} is not known; {_allowed()}")


def absolute_name(name: str) -> str:
    """The name with a local folder made absolute, so that it means the same from any working directory."""
    return str(Path(name).resolve()) if name not in NOTES and Path(name).is_dir() else name


@contextlib.contextmanager
def _read(name: str):
    """The model's location, inside; what goes wrong with its files there is a ValueError of one line."""
    location = _location(name)
    try:
        yield location
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"model: {name!r} could not be read ({first}); {_allowed()}") from error


def load_config(name: str) -> PreTrainedConfig:
    """The model's configuration, without its weights. ValueError for a name that leads to none."""
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
    with _read(name) as location:
        config = AutoConfig.from_pretrained(location)
    if quantized := getattr(config, "quantization_config", None):
        how = quantized.get("quant_method", "")
        raise ValueError(f"model: the weights of {name!r} are quantized already ({how}); use its full-precision ones")
    return config


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """A causal LM of this configuration with weights that were not loaded; under torch.device("meta"), without any."""
    return AutoModelForCausalLM.from_config(config)


def load_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal LM in evaluation mode, on the GPU where there is one.

    name: smollm2-135m (fetched once, about 93 MB), tiny-random, a local folder of safetensors, or a hub id.
    Raises ValueError for a name that leads to no such model or to a file that lacks some of its weights, SourceError
    where the archive cannot be had.
    """
    if name == TINY:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = skeleton(load_config(name)).to(dtype)
    else:
        with _read(name) as location:
            model, loaded = AutoModelForCausalLM.from_pretrained(
                location, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
        # transformers fills these with random numbers
        if wrong := sorted(loaded["missing_keys"] | {name for name, *_ in loaded["mismatched_keys"]}):
            raise ValueError(
                f"model: the safetensors of {name!r} lack {len(wrong)} of the weights that its config.json describes, "
                f"or hold them in another shape: {wrong[0]}, ..."
            )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@functools.lru_cache(maxsize=8)
def load_tokenizer(name: str):
    """The model's tokenizer. ValueError for a name that leads to none."""
    if name == TINY:
        return _byte_tokenizer()
    with _read(name) as location:
        return AutoTokenizer.from_pretrained(location)


def identity(name: str) -> dict[str, str]:
    """Which weights these are: name, note, and the SHA-256 of the weight files (of the tensors of tiny-random)."""
    digest = hashlib.sha256()
    if name == TINY:
        for tensor in load_model(name).cpu().state_dict().values():
            digest.update(tensor.numpy().tobytes())
    else:
        return {"name": name, "note": NOTES.get(name, ""), "sha256": _files_sha256(_folder(name))}
    return {"name": name, "note": NOTES[name], "sha256": digest.hexdigest()}


def contents(name: str) -> str | None:
    """What is another when anything of the model is: a SHA-256 of the files of its folder (weights, configuration,
    tokenizer, template) or, of a hub id, its commit. None for a name of ours, which is pinned."""
    if name in NOTES:
        return None
    location = _location(name)
    if isinstance(location, str):
        return _folder(name).name
    parts = [f"{path.name} {file_sha256(path)}" for path in sorted(location.iterdir()) if path.suffix in READ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _folder(name: str) -> Path:
    """Where the model's files are, of a hub id in the hub's cache."""
    with _read(name) as location:
        if isinstance(location, Path):
            return location
        return Path(transformers.utils.cached_file(name, "config.json")).parent


def _files_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()


@functools.cache
def compute_dtype() -> torch.dtype:
    """bf16 where the hardware multiplies bf16 matrices natively, else fp32 (emulated bf16 is several times slower)."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        have = torch.cpu.get_capabilities()
        native = any(have.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """bf16 autocast where the hardware computes in bf16, nothing elsewhere."""
    return torch.autocast(device.type, compute_dtype(), enabled=compute_dtype() == torch.bfloat16)


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
