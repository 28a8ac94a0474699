"""What a figure must have whatever the numbers; how it looks is for eyes."""

import itertools

import matplotlib.pyplot as plt
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from studylib.config.settings import Format, Scheme
from studylib.methods.arms import Setting
from studylib.report.figures import comparisons as figures
from studylib.report.style import draw_best, move_apart
from studylib.study.records import DIVERGED

DEFAULT = Setting("llm-qat", "4-8-4")


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
    assert len(figure.get_suptitle()) > 30 and figure.legends
    bottom = [ax for ax in figure.axes if ax.xaxis.get_tick_params()["labelbottom"]]
    assert all(ax.get_xlabel() for ax in bottom) and figure.axes[0].get_ylabel()


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_figure_that_is_drawn_again_has_the_same_bytes(ablations, tmp_path, kind):
    for name in ("first", "second"):
        figures.recovery(ablations).savefig(tmp_path / f"{name}.{kind}")
    first, second = (tmp_path / f"{name}.{kind}" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes() and b"<dc:date>" not in first.read_bytes()


def test_a_curve_of_several_methods_names_them(tuned):
    names = [ax.get_title(loc="left") for ax in figures.learning_curve(tuned).axes]
    assert {"L4Q 4-16-16", "QLoRA, rank 4"} <= set(names)


def test_curves_of_one_variant_at_two_bits_name_these(make_record):
    ranged, rotated = Scheme("asymmetric", rotated=True), Scheme(rotated=True)
    arms = ("4-4-16", ranged), ("4-4-4", ranged), ("4-4-16", rotated), ("4-4-16", Scheme())
    records = [make_record("llm-qat", bits, changes={"scheme": scheme}) for bits, scheme in arms]
    names = [ax.get_title(loc="left") for ax in figures.learning_curve(records).axes]
    both = {f"LLM-QAT {bits}, asymmetric MinMax, rotated" for bits in ("4-4-16", "4-4-4")}
    assert both | {"rotated", "LLM-QAT 4-4-16"} == set(names) - {""}


def test_titles_say_the_finding(picture):
    assert "RTN multiplies perplexity on Wikipedia by 1.01 at 8-8-8" in flat(figures.bit_allocation(picture))
    assert "Wikipedia that RTN loses at 4-8-4: by LLM-QAT 85% [85%, 85%]" in flat(figures.recovery(picture))
    assert "Wikipedia beside LLM-QAT at 4-8-4: nearest RTN +146% [+146%, +146%]" in flat(
        differences(picture[4:5] + picture[8:])
    )
    assert "35% [35%, 35%] at 100% of the bytes (4 bits, scale a token, keys before rotary)" in flat(
        figures.cache_cost([picture[0], picture[2]])
    )
    front = "LLM-QAT at 4-8-8, RTN at 8-8-8 and full precision"
    assert f"none of these is both smaller and better than {front}" in flat(figures.size_accuracy(picture))
    of_two = [*picture[:1], next(own for own in picture if own.arm.bits == "4-8-8" and own.arm.method == "rtn")]
    assert "none of these is both smaller and better than RTN at 4-8-8 and full precision" in flat(
        figures.size_accuracy(of_two)
    )


def test_the_end_of_training_is_told_over_all_seeds(make_record):
    def ending(bits, *changes):
        records = [make_record("llm-qat", bits, seed=seed) for seed in range(len(changes))]
        for record, change in zip(records, changes, strict=True):
            record.curve[-1]["loss"] = record.curve[-2]["loss"] + change
        return records

    curves = [*ending("8-8-8", 0.1, 0.2), *ending("4-8-8", -0.1, 0.1), *ending("4-8-4", -0.1, -0.2)]
    figure = figures.learning_curve([*curves, *ending("4-4-16", -0.3, -0.4)])
    assert flat(figure).endswith("the held-out loss still falls in 2 of 4 arms, rises in 1; seeds differ in 1")
    said = dict(zip([ax.get_title(loc="left") for ax in figure.axes], texts(figure), strict=False))
    assert said["LLM-QAT 8-8-8"] == "last 1,280 tokens:\n+0.150 nats\nseeds +0.100 to +0.200"
    assert flat(figures.learning_curve(ending("8-8-8", 0.1))).endswith("still falls in 0 of 1 arms, rises in 1")


def flat(figure):
    return figure.get_suptitle().replace("\n", " ")


def test_every_setting_and_value_is_shown(picture):
    shown = texts(figures.bit_allocation(picture))
    assert {"8-8-8", "8-8-4", "4-8-8", "4-8-4", "8-4-8"} <= set(shown)
    assert "66.7" in shown and "8,100" in shown  # the second is off the scale and keeps its number
    assert "8-4-8: 8,100" in texts(figures.size_accuracy(picture))


def test_differences_name_only_what_differs(ablations):
    shown = texts(differences([r for r in ablations if r.arm.method == "llm-qat" and r.arm.bits == "4-8-4"]))
    assert {"sampled", "greedy", "C4 text", "loss labels", "LSQ weights"} <= set(shown)
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
    best = make_record("rtn", "4-8-8", loss=3.0, accuracy=0.6)
    records = [make_record("full-precision", loss=2.9), make_record("rtn", "8-8-8", loss=3.1), best]
    assert flat(figures.size_accuracy(records)).endswith("than RTN at 4-8-8 and full precision")


@pytest.mark.parametrize("draw", ALL, ids=lambda draw: draw.__name__)
def test_nothing_to_draw_is_said(make_record, draw):
    figure = draw([make_record("rtn", "4-8-4", status=DIVERGED)])
    assert figure.get_suptitle().startswith(("No arm", "No setting"))


@pytest.mark.parametrize("draw", ALL, ids=lambda draw: draw.__name__)
def test_a_diverged_run_is_drawn_around(picture, make_record, draw):
    figure = draw([*picture[:-1], make_record("llm-qat", "4-8-4", status=DIVERGED)])
    figure.savefig("/dev/null", format="png")
    if draw in (figures.bit_allocation, figures.recovery):
        assert "LLM-QAT diverged" in texts(figure)


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


def test_what_is_left_after_deployment_stands_by_its_bytes_and_way_of_merging(tuned, make_record):
    figure = figures.after_deployment(tuned)
    (ax,) = figure.axes
    rows = [label.get_text() for label in ax.get_yticklabels()]
    sizes = [float(row.rpartition(": ")[2].removesuffix(" MB")) for row in rows]
    assert len(rows) > 10 and sizes in (sorted(sizes), sorted(sizes, reverse=True))
    merged = "adapter merged into the 16-bit weights, then rounded and distilled"
    assert any(row.startswith(f"QLoRA, {merged}: ") for row in rows)
    assert "responses beside QLoRA at 4-16-16" in flat(figure) and "of what is no larger" in flat(figure)
    assert "change in %" in ax.get_xlabel() and "rank 64" not in texts(figures.size_accuracy(tuned))
    diverged = make_record("l4q", "2-16-16", status=DIVERGED, changes={"format": Format("int-full", 2)})
    assert "L4Q diverged" in texts(figures.after_deployment([*tuned, diverged]))
    for records, said in (([make_record("full-precision")], "No QLoRA"), (tuned[:0], "No QLoRA")):
        assert figures.after_deployment(records).get_suptitle().startswith(said)
