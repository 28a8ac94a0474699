"""The committed notebooks: without outputs, parameters on top, free of logic."""

import ast

import nbformat
import pytest

from studylib.study.notebooks import NOTEBOOKS, assign_parameters, default_parameters, find_notebooks, takes_family

ALL = sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.fixture(params=ALL, ids=lambda path: path.stem)
def notebook(request):
    return request.param


def test_there_are_notebooks():
    assert [path.stem for path in ALL] == [
        "00_claims",
        "01_sampling_strategy",
        "02_distillation_loss",
        "03_bit_allocation",
        "04_ptq_vs_qat",
        "05_qlora_vs_l4q",
        "06_number_formats",
        "07_memory",
        "08_low_bit_execution",
        "09_four_bit_activations",
        "10_model_sizes",
    ]


def test_committed_without_outputs_and_short(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert cells[0].cell_type == "markdown" and "arXiv" in cells[0].source
    logic = [cell for cell in code if "parameters" not in cell.metadata.get("tags", [])]
    assert len(code) <= 12 and all(len(cell.source.splitlines()) <= 12 for cell in logic)
    trees = [ast.parse(cell.source) for cell in code]
    assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.While) for t in trees for node in ast.walk(t))


def test_parameters_are_plain_values(notebook):
    defaults = default_parameters(notebook)
    model, rates = ("models", "rate_files") if takes_family(notebook) else ("model", "rates")
    trained = ["seeds", "results", "output", "jobs", rates, "extend", "keep_checkpoints"]
    common = [model, "profile", *(trained if "extend" in defaults else ["results", "output"])]
    assert list(defaults)[: len(common)] == common
    assert assign_parameters([notebook], defaults) == {notebook: defaults}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"modell": "x"}, "'modell' is not one of 03_bit_allocation.ipynb; allowed are model, profile, seeds"),
        ({"model": 3}, "^03_bit_allocation: parameter model: 3 is not allowed; use a known name, a local folder"),
        ({"seeds": 0}, "seeds: 0 is not allowed; use a list of whole numbers from 0 to 4294967295, at least one, for"),
        ({"seeds": [0, "1"]}, "seeds: '1' is not allowed"),
        ({"settings": "4-8-4"}, "settings: '4-8-4' is not allowed; use a list of bit widths, for example"),
    ],
)
def test_wrong_parameters_are_named(parameters, message):
    (notebook,) = find_notebooks(["03"])
    with pytest.raises(ValueError, match=message):
        assign_parameters([notebook], parameters)


def test_each_notebook_gets_the_parameters_that_it_has():
    first, third = find_notebooks(["01", "03"])
    assigned = assign_parameters([first, third], {"model": "m", "strategies": ["greedy"], "settings": ["8-8-8"]})
    assert assigned == {first: {"model": "m", "strategies": ["greedy"]}, third: {"model": "m", "settings": ["8-8-8"]}}
    with pytest.raises(ValueError, match="'losses' is not one of 01_"):
        assign_parameters([first, third], {"losses": ["kl"]})


def test_notebooks_are_found_by_number_or_name(tmp_path):
    assert [path.stem for path in find_notebooks(["04", "03_bit_allocation", "04"])] == [
        "04_ptq_vs_qat",
        "03_bit_allocation",
    ]
    assert find_notebooks([], family=True) == [*ALL[1:], ALL[0]]  # 00 sums the others up
    assert find_notebooks([]) == [*ALL[1:-1], ALL[0]] and takes_family(ALL[-1])  # those of one model
    assert [path.stem for path in find_notebooks(["00", "07"])] == ["07_memory", "00_claims"]
    with pytest.raises(ValueError, match="notebook: '99' is not known; use one of 01_sampling"):
        find_notebooks(["99"])
    with pytest.raises(ValueError, match="there are none"):
        find_notebooks([], tmp_path)
    (tmp_path / "03_x.ipynb").write_text(nbformat.writes(nbformat.v4.new_notebook()))
    with pytest.raises(ValueError, match="no cell tagged 'parameters'"):
        default_parameters(tmp_path / "03_x.ipynb")
