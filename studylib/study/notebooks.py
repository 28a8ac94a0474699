"""Notebooks run by papermill: parameters checked beforehand, executed copies kept, records gathered for the report."""

import ast
import contextlib
import io
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studylib.config import Arm, listed, write_whole
from studylib.methods import Setting
from studylib.study.parameters import check_parameter
from studylib.study.records import Record, RecordError, find_record, read_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def find_notebooks(names: list[str], folder: Path = NOTEBOOKS) -> list[Path]:
    """Notebook files by number ("03") or name, all when `names` is empty; 00 comes last, for it sums the others up."""
    present = {path.stem: path for path in sorted(sorted(folder.glob("[0-9][0-9]_*.ipynb")), key=_sums_up)}
    if not present:
        raise ValueError(f"notebooks: there are none in {folder}; run from an editable install (pip install -e .)")
    if not names:
        return list(present.values())
    found = []
    for name in names:
        match = [path for stem, path in present.items() if name in (stem, stem.split("_")[0], path.name)]
        if not match:
            raise ValueError(f"notebook: {name!r} is not known; use one of {', '.join(present)}")
        found += match
    return sorted(dict.fromkeys(found), key=_sums_up)


def _sums_up(notebook: Path) -> bool:
    return notebook.stem.startswith("00_")


def default_parameters(notebook: Path) -> dict[str, Any]:
    """Names and default values of the notebook's cell tagged `parameters`; ValueError where it has none."""
    import papermill  # not where a notebook imports this module: a second and a half

    logging.getLogger("papermill").setLevel(logging.ERROR)
    found = {name: ast.literal_eval(entry["default"]) for name, entry in papermill.inspect_notebook(notebook).items()}
    if not found:
        raise ValueError(f"{notebook.name} has no cell tagged 'parameters'")
    return found


def assign_parameters(notebooks: Sequence[Path], parameters: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """What each notebook gets of `parameters`: those that it has (papermill itself would only warn of others).

    Raises ValueError for a name that none of the notebooks has, or a value that it may not have (see parameters).
    """
    defaults = {notebook: default_parameters(notebook) for notebook in notebooks}
    allowed = dict.fromkeys(name for own in defaults.values() for name in own)
    for name in parameters:
        if name not in allowed:
            names = listed([notebook.name for notebook in notebooks])
            raise ValueError(f"parameter: {name!r} is not one of {names}; allowed are {', '.join(allowed)}")
    return {
        notebook: {name: check_parameter(notebook.stem, name, parameters[name]) for name in own if name in parameters}
        for notebook, own in defaults.items()
    }


def wanted_arms(notebook: Path, parameters: dict[str, Any]) -> list[Arm]:
    """The arms that the notebook with `parameters` asks for: what its cells tagged "arms" leave as `arms`.

    Only these cells and the parameters are run, here; [] where there are none. Raises what they raise: ValueError for
    an arm that cannot be.
    """
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    filled = parameterize_notebook(load_notebook_node(str(notebook)), parameters)
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(notebook.parent):
        for cell in filled.cells:
            if {"parameters", "injected-parameters", "arms"} & set(cell.metadata.get("tags", ())):
                exec(compile(cell.source, notebook.name, "exec"), names)
    return names.get("arms", [])


def execute(notebook: Path, output: Path, parameters: dict[str, Any]) -> Path:
    """Run the notebook with `parameters`; its executed copy and its HTML rendering go to the folder `output`.

    What it prints, the progress bar above all, goes to this process's streams as it appears. A failing cell raises
    papermill.PapermillExecutionError, and the copy holds everything up to there.
    """
    import nbformat
    import papermill
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor
    from traitlets.config import Config

    output.mkdir(parents=True, exist_ok=True)
    copy = output / notebook.name
    papermill.execute_notebook(
        notebook,
        copy,
        parameters,
        cwd=notebook.parent,
        progress_bar=False,
        config=Config(KernelManager={"transport": "ipc"}),  # no port that other users of the machine could reach
        stdout_file=sys.stdout,
        stderr_file=sys.stderr,
    )
    executed, _ = CoalesceStreamsPreprocessor().preprocess(nbformat.read(copy, as_version=4), {})
    nbformat.write(executed, copy)  # of a progress bar, only its last state is worth keeping
    html, _ = HTMLExporter().from_notebook_node(executed)
    copy.with_suffix(".html").write_text(html)
    return copy


def publish(
    output: str | Path, notebook: str, records: list[Record], figures: "dict[str, Figure]", table: "DataFrame"
) -> None:
    """What a notebook leaves in the folder output/notebook: figures (PNG, SVG), table.csv, and published.json."""
    folder = Path(output) / notebook
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=200)
        figure.savefig(folder / f"{name}.svg")
    table.to_csv(folder / "table.csv", index=False)
    titles = {name: figure.get_suptitle().replace("\n", " ") for name, figure in figures.items()}
    published = {"records": [record.key for record in records], "figures": titles}
    write_whole(folder / "published.json", json.dumps(published, indent=1))


def read_published(output: Path, notebook: str) -> dict[str, Any]:
    """What `publish` noted: {"records": [keys], "figures": {file stem: title}}. RecordError where it cannot be read."""
    path = output / notebook / "published.json"
    try:
        published = json.loads(path.read_text())
        return {"records": list(published["records"]), "figures": dict(published["figures"])}
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} is not what a notebook published ({error}); run {notebook} again") from error


def used_records(output: Path, notebooks: Sequence[Path], folder: Path) -> list[Record]:
    """The records in `folder` that the notebooks published in `output`, each once.

    Of those that 00 sums up, which may be of other runs, the ones at settings that none of the other notebooks has.
    Raises RecordError where one cannot be read.
    """
    found: dict[str, Record] = {}
    for notebook in sorted(notebooks, key=_sums_up):
        taken = {Setting.of(record.arm) for record in found.values()} if _sums_up(notebook) else set()
        for key in read_published(output, notebook.stem)["records"]:
            record = found.get(key) or read_record(find_record(folder, key))
            if Setting.of(record.arm) not in taken:
                found[key] = record
    return list(found.values())
