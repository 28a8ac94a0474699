"""Quantized linear layers, and how an unmodified transformers model is turned into one made of them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studylib.quantizers import OFF, BitWidths, Grid, fake_quantize

CACHE_PROJECTIONS = ("k_proj", "v_proj")


class QuantizedLinear(nn.Linear):
    """A linear layer that computes with quantized weights and inputs, and may quantize its output.

    input [..., in] --activation grid, one scale a token--> times weight [out, in] --weight grid, one scale an output
    channel--> output [..., out] --cache grid, one scale a token over all heads--> (keys and values only, before
    rotary embedding). A grid of None means not quantized. The parameters are those of the layer it replaces.
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

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.weight_grid is not None:
            weight = fake_quantize(weight, self.weight_grid, self.mask)
        if self.activation_grid is not None:
            x = fake_quantize(x, self.activation_grid, self.mask)
        y = F.linear(x, weight, self.bias)
        return y if self.output_grid is None else fake_quantize(y, self.output_grid, self.mask)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, weight={self.weight_grid}, activation={self.activation_grid}, "
            f"output={self.output_grid}"
        )


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that the papers quantize, by name: all but the output head. ValueError where there are none."""
    head = model.get_output_embeddings()
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
    if not linears:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear layers; use a decoder made of them (Llama, Mistral, Qwen2, ...)"
        )
    return linears


def quantize_model(
    model: nn.Module,
    bits: str | BitWidths,
    *,
    weight_group: int | None = None,
    weight_symmetric: bool = True,
    activation_symmetric: bool = True,
    cache_symmetric: bool = True,
    mask: float | None = None,
) -> nn.Module:
    """Replace the decoder's linear layers in place by QuantizedLinear; embeddings and lm_head stay.

    bits: "W-A-KV", e.g. "4-8-4". Defaults are LLM-QAT's: symmetric MinMax, weights per output channel, activations
    per token, keys and values per token over all heads, dynamic. weight_group: share a weight scale among that many
    input columns instead of a whole row. mask: see `fake_quantize`.
    Raises ValueError for bits that are not allowed, a group that does not divide a layer's input, a model without
    linear layers, one that is quantized already, or, if the cache is to be quantized, one without k_proj and v_proj.
    """
    bits = BitWidths.parse(bits)
    linears = decoder_linears(model)
    if any(isinstance(module, QuantizedLinear) for module in linears.values()):
        raise ValueError("the model is quantized already; load it anew to quantize it in another way")

    def grid(width: int, symmetric: bool, group: int | None = None) -> Grid | None:
        return None if width == OFF else Grid(width, symmetric, group)

    weight = grid(bits.weights, weight_symmetric, weight_group)
    activation = grid(bits.activations, activation_symmetric)
    cache = grid(bits.cache, cache_symmetric)
    if cache is not None and not any(name.endswith(CACHE_PROJECTIONS) for name in linears):
        raise ValueError(
            f"{type(model).__name__} has no layers named {' and '.join(CACHE_PROJECTIONS)}, whose outputs "
            f"are the keys and values; cache bits must be {OFF} for it"
        )
    replaced = {}
    for name, linear in linears.items():
        output = cache if name.endswith(CACHE_PROJECTIONS) else None
        if weight or activation or output:
            replaced[name] = QuantizedLinear(linear, weight, activation, output, mask)
    for name, module in replaced.items():  # only after every layer was found to fit
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return model


@torch.no_grad()
def freeze_weights(model: nn.Module) -> nn.Module:
    """Put the dequantized weights in place of the latent ones, once: the same outputs without work at every pass."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.weight_grid is not None:
            module.weight.copy_(fake_quantize(module.weight, module.weight_grid))
            module.weight_grid = None
    return model
