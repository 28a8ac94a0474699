"""Oracles: plain autograd with a straight-through round in float64, NumPy, torchao, finite differences."""

import copy
import json
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torchao.quantization import dequantize_affine, quantize_affine
from transformers import AutoModelForCausalLM, Qwen2Config

from studylib.config.settings import INITS, Adapter, Format
from studylib.data import models
from studylib.methods import attach, merge
from studylib.quant.formats import encode
from studylib.quant.kernel import int4_model
from studylib.quant.layers import decoder_linears
from studylib.quant.learned import (
    BITS,
    FixedIntegersLinear,
    L4QLinear,
    LearnedGridLinear,
    initial_grid,
    l4q_model,
    levels_of,
)
from studylib.quant.storage import DeployedLinear, coded_layers, keep_model, restore_model, stored_bytes

LEARNED = ("lora_A", "lora_B", "scale", "offset")
TOKENS = torch.randint(1, 320, (2, 24), generator=torch.Generator().manual_seed(1))


def straight_through(layer, x):
    """The layer of ordinary operations, differentiated by autograd; rounding has the derivative 1."""
    low, high = levels_of(layer.bits)
    w = layer.weight + layer.scaling * (layer.lora_B @ layer.lora_A)
    w = ((w.unflatten(1, (-1, layer.group)) - layer.offset) / layer.scale).clamp(low, high)
    levels = w + (w.round() - w).detach()
    return F.linear(x, (layer.scale * levels + layer.offset).flatten(1), layer.bias)


def random_layer(bits=4, group=8, rank=2, init="l4q", rows=6, columns=16, seed=0, dtype=torch.float64, shrink=0.4):
    """A layer in the middle of its training: everything has moved, and with a small scale much is clipped."""
    torch.manual_seed(seed)
    layer = L4QLinear(nn.Linear(columns, rows).to(dtype), bits, group=group, rank=rank, init=init)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.1)
        layer.scale.mul_(shrink * (0.5 + torch.rand_like(layer.scale)))
        layer.offset.add_(layer.scale * torch.randn_like(layer.scale))
    return layer


def gradients(layer, x, upstream, forward=None):
    x = x.clone().requires_grad_()
    y = (forward or layer)(x)
    found = torch.autograd.grad(y, (x, *layer.parameters()), upstream.to(y.dtype))
    return y, dict(zip(("x", *(name for name, _ in layer.named_parameters())), found, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    group=st.sampled_from([None, 2, 4, 16]),
    rank=st.sampled_from([1, 3, 20]),
    init=st.sampled_from(INITS),
    shrink=st.sampled_from([-0.5, 0.1, 0.7, 2.0]),
    lead=st.sampled_from([(), (5,), (2, 3)]),
    seed=st.integers(0, 2**20),
)
def test_backward_agrees_with_autograd_in_float64(bits, group, rank, init, shrink, lead, seed):
    layer = random_layer(bits, group, rank, init, seed=seed, shrink=shrink)
    x, upstream = torch.randn(*lead, 16, dtype=torch.float64), torch.randn(*lead, 6, dtype=torch.float64)
    ours, found = gradients(layer, x, upstream)
    reference, wanted = gradients(layer, x, upstream, lambda x: straight_through(layer, x))
    torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-12)
    assert found.keys() == {"x", "weight", "bias", *LEARNED}
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_the_cases_compared_lie_inside_and_outside_of_the_range():
    layer = random_layer()
    weight = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    w = (weight.unflatten(1, (-1, 8)) - layer.offset) / layer.scale
    assert all(0.1 < where.double().mean() < 0.8 for where in (w < -8, w > 7, w.abs() < 7))


def test_backward_is_the_true_derivative_where_there_is_one():
    """Where all is clipped, nothing is rounded away: finite differences are an oracle for every input."""
    layer = random_layer(shrink=1e-3)
    w = layer.weight.unflatten(1, (-1, 8)) / layer.scale
    assert ((w < -30) | (w > 30)).all()
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))


