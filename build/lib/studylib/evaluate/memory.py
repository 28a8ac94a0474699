"""The memory of one training step: measured on a prepared model, or planned for any configuration without weights.

Both run the same step. A plan runs it on fake tensors, which have shapes, types and storages but no numbers (PyTorch's
FakeTensorMode), so that it holds for any architecture, costs seconds at 65B, and agrees with a measurement to the byte.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from studylib.config import (
    DORA,
    INTEGER_FORMATS,
    MAX_BATCH,
    MAX_LENGTH,
    SHAPES,
    Adapter,
    Format,
    check_whole,
)
from studylib.data import check_length, models
from studylib.methods import attach, find_tuned, merge
from studylib.quant import EncodedLinear, cache_bytes_per_token, levels, scale_levels, stored_bytes
from studylib.train import label_loss, last_hidden

GB = 2**30  # bytes, as nvidia-smi and PyTorch count, and cards are sold
TITLES = {
    "base": "frozen weights",
    "trained": "trained parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "total": "total",
}
PURPOSES = tuple(TITLES)[:-1]
CARDS = (8, 12, 16, 24, 40, 48, 80)  # GB
MAX_STEP = 2**19  # tokens: the loss walks through them, and a plan takes half a minute for so many
DRIVER = 1.0  # GB that CUDA and its libraries take of a card before anything is computed
FAKE_ATTENTION = "studylib_fake"
# Bytes a layer: the 16 levels; with double quantization, the 256 of the scales as well.
BITSANDBYTES_TABLES = (64, 64 + 1024)


def _llama(hidden: int, mlp: int, layers: int, heads: int, context: int = 2048) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
    )


# Of SHAPES. LLaMA: arXiv 2302.13971, table 2, mlp sizes from the released weights; OpenLLaMA: its config.json.
CONFIGURATIONS = {
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40),
    "llama-33b": _llama(6656, 17920, 60, 52),
    "llama-65b": _llama(8192, 22016, 80, 64),
    "llama-2-7b": _llama(4096, 11008, 32, 32, 4096),
    "open-llama-3b": _llama(3200, 8640, 26, 32),
}


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one training step by purpose; a storage that several tensors share counts once.

    base: frozen weights (codes, scales, what stays in 16 bits) and buffers. trained: parameters that require gradients.
    gradients: theirs. optimizer: AdamW's state. activations: the most that autograd holds for the backward pass at any
    time of the step. allocated: the CUDA allocator's peak, temporaries included; None elsewhere.
    Not counted: temporaries of single operations (a decoded weight, a gradient with respect to an activation), what
    lies in the allocator's gaps, and the driver's own memory.
    """

    base: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    allocated: int | None = None

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in PURPOSES)


def _storage(tensor: Tensor) -> tuple[int, int]:
    """What identifies the storage of a tensor while it lives, and its bytes."""
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()


def _bytes(tensors: Iterator[Tensor]) -> int:
    return sum(dict(map(_storage, tensors)).values())


class _Saved:
    """A tensor that autograd saved, as long as it does."""

    def __init__(self, tensor: Tensor, kept: "_Kept"):
        self.tensor, self.kept = tensor, kept

    def __del__(self):
        self.kept.release(self.tensor)


class _Kept:
    """Hooks on saved tensors that count the bytes of distinct storages: those held now, and the most so far."""

    def __init__(self, model: nn.Module):
        self.own = {_storage(tensor)[0] for tensor in _tensors(model)}
        self.users, self.now, self.most = {}, 0, 0

    def pack(self, tensor: Tensor) -> Tensor | _Saved:
        key, size = _storage(tensor)
        if key in self.own:
            return tensor
        if key not in self.users:
            self.users[key], self.now = 0, self.now + size
            self.most = max(self.most, self.now)
        self.users[key] += 1
        return _Saved(tensor.detach(), self)

    def release(self, tensor: Tensor) -> None:
        key, size = _storage(tensor)
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]
            self.now -= size

    @staticmethod
    def unpack(saved: Tensor | _Saved) -> Tensor:
        return saved.tensor if isinstance(saved, _Saved) else saved


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers, and the scales that bitsandbytes keeps beside a parameter."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            nested = () if state.state2 is None else (state.offset, state.state2.absmax, state.state2.code)
            yield from (state.absmax, state.code, *nested)


