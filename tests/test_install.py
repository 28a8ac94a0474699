"""What `pip install .` puts into an environment: it works from any folder, without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("studylib", "notebooks", "results", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the contents of the wheel, as an environment has them."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("environment")
    for name in BUILT_FROM:  # a folder of its own: what an earlier build left behind would be in the wheel
        path, copy = ROOT / name, source / name
        shutil.copytree(path, copy, ignore=shutil.ignore_patterns("runs")) if path.is_dir() else shutil.copy(path, copy)
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(wheel, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    zipfile.ZipFile(built).extractall(folder)
    assert built.stat().st_size < 6e6
    return folder


def study(installed, folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "studylib", *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr
    return done


def test_holds_every_module_notebook_and_record(installed):
    held = {path.relative_to(installed / "studylib") for path in (installed / "studylib").rglob("*")}
    assert {path.relative_to(ROOT / "studylib") for path in (ROOT / "studylib").rglob("*.py")} <= held
    shipped = {path.relative_to(installed / "studylib/shipped") for path in (installed / "studylib/shipped").rglob("*")}
    wanted = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("results/reference/records/*.json")]
    assert {path.relative_to(ROOT) for path in wanted} <= shipped


def test_shows_the_reference_and_runs_from_any_folder(installed, tmp_path):
    done = study(installed, tmp_path, "list")
    assert str(installed / "studylib" / "shipped" / "results" / "reference") in done.stderr and "LLM-QAT" in done.stdout
    study(installed, tmp_path, "run", "--profile", "smoke", "--model", "tiny-random", "--notebooks", "07")
    output = tmp_path / "results" / "runs" / "smoke-tiny-random"
    assert (output / "report.html").exists() and (output / "07_memory.html").exists()
    assert list((tmp_path / "results" / "runs" / "records").glob("full-precision*.json"))
