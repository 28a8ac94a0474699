"""Notebooks run by papermill: parameters checked beforehand, executed copies kept, records gathered for the report."""

import ast
import contextlib
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studylib.config import (
    ALWAYS,
    INSTALL_LLAMA_CPP,
    NEVER,
    Arm,
    is_smoke,
    listed,
    llama_cpp_installed,
    write_whole,
    written_whole,
)
from studylib.methods import Setting
from studylib.study.parameters import check_parameter
from studylib.study.records import (
    MISSING,
    REFERENCE,
    RUNS,
    SHIPPED,
    Record,
    RecordError,
    arm_key,
    find_records,
    known_records,
    read_files,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from nbformat import NotebookNode
    from pandas import DataFrame

NOTEBOOKS = SHIPPED / "notebooks"
SIZES = "10_model_sizes"  # the notebook of several models
TEXTS = "01_sampling_strategy"  # the notebook of several training texts
FAMILY = "two or more models of one family, for example: study run --model SMALL --model LARGE"  # that it takes
MARK = "smoke: these numbers mean nothing"  # across a figure
ANSWER = "answer"  # tag of the cell that tells what the reference says: no part of what is executed elsewhere
PATIENCE = 300  # seconds that a kernel on a busy machine may take to start, or to hand over the rest of a cell's output


class NotebookError(RuntimeError):
    """A notebook that did not come to its end, in one line."""


def find_notebooks(names: list[str], folder: Path = NOTEBOOKS, family: bool = False) -> list[Path]:
    """Notebook files by number ("03") or name, all when `names` is empty; 00 comes last, for it sums the others up.

    family: several models are compared; all are else those that take one.
    """
    present = {path.stem: path for path in sorted(sorted(folder.glob("[0-9][0-9]_*.ipynb")), key=sums_up)}
    if not present:
        raise ValueError(f"notebooks: there are none in {folder}; install studylib again (pip install .)")
    if not names:
        return [path for path in present.values() if family or not takes_family(path)]
    found = []
    for name in names:
        match = [path for stem, path in present.items() if name in (stem, stem.split("_")[0], path.name)]
        if not match:
            raise ValueError(f"notebook: {name!r} is not known; use one of {', '.join(present)}")
        found += match
    return sorted(dict.fromkeys(found), key=sums_up)


def sums_up(notebook: Path) -> bool:
    return notebook.stem.startswith("00_")


def question(notebook: Path) -> tuple[str, str]:
    """The notebook's number and its question, from its title: "# 04 · When is training worth it?"."""
    _, _, source = _cells(notebook)[0]
    title = source.splitlines()[0]
    number, _, asked = title.removeprefix("# ").partition(" · ")
    return number, asked


def claims(notebook: Path) -> list[str]:
    """The ids of the claims that the notebook's cells name, in their order."""
    found = [re.findall(r'"([A-Z]\d+)"', source) for kind, _, source in _cells(notebook) if kind == "code"]
    return list(dict.fromkeys(claim for own in found for claim in own))


def _cells(notebook: Path) -> list[tuple[str, set[str], str]]:
    """Kind, tags and source of each cell. Read here: nbformat takes three seconds to import."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [(cell["cell_type"], set(cell["metadata"].get("tags", ())), "".join(cell["source"])) for cell in cells]


def takes_family(notebook: Path) -> bool:
    """Whether it compares models of one family, and is no notebook of one model."""
    return notebook.stem == SIZES


def compares_texts(notebook: Path) -> bool:
    """Whether its question is which text to train on, so that no text can stand in the place of all."""
    return notebook.stem == TEXTS


def default_parameters(notebook: Path) -> dict[str, Any]:
    """Names and default values of the notebook's cell tagged `parameters`; ValueError where it has none."""
    found: dict[str, Any] = {}
    for _, tags, source in _cells(notebook):
        for given in ast.parse(source).body if "parameters" in tags else ():
            match given:
                case ast.AnnAssign(ast.Name(name), value=ast.expr() as value) | ast.Assign([ast.Name(name)], value):
                    found[name] = ast.literal_eval(value)
    if not found:
        raise ValueError(f"{notebook.name} has no cell tagged 'parameters'")
    return found


def assign_parameters(notebooks: Sequence[Path], parameters: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """What each notebook gets of `parameters`: those that it has (papermill itself would only warn of others).

    Raises ValueError for a name that none of the notebooks has, or a value that it may not have (see parameters).
    """
    check_names(notebooks, parameters)
    defaults = {notebook: default_parameters(notebook) for notebook in notebooks}
    return {
        notebook: {name: check_parameter(notebook.stem, name, parameters[name]) for name in own if name in parameters}
        for notebook, own in defaults.items()
    }


def check_names(notebooks: Sequence[Path], parameters: Iterable[str]) -> None:
    """ValueError for a name of a parameter that none of the notebooks has."""
    allowed = dict.fromkeys(name for notebook in notebooks for name in default_parameters(notebook))
    for name in parameters:
        if name not in allowed:
            names = listed([notebook.name for notebook in notebooks])
            raise ValueError(f"parameter: {name!r} is not one of {names}; allowed are {', '.join(allowed)}")


def wanted_arms(notebook: Path, parameters: dict[str, Any]) -> list[Arm]:
    """The arms that the notebook with `parameters` asks for: what its cells tagged "arms" leave as `arms`.

    Only these cells and the parameters are run, here; [] where there are none. Raises what they raise: ValueError for
    an arm that cannot be.
    """
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(notebook.parent):
        for _, tags, source in _cells(notebook):
            if tags & {"parameters", "arms"}:
                exec(compile(source, notebook.name, "exec"), names)
            if "parameters" in tags:
                names |= parameters
    return names.get("arms", [])


def execute(notebook: Path, output: Path, parameters: dict[str, Any]) -> Path:
    """Run the notebook with `parameters`; its executed copy and its HTML rendering go to the folder `output`.

    What it prints, the progress bar above all, goes to this process's streams as it appears. Until the end everything
    lies in a private folder, so that runs do not meet, and nothing is written beside the notebook. Raises NotebookError
    where it did not come to its end; the copy holds everything up to there.
    """
    import nbformat
    import papermill

    from studylib.study import kernels  # jupyter_client

    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what goes wrong is told once, here
    with kernels.private_folder() as folder:
        copy, failure = folder / notebook.name, None
        try:
            papermill.execute_notebook(
                _literal(notebook),
                _literal(copy),
                parameters,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                start_timeout=PATIENCE,
                iopub_timeout=PATIENCE,
                kernel_manager_class=kernels.Manager,
                config=kernels.configuration(folder),
                resources={"metadata": {"path": str(notebook.parent)}},
            )
        except Exception as error:
            failure = error
        if not copy.exists():
            raise NotebookError(f"{notebook.name} failed: {_first_line(failure)}") from failure
        executed = nbformat.read(copy, as_version=4)
        reason = _mark_end(executed, failure, folder)
    _keep(executed, output / notebook.name)
    if reason:
        raise NotebookError(f"{notebook.name} failed: {reason}") from failure
    return output / notebook.name


def _literal(path: Path) -> str:
    """For papermill, which takes a path for a format string."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _first_line(error: BaseException | str | None) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _mark_end(executed: "NotebookNode", failure: Exception | None, folder: Path) -> str | None:
    """Why the notebook did not come to its end, None if it did; its cells then say how far it came.

    papermill marks every cell as completed when a kernel dies or does not start.
    """
    from nbclient.exceptions import DeadKernelError
    from nbformat.v4 import new_output
    from papermill import PapermillExecutionError

    from studylib.study import kernels

    if isinstance(failure, PapermillExecutionError):
        return _ended_by(failure.ename, failure.evalue)
    states = [(cell, cell.metadata.papermill) for cell in executed.cells]
    if failure is None:
        ends = [output for cell, state in states if state["exception"] for output in cell.get("outputs", [])]
        return next((_ended_by(end.ename, end.evalue) for end in ends if end.output_type == "error"), None)
    begun = sum(state["start_time"] is not None for _, state in states)
    for _, state in states[begun:]:
        state["status"] = "pending"
    executed.metadata.papermill["exception"] = True
    if not begun:
        said = kernels.last_words(folder) or _first_line(failure)
        return f"its kernel did not start ({said}); install the requirements again: pip install -e ."
    cell, state = states[begun - 1]
    if isinstance(failure, DeadKernelError):
        reason = f"its kernel {kernels.why_it_ended(folder)}"
    else:
        reason = _ended_by(type(failure).__name__, str(failure))
    state.update(status="failed", exception=True)
    if cell.cell_type == "code":
        cell.outputs.append(new_output("error", ename=type(failure).__name__, evalue=reason, traceback=[reason]))
    return reason


def _ended_by(name: str, value: str) -> str:
    said = f": {_first_line(value)}" if value else ""
    return f"{'it called sys.exit' if name == 'SystemExit' else name}{said}"


def _keep(executed: "NotebookNode", copy: Path) -> None:
    """Write the executed notebook, and its HTML rendering beside it."""
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    executed.cells = [cell for cell in executed.cells if ANSWER not in cell.metadata.get("tags", ())]
    executed, _ = CoalesceStreamsPreprocessor().preprocess(executed, {})  # of a progress bar, only its last state
    html, _ = HTMLExporter().from_notebook_node(executed)
    copy.parent.mkdir(parents=True, exist_ok=True)
    write_whole(copy, nbformat.writes(executed))
    write_whole(copy.with_suffix(".html"), html)


def folders(results: str, output: str) -> tuple[str, str]:
    """Where records go, and where figures and tables go, by a notebook's parameters.

    An empty `results` is results/runs of the repository, wherever the notebook is started, or of the working directory
    where studylib was installed without it; an empty `output` is the folder "interactive" in results. Other relative
    paths count from the working directory, as everywhere.
    """
    results = results or str(RUNS)
    return results, output or str(Path(results) / "interactive")


def where_installed(arms: list[Arm], wanted: str, results: str, compute: str = MISSING) -> list[Arm]:
    """Arms that are computed by llama.cpp: all of them where `wanted` is ALWAYS, none where it is NEVER; for AUTO those
    that can be, or are on record; a line says so where others are left out."""
    if wanted == NEVER:
        return []
    there = arms
    if wanted != ALWAYS and not llama_cpp_installed():
        on_record = {record.key for record in known_records(results or RUNS, compute)}
        there = [arm for arm in arms if arm_key(arm) in on_record]
    if len(there) < len(arms):
        print(f"llama.cpp is not installed, so that it is left out; {INSTALL_LLAMA_CPP} adds it.")
    return there


def publish(
    output: str | Path,
    notebook: str,
    records: list[Record],
    figures: "dict[str, Figure]",
    table: "DataFrame",
    of: dict[str, Any] | None = None,
    judged: Sequence[Record] = (),
) -> None:
    """What a notebook leaves in the folder output/notebook: figures (WebP, SVG), table.csv, and published.json.

    of: what the table alone depends on, where it is no table of records (see reference_table). judged: all that its
    verdicts rest on, where the page tells these from the arms.
    """
    folder = Path(output) / notebook
    folder.mkdir(parents=True, exist_ok=True)
    smoke = is_smoke(record.arm.evaluation for record in [*records, *judged])
    for name, figure in figures.items():
        if smoke:
            figure.text(0.5, 0.5, MARK, fontsize=36, rotation=20, ha="center", va="center", alpha=0.25)
        with written_whole(folder / f"{name}.webp") as picture, written_whole(folder / f"{name}.svg") as svg:
            picture.write_bytes(webp(figure))
            figure.savefig(svg)
    with written_whole(folder / "table.csv") as partial:
        table.to_csv(partial, index=False)
    titles = {name: figure.get_suptitle().replace("\n", " ") for name, figure in figures.items()}
    published = {"records": [record.key for record in records], "figures": titles}
    published |= {"judged": [record.key for record in judged]} if judged else {}
    published |= {"of": of} if of else {}
    write_whole(folder / "published.json", json.dumps(published, indent=1))


def reference_table(notebook: str, of: dict[str, Any]) -> "DataFrame | None":
    """The table that the notebook published in the reference results, if it is of the same."""
    import pandas as pd

    for path in REFERENCE.glob(f"*/{notebook}/published.json"):
        if json.loads(path.read_text(encoding="utf-8")).get("of") == of:
            return pd.read_csv(path.with_name("table.csv"))
    return None


def executed_together(notebooks: Sequence[Path], given: dict[str, Any]) -> "list[NotebookNode]":
    """The notebooks with the outputs of their cells, executed one after the other in one kernel, which imports
    libraries once. `given` takes the place of parameters, and leaves no trace in them.

    Raises what nbclient raises for a cell that fails.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    from studylib.study import kernels  # jupyter_client

    found = [nbformat.read(notebook, as_version=4) for notebook in notebooks]
    cells, copies = [], []  # all in their order; each cell of a notebook with the one that is executed for it
    for notebook, own in zip(notebooks, found, strict=True):
        cells.append(new_code_cell("%reset -f"))
        taken = {name: value for name, value in given.items() if name in default_parameters(notebook)}
        for cell in (cell for cell in own.cells if cell.cell_type == "code"):
            cells.append(new_code_cell(cell.source))
            copies.append((cell, cells[-1]))
            if "parameters" in cell.metadata.get("tags", ()):
                cells.append(new_code_cell("\n".join(f"{name} = {value!r}" for name, value in taken.items())))
    with kernels.private_folder() as folder:
        NotebookClient(
            new_notebook(cells=cells),
            timeout=None,
            startup_timeout=PATIENCE,
            iopub_timeout=PATIENCE,
            kernel_manager_class=kernels.Manager,
            config=kernels.configuration(folder),
            resources={"metadata": {"path": str(notebooks[0].parent)}},
        ).execute()
    for cell, executed in copies:
        cell.outputs = executed.outputs
    for own in found:
        for count, cell in enumerate((cell for cell in own.cells if cell.cell_type == "code"), 1):
            for numbered in (cell, *(output for output in cell.outputs if "execution_count" in output)):
                numbered["execution_count"] = count
    return found


def webp(figure: "Figure") -> bytes:
    """The figure as the page shows it, without loss: a third of a PNG's bytes, in less time."""
    made = io.BytesIO()
    figure.savefig(made, format="webp", dpi=170, pil_kwargs={"lossless": True, "method": 2})
    return made.getvalue()


def read_published(output: Path, notebook: str) -> dict[str, Any]:
    """What `publish` noted: {"records": [keys], "figures": {file stem: title}, "judged": [keys]}. RecordError where it
    cannot be read, or names anything outside its folder."""
    path = output / notebook / "published.json"
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
        records, figures = published["records"], published["figures"]
        judged = published.get("judged", [])
        if wrong := [key for keys in (records, judged) for key in keys if not re.fullmatch("[0-9a-f]{16}", key)]:
            raise ValueError(f"{wrong[0]!r} is no record's key")
        if wrong := [name for name in figures if not re.fullmatch(r"[^/\\\0]+", name)]:
            raise ValueError(f"{wrong[0]!r} is no figure's name")
        if wrong := [title for title in figures.values() if not isinstance(title, str)]:
            raise ValueError(f"{wrong[0]!r} is no figure's title")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecordError(f"{path} is not what a notebook published ({error}); run {notebook} again") from error
    return {"records": records, "figures": figures, "judged": judged}


def judged_records(
    output: Path, notebooks: Sequence[Path], folder: Path, skipped: Callable[[RecordError], None] | None = None
) -> list[Record]:
    """The records in `folder` that the verdicts of the notebooks published in `output` rest on, each once (see
    `publish`). skipped: as of `used_records`."""
    keys = dict.fromkeys(key for notebook in notebooks for key in read_published(output, notebook.stem)["judged"])
    return list(read_files(find_records(folder, keys).values(), skipped))


def used_records(
    output: Path, notebooks: Sequence[Path], folder: Path, skipped: Callable[[RecordError], None] | None = None
) -> list[Record]:
    """The records in `folder` that the notebooks published in `output`, each once.

    Of those that 00 sums up, which may be of other runs, the ones at settings that none of the other notebooks has.
    skipped: told, for each notebook, of what cannot be read and is left out; without it, that is a RecordError.
    """
    found: dict[str, Record] = {}
    for notebook in sorted(notebooks, key=sums_up):
        taken = {Setting.of(record.arm) for record in found.values()} if sums_up(notebook) else set()
        paths = find_records(folder, read_published(output, notebook.stem)["records"])
        for record in read_files([path for key, path in paths.items() if key not in found], skipped):
            if Setting.of(record.arm) not in taken:
                found[record.key] = record
    return list(found.values())
