"""What is kept of a trained arm: its deployed model, packed, so that nothing is trained again; and its removal."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from studylib.cli import main
from studylib.config.budgets import Evaluation, profile
from studylib.config.settings import Adapter, Format, Scheme
from studylib.evaluate.scores import score
from studylib.methods.arms import build_arm
from studylib.study import run, schedule
from studylib.study.records import Store, arm_key
from studylib.train import distillation, finetuning

EVALUATION = Evaluation(("wikipedia",), windows=4, length=32, pairs=2)
BUDGET = dataclasses.replace(profile("smoke"), evaluation=EVALUATION)
INT4, FULL, NF4 = Format("affine", 4, 32), Format("int-full", 4, 32), Format("nf", 4, 32, double=True)
TRAINED = {
    "llm-qat": build_arm(BUDGET, "tiny-random", "llm-qat", "4-8-4"),
    "lsq": build_arm(BUDGET, "tiny-random", "llm-qat", "4-8-4", scheme=Scheme("lsq", 32)),
    "rotated keys": build_arm(BUDGET, "tiny-random", "llm-qat", "8-8-4", scheme=Scheme(keys="after-rotary")),
    "lora": build_arm(BUDGET, "tiny-random", "lora"),
    "qlora": build_arm(BUDGET, "tiny-random", "qlora", "4-16-16", format=NF4),
    "dora": build_arm(BUDGET, "tiny-random", "qlora", "4-16-16", format=INT4, adapter=Adapter(kind="dora")),
    "gptq+lora": build_arm(BUDGET, "tiny-random", "gptq+lora", "4-16-16", format=INT4),
    "qa-lora": build_arm(BUDGET, "tiny-random", "qa-lora", "4-16-16", format=INT4),
    "qat-lora": build_arm(BUDGET, "tiny-random", "qat-lora", "4-16-16", format=INT4),
    "l4q": build_arm(BUDGET, "tiny-random", "l4q", "3-16-16", format=Format("affine", 3, 32)),
    "qat": build_arm(BUDGET, "tiny-random", "qat", "4-16-16", format=FULL),
    "learned steps": build_arm(BUDGET, "tiny-random", "lsq", "4-16-16", format=FULL),
    "learned steps and offsets": build_arm(BUDGET, "tiny-random", "lsq", "4-16-16", format=INT4),
    "gptq+qa-lora": build_arm(BUDGET, "tiny-random", "gptq+qa-lora", "4-16-16", format=FULL),
    "merged": build_arm(BUDGET, "tiny-random", "qlora", "4-16-16", format=INT4, merge="requantized"),
    "16 bits": build_arm(BUDGET, "tiny-random", "qlora", "4-16-16", format=NF4, merge="merged-16"),
}


@pytest.fixture
def no_training(monkeypatch):
    """Inside, a training fails."""
    for trains, name in ((finetuning, "fine_tune"), (distillation, "train_llm_qat")):
        monkeypatch.setattr(trains, name, lambda *_, **__: pytest.fail("trained again"))


@pytest.mark.parametrize("name", TRAINED)
def test_the_model_of_a_trained_arm_comes_back_without_training(fp32, tmp_path, name, request):
    arm, store = TRAINED[name], Store(tmp_path)
    (record,) = schedule.run([arm], tmp_path)
    kept = store.model_file(record.key)
    assert kept.exists()
    if name not in ("lora", "16 bits"):  # else almost nothing is in low bits
        assert kept.stat().st_size < 1.35 * record.metrics["bytes/weights"]  # tensors' names weigh on a tiny model
    request.getfixturevalue("no_training")
    model, tokenizer = run.deployed(arm, store)
    again, _ = score(model, tokenizer, dataclasses.replace(EVALUATION, pairs=0))
    # Embeddings and norms that LLM-QAT trains are kept in 16 bits; the rest is what was scored.
    assert again["perplexity/wikipedia"] == pytest.approx(record.metrics["perplexity/wikipedia"], rel=2e-3)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_full_disk_costs_the_kept_model_and_not_the_record(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "keep_model", full)
    (record,) = schedule.run([TRAINED["llm-qat"]], tmp_path)
    assert record.finished and not Store(tmp_path).model_file(record.key).exists()
    assert "the model of LLM-QAT 4-8-4 is not kept (No space left on device)" in capsys.readouterr().err


def test_what_diverged_is_not_kept_and_takes_nothing(tmp_path):
    arm = TRAINED["llm-qat"]
    wild = dataclasses.replace(arm, training=dataclasses.replace(arm.training, learning_rate=1e30))
    (record,) = schedule.run([wild], tmp_path)
    assert record.status == "diverged" and record.metrics["bytes/weights"] is None
    assert not Store(tmp_path).model_file(record.key).exists()


def test_list_says_what_is_kept_and_clean_what_it_frees(tmp_path, capsys):
    store = Store(tmp_path)
    trained, plain = TRAINED["llm-qat"], build_arm(BUDGET, "tiny-random", "rtn", "4-8-4")
    records = schedule.run([trained, plain], tmp_path)
    size = store.model_file(records[0].key).stat().st_size
    assert main(["list", "--results", str(tmp_path)]) == 0
    shown, told = capsys.readouterr()
    lines = {line.split()[0]: line for line in shown.splitlines()}
    assert lines[records[0].key].endswith(f"model kept, {size / 1e6:.1f} MB")
    assert "kept" not in lines[records[1].key] and f"kept models take {size / 1e6:.1f} MB" in told

    with store.lock(arm_key(trained)):  # some process uses it
        assert main(["clean", "--results", str(tmp_path)]) == 0
    assert "models: 0 files, 0.0 MB; 1 in use are left" in capsys.readouterr().out
    assert main(["clean", "--results", str(tmp_path), "--parts", "models"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"models: 1 files, {size / 1e6:.1f} MB" and "all records are left" in shown[-1]
    assert not list((tmp_path / "models").iterdir()) and not list((tmp_path / "data").iterdir())
    assert schedule.run([trained, plain], tmp_path) == records
    model, _ = run.deployed(trained, store)  # made again
    assert store.model_file(records[0].key).exists() and torch.isfinite(model(torch.arange(8)[None]).logits).all()
    assert main(["clean", "--results", str(tmp_path / "none")]) == 2
    assert "none holds no records" in capsys.readouterr().err


def test_clean_removes_what_dead_processes_left_and_nothing_that_is_being_written(tmp_path, capsys):
    """Also what another machine left, which a lock tells from what it still writes."""
    store, key = Store(tmp_path), arm_key(TRAINED["llm-qat"])
    left = tmp_path / "models" / f".partial-{'0' * 8}-1-{key}.safetensors"
    left.mkdir()
    (left / "x").write_bytes(bytes(10**6))
    seal = tmp_path / "models" / f"{key}.safetensors.sha256"
    seal.write_text("a digest without its file")
    with store.lock(key):
        assert main(["clean", "--results", str(tmp_path)]) == 0
    assert "models: 0 files, 0.0 MB; 2 in use are left" in capsys.readouterr().out
    assert main(["clean", "--results", str(tmp_path)]) == 0
    assert "models: 2 files, 1.0 MB" in capsys.readouterr().out and not list((tmp_path / "models").iterdir())


def test_what_a_killed_process_left_is_removed_when_the_folder_is_used_again(tmp_path):
    Store(tmp_path)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = tmp_path / "data" / "0123" / f".partial-{int(gone.stdout)}-teacher_states-1.npy"
    left.parent.mkdir()
    left.write_text("half")
    Store(tmp_path)
    assert not left.exists() and left.parent.exists()
