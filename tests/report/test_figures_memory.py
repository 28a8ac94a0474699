"""Figures and tables of memory: what they must have whatever the numbers."""

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from studylib.evidence.gigabytes import REPORTED, against_papers
from studylib.report.figures import memory as memory_figures


def flat(figure):
    FigureCanvasAgg(figure).draw()
    assert all(ax.get_xlabel() for ax in figure.axes) and figure.legends
    return figure.get_suptitle().replace("\n", " ")


def test_plans_stand_beside_what_was_measured(fp32):
    frame = memory_figures.measured_beside_planned("tiny-random", ["lora", "l4q", "qat"], 4, 32, 4, 2, 32)
    assert (frame["planned"] == frame["total"]).all() and len(frame) == 6
    shown = memory_figures.readable_memory(frame)
    assert set(shown["Plan / measured"]) == {"1.000"} and list(shown["Method"])[::2] == ["LoRA", "L4Q", "QAT"]
    assert "our plans are within 0.0% of what was measured" in flat(memory_figures.memory_bars(frame))


def test_the_papers_gigabytes_have_a_row_each(monkeypatch):
    rows = [row for row in REPORTED if row.model == "llama-7b" and row.claim in ("B6", "C3")]
    rows.append(next(row for row in REPORTED if row.gigabytes is None))
    monkeypatch.setattr(memory_figures, "against_papers", lambda: against_papers(rows))
    table = memory_figures.papers_table()
    assert isinstance(table, pd.DataFrame) and len(table) == len(rows) and table["Paper, GB"].iloc[-1] == "–"
    assert "reported numbers are met to a tenth" in flat(memory_figures.papers_figure())


def test_all_steps_are_planned_before_one_is_measured(fp32, monkeypatch):
    measured = []
    monkeypatch.setattr(memory_figures, "measure", lambda *args, **given: measured.append(args))
    for values, message in (
        ((["lora", "qlora"], 8, 32, 4, 2, 32), "bits: 8 is not allowed for 'nf'"),
        ((["lora", "l4q"], 4, 48, 4, 2, 32), "group: 48 does not divide the row length 64"),
        ((["lora"], 4, 32, 4, 2, 10**5), "length: 100000 tokens"),
        ((["lora"], 4, 32, 4, 65536, 16), "batch: 65536 of 16 tokens is not allowed; use 524288 tokens in one step"),
        ((["lora", "rtn"], 4, 32, 4, 2, 32), "method: 'rtn' is not known; use one of lora, qlora"),
    ):
        with pytest.raises(ValueError, match=message):
            memory_figures.measured_beside_planned("tiny-random", *values)
    monkeypatch.setattr(memory_figures, "environment", lambda: {"hardware": {"memory_bytes": 2**20}})
    with pytest.raises(ValueError, match=r"batch: 2 of 32 tokens take .* GB with 'lora', and this machine has"):
        memory_figures.measured_beside_planned("tiny-random", ["lora"], 4, 32, 4, 2, 32)
    assert not measured