def test_at_the_ends_of_the_range_a_weight_counts_as_inside():
    linear = nn.Linear(4, 1, bias=False)
    linear.weight.data = torch.tensor([[-8.0, 7.0, -9.0, 8.0]])
    layer = L4QLinear(linear, 4, rank=1, alpha=1.0)
    layer.scale.data.fill_(1)
    layer.lora_A.data.fill_(2)
    _, found = gradients(layer, torch.tensor([[1.0, 10.0, 100.0, 1000.0]]), torch.ones(1, 1))
    assert found["weight"].tolist() == [[1, 10, 0, 0]]
    assert found["scale"].item() == 100 * -8 + 1000 * 7 and found["offset"].item() == 1100
    assert found["lora_B"].item() == 2 * 11 and found["x"].tolist() == [[-8, 7, -8, 7]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [None, 8])
def test_forward_agrees_with_float64_numpy(bits, group):
    layer, x = random_layer(bits, group, init="asymmetric", rows=32, columns=48), torch.randn(3, 5, 48).double()
    w0, a, b, s, o, bias = (
        t.detach().numpy() for t in (layer.weight, layer.lora_A, layer.lora_B, layer.scale, layer.offset, layer.bias)
    )
    rows = (w0 + 8.0 / 2 * b @ a).reshape(32, -1, group or 48)
    quantized = s * np.rint(np.clip((rows - o) / s, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)) + o
    exact = x.numpy() @ quantized.reshape(32, 48).T + bias
    np.testing.assert_allclose(layer(x).detach().numpy(), exact, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(layer.dense().numpy(), quantized.reshape(32, 48), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("bits", BITS)
def test_codes_and_values_agree_with_torchao(bits):
    layer = random_layer(bits, 16, rows=64, columns=64, dtype=torch.float32)
    layer.offset.data.zero_()  # torchao's zero points are integers
    codes, (low, high) = layer.codes(), levels_of(bits)
    weight = (layer.weight + layer.scaling * layer.lora_B @ layer.lora_A).detach()
    scale, zero = layer.scale.detach().squeeze(-1), torch.zeros(64, 4, dtype=torch.int32)
    theirs = quantize_affine(weight, (1, 16), scale, zero, torch.int8, low, high)
    integers = codes.integers
    apart = (integers.int() - theirs.int()).abs()
    assert codes.low == low and integers.min() == low and integers.max() == high
    assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3  # torchao multiplies by 1 / scale: ties may differ
    values = dequantize_affine(integers.to(torch.int8), (1, 16), scale, zero, torch.int8, low, high)
    torch.testing.assert_close(codes.decode(), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [None, 8])
def test_first_scales_are_those_of_the_paper(bits, group):
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0)) + 0.5
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rows = weight.double().numpy().reshape(16, -1, group or 24)
    least, most = rows.min(-1, keepdims=True), rows.max(-1, keepdims=True)
    mean, spread = rows.mean(-1, keepdims=True), rows.std(-1, keepdims=True)
    wanted = {
        "l4q": np.maximum(np.abs(least / low), np.abs(most / high)),
        "lsq+": np.maximum(np.abs(mean - 3 * spread), np.abs(mean + 3 * spread)) / 2 ** (bits - 1),
        "symmetric": np.abs(rows).max(-1, keepdims=True) / 2 ** (bits - 1),
        "asymmetric": (most - least) / (high - low),
    }
    assert wanted.keys() == set(INITS)
    for init, scale in wanted.items():
        ours, offset = initial_grid(weight, bits, group, init)
        np.testing.assert_allclose(ours.numpy(), scale, rtol=2e-6)
        np.testing.assert_allclose(offset.numpy(), most - scale * high if init == "asymmetric" else 0, atol=1e-5)


weights = hnp.arrays(np.float32, (3, 24), elements=st.floats(-100, 100, width=32))


