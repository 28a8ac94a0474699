"""Quantized linear layers, and how an unmodified transformers model is turned into one made of them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from studylib.config import (
    AFTER_ROTARY,
    ASYMMETRIC,
    FLOATING,
    FULL_RANGE,
    LEARNED,
    MXFP,
    OFF,
    PER_HEAD,
    BitWidths,
    Grid,
    Scheme,
)
from studylib.quant import floats
from studylib.quant.grids import fake_quantize, initial_step, quantize
from studylib.quant.integers import IntegerProduct, multiplies
from studylib.quant.rotation import take_over_rotations
from studylib.quant.storage import FLOAT_BYTES, Codes

SCALE_BYTES = 4  # scales are fp32
CACHE_PROJECTIONS = ("k_proj", "v_proj")
ROTATED_KEYS = "studylib_rotated_keys"  # the attention kind that quantizes keys after rotary embedding


class QuantizedLinear(nn.Linear):
    """A linear layer that computes with quantized weights and inputs, and may quantize its output.

    input [..., in] --activation grid, one scale a token--> times weight [out, in] --weight grid, one scale an output
    channel--> output [..., out] --cache grid, one scale a token--> (keys and values only, before rotary embedding). A
    grid of None means not quantized. The parameters are those of the layer it replaces; a LEARNED grid of the weight
    adds its scales: weight_step [out, in // group, 1].

    Products of frozen weights that need no gradient are those of the integers (see quant.integers) where fp32 is
    computed in. Where bf16 is, which rounds what is dequantized, they stay as they are: so do the records' numbers.
    """

    def __init__(
        self,
        linear: nn.Linear,
        weight: Grid | None,
        activation: Grid | None,
        output: Grid | None,
        mask: float | None = None,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        for grid, width in (
            (weight, linear.in_features),
            (activation, linear.in_features),
            (output, linear.out_features),
        ):
            if grid is not None:
                grid.check_width(width)
        self.weight_grid, self.activation_grid, self.output_grid, self.mask = weight, activation, output, mask
        self.weight_step: nn.Parameter | None = None
        if weight is not None and weight.kind in LEARNED:
            self.weight_step = nn.Parameter(initial_step(linear.weight.detach(), weight))
        self.stored: Codes | None = None
        self._integers: tuple[Codes, IntegerProduct] | None = None
        take_over_rotations(self, linear)

    @property
    def grid_parameters(self) -> list[nn.Parameter]:
        """What is trained of the grid, in units of the layer's scales."""
        return [] if self.weight_step is None else [self.weight_step]

    def learn_steps(self) -> None:
        """Train the integers that are stored, which are full-range ones without zero points, and their scales as LSQ
        does. It begins at these integers, and at their scales but for fp32's rounding."""
        assert self.weight_grid is None and self.stored is not None and self.stored.zeros is None
        groups = self.stored.groups
        self.weight_grid = Grid(self.stored.bits, FULL_RANGE, None if groups == 1 else self.in_features // groups)
        # Larger by what fp32 may round up in integer * scale / scale: the last integer is not beyond itself then.
        scale = self.stored.scale * (1 + 4 * torch.finfo(torch.float32).eps)
        self.weight_step = nn.Parameter(scale if groups == 1 else scale[..., None])
        self.stored = None

    def codes(self) -> Codes | None:
        """The weight as it is stored; None where it has 16 bits. ValueError where it is not finite."""
        if self.weight_grid is None:
            return self.stored
        if self.weight_grid.kind in FLOATING:
            if not self.weight.isfinite().all():
                raise ValueError("weight: holds NaN or infinity; codes exist for finite numbers only")
            return floats.encode(self.weight.detach(), f"{self.weight_grid.kind}{self.weight_grid.bits}")
        found = quantize(self.weight.detach(), self.weight_grid, self.weight_step)
        return Codes.of_integers(found.codes, self.weight_grid.bits, self.weight_grid.low, found.scale, found.zero)

    def dense(self) -> Tensor:
        """The weight that the layer multiplies with, [out, in]."""
        if self.weight_grid is None:
            return self.weight
        return fake_quantize(self.weight, self.weight_grid, self.mask, self.weight_step, whole=True)

    def _product(self, x: Tensor) -> IntegerProduct | None:
        """What multiplies the weight's integers; None where x has to be multiplied otherwise."""
        plain = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if not plain or torch.is_grad_enabled() or self.weight_grid is not None:
            return None
        if self.stored is None or not multiplies(self.stored, self.activation_grid):
            return None
        if self._integers is None or self._integers[0] is not self.stored:
            self._integers = self.stored, IntegerProduct(self.stored)
        return self._integers[1]

    def forward(self, x: Tensor) -> Tensor:
        if self.activation_grid is not None and (product := self._product(x)) is not None:
            y = product(x, self.activation_grid)
            y = y if self.bias is None else y.add_(self.bias)
        else:
            if self.activation_grid is not None:
                x = fake_quantize(x, self.activation_grid, self.mask)
            y = F.linear(x, self.dense(), self.bias)
        return y if self.output_grid is None else fake_quantize(y, self.output_grid, self.mask)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, weight={self.weight_grid}, activation={self.activation_grid}, "
            f"output={self.output_grid}"
        )


def _attend_to_quantized_keys(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention whose rotated keys [B, H, T, D] are quantized, each token by itself."""
    rows = key.transpose(1, 2)  # (B, T, H, D)
    key = fake_quantize(rows.flatten(2), module.key_grid, module.key_mask).view_as(rows).transpose(1, 2)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


AttentionInterface.register(ROTATED_KEYS, _attend_to_quantized_keys)
AttentionMaskInterface.register(ROTATED_KEYS, sdpa_mask)


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that the papers quantize, by name: all but the output head.

    ValueError where there are none, or where a decoder has more to quantize than they are (experts that share a
    tensor), or they are of more than a decoder (images).
    """
    name = type(model).__name__
    if model.config.get_text_config() is not model.config:
        raise ValueError(f"{name} is more than a decoder of text; use the language model inside it by itself")
    experts = [key for key, parameter in model.named_parameters() if "experts" in key and parameter.ndim > 2]
    if experts:
        raise ValueError(f"{name} has experts that share a tensor ({experts[0]}); use a decoder without experts")
    head = model.get_output_embeddings()
    linears = {
        key: module for key, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
    if not linears:
        raise ValueError(f"{name} has no nn.Linear layers; use a decoder made of them (Llama, Mistral, Qwen2, ...)")
    return linears


def check_matrices(model: nn.Module) -> None:
    """ValueError where `decoder_linears` does not see all matrices of a model as it is loaded: they lie in layers of
    another kind, or in ones that may compute something else than nn.Linear."""
    linears, name = decoder_linears(model), type(model).__name__
    for key, linear in linears.items():
        if type(linear) is not nn.Linear:
            raise ValueError(f"{name} has layers that are {type(linear).__name__} ({key}); use a decoder of nn.Linear")
    seen = {*linears.values(), model.get_output_embeddings()}
    for key, module in model.named_modules():
        if module not in seen and not isinstance(module, nn.Embedding):
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.squeeze().ndim > 1:
                    raise ValueError(
                        f"{name} has a matrix outside of its nn.Linear layers ({key}.{own}), left as it is"
                    )


def is_projection(name: str, *wanted: str) -> bool:
    """Whether the layer of this name is one of `wanted`: "attn.v_proj" is a "v_proj", "attn.qkv_proj" is not."""
    return name.rpartition(".")[2] in wanted


def head_width(model: nn.Module) -> int:
    """Numbers in one head's key or value."""
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def quantize_model(
    model: nn.Module,
    bits: str | BitWidths,
    scheme: Scheme = Scheme(),
    *,
    mask: float | None = None,
) -> nn.Module:
    """Replace the decoder's linear layers in place by QuantizedLinear; embeddings and lm_head stay.

    bits: "W-A-KV", e.g. "4-8-4". mask: see `fake_quantize`.
    Raises ValueError for bits that are not allowed, a group that does not divide a layer's input, a model without
    linear layers, one that is quantized already, one without k_proj and v_proj if the cache is to be quantized, a
    LEARNED grid with a mask, or keys after rotary embedding in a model that does not use scaled dot-product
    attention.
    """
    bits = BitWidths.parse(bits)
    scheme.check_widths(bits)
    linears = decoder_linears(model)
    if any(isinstance(module, QuantizedLinear) for module in linears.values()):
        raise ValueError("the model is quantized already; load it anew to quantize it in another way")
    if scheme.grid in LEARNED and mask is not None:
        raise ValueError(
            f"mask: {mask!r} does not go with the grid {scheme.grid!r}, whose gradients are its own; use None"
        )

    def grid(width: int, kind: str, group: int | None = None) -> Grid | None:
        return None if width == OFF else Grid(width, kind, group)

    weight, activation = grid(bits.weights, scheme.grid, scheme.group), grid(bits.activations, scheme.on_the_fly)
    cache = grid(bits.cache, scheme.on_the_fly, head_width(model) if scheme.cache_scale == PER_HEAD else None)
    if cache is not None and not any(is_projection(name, *CACHE_PROJECTIONS) for name in linears):
        raise ValueError(
            f"{type(model).__name__} has no layers named {' and '.join(CACHE_PROJECTIONS)}, whose outputs "
            f"are the keys and values; cache bits must be {OFF} for it"
        )
    rotated = cache is not None and scheme.keys == AFTER_ROTARY
    if rotated and model.config._attn_implementation != "sdpa":
        raise ValueError(
            f"keys: {AFTER_ROTARY!r} needs scaled dot-product attention ('sdpa'); this model attends with "
            f"{model.config._attn_implementation!r}"
        )
    replaced = {}
    for name, linear in linears.items():
        at_output = is_projection(name, *(("v_proj",) if rotated else CACHE_PROJECTIONS))
        if weight or activation or (cache and at_output):
            replaced[name] = QuantizedLinear(linear, weight, activation, cache if at_output else None, mask)
    for name, module in replaced.items():  # only after every layer was found to fit
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    if rotated:
        for name in linears:
            if is_projection(name, "k_proj"):
                attention = model.get_submodule(name.rpartition(".")[0])
                attention.key_grid, attention.key_mask = cache, mask
        model.set_attn_implementation(ROTATED_KEYS)
    return model


def trained_grids(model: nn.Module) -> list[list[nn.Parameter]]:
    """What is trained of each layer's grid: its scales [out, groups, 1] first."""
    found = [getattr(module, "grid_parameters", []) for module in model.modules()]
    return [trained for own in found if (trained := [parameter for parameter in own if parameter.requires_grad])]


@torch.no_grad()
def freeze_weights(model: nn.Module) -> nn.Module:
    """Put the dequantized weights in place of the latent ones, once: the same outputs without work at every pass.

    The layers keep their codes. Weights that are not finite have none: they stay as they are.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.weight_grid is not None:
            if module.weight.isfinite().all():
                module.stored = module.codes()
            module.weight.copy_(module.dense())
            module.weight_grid = module.weight_step = None
    return model


def round_to_nearest(model: nn.Module, bits: str | BitWidths, scheme: Scheme = Scheme()) -> nn.Module:
    """RTN: weights are rounded once in place, activations and cache on the fly; by default on LLM-QAT's MinMax grid.

    Raises ValueError as `quantize_model` does.
    """
    return freeze_weights(quantize_model(model, bits, scheme))


def cache_bytes_per_token(model: nn.Module, bits: str | BitWidths, scheme: Scheme = Scheme()) -> int:
    """Bytes of keys and values that one token leaves in the cache, in all layers: KV bits, an fp32 scale for each.

    A scale is shared by all heads, or each head has its own (scheme.cache_scale). Worked: 3 heads of 64 numbers at 4
    bits: 96 + 4 bytes over all heads, 96 + 12 for each head; MXFP8: 192 + 6, FP8 ("nvfp" at 8 bits): 192 + 4.
    """
    width = BitWidths.parse(bits).cache
    outputs = [
        linear.out_features
        for name, linear in decoder_linears(model).items()
        if is_projection(name, *CACHE_PROJECTIONS)
    ]
    if not outputs:  # one projection of queries, keys and values
        heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
        outputs = [heads * head_width(model)] * (2 * model.config.num_hidden_layers)
    if width == OFF:
        return sum(outputs) * FLOAT_BYTES
    if scheme.grid in FLOATING:
        return sum(_packed_floats(n, Grid(width, scheme.grid)) for n in outputs)
    return sum(
        _packed(n, n // head_width(model) if scheme.cache_scale == PER_HEAD else 1, width, scheme) for n in outputs
    )


def _packed(numbers: int, scales: int, bits: int, scheme: Scheme) -> int:
    zeros = scales if scheme.on_the_fly == ASYMMETRIC else 0
    return (numbers + zeros) * bits // 8 + scales * SCALE_BYTES


def _packed_floats(numbers: int, grid: Grid) -> int:
    """Bytes of a token's keys or values: elements, a byte for each block's scale, an fp32 scale but for "mxfp"."""
    blocks = 0 if grid.block is None else numbers // grid.block
    return numbers * grid.bits // 8 + blocks + SCALE_BYTES * (grid.kind != MXFP)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its parameters in `dtype`. Buffers stay: `.to` would round the frequencies of rotary embeddings,
    which puts the last of 2,048 tokens up to 2.8 radians from where it is."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
