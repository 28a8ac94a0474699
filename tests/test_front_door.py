"""What a user does from Python: the examples of docs/usage.md, and a method of one's own, from a cell to the page."""

import re
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
import torch

import studylib
from studylib.methods.base import _METHODS
from studylib.report import page, tables
from studylib.report.figures import comparisons
from studylib.study import notebooks, records

USAGE = (Path(__file__).parents[1] / "docs" / "usage.md").read_text()
SECTION = USAGE.partition("## From Python")[2].partition("\n## ")[0]
EXAMPLES = re.findall(r"```python\n(.*?)```", SECTION, re.S)


def test_the_page_has_three_examples():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("at", range(3))
def test_an_example_of_the_page_runs_as_it_stands(tmp_path, monkeypatch, at):
    monkeypatch.chdir(tmp_path)
    before = dict(_METHODS)
    # the same on the smallest model and budget; 64 weights in a group do not fit it
    code = EXAMPLES[at].replace("smollm2-135m", "tiny-random").replace('"quick"', '"smoke"').replace(", 64)", ", 32)")
    names: dict = {}
    try:
        exec(compile(code, f"example {at + 1}", "exec"), names)
    finally:
        _METHODS.clear()
        _METHODS.update(before)
    model = names.get("model")
    if model is not None:
        assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    if "table" in names:
        assert isinstance(names["table"], pd.DataFrame) and len(names["table"]) == len(names["records"])


class TwoBits(studylib.Method):
    """Rounding to the nearest of a symmetric grid's three levels."""

    name, title, look = "two-bit", "Two bits", studylib.Look("#123456", "d")

    def apply(self, work):
        studylib.round_to_nearest(work.model, work.arm.bits)


@pytest.fixture
def two_bits():
    studylib.register(TwoBits())
    yield "two-bit"
    del _METHODS["two-bit"]


def test_a_method_of_one_s_own_has_its_own_numbers_colour_row_and_bytes(two_bits, tmp_path):
    budget = studylib.profile("smoke")
    arms = [
        studylib.build_arm(budget, "tiny-random", method, bits)
        for method, bits in (("full-precision", "16-16-16"), ("rtn", "8-8-8"), (two_bits, "2-16-16"))
    ]
    full, eight, own = made = studylib.run(arms, tmp_path, jobs=2)
    assert own.metrics["perplexity/wikipedia"] != full.metrics["perplexity/wikipedia"]
    model = studylib.round_to_nearest(studylib.load_model("tiny-random"), "2-16-16")
    assert own.metrics["bytes/weights"] == studylib.stored_bytes(model) < eight.metrics["bytes/weights"]

    board = studylib.scoreboard(made)
    row = board[board["method"] == "Two bits"].iloc[0]
    assert row["perplexity/wikipedia"] == pytest.approx(own.metrics["perplexity/wikipedia"])
    figure = comparisons.bit_allocation(made)
    figure.savefig(tmp_path / "figure.png")
    labels = {handle.get_label(): handle.get_color() for legend in figure.legends for handle in legend.get_lines()}
    assert matplotlib.colors.to_hex(labels["Two bits"]) == "#123456"
    assert own.file_name.startswith("two-bit_2-16-16_seed0_")

    notebooks.publish(tmp_path / "run", "04_own", made, {"allocation": figure}, tables.scoreboard(made))
    written = page.write_report(tmp_path / "run", made, [tmp_path / "run" / "04_own.ipynb"], "study report")
    assert "Two bits" in written.read_text()

    version = records.arm_key(arms[2])
    TwoBits.version = 2
    try:
        assert records.arm_key(arms[2]) != version  # raised when its results change
    finally:
        TwoBits.version = 1


def test_what_is_not_registered_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^method: 'two-bit' is not known; use one of full-precision, rtn, .*$"):
        studylib.build_arm(studylib.profile("smoke"), "tiny-random", "two-bit", "2-16-16")
    with pytest.raises(TypeError, match="abstract"):
        type("Idle", (studylib.Method,), {"name": "idle", "title": "Idle"})()
    with pytest.raises(ValueError, match="name: 'A/B' is not allowed"):
        studylib.register(type("Named", (TwoBits,), {"name": "A/B"})())


def test_the_door_can_be_looked_at():
    assert {"load_model", "build_arm", "run", "judge", "frame", "register"} <= set(dir(studylib))
    assert studylib.__doc__ and "DataFrame" in studylib.__doc__
    with pytest.raises(AttributeError, match="studylib attribute nothing"):
        studylib.nothing  # noqa: B018
