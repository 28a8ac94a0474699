"""Write what the repository shows of its reference results anew: python results/show.py, or `make notebooks`.

The notebooks of one model with their outputs; figures and tables in results/reference/, and its page and README.md; the
ledger in docs/claims.md; in README.md the counts and the table of notebooks. Everything comes from
results/reference/records: no arm is computed.
"""

import base64
import io
import shutil
import tempfile
from pathlib import Path

import nbformat
from PIL import Image

from studylib.config import write_whole
from studylib.report import front, ledger, page
from studylib.study import REFERENCE, notebooks, records_digest

ROOT = Path(__file__).parents[1]
SHOWN = REFERENCE / "quick-smollm2-135m"
COLOURS = 64  # of a committed output: a quarter of the bytes, and nothing to see of it
KEPT = ("*.webp", "table.csv", "published.json")


def main() -> None:
    files = notebooks.find_notebooks([])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / SHOWN.name
        given = {"results": folder, "output": str(output)}
        made = notebooks.executed_together(files, given)
        if left := list((Path(folder) / "records").iterdir()):
            raise SystemExit(f"{len(left)} arms were computed, which the reference lacks: add their records first")
        for own in output.iterdir():
            (SHOWN / own.name).mkdir(exist_ok=True)
            for pattern in KEPT:
                for path in own.glob(pattern):
                    shutil.copyfile(path, SHOWN / own.name / path.name)
    records = notebooks.used_records(SHOWN, files, REFERENCE / "records")
    entries = ledger.ledger(records)
    for file, own in zip(files, made, strict=True):
        claims = notebooks.claims(file)
        _finish(own, [entry for entry in entries if entry.claim.id in claims or notebooks.sums_up(file)])
        own.metadata["studylib"] = {"records": records_digest(notebooks.read_published(SHOWN, file.stem)["records"])}
        write_whole(file, nbformat.writes(own) + "\n")
    _write_pages(records, entries, sorted(notebooks.NOTEBOOKS.glob("*.ipynb")))


def _finish(notebook: nbformat.NotebookNode, entries: list[ledger.Entry]) -> None:
    """Tell the answer at the top, and make the pictures small."""
    for cell in notebook.cells:
        if notebooks.ANSWER in cell.metadata.get("tags", ()):
            cell.source = front.answer(entries)
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = _small(data["image/png"])
                data.pop("text/plain", None)


def _small(picture: str) -> str:
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    made = io.BytesIO()
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(made, "PNG", optimize=True)
    return base64.b64encode(made.getvalue()).decode()


def _write_pages(records: list, entries: list[ledger.Entry], files: list[Path]) -> None:
    command = f"study report --output {SHOWN.relative_to(ROOT)}"
    page.write_report(SHOWN, records, [SHOWN / file.name for file in files], command)
    write_whole(ROOT / "docs" / "claims.md", front.claims_page(entries))
    for path, parts in {
        ROOT / "README.md": {
            "counts": front.counts(entries),
            "notebooks": front.notebook_table(entries, files),
        },
        REFERENCE / "README.md": {"summary": page.summary(records)},
    }.items():
        text = path.read_text(encoding="utf-8")
        for name, content in parts.items():
            text = front.filled(text, name, content)
        write_whole(path, text)


if __name__ == "__main__":
    main()
