"""What another doubling of the training would change, and grids that hardly moved."""

import dataclasses

import pytest

from studylib.evidence.rules import is_best
from studylib.evidence.verdicts import NOT_REPRODUCED, REPRODUCED, UNDECIDED, Claim, decide, judge
from studylib.methods.arms import Setting


@pytest.fixture
def claim_and_runs(make_record, seeded):
    """A claim on two arms of eight of their kind, whose losses and curves are given."""

    def made(losses, gains, moved=None, noise=0.001):
        records = [make_record("llm-qat", f"{bits}-8-8", loss=3.0) for bits in range(2, 9)]
        chosen = [make_record("llm-qat", f"4-{bits}-4", loss=loss) for bits, loss in zip((8, 6), losses, strict=True)]
        for at, (record, gain) in enumerate(zip(chosen, gains, strict=True)):
            curve = [{"step": step, "loss": 4.0 - gain * (step == 20)} for step in (0, 5, 10, 15, 20)]
            metrics = record.metrics | ({} if moved is None else {"moved/scales": moved})
            chosen[at] = dataclasses.replace(record, curve=curve, metrics=metrics)
        every = [*records, *chosen, *map(at_6, records)]
        apart = [(0.0, sign * noise, -sign * noise) for sign in len(every) * (1, -1)]
        runs = [run for record, own in zip(every, apart, strict=False) for run in seeded(record, losses=own)]
        return Claim("X1", "one beats another", "", "", tuple(Setting.of(own.arm) for own in chosen), is_best), runs

    def at_6(record):
        return make_record("llm-qat", record.arm.bits.replace("-8-8", "-8-6"), loss=3.0)

    return made


@pytest.mark.parametrize(
    ("losses", "gains", "verdict", "learning"),
    [
        ((3.0, 3.2), (0.1, 0.1), REPRODUCED, False),  # both go on alike
        ((3.0, 3.2), (0.1, 0.5), REPRODUCED, True),  # the other one would be ahead
        ((3.0, 3.0), (0.2, 0.0), UNDECIDED, True),
        ((3.2, 3.0), (0.0, 0.1), NOT_REPRODUCED, False),
    ],
)
def test_where_another_doubling_would_change_the_verdict_it_says_so(claim_and_runs, losses, gains, verdict, learning):
    claim, records = claim_and_runs(losses, gains, noise=0.03 if verdict == UNDECIDED else 0.001)
    found = decide(claim, records)
    assert (found.verdict, found.learning) == (verdict, learning)
    assert ("Still learning: another doubling of the training would change this." in found.text) == learning
    assert found.word == ("undecided: still learning" if learning and verdict == UNDECIDED else verdict)
    assert judge(claim, records)[0] == found


@pytest.mark.parametrize(("moved", "said"), [(None, False), (0.004, True), (0.2, False)])
def test_grids_that_hardly_moved_are_named(claim_and_runs, moved, said):
    text = decide(*claim_and_runs((3.0, 3.2), (0.1, 0.1), moved)).text
    told = "Learned scales moved by little from where they began: LLM-QAT at 4-8-4 by 0.4% and LLM-QAT at 4-6-4 by"
    assert (f"{told} 0.4%." in text) == ("scales moved" in text) == said
