"""The figure of a search for learning rates."""

import dataclasses
from itertools import combinations

import pytest
from matplotlib.text import Text

from studylib.config.learning_rates import Rate
from studylib.config.settings import Format
from studylib.report import figures
from studylib.study.rates import with_rate
from studylib.study.records import REFERENCE, read_records


@pytest.fixture
def tried(make_record):
    def make(method, losses):
        record = make_record(method, "3-16-16", changes={"format": Format("int-full", 3)})
        return [
            dataclasses.replace(
                record,
                arm=with_rate(record.arm, Rate(*rate)),
                curve=[{"step": record.arm.tuning.last, "tokens": 9, "loss": loss}],
                status="finished" if loss is not None else "diverged",
            )
            for rate, loss in losses.items()
        ]

    l4q = {(1e-3, 0.01): 2.3, (3e-3, 0.01): 2.1, (1e-2, 0.01): 2.4, (3e-3, 0.03): 2.0}
    return make("l4q", l4q) + make("qlora", {(3e-4, None): 2.15, (1e-3, None): 2.2, (1e-1, None): None})


def test_the_title_says_how_far_the_chosen_rates_lie_apart(tried):
    figure = figures.searched_rates(tried)
    assert figure.get_suptitle().replace("\n", " ") == (
        "The best learning rates lie 10.0 times apart: 0.0003 for QLoRA at 3-16-16 int-full, 0.003 for L4Q at 3-16-16 "
        "int-full"
    )
    (ax,) = figure.axes
    rings = [tuple(line.get_xydata()[0]) for line in ax.lines if line.get_markersize() == 11]
    assert rings == [(0.003, 2.0), (0.0003, 2.15)]
    assert ax.get_xlabel() == "Learning rate (log scale)" and "nats a token" in ax.get_ylabel()
    (joined,) = (line for line in ax.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 3 and
                 line.get_ydata()[0] == 2.3)  # fmt: skip
    assert list(joined.get_xdata()) == [1e-3, 3e-3, 1e-2]  # of one rate for the grid


def test_what_was_given_up_is_a_cross_and_no_choice(tried):
    first, *others = tried[:4]
    early = dataclasses.replace(first.arm, tuning=dataclasses.replace(first.arm.tuning, steps=16, stop=8))
    given_up = dataclasses.replace(first, arm=early, curve=[{"step": 4, "tokens": 9, "loss": 1.0}])
    figure = figures.searched_rates([given_up, *others])
    (ax,) = figure.axes
    crosses = [line.get_xydata().tolist() for line in ax.lines if line.get_marker() == "x"]
    assert crosses == [[[1e-3, ax.get_ylim()[1]]]]
    assert [tuple(line.get_xydata()[0]) for line in ax.lines if line.get_markersize() == 11] == [(0.003, 2.0)]
    assert "given up after a quarter" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_titles_of_panels_do_not_overlap():
    figure = figures.searched_rates(list(read_records(REFERENCE / "rates/records")))
    figure.canvas.draw()
    titles = {ax: title for ax in figure.axes for title in ax.findobj(Text) if title.get_text() == ax.get_title("left")}
    assert len(titles) == len(figure.axes) and max(len(title.get_text()) for title in titles.values()) > 40
    spans = [title.get_window_extent() for title in titles.values()]
    assert not any(one.overlaps(other) for one, other in combinations(spans, 2))


def test_where_all_diverged_the_figure_says_so(tried):
    assert figures.searched_rates(tried[-1:]).get_suptitle() == "No rate was tried"
