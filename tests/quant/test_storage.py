"""Codes of every layer against its weight, bytes against formulas, kept models against deployed ones."""

import copy
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from studylib.config.files import usable
from studylib.config.settings import AT_ONCE, GRIDS, LEARNED, Adapter, Format, Grid, Scheme
from studylib.data import models
from studylib.evaluate.memory import _Yes
from studylib.methods import attach
from studylib.methods.adapters import bitsandbytes_codes, bitsandbytes_weight, four_bit, merge
from studylib.methods.base import find
from studylib.methods.ptq import gptq
from studylib.quant.formats import EncodedLinear, decode_model, encode, encode_model
from studylib.quant.kernel import Int4Linear, int4_model
from studylib.quant.layers import QuantizedLinear, decoder_linears, freeze_weights, quantize_model, round_to_nearest
from studylib.quant.learned import L4QLinear, LearnedGridLinear, QALoRALinear
from studylib.quant.storage import (
    Beside,
    Codes,
    DeployedLinear,
    coded_layers,
    keep_model,
    pack,
    read_codes,
    restore_model,
    stored_bytes,
    unpack,
    write_codes,
)

OUT, IN = 48, 128
tokens = torch.randint(0, 320, (4, 24), generator=torch.Generator().manual_seed(1))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(bias=False, out=OUT):
    layer = nn.Linear(IN, out, bias=bias)
    layer.weight.data = torch.randn(out, IN, generator=generator()) * torch.logspace(-2, 0, out)[:, None]
    return layer


def up(numbers, bits):
    """Whole bytes of so many numbers."""
    return math.ceil(numbers * bits / 8)


def counted(groups, bits, *, zeros=0, scale=4, offset=0, double=False):
    """Bytes of a weight [OUT, IN] whose rows have so many groups, by the parts that the formats' authors name."""
    total = OUT * groups
    scales = total + 4 * math.ceil(total / 256) + 4 if double else total * scale
    return up(OUT * IN, bits) + scales + up(total, zeros) + total * offset


