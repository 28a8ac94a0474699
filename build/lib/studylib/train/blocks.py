"""Training of a decoder block by block: each towards its own output in full precision (EfficientQAT's first phase).

Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models" (arXiv 2407.11062),
section 3.2, Block-AP, and its official code.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from studylib.config import AFFINE, Format
from studylib.data import models
from studylib.quant import FixedIntegersLinear, LearnedGridLinear, decoder_linears

# The paper has 4,096 windows of 2,048 tokens and so 4,096 steps a block; here 32 windows make 32, of higher rates.
PASSES = 2  # over the windows: the paper's
BATCH = 2  # windows of a step: its code's
WEIGHT_RATE = 3e-4  # of AdamW without weight decay; the paper's: 1e-5, 2e-5 at two bits
GRID_RATE = 5e-3  # of scales and offsets, as a share of the layer's scales; the paper's: 1e-4, not as a share
LAST_RATE = 1 / 20  # what cosine decay ends at, as a share of the first rate: its code's

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is called with beside hidden states


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks that hidden states pass one after the other; ValueError, in one line, where linear layers of the
    decoder are not in them."""
    blocks = list(getattr(model.base_model, "layers", []))
    inside = {module for block in blocks for module in block.modules()}
    for name, linear in decoder_linears(model).items():
        if linear not in inside:
            raise ValueError(f"{type(model).__name__}: its layer {name} is in none of base_model.layers")
    return blocks


def train_blocks(model: PreTrainedModel, tokens: Tensor, format: Format, init: str) -> None:
    """Put FixedIntegersLinear in the place of the decoder's linear layers, block by block, each trained before.

    Trained are the block's linear weights, their scales and, for affine formats, offsets, which begin as `init` has
    them (see quant.initial_grid). The block gets what the rounded blocks before it give, and learns, by the mean
    squared error, what it gave in full precision on what the blocks before it gave so. All else of it stays.
    tokens [N, T]: windows, taken in their order, PASSES times, BATCH at a time (an odd last one is left out). The same
    windows give the same numbers. Gradients, optimizer and activations are those of one block; besides, the hidden
    states of all windows are held twice, in fp32.
    Raises ValueError as decoder_blocks does, and where a block diverged.
    """
    blocks, linears = decoder_blocks(model), decoder_linears(model)
    batch = min(BATCH, len(tokens))
    batches = tokens[: len(tokens) // batch * batch].to(model.device).split(batch)
    with models.autocast(model.device):
        entering, calls = _entering(model, blocks, batches)
        given = wanted = entering
        for block, call in zip(blocks, calls, strict=True):
            inside = set(block.modules())
            own = {name: linear for name, linear in linears.items() if linear in inside}
            wanted = _outputs(block, call, wanted)
            layers = {
                name: LearnedGridLinear(linear, format.bits, format.group, torch.float32, init, format.kind == AFFINE)
                for name, linear in own.items()
            }
            for name, layer in layers.items():
                layer.weight.requires_grad_(True)
                model.set_submodule(name, layer)
            _train(block, list(layers.values()), call, given, wanted)
            for name, layer in layers.items():
                model.set_submodule(name, FixedIntegersLinear(layer))
            given = _outputs(block, call, given)


@torch.no_grad()
def _entering(model: PreTrainedModel, blocks: Sequence[nn.Module], batches: Sequence[Tensor]):
    """What enters the first block, batch by batch, and how each block is called: alike for batches of one shape."""
    entering: list[Tensor] = []
    calls: dict[nn.Module, Call] = {}

    def watch(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if block is blocks[0]:
            entering.append(args[0])
        calls[block] = args[1:], kwargs

    handles = [block.register_forward_pre_hook(watch, with_kwargs=True) for block in blocks]
    try:
        for tokens in batches:
            model.base_model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return entering, [calls[block] for block in blocks]


def _output(block: nn.Module, call: Call, states: Tensor) -> Tensor:
    output = block(states, *call[0], **call[1])
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def _outputs(block: nn.Module, call: Call, batches: Sequence[Tensor]) -> list[Tensor]:
    return [_output(block, call, states) for states in batches]


def _train(
    block: nn.Module,
    layers: Sequence[LearnedGridLinear],
    call: Call,
    given: Sequence[Tensor],
    wanted: Sequence[Tensor],
) -> None:
    groups: list[dict[str, Any]] = [{"params": [layer.weight for layer in layers], "lr": WEIGHT_RATE}]
    for layer in layers:
        unit = layer.scale.detach().square().mean().sqrt().item()
        groups.append({"params": layer.grid_parameters, "lr": GRID_RATE * unit})
    optimizer, steps = torch.optim.AdamW(groups, weight_decay=0.0), PASSES * len(given)

    def rate(step: int) -> float:
        return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(steps):
        at = step % len(given)
        loss = F.mse_loss(_output(block, call, given[at]).float(), wanted[at].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