@settings(max_examples=200, deadline=None)
@given(weights, st.sampled_from(BITS), st.sampled_from([None, 8]), st.sampled_from(["l4q layer", "learned grid"]))
def test_the_affine_start_is_the_format_affine(numbers, bits, group, kind):
    """Scales to the bit, codes but for ties, a level at 0, values but for the rounding of an offset."""
    weight, wanted = torch.from_numpy(numbers), Format("affine", bits, group)
    linear = nn.Linear(24, 3, bias=False)
    linear.weight.data = weight.clone()
    if kind == "l4q layer":
        layer = L4QLinear(linear, bits, group=group, rank=1, init="affine")
    else:
        layer = LearnedGridLinear(linear, bits, group, torch.float32, "affine")
    ours, theirs = layer.codes(), encode(weight, wanted)
    assert torch.equal(ours.scale, theirs.scale)
    middle = 2 ** (bits - 1)
    apart = (ours.integers + middle - theirs.integers).abs()
    exact = weight.double().view(3, -1, group or 24) / theirs.scale.double()[..., None]
    tie = ((exact % 1 - 0.5).abs() < 2**-22 * 2**bits).view(3, 24)
    assert (apart[~tie] == 0).all() and apart.max() <= 1
    level = (theirs.zero - middle)[..., None]
    assert ((level * layer.scale + layer.offset) == 0).all()  # exactly
    assert (ours.decode()[weight == 0] == 0).all()
    largest = theirs.scale.repeat_interleave(group or 24, 1) * 2**bits
    assert ((ours.decode() - theirs.decode()).abs()[apart == 0] <= 2**-22 * largest[apart == 0]).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from(BITS), st.integers(-3, 3))
def test_the_affine_start_is_exact_where_scales_are_powers_of_two(seed, bits, power):
    generator = torch.Generator().manual_seed(seed)
    below = torch.randint(0, 2**bits, (4, 1), generator=generator)
    weight = torch.randint(0, 2**bits, (4, 32), generator=generator).float()
    weight += torch.randint(-1, 2, (4, 32), generator=generator) / 4  # no ties
    weight[:, 0], weight[:, 1] = 0, 2**bits - 1
    weight = (weight.clamp(0, 2**bits - 1) - below) * 2.0**power
    linear = nn.Linear(32, 4, bias=False)
    linear.weight.data = weight
    layer, wanted = (
        LearnedGridLinear(linear, bits, None, torch.float32, "affine"),
        encode(weight, Format("affine", bits, None)),
    )
    assert torch.equal(layer.codes().integers + 2 ** (bits - 1), wanted.integers)
    assert torch.equal(layer.codes().decode(), wanted.decode()) and torch.equal(layer.scale.flatten(), wanted.scales)


def test_the_first_scales_of_a_64_bit_weight_are_those_of_the_format():
    weight = torch.randn(4, 16).double()
    scale, offset = initial_grid(weight, 4, 8, "affine")
    assert scale.dtype == offset.dtype == torch.float64
    assert torch.equal(scale.flatten().float(), encode(weight, Format("affine", 4, 8)).scales)


def test_worked_numbers_of_the_first_scales():
    group = torch.tensor([[-4.0, 14.0]])
    for init, scale, offset in (("l4q", 2.0, 0.0), ("symmetric", 1.75, 0.0), ("asymmetric", 1.2, 5.6)):
        ours = initial_grid(group, 4, None, init)
        torch.testing.assert_close(ours, (torch.tensor([[[scale]]]), torch.tensor([[[offset]]])))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from(BITS), st.sampled_from([("l4q", 4), ("l4q", 64), ("asymmetric", 64)]))
def test_nothing_is_clipped_before_the_first_step(seed, bits, start):
    init, group = start
    torch.manual_seed(seed)
    layer = L4QLinear(nn.Linear(64, 32), bits, group=group, init=init)
    _, found = gradients(layer, torch.randn(4, 64), torch.randn(4, 32))
    assert (found["offset"] == 0).all() and (found["weight"] != 0).all()
    assert ((layer.dense() - layer.weight).unflatten(1, (-1, group)).abs() <= 0.5001 * layer.scale).all()


