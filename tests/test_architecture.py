"""The house: nine wings, each imports from those before it, through their doors, and loads no more than it needs.

docs/architecture.md tells why.
"""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import studylib

PACKAGE = Path(studylib.__file__).parent
ROOT = PACKAGE.parent
FRONT = (PACKAGE / "__init__.pyi").read_text()
WINGS = ("config", "quant", "data", "train", "methods", "evaluate", "study", "evidence", "report")
TOPS = ("cli", "__main__")  # above all wings
HEAVY = ("torch", "transformers", "lm_eval", "datasets", "sklearn", "peft", "bitsandbytes", "papermill", "scipy.stats")


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def wing_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """(what is imported from, names) of each import of this package in a module, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: {node.lineno}: imports are absolute"
            names = [alias.name for alias in node.names]
            if node.module == "studylib":  # doors as such: "from studylib import quant"
                yield from ((f"studylib.{name}", []) for name in names)
            elif (node.module or "").partition(".")[0] == "studylib":
                yield node.module, names
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "studylib":
                    yield alias.name, []


def test_every_module_stands_in_a_wing():
    assert {wing_of(path) for path in modules()} == {*WINGS, *TOPS}
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(WINGS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_wing_imports_from_those_before_it_and_through_their_doors(path):
    own, order = wing_of(path), (*WINGS, *TOPS)
    for source, _ in imports(path):
        parts = source.split(".")[1:]
        assert parts and parts[0] in order, f"{path}: the front door is for users; {source} is no wing"
        assert order.index(parts[0]) <= order.index(own), f"{own} may not import from {source}"
        if parts[0] != own and own not in TOPS:
            assert len(parts) == 1, f"{path} imports from {source}; what others may use is at the door of {parts[0]}"


def test_doors_show_what_is_there_and_used():
    outside = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("results/*.py")]
    notebooks = "".join(path.read_text() for path in ROOT.glob("notebooks/*.ipynb"))
    for wing in WINGS:
        door = __import__(f"studylib.{wing}", fromlist=["__all__"])
        assert door.__doc__ and door.__all__
        texts = [path.read_text() for path in modules() if wing_of(path) != wing] + [
            path.read_text() for path in outside
        ]
        for name in door.__all__:
            assert getattr(door, name) is not None, f"{wing}.{name}"
            used = any(re.search(rf"\b{name}\b", text) for text in [*texts, notebooks, FRONT])
            assert used, f"{wing}: nobody uses {name}"
    for name in studylib.__all__:
        assert getattr(studylib, name) is not None, name


@pytest.mark.parametrize("door", sorted(PACKAGE.rglob("__init__.pyi")), ids=lambda door: door.parent.name)
def test_what_a_door_offers_is_there(door):
    package = importlib.import_module(".".join(door.parent.relative_to(ROOT).parts))
    assert all(getattr(package, name) is not None for name in package.__all__)


def test_no_module_imports_itself_in_a_circle():
    """Within a wing as well, counting imports inside functions."""
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in modules()}
    imported = {
        name: {
            source
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module
            for source in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
            if source in names
        }
        for name, path in names.items()
    }
    done: set[str] = set()

    def visit(name, above):
        assert name not in above, f"{' -> '.join([*above, name])}"
        if name not in done:
            for further in imported[name]:
                visit(further, [*above, name])
            done.add(name)

    for name in imported:
        visit(name, [])


@pytest.mark.parametrize(
    "code",
    [
        "import studylib; dir(studylib)",
        "import studylib.cli, studylib.study.records, studylib.methods",
        "from studylib.study.records import read_records; list(read_records('results/reference/records'))",
        "import studylib.evidence.verdicts, studylib.report.page",
        "import studylib, tempfile\n"
        "arms = [own.arm for own in studylib.read_records('results/reference/records')]\n"
        "with tempfile.TemporaryDirectory() as results: assert len(studylib.run(arms, results)) == len(arms) > 100",
    ],
)
def test_what_reads_records_loads_no_library_that_computes(code):
    script = f"import sys\n{code}\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=PACKAGE.parent
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr


def test_listing_loads_as_little_as_a_listing_needs():
    """Counted, not timed: what `study list` imports beside Python's own and pydantic's modules."""
    script = (
        "import sys; before = set(sys.modules); from studylib.cli import main; "
        "main(['list', '--results', 'results/reference']); "
        "imported = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names); "
        "print(sorted(imported), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=PACKAGE.parent
    )
    imported = ast.literal_eval(done.stderr.strip().splitlines()[-1])
    allowed = {"studylib", "lazy_loader", "pydantic", "pydantic_core", "typing_extensions", "typing_inspection"}
    allowed |= {"annotated_types", "packaging"}
    assert {name for name in imported if not name.startswith("_")} <= allowed, imported


# What could run code that lies in a file, or a text that comes in: modules and functions; arguments, as they are safe.
UNSAFE = ("pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas.read_pickle", "torch.load")
UNSAFE += (
    "eval",
    "exec",
    "compile",
    "__import__",
    "builtins",
    "runpy",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
)
UNSAFE += ("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "jinja2.Template")
SAFE = {"allow_pickle": False, "shell": False, "trust_remote_code": False, "autoescape": True, "use_safetensors": True}
NOTEBOOKS = {"study/notebooks.py": {"exec", "compile"}}  # the cells of a notebook that someone runs


def unsafe(code):
    """The names of what is unsafe in Python code, as imported, and of arguments that are not safe."""
    nodes = list(ast.walk(ast.parse(code)))
    imported, used, arguments = {}, set(), set()
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            used |= {module + alias.name for alias in node.names}
            imported |= {alias.asname or alias.name: module + alias.name for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.Name | ast.Attribute):
            first, dot, rest = ast.unparse(node).partition(".")
            used.add(imported.get(first, first) + dot + rest)
        elif isinstance(node, ast.Call):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if ast.unparse(node.func).endswith("Environment"):
                given = {"autoescape": "left out"} | given
            arguments |= {name for name in given.keys() & SAFE.keys() if given[name] != str(SAFE[name])}
    return {name for name in used if any(f"{name}.".startswith(f"{bad}.") for bad in UNSAFE)} | arguments


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import torch as t\nt.load('x')",
        "from torch import load",
        "import torch\ntorch.load('x', weights_only=True)",
        "import yaml\nyaml.load('x', yaml.SafeLoader)",
        "eval('1')",
        "import builtins as b\nb.exec('1')",
        "np.load('x', allow_pickle=True)",
        "subprocess.run('x', shell=shell)",
        "f(trust_remote_code=None)",
        "jinja2.Environment(loader=x)",
        "from os import system as s\ns('x')",
    ],
)
def test_code_that_could_run_what_a_file_holds_is_seen(code):
    assert unsafe(code)
    assert not unsafe(f"# {code!r}\nx = {code!r}; model.eval(); layer.compile(); np.load('x'); f(shell=False)")


def test_nothing_runs_what_a_file_holds():
    paths = [*PACKAGE.rglob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("results/*.py")]
    codes = {path.relative_to(ROOT).as_posix().removeprefix("studylib/"): path.read_text() for path in paths}
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = (cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code")
        codes[path.name] = "\n".join("".join(cell["source"]) for cell in cells)
    assert len(codes) > 70
    assert {name: found for name, code in codes.items() if (found := unsafe(code))} == NOTEBOOKS
