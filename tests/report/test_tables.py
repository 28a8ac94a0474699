import dataclasses
import math

import numpy as np
import pytest

from studylib.evidence.measures import usual_measures
from studylib.report.style import axis_title
from studylib.report.tables import as_html, as_markdown, as_text, data_statistics, readable, samples, scoreboard
from studylib.study.records import DIVERGED


def test_one_row_an_arm_with_plain_numbers(picture):
    board = scoreboard(picture)
    assert board[["method", "bits"]].values.tolist()[:2] == [["full precision", "16-16-16"], ["RTN", "8-8-8"]]
    row = board[(board["method"] == "LLM-QAT") & (board["bits"] == "4-8-4")].iloc[0]
    assert row["perplexity/wikipedia"] == pytest.approx(math.exp(3.3))
    assert row["perplexity/wikipedia/low"] < row["perplexity/wikipedia"] < row["perplexity/wikipedia/high"]
    assert row["accuracy/mean"] == row["accuracy/piqa"] == pytest.approx(52.0)
    assert row["training_minutes"] == pytest.approx(1.0)
    assert "perplexity/wikipedia/lowest_seed" not in board


def test_seeds_and_divergence(make_record):
    board = scoreboard(
        [
            make_record("full-precision"),
            make_record("llm-qat", "4-8-4", seed=0, loss=3.0),
            make_record("llm-qat", "4-8-4", seed=1, loss=3.2),
            make_record("llm-qat", "4-8-8", seed=0, status=DIVERGED),
        ]
    )
    assert board["seeds"].tolist() == [1, 0, 2] and board["diverged"].tolist() == [0, 1, 0]
    assert np.isnan(board["perplexity/c4"][1])
    assert board["perplexity/wikipedia/lowest_seed"][2] == pytest.approx(math.exp(3.0))
    shown = readable(board)
    assert shown["Perplexity, C4"][1] == "diverged" and shown["Seeds"].tolist() == ["1", "0 (1 diverged)", "2"]
    assert "seeds 20.1 to 24.5" in shown["Perplexity, Wikipedia"][2]


def test_the_same_table_as_text_markdown_and_html(picture):
    board = scoreboard(picture)
    text = as_text(readable(board, tasks=False))
    markdown, page = as_markdown(readable(board)), as_html(readable(board))
    assert len(text.splitlines()) == 1 + len(picture) and len(markdown.splitlines()) == 2 + len(picture)
    assert len({len(line) for line in text.splitlines()}) == 1
    assert page.count("<tr>") == 1 + len(picture)
    for shown in (text, markdown, page):
        assert "66.7 [64." in shown
    assert "PIQA" in markdown and "PIQA" not in text


def test_the_mean_of_one_task_goes_by_its_name(make_record):
    several = make_record("rtn", "4-8-4")
    alone = dataclasses.replace(several.arm, evaluation=dataclasses.replace(several.arm.evaluation, tasks=("piqa",)))
    for record, name in ((several, "Mean accuracy"), (dataclasses.replace(several, arm=alone), "Accuracy on PIQA")):
        assert [title for title in readable(scoreboard([record])) if "ccuracy" in title] == [f"{name}, %"]
        assert axis_title(usual_measures([record])[-1]) == f"{name}, % (higher is better)"


def test_the_bits_of_right_answers_have_one_column(picture):
    hard = np.random.default_rng(0).uniform(0.5, 1.5, size=40)
    sure = {
        f"{name}/{task}": (share * hard).tolist()
        for name, share in (("bits_per_byte", 1), ("probability", 0.5))
        for task in ("piqa", "arc_easy")
    }
    known = [dataclasses.replace(record, scores=record.scores | sure) for record in picture[:-1]]
    board = scoreboard([*known, picture[-1]])  # the last is of an older studylib
    assert board["bits_per_byte/mean"][0] == pytest.approx(hard.mean())
    assert board["probability/mean/low"][0] < board["probability/mean"][0] == pytest.approx(50 * hard.mean())
    before, after = readable(scoreboard(picture)), readable(board)
    assert [name for name in after if name not in before.columns] == ["Right answers, bits a byte"]
    older = (after["Method"] == "LLM-QAT") & (after["W-A-KV"] == "4-8-4")
    column = after["Right answers, bits a byte"]
    assert set(column[older]) == {"–"} and "–" not in set(column[~older])


def test_variants_have_a_column_of_words(ablations):
    shown = readable(scoreboard(ablations))
    assert list(shown)[:3] == ["Method", "W-A-KV", "Variant"] and "C4 text" in shown["Variant"].tolist()
    assert "Perplexity, responses" in shown
    assert as_markdown(shown).splitlines()[1].startswith("| --- | --- | --- | ---: |")


def test_what_the_data_are_like_is_told_once_a_data_set(ablations):
    shown = data_statistics([r for r in ablations if r.arm.method == "llm-qat" and r.arm.bits == "4-8-4"])
    assert shown["Data"].tolist() == ["hybrid", "sampled", "greedy", "Wikipedia text", "C4 text"]
    assert shown["Distinct 2-grams, %"].tolist() == ["90.0"] * 5 and shown["Tokens"].tolist() == ["256"] * 5
    text = samples(ablations)
    assert text.count("````text\nsome | text with ``` in it\n````") == 5 and "**Wikipedia text**" in text


def test_html_is_escaped(picture):
    board = scoreboard(picture)
    board["method"] = "<b>&"
    assert "<b>" not in as_html(readable(board)) and "&lt;b&gt;&amp;" in as_html(readable(board))


def test_nothing_finished(make_record):
    board = scoreboard([make_record("rtn", "4-8-4", status=DIVERGED)])
    assert as_text(readable(board)).splitlines()[1].startswith("RTN")
