"""The committed notebooks: the answer first, with outputs of the reference results, free of logic."""

import ast
import re

import nbformat
import papermill
import pytest

from studylib.evidence import with_further_seeds
from studylib.study.notebooks import (
    NOTEBOOKS,
    assign_parameters,
    default_parameters,
    find_notebooks,
    read_published,
    takes_family,
    wanted_arms,
)
from studylib.study.records import REFERENCE, arm_key, read_records, records_digest

ALL = sorted(NOTEBOOKS.glob("*.ipynb"))


OF_ONE = [path for path in ALL if not takes_family(path)]  # of one model, as the reference results are


@pytest.fixture(params=ALL, ids=lambda path: path.stem)
def notebook(request):
    return request.param


@pytest.fixture(params=OF_ONE, ids=lambda path: path.stem)
def of_one(request):
    return request.param


@pytest.fixture(scope="module")
def known():
    return list(read_records(REFERENCE / "records"))


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
        "11_adapter_choices",
        "12_quantization_grids",
    ]


def test_committed_with_outputs(of_one):
    cells = nbformat.read(of_one, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    texts = [text for o in outputs for text in (o.get("text", ""), *o.get("data", {}).values())]
    told = "\n".join(text for text in texts if not text.startswith("iVBORw0KGgo"))
    assert "Reproduced" in told and not re.search(r"(?<![\w.])/(work|home|root|tmp|usr|Users)/|Warning|Traceback", told)
    assert cells[1].metadata.tags == ["answer"]


def test_short_and_without_logic(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert cells[0].cell_type == "markdown" and "arXiv" in cells[0].source
    logic = [cell for cell in code if "parameters" not in cell.metadata.get("tags", [])]
    assert len(code) <= 12 and all(len(cell.source.splitlines()) <= 12 for cell in logic)
    trees = [ast.parse(cell.source) for cell in code]
    assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.While) for t in trees for node in ast.walk(t))


def test_what_the_reference_has_nothing_of_is_committed_without_outputs():
    (sizes,) = set(ALL) - set(OF_ONE)
    assert not [cell for cell in nbformat.read(sizes, as_version=4).cells if cell.get("outputs")]


def test_outputs_are_of_the_records_that_the_reference_has_today(known, of_one):
    """Those of the arms that the notebook asks for and of their further seeds, with the content that they have."""
    (published,) = REFERENCE.glob(f"*/{of_one.stem}/published.json")
    keys = read_published(published.parents[1], of_one.stem)["records"]
    assert nbformat.read(of_one, as_version=4).metadata.studylib.records == records_digest(keys)
    arms = {arm_key(arm) for arm in wanted_arms(of_one, {})}
    shown = with_further_seeds([record for record in known if record.key in arms], known)
    expected = {"00_claims": known, "07_memory": [r for r in known if r.arm.method == "full-precision"]}
    assert set(keys) == {record.key for record in expected.get(of_one.stem, shown)}


def test_all_together_are_small():
    assert sum(path.stat().st_size for path in ALL) < 3e6


def test_parameters_are_typed_for_papermill(notebook):
    found = papermill.inspect_notebook(str(notebook))
    kinds = {entry["inferred_type_name"] for entry in found.values()}
    assert kinds <= {"str", "int", "bool", "dict", "list[str]", "list[int]", "list[float]"} and found["profile"]["help"]


def test_parameters_are_plain_values(notebook):
    defaults = default_parameters(notebook)
    model, rates = ("models", "rate_files") if takes_family(notebook) else ("model", "rates")
    trained = ["seeds", "results", "output", "compute", "jobs", "scheduler", rates, "extend", "keep_checkpoints"]
    computing = [] if notebook.stem == "00_claims" else ["compute"]
    common = [model, "profile", "own", *(trained if "extend" in defaults else ["results", "output", *computing])]
    assert list(defaults)[: len(common)] == common
    assert assign_parameters([notebook], defaults) == {notebook: defaults}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"modell": "x"}, "'modell' is not one of 03_bit_allocation.ipynb; allowed are model, profile, own, seeds"),
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
    assert find_notebooks([]) == [*(path for path in ALL[1:] if not takes_family(path)), ALL[0]]  # those of one model
    assert [path.stem for path in find_notebooks(["00", "07"])] == ["07_memory", "00_claims"]
    with pytest.raises(ValueError, match="notebook: '99' is not known; use one of 01_sampling"):
        find_notebooks(["99"])
    with pytest.raises(ValueError, match="there are none"):
        find_notebooks([], tmp_path)
    (tmp_path / "03_x.ipynb").write_text(nbformat.writes(nbformat.v4.new_notebook()))
    with pytest.raises(ValueError, match="no cell tagged 'parameters'"):
        default_parameters(tmp_path / "03_x.ipynb")