# --- pack -------------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(2, 8), st.integers(0, 70))
def test_packing_is_tight_and_loses_nothing(data, bits, count):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    codes = torch.tensor(codes, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == math.ceil(count * bits / 8)
    assert torch.equal(unpack(packed, bits, count), codes)
    text = "".join(f"{code:0{bits}b}" for code in codes.tolist())
    assert packed.tolist() == [int(text[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8)]
    fewer = data.draw(st.integers(0, count))
    assert torch.equal(unpack(packed, bits, fewer), codes[:fewer])


def test_worked_example_of_packing():
    assert pack(torch.tensor([1, 2, 3]), 4).tolist() == [0x12, 0x30]
    assert pack(torch.tensor([[1, 2], [3, 0]]), 4).tolist() == [0x12, 0x30]
    assert pack(torch.tensor([], dtype=torch.uint8), 7).tolist() == []


# --- codes of every kind of layer -------------------------------------------------------------------------------------


def assert_codes_are_the_weight(layer, wanted, exactly=True, dense=None):
    """codes() decodes to dense(), and takes the bytes that were counted by hand."""
    stored = layer.codes()
    dense = layer.dense() if dense is None else dense
    if exactly:
        assert torch.equal(stored.decode(), dense)
    else:  # an offset that is scale * zero in one number: its rounding, and that of the sum
        step = stored.scale.abs().max() * 2**stored.bits
        torch.testing.assert_close(stored.decode(), dense, rtol=0, atol=4 * 2**-24 * step.item())
    assert stored.shape == tuple(dense.shape) and stored.integers.shape == dense.shape
    assert stored.nbytes == sum(t.numel() * t.element_size() for t in stored.tensors.values()) == wanted
    integers = stored.integers
    low = 0 if stored.levels is not None else stored.low
    assert low <= integers.min() and integers.max() <= low + 2**stored.bits - 1
    again = Codes(stored.bits, stored.shape, pack(integers - low, stored.bits), *fields_after_codes(stored))
    assert torch.equal(again.codes, stored.codes) and torch.equal(again.decode(), stored.decode())
    return stored


def fields_after_codes(stored):
    names = ("scales", "low", "zeros", "offsets", "outer", "mean", "levels", "scale_levels")
    return (getattr(stored, name) for name in names)


FORMATS = [
    Format(kind, bits, group, double, scale_bits)
    for kind, widths in (
        ("nf", (2, 3, 4)),
        ("fp-e2m1", (4,)),
        ("fp-bnb", (4,)),
        ("fp-e3m0", (4,)),
        ("int", (2, 3, 4, 8)),
        ("int-full", (2, 3, 4, 8)),
        ("affine", (2, 3, 4, 8)),
    )
    for bits in widths
    for group, double, scale_bits in ((32, False, 32), (64, True, 32), (32, False, 16), (None, False, 32))
]


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.title)
def test_every_format(format):
    layer = EncodedLinear(linear(), format)
    zeros = format.bits if format.kind == "affine" else 0
    groups = 1 if format.group is None else IN // format.group
    wanted = counted(groups, format.bits, zeros=zeros, scale=format.scale_bits // 8, double=format.double)
    stored = assert_codes_are_the_weight(layer, wanted)
    assert torch.equal(stored.decode(), encode(linear().weight, format).decode())
    x = torch.randn(3, IN, generator=generator(1))
    torch.testing.assert_close(layer(x), x @ stored.decode().T)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("group", [None, 32])
def test_every_grid(kind, group, bits):
    layer = QuantizedLinear(linear(), Grid(bits, kind, group), None, None)
    if kind in LEARNED:
        layer.weight_step.data *= 0.7  # some weights are clipped
    zeros = bits if kind == "asymmetric" else 0
    stored = assert_codes_are_the_weight(layer, counted(IN // (group or IN), bits, zeros=zeros))
    assert (stored.low, stored.zeros is None) == (layer.weight_grid.low, kind != "asymmetric")
    model = nn.Sequential(layer)
    freeze_weights(model)
    assert torch.equal(layer.codes().codes, stored.codes) and layer.weight_grid is None
    assert_codes_are_the_weight(layer, stored.nbytes)
    assert QuantizedLinear(linear(), None, Grid(8), None).codes() is None


@pytest.fixture
def small(shape):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(LlamaConfig(**shape, tie_word_embeddings=True)).eval()


@pytest.mark.parametrize("kind", ["int-full", "affine"])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqs_own_grid_and_its_file(small, tmp_path, bits, group, kind):
    gptq(small, f"{bits}-16-16", tokens, Format(kind, bits, group))
    symmetric = kind == "int-full"
    for layer in decoder_linears(small).values():
        out, width = layer.weight.shape
        groups = out * (width // (group or width))
        wanted = up(out * width, bits) + 4 * groups + (0 if symmetric else up(groups, bits))
        stored = layer.codes()
        assert stored.nbytes == wanted and (stored.zeros is None) == symmetric
        assert torch.equal(stored.decode(), layer.dense()) and torch.equal(layer.dense(), layer.weight)
        assert stored.low == (-(2 ** (bits - 1)) if symmetric else 0)
    path = tmp_path / "codes.safetensors"
    write_codes({name: layer.codes() for name, layer in decoder_linears(small).items()}, path)
    read = read_codes(path)
    assert usable(path) and read.keys() == decoder_linears(small).keys()
    for name, layer in decoder_linears(small).items():
        written, found = layer.codes(), read[name]
        assert (found.bits, found.shape, found.low) == (written.bits, written.shape, written.low)
        assert found.tensors.keys() == written.tensors.keys()
        assert all(torch.equal(found.tensors[part], tensor) for part, tensor in written.tensors.items())


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_l4q(bits, group):
    layer = L4QLinear(linear(), bits, group=group, init="asymmetric", generator=generator())
    layer.lora_B.data.normal_(std=0.05, generator=generator(2))
    layer.scale.data[0, 0] = -layer.scale.data[0, 0]  # nothing keeps a learned scale above zero
    stored = assert_codes_are_the_weight(layer, counted(IN // (group or IN), bits, offset=4))
    assert stored.low == -(2 ** (bits - 1)) and stored.zeros is None
    x = torch.eye(IN)
    assert torch.equal(layer(x).T, stored.decode())


def test_l4q_beside_fp64():
    layer = L4QLinear(linear().double(), 4, group=32, generator=generator())
    assert layer.codes().scales.dtype == torch.float64
    assert_codes_are_the_weight(layer, counted(4, 4, scale=8, offset=8))


@pytest.mark.parametrize("kind", ["int-full", "affine"])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_qa_lora_folds_its_adapter_into_the_offsets(bits, group, kind):
    layer = QALoRALinear(EncodedLinear(linear(), Format(kind, bits, group)), Adapter(4, 8.0))
    layer.lora_B.data.normal_(std=0.1, generator=generator(2))
    stored = assert_codes_are_the_weight(layer, counted(IN // (group or IN), bits, offset=4), exactly=False)
    assert stored.zeros is None and torch.equal(stored.codes, layer.base.codes().codes)


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_qat_loras_base(bits, group):
    layer = LearnedGridLinear(linear(), bits, group, torch.float32)
    layer.scale.data *= 0.8
    layer.offset.data += 0.01
    stored = layer.codes()
    assert stored.nbytes == counted(IN // (group or IN), bits, offset=4)
    # dense() is w + (round(w) - w), so that gradients pass: an error in the last digit
    torch.testing.assert_close(stored.decode(), layer.dense(), rtol=2**-20, atol=2**-20 * stored.scale.max().item())


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_offsets_that_there_are_none_of_are_not_stored(bits, device):
    layer = LearnedGridLinear(linear(), bits, 32, torch.float32, offsets=False)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "scale"]
    with_zeros = LearnedGridLinear(linear(), bits, 32, torch.float32)
    assert torch.equal(layer.dense(), with_zeros.dense())
    assert torch.equal(layer.codes().decode(), with_zeros.codes().decode())
    with _Yes():  # as a plan has it, where no number can be looked at
        assert layer.to(device).codes().nbytes == counted(4, bits)
        assert with_zeros.to(device).codes().nbytes == counted(4, bits, offset=4)


@pytest.mark.parametrize("init", ["affine", "asymmetric"])
def test_a_start_that_has_offsets_is_refused_without_them(init):
    with pytest.raises(ValueError, match=f"init: '{init}' is not allowed without offsets, which are part of it"):
        LearnedGridLinear(linear(), 4, 32, torch.float32, init, offsets=False)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf", "fp-bnb"])
def test_what_bitsandbytes_stores(kind, double):
    format = Format(kind, 4, 64, double)
    layer = four_bit(linear(), format)
    stored = bitsandbytes_codes(layer, format)
    assert stored.nbytes == counted(2, 4, double=double)
    ours = encode(linear().weight, format)
    assert stored.nbytes == ours.nbytes and stored.tensors.keys() == ours.tensors.keys()
    if double:  # theirs adds the mean in another order
        torch.testing.assert_close(stored.decode(), bitsandbytes_weight(layer), rtol=1e-6, atol=1e-7)
    else:
        assert torch.equal(stored.decode(), bitsandbytes_weight(layer))
        assert torch.equal(stored.decode(), ours.decode())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int", "int-full", "affine"])
def test_the_kernels_layers(kind, dtype):
    encoded = EncodedLinear(linear(), Format(kind, 4, 32))
    layer = Int4Linear(encoded.codes(), None, dtype)
    stored = layer.codes()
    assert stored.nbytes == counted(4, 4, scale=dtype.itemsize, offset=dtype.itemsize)
    assert stored.nbytes == layer.packed.nbytes + layer.grid.nbytes  # what is multiplied is what is counted
    exact, step = encoded.dense(), encoded.codes().scale.max().item()
    torch.testing.assert_close(
        stored.decode(), exact, rtol=0, atol=step * 16 * (2**-24 if dtype.itemsize == 4 else 2**-8)
    )
    torch.testing.assert_close(layer(torch.eye(IN, dtype=dtype)).float().T, stored.decode(), rtol=2**-7, atol=1e-6)


def test_a_deployed_layer_answers_what_it_was_given():
    stored = encode(linear().weight, Format("nf"))
    layer = DeployedLinear(stored.decode(), None, stored)
    assert layer.codes() is stored and not layer.weight.requires_grad
    assert DeployedLinear(stored.decode(), None).codes() is None
    plain = layer.plain()
    assert type(plain) is nn.Linear and plain.weight is layer.weight and plain.bias is None


def test_an_adapter_beside_a_weight():
    a, b = (torch.randn(4, IN, generator=generator(3)), torch.randn(OUT, 4, generator=generator(4)))
    base, magnitude = linear().weight.detach(), torch.rand(OUT, generator=generator(5))
    beside = Beside(a.bfloat16(), b.bfloat16(), 2.0)
    product = 2 * b.bfloat16().double() @ a.bfloat16().double()
    torch.testing.assert_close(beside.added_to(base), (base + product).float(), rtol=1e-5, atol=1e-5)
    dora = Beside(a.bfloat16(), b.bfloat16(), 2.0, magnitude.bfloat16())
    torch.testing.assert_close(dora.added_to(base).norm(dim=1), magnitude.bfloat16().float(), rtol=1e-5, atol=1e-6)
    assert beside.nbytes == 2 * 4 * (OUT + IN) and dora.nbytes == beside.nbytes + 2 * OUT
    assert Beside(a, b, 2.0, base=base).nbytes == beside.nbytes  # the base is counted where it is


# --- bytes of a model -------------------------------------------------------------------------------------------------


def test_the_worked_examples():
    weight = torch.randn(64, 64, generator=generator())
    plain = nn.Linear(64, 64)
    plain.weight.data = weight
    assert stored_bytes(nn.Sequential(copy.deepcopy(plain))) == 64 * 64 * 2 + 128
    nf4 = nn.Sequential(EncodedLinear(copy.deepcopy(plain), Format("nf")))
    assert stored_bytes(nf4) == 2048 + 64 * 4 + 128  # the bias in 16 bits
    rows, groups = (
        nn.Sequential(QuantizedLinear(copy.deepcopy(plain), Grid(4, group=group), Grid(8), None))
        for group in (None, 32)
    )
    assert stored_bytes(rows) == 2048 + 256 + 128 and stored_bytes(groups) == 2048 + 512 + 128
    l4q = nn.Sequential(L4QLinear(copy.deepcopy(plain), 4, group=32))
    assert stored_bytes(l4q) == 2048 + 128 * 8 + 128  # its adapter is in the integers


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_its_codes_and_the_rest_in_16_bits(shape, tied):
    model = AutoModelForCausalLM.from_config(Qwen2Config(**shape, tie_word_embeddings=tied))  # with biases
    linears = decoder_linears(model)
    numbers = sum(layer.weight.numel() for layer in linears.values())
    everything = sum(parameter.numel() for parameter in model.parameters())
    head = 320 * 32
    biases = 2 * (32 + 16 + 16)
    assert everything == numbers + biases + 5 * 32 + (1 if tied else 2) * head
    assert stored_bytes(model) == 2 * everything
    rest = 2 * (everything - numbers)
    groups = sum(layer.weight.numel() // 16 for layer in linears.values())
    for bits in (2, 3, 4, 8):
        for kind in GRIDS:
            zeros = bits if kind == "asymmetric" else 0
            made = quantize_model(copy.deepcopy(model), f"{bits}-8-4", Scheme(kind, 16))
            assert stored_bytes(made) == rest + numbers * bits // 8 + 4 * groups + groups * zeros // 8
            assert stored_bytes(freeze_weights(made)) == rest + numbers * bits // 8 + 4 * groups + groups * zeros // 8
    assert stored_bytes(quantize_model(copy.deepcopy(model), "16-8-4")) == 2 * everything


SMALL = Adapter(4)
NF4, FULL, AFFINE = Format("nf", 4, 32), Format("int-full", 4, 32), Format("affine", 4, 32)


@pytest.mark.parametrize("kind", ["int-full", "affine"])
@pytest.mark.parametrize("method", ["l4q", "qa-lora", "qat", "lsq", "qlora", "qat-lora", "lora"])
def test_a_trained_model_is_counted_the_same_before_it_is_merged(fp32, tiny_model, method, kind):
    own = find(method)
    format = None if method == "lora" else Format(kind, 4, 32)
    attach(tiny_model, own, format=format, adapter=SMALL if "adapter" in own.needs else None)
    assert stored_bytes(copy.deepcopy(tiny_model)) == stored_bytes(merge(tiny_model))


def test_the_kernels_model_is_counted_as_it_is_multiplied(fp32, tiny_model):
    full = stored_bytes(tiny_model)
    numbers = sum(layer.weight.numel() for layer in decoder_linears(tiny_model).values())
    sizes = sum(layer.in_features + layer.out_features for layer in decoder_linears(tiny_model).values())
    for dtype in (torch.float32, torch.bfloat16):
        made = int4_model(attach(copy.deepcopy(tiny_model), "qlora", format=AFFINE, adapter=SMALL), dtype)
        kept = 2 * 2 * numbers // 32 + 4 * dtype.itemsize * sizes
        assert stored_bytes(made) == full - 2 * numbers + numbers // 2 + kept


def test_the_outermost_layer_that_answers_is_the_one_that_counts(tiny_model):
    attach(tiny_model, "qa-lora", format=AFFINE, adapter=SMALL)
    found = [(name, type(layer)) for name, layer, _ in coded_layers(tiny_model)]
    assert found == [
        (name, QALoRALinear) for name in tiny_model.state_dict() for name in [name.rpartition(".lora_A")[0]] if name
    ]
    attached = attach(models.load_model("tiny-random"), "qat-lora", format=AFFINE, adapter=SMALL)
    assert {name.rpartition(".")[2] for name, _, _ in coded_layers(attached)} == {"base_layer"}


# --- kept and restored ------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model):
    return model(tokens, use_cache=False).logits


def stir(model):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 2e-3 * torch.randn(parameter.shape, generator=generator(len(name)))
    return model.eval()


DEPLOYED = [
    ("lora", "lora", None, "adapter"),
    ("lora", "dora", None, "adapter"),
    ("lora", "pissa", None, "adapter"),
    ("lora", "pissa", None, "merged-16"),
    ("qlora", "lora", NF4, "adapter"),
    ("qlora", "lora", Format("nf", 4, 32, True), "adapter"),
    ("qlora", "lora", Format("nf", 3, 32, True), "adapter"),
    ("qlora", "dora", Format("fp-bnb", 4, 32), "adapter"),
    ("qlora", "pissa", NF4, "adapter"),
    ("qlora", "loftq", Format("affine", 3, 32), "adapter"),
    *(("qlora", "loftq", NF4, how) for how in AT_ONCE[1:]),
    ("gptq+lora", "lora", AFFINE, "adapter"),
    ("gptq+lora", "lora", FULL, "adapter"),
    ("gptq+qa-lora", "lora", FULL, "adapter"),
    ("gptq+qa-lora", "lora", AFFINE, "adapter"),
    ("qat-lora", "lora", AFFINE, "adapter"),
    ("qat-lora", "lora", FULL, "adapter"),
    ("qa-lora", "lora", Format("affine", 3, 32), "adapter"),
    ("qa-lora", "lora", FULL, "adapter"),
    ("l4q", "lora", FULL, "adapter"),
    ("l4q", "lora", Format("affine", 2, 32), "adapter"),
    *((method, None, format, "adapter") for method in ("qat", "lsq") for format in (FULL, AFFINE)),
]


@pytest.mark.parametrize(("method", "kind", "format", "how"), DEPLOYED)
def test_what_was_tuned_is_kept_and_restored(fp32, tiny_model, tmp_path, method, kind, format, how):
    original = models.load_model("tiny-random")
    calibrated = {"tokens": tokens} if method.startswith("gptq") else {}
    adapter = None if kind is None else Adapter(4, kind=kind)
    stir(attach(tiny_model, method, format=format, adapter=adapter, **calibrated))
    merge(tiny_model, how, original=original)
    keep_model(tiny_model, original, tmp_path / "kept")
    restored = restore_model(models.load_model("tiny-random"), tmp_path / "kept")
    sixteen = how in ("dequantized", "merged-16") or (method, kind) == ("lora", "pissa")
    for name, layer in decoder_linears(tiny_model).items():
        again = restored.get_submodule(name)
        stored, found = layer.codes(), again.codes() if isinstance(again, DeployedLinear) else None
        exactly = not sixteen and not method.endswith("qa-lora")  # whose offsets hold scale * zero in one number
        assert (stored is None) == (found is None) and (not exactly or torch.equal(again.weight, layer.weight)), name
        if stored is not None:
            assert stored.tensors.keys() == found.tensors.keys()
            assert all(torch.equal(tensor, found.tensors[part]) for part, tensor in stored.tensors.items())
        torch.testing.assert_close(again.weight, layer.weight, rtol=2**-8, atol=2**-8 * layer.weight.abs().max().item())
        if layer.beside is not None:
            assert torch.equal(again.beside.a, layer.beside.a) and again.beside.scaling == layer.beside.scaling
    exact = (
        {"rtol": 2**-6, "atol": 2**-6} if sixteen else {"rtol": 0, "atol": 1e-5 if method.endswith("qa-lora") else 0}
    )
    torch.testing.assert_close(logits(restored), logits(tiny_model), **exact)
    assert stored_bytes(restored) == stored_bytes(tiny_model)
    assert not restored.training and not any(parameter.requires_grad for parameter in restored.parameters())


@pytest.mark.parametrize(
    ("bits", "scheme"),
    [
        ("4-16-16", Scheme()),
        ("4-8-4", Scheme("asymmetric", 32)),
        ("4-8-4", Scheme("full-range", 32)),
        ("3-8-4", Scheme("statsq")),
        ("4-8-4", Scheme("lsq", 32)),
        ("4-8-4", Scheme("paretoq", keys="after-rotary")),
    ],
)
def test_what_was_distilled_is_kept_and_restored(fp32, tiny_model, tmp_path, bits, scheme):
    original = copy.deepcopy(tiny_model)
    quantize_model(tiny_model, bits, scheme)
    freeze_weights(stir(tiny_model))  # embeddings and norms have moved as well
    keep_model(tiny_model, original, tmp_path / "kept")
    # What rounds activations and cache is made by its scheme.
    restored = models.load_model("tiny-random")
    if bits != "4-16-16":
        quantize_model(restored, f"16{bits[1:]}", scheme)
    restore_model(restored, tmp_path / "kept")
    assert {name for name, _, _ in coded_layers(restored)} == set(decoder_linears(tiny_model))
    for name, layer in decoder_linears(tiny_model).items():
        again = restored.get_submodule(name)
        assert torch.equal(again.weight, layer.weight) and torch.equal(again.codes().codes, layer.codes().codes)
    assert stored_bytes(restored) == stored_bytes(tiny_model)
    assert restored.lm_head.weight is restored.model.embed_tokens.weight
    names = set(decoder_linears(tiny_model))
    for name, parameter in tiny_model.named_parameters():
        if name.rpartition(".")[0] not in names:
            parameter.data = parameter.data.bfloat16().float()  # as they are kept
            assert torch.equal(restored.get_parameter(name), parameter)
    torch.testing.assert_close(logits(restored), logits(tiny_model), rtol=0, atol=0)


def test_only_what_differs_is_kept(tiny_model, tmp_path):
    keep_model(round_to_nearest(tiny_model, "4-16-16"), models.load_model("tiny-random"), tmp_path / "kept")
    with safe_open(tmp_path / "kept", "pt") as file:
        assert {name.rpartition("/")[2] for name in file.keys()} == {"codes", "scales"}  # noqa: SIM118
    untouched = models.load_model("tiny-random")
    keep_model(untouched, models.load_model("tiny-random"), tmp_path / "nothing")
    with safe_open(tmp_path / "nothing", "pt") as file:
        assert not list(file.keys())


@pytest.mark.parametrize(
    "made",
    [
        lambda model: decode_model(encode_model(model, Format("nf", 4, 64, True))),
        lambda model: decode_model(encode_model(model, Format("affine", 3, 64))),
        lambda model: round_to_nearest(model, "4-16-16"),
        lambda model: round_to_nearest(model, "2-16-16", Scheme("asymmetric", 32)),
        lambda model: merge(attach(model, "l4q", format=Format("affine", 4), adapter=SMALL)),
        lambda model: merge(attach(model, "qlora", format=Format("nf", 4, 64, True), adapter=Adapter(16))),
        lambda model: merge(attach(model, "lora", adapter=Adapter(16, kind="pissa"))),
    ],
    ids=["nf4", "affine", "rtn", "groups", "l4q", "qlora", "pissa"],
)
def test_a_file_takes_what_is_counted_where_layers_dominate(fp32, tmp_path, made):
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    original = AutoModelForCausalLM.from_config(config).eval()
    model = made(copy.deepcopy(original))
    keep_model(model, original, tmp_path / "kept")
    size, count = (tmp_path / "kept").stat().st_size, stored_bytes(model)
    assert size == pytest.approx(count, rel=0.02)


def test_a_write_that_fails_leaves_what_was_there(tiny_model, tmp_path, monkeypatch):
    path, original = tmp_path / "kept", models.load_model("tiny-random")
    round_to_nearest(tiny_model, "4-16-16")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            keep_model(tiny_model, original, path)
    assert not list(tmp_path.iterdir())
    keep_model(tiny_model, original, path)
    before = path.read_bytes()

    def killed(tensors, partial, metadata):
        partial.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("studylib.quant.storage.save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            keep_model(tiny_model, original, path)
    assert path.read_bytes() == before and usable(path) and len(list(tmp_path.iterdir())) == 2  # with its digest


@pytest.mark.parametrize("content", [b"", b"{", b"\x08\0\0\0\0\0\0\0{}      ", b"\xff" * 64])
def test_a_file_that_is_no_kept_model_is_one_line(tiny_model, tmp_path, content):
    (tmp_path / "kept").write_bytes(content)
    before = str(tiny_model)
    with pytest.raises(ValueError, match="kept is no kept model") as caught:
        restore_model(tiny_model, tmp_path / "kept")
    assert "\n" not in str(caught.value) and str(tiny_model) == before


def test_a_file_of_another_model_is_one_line(tiny_model, tmp_path):
    other = AutoModelForCausalLM.from_config(models.load_config("tiny-random"))
    config = copy.deepcopy(other.config)
    config.num_hidden_layers = 3
    deeper = AutoModelForCausalLM.from_config(config)
    keep_model(round_to_nearest(copy.deepcopy(deeper), "4-16-16"), deeper, tmp_path / "deeper")
    changed = copy.deepcopy(deeper)
    changed.model.layers[2].input_layernorm.weight.data += 1
    keep_model(changed, deeper, tmp_path / "changed")
    before = str(tiny_model)
    for name, message in (
        ("deeper", r"deeper is of another model, which has a layer 'model\.layers\.2\..*' of shape \[64, 64\]$"),
        (
            "changed",
            r"changed is of another model, which has 'model\.layers\.2\.input_layernorm\.weight' of shape \[64\]$",
        ),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            restore_model(tiny_model, tmp_path / name)
        assert "\n" not in str(caught.value) and str(tiny_model) == before
