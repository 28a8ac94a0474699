"""Figures and tables of formats and fine-tuning: what they must have whatever the numbers."""

import dataclasses

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from studylib.config.budgets import ENGINES, EXECUTIONS, PASSES
from studylib.config.settings import FORMATS, Format
from studylib.report import tables
from studylib.report.figures import weights as weight_figures


@pytest.fixture
def records(make_record, tuned):
    return [make_record("full-precision", loss=2.9, accuracy=0.6), *tuned]


def flat(figure):
    FigureCanvasAgg(figure).draw()
    assert all(ax.get_xlabel() for ax in figure.axes) and figure.legends
    return figure.get_suptitle().replace("\n", " ")


def test_rows_name_every_arm_and_the_best_of_each_width(records, monkeypatch):
    panels = weight_figures.tuning_panels(records)
    assert [panel.name for panel in panels] == ["perplexity/responses", "perplexity/wikipedia", "accuracy/mean"]
    figure = weight_figures.rows(records, panels)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert "QA-LoRA at 3-16-16" in labels and "QLoRA at 4-16-16 (full-range Int4)" in labels
    assert "and QLoRA at 3-16-16 (L4Q at 3-16-16 is 16% [16%, 16%] worse)" in flat(figure)
    monkeypatch.setattr(weight_figures, "LEADS", 1)
    assert flat(weight_figures.rows(records, panels)).endswith("and QLoRA at 3-16-16")


def test_the_table_of_formats_counts_and_compares(records):
    table = weight_figures.format_table(records).set_index("Format")
    assert table.loc["NF4 + DQ", "Bits, formula"] == "4.127" and table.loc["NF4", "Bits, stored"] == "4.500"
    assert table.loc["NF4", "Error, N(0,1)"] == "0.0728" and table.loc["NF4", "Error, weights, %"] == "12.5"
    assert table.loc["Int4", "Perplexity on Wikipedia: cost"].startswith("35%")
    assert not table.isna().any(axis=None)


def test_figures_of_formats_say_what_they_found(records):
    assert flat(weight_figures.format_frontier(records)) == "Perplexity on Wikipedia by number format"  # no affine one
    assert "at four bits: NF4 12.5%" in flat(weight_figures.error_by_layer(records))
    for draw in (weight_figures.format_frontier, weight_figures.error_by_layer):
        assert "No weights were rounded" in draw(records[:1]).get_suptitle()


def test_formats_are_told_apart_by_colour_for_levels_and_marker_for_scales(make_record):
    formats = [Format("nf"), Format("nf", double=True), Format("affine", 3, double=True), Format("affine", 4, 32)]
    made = [make_record("encoded", f"{f.bits}-16-16", changes={"format": f}) for f in formats]
    figure = weight_figures.format_frontier(made)
    (legend,) = figure.legends
    named = {text.get_text(): key for text, key in zip(legend.get_texts(), legend.legend_handles, strict=True)}
    assert list(named) == ["NF", "affine Int", "groups of 64", "DQ", "groups of 32", "best for its size"]
    drawn = [(line.get_color(), line.get_marker()) for line in figure.axes[0].lines if line.get_marker() != "None"]
    looks = [("NF", "groups of 64"), ("NF", "DQ"), ("affine Int", "groups of 32"), ("affine Int", "DQ")]
    assert drawn == [(named[levels].get_color(), named[scales].get_marker()) for levels, scales in looks]


def test_methods_that_choose_stand_beside_the_formats_that_they_round_to(make_record):
    affine, nf = {"format": Format("affine", 4)}, {"format": Format("nf", 4, double=True)}
    made = [make_record("encoded", "4-16-16", changes=own) for own in (affine, nf)]
    made += [make_record(method, "4-16-16", loss=2.9, changes=affine) for method in ("gptq", "autoround")]
    far = make_record("gptq", "2-16-16", loss=9, changes={"format": Format("affine", 2)})
    table = weight_figures.format_table([*made, far]).set_index("Format")
    rounded, chosen = table.loc["affine Int4"], table.loc["AutoRound, affine Int4"]
    assert rounded["Bits, stored"] == chosen["Bits, stored"] == "4.562"
    assert chosen["Error, weights, %"] == chosen["Error, N(0,1)"] == "–" != rounded["Error, weights, %"]
    figure = weight_figures.format_frontier([*made, far])
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"affine Int", "GPTQ, affine Int", "AutoRound, affine Int"} < set(named)
    assert "GPTQ, affine Int2" in figure.axes[0].texts[0].get_text()
    assert flat(figure).startswith("affine Int4 (4.56 bits) beside NF4 + DQ")  # both rounded to the nearest level


def test_the_figure_of_times_has_a_row_for_each_execution_and_says_how_much_faster(make_record):
    record = make_record("4-bit kernel", "4-16-16", changes={"format": Format("affine", 4)})
    assert "Nothing was timed" in weight_figures.decoding_times([]).get_suptitle()
    scores = {f"seconds/own/{kind}": [0.01 * (at + 1)] * 4 for at, kind in enumerate(EXECUTIONS)}
    figure = weight_figures.decoding_times([dataclasses.replace(record, scores=record.scores | scores)])
    assert (
        flat(figure)
        == "Without an adapter beside them, 4-bit weights decode 1.50 [1.50, 1.50] times as fast as with one"
    )
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(EXECUTIONS)


def test_engines_stand_side_by_side_in_tokens_a_second(make_record):
    record = make_record("llama.cpp", "4-16-16", changes={"format": Format("affine", 4, 32)})
    assert "llama.cpp was not timed here" in weight_figures.engine_speeds([]).get_suptitle()
    settings = record.arm.engines
    scores = {
        f"seconds/{stage}/{batch}/{engine}": [0.01 * (at + 1)] * 4
        for stage in PASSES
        for batch in settings.batches
        for at, engine in enumerate(ENGINES)
    } | {"process": [0.0, 0.0, 1.0, 1.0]}
    record = dataclasses.replace(record, scores=scores)
    figure = weight_figures.engine_speeds([make_record("rtn", "4-8-4"), record])
    assert "llama.cpp decodes 0.400 [0.400, 0.400] times as fast as this study's kernel" in flat(figure)
    assert flat(figure).endswith("and 0.800 [0.800, 0.800] times as fast as its own 16 bits")
    assert [ax.get_xlabel().partition(":")[0] for ax in figure.axes] == [
        f"{stage.capitalize()}, batch {batch}" for stage in PASSES for batch in settings.batches
    ]
    table = tables.engines([record])
    assert list(table["Engine"]) == list(ENGINES)
    assert table["Decoding, batch 2, tokens/s"][1] == "100 [100, 100]"  # two tokens in 0.02 s
    assert table["Prefill, batch 2, tokens/s"][0] == "800 [800, 800]"  # eight in 0.01 s
    assert tables.engines([]).empty


def test_no_two_kinds_of_formats_look_alike():
    assert len(set(weight_figures.COLOURS)) == len(weight_figures.COLOURS) > len(FORMATS)
    assert set(FORMATS) == set(weight_figures.LEVELS)
