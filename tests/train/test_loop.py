"""The training loop: what a killed process leaves, and what is trained. What it teaches: test_distillation.py."""

import copy
import dataclasses
import errno
import functools
import os
import resource
import shutil
import time

import pytest
import torch

from studylib.config.budgets import Budget
from studylib.config.files import SUMS
from studylib.config.settings import Adapter, Format, Scheme
from studylib.data import models
from studylib.methods import attach
from studylib.quant import quantize_model, rotate_model, trained_grids
from studylib.train import loop as training_loop
from studylib.train.loop import compiled_layers, fit, last_checkpoint, take_over

NF4 = Format("nf", 4, 32, False)
BUDGET = Budget(steps=8, batch=2, learning_rate=1e-2)
EXAMPLES = [{"tokens": torch.arange(8) + i} for i in range(16)]


def train(model, folder, budget=BUDGET, pulled=False, **settings):
    """pulled: by gradients beside which Adam's epsilon is nothing."""

    def loss(tokens):
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state.float()
        if pulled:
            return {"loss": 1e3 * (hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum()}
        return {"loss": hidden.square().mean()}

    return fit(model, loss, EXAMPLES, budget, folder, tokens_per_step=16, **settings)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with the checkpoint of step 7 of 8, as a kill in the last step leaves it; the whole training's log."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "compute_dtype", lambda on=None: torch.float32)
        patch.setattr(training_loop, "CHECKPOINT_SECONDS", -1)
        log = train(models.load_model("tiny-random"), folder / "cut")
        train(models.load_model("tiny-random"), folder / "shorter", dataclasses.replace(BUDGET, steps=7))
    return folder, log


@pytest.fixture
def cut(fp32, killed, tmp_path):
    """A copy of that checkpoint, and the log."""
    folder, log = killed
    shutil.copytree(folder / "cut", tmp_path / "cut")
    (kept,) = (tmp_path / "cut").iterdir()
    assert kept.name == "checkpoint-7"
    return kept, log


def resumed(model, folder, **changes):
    """The log of a training in the folder, and the step that it began at."""
    told = []
    log = train(copy.deepcopy(model), folder, dataclasses.replace(BUDGET, **changes), progress=told.append)
    return log, told[0] // 16


def test_a_killed_training_goes_on_from_its_last_whole_checkpoint(cut, tiny_model, capsys):
    kept, log = cut
    newer = shutil.copytree(kept, kept.with_name("checkpoint-8"))
    (newer / SUMS).unlink()
    assert resumed(tiny_model, kept.parent) == (log, 7)
    assert "checkpoint-8 was not finished: it has no digest; it is made again" in capsys.readouterr().err


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "owner.txt", SUMS)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["gone", "half", "flipped", "a folder", "of another step"])
def test_a_checkpoint_that_is_not_as_it_was_written_is_no_checkpoint(cut, killed, capsys, name, damage):
    kept, _ = cut
    assert {path.name for path in kept.iterdir()} == set(FILES)
    file = kept / name
    content = file.read_bytes()
    if damage == "of another step":
        other = (killed[0] / "shorter" / "checkpoint-6" / name).read_bytes()
        if name == "rng_state.pth":  # this training draws no random numbers
            assert other == content
            return
        file.write_bytes(other)
    else:
        file.unlink()
        if damage == "a folder":
            file.mkdir()
        elif damage != "gone":
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            file.write_bytes(content[:middle] if damage == "half" else flipped)
    assert last_checkpoint(kept.parent, BUDGET) is None and not kept.exists()
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"study: {kept}") and told.endswith("it is made again")


@pytest.mark.parametrize("changes", [{"steps": 6}, {"steps": 9}, {"batch": 4}])
def test_a_checkpoint_of_another_budget_is_not_taken(cut, tiny_model, tmp_path, capsys, changes):
    fresh, _ = resumed(tiny_model, tmp_path / "fresh", **changes)
    assert resumed(tiny_model, tmp_path / "cut", **changes) == (fresh, 0)
    told = f"study: {tmp_path / 'cut' / 'checkpoint-7'} is of another training; it is made again\n"
    assert capsys.readouterr().err == told


def test_a_checkpoint_of_another_folder_or_step_is_not_taken(cut, tmp_path):
    kept, _ = cut
    for other in ("elsewhere/checkpoint-7", "cut/checkpoint-8"):
        shutil.copytree(kept, tmp_path / other)
        assert last_checkpoint((tmp_path / other).parent, BUDGET) == (str(kept) if kept.parent.name in other else None)
    assert last_checkpoint(kept.parent, dataclasses.replace(BUDGET, steps=9, extended_from=(8,))) == str(kept)
    assert last_checkpoint(tmp_path / "nowhere", BUDGET) is None


