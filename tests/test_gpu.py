"""What benchmarks/gpu.sh is made of, tried on processors: which packages travel, damaged pieces, steps and records."""

import argparse
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

import studylib
from studylib.methods.arms import Setting
from studylib.report import CLAIMS
from studylib.study.records import read_records

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def gpu(script):
    return script("benchmarks/gpu.py")


def test_what_the_image_has_does_not_travel_nor_what_only_that_needs(script):
    pack = script("benchmarks/gpu_pack.py")
    found = pack.needed("studylib", "3.12", set(pack.IMAGE))
    assert {"bitsandbytes", "lm-eval", "sacrebleu", "distributed", "toolz", "nbclient", "pytest", "pluggy"} <= found
    assert not found & {*pack.IMAGE, "sympy", "ruff", "torchao"}  # what torch needs, and what tests of all need
    assert found - pack.needed("studylib", "3.12", {*pack.IMAGE, "lm-eval"}) >= {"lm-eval", "sacrebleu", "sqlitedict"}
    done = subprocess.run([sys.executable, pack.__file__], capture_output=True, text=True, check=True)
    assert [line.partition("==")[0] for line in done.stdout.splitlines()] == sorted(found)


def test_a_damaged_piece_is_named_before_anything_is_done(tmp_path):
    pieces, output = tmp_path / "pieces", tmp_path / "output"
    pieces.mkdir()
    (pieces / "piece-00").write_bytes(b"as it was")
    subprocess.run("sha256sum piece-00 >SHA256SUMS", shell=True, cwd=pieces, check=True)
    (pieces / "piece-00").write_bytes(b"as it is now")
    done = subprocess.run([ROOT / "benchmarks" / "gpu.sh", pieces, output], capture_output=True, text=True)
    assert done.returncode and "piece-00: FAILED" in done.stdout and not list(output.iterdir())


def test_the_timed_arms_are_those_of_the_claims(gpu):
    arms = gpu.timed_arms(studylib.profile("full"), "smollm2-135m", 1)
    assert {Setting.of(arm) for arm in arms} == {*CLAIMS["B8"].needs, *CLAIMS["C4"].needs}
    assert {arm.seed for arm in arms} == {1} and len({arm.tuning.steps for arm in arms}) == 1


def test_a_step_keeps_what_it_finished_and_says_what_failed(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_DEVICE", "cpu")
    options = argparse.Namespace(output=tmp_path / "output", work=tmp_path, cpu=True)
    options.output.mkdir()
    late = gpu.run_step("paging", options, time.time() - 60)
    assert late["end"] == gpu.LATE and late["lines"] == []
    found = gpu.run_step("claims", options, time.time() + 600)
    assert found["end"] == "finished" and len(found["seconds"]) == 3
    (line,) = [line for line in found["lines"] if "optimizer" in line]
    assert "paged" in line and "paging needs CUDA" in line
    here = {"libraries": {"torch": "2"}}
    gpu.write(options.output, tmp_path / "results", {"accelerator": "none", "environment": here, "steps": {"a": found}})
    assert json.loads((options.output / "summary.json").read_text())["steps"]["a"] == found
    assert line in (options.output / "summary.txt").read_text()
    with tarfile.open(options.output / "records.tar.gz") as tar:
        tar.extractall(tmp_path / "there", filter="data")
    methods = [record.arm.method for record in read_records(tmp_path / "there" / "records")]
    assert sorted(methods) == ["l4q", "qlora", "qlora"]
