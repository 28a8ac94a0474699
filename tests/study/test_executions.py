"""Engines side by side: they compute the same model, every pass is timed, and what is missing is said in a line."""

import dataclasses

import pytest
import torch

from studylib.config import engines as known
from studylib.config.budgets import ENGINES, LLAMA_16, PASSES, TORCH_16, Engines, profile
from studylib.config.settings import Format
from studylib.data.models import load_model
from studylib.methods.arms import build_arm
from studylib.quant.formats import decode_model, encode_model
from studylib.study import executions, notebooks, parameters, schedule
from studylib.study.records import Store

AFFINE = Format("affine", 4, 32)
SETTINGS = Engines(context=8, tokens=2, rounds=2, batches=(1, 3))
ARM = build_arm(profile("smoke"), "tiny-random", "llama.cpp", "4-16-16", format=AFFINE)
REFUSAL = r"llama\.cpp is not installed; use pip install '\.\[llama-cpp\]'$"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the files of the smallest model, where llama.cpp is installed."""
    pytest.importorskip("llama_cpp")
    folder = tmp_path_factory.mktemp("files")
    executions.write_files("tiny-random", AFFINE, folder)
    return folder


@torch.no_grad()
def test_all_engines_compute_the_same_model(folder):
    tokens = torch.arange(8)[None]
    engines = executions.load_engines("tiny-random", AFFINE, SETTINGS, folder)
    assert list(engines) == list(ENGINES)
    full = load_model("tiny-random")
    right = {
        True: full(tokens).logits,
        False: decode_model(encode_model(load_model("tiny-random"), AFFINE))(tokens).logits,
    }
    for name, engine in engines.items():
        of_16, other = right[name in (TORCH_16, LLAMA_16)], right[name not in (TORCH_16, LLAMA_16)]
        away = (engine(input_ids=tokens).logits.float() - of_16).abs().max()
        assert away < 3e-2 * of_16.abs().max() < (of_16 - other).abs().max(), name


def test_every_pass_of_every_engine_is_timed(folder):
    found = executions.seconds_in_this_process("tiny-random", AFFINE, SETTINGS, folder)
    assert set(found) == {f"seconds/{stage}/{batch}/{name}" for stage in PASSES for batch in (1, 3) for name in ENGINES}
    assert all(len(times) == 2 and min(times) > 0 for times in found.values())


def test_an_arm_keeps_what_fresh_processes_found(folder, tmp_path):
    (record,) = schedule.run([ARM], tmp_path)
    assert record.scores["process"] == [0.0] * ARM.engines.rounds
    assert len(record.scores) == 1 + len(PASSES) * len(ARM.engines.batches) * len(ENGINES)
    assert set(record.metrics) == {"bytes/weights", "bytes/cache_per_token"} and record.cost["seconds"]["decode"] > 0


def test_where_it_is_missing_it_is_refused_or_left_out_in_a_line(monkeypatch, tmp_path, capsys, make_record):
    monkeypatch.setattr(known, "llama_cpp_installed", lambda: False)
    monkeypatch.setattr(notebooks, "llama_cpp_installed", lambda: False)
    with pytest.raises(ValueError, match=f"^{REFUSAL}"):
        schedule.run([ARM], tmp_path)
    with pytest.raises(ValueError, match=f"^08_low_bit_execution: parameter llama_cpp: {REFUSAL}"):
        parameters.check_parameter("08_low_bit_execution", "llama_cpp", "always")
    assert notebooks.where_installed([ARM], "never", str(tmp_path)) == [] and not capsys.readouterr().out
    assert notebooks.where_installed([ARM], "auto", str(tmp_path)) == []
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "llama.cpp is not installed, so that it is left out; pip install '.[llama-cpp]' adds it."
    record = make_record("llama.cpp", "4-16-16", changes={"format": AFFINE})
    key = schedule.arm_key(ARM)
    Store(tmp_path).save(dataclasses.replace(record, key=key, arm=ARM))
    assert notebooks.where_installed([ARM], "auto", str(tmp_path)) == [ARM] and not capsys.readouterr().out


def test_what_llama_cpp_has_no_block_for_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(known, "llama_cpp_installed", lambda: True)
    groups = dataclasses.replace(ARM, engines=dataclasses.replace(ARM.engines, context=2**15))
    with pytest.raises(ValueError, match="length"):
        schedule.run([groups], tmp_path)
    for wrong, message in ((0, "batch: 0 is not allowed"), (1.5, "batch: 1.5 is not allowed")):
        with pytest.raises(ValueError, match=message):
            Engines(batches=(wrong,))
