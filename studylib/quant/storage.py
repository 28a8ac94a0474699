"""Weights as they are stored: packed codes with what turns them into numbers, counted, kept in a file and read back.

Every layer in low bits answers `codes()`. What a model takes, what is exported and what is kept of it is read
from there.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from studylib.config import written_whole
from studylib.quant.rotation import take_over_rotations

SCALES_IN_GROUP = 256  # double quantization: scales that share an fp32 number
PEFT_ADAPTER = "default"  # peft's name for the only adapter of a model
EXTRA_BUFFERS = ("bias", "lora_A", "lora_B")  # of a layer that multiplies integers, beside its codes
TABLES = ("levels", "scale_levels")
FLOAT_BYTES = 2  # what is not quantized is counted, and kept, in 16 bits


def _word(bits: int) -> tuple[int, int]:
    """How many codes fill how many whole bytes: 2 and 1 at four bits, 8 and 3 at three bits."""
    shared = math.gcd(bits, 8)
    return 8 // shared, bits // shared


def _shifts(count: int, width: int, like: Tensor) -> Tensor:
    """Bit positions of `count` fields of `width` bits, the first one highest."""
    return torch.arange(count - 1, -1, -1, dtype=like.dtype, device=like.device) * width


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits, of any shape, `bits` bits each, first code in the highest bits: uint8 [ceil(n * bits / 8)].

    Worked: codes 1, 2, 3 at 4 bits: 0x12, 0x30. At 4 bits these are the bytes of bitsandbytes.
    """
    per, width = _word(bits)
    size = math.ceil(codes.numel() * bits / 8)
    # A word of 7 codes of 7 bits takes 56 bits.
    kind = torch.int64 if per * bits > 31 else torch.int32
    codes = F.pad(codes.flatten().to(kind), (0, -codes.numel() % per)).view(-1, per)
    word = (codes << _shifts(per, bits, codes)).sum(1, keepdim=True, dtype=kind)
    return ((word >> _shifts(width, 8, word)) & 255).to(torch.uint8).flatten()[:size]


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of `pack`, uint8 [count]."""
    per, width = _word(bits)
    kind = torch.int64 if per * bits > 31 else torch.int32
    word = F.pad(packed, (0, -len(packed) % width)).view(-1, width)
    if width > 1:
        word = (word.to(kind) << _shifts(width, 8, word.to(kind))).sum(1, keepdim=True, dtype=kind)
    return ((word >> _shifts(per, bits, word)) & (2**bits - 1)).to(torch.uint8).flatten()[:count]


def look_up(codes: Tensor, table: Tensor) -> Tensor:
    """table[codes], flat."""
    return table.to(codes.device).index_select(0, codes.flatten().int())


@dataclass(frozen=True)
class Codes:
    """A weight [out, in] as it is stored; `nbytes` are the bytes of its tensors.

    A number is scale * (level - zero) + offset, with one scale, zero and offset for each group of neighbours in a row.
    codes: uint8, packed (see `pack`), from 0 up. levels: the table of what they stand for; None for the integers
    low, low + 1, ... scales [groups]: fp32 or fp16; under double quantization uint8 codes of `scale_levels`, the number
    being level * outer + mean with outer fp32 [ceil(groups / 256)] and mean fp32 [1]; in microscaling formats uint8
    codes of `scale_levels` as well, without a mean: level or, with outer fp32 [1], level / outer. zeros: packed zero
    points, whole numbers from 0 up in the same bits. offsets [groups]: learned ones, in the type of the scales.
    Tables are known from the format, and not counted.
    """

    bits: int
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor
    low: int = 0
    zeros: Tensor | None = None
    offsets: Tensor | None = None
    outer: Tensor | None = None
    mean: Tensor | None = None
    levels: Tensor | None = None
    scale_levels: Tensor | None = None

    @classmethod
    def of_integers(
        cls,
        integers: Tensor,
        bits: int,
        low: int,
        scale: Tensor,
        zero: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> "Codes":
        """From whole numbers [out, in] of low..low + 2^bits - 1, and scale, zero and offset [out, groups(, 1)]."""
        return cls(
            bits,
            (integers.shape[0], integers.shape[1]),
            pack(integers.short() - low, bits),
            scale.detach().flatten(),
            low,
            None if zero is None else pack(zero, bits),
            None if offset is None else offset.detach().flatten(),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor) and name not in TABLES}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return len(self.scales) // self.shape[0]

    @property
    def integers(self) -> Tensor:
        """The whole numbers, int16 [out, in]; of a table, the indices."""
        rows, columns = self.shape
        return unpack(self.codes, self.bits, rows * columns).short().add_(self.low).view(self.shape)

    @property
    def scale(self) -> Tensor:
        """Of each group, [out, groups], fp32 (fp64 where it is stored so)."""
        if self.scale_levels is None:
            found = self.scales.to(torch.promote_types(self.scales.dtype, torch.float32))
        else:
            found = look_up(self.scales, self.scale_levels)
        if self.outer is not None and self.mean is not None:
            found = found * self.outer.repeat_interleave(SCALES_IN_GROUP)[: len(self.scales)] + self.mean
        elif self.outer is not None:
            found = found / self.outer
        return found.view(self.shape[0], -1)

    @property
    def zero(self) -> Tensor | None:
        """The zero point of each group, fp32 [out, groups]."""
        if self.zeros is None:
            return None
        return unpack(self.zeros, self.bits, len(self.scales)).float().view(self.shape[0], -1)

    @property
    def offset(self) -> Tensor | None:
        """The learned offset of each group, [out, groups]."""
        return None if self.offsets is None else self.offsets.view(self.shape[0], -1)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers that the codes stand for, [out, in], computed in the type of the scales."""
        scale, zero, offset = (None if x is None else x[..., None] for x in (self.scale, self.zero, self.offset))
        assert scale is not None
        if self.levels is None:
            values = self.integers.to(scale.dtype).view(*scale.shape[:2], -1)
        else:
            values = look_up(self.integers, self.levels).view(*scale.shape[:2], -1)
        values = values.mul_(scale) if zero is None else values.sub_(zero).mul_(scale)
        if offset is not None:
            values = values.add_(offset)
        return values.view(self.shape).to(dtype or scale.dtype)


