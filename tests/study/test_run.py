"""Real arms of a tiny model, and what goes wrong in long runs: kills, corrupt files, full disks, two processes."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import numpy as np
import pytest
import torch

from studylib.config.budgets import Evaluation, profile
from studylib.config.settings import Adapter, Format, Scheme
from studylib.data import models
from studylib.data.corpora import windows
from studylib.evaluate.scores import window_losses
from studylib.methods import ptq
from studylib.methods.arms import build_arm
from studylib.quant.layers import round_to_nearest
from studylib.study import check, run, schedule
from studylib.study.records import RecordError, Store, arm_key, read_record
from studylib.train import distillation

EVALUATION = Evaluation(("wikipedia",), windows=4, length=32)
BUDGET = dataclasses.replace(profile("smoke"), evaluation=EVALUATION)
FP, ROUNDED, TRAINED = (
    build_arm(BUDGET, "tiny-random", method, bits)
    for method, bits in (("full-precision", "16-16-16"), ("rtn", "4-8-4"), ("llm-qat", "4-8-4"))
)


def without_cost(record):
    return dataclasses.replace(record, cost={}, provenance={})


def test_arms_become_records_that_are_loaded_the_second_time(tmp_path, monkeypatch, tiny_tokenizer):
    made = schedule.run([FP, ROUNDED, TRAINED, ROUNDED], tmp_path)
    assert [record.arm for record in made] == [FP, ROUNDED, TRAINED, ROUNDED] and made[1] == made[3]
    assert len(list((tmp_path / "records").glob("*.json"))) == 3
    losses = window_losses(
        round_to_nearest(models.load_model("tiny-random"), "4-8-4"),
        windows("wikipedia", tiny_tokenizer, 32, 4, "evaluation"),
    )
    assert made[1].scores["loss/wikipedia"] == losses.tolist()
    assert made[1].metrics["perplexity/wikipedia"] == pytest.approx(np.exp(losses.mean()))
    assert len(made[2].training) == 4 and made[2].cost["tokens"]["data"] == 8 * 32
    assert made[2].cost["peak_bytes"] > 2**20 and {"data", "train", "evaluate"} <= set(made[2].cost["seconds"])
    assert made[0].provenance["model"]["sha256"] and made[0].provenance["libraries"]["torch"] == version("torch")
    assert not list((tmp_path / "checkpoints").iterdir())

    monkeypatch.setattr(run, "carry_out", lambda *args: pytest.fail("computed again"))
    assert schedule.run([TRAINED, FP], tmp_path) == [made[2], made[0]]


def test_what_should_stay_what_it_was_is_held_against_full_precision(tmp_path, monkeypatch, capsys):
    """Whose predictions are computed once for all arms of a model, and again where the file is damaged."""
    tuned = build_arm(BUDGET, "tiny-random", "lora")
    full, trained, adapted = schedule.run([FP, TRAINED, tuned], tmp_path)
    assert full.scores["kl/wikipedia"] == [0.0] * 4 and min(trained.scores["kl/wikipedia"]) > 0
    assert "kl/wikipedia" not in adapted.scores and "full precision" not in adapted.cost["seconds"]
    assert full.scores["document/wikipedia"] == adapted.scores["document/wikipedia"]
    (kept,) = (tmp_path / "data").glob("*/full_precision_states.npy")
    monkeypatch.setattr(distillation, "written_whole", lambda *args, **kwargs: pytest.fail("computed again"))
    (rounded,) = schedule.run([ROUNDED], tmp_path)
    assert min(rounded.scores["kl/wikipedia"]) > 0
    monkeypatch.undo()
    (tmp_path / "records" / rounded.file_name).unlink()
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    assert without_cost(*schedule.run([ROUNDED], tmp_path)) == without_cost(rounded)
    assert f"{kept} is not as it was written; it is made again" in capsys.readouterr().err


def test_without_room_for_what_full_precision_predicts_the_record_has_the_rest(tmp_path, monkeypatch, capsys):
    def full_disk(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    (whole,) = schedule.run([ROUNDED], tmp_path / "whole")
    monkeypatch.setattr(distillation, "written_whole", full_disk)
    (record,) = schedule.run([ROUNDED], tmp_path / "small")
    assert "what full precision predicts is not kept (No space left on device)" in capsys.readouterr().err
    assert record.scores == {name: own for name, own in whole.scores.items() if name != "kl/wikipedia"}


ALL_KINDS = {
    "chat text": build_arm(BUDGET, "tiny-random", "llm-qat", "4-8-4", sampling={"strategy": "chat"}),
    "real text": build_arm(BUDGET, "tiny-random", "llm-qat", "4-8-4", corpus="c4"),
    "labels": build_arm(BUDGET, "tiny-random", "llm-qat", "4-8-4", training={"loss": "labels"}),
    "features": build_arm(BUDGET, "tiny-random", "llm-qat", "4-8-4", training={"loss": "kl+attention+hidden"}),
    "bf16 masters": build_arm(BUDGET, "tiny-random", "llm-qat", "4-8-4", training={"masters": "bf16"}),
    "learned grid": build_arm(BUDGET, "tiny-random", "llm-qat", "4-8-4", scheme=Scheme(grid="lsq")),
    "rotated keys": build_arm(
        BUDGET, "tiny-random", "rtn", "4-8-4", scheme=Scheme(keys="after-rotary", cache_scale="head")
    ),
    "smoothed": build_arm(BUDGET, "tiny-random", "smoothquant", "4-8-4"),
    "smoothed and trained": build_arm(BUDGET, "tiny-random", "smoothquant+llm-qat", "4-8-4"),
    "gptq": build_arm(BUDGET, "tiny-random", "gptq", "4-8-4"),
    "gptq and trained": build_arm(
        BUDGET, "tiny-random", "gptq+llm-qat", "4-4-4", scheme=Scheme(activations="asymmetric")
    ),
}


def test_every_kind_of_arm_runs_and_comes_back_from_its_file(fp32, tmp_path):
    made = dict(zip(ALL_KINDS, schedule.run(list(ALL_KINDS.values()), tmp_path), strict=True))
    assert len({record.key for record in made.values()}) == len(made)
    for name, record in made.items():
        assert record.status == "finished" and np.isfinite(record.metrics["perplexity/wikipedia"]), name
        assert bool(record.curve) == bool(record.arm.training) and bool(record.data) == bool(record.arm.data)
        assert read_record(Store(tmp_path).find(record.key)) == record
    # Arms that share their data share the folder it is in: hybrid, chat and C4 text.
    assert len(list((tmp_path / "data").iterdir())) == 3 + 1  # texts, and what full precision predicts
    tokens = windows("c4", models.load_tokenizer("tiny-random"), 32, None, "training")
    sample = models.load_tokenizer("tiny-random").decode
    assert all(text in {sample(window) for window in tokens} for text in made["real text"].data["samples"])
    assert "ptq" in made["gptq"].provenance["numerics"] and "ptq" not in made["labels"].provenance["numerics"]


def test_gptq_rounds_once_for_all_arms_that_share_its_codes(fp32, tmp_path, monkeypatch):
    """Bits of activations and cache, adapters and training come afterwards; basis, text, width and format before."""
    shared = Format("int-full", 4, 16)
    tuned = {"format": shared, "adapter": Adapter(4)}
    groups = [
        [ALL_KINDS["gptq"], ALL_KINDS["gptq and trained"], build_arm(BUDGET, "tiny-random", "gptq", "4-4-4")],
        [
            build_arm(BUDGET, "tiny-random", "gptq", "4-16-16", format=shared),
            build_arm(BUDGET, "tiny-random", "gptq+lora", "4-16-16", **tuned),
            build_arm(BUDGET, "tiny-random", "gptq+qa-lora", "4-16-16", **tuned),
        ],
        [build_arm(BUDGET, "tiny-random", "gptq", "4-8-4", scheme=Scheme(rotated=True))],
        [build_arm(BUDGET, "tiny-random", "gptq", "3-8-4")],
        [build_arm(BUDGET, "tiny-random", "gptq", "4-8-4", sampling={"strategy": "chat"})],
    ]
    arms, found = [arm for own in groups for arm in own], []
    alone = [schedule.run([arm], tmp_path / str(turn))[0] for turn, arm in enumerate(arms)]
    original = ptq.gptq_codes
    monkeypatch.setattr(ptq, "gptq_codes", lambda *args: found.append(args) or original(*args))
    together = schedule.run(arms, tmp_path / "together")
    assert len(found) == len(groups)
    assert [record.scores for record in together] == [record.scores for record in alone]
    assert [record.training for record in together] == [record.training for record in alone]


def test_an_arm_is_extended_from_its_kept_checkpoint(fp32, tmp_path, monkeypatch):
    longer = dataclasses.replace(
        TRAINED, training=dataclasses.replace(TRAINED.training, steps=6, extended_from=(TRAINED.training.steps,))
    )
    (alone,) = schedule.run([longer], tmp_path / "alone")
    schedule.run([TRAINED], tmp_path / "kept", keep_checkpoints=True)
    begun = []
    original = distillation.train_llm_qat

    def watched(*args, progress, **kwargs):
        return original(*args, progress=lambda n: (begun.append(n), progress(n)), **kwargs)

    monkeypatch.setattr("studylib.train.train_llm_qat", watched)
    (extended,) = schedule.run([longer], tmp_path / "kept")
    assert begun[0] == 4 * 2 * 32
    assert without_cost(extended) == without_cost(alone)
    assert [path.name for path in (tmp_path / "kept" / "checkpoints").iterdir()] == [arm_key(TRAINED)]


def test_the_same_arm_gives_the_same_record(tmp_path):
    first, second = (schedule.run([TRAINED], tmp_path / name)[0] for name in "ab")
    assert without_cost(first) == without_cost(second)


SCRIPT = """
import json, sys
from studylib.config.arm import Arm
from studylib.study import schedule
from studylib.train import loop
loop.CHECKPOINT_SECONDS = 0
schedule.run([Arm.from_dict(json.loads(t)) for t in json.loads(sys.argv[1])], sys.argv[2])
"""


def start(arms, folder):
    arguments = [sys.executable, "-c", SCRIPT, json.dumps([arm.canonical() for arm in arms]), str(folder)]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_keeps_its_records_and_continues_its_training(tmp_path):
    long = dataclasses.replace(TRAINED, training=dataclasses.replace(TRAINED.training, steps=40))
    whole = schedule.run([long], tmp_path / "whole")[0]

    schedule.run([FP], tmp_path / "killed")
    process = start([FP, long], tmp_path / "killed")
    checkpoints = tmp_path / "killed" / "checkpoints"
    while not list(checkpoints.glob("*/checkpoint-1[1-9]")):  # one is written at every step; the last may not be whole
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (only,) = (tmp_path / "killed" / "records").glob("*.json")
    assert only == Store(tmp_path / "killed").find(arm_key(FP))
    stamp = only.stat().st_mtime_ns

    resumed_from = []
    original = distillation.train_llm_qat

    def watched(*args, progress, **kwargs):
        return original(*args, progress=lambda n: (resumed_from.append(n), progress(n)), **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("studylib.train.train_llm_qat", watched)
        resumed = schedule.run([FP, long], tmp_path / "killed")[1]
    assert resumed_from[0] >= 10 * 2 * 32
    assert without_cost(resumed) == without_cost(whole)
    assert only.stat().st_mtime_ns == stamp


def test_two_processes_share_a_folder_and_compute_each_arm_once(tmp_path):
    first, second = start([FP, TRAINED], tmp_path), start([TRAINED, FP], tmp_path)
    assert (first.wait(120), second.wait(120)) == (0, 0), first.stderr.read() + second.stderr.read()
    found = {path for path in (tmp_path / "records").iterdir()}
    assert found == {Store(tmp_path).find(arm_key(arm)) for arm in (FP, TRAINED)} and len(found) == 2


def test_the_longest_arm_comes_first_unless_its_data_are_being_made_elsewhere(tmp_path, monkeypatch):
    begun, store, original = [], Store(tmp_path), run.carry_out
    monkeypatch.setattr(run, "carry_out", lambda arm, *rest: begun.append(arm) or original(arm, *rest))
    schedule.run([FP, ROUNDED, TRAINED], tmp_path)
    assert begun == [TRAINED, FP, ROUNDED]
    (folder,) = {path.parent for path in (tmp_path / "data").glob("*/teacher_states*.npy")}
    for name, first in ((f"data-{folder.name}", FP), ("data-other", TRAINED)):
        with store.lock(name), schedule._locked([TRAINED, FP], store) as arm:
            assert arm == first


def test_jobs_share_the_arms_and_leave_the_same_records(tmp_path):
    arms, threads = [FP, ROUNDED, TRAINED], torch.get_num_threads()
    alone, shared = schedule.run(arms, tmp_path / "alone"), schedule.run(arms, tmp_path / "shared", jobs=2)
    assert list(map(without_cost, shared)) == list(map(without_cost, alone))
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="jobs: 0 is not allowed"):
        schedule.run([FP], tmp_path, jobs=0)


def test_a_full_disk_leaves_no_half_record(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            schedule.run([FP], tmp_path)
    assert not list((tmp_path / "records").iterdir())
    assert schedule.run([FP], tmp_path)[0].status == "finished"


def test_divergence_is_recorded_as_such(tmp_path):
    wild = dataclasses.replace(TRAINED, training=dataclasses.replace(TRAINED.training, learning_rate=1e30))
    record = schedule.run([wild], tmp_path)[0]
    assert record.status == "diverged"
    assert record.metrics.get("perplexity/wikipedia") is None
    assert schedule.run([wild], tmp_path)[0] == record


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="not writable"):
        schedule.run([FP], tmp_path / "file")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "no-such-model"}, "'no-such-model' is not known"),
        ({"evaluation": dataclasses.replace(EVALUATION, length=513)}, "513 tokens is longer than the model's context"),
        ({"evaluation": dataclasses.replace(EVALUATION, windows=10**6)}, "windows: 1000000"),
        ({"evaluation": dataclasses.replace(EVALUATION, pairs=10**6)}, "pairs: 1000000 are more than"),
        ({"scheme": Scheme(group=48)}, "48 does not divide the row length 64"),
    ],
)
def test_an_arm_that_cannot_run_is_refused_before_any_other_is_computed(tmp_path, monkeypatch, changes, named):
    monkeypatch.setattr(run, "carry_out", lambda *args: pytest.fail("computed"))
    with pytest.raises(ValueError, match=named):
        schedule.run([FP, dataclasses.replace(ROUNDED, **changes)], tmp_path)


def test_weights_that_are_written_by_a_check_have_numbers(monkeypatch):
    """A check is the first to ask for the model's folder where nothing is cached, and may have to make it."""
    devices = []
    check._skeleton.cache_clear()  # as in a new process
    load = models.load_config
    monkeypatch.setattr(models, "load_config", lambda name: devices.append(torch.get_default_device()) or load(name))
    check.check(FP)
    assert devices == [torch.device("cpu")]


def test_a_corpus_without_a_single_training_window_is_refused_before_any_work(tmp_path):
    (tmp_path / "short.txt").write_text("a\nfew words\n")
    arm = build_arm(BUDGET, "tiny-random", "llm-qat", "4-8-4", corpus=str(tmp_path / "short.txt"))
    with pytest.raises(ValueError, match="windows: 1 of 32 tokens are more than the 0"):
        run.check(arm)


def test_a_live_teacher_gives_the_same_record_as_kept_states(fp32, tmp_path, monkeypatch):
    kept = schedule.run([TRAINED], tmp_path / "kept")[0]
    monkeypatch.setattr(distillation, "KEPT_STATES_BYTES", 0)
    live = schedule.run([TRAINED], tmp_path / "live")[0]
    assert not list((tmp_path / "live").rglob("teacher_states*.npy"))
    assert live.metrics["perplexity/wikipedia"] == pytest.approx(kept.metrics["perplexity/wikipedia"], rel=1e-3)
