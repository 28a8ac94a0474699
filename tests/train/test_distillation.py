"""Oracles: a training loop written out by hand, transformers' own evaluation of the loss."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from studylib.config.budgets import MASTERS, Training
from studylib.config.settings import Scheme
from studylib.quant.layers import quantize_model
from studylib.train import loop as training_loop
from studylib.train.distillation import check_head, keep_teacher_states, last_hidden, train_llm_qat
from studylib.train.losses import soft_logit_loss


def text(count, length=16):
    return torch.randint(1, 320, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def data(tiny_model, tmp_path):
    windows = text(12)
    return windows, keep_teacher_states(tiny_model, windows, tmp_path / "states.npy")


@pytest.fixture
def opinionated(tiny_model):
    """A random model is almost uniform; give it opinions to lose."""
    with torch.no_grad():
        for name, parameter in tiny_model.named_parameters():
            parameter.mul_(1 if "norm" in name else 8)
    return tiny_model


@torch.no_grad()
def test_kept_states_are_the_teachers(fp32, tiny_model, data, tmp_path):
    windows, states = data
    logits = torch.from_numpy(states.copy()) @ tiny_model.lm_head.weight.T
    torch.testing.assert_close(logits, tiny_model(windows).logits, rtol=1e-4, atol=1e-5)
    again = keep_teacher_states(None, windows, tmp_path / "states.npy")  # read, not computed
    assert np.array_equal(again, states)


def loss_by_hand(student, teacher, tokens, loss):
    wanted = {"output_attentions": True, "output_hidden_states": True}
    own = student(tokens, **wanted)
    with torch.no_grad():
        given = teacher(tokens, **wanted)
    total = 0
    if "labels" in loss:
        total += F.cross_entropy(own.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    if "kl" in loss:
        q, p = (out.logits.flatten(0, 1).log_softmax(-1) for out in (own, given))
        total += F.kl_div(q, p, reduction="batchmean", log_target=True)
    if "attention" in loss:
        pairs = zip(own.attentions, given.attentions, strict=True)
        total += sum(F.kl_div((q + 1e-30).log(), p, reduction="sum") / q[..., 0].numel() for q, p in pairs) / 2
    pairs = list(zip(own.hidden_states[1:], given.hidden_states[1:], strict=True))
    if "raw-hidden" in loss:
        total += sum((q - p).square().mean() for q, p in pairs) / 2
    elif "hidden" in loss:
        total += sum(((q - p).square().sum(-1) / p.square().sum(-1)).mean() for q, p in pairs) / 2
    return total


def hand_written_training(student, teacher, windows, settings):
    """The same training without Trainer, kept states or chunks."""
    decayed = list(student.parameters())
    optimizer = torch.optim.AdamW(decayed, lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + np.cos(np.pi * step / settings.steps))
    )
    losses = []
    for step in range(settings.steps):
        tokens = windows[step * settings.batch : (step + 1) * settings.batch]
        loss = loss_by_hand(student, teacher, tokens, settings.loss)
        loss = loss * (tokens.shape[1] if settings.scale == "batchmean" else 1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decayed, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


SETTINGS = Training(steps=6, batch=2, learning_rate=1e-3)


@pytest.mark.parametrize(
    ("loss", "scale", "kept"),
    [
        ("kl", "token", True),
        ("kl", "token", False),
        ("kl", "batchmean", True),
        ("labels", "token", None),
        ("attention", "token", False),
        ("kl+hidden", "token", False),
        ("kl+raw-hidden", "token", False),
        ("labels+attention+hidden", "token", False),
    ],
)
def test_training_equals_a_hand_written_loop(fp32, tiny_model, data, tmp_path, loss, scale, kept):
    windows, states = data
    tiny_model.set_attn_implementation("eager")
    settings = dataclasses.replace(SETTINGS, loss=loss, scale=scale)
    ours, theirs = (quantize_model(copy.deepcopy(tiny_model), "8-8-8") for _ in range(2))
    teacher = {True: states, False: tiny_model, None: None}[kept]
    log = train_llm_qat(ours, teacher, tiny_model.lm_head.weight, windows, settings, tmp_path / "c")
    expected = hand_written_training(theirs, tiny_model, windows, settings)
    assert [entry["step"] for entry in log.steps] == list(range(1, 7))
    np.testing.assert_allclose([entry["loss"] for entry in log.steps], expected, rtol=2e-2)
    moved = [(a - b).abs().max() for a, b in zip(ours.parameters(), tiny_model.parameters(), strict=True)]
    assert sum(m > 0 for m in moved) >= len(moved) - (loss == "attention") * 7  # what no map depends on
    assert not hasattr(ours, "teacher") and "forward" not in vars(ours)


def test_training_lowers_the_loss_on_text_it_has_not_seen(opinionated, tmp_path):
    windows = text(576)
    states = keep_teacher_states(opinionated, windows, tmp_path / "s.npy")
    student = quantize_model(copy.deepcopy(opinionated), "3-8-4")

    def held_out():
        with torch.no_grad():
            h = last_hidden(student, windows[512:]).flatten(0, 1)
            goal = torch.from_numpy(states[512:].copy()).flatten(0, 1)
            return soft_logit_loss(h, student.lm_head.weight, goal, opinionated.lm_head.weight).item()

    before = held_out()
    train_llm_qat(
        student,
        states[:512],
        opinionated.lm_head.weight.detach().clone(),
        windows[:512],
        Training(steps=64, batch=8, learning_rate=2e-3),
        tmp_path / "c",
    )
    assert held_out() < 0.8 * before


@torch.no_grad()
def plain_loss(model, tokens):
    return model(input_ids=tokens, labels=tokens).loss.item()


def test_the_learning_curve_is_the_models_own_loss_on_held_out_text(fp32, opinionated, data, tmp_path):
    windows, _ = data
    held_out = text(40)[36:]
    student = quantize_model(copy.deepcopy(opinionated), "4-8-4")
    before = plain_loss(student, held_out)
    head = opinionated.lm_head.weight.detach().clone()
    log = train_llm_qat(student, opinionated, head, windows, SETTINGS, tmp_path / "c", held_out=held_out)
    assert [point["step"] for point in log.curve] == [0, 2, 3, 4, 6]
    assert [point["tokens"] for point in log.curve] == [0, 64, 96, 128, 192]
    assert log.curve[0]["loss"] == pytest.approx(before, rel=1e-5)
    assert log.curve[-1]["loss"] == pytest.approx(plain_loss(student, held_out), rel=1e-5)
    assert log.curve[0]["loss"] != log.curve[-1]["loss"]


class Killed(Exception):
    pass


def killed_after(tokens):
    told = []

    def progress(count):
        told.append(count)
        if sum(told) == tokens:
            raise Killed

    return progress


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("grid", ["symmetric", "lsq"])
def test_training_resumed_from_a_checkpoint_ends_with_the_same_weights(
    fp32, tiny_model, data, tmp_path, monkeypatch, grid
):
    monkeypatch.setattr(training_loop, "CHECKPOINT_SECONDS", 0)
    windows, states = data
    head = tiny_model.lm_head.weight.detach().clone()
    whole, cut, resumed = (quantize_model(copy.deepcopy(tiny_model), "4-8-4", Scheme(grid=grid)) for _ in range(3))
    fixed = (states, head, windows, SETTINGS)
    held_out = text(14)[12:]
    log = train_llm_qat(whole, *fixed, tmp_path / "whole", held_out=held_out)
    with pytest.raises(Killed):
        train_llm_qat(cut, *fixed, tmp_path / "cut", held_out=held_out, progress=killed_after(5 * 2 * 16))
    steps = []
    log_resumed = train_llm_qat(resumed, *fixed, tmp_path / "cut", held_out=held_out, progress=steps.append)
    assert steps[0] == 4 * 2 * 16  # went on after the fourth step
    assert log_resumed == log and same_weights(whole, resumed)


def test_an_extended_training_goes_on_where_the_shorter_one_ended(fp32, tiny_model, data, tmp_path):
    windows, states = data
    head = tiny_model.lm_head.weight.detach().clone()
    longer = dataclasses.replace(SETTINGS, steps=10, extended_from=(6,))
    short, extended, at_once = (quantize_model(copy.deepcopy(tiny_model), "4-8-4") for _ in range(3))
    first = train_llm_qat(short, states, head, windows, SETTINGS, tmp_path / "kept", held_out=windows, keep=True)
    training_loop.take_over(tmp_path / "kept" / "checkpoint-6", tmp_path / "extended")
    told = []
    log = train_llm_qat(
        extended, states, head, windows, longer, tmp_path / "extended", held_out=windows, progress=told.append
    )
    assert told[0] == 6 * 2 * 16
    assert log.steps[:6] == first.steps and log.curve[: len(first.curve)] == first.curve
    assert train_llm_qat(at_once, states, head, windows, longer, tmp_path / "new", held_out=windows) == log
    assert same_weights(extended, at_once)
    rates = [entry["learning_rate"] for entry in log.steps]
    assert rates[5] < 0.1 * rates[0] and rates[6] == pytest.approx(1e-3)  # a warm restart


def test_bf16_masters_lose_small_updates(fp32, opinionated, data, tmp_path):
    windows, _ = data
    head = opinionated.lm_head.weight.detach().clone()
    moved = {}
    for masters in MASTERS:
        student = quantize_model(copy.deepcopy(opinionated), "4-8-4")
        before = [p.detach().bfloat16() if masters == "bf16" else p.detach().clone() for p in student.parameters()]
        settings = dataclasses.replace(SETTINGS, masters=masters, learning_rate=1e-6)
        train_llm_qat(student, opinionated, head, windows, settings, tmp_path / masters)
        assert {p.dtype for p in student.parameters()} == {torch.float32}
        assert all(torch.equal(a, b) for a, b in zip(student.buffers(), opinionated.buffers(), strict=True))
        changed = [(a != b.float()).float().mean() for a, b in zip(student.parameters(), before, strict=True)]
        moved[masters] = float(torch.stack(changed).mean())
    assert moved["bf16"] < 0.1 < 0.5 < moved["fp32"]


def test_divergence_stops_the_training_and_is_visible(fp32, tiny_model, data, tmp_path):
    windows, states = data
    broken = states.copy()
    broken[4:] = np.nan
    student = quantize_model(copy.deepcopy(tiny_model), "4-8-4")
    log = train_llm_qat(student, broken, tiny_model.lm_head.weight, windows, SETTINGS, tmp_path / "c").steps
    assert len(log) == 3 and np.isfinite(log[1]["loss"]) and not np.isfinite(log[2]["loss"])


def test_what_cannot_be_trained_is_refused(tiny_model, data, tmp_path):
    windows, states = data
    head = tiny_model.lm_head.weight
    with pytest.raises(ValueError, match="float32"):
        train_llm_qat(copy.deepcopy(tiny_model).bfloat16(), states, head, windows, SETTINGS, tmp_path)
    with pytest.raises(ValueError, match="context of 512"):
        train_llm_qat(tiny_model, states, head, text(2, 600), SETTINGS, tmp_path)
    scaled = copy.deepcopy(tiny_model)
    scaled.lm_head.bias = torch.nn.Parameter(torch.ones(320))
    with pytest.raises(ValueError, match="lm_head"):
        check_head(scaled)


def test_losses_that_a_model_cannot_give_are_refused(tiny_model, data, tmp_path):
    windows, states = data
    narrow = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    )
    for loss, teacher, named in (
        ("kl", None, "loss: 'kl' needs a teacher"),
        ("kl+hidden", states, "needs the teacher itself"),
        ("attention", tiny_model, "the attention kernel 'sdpa' does not return"),
        ("raw-hidden", narrow, "the student's hidden_size is 64, the teacher's 32"),
        ("hidden", narrow, "the student's hidden_size is 64, the teacher's 32"),
    ):
        settings = dataclasses.replace(SETTINGS, loss=loss)
        with pytest.raises(ValueError, match=named):
            train_llm_qat(tiny_model, teacher, tiny_model.lm_head.weight, windows, settings, tmp_path)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"steps": 0}, "steps: 0"),
        ({"batch": 0}, "batch: 0"),
        ({"learning_rate": 0.0}, "learning_rate: 0.0"),
        ({"temperature": -1.0}, "temperature: -1.0"),
        ({"loss": "labels", "temperature": 2.0}, "has no meaning for the loss 'labels'"),
        ({"loss": "kd"}, "'kd' in 'kd' is not known"),
        ({"scale": "sum"}, "'sum' is not known; use one of token, batchmean"),
        ({"masters": "fp16"}, "'fp16' is not known; use one of fp32, bf16"),
        ({"extended_from": (4,)}, r"extended_from: \(4,\) is not allowed"),
    ],
)
def test_bad_settings_name_the_value(bad, named):
    with pytest.raises(ValueError, match=named):
        Training(**{"steps": 4, "batch": 2, "learning_rate": 1e-3} | bad)