@pytest.mark.parametrize("init", INITS)
def test_groups_of_zeros_and_scales_at_zero_give_finite_numbers(init):
    linear = nn.Linear(8, 4)
    linear.weight.data[:, :4] = 0
    layer = L4QLinear(linear, 4, group=4, init=init)
    assert (layer.scale > 0).all() and (layer.dense()[:, :4].abs() < 1e-37).all()
    for value in (0.0, -0.0, 1e-44):
        layer.scale.data[:, 1] = value
        y, found = gradients(layer, torch.randn(3, 8), torch.randn(3, 4))
        assert all(tensor.isfinite().all() for tensor in (y, *found.values(), layer.dense()))


def test_what_has_diverged_is_not_hidden():
    layer = random_layer()
    layer.scale.data[0, 0] = torch.nan
    assert layer(torch.randn(1, 16).double()).isnan().any()
    with pytest.raises(ValueError, match="NaN or infinity; the training has diverged"):
        layer.codes()


def kept(layer, x, call=None):
    """The output, and the shapes of what is kept for backward in storages that are no parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    shapes = []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x) if call is None else call(x)
    return y, shapes


def frozen_base(layer):
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_input_is_kept_for_the_backward_pass(dtype):
    layer = frozen_base(random_layer(group=16, rows=96, columns=64, dtype=torch.float32))
    layer.weight.data = layer.weight.data.to(dtype)
    x = torch.randn(2, 3, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y, shapes = kept(layer, x)
    assert shapes == [(2, 3, 64)] and y.grad_fn is not None


@pytest.mark.parametrize("backend", ["inductor", "aot_eager_decomp_partition"])
def test_compiled_it_gives_the_same_and_keeps_nothing_of_the_weight(backend):
    layer = frozen_base(random_layer(group=16, rows=96, columns=64, dtype=torch.float32))
    x, upstream = torch.randn(2, 3, 64), torch.randn(2, 3, 96)
    outcomes = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend=backend)):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y, shapes = kept(layer, x, call)
        y.backward(upstream.to(y.dtype))
        assert shapes and all(np.prod(shape) <= x.numel() for shape in shapes)
        outcomes.append([y, *(getattr(layer, name).grad for name in LEARNED)])
    for ours, reference in zip(*outcomes, strict=True):
        assert (ours - reference).norm() / reference.norm() < 1e-2 and ours.dtype == reference.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_quantizes_in_fp32_and_multiplies_in_bf16(dtype):
    layer = random_layer(group=16, rows=96, columns=64, dtype=torch.float32)
    layer.weight.data = layer.weight.data.to(dtype)
    layer.bias.data.zero_()
    x, upstream = torch.randn(7, 64), torch.randn(7, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(torch.eye(64)).T, layer.dense().bfloat16())
        y, found = gradients(layer, x, upstream)
    assert y.dtype == torch.bfloat16 and all(found[name].dtype == torch.float32 for name in ("x", *LEARNED))
    exact = copy.deepcopy(layer).double()
    _, wanted = gradients(exact, x.double(), upstream.double(), lambda x: straight_through(exact, x))
    for name in ("x", *LEARNED):
        error = (found[name].double() - wanted[name]).norm() / wanted[name].norm()
        assert error < 1e-2, name


def trained_parameters(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def tiny(bits=4, group=32, dtype=torch.float32, moved=True, **settings):
    """The tiny model with L4Q layers that are no longer where they started."""
    model = l4q_model(models.load_model("tiny-random").cpu().to(dtype), bits, group=group, **settings)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in trained_parameters(model).items():
        if moved and not name.endswith("lora_A"):
            parameter.data += (
                0.02 * torch.randn(parameter.shape, generator=generator) * (0.2 if name.endswith("scale") else 1)
            )
    return model


def loss_gradients(model, tokens=TOKENS):
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in trained_parameters(model).items()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = tiny().train()
    wanted = loss_gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert model.model.layers[0].gradient_checkpointing
    torch.testing.assert_close(loss_gradients(model), wanted, rtol=0, atol=0)


def test_a_compiled_decoder_layer_gives_the_same_gradients():
    model = tiny().train()
    loss, wanted = loss_gradients(model)
    model.model.layers[0].compile(fullgraph=True, backend="aot_eager_decomp_partition")
    compiled_loss, found = loss_gradients(model)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=0)
    for name in wanted:
        error = (found[name] - wanted[name]).norm() / wanted[name].norm()
        assert error < 1e-2, name  # a sum in another order may carry a weight over the edge of a level


def sharded_step(rank, folder):
    """One step on every second sequence, all parameters divided between two processes; returns the new ones, whole."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(minutes=2))
    model = tiny().train()
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(trained_parameters(model).values(), lr=0.5)
    loss_gradients(model, TOKENS[rank : rank + 1])
    optimizer.step()
    whole = {name: parameter.full_tensor().detach() for name, parameter in trained_parameters(model).items()}
    dist.destroy_process_group()
    return whole