@dataclass(frozen=True)
class Beside:
    """An adapter that is deployed beside a weight: A [rank, in], B [out, rank], bf16, W + scaling B A; under DoRA the
    length of each row, magnitude [out]. base [out, in]: W in 16 bits, where it is not the model's own (PiSSA)."""

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    base: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored beside the base, by name."""
        pair = {"a": self.a, "b": self.b}
        return pair if self.magnitude is None else pair | {"magnitude": self.magnitude}

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * FLOAT_BYTES for tensor in self.tensors.values())

    def added_to(self, base: Tensor, trained_on: Tensor | None = None) -> Tensor:
        """`base` [out, in] with the adapter: W + scaling B A, under DoRA times m / |W~ + scaling B A| row by row.

        W~ is the base that was trained on, `base` itself unless given: an adapter that learned nothing is none.
        """
        product = self.scaling * self.b.float() @ self.a.float()
        weight = base + product
        if self.magnitude is not None:
            own = base if trained_on is None else trained_on
            weight *= (self.magnitude.float() / (own + product).norm(dim=1))[:, None]
        return weight


class DeployedLinear(nn.Linear):
    """A frozen linear layer that computes with the dense weight [out, in] that what is stored stands for.

    stored: its codes, None for 16 bits. beside: an adapter, which is in `weight` already.
    """

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, stored: Codes | None = None, beside: Beside | None = None
    ):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), bias
        self.stored, self.beside = stored, beside

    def codes(self) -> Codes | None:
        return self.stored

    def plain(self) -> nn.Linear:
        """A plain layer of this dense weight, which it shares."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta").train(self.training)
        linear.weight, linear.bias = self.weight, self.bias
        return linear


