"""When claims are decided, and what the bar tells of the time left, by replaying the reference records: no training.

An arm takes what `study.pace` learns from all records of its method, and two are carried out at a time; so often, and
in their order, the records of the reference come in, and claims are judged by those that are there. "in turn" has each
seed of all claims before the next; "decisive" has what `evidence.claims_first` expects most decisions of. The time left
is told by what the records themselves took, one after the other.
"""

import json
from pathlib import Path

from studylib.evidence import NOT_TESTED, UNDECIDED, claims_first
from studylib.methods import Setting
from studylib.report.ledger import CLAIMS, Growing
from studylib.study import Pace, read_records
from studylib.study.machine import environment
from studylib.study.pace import tokens

ROOT = Path(__file__).parents[1]
MINUTES = 10, 20, 40, 60, 90
TOGETHER = 2  # arms at a time
FORWARD_PASSES = {"evaluate": 1, "train": 4, "data": 2}  # that a token counted for, before phases were timed


def decided(findings):
    return sorted(name for name, found in findings.items() if found.verdict not in (UNDECIDED, NOT_TESTED))


def in_turn(arms, seconds):
    """As it was: all claims with one seed before any has the next, the cheapest first; then the rest, the longest
    first."""
    own, chosen = {arm: Setting.of(arm) for arm in arms}, {}
    for seed in sorted({arm.seed for arm in arms}):
        left = [claim for claim in CLAIMS.values() if claim.needs and set(claim.needs) <= set(own.values())]
        while left:
            read = [{*claim.needs, *claim.optional} for claim in left]
            lacks = [[a for a in arms if own[a] in wanted and a.seed == seed and a not in chosen] for wanted in read]
            at = min(range(len(left)), key=lambda at: sum(map(seconds, lacks[at])))
            chosen |= dict.fromkeys(lacks[at])
            del left[at]
    return [*chosen, *sorted((arm for arm in arms if arm not in chosen), key=seconds, reverse=True)]


def replay(records, seconds, decisive):
    """Minutes, and the claims that are decided then, from the first arm to the last."""
    by_arm, there = {record.arm: record for record in records}, {}
    growing = Growing(list(by_arm), there.get, lambda line: None, lambda records: None)
    growing()
    left, gone, found = list(by_arm), 0.0, [(0.0, decided(growing.findings))]
    order = in_turn(left, seconds)
    while left:
        if decisive:
            order = claims_first(left, CLAIMS.values(), seconds, growing.records, growing.findings)
        now, order = order[:TOGETHER], order[TOGETHER:]
        left = [arm for arm in left if arm not in now]
        there |= {arm: by_arm[arm] for arm in now}
        gone += sum(map(seconds, now)) / TOGETHER
        growing()
        found.append((gone / 60, decided(growing.findings)))
    return found


def told(records, order):
    """Where a share of the time is gone, how many times as long as it is the time left is told: by phases that were
    timed, and by tokens, as it was before."""
    by_arm, pace, gone, found = {record.arm: record for record in records}, Pace(), 0.0, []
    work = {arm: sum(FORWARD_PASSES.get(phase, 0) * n for phase, n in tokens(arm).items()) for arm in order}
    total = sum(sum(record.cost["seconds"].values()) for record in records)
    for at, arm in enumerate(order):
        before = sum(work[other] for other in order[:at])
        tokens_left = gone / before * sum(work[other] for other in order[at:]) if at else None
        found.append((gone / total, pace.total(order[at:]) / (total - gone), at and tokens_left / (total - gone)))
        pace.learn(by_arm[arm])
        gone += sum(by_arm[arm].cost["seconds"].values())
    return found


def spans(found):
    """The least and the most after a tenth of the time, until nine tenths; and at the tenth."""
    middle = [row for row in found if 0.1 <= row[0] <= 0.9]
    names = "by phase", "by tokens"
    return {
        name: {
            "after a tenth": round(middle[0][at], 2),
            "least": round(min(row[at] for row in middle), 2),
            "most": round(max(row[at] for row in middle), 2),
        }
        for at, name in enumerate(names, 1)
    }


def main():
    records = list(read_records(ROOT / "results" / "reference" / "records"))
    pace = Pace(records)
    pace.made.clear()  # what arms share is made by the first; here each is told what it takes alone
    takes = {record.arm: sum(pace.of(record.arm).values()) for record in records}
    result = {"what": __doc__, "arms at a time": TOGETHER, "decided": {}, "left": {}, "environment": environment()}
    for title, seeds in (("one seed", (0,)), ("three seeds", (0, 1, 2))):
        chosen = [record for record in records if record.arm.seed in seeds]
        order = in_turn([record.arm for record in chosen], takes.get)
        result["left"][title] = spans(told(chosen, order))
        for name, decisive in (("in turn", False), ("decisive", True)):
            found = replay(chosen, takes.get, decisive)
            last = found[-1][1]
            when = next(minutes for minutes, claims in found if set(claims) >= set(last))
            counts = {f"{minutes} min": len([c for m, c in found if m <= minutes][-1]) for minutes in MINUTES}
            counts |= {"all": len(last), "all, min": round(found[-1][0]), "all words there, min": round(when)}
            result["decided"][f"{title}, {name}"] = counts
            print(title, name, counts, flush=True)
    print(json.dumps(result["left"], indent=1))
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