def test_a_sharded_step_is_the_step_of_one_process(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # the other process imports this module
    other = torch.multiprocessing.get_context("spawn").Process(target=sharded_step, args=(1, tmp_path))
    other.start()
    sharded = sharded_step(0, tmp_path)
    other.join()
    assert other.exitcode == 0
    model = tiny().train()
    before = {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}
    optimizer = torch.optim.SGD(trained_parameters(model).values(), lr=0.5)
    loss_gradients(model)
    optimizer.step()
    for name, parameter in trained_parameters(model).items():
        torch.testing.assert_close(sharded[name], parameter.detach(), rtol=1e-4, atol=1e-6)
        assert not torch.equal(parameter, before[name])


def test_every_decoder_linear_is_replaced_and_only_adapters_and_grids_train():
    plain = models.load_model("tiny-random")
    names, frozen = set(decoder_linears(plain)), {name: p.clone() for name, p in plain.named_parameters()}
    model = l4q_model(plain, 4, group=32, rank=3)
    assert {name for name, module in model.named_modules() if isinstance(module, L4QLinear)} == names
    assert set(trained_parameters(model)) == {f"{name}.{part}" for name in names for part in LEARNED}
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in frozen.items())
    layer = model.model.layers[0].mlp.down_proj
    assert {part: tuple(getattr(layer, part).shape) for part in LEARNED} == {
        "lora_A": (3, 160),
        "lora_B": (64, 3),
        "scale": (64, 5, 1),
        "offset": (64, 5, 1),
    }
    assert "bits=4, group=32, rank=3" in repr(layer)


def test_a_short_training_reduces_the_loss_and_moves_only_what_is_learned():
    model = tiny(bits=3, moved=False).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=3e-3)
    losses = []
    for _ in range(30):
        losses.append(loss_gradients(model)[0].item())
        optimizer.step()
    assert losses[-1] < losses[0] - 0.2
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(trained_parameters(model))


def test_seeds_decide_the_adapters_and_nothing_else_does():
    def adapters(**arguments):
        model = tiny(moved=False, **arguments)
        return {name: p.detach() for name, p in model.named_parameters() if name.endswith("lora_A")}

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = adapters(seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other, fewer = adapters(seed=3), adapters(seed=4), adapters(seed=3, targets=["up_proj", "mlp.down_proj"])
    assert len(fewer) == 4 and all(torch.equal(first[name], tensor) for name, tensor in (again | fewer).items())
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert len({tensor.flatten()[0].item() for tensor in first.values()}) == len(first)
    for tensor in first.values():  # Kaiming-uniform with a = sqrt(5): within 1 / sqrt(in)
        assert 0.9 < tensor.abs().max() * tensor.shape[1] ** 0.5 <= 1


def plain():
    """tiny-random as it is loaded, on the CPU."""
    return models.load_model("tiny-random").cpu()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [None, 32])
@torch.no_grad()
def test_kept_and_restored_it_gives_the_same_outputs_bit_for_bit(bits, group, tmp_path):
    model = tiny(bits, group)
    keep_model(model, plain(), tmp_path / "kept")
    restored = restore_model(plain(), tmp_path / "kept")
    assert not trained_parameters(restored) and not restored.training
    assert {type(restored.get_submodule(name)) for name in decoder_linears(restored)} == {DeployedLinear}
    assert restored.lm_head.weight is restored.model.embed_tokens.weight
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(restored(TOKENS).logits, model(TOKENS).logits)


