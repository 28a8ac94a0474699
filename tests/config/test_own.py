"""Data of one's own in the place of a profile's: what may be given, and what changes."""

import dataclasses
import os

import pytest

from studylib.config.budgets import RealText, profile
from studylib.config.data import OWN_DATA, check_own, located
from studylib.methods.arms import Setting, build_arm, own_files, setting

SMOKE = profile("smoke")
ALL = {
    "pairs": "mine.json",
    "text": ["notes.txt", "c4"],
    "training_text": "more.jsonl",
    "tasks": ["piqa"],
    "windows": 5,
    "items": 6,
    "scored_pairs": 7,
}


def test_nothing_of_ones_own_changes_nothing():
    assert all(profile(name).with_own({}) == profile(name) for name in ("smoke", "quick", "full", "paper"))
    assert ALL.keys() == OWN_DATA.keys()


def test_everything_of_ones_own_takes_the_place_of_the_profile_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    budget, here = SMOKE.with_own(ALL), f"{tmp_path}{os.sep}"
    assert budget.evaluation == dataclasses.replace(
        SMOKE.evaluation,
        corpora=(f"{here}notes.txt", "c4"),
        windows=5,
        tasks=("piqa",),
        items=6,
        pairs=7,
        instructions=f"{here}mine.json",
    )
    assert budget.instructions == dataclasses.replace(SMOKE.instructions, source=f"{here}mine.json")
    assert (budget.training_text, budget.tuning, budget.training) == (
        f"{here}more.jsonl",
        SMOKE.tuning,
        SMOKE.training,
    )
    assert located(located(ALL)) == located(ALL)
    assert budget.with_own({}) == budget and SMOKE.with_own({"scored_pairs": 0}).evaluation.of_text.pairs == 0


def test_arms_on_own_data_are_at_the_settings_that_claims_read():
    budget = SMOKE.with_own(ALL)
    trained = build_arm(budget, "m", "llm-qat", "4-8-4", seed=2)
    assert trained.data == RealText(budget.training_text, SMOKE.sampling.count, SMOKE.sampling.length, 2, usual=True)
    assert Setting.of(trained) == setting("llm-qat", "4-8-4")
    compared = build_arm(budget, "m", "llm-qat", "4-8-4", corpus=budget.training_text)  # one of several texts
    assert Setting.of(compared) == setting("llm-qat", "4-8-4", {"data.corpus": budget.training_text})
    assert Setting.of(build_arm(budget, "m", "lora")) == setting("lora", "16-16-16")
    assert (
        own_files(trained) == ["mine.json", "notes.txt", "more.jsonl"]
        and own_files(build_arm(SMOKE, "m", "lora")) == []
    )
    with pytest.raises(
        ValueError, match="sampling: 'top_k' has no effect on the training text of the budget; leave it"
    ):
        build_arm(budget, "m", "llm-qat", "4-8-4", sampling={"top_k": 0})


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ([], r"own: \[\] is not allowed; use a dictionary of pairs, text, training_text, tasks"),
        ({"pair": "x.json"}, "own: 'pair' is not known; use one of pairs, text"),
        ({"pairs": "x.txt"}, "instructions: 'x.txt' is not known; use alpaca, or the path of a .json"),
        ({"pairs": 3}, "instructions: 3 is not allowed; use one line of text"),
        ({"text": "x.txt"}, "text: 'x.txt' is not allowed; use a list of one or more .txt or .jsonl files"),
        ({"text": []}, r"text: \[\] is not allowed; use one or more"),
        ({"text": ["x.pdf"]}, "corpus: 'x.pdf' is not known; use one of wikipedia, c4, or the path"),
        ({"text": ["c4", "c4"]}, "text: 'c4' is there twice; name it once"),
        ({"training_text": ""}, "corpus: '' is not allowed; use one line of text"),
        ({"tasks": ["arc"]}, "task: 'arc' is not known; use one of boolq, piqa"),
        ({"windows": 1}, "windows: 1 is not allowed; use a whole number from 2 to"),
        ({"windows": True}, "windows: True is not allowed"),
        ({"items": 0}, "items: 0 is not allowed; use a whole number from 2"),
        ({"scored_pairs": 1}, "scored_pairs: 1 is not allowed; use a whole number from 2"),
        ({"scored_pairs": 0, "pairs": "x.json"}, "scored_pairs: 0 is not allowed with pairs of one's own"),
    ],
)
def test_what_cannot_be_is_one_line(own, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        check_own(own)
    assert "\n" not in str(caught.value)


def test_two_texts_of_one_name_are_refused():
    """They would share a column of the tables."""
    with pytest.raises(ValueError, match="corpora: two of them are called 'x'; give one of the files another name"):
        SMOKE.with_own({"text": ["a/x.txt", "b/x.jsonl"]})
