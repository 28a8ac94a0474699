"""Rotations that spread outliers over all numbers before they are rounded: the same function in another basis.

QuaRot (arXiv 2404.00456) and SpinQuant (arXiv 2405.16406), whose names R1 to R4 are kept. R1, of the residual stream,
and R2, of each head's values, are multiplied into the weights; embeddings and the output head stay as they are, shared
as they may be, so that R1 is done once behind the former and undone before the last norm. R3, of each head's keys, and
R4, of the inputs of down_proj, are done on the way. All are Hadamard matrices: +1 and -1 over a root, products of which
take additions alone.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")  # whose norms feed q, k, v and gate, up, and nothing else
LEAST_BLOCK = 16  # numbers that a rotation mixes at least
MOST_DENSE = 128  # order of the matrix that is multiplied as it is, whatever stands beside it
SIGNS_SEED = 0  # of R1's random signs, which keep a constant direction from becoming a single large number


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _paley(order: int) -> Tensor | None:
    """A Hadamard matrix of this order by Paley's constructions over a prime field, +1 and -1, float64 [order, order];
    None where they have none."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    for prime, first in ((order - 1, True), (order // 2 - 1, False)):
        if not _is_prime(prime) or prime % 4 != (3 if first else 1) or (not first and order % 4):
            continue
        squares = {x * x % prime for x in range(1, prime)}
        signs = torch.tensor([0.0] + [1.0 if x in squares else -1.0 for x in range(1, prime)], dtype=torch.float64)
        steps = torch.arange(prime)
        jacobsthal = signs[(steps[:, None] - steps) % prime]
        core = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
        core[0, 0], core[1:, 1:] = 0, jacobsthal
        if first:
            core[1:, 0] = -1
            return core + torch.eye(order, dtype=torch.float64)
        plus, minus = (torch.tensor([[1.0, one], [other, -1.0]]).double() for one, other in ((1, 1), (-1, -1)))
        return torch.kron(core, plus) + torch.kron(torch.eye(prime + 1, dtype=torch.float64), minus)
    return None


def _sylvester(order: int) -> Tensor:
    """The Hadamard matrix of a power of two, float64."""
    found = torch.ones(1, 1, dtype=torch.float64)
    while len(found) < order:
        found = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), found)
    return found


@functools.cache
def factors(order: int) -> tuple[Tensor, Tensor] | None:
    """Two Hadamard matrices, +1 and -1, whose Kronecker product has this order, the second of a power of two; None
    where none is known here."""
    power = order & -order
    while power and order // power <= MOST_DENSE:
        first = _paley(order // power)
        if first is not None:
            return first, _sylvester(power)
        power //= 2
    return None


@functools.cache
def block_of(width: int) -> int:
    """The most neighbours of a row of `width` numbers that one Hadamard matrix mixes: the largest divisor of the width
    that has one. Worked: 576 of 576 (36 x 16), 1,536 of 1,536 (12 x 128), 256 of 11,008.

    ValueError where no block of LEAST_BLOCK or more divides the width.
    """
    for block in sorted((d for d in range(LEAST_BLOCK, width + 1) if width % d == 0), reverse=True):
        if factors(block) is not None:
            return block
    raise ValueError(
        f"rotated: {width} numbers cannot be rotated; no Hadamard matrix of order {LEAST_BLOCK} or more divides them"
    )


class Rotation:
    """x [..., width] -> x R and back, in fp32 (fp64 where x is), block by block (see block_of).

    signs: R begins with these, +1 or -1 for each number.
    """

    def __init__(self, width: int, signs: Tensor | None = None):
        self.block, self.signs = block_of(width), signs
        found = factors(self.block)
        assert found is not None
        self.matrices = found

    def __call__(self, x: Tensor) -> Tensor:
        return self._mixed(x if self.signs is None else x * self.signs.to(x), *self.matrices)

    def back(self, x: Tensor) -> Tensor:
        """The inverse."""
        mixed = self._mixed(x, *(matrix.T for matrix in self.matrices))
        return mixed if self.signs is None else mixed * self.signs.to(x)

    def _mixed(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        exact = x if x.dtype == torch.float64 else x.float()
        with torch.autocast(x.device.type, enabled=False):
            blocks = exact.unflatten(-1, (-1, len(first), len(second)))
            mixed = first.T.to(exact) @ (blocks @ second.to(exact))
            return (mixed * self.block**-0.5).flatten(-3).to(x.dtype)


def check_rotatable(model: nn.Module) -> None:
    """ValueError unless it is known of the model how to rotate it, and each width has a block."""
    config: Any = model.config
    if config.model_type not in LLAMA_LIKE:
        raise ValueError(
            f"rotated: how to rotate {config.model_type!r} is not known; use one of {', '.join(LLAMA_LIKE)}"
        )
    for width in _widths(config):
        block_of(width)


def _widths(config: Any) -> tuple[int, int, int]:
    """Of the residual stream, a head, and the inputs of down_proj."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.hidden_size, head, config.intermediate_size


@torch.no_grad()
def rotate_model(model: nn.Module) -> nn.Module:
    """Rotate a decoder in place: it computes what it did, up to rounding, from weights and activations without
    outliers. Layers that take the place of its linear ones take over what is done on the way.

    Keys are rotated behind k_proj and back before rotary embedding, so that a cache of keys before it holds rotated
    ones. Raises ValueError as check_rotatable does.
    """
    check_rotatable(model)
    decoder = model.base_model
    hidden, head, inner = _widths(model.config)
    signs = torch.randint(0, 2, (hidden,), generator=torch.Generator().manual_seed(SIGNS_SEED)) * 2 - 1
    stream, heads, down = Rotation(hidden, signs), Rotation(head), Rotation(inner)

    def each_head(rotation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: rotation(x.unflatten(-1, (-1, head))).flatten(-2)

    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            for linear in readers:
                _set(linear.weight, stream(linear.weight.double() * norm.weight.double()))
            norm.weight.fill_(1)
        for writer, reads in ((attention.o_proj, each_head(heads)), (mlp.down_proj, down)):
            _set(writer.weight, reads(writer.weight.double()))
            _turn_outputs(writer, stream)
        for linear in (attention.k_proj, attention.v_proj):
            _turn_outputs(linear, each_head(heads))
        attention.k_proj.register_forward_hook(_on_output(each_head(heads.back)))
        mlp.down_proj.register_forward_pre_hook(_on_input(down))
    decoder.embed_tokens.register_forward_hook(_on_output(stream))
    decoder.norm.register_forward_pre_hook(_on_input(stream.back))
    return model


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))


def _turn_outputs(linear: nn.Linear, rotation: Callable[[Tensor], Tensor]) -> None:
    """Rotate what a layer gives, by its weights."""
    _set(linear.weight, rotation(linear.weight.double().T.contiguous()).T)
    if linear.bias is not None:
        _set(linear.bias, rotation(linear.bias.double()))


def _on_output(rotation: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    return lambda module, inputs, output: rotation(output)


def _on_input(rotation: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
    return lambda module, inputs: rotation(inputs[0])


def take_over_rotations(layer: nn.Module, replaced: nn.Module) -> None:
    """Have a layer do on the way what the one did whose place it takes."""
    layer._forward_pre_hooks = replaced._forward_pre_hooks
    layer._forward_hooks = replaced._forward_hooks