def test_an_extended_training_takes_over_what_was_kept(fp32, tiny_model, tmp_path, monkeypatch):
    train(copy.deepcopy(tiny_model), tmp_path / "kept", keep=True)
    whole, _ = resumed(tiny_model, tmp_path / "whole", steps=10, extended_from=(8,))
    take_over(tmp_path / "kept" / "checkpoint-8", tmp_path / "longer")
    first, second = (tmp_path / name / "checkpoint-8" / "optimizer.pt" for name in ("kept", "longer"))
    assert first.samefile(second)
    assert resumed(tiny_model, tmp_path / "longer", steps=10, extended_from=(8,)) == (whole, 8)

    def unlinkable(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", unlinkable)
    take_over(tmp_path / "kept" / "checkpoint-8", tmp_path / "copied")
    assert resumed(tiny_model, tmp_path / "copied", steps=10, extended_from=(8,)) == (whole, 8)


def test_a_finished_training_takes_no_step_more(fp32, tiny_model, tmp_path):
    """Its examples are not used up; so a process that was killed before it could keep the result finds it."""
    budget = dataclasses.replace(BUDGET, steps=5)
    whole, again = (copy.deepcopy(tiny_model) for _ in range(2))
    log = train(whole, tmp_path / "c", budget, keep=True)
    assert train(again, tmp_path / "c", budget, keep=True) == log and len(log.steps) == 5
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["checkpoint-5"]


def test_an_older_checkpoint_with_a_time_in_the_future_goes(cut, tiny_model, tmp_path):
    kept, log = cut
    ahead = time.time() + 10**6
    for path in (kept, *kept.iterdir()):
        os.utime(path, (ahead, ahead))
    assert train(copy.deepcopy(tiny_model), kept.parent, keep=True) == log
    assert [path.name for path in kept.parent.iterdir()] == ["checkpoint-8"]


@pytest.mark.parametrize("writer", ["safetensors", "torch"])
def test_a_disk_too_full_for_a_checkpoint_costs_the_checkpoint_only(cut, tiny_model, tmp_path, capsys, writer):
    """The limit of a file's size stands for the disk: the error of each writer is the same but for its number."""
    _, log = cut
    sizes = {file.name: file.stat().st_size for file in cut[0].iterdir()}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    most = sizes["model.safetensors"] + (1000 if writer == "torch" else -1000)
    assert sizes["optimizer.pt"] > most
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        assert train(copy.deepcopy(tiny_model), tmp_path / "full", keep=True) == log
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "full").iterdir())
    reason = "File too large" if writer == "safetensors" else "torch could not write it; is the disk full?"
    assert f"study: {tmp_path / 'full' / 'checkpoint-8'} is not kept ({reason})" in capsys.readouterr().err


def with_learned_grids(kind, model):
    """Learned scales alone, with offsets, and of LLM-QAT's learned steps."""
    if kind == "lsq grid":
        return quantize_model(model, "4-8-8", Scheme("lsq", 32))
    format = Format("affine" if kind == "qat-lora" else "int-full", 4, 32)
    return attach(model, kind, format=format, adapter=None if kind == "lsq" else Adapter(4))


KINDS = ("l4q", "qat-lora", "lsq", "lsq grid")


@pytest.mark.parametrize("kind", KINDS)
def test_at_a_rate_of_their_own_scales_move_by_a_share_of_their_root_mean_square(fp32, tiny_model, tmp_path, kind):
    model = with_learned_grids(kind, tiny_model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    grids = [[parameter.detach().clone() for parameter in own] for own in trained_grids(model)]
    budget = Budget(1, 2, 1e-3, max_grad_norm=1e9, grid_rate=0.01, weight_decay=0.5, schedule="constant")
    log = train(model, tmp_path / "c", budget, pulled=True)
    assert len(grids) == 14 and log.moved == pytest.approx(0.01, rel=0.6)
    for first, own in zip(grids, trained_grids(model), strict=True):
        unit = first[0].square().mean().sqrt()
        for was, now in zip(first, own, strict=True):
            step = (now - was).abs() / unit
            moved = (
                step > 1e-6
            )  # Adam's first step is the rate, whatever the gradient; a gradient of zero moves nothing
            assert moved.float().mean() > (0.5 if now is own[0] else -1)
            torch.testing.assert_close(step[moved], torch.full_like(step[moved], 0.01), rtol=2e-3, atol=0)
    rates = [entry["learning_rate"] for entry in log.steps]
    assert rates == [1e-3]  # the log has that of the others
    others = {id(parameter) for own in trained_grids(model) for parameter in own}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in others:
            decayed = 0.5 if parameter.ndim > 1 else 0.0  # Trainer spares norms
            assert (parameter - before[name] * (1 - 1e-3 * decayed)).abs().max() < 1.01e-3, name


def test_without_one_there_is_one_rate_for_all(fp32, tiny_model, tmp_path):
    model = with_learned_grids("l4q", tiny_model)
    first = [own[0].detach().clone() for own in trained_grids(model)]
    log = train(model, tmp_path / "c", Budget(1, 2, 1e-4, max_grad_norm=1e9), pulled=True)
    steps = torch.cat([(own[0] - was).abs().flatten() for own, was in zip(trained_grids(model), first, strict=True)])
    moved = steps[steps > 1e-7]
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-4), rtol=2e-3, atol=0)
    shares = torch.cat(
        [(own[0] / was - 1).abs().flatten() for own, was in zip(trained_grids(model), first, strict=True)]
    )
    assert log.moved == shares.median().item() > 0


