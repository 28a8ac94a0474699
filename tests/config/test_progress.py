"""Bars: text on a terminal, a widget in a notebook that a person runs, text again in one that the command executes."""

import nbformat
import papermill
import pytest

from studylib.config import AS_TEXT
from studylib.study import notebooks as batch

WIDGET = "application/vnd.jupyter.widget-view+json"
CODE = """
from studylib.config import progress_bar
with progress_bar(total=2, desc="two steps") as bar:
    bar.update(2)
"""


@pytest.fixture
def notebook(tmp_path):
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(made, tmp_path / "in.ipynb")
    return tmp_path / "in.ipynb"


def outputs(path):
    return nbformat.read(path, as_version=4).cells[-1].outputs


@pytest.mark.parametrize(("given", "shown"), [({}, True), (AS_TEXT, False)])
def test_a_person_sees_a_widget_unless_text_is_asked_for(notebook, monkeypatch, given, shown):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    out = notebook.with_name("out.ipynb")
    papermill.execute_notebook(str(notebook), str(out), progress_bar=False)
    assert any(WIDGET in output.get("data", {}) for output in outputs(out)) == shown
    written = "".join(output.text for output in outputs(out) if output.output_type == "stream")
    assert ("two steps" in written) != shown and "Warning" not in written


def test_the_command_hands_text_on_to_the_terminal(notebook, capfd):
    out = batch.execute(notebook, notebook.parent / "out", {})
    assert "two steps: 100%" in capfd.readouterr().err
    assert not any("data" in output for output in outputs(out))
