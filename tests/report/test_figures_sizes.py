"""The frontier over the sizes of a family."""

import pytest

from studylib.report import tables
from studylib.report.figures import family_frontier


@pytest.fixture
def drawn(family):
    return family_frontier(family)


@pytest.mark.parametrize(
    ("more", "words"), [(-0.5, "better"), (0.5, "worse"), (0.0, "neither better nor worse, as far as windows tell")]
)
def test_the_title_says_what_was_found(make_record, of_model, more, words):
    records = [make_record("full-precision"), make_record("rtn", "8-8-8")]
    small, large = ([of_model(record, *own) for record in records] for own in (("a/s",), ("a/l", 1.9, more)))
    for record in large:
        record.scores["loss/c4"] = [x + 0.05 * (-1) ** item for item, x in enumerate(record.scores["loss/c4"])]
    title = family_frontier(small + large).get_suptitle().replace("\n", " ")
    assert title == (
        f"At equal bytes, the larger model at fewer bits is {words} (1 of 1 pair), by perplexity on Wikipedia and C4"
    )


def test_every_arm_has_a_point_a_label_and_the_colour_of_its_model(drawn, family):
    (ax,) = drawn.axes
    labels = [text.get_text() for text in ax.texts]
    arms = {(record.arm.model, record.arm.method, record.arm.bits) for record in family}
    assert sorted(labels) == sorted("16 bits" if bits == "16-16-16" else bits for _, _, bits in arms)
    assert len({text.get_color() for text in ax.texts}) == 2
    names = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert names == [
        "small",
        "large",
        "full precision",
        "RTN",
        "LLM-QAT",
        "best for its size",
        "compared at equal bytes",
    ]
    assert ax.get_xlabel() == "Weights + cache of 2,048 tokens, MB (log scale)"
    assert ax.get_ylabel() == "Perplexity on Wikipedia and C4 (log scale, lower is better)"


def test_labels_stand_apart(drawn):
    drawn.draw_without_rendering()
    boxes = [text.get_window_extent() for text in drawn.axes[0].texts]
    assert not [one for at, one in enumerate(boxes) for other in boxes[:at] if one.overlaps(other)]


def test_sizes_too_far_apart_are_named(make_record, of_model):
    records = [make_record("full-precision"), make_record("rtn", "8-8-8", loss=3.01)]
    far = [of_model(record, model, times) for model, times in (("a/s", 1), ("a/l", 9)) for record in records]
    assert family_frontier(far).get_suptitle().startswith("No two sizes take equal bytes; by perplexity on Wikipedia")
    assert family_frontier([]).get_suptitle() == "No arm finished"


def test_the_table_has_the_smallest_model_first(family):
    board = tables.family_scoreboard(family[::-1])
    assert list(board["model"]) == 9 * ["small"] + 9 * ["large"] and list(board)[:2] == ["model", "method"]
    assert list(tables.readable(board))[:3] == ["Model", "Method", "W-A-KV"]
    assert tables.as_markdown(tables.readable(board)).splitlines()[1].startswith("| --- | --- | --- | ---:")
