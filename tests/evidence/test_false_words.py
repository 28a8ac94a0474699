"""A sample of benchmarks/false_words.py; benchmarks/*.json hold more pages, drawn by the same code."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import scipy.stats

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_pages_with_a_false_word_are_rare():
    command = [sys.executable, BENCHMARKS / "false_words.py", "--sample", "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and all(re.fullmatch(r"page \d+: .*; \d+ with one so far", line) for line in lines)
    assert int(lines[-1].split("; ")[1].split()[0]) <= 2  # more in two cases of a thousand, at one page of twenty


@pytest.mark.parametrize("name", ["false_words", "false_words_skewed"])
def test_of_many_pages_no_more_than_one_in_twenty_has_a_false_word(name):
    found = json.loads((BENCHMARKS / f"{name}.json").read_text())
    assert found["pages"] >= 400
    chance = scipy.stats.binom.sf(found["with a false word"] - 1, found["pages"], 0.05)
    assert chance > 0.05  # what was counted does not speak against it
    told = {"false_words": "{} of 400", "false_words_skewed": "{} where windows are skewed"}[name]
    page = " ".join((BENCHMARKS.parent / "docs" / "method.md").read_text().split())
    assert told.format(found["with a false word"]) in page and found["pages"] == 400
