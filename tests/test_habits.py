"""Licence, citation, contributing, changelog, vocabulary, workflow and hooks: there, and true of the code as it is."""

import hashlib
import importlib
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from studylib.methods import base

ROOT = Path(__file__).parent.parent
APACHE = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # the text as the foundation publishes it
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES += [
    f"docs/{name}.md"
    for name in ("architecture", "glossary", "licences", "method", "open-questions", "scaling", "surprises", "usage")
]
TEXTS = [
    "*.md",
    "*.toml",
    "*.cff",
    "docs/*.md",
    "studylib/**/*.py*",
    "tests/**/*.py",
    "benchmarks/*.py",
    ".github/**/*.yml",
]
FOLDERS = ("studylib", "tests", "docs", "notebooks", "benchmarks", "results/reference", ".github")  # that are committed
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def quoted(page: str) -> list[str]:
    """What stands in backticks on a page, outside blocks of code."""
    text = re.sub(r"^ *```.*?^ *```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
    return re.findall(r"`([^`]+)`", text)


def test_the_licence_is_apache_2():
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE


def test_every_surprise_is_listed_by_its_first_sentence():
    page = " ".join((ROOT / "docs/surprises.md").read_text().split())
    scripts = sorted((ROOT / "findings").glob("*.sh"))
    said = {path: path.read_text().splitlines()[1].removeprefix("# ") for path in scripts}
    assert page.endswith(" ".join(f"- {said[path]} ([script](../findings/{path.name}))" for path in scripts))


def test_the_citation_names_the_three_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"authors", "cff-version", "message", "title"} <= citation.keys() and citation["cff-version"] == "1.2.0"
    assert citation["license"] == "Apache-2.0" and str(citation["version"]) == PROJECT["version"]
    ids = [identifier["value"] for paper in citation["references"] for identifier in paper["identifiers"]]
    assert ids == ["arXiv:2305.17888", "arXiv:2305.14314", "arXiv:2402.04902"]
    for paper, number in zip(citation["references"], ids, strict=True):
        assert {"authors", "title", "type", "year"} <= paper.keys() and paper["authors"]
        assert paper["url"].endswith(number.removeprefix("arXiv:"))


def test_the_licences_name_every_archive():
    from studylib.data.sources import ARCHIVES

    text = (ROOT / "docs/licences.md").read_text()
    for archive in ARCHIVES.values():
        name, version = archive.requirement.split("==")
        assert f"`{name}` {version}" in text


def test_the_changelog_begins_with_what_is_not_released_and_has_this_version():
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == "Unreleased" and PROJECT["version"] in versions


@pytest.fixture
def registry():
    """The methods that there are; those that are added meanwhile are taken away again."""
    before = dict(base._METHODS)
    yield base.METHODS
    base._METHODS.clear()
    base._METHODS.update(before)


def test_the_method_of_the_contributing_page_runs(registry, tmp_path, monkeypatch):
    (example,) = re.findall(
        r"^```python\n(import studylib\n.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    exec(compile(example, "CONTRIBUTING.md", "exec"), names)
    full, rounded = names["records"]
    assert rounded.finished and rounded.arm.method == "mean-rounding" and rounded.arm.method in registry
    assert rounded.metrics["perplexity/c4"] != full.metrics["perplexity/c4"]
    assert rounded.metrics["bytes/weights"] < full.metrics["bytes/weights"] / 2
    assert rounded.provenance["numerics"]["method mean-rounding"] == 1
    assert (tmp_path / "results/runs/records" / rounded.file_name).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    folders = tuple(f"{folder}/" for folder in FOLDERS)
    named = [text for text in quoted(page) if text.startswith(folders) and " " not in text]
    assert [path for path in named if not (ROOT / path).exists() and "my_question" not in path] == []


@pytest.mark.parametrize("page", PAGES)
def test_names_that_a_page_mentions_exist(page):
    missing = []
    for name in {text for text in quoted(page) if re.fullmatch(r"studylib(\.\w+)+", text)}:
        module, rest = name, []
        while not _is_module(module):
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
        found = importlib.import_module(module)
        for part in rest:
            found = getattr(found, part, None) or getattr(found, "__dataclass_fields__", {}).get(part)
        if found is None:
            missing.append(name)
    assert missing == []


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module without modules inside
        return False


def test_pages_are_wrapped():
    for page in [*PAGES, "docs/deviations.md"]:
        long = [line for line in (ROOT / page).read_text().splitlines() if len(line) > 120 and not line.startswith("|")]
        assert long == []


def test_the_glossary_has_each_word_once():
    words = re.findall(r"^\| ([^|]+?) \| [^|]+ \|$", (ROOT / "docs/glossary.md").read_text(), re.M)
    words = [word for word in words if word not in ("Word", "Not")]
    assert len(words) == len(set(words)) > 50


def test_the_architecture_shows_the_wings_that_there_are():
    text = (ROOT / "docs/architecture.md").read_text()
    shown = re.findall(r"^(\w+)  +\S", text.split("```")[1], re.M)
    there = {path.parent.name for path in (ROOT / "studylib").glob("*/__init__.py")}
    assert len(shown) == 9 and set(shown) == there


def test_the_workflow_runs_make_test_on_every_python():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert any(step.get("run", "").startswith("make test") for step in job["steps"])
    assert PROJECT["requires-python"] == ">=3.11"


def test_hooks_run_what_is_installed_by_the_project():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    local = [hook["entry"].split()[0] for repo in hooks if repo["repo"] == "local" for hook in repo["hooks"]]
    tools = {Path(entry).name for entry in local}
    wanted = {re.match(r"[\w-]+", text)[0] for text in PROJECT["optional-dependencies"]["test"]}
    assert {"ruff", "codespell", "pytest"} == tools and tools - wanted == set()


def test_words_are_spelled_right():
    files = sorted({str(path.relative_to(ROOT)) for pattern in TEXTS for path in ROOT.glob(pattern) if path.is_file()})
    done = subprocess.run([sys.executable, "-m", "codespell_lib", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
