"""Trackers are told of each training, under its arm's title, and no record is another for it."""

import struct
import sys

import pytest

from studylib.config.budgets import profile
from studylib.config.settings import Format
from studylib.config.trackers import REPORT_TO, wanted_trackers
from studylib.methods.arms import build_arm
from studylib.study import schedule
from studylib.study.records import Store

BUDGET = profile("smoke")
ARMS = [
    build_arm(BUDGET, "tiny-random", "llm-qat", "4-8-4"),
    build_arm(BUDGET, "tiny-random", "qlora", "4-16-16", format=Format("nf", 4, 32)),
]


def told(file):
    """The numbers by name, each as {step: number}, that TensorBoard reads."""
    from tensorboardX.proto.event_pb2 import Event

    data, found = file.read_bytes(), {}
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_tensorboard_is_told_the_curve_the_loss_and_the_rate(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    plain = schedule.run(ARMS, tmp_path / "plain")
    monkeypatch.setenv(REPORT_TO, "tensorboard")
    records = schedule.run(ARMS, tmp_path / "results")
    runs = Store(tmp_path / "results").trackers / "tensorboard"
    names = ["LLM-QAT 4-8-4, seed 0, ", "QLoRA 4-16-16 (NF4, groups of 32), seed 0, "]
    for record, before, name in zip(records, plain, names, strict=True):
        (file,) = (runs / f"{name}{record.key[:8]}").iterdir()
        found = told(file)
        for tag, entry in (("loss", "loss"), ("learning_rate", "learning_rate"), ("grad_norm", "grad_norm")):
            assert found[f"train/{tag}"] == pytest.approx({own["step"]: own[entry] for own in record.training})
        assert found["eval/loss"] == pytest.approx({point["step"]: point["loss"] for point in record.curve})
        for field in ("key", "metrics", "scores", "training", "curve"):
            assert getattr(record, field) == getattr(before, field), field


def test_a_tracker_that_is_not_there_is_named_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setenv(REPORT_TO, "tensorbord")
    with pytest.raises(ValueError, match=r"^STUDY_REPORT_TO: 'tensorbord' is not known; use one of tensorboard"):
        schedule.run(ARMS, tmp_path / "results")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    monkeypatch.setenv(REPORT_TO, "wandb")
    with pytest.raises(ValueError, match=r"^STUDY_REPORT_TO: wandb is not installed; use pip install wandb$"):
        schedule.run(ARMS, tmp_path / "results")
    assert schedule.run([build_arm(BUDGET, "tiny-random", "rtn", "4-8-4")], tmp_path / "results")  # trains nothing
    monkeypatch.setenv(REPORT_TO, " ")
    assert wanted_trackers() == ()
