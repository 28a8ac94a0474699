"""Oracle: KL divergence from plain logits in float64."""

import copy

import numpy as np
import pytest
import torch
from transformers import Gemma2Config

from studylib.data import models
from studylib.evaluate.divergence import FullPrecision, divergence
from studylib.evaluate.scores import _window_scores, window_losses
from studylib.quant import round_to_nearest


def by_hand(full, own, windows):
    """Mean over the tokens after the first of KL(full || own), window by window."""
    found = []
    for row in windows:
        with torch.no_grad():
            log_p, log_q = (model(row[None]).logits[0, :-1].double().log_softmax(-1) for model in (full, own))
        found.append((log_p.exp() * (log_p - log_q)).sum(-1).mean().item())
    return found


def family(kind, shape):
    """The tiny model, or one that scales its embeddings and caps its logits."""
    torch.manual_seed(0)
    if kind == "llama":
        return models.load_model("tiny-random")
    return models.skeleton(Gemma2Config(**shape, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=0.5))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_divergence_is_that_of_plain_logits_and_of_full_precision_none(fp32, tmp_path, shape, kind):
    model = family(kind, shape)
    windows = torch.randint(1, 320, (6, 30), generator=torch.Generator().manual_seed(0))
    full = FullPrecision(model, {"own": windows}, {"own": tmp_path / "states.npy"})
    assert (_window_scores(model, windows, 4, "own", full)["kl"] == 0).all()
    plain, changed = copy.deepcopy(model).double(), round_to_nearest(model, "4-16-16")
    with torch.no_grad():  # also what is trained after the states were kept
        changed.get_output_embeddings().weight.mul_(1.1)
    found = _window_scores(changed, windows, 4, "own", full)
    expected = by_hand(plain, copy.deepcopy(changed).double(), windows)
    assert min(expected) > 1e-5
    np.testing.assert_allclose(found["kl"], expected, rtol=1e-3)
    np.testing.assert_array_equal(found["loss"], window_losses(changed, windows))


def test_full_precision_itself_is_0_on_any_hardware(tmp_path, tiny_model):
    windows = torch.randint(1, 320, (5, 64), generator=torch.Generator().manual_seed(1))
    full = FullPrecision(tiny_model, {"own": windows}, {"own": tmp_path / "states.npy"})
    assert (_window_scores(tiny_model, windows, 4, "own", full)["kl"] == 0).all()


def test_the_divergence_of_logits_in_float64():
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(2))
    other = logits + 0.1 * torch.randn(40, 50, generator=torch.Generator().manual_seed(3))
    log_p, log_q = logits.double().log_softmax(1), other.double().log_softmax(1)
    torch.testing.assert_close(
        divergence(logits, other).double(), (log_p.exp() * (log_p - log_q)).sum(1), rtol=1e-4, atol=1e-7
    )
    assert (divergence(logits, logits) == 0).all()
