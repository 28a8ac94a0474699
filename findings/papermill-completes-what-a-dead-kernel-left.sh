#!/usr/bin/env bash
# papermill marks every cell of a notebook whose kernel died as completed, the one it died in and those that never ran.
#
# One would expect: where the kernel is killed (a training that wants more memory than there is), the executed copy says so: the
# cell that ran is "failed" or still "running", later ones "pending", and the notebook's own metadata hold an exception, as they do
# where a cell raises.
# Seen with papermill 2.7.0, nbclient 0.11.0, ipykernel 7.4.0: execute_notebook raises DeadKernelError, but in the copy all three
# cells are "completed", the killed one with "exception: False", and the notebook's metadata hold exception null. Only the missing
# execution count tells the cell that never ran from one that did.
# Guess written down before the run: the second cell failed, the third pending.
# Where it comes from: papermill/engines.py, whose manager completes all cells at its end for all errors but those of a cell.
# Whom it hurts: batches of ablation notebooks that are resumed by what the copies say (status, or exception in the metadata): the
# run that was killed for memory counts as done, and its tables are missing without a word.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet papermill==2.7.0 nbclient==0.11.0 ipykernel==7.4.0 nbformat==5.11.1
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import sys

import nbformat
import papermill
from nbformat.v4 import new_code_cell, new_notebook

killed = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)  # as the system does for want of memory"


def run(second):
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [new_code_cell(source) for source in ("x = 1", second, "print(x)")]
    nbformat.write(new_notebook(cells=cells, metadata=kernel), "in.ipynb")
    try:
        papermill.execute_notebook("in.ipynb", "out.ipynb", progress_bar=False)
    except Exception as error:
        print(f"{second.splitlines()[-1][:30]!r}: {type(error).__name__}")
    written = nbformat.read("out.ipynb", 4)
    cells = [cell for cell in written.cells if cell.source in ("x = 1", second, "print(x)")]
    states = [(cell.metadata.papermill.status, cell.metadata.papermill.exception) for cell in cells]
    print("    cells:", states, "notebook:", written.metadata.papermill.exception)
    return [status for status, _ in states], written.metadata.papermill.exception


if run("raise MemoryError") != (["completed", "failed", "pending"], True):
    sys.exit("changed: what is written of a cell that raises")
if run(killed) != (["completed"] * 3, None):
    sys.exit("changed: a dead kernel is told in the copy now")
PYTHON
