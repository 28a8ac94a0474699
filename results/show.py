"""Write what the repository shows of its reference results anew: python results/show.py, or `make notebooks`.

The ledger in docs/claims.md, and in README.md the counts and the table of notebooks. No arm is computed.
"""

from pathlib import Path

from studylib.config import write_whole
from studylib.report import front, ledger
from studylib.study import notebooks

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "results" / "reference"
SHOWN = REFERENCE / "quick-smollm2-135m"


def main() -> None:
    shown = sorted(notebooks.NOTEBOOKS.glob("*.ipynb"))
    of_one = [path for path in shown if not notebooks.takes_family(path)]  # the reference is of one model
    records = notebooks.used_records(SHOWN, of_one, REFERENCE / "records")
    entries = ledger.ledger(records)
    write_whole(ROOT / "docs" / "claims.md", front.claims_page(entries))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = front.filled(readme, "counts", front.counts(entries))
    table = front.notebook_table(entries, shown)
    readme = front.filled(readme, "notebooks", table)
    write_whole(ROOT / "README.md", readme)


if __name__ == "__main__":
    main()
