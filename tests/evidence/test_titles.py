"""Titles are for people: whatever things are called, the same records give the same verdicts."""

import dataclasses
from pathlib import Path

import pytest

from studylib.config.settings import Format
from studylib.config.words import listed
from studylib.evidence.measures import gather
from studylib.evidence.verdicts import NOT_TESTED, judge
from studylib.methods import arms
from studylib.methods.base import METHODS
from studylib.report.ledger import CLAIMS
from studylib.study.records import read_records

REFERENCE = Path(__file__).parents[2] / "results" / "reference" / "records"
DICTIONARIES = ("GRID_TITLES", "KIND_TITLES", "MERGE_TITLES", "CORPUS_TITLES")


@pytest.fixture(scope="module")
def records():
    return list(read_records(REFERENCE))


def found(records):
    """Of every claim and measure: the verdict, and the effect without its words."""
    results = {}
    for name, claim in CLAIMS.items():
        for at, finding in enumerate(judge(claim, records)):
            effect, marked = finding.effect, None
            if effect is not None:
                marked = effect.mark(claim.effect) is not None
                effect = dataclasses.replace(effect, what="")
            results[name, at] = finding.verdict, effect, marked
    return results


def rename_everything(monkeypatch, name):
    for method in METHODS.values():
        monkeypatch.setattr(method, "title", name)
    for titles in (getattr(arms, own) for own in DICTIONARIES):
        for own in titles:
            monkeypatch.setitem(titles, own, name)
    for field, change in arms.CHANGES.items():
        monkeypatch.setitem(arms.CHANGES, field, dataclasses.replace(change, words=lambda value: name))
    monkeypatch.setattr(Format, "title", property(lambda own: name))


def test_renaming_every_title_changes_no_verdict_and_no_effect(records, monkeypatch):
    before, titles = found(records), {cell.title for cell in gather(records).values()}
    assert len(records) == 348 and len(titles) > 100
    assert sum(verdict != NOT_TESTED for verdict, _, _ in before.values()) > 40
    rename_everything(monkeypatch, "something")
    assert found(records) == before
    titles = [cell.title for cell in gather(records).values() if cell.method == "llm-qat"]
    assert set(titles) > {"something at 4-8-4", "something at 4-8-4 (something)"}  # the words are really others


@pytest.mark.parametrize(
    ("count", "said"), [(1, "a"), (2, "a and b"), (3, "a, b and c"), (4, "a, b and 2 more"), (5, "a, b and 3 more")]
)
def test_long_lists_end_with_how_many_more_there_are(count, said):
    assert listed("abcde"[:count], 3 if count < 4 else 2) == said
