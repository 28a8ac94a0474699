"""Oracles: autograd through full logits, PyTorch's KL, a training loop written out by hand."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from studylib import distill
from studylib.distill import Training, check_head, keep_teacher_states, last_hidden, soft_logit_loss, train_llm_qat
from studylib.layers import quantize_model
from studylib.sampling import Sampling, Windows, generate_windows


def full_logits_loss(hidden, head, teacher_hidden, teacher_head):
    q = (hidden @ head.T).log_softmax(-1)
    p = (teacher_hidden @ teacher_head.T).log_softmax(-1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


@pytest.mark.parametrize("tokens", [1, 255, 256, 600])
def test_chunked_loss_and_gradients_equal_autograd_on_full_logits(tokens):
    generator = torch.Generator().manual_seed(tokens)
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(i < 2)
        for i, shape in enumerate([(tokens, 24), (96, 24), (tokens, 40), (96, 40)])
    )
    ours = soft_logit_loss(hidden, head, teacher_hidden, teacher_head)
    theirs = full_logits_loss(hidden, head, teacher_hidden, teacher_head)
    expected = torch.autograd.grad(3 * theirs, (hidden, head))
    found = torch.autograd.grad(3 * ours, (hidden, head))
    # Softmax is computed in fp32 whatever the inputs, hence fp32 tolerances.
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_loss_of_a_student_that_is_the_teacher_is_zero():
    h, w = torch.randn(10, 8), torch.randn(32, 8)
    assert soft_logit_loss(h, w, h, w).abs() < 1e-6


def test_frozen_head_gets_no_gradient():
    h, w = torch.randn(10, 8, requires_grad=True), torch.randn(32, 8)
    soft_logit_loss(h, w, torch.randn(10, 8), torch.randn(32, 8)).backward()
    assert h.grad is not None and w.grad is None


def test_bf16_autocast_stays_close_to_fp32():
    torch.manual_seed(0)
    args = [torch.randn(300, 32), torch.randn(96, 32), torch.randn(300, 32), torch.randn(96, 32)]
    exact = soft_logit_loss(*args)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = soft_logit_loss(*args)
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).abs() / exact < 0.02


@pytest.mark.parametrize(
    "shapes",
    [[(0, 8), (32, 8), (0, 8), (32, 8)], [(4, 8), (32, 8), (5, 8), (32, 8)], [(4, 8), (32, 8), (4, 8), (33, 8)]],
)
def test_shapes_that_do_not_belong_together_are_refused(shapes):
    with pytest.raises(ValueError, match="must be"):
        soft_logit_loss(*(torch.randn(shape) for shape in shapes))


@pytest.fixture
def data(tiny_model, tmp_path):
    windows = generate_windows(tiny_model, Sampling(count=12, length=16, batch=6), tmp_path / "data")
    return windows, keep_teacher_states(tiny_model, windows, tmp_path / "states.npy")


@torch.no_grad()
def test_kept_states_are_the_teachers(fp32, tiny_model, data, tmp_path):
    windows, states = data
    logits = torch.from_numpy(states.copy()) @ tiny_model.lm_head.weight.T
    torch.testing.assert_close(logits, tiny_model(windows.tokens).logits, rtol=1e-4, atol=1e-5)
    again = keep_teacher_states(None, windows, tmp_path / "states.npy")  # read, not computed
    assert np.array_equal(again, states)


def hand_written_training(student, teacher, windows, settings):
    """The same training without Trainer, kept states or chunks."""
    decayed = list(student.parameters())
    optimizer = torch.optim.AdamW(decayed, lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + np.cos(np.pi * step / settings.steps))
    )
    losses = []
    for step in range(settings.steps):
        at = slice(step * settings.batch, (step + 1) * settings.batch)
        tokens, mask = windows.tokens[at], windows.mask[at]
        with torch.no_grad():
            p = teacher(tokens).logits[mask].log_softmax(-1)
        loss = F.kl_div(student(tokens).logits[mask].log_softmax(-1), p, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decayed, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


SETTINGS = Training(steps=6, batch=2, learning_rate=1e-3)


@pytest.mark.parametrize("kept", [True, False])
def test_training_equals_a_hand_written_loop(fp32, tiny_model, data, tmp_path, kept):
    windows, states = data
    ours, theirs = (quantize_model(copy.deepcopy(tiny_model), "8-8-8") for _ in range(2))
    log = train_llm_qat(
        ours, states if kept else tiny_model, tiny_model.lm_head.weight, windows, SETTINGS, tmp_path / "c"
    )
    expected = hand_written_training(theirs, tiny_model, windows, SETTINGS)
    assert [entry["step"] for entry in log] == list(range(1, 7))
    np.testing.assert_allclose([entry["loss"] for entry in log], expected, rtol=2e-2)
    moved = [(a - b).abs().max() for a, b in zip(ours.parameters(), tiny_model.parameters(), strict=True)]
    assert min(moved) > 0  # every parameter is trained
    assert not hasattr(ours, "teacher") and "forward" not in vars(ours)


def test_training_lowers_the_loss_on_text_it_has_not_seen(tiny_model, tmp_path):
    with torch.no_grad():  # a random model is almost uniform; give it opinions to lose
        for name, parameter in tiny_model.named_parameters():
            parameter.mul_(1 if "norm" in name else 8)
    windows = generate_windows(tiny_model, Sampling(count=576, length=16, batch=64), tmp_path / "d")
    seen = Windows(windows.tokens[:512], windows.lengths[:512])
    states = keep_teacher_states(tiny_model, windows, tmp_path / "s.npy")
    student = quantize_model(copy.deepcopy(tiny_model), "3-8-4")

    def held_out():
        with torch.no_grad():
            h, mask = last_hidden(student, windows.tokens[512:]), windows.mask[512:]
            return soft_logit_loss(
                h[mask], student.lm_head.weight, torch.from_numpy(states[512:].copy())[mask], tiny_model.lm_head.weight
            ).item()

    before = held_out()
    train_llm_qat(
        student,
        states[:512],
        tiny_model.lm_head.weight.detach().clone(),
        seen,
        Training(steps=64, batch=8, learning_rate=2e-3),
        tmp_path / "c",
    )
    assert held_out() < 0.8 * before


def test_training_resumed_from_a_checkpoint_ends_with_the_same_weights(tiny_model, data, tmp_path):
    windows, states = data
    head = tiny_model.lm_head.weight.detach().clone()

    class Killed(Exception):
        pass

    told = []

    def kill_in_the_fifth_step(tokens):
        told.append(tokens)
        if sum(told) == 5 * 2 * 16:
            raise Killed

    whole, cut = (quantize_model(copy.deepcopy(tiny_model), "4-8-4") for _ in range(2))
    log = train_llm_qat(whole, states, head, windows, SETTINGS, tmp_path / "whole")
    with pytest.raises(Killed):
        train_llm_qat(cut, states, head, windows, SETTINGS, tmp_path / "cut", progress=kill_in_the_fifth_step)
    resumed, steps = quantize_model(copy.deepcopy(tiny_model), "4-8-4"), []
    log_resumed = train_llm_qat(resumed, states, head, windows, SETTINGS, tmp_path / "cut", progress=steps.append)
    assert steps[0] == 4 * 2 * 16  # went on after the fourth step
    assert log_resumed == log
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_divergence_stops_the_training_and_is_visible(tiny_model, data, tmp_path):
    windows, states = data
    broken = states.copy()
    broken[4:] = np.nan
    student = quantize_model(copy.deepcopy(tiny_model), "4-8-4")
    log = train_llm_qat(student, broken, tiny_model.lm_head.weight, windows, SETTINGS, tmp_path / "c")
    assert len(log) == 3 and np.isfinite(log[1]["loss"]) and not np.isfinite(log[2]["loss"])


def test_what_cannot_be_trained_is_refused(tiny_model, data, tmp_path):
    windows, states = data
    with pytest.raises(ValueError, match="float32"):
        train_llm_qat(
            copy.deepcopy(tiny_model).bfloat16(), states, tiny_model.lm_head.weight, windows, SETTINGS, tmp_path
        )
    long = Windows(torch.zeros(2, 600, dtype=torch.long), torch.tensor([600, 600]))
    with pytest.raises(ValueError, match="context of 512"):
        train_llm_qat(tiny_model, states, tiny_model.lm_head.weight, long, SETTINGS, tmp_path)
    scaled = copy.deepcopy(tiny_model)
    scaled.lm_head.bias = torch.nn.Parameter(torch.ones(320))
    with pytest.raises(ValueError, match="lm_head"):
        check_head(scaled)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"batch": 0}, {"learning_rate": 0.0}])
def test_bad_settings_name_the_value(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=name) as caught:
        Training(**{"steps": 4, "batch": 2, "learning_rate": 1e-3} | bad)
    assert repr(value) in str(caught.value)


def test_one_chunk_is_all_the_logits_that_are_held(monkeypatch):
    """With a vocabulary of 4,096 and 2,048 tokens, full fp32 logits of both models would be 64 MB."""
    largest = 0
    original = torch.Tensor.log_softmax

    def watched(self, *args, **kwargs):
        nonlocal largest
        largest = max(largest, self.numel())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "log_softmax", watched)
    h, w = torch.randn(2048, 8, requires_grad=True), torch.randn(4096, 8, requires_grad=True)
    soft_logit_loss(h, w, torch.randn(2048, 8), torch.randn(4096, 8)).backward()
    assert largest == distill.CHUNK * 4096
