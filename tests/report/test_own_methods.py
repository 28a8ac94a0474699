"""A method that a user registers, or that is not registered here, has its row, its look and its place on the page."""

import pytest
from matplotlib.colors import to_hex

from studylib.methods import base
from studylib.methods.base import Look, Method, register
from studylib.report import recipes, tables
from studylib.report.figures import comparisons as figures
from studylib.report.figures import weights as weight_figures
from studylib.report.page import write_report
from studylib.report.style import look_of
from studylib.study import notebooks

NAME, TITLE = "two-bits", "Two <bits>"


@pytest.fixture
def own(make_record):
    """A record of a method that no paper has."""

    class TwoBits(Method):
        name, title, look = NAME, TITLE, Look("#123456", "d")

        def apply(self, work):
            raise NotImplementedError

    register(TwoBits())
    yield make_record(NAME, "2-16-16", loss=3.6, accuracy=0.4)
    base._METHODS.pop(NAME, None)


@pytest.fixture
def unknown(own):
    """The same of a method that nobody has registered in this process."""
    base._METHODS.pop(NAME)
    return own


def legend(figure):
    (found,) = figure.legends
    return {text.get_text(): key for text, key in zip(found.get_texts(), found.legend_handles, strict=True)}


def page_of(folder, records):
    notebooks.publish(folder, "04_ptq_vs_qat", records, {}, tables.scoreboard(records))
    return write_report(folder, records, [folder / "04_ptq_vs_qat.ipynb"], "study").read_text()


def further(page):
    return page[page.index('id="further"') : page.index('id="reading"')]


def test_its_row_colour_and_legend(own, picture):
    records = [*picture, own]
    board = tables.scoreboard(records)
    assert board.loc[board["method"] == TITLE, "bits"].tolist() == ["2-16-16"]
    for draw in (figures.bit_allocation, figures.size_accuracy):
        key = legend(draw(records))[TITLE]
        assert (key.get_color(), key.get_marker()) == ("#123456", "d")
    rows = figures.bit_allocation(records).axes[0]
    assert "2-16-16" in [label.get_text() for label in rows.get_yticklabels()]
    assert "#123456" in [to_hex(line.get_color()) for line in rows.lines]
    assert f"{TITLE} at 2-16-16" in recipes.as_text(records, 3)


def test_its_table_on_the_page(own, picture, tmp_path):
    page = page_of(tmp_path / "with", [*picture, own])
    assert "Two &lt;bits&gt;" in further(page) and "full precision" in further(page) and "RTN" not in further(page)
    assert page.count('href="#further"') == 1
    assert 'id="further"' not in page_of(tmp_path / "without", picture)


def test_the_tables_of_papers_hold_the_methods_that_name_them(own, picture, tmp_path):
    base._METHODS[NAME].papers = ("QLoRA",)
    page = page_of(tmp_path, [*picture, own])
    assert 'id="further"' not in page
    table = page[page.index('aria-label="Table of the arms beside QLoRA"') : page.index('<h2 id="L4Q">')]
    assert "Two &lt;bits&gt;" in table and "RTN" not in table


def test_records_of_a_method_that_is_not_registered_are_shown_by_its_name(unknown, picture, tmp_path):
    records = [*picture, unknown]
    assert look_of(NAME) == Look()
    assert tables.scoreboard(records)["method"].tolist().count(NAME) == 1
    assert NAME in legend(figures.bit_allocation(records)) and NAME in legend(figures.size_accuracy(records))
    rows = weight_figures.rows(records, weight_figures.tuning_panels(records)).axes[0]
    assert f"{NAME} at 2-16-16" in [label.get_text() for label in rows.get_yticklabels()]
    assert NAME in further(page_of(tmp_path, records)) and f"{NAME} at 2-16-16" in recipes.as_text(records, 3)


def test_equal_titles_are_two_methods(own, picture, tmp_path):
    base._METHODS[NAME].title = "RTN"
    page = page_of(tmp_path, [*picture, own])
    assert further(page).count("<tr>") == 3  # the head, full precision and this one
