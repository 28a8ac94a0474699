"""Claims are judged anew by text and pairs that the reference was not scored on."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest

from studylib import read_records
from studylib.config import listed
from studylib.data import corpora, load_tokenizer
from studylib.methods import seedless
from studylib.study.records import arm_key

ROOT = Path(__file__).parents[2]
SMOOTH = "smoothquant+llm-qat"


@pytest.fixture(scope="module")
def confirm(script):
    return script("results/confirm.py")


@pytest.fixture(scope="module")
def records(confirm):
    return list(read_records(confirm.RECORDS))


def test_what_is_judged_anew_was_not_scored_by_the_reference(confirm, records):
    seen, wider = confirm.QUICK.evaluation, confirm.WIDER.evaluation
    tokenizer = load_tokenizer("smollm2-135m")
    for corpus in seen.corpora:
        texts, scored = (
            [tuple(window) for window in corpora.windows(corpus, tokenizer, 256, count, "evaluation").tolist()]
            for count in (seen.windows, wider.windows)
        )
        places = {text: float(at) for at, text in enumerate(scored)}
        record = next(own for own in records if own.arm.evaluation.corpora and own.finished)
        marked = dataclasses.replace(record, scores={f"loss/{corpus}": list(places.values())})
        left = confirm.unseen(marked)
        judged = {scored[int(at)] for at in left.scores[f"loss/{corpus}"]}
        assert len(judged) == left.arm.evaluation.windows >= 16
        assert not judged & set(texts)


def test_of_pairs_those_of_the_reference_are_left_out(confirm, records):
    record = next(own for own in records if own.arm.evaluation.pairs)
    left = confirm.unseen(record)
    assert left.arm.evaluation.pairs == len(left.scores["loss/responses"]) == 48
    assert left.scores["loss/responses"] == record.scores["loss/responses"][16:]


def test_the_arms_are_those_of_the_reference_but_for_seeds_and_what_they_are_scored_on(confirm, records):
    def trained(arm):
        return seedless(dataclasses.replace(arm, evaluation=confirm.WIDER.evaluation))

    wanted = confirm.wanted_arms()
    reference = {trained(own.arm) for own in read_records(ROOT / "results" / "reference" / "records")}
    assert {trained(arm) for arm in wanted} <= reference
    assert {own.key for own in records} <= {arm_key(arm) for arm in wanted}


def test_the_page_tells_the_words_of_the_records(confirm, records):
    page = confirm.PAGE.read_text(encoding="utf-8")
    table = confirm.table(records)
    assert f"<!-- confirmed -->\n{table}\n<!-- /confirmed -->" in page
    words = {
        claim: words for claim, *words in re.findall(r"^\| (\w\d+) \| ([\w ]+) \| ([\w ]+) \|", table, re.MULTILINE)
    }
    others = [claim for claim, (reference, own) in words.items() if own != reference]
    assert {words[claim][1] for claim in others} == {"undecided"} and len(others) == 3
    smooth = [own for own in [*read_records(ROOT / "results/reference/records"), *records] if own.arm.method == SMOOTH]
    found = [math.exp(np.mean(own.scores["loss/wikipedia"][:16])) for own in smooth if own.arm.bits == "4-4-16"]
    *reference, anew = (float(f"{value:.3g}") for value in found)
    said = f"come to a perplexity of {min(reference):g} to {max(reference):g} on Wikipedia"
    assert (
        len(found) == 4
        and said in " ".join(page.split())
        and f"generated anew, to {anew:,g}." in " ".join(page.split())
    )
    told = f"{len(words)} claims were judged a second time"
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert told in readme and f"three are undecided there: {listed(others)} (" in readme