@torch.no_grad()
def test_what_attach_made_is_merged_and_kept_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "compute_dtype", lambda on=None: torch.float32)
    model = attach(plain(), "l4q", format=Format("affine", 3, 32), adapter=Adapter(4))
    for parameter in trained_parameters(model).values():
        parameter += 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    wanted = model.eval()(TOKENS).logits
    merge(model)
    keep_model(model, plain(), tmp_path / "kept")
    assert torch.equal(model(TOKENS).logits, wanted)
    assert torch.equal(restore_model(plain(), tmp_path / "kept")(TOKENS).logits, wanted)


@torch.no_grad()
def test_a_16_bit_model_with_biases_is_kept_and_restored_as_well(shape, tmp_path):
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(Qwen2Config(**shape, tie_word_embeddings=False)).bfloat16().eval()
    model = l4q_model(copy.deepcopy(original), 4, group=16, rank=1)
    for layer in model.modules():
        if isinstance(layer, L4QLinear):
            layer.lora_B.normal_(std=0.1)
            if layer.bias is not None:
                layer.bias.normal_()
    wanted = model(TOKENS).logits
    keep_model(model, original, tmp_path / "kept")
    restored = restore_model(original, tmp_path / "kept")
    assert wanted.dtype == torch.bfloat16 and torch.equal(restored(TOKENS).logits, wanted)


@pytest.mark.parametrize("bits", BITS)
def test_a_kept_weight_takes_its_bits_and_eight_bytes_a_group(bits, tmp_path):
    model = tiny(bits, 32)
    keep_model(model, plain(), tmp_path / "kept")
    weights = sum(layer.weight.numel() for layer in decoder_linears(model).values())
    with safe_open(tmp_path / "kept", "pt") as file:
        stored = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    # the rest is as it was loaded
    assert {name.rpartition("/")[2] for name in stored} == {"codes", "scales", "offsets"}
    assert sum(stored.values()) == weights * bits // 8 + weights // 32 * 8
    assert (tmp_path / "kept").stat().st_size < sum(stored.values()) + 8000
    rest = 320 * 64 + 5 * 64  # embeddings, tied to the head, and norms
    assert stored_bytes(model) == sum(stored.values()) + rest * 2


def test_codes_are_those_of_the_layers():
    model = tiny(3)
    found = {name: codes for name, _, codes in coded_layers(model)}
    assert set(found) == set(decoder_linears(model))
    for name, codes in found.items():
        layer = model.get_submodule(name)
        assert codes.integers.shape == layer.weight.shape and codes.low == -4
        assert codes.integers.min() >= -4 and codes.integers.max() <= 3 and codes.bits == 3
        assert torch.equal(codes.decode(), layer.dense())
        torch.testing.assert_close(layer(torch.eye(layer.in_features)).T.detach(), layer.dense())


def test_bad_arguments_are_refused_and_the_model_is_left_as_it_was(tiny_model):
    modules = list(tiny_model.modules())
    for arguments, message in (
        ({"bits": 5}, "bits: 5 is not allowed; use one of 2, 3, 4, 8"),
        ({"bits": 4.0}, r"bits: 4\.0 is not allowed"),
        ({"bits": True}, "bits: True is not allowed"),
        ({"group": 48}, "group: 48 does not divide the input width 64"),
        ({"group": 64}, "group: 64 does not divide the input width 160"),
        ({"group": 0}, "group: 0 does not divide"),
        ({"rank": 0}, "rank: 0 is not allowed; use 1 or more"),
        ({"rank": 2.0}, r"rank: 2\.0 is not allowed"),
        ({"alpha": 0}, "alpha: 0 is not allowed; use a number above 0"),
        ({"alpha": float("nan")}, "alpha: nan is not allowed"),
        ({"init": "lsq"}, r"init: 'lsq' is not known; use one of l4q, lsq\+, symmetric, asymmetric, affine"),
        ({"targets": ["q_proj", "c_attn"]}, "targets: the model has no 'c_attn'; use ends of names such as down_proj"),
        ({"targets": ["proj"]}, "targets: the model has no 'proj'"),
    ):
        with pytest.raises(ValueError, match=message):
            l4q_model(tiny_model, **({"bits": 4, "group": 32} | arguments))
        assert list(tiny_model.modules()) == modules and all(p.requires_grad for p in tiny_model.parameters())
    l4q_model(tiny_model, 4, group=None)
    with pytest.raises(ValueError, match="L4QLinear cannot be quantized; load the model anew"):
        l4q_model(tiny_model, 4, group=None)


