"""Oracles: autograd through full logits, PyTorch's own losses."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from studylib.config.budgets import split_loss
from studylib.train import losses
from studylib.train.losses import attention_loss, hidden_loss, label_loss, raw_hidden_loss, soft_logit_loss


def full_logits_loss(kind, temperature, hidden, head, teacher_hidden, teacher_head):
    q = (hidden @ head.T / temperature).log_softmax(-1)
    p = (teacher_hidden @ teacher_head.T / temperature).log_softmax(-1)
    forward = F.kl_div(q, p, reduction="batchmean", log_target=True)
    reverse = F.kl_div(p, q, reduction="batchmean", log_target=True)
    return temperature**2 * {"kl": forward, "reverse-kl": reverse, "symmetric-kl": (forward + reverse) / 2}[kind]


def matrices(tokens):
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(i < 2)
        for i, shape in enumerate([(tokens, 24), (96, 24), (tokens, 40), (96, 40)])
    ]


@pytest.mark.parametrize("kind", ["kl", "reverse-kl", "symmetric-kl"])
@pytest.mark.parametrize(("tokens", "temperature"), [(1, 1.0), (255, 1.0), (256, 2.0), (600, 0.5)])
def test_chunked_losses_and_gradients_equal_autograd_on_full_logits(kind, tokens, temperature):
    given = matrices(tokens)
    ours = soft_logit_loss(*given, kind, temperature)
    theirs = full_logits_loss(kind, temperature, *given)
    expected = torch.autograd.grad(3 * theirs, given[:2])
    found = torch.autograd.grad(3 * ours, given[:2])
    # Softmax is computed in fp32 whatever the inputs, hence fp32 tolerances.
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 300])
def test_label_loss_is_cross_entropy(tokens):
    hidden, head, *_ = matrices(tokens)
    labels = torch.randint(96, (tokens,), generator=torch.Generator().manual_seed(0))
    ours, theirs = label_loss(hidden, head, labels), F.cross_entropy(hidden @ head.T, labels)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, head)), torch.autograd.grad(theirs, (hidden, head)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_feature_losses_are_means_over_layers():
    generator = torch.Generator().manual_seed(0)
    maps, given = ([torch.randn(2, 3, 5, 5, generator=generator).softmax(-1) for _ in range(4)] for _ in range(2))
    rows = [(p * (p / q).log()).sum(-1).mean() for q, p in zip(maps, given, strict=True)]
    torch.testing.assert_close(attention_loss(maps, given), torch.stack(rows).mean())
    causal = [m.tril() / m.tril().sum(-1, keepdim=True) for m in maps]
    assert attention_loss(causal, causal).abs() < 1e-8
    states, goal = ([torch.randn(2, 5, 7, generator=generator) for _ in range(4)] for _ in range(2))
    torch.testing.assert_close(raw_hidden_loss(states, goal), (torch.stack(states) - torch.stack(goal)).square().mean())


def layers_of_states(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) for _ in range(3)] for _ in range(2)]


def test_hidden_states_are_compared_token_by_token_relative_to_the_teachers():
    states, goal = layers_of_states()
    own, given = np.stack(states), np.stack(goal)
    expected = (np.square(own - given).sum(-1) / np.square(given).sum(-1)).mean()
    student = [state.requires_grad_() for state in states]
    loss = hidden_loss(student, goal)
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(expected, rel=1e-12)
    for found, mine, theirs in zip(torch.autograd.grad(loss, student), own, given, strict=True):
        by_hand = 2 * (mine - theirs) / np.square(theirs).sum(-1, keepdims=True) / (3 * 10)
        np.testing.assert_allclose(found.numpy(), by_hand, rtol=1e-12)


@pytest.mark.parametrize("factor", [1e-6, 0.37, 4096.0])
def test_the_loss_of_hidden_states_is_the_same_at_any_scale(factor):
    states, goal = layers_of_states()
    scaled = hidden_loss([factor * own for own in states], [factor * given for given in goal])
    torch.testing.assert_close(scaled, hidden_loss(states, goal), rtol=1e-12, atol=0)


def test_massive_activations_of_one_token_leave_the_other_tokens_their_share():
    """Under the raw loss one token's gradients are a hundred times all others'; here the others' are as before."""

    def gradients(loss, size):
        states, goal = layers_of_states()
        for layer in (*states, *goal):
            layer[0, 0, 3] *= size
        states = [state.requires_grad_() for state in states]
        return torch.stack(torch.autograd.grad(loss(states, goal), states)).flatten(1, 2)  # (layers, tokens, D)

    raw, plain, massive = gradients(raw_hidden_loss, 1000), gradients(hidden_loss, 1), gradients(hidden_loss, 1000)
    assert raw[:, 0].norm() > 100 * raw[:, 1:].norm()
    torch.testing.assert_close(massive[:, 1:], plain[:, 1:], rtol=1e-12, atol=0)


def test_a_student_that_is_its_teacher_has_no_error_even_where_a_state_is_zero():
    zero = torch.zeros(1, 3, 4)
    assert hidden_loss((zero,), (zero,)) == 0


def test_losses_are_named_by_their_parts():
    assert split_loss("kl") == ("kl", ())
    assert split_loss("hidden+labels+attention") == ("labels", ("attention", "hidden"))
    assert split_loss("attention") == (None, ("attention",))
    assert split_loss("raw-hidden+kl") == ("kl", ("raw-hidden",))
    for loss, named in (
        ("mse", "'mse' in 'mse' is not known; join parts of labels, kl"),
        ("kl+", "'' in 'kl"),
        ("kl+labels", "one of labels, kl, reverse-kl, symmetric-kl at most"),
        ("kl+hidden+hidden", "nothing twice"),
    ):
        with pytest.raises(ValueError, match=named.replace("+", r"\+")):
            split_loss(loss)
    with pytest.raises(ValueError, match="kind: 'labels' is not known"):
        soft_logit_loss(*matrices(3), kind="labels")


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
    assert largest == losses.CHUNK * 4096
