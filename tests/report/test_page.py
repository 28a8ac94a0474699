"""What a reader must find on the page, and that nothing on it comes from elsewhere."""

import dataclasses
import html.parser
import json
import re

import pytest
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_notebook, new_output

from studylib.evidence.sizes import judge_sizes
from studylib.evidence.verdicts import (
    REPRODUCED,
    VERDICTS,
    judge,
)
from studylib.methods.base import PAPERS
from studylib.report import tables
from studylib.report.figures import comparisons as figures
from studylib.report.figures import family_frontier
from studylib.report.ledger import BY_PAPER, CLAIMS, LATER, counted, ledger, sentences
from studylib.report.page import (
    FAMILY_NOTEBOOKS,
    SECTIONS,
    SUMMARY,
    family_summary,
    summary,
    unbroken,
    write_family_report,
    write_report,
)
from studylib.report.recipes import SIZES, recommendations
from studylib.study import notebooks as batch
from studylib.study.notebooks import NOTEBOOKS
from studylib.study.records import RecordError


@pytest.fixture(scope="module")
def output(picture, tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    drawn = {"bit_allocation": figures.bit_allocation(picture), "recovery": figures.recovery(picture)}
    batch.publish(folder, "04_ptq_vs_qat", picture, drawn, tables.scoreboard(picture))
    batch.publish(folder, "00_claims", picture, {"overview": drawn["recovery"]}, tables.scoreboard(picture))
    notebooks = [folder / "04_ptq_vs_qat.ipynb", folder / "00_claims.ipynb"]
    for notebook in notebooks:
        notebook.with_suffix(".html").touch()
    write_report(folder, picture, notebooks, "study run --notebooks 04 00")
    return folder


@pytest.fixture(scope="module")
def page(output, text_of):
    return text_of(output / "report.html")


class Reader(html.parser.HTMLParser):
    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, page):
        super().__init__()
        self.open, self.links, self.images, self.pictures, self.heads, self.text = [], [], [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        self.images += [attributes] if tag == "img" else []
        self.pictures += [attributes] if tag == "svg" else []
        self.heads += [attributes] if tag == "th" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_else(page):
    reader = Reader(page)
    assert not reader.open  # every element is closed
    assert all(link.startswith(("data:", "04_ptq_vs_qat", "00_claims", "#")) for link in reader.links)
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(set(ids)) == len(ids)
    assert set(CLAIMS) <= {link[1:] for link in reader.links if link.startswith("#")} <= set(ids)
    assert {"04_ptq_vs_qat.html", "00_claims.html", "00_claims/overview.webp"} <= set(reader.links)
    assert not re.search(r"url\(|@import|<script |http-equiv|https?://(?!www\.w3\.org/2000/svg)", page)
    assert page.count("<script>") == 1  # its own, which explores the recipes
    assert len(reader.images) == 3 + 1 and all(len(image["alt"]) > 30 for image in reader.images)
    assert len(page) < 4_000_000


def test_the_sections_stand_in_their_order(page):
    sections = ["ledger", "recipe", *(section.paper for section in SECTIONS), "reading", "methods", "data", "machine"]
    places = [page.index(f'<h2 id="{name}">') for name in [*sections, "deviations", "cost", "again"]]
    assert places == sorted(places)
    overview, recovery = (
        page.index(f'href="{name}.webp"') for name in ("00_claims/overview", "04_ptq_vs_qat/recovery")
    )
    assert places[0] < overview < places[1] and places[2] < recovery < places[3]


def test_every_notebook_and_claim_has_a_place():
    shown = [number for section in SECTIONS for number in section.notebooks] + [*SUMMARY, *FAMILY_NOTEBOOKS]
    assert sorted(shown) == [path.stem[:2] for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
    assert [section.paper for section in SECTIONS] == list(BY_PAPER) == [*PAPERS, LATER]
    assert sum(map(len, BY_PAPER.values())) == len(CLAIMS)


def test_the_ledger_is_read_without_eyes_or_colours(page, picture):
    reader, judged = Reader(page), [finding for entry in ledger(picture) for finding in entry.findings]
    text = " ".join(" ".join(reader.text).split())
    assert all("scope" in head for head in reader.heads)
    shown = [finding for finding in judged if finding.effect]
    assert len(reader.pictures) == len(shown) > 10
    for svg, finding in zip(reader.pictures, shown, strict=False):
        assert svg["role"] == "img" and "the claim holds" in svg["aria-label"]
        assert finding.effect.what and finding.effect.what in text
    table = page[page.index('<table class="ledger"') : page.index("</table>")]
    counts = [table.count(f"</span> {verdict}") for verdict in VERDICTS]
    assert sum(counts) >= len(CLAIMS) and counts[0] and counts[3]
    parts = sum(len(entry.main.parts) for entry in ledger(picture) if entry.main.by_part)
    assert sum(counts) == len(CLAIMS) + parts  # a badge for each claim, and for each part that is not like all
    assert table.count("<details><summary>") == len(CLAIMS)


def test_the_page_says_what_was_found_and_on_what(page, picture):
    text = " ".join(" ".join(Reader(page).text).split())
    for claim in ("A1", "A2", "A3", "A4", "A6"):
        for finding in judge(CLAIMS[claim], picture):
            assert finding.sentence in text
        assert CLAIMS[claim].rule in text
    for said in ("tiny <random>", "c0ffee", "study run --notebooks 04 00", "66.7 [64.", "2.13.0", "AVX2, 2 threads"):
        assert said in text
    assert f"{sum(sum(r.cost['seconds'].values()) for r in picture) / 60:.2f} minutes over all arms" in text


def test_the_recipe_follows_the_ledger(page, picture):
    (found,) = recommendations(picture)
    text = " ".join(" ".join(Reader(page).text).split())
    assert all(sentence in text for sentence in (found.headline, *found.details, SIZES))
    begun = page[page.index("<h1>") : page.index("<nav")]  # the answer, before anything else
    assert found.headline in begun and f"{counted(ledger(picture))}." in begun
    assert page.index('id="ledger"') < page.index('id="recipe"') < page.index('id="LLM-QAT"')
    assert any(image["alt"].startswith(found.headline) for image in Reader(page).images)
    (within,) = recommendations(picture, 5)
    section = f"## Which recipe for this model\n\n**{within.family.title}.** {within.headline}"
    assert section in summary(picture, 5)


def test_published_files(output, picture):
    folder = output / "04_ptq_vs_qat"
    assert {path.name for path in folder.iterdir()} == {
        "bit_allocation.webp",
        "bit_allocation.svg",
        "recovery.webp",
        "recovery.svg",
        "table.csv",
        "published.json",
    }
    published = json.loads((folder / "published.json").read_text())
    assert published["records"] == [record.key for record in picture]
    assert published["figures"]["recovery"].startswith("Won back of the perplexity on Wikipedia that RTN")


@pytest.mark.parametrize("damage", [b"", b"<script>", None, 3000])
def test_a_figure_that_is_no_picture_is_named(picture, tmp_path, damage):
    batch.publish(tmp_path, "04_ptq_vs_qat", picture, {"recovery": figures.recovery(picture)}, tables.frame(picture))
    file = tmp_path / "04_ptq_vs_qat" / "recovery.webp"
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:damage] if isinstance(damage, int) else damage)
    with pytest.raises(RecordError, match=f"^{file} is no picture .*; run 04_ptq_vs_qat again$"):
        write_report(tmp_path, picture, [tmp_path / "04_ptq_vs_qat.ipynb"], "")
    assert not (tmp_path / "report.html").exists()


