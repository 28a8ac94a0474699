"""Keys that hang on what determines a result alone, readable files, and folders with foreign files in them."""

import dataclasses
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from studylib.config import numerics as numerics_module
from studylib.config.arm import Arm
from studylib.config.budgets import Evaluation, profile
from studylib.config.files import written_whole
from studylib.data import models
from studylib.methods.arms import CHANGES, build_arm
from studylib.study import records, schedule
from studylib.study.records import (
    FORMAT,
    REFERENCE,
    RecordError,
    Store,
    arm_key,
    contents,
    find_records,
    numerics,
    read_record,
    read_records,
)

BUDGET = dataclasses.replace(profile("smoke"), evaluation=Evaluation(("wikipedia",), windows=2, length=32))
PUBLISHED = sorted((REFERENCE / "records").glob("*.json"))
ROUNDED = build_arm(BUDGET, "tiny-random", "rtn", "4-8-4")


def test_every_record_of_the_reference_is_found_by_its_arm():
    found = [read_record(path) for path in PUBLISHED]
    assert len(found) == 348
    assert [arm_key(record.arm) for record in found] == [record.key for record in found]
    assert [record.file_name for record in found] == [path.name for path in PUBLISHED]


def test_what_was_called_hidden_is_found_as_the_raw_error_that_it_was(tmp_path):
    """A record from before "hidden" was relative to the teacher is none of today's "hidden"; rekey.py renames it."""
    (path,) = (REFERENCE / "records").glob("*_loss-kl-raw-hidden_seed0_*.json")
    kept = read_record(path)
    arm = dataclasses.replace(kept.arm, training=dataclasses.replace(kept.arm.training, loss="kl+hidden"))
    assert "hidden states" in numerics(arm) and "hidden states" not in kept.provenance["numerics"]
    made, other = dataclasses.replace(kept, arm=arm, key="0" * 16), read_record(PUBLISHED[0])
    for record in (made, other, dataclasses.replace(made, key=arm_key(arm), provenance={"numerics": numerics(arm)})):
        (tmp_path / record.file_name).write_text(record.to_json())
    (tmp_path / "published.json").write_text(json.dumps({"records": [other.key, made.key]}))
    runpy.run_path(str(REFERENCE.parent / "rekey.py"))["main"]([str(tmp_path)])
    found = {
        record.key: record
        for path in tmp_path.glob("*.json")
        if path.name != "published.json"
        for record in [read_record(path)]
    }
    assert found[kept.key] == kept and found[other.key] == other and len(found) == 3
    assert json.loads((tmp_path / "published.json").read_text()) == {"records": [other.key, kept.key]}


