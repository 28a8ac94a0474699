"""What a figure must have whatever the numbers; how it looks is for eyes."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from studylib import figures
from studylib.arms import FULL_PRECISION, LLM_QAT, RTN
from studylib.comparison import Setting
from studylib.drawing import draw_best, label_ends, move_apart
from studylib.records import DIVERGED

DEFAULT = Setting(LLM_QAT, "4-8-4")


def differences(records):
    return figures.differences(records, DEFAULT)


ALL = [
    figures.bit_allocation,
    figures.recovery,
    figures.size_accuracy,
    figures.learning_curve,
    figures.cache_cost,
    differences,
]
ROWS = [figures.bit_allocation, figures.recovery, differences]


def texts(figure):
    return [text.get_text() for ax in figure.axes for text in (*ax.texts, *ax.get_yticklabels())]


@pytest.mark.parametrize("draw", ALL, ids=lambda draw: draw.__name__)
def test_title_axes_and_legend(ablations, draw, tmp_path):
    figure = draw(ablations)
    figure.savefig(tmp_path / "x.png", dpi=50)
    assert (tmp_path / "x.png").stat().st_size > 1000
    assert len(figure.get_suptitle()) > 30 and (figure.legends or draw is figures.learning_curve)
    assert all(ax.get_xlabel() for ax in figure.axes) and figure.axes[0].get_ylabel()


def test_a_curve_of_several_methods_names_them(tuned):
    labels = [text.get_text() for text in figures.learning_curve(tuned).axes[0].texts]
    assert {"L4Q 4-16-16", "QLoRA, rank 4"} <= set(labels)


def test_titles_say_the_finding(picture):
    assert "RTN multiplies perplexity on Wikipedia by 1.01 at 8-8-8" in flat(figures.bit_allocation(picture))
    assert "Wikipedia that RTN loses at 4-8-4: by LLM-QAT 85% [85%, 85%]" in flat(figures.recovery(picture))
    assert "last quarter of training, nats a token: −0.0149 (LLM-QAT 8-8-8)" in flat(figures.learning_curve(picture))
    assert "Wikipedia beside LLM-QAT at 4-8-4: best RTN +146% [+146%, +146%]" in flat(
        differences(picture[4:5] + picture[8:])
    )
    assert "35% [35%, 35%] at 100% of the bytes (4 bits, scale a token, keys before rotary)" in flat(
        figures.cache_cost([picture[0], picture[2]])
    )
    assert "nothing is both smaller and better than" in flat(figures.size_accuracy(picture))


def flat(figure):
    return figure.get_suptitle().replace("\n", " ")


def test_every_setting_and_value_is_shown(picture):
    shown = texts(figures.bit_allocation(picture))
    assert {"8-8-8", "8-8-4", "4-8-8", "4-8-4", "8-4-8"} <= set(shown)
    assert "66.7" in shown and "8,100" in shown  # the second is off the scale and keeps its number
    assert "8-4-8: 8,100" in texts(figures.size_accuracy(picture))


def test_differences_name_only_what_differs(ablations):
    shown = texts(differences([r for r in ablations if r.arm.method == LLM_QAT and r.arm.bits == "4-8-4"]))
    assert {"sampled", "greedy", "C4 text", "loss labels", "LSQ"} <= set(shown)
    assert "LLM-QAT" not in " ".join(shown)


@pytest.mark.parametrize("draw", [*ROWS, figures.learning_curve], ids=lambda draw: draw.__name__)
def test_labels_do_not_cover_each_other(ablations, draw):
    look(draw(ablations))


def test_labels_of_points_do_not_cover_each_other(picture):
    look(figures.size_accuracy(picture))


def look(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    for ax in figure.axes:
        boxes = [text.get_window_extent(renderer) for text in ax.texts if text.get_text()]
        for a, b in itertools.combinations(boxes, 2):
            wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert wide <= 1 or high <= 0.25 * a.height


def test_what_beats_what_at_its_size(make_record):
    best = make_record(RTN, "4-8-8", loss=3.0, accuracy=0.6)
    records = [make_record(FULL_PRECISION, loss=2.9), make_record(RTN, "8-8-8", loss=3.1), best]
    assert flat(figures.size_accuracy(records)).endswith("than RTN at 4-8-8 and full precision")


@pytest.mark.parametrize("draw", ALL, ids=lambda draw: draw.__name__)
def test_nothing_to_draw_is_said(make_record, draw):
    figure = draw([make_record(RTN, "4-8-4", status=DIVERGED)])
    assert figure.get_suptitle().startswith(("No arm", "No setting"))


@pytest.mark.parametrize("draw", ALL, ids=lambda draw: draw.__name__)
def test_a_diverged_run_is_drawn_around(picture, make_record, draw):
    figure = draw([*picture[:-1], make_record(LLM_QAT, "4-8-4", status=DIVERGED)])
    figure.savefig("/dev/null", format="png")
    if draw in (figures.bit_allocation, figures.recovery):
        assert "LLM-QAT diverged" in texts(figure)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=25))
def test_labels_of_ends_stay_in_order_apart_and_within_the_axes(heights):
    figure, ax = plt.subplots()
    ax.set_ylim(0, 1)
    label_ends(ax, [(1.0, y, f"{y}", "black") for y in heights])
    low, high = ax.get_ylim()
    placed = [(text.get_position()[1], float(text.get_text())) for text in ax.texts]
    plt.close(figure)
    assert placed == sorted(placed)
    positions = np.array([at for at, _ in placed])
    step = min(0.032, 1 / len(heights))
    assert (np.diff(positions) > 0.999 * step).all()
    assert low + 0.499 * step < positions.min() and positions.max() < high - 0.499 * step


@pytest.mark.parametrize(("scale", "height"), [("linear", 9 - 7.5 * 3 / 8), ("log", 9 * 6 ** (-3 / 8))])
def test_labels_avoid_the_line_of_the_best_between_its_points(scale, height):
    def on_the_line(avoid):
        figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
        ax.set_yscale(scale)
        line = draw_best(ax, [1, 9, 10], [9.0, 1.5, 1.0])
        labels = [ax.text(at, y, f"at {at}", va="center") for at, y in ((4.0, height), (9.0, 1.5))]
        move_apart(ax, labels, [1, 9, 10], [9.0, 1.5, 1.0], line if avoid else None)
        path = ax.transData.transform_path(line.get_path())
        crossed = [path.intersects_bbox(text.get_window_extent(), filled=False) for text in labels]
        plt.close(figure)
        return crossed

    assert any(on_the_line(avoid=False))
    assert not any(on_the_line(avoid=True))
