"""The training loop: what a killed process leaves, and what is trained. What it teaches: test_distillation.py."""

import copy
import shutil

import torch

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