def test_a_key_is_the_same_in_another_process_without_any_heavy_library(tmp_path):
    script = """
import importlib.metadata, json, sys
real = importlib.metadata.version
importlib.metadata.version = lambda name: "2.13.0" if name == "torch" else real(name)
from studylib.study.records import arm_key, read_record
from pathlib import Path
found = [read_record(path) for path in sorted(Path(sys.argv[1]).glob("*.json"))]
print(json.dumps([arm_key(r.arm) == r.key for r in found]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(REFERENCE / "records")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert all(json.loads(done.stdout)) and len(json.loads(done.stdout)) == len(PUBLISHED)


def test_words_and_code_are_no_part_of_a_key_and_versions_are(monkeypatch):
    trained = build_arm(BUDGET, "tiny-random", "llm-qat", "4-8-4", training={"loss": "labels"})
    keys = arm_key(trained), arm_key(ROUNDED)
    monkeypatch.setattr(records.find("llm-qat"), "title", "Another title", raising=False)
    monkeypatch.setitem(CHANGES, "training.loss", dataclasses.replace(CHANGES["training.loss"], words=str.upper))
    assert (arm_key(trained), arm_key(ROUNDED)) == keys
    raised = numerics_module.NUMERICS["distillation"]._replace(number=2, why="a test")
    monkeypatch.setitem(numerics_module.NUMERICS, "distillation", raised)
    assert arm_key(trained) != keys[0] and arm_key(ROUNDED) == keys[1]  # RTN distils nothing
    monkeypatch.setattr(records.find("rtn"), "version", 2)
    assert arm_key(ROUNDED) != keys[1]


def test_what_a_path_names_counts_by_its_content_wherever_it_lies(tmp_path):
    def arm(folder: Path) -> Arm:
        evaluation = Evaluation((str(folder / "own.txt"),), windows=1, length=8)
        own = dataclasses.replace(BUDGET, evaluation=evaluation)
        return build_arm(own, "tiny-random", "llm-qat", "4-8-4", corpus=str(folder / "own.jsonl"))

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.txt").write_text("some words\nand others\n" * 9)
        (tmp_path / name / "own.jsonl").write_text('{"text": "some words"}\n' * 9)
    first, moved = arm(tmp_path / "a"), arm(tmp_path / "b")
    assert first != moved and arm_key(first) == arm_key(moved)
    assert set(contents(first)) == {str(tmp_path / "a" / name) for name in ("own.txt", "own.jsonl")}
    key = arm_key(first)
    for name in ("own.txt", "own.jsonl"):
        path = tmp_path / "a" / name
        before = path.read_text()
        path.write_text(before.replace("some", "sone"))
        assert arm_key(first) != key
        path.write_text(before)
        assert arm_key(first) == key
    (tmp_path / "a" / "own.txt").unlink()
    with pytest.raises(ValueError, match=r"there is no file '.*own\.txt'"):
        arm_key(first)


@pytest.mark.parametrize("changed", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_model_folder_counts_by_all_that_transformers_reads_of_it(tmp_path, changed):
    models.load_model("tiny-random").save_pretrained(tmp_path)
    models.load_tokenizer("tiny-random").save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "README.md").write_text("words")
    arm = dataclasses.replace(ROUNDED, model=str(tmp_path))
    key = arm_key(arm)
    (tmp_path / "README.md").write_text("other words")
    assert arm_key(arm) == key != arm_key(ROUNDED)
    path = tmp_path / changed
    path.write_bytes(path.read_bytes() + b" ")
    assert arm_key(arm) != key


def test_a_folder_that_moved_keeps_its_records_and_a_changed_one_gets_new_ones(tmp_path):
    models.load_model("tiny-random").save_pretrained(tmp_path / "here")
    models.load_tokenizer("tiny-random").save_pretrained(tmp_path / "here")
    here = dataclasses.replace(ROUNDED, model=str(tmp_path / "here"))
    (first,) = schedule.run([here], tmp_path / "results")
    shutil.move(tmp_path / "here", tmp_path / "there")
    there = dataclasses.replace(here, model=str(tmp_path / "there"))
    (moved,) = schedule.run([there], tmp_path / "results")
    assert moved == dataclasses.replace(first, arm=there)
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 77.0
    (tmp_path / "there" / "config.json").write_text(json.dumps(config))
    (changed,) = schedule.run([there], tmp_path / "results")
    assert changed.key != first.key and changed.metrics != first.metrics
    assert len(list((tmp_path / "results" / "records").iterdir())) == 2


def test_file_names_say_what_is_in_them(make_record):
    record = make_record("llm-qat", "4-8-4", seed=2, changes={"training": {"loss": "kl+attention"}})
    assert record.file_name == f"llm-qat_4-8-4_loss-kl-attention_seed2_{record.key[:12]}.json"
    plain = make_record("4-bit kernel", "4-16-16", changes={"format": ROUNDED.format or _affine()})
    assert plain.file_name.startswith("4-bit-kernel_4-16-16_seed0_")


def test_what_another_process_is_writing_is_no_record_yet(make_record, tmp_path):
    store, record = Store(tmp_path), make_record("rtn", "4-8-4")
    with written_whole(tmp_path / "records" / record.file_name) as partial:  # a folder beside, until it is whole
        partial.write_text("{")
        assert store.find(record.key) is None and store.load(record.key) is None
        assert list(read_records(tmp_path / "records")) == []
        found = find_records(tmp_path / "records", [record.key])
        assert found == {record.key: tmp_path / "records" / f"{record.key[:12]}.json"}


def _affine():
    from studylib.config.settings import Format

    return Format("affine", 4, 64)


def test_a_record_comes_back_from_its_file_as_it_was(make_record, tmp_path):
    store = Store(tmp_path)
    for record in (make_record("full-precision"), make_record("llm-qat", "4-8-4", seed=1)):
        path = store.save(record)
        assert read_record(path) == record == store.load(record.key) == Store(tmp_path).load(record.key)
        assert json.loads(path.read_text())["format"] == FORMAT


def signed(fields):
    """With the digest of what is there, as a version that knew other fields would have written it."""
    if isinstance(fields, dict):
        fields.pop("sha256", None)
        fields["sha256"] = records._digest_of(fields)
    return fields


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields | {"format": 2}, "it has an older format, 2, which results/rekey.py turns into 3"),
        (lambda fields: {k: v for k, v in fields.items() if k != "format"}, "an older format, 1, which"),
        (lambda fields: fields | {"format": 9}, "another format, 9, than 3"),
        (lambda fields: fields | {"mood": "good"}, "unknown field 'mood'"),
        (lambda fields: {k: v for k, v in fields.items() if k != "scores"}, "the field 'scores' is missing"),
        (lambda fields: fields | {"arm": fields["arm"] | {"bit": "4-8-4"}}, "arm: unknown field 'bit'"),
        (
            lambda fields: fields | {"arm": fields["arm"] | {"bits": "4-9-4"}},
            "bits of the activations: 9 is not allowed",
        ),
        (lambda fields: [fields], "it is no record"),
        (lambda fields: {"cells": []}, "it is no record"),
    ],
)
def test_foreign_files_are_named_in_one_line_and_stop_nothing(make_record, tmp_path, change, message):
    store = Store(tmp_path)
    good, bad = make_record("full-precision"), make_record("rtn", "8-8-8")
    store.save(good)
    path = store.save(bad)
    path.write_text(json.dumps(signed(change(json.loads(path.read_text())))))
    (tmp_path / "records" / "cut.json").write_text('{"key": "ab')
    (tmp_path / "records" / "latin.json").write_bytes(b"\xe9\xff")
    with pytest.raises(RecordError) as raised:
        read_record(path)
    assert message in str(raised.value) and path.name in str(raised.value) and "\n" not in str(raised.value)
    told = []
    assert list(read_records(tmp_path / "records", told.append)) == [good]
    assert len(told) == 3 and all("\n" not in str(error) for error in told)


def test_a_record_of_a_method_that_is_not_known_here_can_be_read(make_record, tmp_path):
    record = dataclasses.replace(make_record("rtn", "4-8-4"), arm=dataclasses.replace(ROUNDED, method="hqq"))
    assert read_record(Store(tmp_path).save(record)) == record
    with pytest.raises(ValueError, match="method: 'hqq' is not known; use one of full-precision, rtn"):
        schedule.run([record.arm], tmp_path)


def test_a_record_under_the_name_of_another_is_not_taken_for_it(make_record, tmp_path, capsys):
    store = Store(tmp_path)
    one, other = make_record("full-precision"), make_record("rtn", "8-8-8")
    path = store.save(one)
    path.write_text(other.to_json())
    assert store.load(one.key) is None and not path.exists()
    (told,) = capsys.readouterr().err.splitlines()
    assert f"holds the record {other.key} under the name of {one.key}; it is kept as {path.stem}.damaged" in told
    assert path.with_suffix(".damaged").read_text() == other.to_json()


def with_a_digit_changed(text: str) -> str:
    at = text.index('"perplexity/') + 25
    place = next(i for i in range(at, len(text)) if text[i].isdigit())
    return text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        with_a_digit_changed,
        lambda text: text[: len(text) * 2 // 3],
        lambda text: "",
        lambda text: "[" * 100_000,
        lambda text: text.replace('"finished"', '"diverged"', 1),
        lambda text: json.dumps({name: None for name in json.loads(text)}),
        lambda text: "null",
    ],
)
def test_a_record_that_was_changed_is_set_aside_and_computed_again(tmp_path, capsys, damage):
    (first,) = schedule.run([ROUNDED], tmp_path)
    (path,) = (tmp_path / "records").iterdir()
    path.write_text(damage(path.read_text()))
    capsys.readouterr()
    (again,) = schedule.run([ROUNDED], tmp_path)
    assert again.scores == first.scores and again.metrics == first.metrics
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("study:")]
    assert len(told) == 1 and path.name in told[0] and "the arm is computed again" in told[0]
    assert schedule.run([ROUNDED], tmp_path) == [again] and "study:" not in capsys.readouterr().err


def test_spaces_and_order_are_no_change_of_a_record(tmp_path, make_record):
    path = Store(tmp_path).save(make_record("rtn", "4-8-4"))
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(fields.items()))))
    assert read_record(path) == make_record("rtn", "4-8-4")


def test_a_record_of_another_user_is_not_set_aside(tmp_path, make_record, monkeypatch):
    store = Store(tmp_path)
    record = make_record("rtn", "4-8-4")
    path = store.save(record)

    def refused(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refused)  # root may read all
    with pytest.raises(RecordError, match="Permission denied"):
        store.load(record.key)
    assert path.exists()


def test_thousands_of_records_are_looked_up_by_few_listings(tmp_path, monkeypatch):
    """A listing for each of ten thousand arms, there or not, would be a hundred million names."""
    store, listed, original = Store(tmp_path), [], Path.glob
    keys = [f"{number:012x}0000" for number in range(2000)]
    for key in keys[:1000]:
        (tmp_path / "records" / f"rtn_4-8-4_seed0_{key[:12]}.json").touch()
    os.utime(tmp_path / "records", (1, 1))  # long ago
    monkeypatch.setattr(Path, "glob", lambda self, pattern: listed.append(self) or original(self, pattern))
    assert [store.find(key) is not None for key in keys] == [True] * 1000 + [False] * 1000
    assert len(listed) == 1
    (tmp_path / "records" / f"rtn_8-8-8_seed0_{keys[1500][:12]}.json").touch()
    assert store.find(keys[1500]) is not None
