"""pyproject.toml, constraints.txt, environment.yml, Makefile and README say the same."""

import importlib.metadata
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    requirement.name.lower().replace("_", "-"): requirement
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
    for requirement in [Requirement(line)]
}
EXTRAS = dict(PROJECT["optional-dependencies"])
COMPILED = list(map(Requirement, EXTRAS.pop("llama-cpp")))  # an engine, which `make` does not install
REQUIREMENTS = list(map(Requirement, sum(EXTRAS.values(), start=PROJECT["dependencies"])))


def pinned(name: str) -> Version:
    (specifier,) = PINS[name].specifier
    assert specifier.operator == "=="
    return Version(specifier.version)


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_what_the_project_asks_for_is_pinned_and_installed_as_pinned(requirement):
    version = pinned(requirement.name.lower())
    assert version in requirement.specifier
    assert Version(importlib.metadata.version(requirement.name)).public == version.public


@pytest.mark.parametrize("requirement", COMPILED, ids=str)
def test_an_engine_is_pinned_and_where_it_is_there_as_pinned(requirement):
    version = pinned(requirement.name.lower())
    assert version in requirement.specifier
    if importlib.util.find_spec(requirement.name.replace("-python", "").replace("-", "_")):
        assert Version(importlib.metadata.version(requirement.name)) == version


def test_every_constraint_is_an_exact_version():
    assert all(pinned(name) for name in PINS)
    assert not pinned("torch").local  # a local label would exclude the builds of other platforms


def test_conda_gets_the_same_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *plain, pip = environment["dependencies"]
    (python,) = [entry for entry in plain if entry.startswith("python=")]
    assert Version(python.removeprefix("python=")) in Requirement(f"python{PROJECT['requires-python']}").specifier
    assert pip["pip"] == ["-c constraints.txt", f"-e .[{','.join(EXTRAS)}]"]


def test_the_readme_shows_the_commands_that_the_makefile_has():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    shown = set(re.findall(r"`make (\w+)", (ROOT / "README.md").read_text()))
    assert {"study", "test", "lab", "bench"} <= targets and {"study", "test"} <= shown <= targets


def test_ci_runs_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci/run").read_text()