def measure(
    model: PreTrainedModel, batch: int, length: int, *, checkpointing: bool = False, dtype: torch.dtype | None = None
) -> TrainingMemory:
    """The memory of one training step of a prepared model (see methods.attach), on [batch, length] tokens.

    Forward pass, the loss on labels that never holds all logits (losses.label_loss), backward pass, one step of AdamW
    at rate zero: the parameters stay as they are. The same numbers on every machine with the same dtype: bf16 for
    autocast to bf16, fp32 for none; by default models.compute_dtype().
    checkpointing: every decoder layer keeps its input only and is computed again in the backward pass (in the reentrant
    form, whose second forward pass the hooks can see).
    Raises ValueError for an empty batch, fewer than 2 tokens or more than the model's context, more than MAX_STEP in
    all, another dtype, or a model of which nothing requires gradients.
    """
    _check(model, batch, length)
    dtype = dtype or models.compute_dtype()
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"dtype: {dtype} is not allowed; use torch.bfloat16 or torch.float32")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(f"{type(model).__name__}: no parameter requires gradients; prepare it for training (attach)")
    device, training, kept = model.device, model.training, _Kept(model)
    tokens = (torch.arange(batch * length, device=device) % model.config.vocab_size).view(batch, length)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True, "preserve_rng_state": False})
        model.enable_input_require_grads()
    try:
        with saved_tensors_hooks(kept.pack, kept.unpack):
            with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
                hidden = last_hidden(model, tokens)[:, :-1].flatten(0, 1)
                loss = label_loss(hidden, model.get_output_embeddings().weight, tokens[:, 1:].flatten())
            del hidden
            loss.backward()
        optimizer = torch.optim.AdamW(trained, lr=0.0)
        optimizer.step()
        return TrainingMemory(
            base=_bytes(_tensors(model)) - _bytes(trained),
            trained=_bytes(trained),
            gradients=_bytes(p.grad for p in trained if p.grad is not None),
            optimizer=_bytes(value for state in optimizer.state.values() for value in state.values()),
            activations=kept.most,
            allocated=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        )
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
        if checkpointing:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()


def _check(model: PreTrainedModel, batch: int, length: int, least: int = 2) -> None:
    """A loss on the next token takes 2 tokens."""
    check_whole("batch", batch, 1, MAX_BATCH)
    check_whole("length", length, least, MAX_LENGTH)
    check_length(model, length)
    if batch * length > MAX_STEP:
        raise ValueError(f"batch: {batch} of {length} tokens is not allowed; use {MAX_STEP} tokens in one step at most")


def read_config(name: str) -> PreTrainedConfig:
    """The configuration of one of CONFIGURATIONS, a config.json or the folder of one, or a model that
    models.load_config knows.

    ValueError for a name that leads to none.
    """
    if name in CONFIGURATIONS:
        return CONFIGURATIONS[name]
    path = Path(name)
    if path.is_dir() or path.suffix == ".json":
        return models.read_config(path)
    try:
        return models.load_config(name)
    except ValueError as error:
        raise ValueError(f"{error}; or, for a plan, a config.json or one of {', '.join(SHAPES)}") from error


class _Yes(TorchDispatchMode):
    """Answers yes where a tensor without numbers is asked, as in "are all finite?", and no where it says whether one
    number is less than another, as in "is this layer dropped?", which OPT asks."""

    less: Tensor | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return args[0] is not self.less
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.lt.Scalar and found.ndim == 0:
            self.less = found
        return found


# On fake tokens transformers builds the mask that it leaves out on real ones, where no window or padding needs it; here
# nothing is padded, also where a model says so by a mask of ones (OPT).
AttentionInterface.register(FAKE_ATTENTION, sdpa_attention_forward)
AttentionMaskInterface.register(
    FAKE_ATTENTION,
    lambda *arguments, **settings: sdpa_mask(
        *arguments, **settings | {"allow_is_causal_skip": True, "attention_mask": None}
    ),
)


@contextlib.contextmanager
def _no_weights(config: PreTrainedConfig, format: Format | None) -> Iterator[PreTrainedModel]:
    """An fp32 model on the meta device, inside which it can be prepared as a real one."""
    if format is not None and format.kind not in INTEGER_FORMATS:
        levels(format), scale_levels()  # they are cached, and must not be without numbers
    config = copy.deepcopy(config)
    config.dtype = torch.float32  # as models.load_model has it
    with torch.device("meta"), _Yes():
        yield models.skeleton(config)


