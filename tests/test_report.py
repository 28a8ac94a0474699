"""What a reader must find on the page, and that nothing on it comes from elsewhere."""

import html.parser
import json
import re

import pytest

from studylib import batch, figures, tables
from studylib.batch import NOTEBOOKS
from studylib.claims import CLAIMS
from studylib.judging import judge
from studylib.records import read_records
from studylib.report import ledger_table, overall, summary, write_report


@pytest.fixture
def page(picture, tmp_path):
    drawn = {"bit_allocation": figures.bit_allocation(picture), "recovery": figures.recovery(picture)}
    batch.publish(tmp_path, "04_ptq_vs_qat", picture, drawn, tables.scoreboard(picture))
    path = write_report(tmp_path, picture, [tmp_path / "04_ptq_vs_qat.ipynb"], "study run --notebooks 04")
    return path.read_text()


class Reader(html.parser.HTMLParser):
    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, page):
        super().__init__()
        self.open, self.links, self.images, self.text = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        self.images += [attributes] if tag == "img" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_else(page):
    reader = Reader(page)
    assert not reader.open  # every element is closed
    assert all(link.startswith(("data:", "04_ptq_vs_qat", "#")) for link in reader.links)
    assert (
        {link[1:] for link in reader.links if link.startswith("#")}
        == set(CLAIMS)
        <= set(re.findall(r'id="(\w+)"', page))
    )
    assert "04_ptq_vs_qat.html" in reader.links
    assert not re.search(r"url\(|@import|<script|http-equiv", page)
    assert len(reader.images) == 2 and all(len(image["alt"]) > 30 for image in reader.images)
    assert len(page) < 5_000_000


def test_the_page_says_what_was_found_and_on_what(page, picture):
    text = " ".join(" ".join(Reader(page).text).split())
    for claim in ("A1", "A2", "A3", "A4", "A6"):
        for finding in judge(CLAIMS[claim], picture):
            assert finding.sentence in text
        assert CLAIMS[claim].rule in text
    for said in ("tiny <random>", "c0ffee", "study run --notebooks 04", "66.7 [64.", "2.13.0", "AVX2, 2 threads"):
        assert said in text
    assert f"{sum(sum(r.cost['seconds'].values()) for r in picture) / 60:.2f} minutes over all arms" in text


def test_the_verdict_of_several_measures_is_not_simplified(picture, make_record):
    findings = judge(CLAIMS["A1"], picture)
    assert overall(findings) == "reproduced"
    mixed = [*findings[:2], judge(CLAIMS["A1"], picture[:1])[0]]
    assert overall(mixed) == "reproduced by 2, not tested here by 1"


def test_the_readme_shows_the_reference_results():
    reference = NOTEBOOKS.parent / "results" / "reference"
    records = list(read_records(reference / "records"))
    readme, page = ((folder / "README.md").read_text() for folder in (NOTEBOOKS.parent, reference))
    for found, text in ((ledger_table(records), readme), (summary(records), page)):
        assert found in text, f"it is not up to date and must hold:\n{found}"
    shown = re.findall(r"!\[.*?\]\((.*?)\)", readme)
    assert shown and all((NOTEBOOKS.parent / path).is_file() for path in shown)
    for published in reference.glob("*/*/published.json"):
        keys = json.loads(published.read_text())["records"]
        assert all((reference / "records" / f"{key}.json").is_file() for key in keys)


def test_published_files(page, picture, tmp_path):
    folder = tmp_path / "04_ptq_vs_qat"
    assert {path.name for path in folder.iterdir()} == {
        "bit_allocation.png",
        "bit_allocation.svg",
        "recovery.png",
        "recovery.svg",
        "table.csv",
        "published.json",
    }
    published = json.loads((folder / "published.json").read_text())
    assert published["records"] == [record.key for record in picture]
    assert published["figures"]["recovery"].startswith("Won back of the perplexity on Wikipedia that RTN")
