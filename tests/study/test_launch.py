"""Arms that are trained in several processes: as in one, within rounding."""

import dataclasses
import sys
from pathlib import Path

import psutil
import pytest

from studylib.config import Format, profile
from studylib.data import device
from studylib.methods import build_arm
from studylib.study import launch, schedule
from studylib.study.check import check
from studylib.study.records import Store

SMOKE = profile("smoke")
TORCHRUN = f"{sys.executable} -m torch.distributed.run --nproc-per-node"
SHARDED = "env ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP"
L4Q = build_arm(SMOKE, "tiny-random", "l4q", "4-16-16", format=Format("int-full", 4, SMOKE.group))
# At four bits a rounding that falls the other way moves the loss more than what is looked for.
LLM_QAT = build_arm(SMOKE, "tiny-random", "llm-qat", "8-8-8")


@pytest.mark.parametrize(
    "launcher,arm",
    [(f"{TORCHRUN} 2", L4Q), (f"{SHARDED} {TORCHRUN} 2 {Path(__file__).with_name('sharded.py')}", LLM_QAT)],
    ids=["data-parallel", "sharded"],
)
def test_two_processes_train_as_one(launcher, arm, tmp_path, monkeypatch):
    (alone,) = schedule.run([arm], tmp_path / "alone", compute="all")
    monkeypatch.setenv(launch.LAUNCH, launcher)
    monkeypatch.setattr(launch, "check", lambda arm: None)  # FSDP is refused on processors
    (together,) = schedule.run([arm], tmp_path / "together", compute="all")
    assert (alone.provenance["processes"], together.provenance["processes"]) == (None, 2)
    for curve in ("training", "curve"):
        ours, theirs = getattr(together, curve), getattr(alone, curve)
        assert [point["step"] for point in ours] == [point["step"] for point in theirs]
    # On halves of a batch sums are rounded otherwise, most where products run in bf16.
    assert [point["loss"] for point in together.curve] == pytest.approx(
        [point["loss"] for point in alone.curve], rel=5e-4
    )
    for measure in alone.metrics.keys() & {"perplexity/wikipedia", "moved/scales"}:
        assert together.metrics[measure] == pytest.approx(alone.metrics[measure], rel=0.01)


def test_what_a_process_fails_with_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv(launch.LAUNCH, f"{TORCHRUN} 2")
    gone = dataclasses.replace(L4Q, model=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=f"^{launch.LAUNCH}: .*gone"):
        launch.train(gone, Store(tmp_path), lambda phase, tokens: None)


def test_who_stops_listening_stops_them(tmp_path, monkeypatch):
    monkeypatch.setenv(launch.LAUNCH, f"{TORCHRUN} 2")

    def stop(phase, tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch.train(L4Q, Store(tmp_path), stop)
    assert not [own for own in psutil.Process().children(recursive=True) if launch.MODULE in own.cmdline()]


@pytest.mark.parametrize(
    "launcher,told",
    [
        (sys.executable, "it starts one process, which is what there is without it; ask it for more"),
        ("no-such-launcher", "'no-such-launcher' cannot be started (No such file or directory)"),
        (f"{sys.executable} -c 'raise SystemExit(\"what is wrong\")'", "ended with status 1 (what is wrong)"),
        (f"{TORCHRUN} 3", "its 3 processes cannot share the batch of 2 of L4Q"),
        (f"{SHARDED} {TORCHRUN} 2", "accelerate shards nothing on a processor"),
        (f"env ACCELERATE_USE_FSDP=true FSDP_VERSION=1 {TORCHRUN} 2", "add --fsdp_version 2"),
    ],
)
def test_a_launcher_that_cannot_be_used_is_refused_before_work(launcher, told, monkeypatch):
    if device().type == "cuda" and "shards" in told:
        pytest.skip("FSDP works here")
    monkeypatch.setenv(launch.LAUNCH, launcher)
    with pytest.raises(ValueError) as refused:
        check(L4Q)
    assert str(refused.value).startswith(f"{launch.LAUNCH}: ")
    assert told in str(refused.value)


def test_a_study_that_is_launched_itself_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^STUDY_LAUNCH: put the launcher there and start study alone"):
        check(L4Q)


def test_a_launcher_has_the_machine_for_one_arm(tmp_path, monkeypatch):
    monkeypatch.setenv(launch.LAUNCH, f"{TORCHRUN} 2")
    with pytest.raises(ValueError, match=r"^jobs: 2 do not go with STUDY_LAUNCH"):
        schedule.compute_arms([L4Q], tmp_path, jobs=2)
