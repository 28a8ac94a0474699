"""What the repository shows of its reference results is what the records say: README, docs/claims.md, the pages."""

import html.parser
import re
import tomllib
from pathlib import Path

import nbformat
import pytest

from studylib.config.budgets import profile
from studylib.evidence import FAMILY, RATE
from studylib.evidence.verdicts import LOOKS
from studylib.report import front
from studylib.report.ledger import CLAIMS, ledger
from studylib.report.page import summary
from studylib.study import notebooks as batch
from studylib.study.notebooks import NOTEBOOKS
from studylib.study.records import arm_key, read_records

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "results" / "reference"
SHOWN = REFERENCE / "quick-smollm2-135m"
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_NUMBERS = (
    r"<!-- (\w+) -->.*?<!-- /\1 -->",  # what is written from the records, and compared below
    r"```.*?```|`[^`]*`|\]\([^)]*\)",  # commands, files, addresses
    r"\b\d+-\d+-\d+\b|\b(4|8|16)[- ]bits?\b|\bC4\b",  # bit widths, a corpus that is a claim as well
    r"\b(bf16|L4Q|NF4|FP4|Int4|2305\.17888|2305\.14314|2402\.04902|[ABCO]\d+)\b|^\d\.|Apache-2\.0",  # names
)
NUMBER = r"\d[\d.,]*\d|\d"


def bare(text):
    """Of a page in Markdown, what numbers may stand in."""
    for pattern in NOT_NUMBERS:
        text = re.sub(pattern, " ", text, flags=re.DOTALL | re.MULTILINE)
    return text


@pytest.fixture(scope="module")
def records():
    of_one = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if not batch.takes_family(path)]
    return batch.used_records(SHOWN, of_one, REFERENCE / "records")


@pytest.fixture(scope="module")
def entries(records):
    return ledger(records)


def test_what_make_notebooks_writes_is_there(records, entries):
    written = front.filled(README, "counts", front.counts(entries))
    table = front.notebook_table(entries, sorted(NOTEBOOKS.glob("*.ipynb")))
    again = "it is not up to date; `make notebooks` writes it"
    assert front.filled(written, "notebooks", table) == README, again
    for notebook in batch.find_notebooks([]):  # those of one model
        claims = batch.claims(notebook)
        own = [entry for entry in entries if entry.claim.id in claims or batch.sums_up(notebook)]
        assert nbformat.read(notebook, as_version=4).cells[1].source == front.answer(own), again
    assert front.claims_page(entries) == (ROOT / "docs" / "claims.md").read_text(encoding="utf-8"), again
    assert summary(records) in (REFERENCE / "README.md").read_text(encoding="utf-8"), again
    assert f"For {front.MODEL}, of {len(CLAIMS)} claims {sum(e.verdict == 'reproduced' for e in entries)} are" in README


def test_drawn_bounds_lie_outside_the_range_of_a_claim_that_is_not_reproduced_alone(entries):
    drawn = {entry.claim.id: entry.main.effect for entry in entries if entry.main.effect and entry.main.effect.ends}
    outside = {claim for claim, own in drawn.items() if own.bounds[0] > own.below or own.bounds[1] < own.above}
    assert outside == {entry.claim.id for entry in entries if entry.verdict == "not reproduced"} and len(drawn) > 20


def test_readme_is_short_and_shows_pictures_that_there_are():
    assert len(README.splitlines()) < 120
    shown = re.findall(r"!?\[[^]]*\]\((?!https:)([^)#]+)\)", README)
    assert len(shown) > 10 and all((ROOT / path).exists() for path in shown)


def test_each_number_of_a_finding_is_in_the_ledger_of_the_claims_that_it_names(entries):
    """Estimate and interval as they stand there, in one of the claims in brackets at the end of the sentence."""
    findings = {entry.claim.id: entry.main.sentence for entry in entries}
    bullets = re.findall(r"^- \*\*.*?(?=^- |^$)", README.partition("## Try it")[0], re.MULTILINE | re.DOTALL)
    assert len(bullets) == 6
    for bullet in (" ".join(bullet.split()) for bullet in bullets):
        numbers = 0
        for part, ids in re.findall(r"(.*?)\(((?:[A-Z]\d+(?:, )?)+)\)", bullet):
            for found in re.findall(rf"(?:{NUMBER})%?(?: \[[^]]*\])?", bare(part)):
                assert any(found in findings[claim] for claim in ids.split(", ")), f"{found} is not in {ids}: {part}"
                numbers += 1
        assert numbers and not re.search(NUMBER, bare(bullet.rpartition("(")[2])), bullet


def test_every_other_number_of_readme_is_held(records):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    fetched = int(re.search("about (.*?) MB", (ROOT / "CONTRIBUTING.md").read_text())[1])
    full = next(record for record in records if record.arm.method == "full-precision")
    scored = profile("quick").evaluation
    hours = sum(sum(r.cost["seconds"].values()) for r in records if r.arm.seed == 0) / 3600
    held = {
        f"Python {project['requires-python'].removeprefix('>=')} or newer": 1,
        f"{re.search('about (.*?) GB', (ROOT / 'Makefile').read_text())[1]} GB": 1,
        f"{(2 * full.metrics['bytes/weights'] + fetched * 1e6) / 1e9:.1f} GB of weights and text": 1,  # as fp32
        f"{scored.windows} windows of {scored.length} tokens of each corpus, and on {scored.pairs} responses": 1,
        f"their {scored.items} questions": 1,
        "25 claims were judged a second time": 1,  # tests/study/test_confirm.py
    }
    assert round(1 / (RATE * FAMILY * LOOKS), 6) == 20 and "at most one page in twenty has a wrong" in README
    head, _, rest = README.partition("\n- **Eight bits")
    text = " ".join(bare(head + rest[rest.index("## Try it") :]).split())
    for said, times in held.items():
        assert text.count(said) == times, said
        text = text.replace(said, "")
    assert re.findall(rf".{{0,40}}(?:{NUMBER}).{{0,20}}", text) == []
    assert round(hours / 2 * 2) / 2 == 4.5 and "with bf16 about four and a half hours" in README


class Reader(html.parser.HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.links, self.text = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("href", "src")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_and_the_figures_are_of_these_records(records, entries, text_of):
    assert {r.key for r in read_records(REFERENCE / "records")} == {r.key for r in records}  # each is shown somewhere
    report = SHOWN / "report.html"
    read = Reader(text_of(report))
    files = [report.parent / link for link in read.links if not link.startswith(("data:", "#"))]
    assert files and all(file.is_file() for file in files)
    text = " ".join(" ".join(read.text).split())
    for sentence in (finding.sentence for entry in entries for finding in entry.findings):
        assert sentence in text, f"{report} is not up to date; `study report --output {report.parent}` makes it again"


def test_what_is_said_of_benchmarks_that_quick_leaves_out_is_on_record():
    (record,) = read_records(REFERENCE / "left-out")
    assert arm_key(record.arm) == record.key and record.arm.method == "full-precision"
    said = {"arc_easy": "(55%;", "piqa": "PIQA 55%", "openbookqa": "OpenBookQA 27.5%", "mmlu": "MMLU 12.5%"}
    said |= {"triviaqa": "TriviaQA 0%"}
    page = " ".join((ROOT / "docs" / "method.md").read_text().split())
    assert set(said) == set(record.arm.evaluation.tasks) and all(words in page for words in said.values())
    for task, words in said.items():
        assert f"{100 * record.metrics[f'accuracy/{task}']:g}%" in words
