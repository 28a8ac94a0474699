"""What it takes to decide a claim, in words: before anything is computed for it."""

from collections.abc import Iterable, Sequence

from studylib import study  # a door: what computes is loaded when it is asked for
from studylib.config import Arm, check_known, listed, percent
from studylib.evidence import (
    ENOUGH,
    NOT_TESTED,
    UNDECIDED,
    Claim,
    Finding,
    Plan,
    Prospect,
    lacking_measures,
    training_times,
)
from studylib.methods import Setting
from studylib.report.ledger import CLAIMS

LITTLE = 0.01  # a chance below that is told as one that further seeds do not have


def named(names: Iterable[str]) -> list[Claim]:
    """The claims of these names, each once; ValueError with the names there are for another."""
    for name in names:
        check_known("claim", name, CLAIMS)
    return [CLAIMS[name] for name in dict.fromkeys(names)]


def why_not(claim: Claim, arms: Sequence[Arm]) -> str:
    """Why a claim cannot be tested by carrying out these arms, and what would; "" where it can."""
    missing = set(claim.needs) - {Setting.of(arm) for arm in arms}
    alone = claim.primary is training_times and study.environment()["hardware"]["accelerator"] is None
    if claim.test is None or (claim.untested and missing) or alone:
        return claim.untested
    if missing:
        return f"{listed([own.title for own in claim.needs if own in missing])} is no arm of these notebooks"
    read = {*claim.needs, *claim.optional}
    found = [what for what, ids in lacking_measures([claim], [a for a in arms if Setting.of(a) in read]).items() if ids]
    return f"the profile has {listed(found)}" if found else ""


def without_measure(arms: Sequence[Arm]) -> list[str]:
    """One line for all claims that these arms could test but for what they are scored on; none where there are none."""
    lacks = lacking_measures(CLAIMS.values(), arms)
    parts = [f"{listed(ids)} ({what})" for what, ids in lacks.items()]
    return [f"this profile cannot test {listed(parts)}"] if parts else []


def outlook(claim: Claim, plan: Plan, finding: Finding | None, prospect: Prospect, jobs: int) -> str:
    """One line: the claim's word now, what is missing, the chance of a decision, and how long what is planned takes."""
    word = finding.word if finding else NOT_TESTED
    text = f"{claim.id} · {claim.statement}: {word}"
    if finding and finding.verdict not in (UNDECIDED, NOT_TESTED):
        return f"{text}. It has its word; nothing is computed for it."
    lacks = _missing(claim, plan, finding)
    planned = f"{len(prospect.arms)} arms, {study.time_text(prospect.work / jobs)}"
    if not prospect.arms:
        return f"{text}. {_cannot(lacks)}"
    return f"{text}. {lacks}{_chance(plan, finding, prospect)} Planned: {planned}."


def _missing(claim: Claim, plan: Plan, finding: Finding | None) -> str:
    if lacking := plan.lacking(claim):
        return f"{lacking} of {len(claim.needs)} arms were not run. "
    if finding and finding.outcome and finding.outcome.waiting:
        free = plan.degrees()
        least = min(free.get(kind, 0) for kind in finding.outcome.waiting)
        return f"It waits: how far runs lie apart rests on {least:.0f} of {ENOUGH} degrees of freedom. "
    could = f"Minimum detectable effect: {finding.could}. " if finding and finding.could else ""
    return could


def _chance(plan: Plan, finding: Finding | None, prospect: Prospect) -> str:
    if prospect.chance is None:
        return "The chance of a decision is known when each arm was run once, and of some with two seeds."
    outcome = finding.outcome if finding else None
    most = " at most, if runs do not lie apart, of which too little is known yet" if outcome and outcome.waiting else ""
    return f"Chance of a decision: {percent(prospect.chance)}{most}."


def _cannot(lacks: str) -> str:
    return f"{lacks}Further seeds do not decide it: more windows or pairs would (--profile full), or more --seeds."