def plan(
    config: PreTrainedConfig,
    method: str,
    *,
    format: Format | None = None,
    adapter: Adapter | None = None,
    batch: int = 1,
    length: int = 512,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> TrainingMemory:
    """What `measure` would find for this model after attach(model, method, format=format, adapter=adapter).

    dtype: of frozen parameters and of autocast. Attention is PyTorch's own, as on a CPU, which keeps no [length,
    length] maps.
    Raises ValueError where attach or measure would, for a base that is calibrated, and for DoRA on an encoded base.
    """
    own = find_tuned(method)
    if "data" in own.needs:
        raise ValueError(f"method: {method!r} calibrates on tokens; its base takes 16 bits, so plan 'lora' for it")
    if adapter is not None and adapter.kind == DORA and format is not None:
        raise ValueError(
            f"kind: {DORA!r} cannot be planned on {format.title}; its step decodes weights outside of layers"
        )

    def planned(config: PreTrainedConfig) -> list[int]:
        tables = 0  # of bitsandbytes, which rounds on real devices only; EncodedLinear stores the same codes and scales
        with _no_weights(config, format) as model:
            _check(model, batch, length)
            attach(model, own, format=format, adapter=adapter)
            for name, layer in list(model.named_modules()):
                if hasattr(layer, "support_avx512bf16_for_cpu"):
                    model.set_submodule(name, EncodedLinear(layer, format))
                    tables += BITSANDBYTES_TABLES[format.double]
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        with FakeTensorMode(allow_non_fake_inputs=True), _Yes():
            model.to_empty(device="cpu").tie_weights()
            model.set_attn_implementation(FAKE_ATTENTION)
            memory = measure(model, batch, length, checkpointing=checkpointing, dtype=dtype)
        return [getattr(memory, name) + tables * (name == "base") for name in PURPOSES]

    return TrainingMemory(*_by_layers(config, planned))


def _by_layers(config: PreTrainedConfig, count: Callable[[PreTrainedConfig], list[int]]) -> list[int]:
    """count(config), from models of one layer and of two where all are alike: every further layer adds as much."""
    layers, kinds = config.num_hidden_layers, getattr(config, "layer_types", None)
    if layers <= 2 or len(set(kinds or ())) > 1:
        return count(config)
    shallow = [copy.deepcopy(config) for _ in range(2)]
    for depth, model in enumerate(shallow, 1):
        model.num_hidden_layers = depth
        if kinds:
            model.layer_types = kinds[:depth]
    return [one + (layers - 1) * (two - one) for one, two in zip(*map(count, shallow), strict=True)]


def inference_bytes(
    config: PreTrainedConfig,
    method: str,
    *,
    format: Format | None,
    adapter: Adapter | None,
    length: int,
    batch: int = 1,
) -> int:
    """What `method` deploys (see quant.storage.stored_bytes), and 16-bit keys and values of all tokens.

    Raises ValueError where `format` does not fit the model, or `length` its context.
    """

    def counted(config: PreTrainedConfig) -> list[int]:
        with _no_weights(config, format) as model:
            _check(model, batch, length, least=1)
            cache = batch * length * cache_bytes_per_token(model, "16-16-16")
            return [cache + stored_bytes(merge(attach(model, method, format=format, adapter=adapter)))]

    return _by_layers(config, counted)[0]


def plan_text(
    name: str,
    method: str,
    *,
    bits: int = 4,
    batch: int = 1,
    length: int = 512,
    rank: int = 16,
    group: int | None = 64,
    checkpointing: bool = False,
) -> str:
    """What `study plan` prints for a model of read_config's names and a method in its usual format."""
    own = find_tuned(method)
    format = own.usual_format(bits, group)
    Adapter(rank), Format("affine", bits, group)  # checked also where the method makes nothing of them
    config = read_config(name)
    adapter = Adapter(rank) if "adapter" in own.needs else None
    given = {"format": format, "adapter": adapter, "batch": batch, "length": length}
    memory = plan(config, method, **given, checkpointing=checkpointing)
    inference = inference_bytes(config, method, format=format, adapter=adapter, length=length, batch=batch)
    cards = ", ".join(f"{card} GB" for card in CARDS if memory.total <= (card - DRIVER) * GB)
    fits = f"cards of {cards}" if cards else f"no card of {CARDS[-1]} GB"
    base = "16-bit weights" if format is None else format.title
    return "\n".join(
        [
            f"{name}, {method}, {base}{'' if adapter is None else f', rank {rank}'}, batch {batch} x {length} tokens, "
            f"{'with' if checkpointing else 'without'} gradient checkpointing",
            *(f"{title:<20}{getattr(memory, part) / GB:10.2f} GB" for part, title in TITLES.items()),
            f"With {DRIVER:g} GB for the driver, that fits {fits}.",
            f"For inference: {inference / GB:.2f} GB with the 16-bit keys and values of these tokens.",
            "1 GB = 2^30 bytes. Products in bf16, trained parameters in fp32. Not counted: temporaries of single "
            "operations, gaps in the allocator.",
        ]
    )
