"""How many rows of a batch are computed at a time, held against plans of their own."""

import dataclasses

import pytest

from studylib.config.budgets import Evaluation, profile
from studylib.config.settings import Format
from studylib.data import models
from studylib.evaluate.memory import plan
from studylib.methods.arms import build_arm
from studylib.study import needs, run, schedule

BUDGET = dataclasses.replace(profile("smoke"), evaluation=Evaluation((), windows=1, length=32, pairs=2))
FULL = Format("int-full", 4, 32)
TUNED = build_arm(BUDGET, "tiny-random", "l4q", "4-16-16", format=FULL, tuning={"batch": 16})


def planned(rows):
    config, length = models.load_config("tiny-random"), TUNED.instructions.length
    given = {"format": TUNED.format, "adapter": TUNED.adapter, "dtype": models.compute_dtype()}
    return plan(config, "l4q", batch=rows, length=length, **given).total


@pytest.mark.parametrize("rows", [1, 2, 5, 15])
def test_as_many_rows_as_a_plan_has_room_for(rows):
    between = (planned(rows) + planned(rows + 1)) / 2
    assert needs.rows_at_once(TUNED, between / needs.ROOM) == rows
    assert needs.rows_at_once(TUNED, planned(16) * 1.01 / needs.ROOM) is None
    assert needs.rows_at_once(TUNED, 1.0) == 1  # it is tried all the same


def test_a_distillation_after_merging_counts_its_student_and_its_teacher():
    beside = build_arm(BUDGET, "tiny-random", "qlora", "4-16-16", format=FULL)
    merged = dataclasses.replace(beside, merge="merged-distilled", merging=BUDGET.merging)
    length = merged.instructions.length
    dtype = {"dtype": models.compute_dtype(), "batch": 1, "length": length}
    student = plan(models.load_config("tiny-random"), "qat", format=FULL, **dtype).total
    teacher = plan(models.load_config("tiny-random"), "qlora", format=FULL, adapter=merged.adapter, **dtype)
    found = needs.needs(merged, 0)[needs.MEMORY]
    assert needs.needs(beside, 0)[needs.MEMORY] == teacher.total < student + teacher.base < found < 1.5 * student


def test_what_fits_or_cannot_be_planned_is_computed_at_once():
    assert needs.rows_at_once(TUNED, 1e12) is None
    assert needs.rows_at_once(build_arm(BUDGET, "tiny-random", "llm-qat", "4-8-4"), 1.0) is None
    calibrated = build_arm(BUDGET, "tiny-random", "gptq+lora", "4-16-16", format=FULL, tuning={"batch": 16})
    assert needs.rows_at_once(calibrated, 1.0) is None


def test_a_small_machine_makes_the_record_of_a_large_one(fp32, tmp_path, monkeypatch):
    (whole,) = schedule.run([TUNED], tmp_path / "large")
    monkeypatch.setattr(run, "memory_bytes", lambda: planned(3) / needs.ROOM)
    (some,) = schedule.run([TUNED], tmp_path / "small")
    assert (whole.provenance["rows_at_once"], some.provenance["rows_at_once"]) == (None, 3)
    assert [step["loss"] for step in some.training] == pytest.approx(
        [step["loss"] for step in whole.training], rel=1e-3
    )
