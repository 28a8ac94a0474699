"""The training loop: its schedule, and what a killed process leaves. What it teaches: test_distill.py."""

import copy
import dataclasses
import shutil

import pytest
import torch
from torch import nn

from studylib.config.budgets import Budget
from studylib.train import loop as training_loop
from studylib.train.loop import fit, last_checkpoint

BUDGET = Budget(steps=8, batch=2, learning_rate=1e-2)
EXAMPLES = [{"tokens": torch.arange(8) + i} for i in range(16)]


def train(model, folder, budget=BUDGET, **settings):
    def loss(tokens):
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return {"loss": hidden.float().square().mean()}

    return fit(model, loss, EXAMPLES, budget, folder, tokens_per_step=16, **settings)


def test_the_rate_rises_and_falls():
    warm = dataclasses.replace(BUDGET, steps=20, warmup=0.2)
    rates = [warm.rate(step) for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and rates[-1] == 0
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([nn.Parameter(torch.ones(1))], 1.0), 16)
    for rate in rates[4:]:
        assert rate == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        reference.optimizer.step()
        reference.step()
    extended = dataclasses.replace(warm, steps=30, extended_from=(20,))
    assert [extended.rate(step) for step in (19, 20, 22)] == pytest.approx([rates[19], 1 / 3, 1.0])


def test_a_checkpoint_that_a_killed_process_left_half_is_not_used(fp32, tiny_model, tmp_path, monkeypatch):
    whole, resumed = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    log = train(whole, tmp_path / "whole")
    monkeypatch.setattr(training_loop, "CHECKPOINT_SECONDS", -1)
    train(copy.deepcopy(tiny_model), tmp_path / "cut")
    (kept,) = (tmp_path / "cut").iterdir()
    for step, state in (("10", b""), ("11", b'{"epoch": 1'), ("12", None)):
        half = shutil.copytree(kept, tmp_path / "cut" / f"checkpoint-{step}") / "trainer_state.json"
        half.unlink() if state is None else half.write_bytes(state)
    told = []
    assert train(resumed, tmp_path / "cut", progress=told.append) == log
    assert told[0] == 7 * 16  # the last step leaves none
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert last_checkpoint(tmp_path / "cut") is not None and last_checkpoint(tmp_path / "nowhere") is None


def test_only_what_requires_gradients_is_trained_and_kept(fp32, tiny_model, tmp_path):
    tiny_model.requires_grad_(False)
    trained = tiny_model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    before = {name: parameter.clone() for name, parameter in tiny_model.named_parameters()}
    train(tiny_model, tmp_path / "c", keep=True)
    moved = [name for name, parameter in tiny_model.named_parameters() if not torch.equal(parameter, before[name])]
    assert moved == ["model.layers.0.mlp.down_proj.weight"]
    (file,) = (tmp_path / "c").glob("*/model.safetensors")
    assert file.stat().st_size < trained.numel() * 4 + 1000


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm: 0.0"),
        ({"weight_decay": -0.1}, "weight_decay: -0.1"),
        ({"warmup": 1.0}, "warmup: 1.0"),
        ({"extended_from": (4, 4)}, r"extended_from: \(4, 4\) is not allowed"),
    ],
)
def test_bad_budgets_name_the_value(bad, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(BUDGET, **bad)
