"""Real kernels: where their files lie, and what is told of those that do not live to the end."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from studylib.study import kernels
from studylib.study.notebooks import NotebookError, execute


@pytest.fixture
def write(tmp_path):
    """A notebook with the parameter x and these cells, in a folder that nothing can be written to."""

    def write(*cells):
        folder = tmp_path / "shared {x} {"
        folder.mkdir()
        parameters = new_code_cell("x = 0", metadata={"tags": ["parameters"]})
        kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = new_notebook(cells=[parameters, *map(new_code_cell, cells)], metadata={"kernelspec": kernelspec})
        path = folder / "01_x.ipynb"
        nbformat.write(notebook, path)
        folder.chmod(0o500)
        return path

    return write


def states(copy):
    found = [
        cell.metadata.papermill for cell in nbformat.read(copy, as_version=4).cells if "papermill" in cell.metadata
    ]
    return [state["status"] for state in found]


def test_a_kernel_is_this_interpreter_listens_on_no_port_and_keeps_its_files_to_itself(
    write, tmp_path, monkeypatch, capfd
):
    """Whatever kernelspec the user has installed, with braces in the path, and nothing written beside the notebook."""
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["false"], "display_name": "foreign", "language": "R"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = write(
        "import json, os, sys, psutil\n"
        "held = psutil.Process().net_connections('all')\n"
        "ports = [str(one.laddr) for one in held if one.status == psutil.CONN_LISTEN]\n"
        "sockets = [one.laddr for one in held if 'kernel-ipc' in one.laddr]\n"
        "mode = oct(os.stat(os.path.dirname(sockets[0])).st_mode)\n"
        "print('told', json.dumps([x, sys.executable, os.getcwd(), ports, sockets, mode]))"
    )
    before = sorted(notebook.parent.iterdir())
    copy = execute(notebook, tmp_path / "out", {"x": 3})
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("told ")]
    x, executable, folder, ports, sockets, mode = json.loads(line.removeprefix("told "))
    assert (x, executable, folder, ports) == (3, sys.executable, str(notebook.parent), [])
    (private,) = {Path(path).parent for path in sockets}
    assert mode.endswith("700") and private.parent == Path(tempfile.gettempdir()) and not private.exists()
    assert sorted(notebook.parent.iterdir()) == before
    assert not (tmp_path / "ipython").exists()
    assert states(copy) == ["completed"] * 3 and sorted(copy.parent.iterdir()) == [copy.with_suffix(".html"), copy]


def test_three_at_once(write, tmp_path):
    notebook = write("import time; time.sleep(1); print('x is', x)")
    script = (
        "import sys; from pathlib import Path; from studylib.study.notebooks import execute; "
        "execute(Path(sys.argv[1]), Path(sys.argv[2]), {'x': int(sys.argv[3])})"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, notebook, tmp_path / str(x), str(x)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for x in (1, 2, 3)
    ]
    for x, process in enumerate(running, 1):
        told, _ = process.communicate(timeout=300)
        assert (process.returncode, told) == (0, f"x is {x}\n")
        (output,) = nbformat.read(tmp_path / str(x) / notebook.name, as_version=4).cells[-1].outputs
        assert output.text == f"x is {x}\n"


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (
            f"import os; print('so far', flush=True); os.kill(os.getpid(), {signal.SIGKILL.value})",
            "its kernel was killed, most often for want of memory: use a smaller model or profile, or fewer jobs",
        ),
        ("import os; os.abort()", "its kernel died of SIGABRT"),
        ("import sys; sys.exit()", "it called sys.exit"),
        ("import sys; sys.exit('nothing to do')", "it called sys.exit: nothing to do"),
        ("raise ValueError('first\\nsecond')", "ValueError: first"),
    ],
)
def test_what_ends_a_notebook_is_told_in_one_line_and_its_cells_say_how_far_it_came(
    write, tmp_path, capfd, cell, reason
):
    with pytest.raises(NotebookError) as told:
        execute(write("a = 1", cell, "b = 2"), tmp_path / "out", {"x": 1})
    assert str(told.value) == f"01_x.ipynb failed: {reason}"
    copy = tmp_path / "out" / "01_x.ipynb"
    assert states(copy) == ["completed", "completed", "completed", "failed", "pending"]
    executed = nbformat.read(copy, as_version=4)
    assert executed.metadata.papermill.exception
    assert any(out.output_type == "error" for cell in executed.cells for out in cell.get("outputs", []))
    assert copy.with_suffix(".html").exists()
    assert "Traceback" not in capfd.readouterr().err


def test_a_kernel_that_does_not_start_is_told_in_one_line(write, tmp_path, monkeypatch, capfd):
    (tmp_path / "ipykernel").mkdir()
    (tmp_path / "ipykernel" / "__init__.py").write_text("raise ImportError('made for another Python')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(NotebookError) as told:
        execute(write("a = 1"), tmp_path / "out", {"x": 1})
    assert str(told.value) == (
        "01_x.ipynb failed: its kernel did not start (ImportError: made for another Python); "
        "install the requirements again: pip install -e ."
    )
    assert capfd.readouterr() == ("", "")
    assert states(tmp_path / "out" / "01_x.ipynb") == ["pending"] * 3


def test_a_socket_has_room_in_its_folder(tmp_path, monkeypatch):
    long = tmp_path / ("l" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with kernels.private_folder() as folder, socket.socket(socket.AF_UNIX) as end:
        assert folder.parent == Path("/tmp") and folder.stat().st_mode & 0o777 == 0o700
        end.bind(str(folder / kernels.SOCKET))
    assert not folder.exists()
    monkeypatch.setattr(os, "access", lambda path, mode: path != "/tmp")
    with pytest.raises(ValueError, match=f"TMPDIR: {long} is too long a path for a kernel's sockets"):
        kernels.private_folder().__enter__()