def test_what_cannot_be_kept_or_restored_is_refused(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no layers of 4-bit integers; attach 'l4q'"):
        int4_model(plain(), torch.float32)
    with pytest.raises(ValueError, match=r"missing is no kept model \("):
        restore_model(plain(), tmp_path / "missing")
    model = tiny()
    keep_model(model, plain(), tmp_path / "kept")
    config = copy.deepcopy(model.config)
    config.hidden_size, config.num_attention_heads = 32, 2
    with pytest.raises(ValueError, match=r"of another model, which has a layer '.*q_proj' of shape \[64, 64\]"):
        restore_model(models.skeleton(config), tmp_path / "kept")
    fewer = copy.deepcopy(model.config)
    fewer.num_hidden_layers = 1
    with pytest.raises(ValueError, match=r"of another model, which has a layer 'model\.layers\.1\.self_attn\.q_proj'"):
        restore_model(models.skeleton(fewer), tmp_path / "kept")
    model.model.embed_tokens.weight.data += 1
    keep_model(model, plain(), tmp_path / "kept")
    other = copy.deepcopy(model.config)
    other.vocab_size = 300
    before = models.skeleton(other)
    with pytest.raises(ValueError, match=r"which has 'model\.embed_tokens\.weight' of shape \[320, 64\]"):
        restore_model(before, tmp_path / "kept")
    assert {type(layer) for layer in decoder_linears(before).values()} == {nn.Linear}  # nothing was changed
    model.model.layers[1].mlp.up_proj.offset.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: .* has diverged"):
        keep_model(model, plain(), tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "kept.sha256"]
    with safe_open(tmp_path / "kept", "pt") as file:
        layout = json.loads(file.metadata()["layers"])["model.layers.0.mlp.up_proj"]
    assert layout == {"bits": 4, "shape": [160, 64], "low": -8}


@pytest.mark.parametrize(
    ("bits", "init", "offsets"), [(2, "l4q", False), (3, "affine", True), (4, "asymmetric", True), (8, "l4q", True)]
)
def test_fixed_integers_take_gradients_to_their_scales_alone_and_are_stored_as_they_multiply(bits, init, offsets):
    torch.manual_seed(bits)
    layer = LearnedGridLinear(nn.Linear(24, 6).double(), bits, 8, torch.float64, init, offsets)
    fixed = FixedIntegersLinear(layer)
    torch.testing.assert_close(fixed.dense(), layer.dense(), rtol=1e-13, atol=1e-15)
    assert {name for name, own in fixed.named_parameters() if own is not fixed.bias} == {"scale"}
    assert fixed.grid_parameters == [fixed.scale]
    x, upstream = torch.randn(5, 24, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    (found,) = torch.autograd.grad((fixed(x) * upstream).sum(), fixed.scale)
    g = (upstream.T @ x).numpy().reshape(6, 3, 8)
    steps = layer.codes().integers.numpy().reshape(6, 3, 8)
    steps = steps + (layer.offset / layer.scale).detach().numpy() if offsets else steps
    np.testing.assert_allclose(found.numpy(), (g * steps).sum(-1, keepdims=True), rtol=1e-12)
    with torch.no_grad():
        fixed.scale.mul_(torch.rand_like(fixed.scale) + 0.5)
    stored = fixed.codes()
    assert (stored.offset is not None) == offsets
    assert torch.equal(stored.integers, layer.codes().integers) and torch.equal(stored.decode(), fixed.dense())
    with torch.no_grad():
        fixed.scale[2, 1] = torch.nan
    with pytest.raises(ValueError, match="the training has diverged"):
        fixed.codes()
