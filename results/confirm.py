"""Judge claims by text and pairs that no word of the reference rests on.

python results/confirm.py FOLDER    computes what the confirmation's records lack, claims first, into FOLDER/records
python results/confirm.py           judges results/reference/confirmation/records, and tells it in docs/deviations.md

The arms are the reference's own at quick, of seeds 0, 1 and 2, trained anew. They are scored on more pairs and on
windows that are spaced otherwise, and what the reference was scored on is left out before anything is judged. So a
rule that was settled after the reference had been seen is held against what had not been.
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from studylib import CLAIMS
from studylib.config import Arm, profile, write_whole
from studylib.data import corpora, load_tokenizer
from studylib.evidence import (
    NOT_TESTED,
    UNDECIDED,
    Claim,
    Finding,
    claims_first,
    decide,
    response_measures,
    text_measures,
)
from studylib.methods import Setting, usual_evaluation
from studylib.report import front
from studylib.study import REFERENCE, Record, Store, arm_key, notebooks, read_records, schedule
from studylib.study.pace import planned_work

QUICK, SEEDS, JOBS = profile("quick"), [0, 1, 2], 2
# 23 and 16 have no common divisor, so that evenly spaced windows are hardly ever the same ones.
WIDER = replace(QUICK.with_own({"windows": 23, "scored_pairs": 64, "tasks": []}), apart=True)
RECORDS = REFERENCE / "confirmation" / "records"
PAGE = Path(__file__).parents[1] / "docs" / "deviations.md"


def judged_claims() -> list[Claim]:
    """Those whose verdict rests on text or responses. C9's rests on validation pairs, which are the same here."""
    scored = (text_measures, response_measures)
    return [claim for claim in CLAIMS.values() if claim.test and claim.primary in scored and claim.id != "C9"]


def wanted_arms() -> list[Arm]:
    """The reference's arms that these claims read, claims first, scored on more."""
    claims = judged_claims()
    read = {setting for claim in claims for setting in (*claim.needs, *claim.optional)}
    own = {"profile": "quick", "seeds": SEEDS}
    arms = [
        replace(arm, evaluation=usual_evaluation(WIDER, arm.method))
        for path, given in notebooks.assign_parameters(notebooks.find_notebooks([]), own).items()
        for arm in notebooks.wanted_arms(path, given)
        if Setting.of(arm) in read
    ]
    return claims_first(arms, claims, planned_work)


def unseen(record: Record) -> Record:
    """The record without the scores of windows and pairs that the reference has as well."""
    evaluation = record.arm.evaluation
    windows = [at for at in range(evaluation.windows) if at not in _seen_windows(record.arm.model)]
    pairs = range(QUICK.evaluation.pairs, evaluation.pairs)
    kept = dict.fromkeys(evaluation.corpora, windows) | {"responses": pairs}
    scores = {
        name: [values[at] for at in kept[of]] if (of := name.rpartition("/")[2]) in kept else values
        for name, values in record.scores.items()
    }
    left = replace(evaluation, windows=len(windows) if evaluation.corpora else evaluation.windows, pairs=len(pairs))
    return replace(record, arm=replace(record.arm, evaluation=left), scores=scores)


@functools.cache
def _seen_windows(model: str) -> set[int]:
    """The places of windows that the reference has, in any corpus, among those of WIDER."""
    tokenizer, found = load_tokenizer(model), set()
    for corpus in QUICK.evaluation.corpora:
        available = len(corpora.windows(corpus, tokenizer, QUICK.evaluation.length, None, "evaluation"))
        spaced = [corpora.evenly_spaced(own.evaluation.windows, available).tolist() for own in (QUICK, WIDER)]
        found |= {at for at, window in enumerate(spaced[1]) if window in spaced[0]}
    return found


def judge_anew(records: Sequence[Record]) -> dict[str, Finding]:
    """What is found of each claim by what nobody had seen, where all its arms are among the records, with enough seeds
    to tell how far runs lie apart."""
    fresh = [unseen(record) for record in records]
    found = {claim.id: decide(claim, fresh) for claim in judged_claims()}
    return {
        claim: own
        for claim, own in found.items()
        if own.verdict != NOT_TESTED and not (own.verdict == UNDECIDED and own.outcome and own.outcome.waiting)
    }


def table(records: Sequence[Record]) -> str:
    """Each claim's word on the reference and on what nobody had seen, as Markdown."""
    reference = list(read_records(REFERENCE / "records"))
    lines = ["| Claim | Word of the reference | Word on unseen text or pairs | Found there |", "|---|---|---|---|"]
    for claim, finding in judge_anew(records).items():
        lines.append(f"| {claim} | {decide(CLAIMS[claim], reference).word} | {finding.word} | {finding.text} |")
    return "\n".join(lines)


def main(folder: str = "") -> None:
    if folder:
        there = {record.key for record in read_records(RECORDS)}
        arms = [arm for arm in wanted_arms() if arm_key(arm) not in there]
        schedule.compute_arms(schedule.missing_arms(arms, Store(folder)), folder, jobs=JOBS)
    else:
        page = PAGE.read_text(encoding="utf-8")
        write_whole(PAGE, front.filled(page, "confirmed", table(list(read_records(RECORDS)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