def test_names_of_files_are_no_tags(picture, make_record, tmp_path, monkeypatch):
    """Neither on the page nor in what notebooks display, which nbconvert renders with any HTML in it."""
    monkeypatch.chdir(tmp_path)
    corpus = "<img src=x onerror=alert(1)> a|b.txt"
    (tmp_path / corpus).write_text("one\ntwo\n")
    trained = make_record("llm-qat", "4-8-4", changes={"corpus": corpus}, loss=3.0)
    trained.provenance["model"].update(name=corpus, note=corpus)
    records = [*picture, trained]
    batch.publish(tmp_path, "04_ptq_vs_qat", records, {"recovery": figures.recovery(picture)}, tables.frame(records))
    published = tmp_path / "04_ptq_vs_qat" / "published.json"
    published.write_text(json.dumps(json.loads(published.read_text()) | {"figures": {"recovery": corpus}}))
    shown = [
        tables.as_markdown(tables.readable(tables.scoreboard(records))),
        tables.as_markdown(tables.data_statistics(records)),
        tables.samples(records),
        sentences([finding for entry in ledger(records) for finding in entry.findings]),
        summary(records),
    ]
    assert all("&lt;img src=x onerror=alert(1)> a\\|b" in text for text in (*shown[:3], shown[4]))
    outputs = [new_output("display_data", {"text/markdown": text}) for text in shown]
    executed, _ = HTMLExporter().from_notebook_node(new_notebook(cells=[new_code_cell(outputs=outputs)]))
    write_report(tmp_path, records, [tmp_path / "04_ptq_vs_qat.ipynb"], "study run")
    for page in (executed, (tmp_path / "report.html").read_text()):
        assert "<img src=x" not in page and "&lt;img src=x" in page