def coded_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Codes]]:
    """The outermost layers that answer codes(), by name, with them. ValueError, with the name, where one diverged."""
    inside: set[nn.Module] = set()
    for name, layer in model.named_modules():
        codes = getattr(layer, "codes", None)
        if layer not in inside and callable(codes):
            try:
                stored = codes()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if stored is not None:
                inside |= set(layer.modules())
                yield name, layer, stored


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights: codes as they are stored, adapters beside them and all else at 16 bits (tied once).

    Worked: a [64, 64] weight at 4 bits with an fp32 scale a row: 2048 + 256 bytes; NF4 in groups of 64 the same; by
    L4Q in groups of 32: 2048 + 128 groups * 8.
    """
    total, counted = 0, set()
    for _, layer, stored in coded_layers(model):
        total += stored.nbytes
        counted |= {id(own) for name, own in layer.named_parameters() if name.rpartition(".")[2] != "bias"}
        total += sum(buffer.nbytes for name, buffer in layer.named_buffers() if name in EXTRA_BUFFERS)
    for layer in model.modules():
        if isinstance(layer, DeployedLinear) and layer.beside:
            total += layer.beside.nbytes
    return total + sum(p.numel() * FLOAT_BYTES for p in model.parameters() if id(p) not in counted)


def sixteen_bits(model: nn.Module) -> torch.dtype:
    """The type that what is not quantized is kept in: the one that the model was published in, bf16 for wider ones."""
    dtype = model.config.dtype
    return torch.bfloat16 if dtype is None or dtype.itemsize > FLOAT_BYTES else dtype


def keep_model(model: nn.Module, original: nn.Module, path: Path) -> None:
    """Write a deployed model to the safetensors file `path`, whole: codes, adapters, and what else differs from
    `original`, the model as it is loaded, in 16 bits; about what stored_bytes counts.

    How activations and the cache are rounded is not in the file. Raises ValueError, and writes
    nothing, where codes have diverged, and OSError where the file cannot be written.
    """
    layers, tensors = _parts((name, stored) for name, _, stored in coded_layers(model))
    dtype, before = sixteen_bits(original), dict(original.named_parameters())
    for name, layer in model.named_modules():
        if isinstance(layer, DeployedLinear) and layer.beside:
            beside = layer.beside
            tensors |= {f"{name}/beside.{part}": tensor for part, tensor in beside.tensors.items()}
            if beside.base is not None:
                tensors[f"{name}/beside.base"] = beside.base.to(dtype)
            layers.setdefault(name, {"shape": list(layer.weight.shape)})["scaling"] = beside.scaling
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if owner in layers and name == f"{owner}.weight":
            continue
        # What a layer learned beside its weight is in its codes.
        if name in before and not torch.equal(kept := parameter.detach().to(dtype), before[name].detach().to(dtype)):
            tensors[name] = kept
    _write(layers, tensors, path)


def write_codes(codes: Mapping[str, Codes], path: Path) -> None:
    """Write codes by the names of their layers to the safetensors file `path`, whole. Raises OSError where it cannot be
    written."""
    _write(*_parts(codes.items()), path)


def read_codes(path: Path) -> dict[str, Codes]:
    """By name, the codes in a file of `write_codes`; ValueError where it is none."""
    layers, tensors = _read(path)
    return {name: _codes(layout, _of_layer(name, tensors)) for name, layout in layers.items()}


def _parts(codes: Iterable[tuple[str, Codes]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file says of each layer, and its tensors."""
    layers: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, stored in codes:
        tables = {part: getattr(stored, part) for part in TABLES if getattr(stored, part) is not None}
        tensors |= {f"{name}/{part}": tensor for part, tensor in (stored.tensors | tables).items()}
        layers[name] = {"bits": stored.bits, "shape": list(stored.shape), "low": stored.low}
    return layers, tensors


def _codes(layout: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Codes:
    return Codes(layout["bits"], tuple(layout["shape"]), low=layout["low"], **tensors)


def _of_layer(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of one layer, taken out."""
    return {key.partition("/")[2]: tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}/")}


def _write(layers: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
    tensors = {name: tensor.detach().contiguous().cpu().clone() for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    with written_whole(path, sealed=True, size=size) as partial:
        save_file(tensors, partial, {"layers": json.dumps(layers)})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            layers = json.loads((file.metadata() or {}).get("layers", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no kept model ({error})") from error
    if layers is None:
        raise ValueError(f"{path} is no kept model")
    return layers, tensors


@torch.no_grad()
def restore_model(model: nn.Module, path: Path, dense: bool = True) -> nn.Module:
    """Put what `keep_model` wrote into a model as it is loaded, in place: DeployedLinear where there are codes, in the
    type of the weights that they replace.

    dense: whether weights get the numbers that their codes stand for; without, a layer of codes alone has none (meta),
    takes no memory and cannot compute.
    A layer that rounds its inputs already (see layers.quantize_model, with 16 bits for the weights) goes on to do so.
    Raises ValueError, and changes nothing, for a file that does not belong to this model.
    """
    layers, tensors = _read(path)
    own, linears, parts = dict(model.named_parameters()), dict(model.named_modules()), {}
    for name, layout in layers.items():
        linear, shape = linears.get(name), layout["shape"]
        if not isinstance(linear, nn.Linear) or list(linear.weight.shape) != shape:
            raise ValueError(f"{path} is of another model, which has a layer {name!r} of shape {shape}")
        parts[name] = _of_layer(name, tensors)
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ValueError(f"{path} is of another model, which has {name!r} of shape {list(tensor.shape)}")
    for name, layout in layers.items():
        linear = linears[name]
        found = {key: tensor.to(linear.weight.device) for key, tensor in parts[name].items()}
        pair = {key.removeprefix("beside."): found.pop(key) for key in list(found) if key.startswith("beside.")}
        beside = Beside(**pair, scaling=layout["scaling"]) if pair else None
        stored = _codes(layout, found) if found else None
        if stored is not None and beside is None and not dense:
            base = linear.weight.to("meta")
        elif stored is not None:
            base = stored.decode()
        else:
            base = (linear.weight if beside is None or beside.base is None else beside.base).float()
        weight = (base if beside is None else beside.added_to(base)).to(linear.weight.dtype)
        if hasattr(linear, "stored"):
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.stored = stored
        else:
            deployed = DeployedLinear(weight, linear.bias, stored, beside)
            take_over_rotations(deployed, linear)
            model.set_submodule(name, deployed)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    return model.requires_grad_(False).eval()