def test_without_learned_grids_nothing_is_said_of_them_and_their_rate_changes_nothing(fp32, tiny_model, tmp_path):
    plain, told = (copy.deepcopy(tiny_model) for _ in range(2))
    log = train(plain, tmp_path / "plain", dataclasses.replace(BUDGET, steps=2))
    assert train(told, tmp_path / "told", dataclasses.replace(BUDGET, steps=2, grid_rate=0.1)) == log
    assert log.moved is None
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), told.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_with_a_rate_for_grids_ends_as_an_undisturbed_one(fp32, tmp_path, monkeypatch, kind):
    budget = dataclasses.replace(BUDGET, steps=4, learning_rate=1e-3, grid_rate=0.05)
    whole, cut, again = (with_learned_grids(kind, models.load_model("tiny-random")) for _ in range(3))
    log = train(whole, tmp_path / "whole", budget)
    monkeypatch.setattr(training_loop, "CHECKPOINT_SECONDS", -1)
    train(cut, tmp_path / "cut", budget)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoint-3"]
    told = []
    assert train(again, tmp_path / "cut", budget, progress=told.append) == log and told[0] == 3 * 16
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_only_what_requires_gradients_is_trained_and_kept(fp32, tiny_model, tmp_path):
    tiny_model.requires_grad_(False)
    trained = tiny_model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    before = {name: parameter.clone() for name, parameter in tiny_model.named_parameters()}
    train(tiny_model, tmp_path / "c", keep=True)
    moved = [name for name, parameter in tiny_model.named_parameters() if not torch.equal(parameter, before[name])]
    assert moved == ["model.layers.0.mlp.down_proj.weight"]
    (file,) = (tmp_path / "c").glob("*/model.safetensors")
    assert file.stat().st_size < trained.numel() * 4 + 1000


def test_what_begins_alike_is_measured_before_training_once(fp32, tiny_model, tmp_path):
    """Adapters of any seed begin alike; another base, another text or a trained adapter does not."""

    def measured(folder, text=b"text", format=None, seed=0, last=0.0):
        model = attach(copy.deepcopy(tiny_model), "qlora", format=format or NF4, adapter=Adapter(rank=4), seed=seed)
        if last:
            model.get_submodule("model.layers.1.mlp.down_proj").lora_B["default"].weight.data.fill_(last)
        asked = []

        def held_out_loss():
            hidden = model.base_model(input_ids=torch.arange(16)[None]).last_hidden_state
            asked.append(hidden.float().abs().mean())
            return {"loss": asked[-1].item()}

        curve = train(model, tmp_path / folder, held_out_loss=held_out_loss, held_out_text=text).curve
        assert len(curve) == 5
        return len(asked), [point["loss"] for point in curve]

    asked, first = measured("first")
    again, second = measured("second", seed=1)
    assert (asked, again) == (5, 4) and second[0] == first[0] and second[1:] != first[1:]
    assert measured("base", format=Format("fp-e2m1", 4, 32))[0] == 5
    assert measured("text", text=b"another")[0] == 5
    asked, other = measured("trained", last=0.1)
    assert asked == 5 and other[0] != first[0]


@pytest.mark.parametrize("rotated", [(False, True), (True, False)])
def test_compiled_layers_keep_their_own_hooks(monkeypatch, rotated, tiny_model):
    # What was compiled of one model's layers was taken for the next one's in the same process, less its rotations.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    tokens = torch.arange(16)[None]
    for turned in rotated:
        model = copy.deepcopy(tiny_model)
        model = quantize_model(rotate_model(model) if turned else model, "4-8-16", Scheme(rotated=turned))
        layers = list(model.base_model.layers)
        with torch.no_grad(), models.autocast(model.device):
            own = model(input_ids=tokens).logits
            with compiled_layers(layers):
                assert all(layer._compiled_call_impl for layer in layers)
                torch.testing.assert_close(model(input_ids=tokens).logits, own)
        assert not any(layer._compiled_call_impl for layer in layers)
