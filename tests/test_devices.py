"""The same numbers on every device that is here. Oracles, on the CPU: transformers' generation, plain losses in fp64,
training written by hand, autograd of what L4Q defines."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from studylib.config.budgets import Evaluation, Instructions, Sampling, Training, Tuning
from studylib.config.settings import Adapter, Format
from studylib.data import models
from studylib.data.corpora import Pair
from studylib.data.generation import generate_sequences
from studylib.evaluate import scores as evaluation
from studylib.evaluate.divergence import FullPrecision
from studylib.evaluate.packing import log_likelihoods
from studylib.methods import attach
from studylib.quant.formats import encode_model
from studylib.quant.kernel import Int4Linear, int4_model
from studylib.quant.layers import quantize_model
from studylib.quant.learned import L4QLinear, levels_of
from studylib.train.distillation import keep_teacher_states, train_llm_qat
from studylib.train.finetuning import IGNORED, check_paged, collate, encode, fine_tune, random_order, response_loss

HERE = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
TOKENS = torch.randint(1, 320, (4, 24), generator=torch.Generator().manual_seed(0))
PAIRS = [Pair(f"say {word}", word * 3) for word in ("ab", "cd", "efgh", "ij")]
LEARN, TUNED = Instructions(length=64), Tuning(steps=4, batch=2, learning_rate=1e-3)
UNIFORM = Format("int-full", 4, 32)


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.skipif(not here, reason=f"there is no {name} here"))
        for name, here in HERE.items()
    ]
)
def device(request, monkeypatch, fp32):
    """Models are on it, inside, and computed in fp32."""
    monkeypatch.setenv("STUDY_DEVICE", request.param)
    return torch.device(request.param)


@pytest.fixture
def pair(device):
    """A model with opinions, which a random one has not, on the device; and the same on the CPU, in fp64."""
    model = models.load_model("tiny-random")
    assert model.device.type == device.type
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1 if "norm" in name else 8)
    return model, copy.deepcopy(model).cpu().double()


@torch.no_grad()
def test_greedy_text_is_that_of_transformers(device, pair):
    model, exact = pair
    start = torch.arange(1, 13)[:, None]
    text, lengths = generate_sequences(model, start.to(device), Sampling(12, 40, "greedy"), seed=0)
    for first, own in zip(start, text.split(lengths.tolist()), strict=True):
        theirs = exact.generate(first[None], do_sample=False, max_length=40, pad_token_id=0)[0]
        assert own.tolist() == theirs.tolist()
    assert len(set(text.tolist())) > 5


@torch.no_grad()
def test_sampled_tokens_are_drawn_from_the_likeliest(device, pair):
    model, exact = pair
    start, settings = torch.arange(1, 33)[:, None], Sampling(32, 24, "sampled", top_k=5)
    text, lengths = generate_sequences(model, start.to(device), settings, seed=0)
    again, _ = generate_sequences(model, start.to(device), settings, seed=0)
    assert torch.equal(text, again)
    ranks = []
    for own in text.split(lengths.tolist()):
        logits = exact(own[None, :-1]).logits[0]
        ranks += (logits > logits.gather(1, own[1:, None])).sum(1).tolist()
    assert set(ranks) == set(range(5))


@torch.no_grad()
def test_scores_are_plain_losses(device, pair):
    model, exact = pair
    logits = exact(TOKENS).logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none").view(4, -1)
    np.testing.assert_allclose(evaluation.window_losses(model, TOKENS), losses.mean(1), rtol=1e-4)
    rows = TOKENS.tolist()
    requests = [(row[:at], row[at:]) for row in rows for at in (8, 20)]  # which share rows, and beginnings
    wanted = [-losses[i, at - 1 :].sum().item() for i in range(4) for at in (8, 20)]
    np.testing.assert_allclose([value for value, _ in log_likelihoods(model, requests)], wanted, rtol=1e-4)


def changes(model, before):
    """What training has done to each parameter that it may change, by name."""
    found = {name: own.detach().cpu().double() for name, own in model.named_parameters() if own.requires_grad}
    return {name: own - before[name] for name, own in found.items()}


def same_step(ours, log, theirs, gradients, rate):
    """Loss, norm of the gradients, and AdamW's first step of all that is trained, rate * g / (|g| + 1e-8) without
    decay: both as by hand."""
    loss, gradients = gradients
    norm = torch.cat([own.flatten() for own in gradients.values()]).norm().item()
    assert log.steps[0]["loss"] == pytest.approx(loss, rel=1e-3)
    assert log.steps[0]["grad_norm"] == pytest.approx(norm, rel=1e-2)
    for name, change in changes(ours, theirs).items():
        clipped = gradients[name] * min(1.0, 1.0 / norm)
        wanted = -rate * clipped / (clipped.abs() + 1e-8)
        agreed = (change - wanted).abs() < 0.02 * rate
        assert agreed.double().mean() > 0.97, name  # a value on the edge of a step may round another way


def by_hand(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.item(), {
        name: own.grad.detach().double() for name, own in model.named_parameters() if own.requires_grad
    }


def state(model):
    return {name: own.detach().cpu().double().clone() for name, own in model.named_parameters()}


def test_a_step_of_llm_qat_is_that_by_hand(device, pair, tmp_path):
    teacher, exact = pair
    student = quantize_model(copy.deepcopy(teacher), "8-8-8")
    mirror = quantize_model(copy.deepcopy(exact).float(), "8-8-8")
    first = state(student)
    states = keep_teacher_states(teacher, TOKENS[:2], tmp_path / "states.npy")
    settings = Training(steps=1, batch=2, learning_rate=1e-3)
    log = train_llm_qat(student, states, teacher.lm_head.weight, TOKENS[:2], settings, tmp_path / "c")
    q, p = (own(TOKENS[:2]).logits.flatten(0, 1).double().log_softmax(-1) for own in (mirror, exact))
    loss = F.kl_div(q, p.detach(), reduction="batchmean", log_target=True)
    same_step(student, log, first, by_hand(mirror, loss), settings.learning_rate)


def jointly_quantized(layer):
    """L4Q as its paper defines it, for autograd: W + scaling B A, scaled, clipped, rounded straight through."""
    low, high = levels_of(layer.bits)

    def forward(x):
        whole = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
        w = ((whole.unflatten(1, (-1, layer.group)) - layer.offset) / layer.scale).clamp(low, high)
        levels = w + (w.round() - w).detach()
        return F.linear(x, (levels * layer.scale + layer.offset).flatten(1), layer.bias)

    return forward


def plain_loss(model, rows):
    batch = collate(rows)
    return F.cross_entropy(model(batch["tokens"]).logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)


def test_a_step_of_l4q_is_that_of_autograd(device, pair, tiny_tokenizer, tmp_path):
    model = attach(pair[0], "l4q", format=UNIFORM, adapter=Adapter(rank=4))
    with torch.no_grad():  # B begins as zeros, which A's gradients would be as well
        for layer in (own for own in model.modules() if isinstance(own, L4QLinear)):
            layer.lora_B += 0.01 * torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(1)).to(
                device
            )
    exact = copy.deepcopy(model).cpu().double()
    for layer in (own for own in exact.modules() if isinstance(own, L4QLinear)):
        layer.forward = jointly_quantized(layer)
    first, settings = state(model), dataclasses.replace(TUNED, steps=1)
    rows = encode(tiny_tokenizer, PAIRS, LEARN.length)
    order = random_order([len(row["tokens"]) for row in rows], settings.batch, LEARN.seed)
    rows = [rows[at] for at in order[: settings.batch]]
    loss, wanted = by_hand(exact, plain_loss(exact, rows))
    batch = {name: own.to(device) for name, own in collate(rows).items()}
    _, found = by_hand(model, response_loss(model, **batch))
    for name, gradient in found.items():
        assert (gradient.cpu() - wanted[name]).norm() < 0.02 * wanted[name].norm(), name
    model.zero_grad()
    log = fine_tune(model, tiny_tokenizer, PAIRS, LEARN, settings, tmp_path / "c")
    same_step(model, log, first, (loss, wanted), settings.learning_rate)


@torch.no_grad()
def test_4_bit_integers_are_executed_on_processors_whatever_computes_else(device, pair, tiny_tokenizer, tmp_path):
    model, exact = pair
    wanted = Evaluation(("wikipedia",), windows=4, length=24)
    windows = evaluation.evaluation_windows(tiny_tokenizer, wanted)
    full = FullPrecision(model, windows, {"wikipedia": tmp_path / "states.npy"})
    encoded = encode_model(model.cpu(), Format("affine", 4, 32))
    decoded = copy.deepcopy(encoded).double()
    packed = int4_model(encoded, torch.float32, torch.float32)
    assert sum(isinstance(own, Int4Linear) for own in packed.modules()) == 14
    _, found = evaluation.score(packed, tiny_tokenizer, wanted, full)
    tokens = windows["wikipedia"]
    own, given = (one(tokens).logits[:, :-1].log_softmax(-1) for one in (decoded, exact))
    losses = -own.gather(2, tokens[:, 1:, None])[..., 0].mean(1)
    np.testing.assert_allclose(found["loss/wikipedia"], losses, rtol=1e-3)
    np.testing.assert_allclose(found["kl/wikipedia"], (given.exp() * (given - own)).sum(-1).mean(1), rtol=1e-3)


def test_paged_states_train_as_others_do_where_cuda_is(device, pair, tiny_tokenizer, tmp_path):
    model = attach(pair[0], "lora", adapter=Adapter(1024, 1024))
    check_paged(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    paged, settings = copy.deepcopy(model), dataclasses.replace(TUNED, paged=True)
    if device.type != "cuda":
        with pytest.raises(ValueError, match="paging needs CUDA"):
            fine_tune(paged, tiny_tokenizer, PAIRS, LEARN, settings, tmp_path / "paged")
        return
    logs = [
        fine_tune(own, tiny_tokenizer, PAIRS, LEARN, given, tmp_path / name)
        for name, own, given in (("paged", paged, settings), ("usual", model, TUNED))
    ]
    losses = [[step["loss"] for step in log.steps] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][-1] < losses[0][0]
    for own, other in zip(paged.parameters(), model.parameters(), strict=True):
        assert torch.allclose(own, other, atol=0.02 * TUNED.learning_rate)
