"""What judges and reports reads JSON: no library that computes is imported before it is needed."""

import subprocess
import sys
from pathlib import Path

import studylib

COMPUTING = ("torch", "transformers", "lm_eval", "datasets", "sklearn", "papermill", "llmcompressor", "peft")
DRAWING = ("matplotlib", "pandas", "scipy")
PAGE = ("page", "ledger", "tables", "recipes")  # of the report, whose words need no figure


def imported(modules):
    """Those of COMPUTING and DRAWING that are there after importing the modules in a new process."""
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules!r}]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split()) & {*COMPUTING, *DRAWING}


def modules_of(wing):
    folder = Path(studylib.__file__).parent
    paths = sorted((folder / wing).rglob("[a-z]*.py"))
    return [".".join(("studylib", *path.relative_to(folder).with_suffix("").parts)) for path in paths]


def test_evidence_and_the_pages_words_start_without_anything_heavy():
    modules = modules_of("evidence") + [f"studylib.report.{name}" for name in PAGE]
    assert len(modules) >= 12 and imported(modules) == set()


def test_figures_start_without_what_computes():
    modules = [name for name in modules_of("report") if name != "studylib.report.figures.memory"]  # which plans itself
    assert len(modules) >= 7 and imported(modules) == {"matplotlib"}