def test_what_comes_into_texts_beside_what_they_say_stands_there(page, picture, tmp_path):
    assert "that its tokenizer puts there" not in page and "today's date" not in page
    text = {"beginning": "<s>", "date": "2024-07-26"}
    records = [dataclasses.replace(record, provenance=record.provenance | {"text": text}) for record in picture]
    told = write_report(tmp_path, records, [], "study report").read_text()
    assert (
        "begins with the &lt;s&gt; that its tokenizer puts there; where its chat template writes today's date, it is"
        in told
    )


def test_a_family_has_a_page_of_its_own(family, tmp_path, text_of):
    records = [record for record in family if record.arm.bits in ("16-16-16", "8-8-8")]
    drawn, table = {"sizes": family_frontier(records)}, tables.family_scoreboard(records)
    batch.publish(tmp_path, "10_model_sizes", records, drawn, table, judged=family)
    (tmp_path / "records").mkdir()
    for record in family:
        (tmp_path / "records" / record.file_name).write_text(record.to_json())
    notebook = tmp_path / "10_model_sizes.ipynb"
    judged = batch.judged_records(tmp_path, [notebook], tmp_path / "records")
    assert {record.key for record in judged} == {record.key for record in family}
    assert len(batch.used_records(tmp_path, [notebook], tmp_path / "records")) == len(records) < len(judged)
    path = write_family_report(tmp_path, records, judged, [notebook], "study run --model a/small --model a/large")
    reader = Reader(text_of(path))
    text = " ".join(" ".join(reader.text).split())
    assert not reader.open and all(link.startswith(("data:", "10_model_sizes/")) for link in reader.links)
    assert "small, large: a larger model at fewer bits, or a smaller one at more?" in text
    (claim,) = (claim for claim in CLAIMS.values() if claim.sizes)
    for finding in judge_sizes(claim, family):
        assert finding.sentence in text and finding.sentence in family_summary(judged)
    assert "Verdict" not in text and f"\N{CHECK MARK} {REPRODUCED}" in text and claim.rule in text
    assert "LLM-QAT at 8-8-8 of large" in text and "--model a/large" in text


def test_bits_and_names_stay_on_one_line_and_nothing_else_is_touched():
    text = (
        '<title>4-8-4</title><p title="4-8-4">RTN at 4-8-4, <b>16-16-16</b>, 2026-11-30</p><script>"4-8-4"</script>'
        "SmoothQuant + LLM-QAT, QA-LoRA and QAT-LoRA behind pre-QAT-LoRA"
    )
    bits = '<span class="bits">{}</span>'
    assert unbroken(text) == (
        f'<title>4-8-4</title><p title="4-8-4">RTN at {bits.format("4-8-4")}, <b>{bits.format("16-16-16")}</b>, '
        '2026-11-30</p><script>"4-8-4"</script>'
        f"SmoothQuant + {bits.format('LLM-QAT')}, {bits.format('QA-LoRA')} and {bits.format('QAT-LoRA')} "
        "behind pre-QAT-LoRA"
    )
