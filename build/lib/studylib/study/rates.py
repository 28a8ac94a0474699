"""The search for learning rates: one way for every method, on validation text that is neither trained on nor scored."""

import dataclasses
import math
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from studylib.config import BESIDE, NOTHING, Arm, Rate
from studylib.methods import Setting, find, rate_case
from studylib.study import schedule
from studylib.study.pace import planned_work
from studylib.study.records import Record, Store, arm_key

FACTOR = math.sqrt(10)  # from one rate that is tried to the next
GRID_RATE = 0.003  # that the search for a grid's rate begins with where a budget has none: a share of its scales a step
MOST = 8  # rates that are tried in one direction: four decades


def cases(arms: Sequence[Arm]) -> dict[str, Arm]:
    """For each setting whose rate is to be chosen, the arm that is trained for it: the plainest of the least seed,
    scored on nothing."""
    found: dict[str, Arm] = {}
    for arm in sorted((arm for arm in arms if arm.budget), key=lambda arm: (len(Setting.of(arm).changes), arm.seed)):
        found.setdefault(rate_case(arm.method, arm.bits, arm.format, arm.scheme), arm)
    return {case: _begun(dataclasses.replace(arm, evaluation=NOTHING, merge=BESIDE)) for case, arm in found.items()}


def _begun(arm: Arm) -> Arm:
    """With a rate for the grid, where one is learned."""
    if not find(arm.method).trains_grid(arm.scheme):
        return arm
    rate = rate_of(arm)
    return with_rate(arm, dataclasses.replace(rate, grid_rate=rate.grid_rate or GRID_RATE))


def rate_of(arm: Arm) -> Rate:
    """The rates that an arm trains with."""
    assert arm.budget is not None
    return Rate(arm.budget.learning_rate, arm.budget.grid_rate)


def with_rate(arm: Arm, rate: Rate) -> Arm:
    part = "training" if arm.training else "tuning"
    own = dataclasses.replace(getattr(arm, part), learning_rate=rate.learning_rate, grid_rate=rate.grid_rate)
    return dataclasses.replace(arm, **{part: own})


def validation_loss(record: Record) -> float:
    """The last point of its curve; infinity where it diverged."""
    loss = record.curve[-1]["loss"] if record.finished and record.curve else None
    return math.inf if loss is None or not math.isfinite(loss) else loss


def search(
    arms: Sequence[Arm],
    results: str | Path,
    jobs: int = 1,
    told: Callable[[str, Rate], None] = lambda case, rate: None,
    until: float = math.inf,
) -> tuple[dict[str, Rate], list[Record]]:
    """The rate of least validation loss for each setting of `arms`, and the records of all that were tried.

    From the arm's own rate upwards by FACTOR while the loss falls, else downwards; where a grid is learned, its rate in
    the same way after that. Every method, width and grid is searched alike, each arm with its whole budget. What is
    tried is kept as records: a search that is stopped goes on, and one that is done costs nothing.
    until: the time (as time.time has it) after which nothing further is tried; then the settings that are not done have
    no rate.
    """
    store = Store(results)
    walks = {case: _walk(arm) for case, arm in cases(arms).items()}
    asked = {case: next(walk) for case, walk in walks.items()}
    chosen, records = {}, {}
    while asked:
        tried = sorted(asked.values(), key=planned_work, reverse=True)
        schedule.compute(schedule.missing_arms(tried, store), results, jobs=jobs, until=until)
        if schedule.missing_arms(tried, store):
            break
        for record in schedule.run(tried, results):
            records[record.key] = record
        for case, arm in list(asked.items()):
            try:
                asked[case] = walks[case].send(validation_loss(records[arm_key(arm)]))
            except StopIteration as end:
                chosen[case] = end.value
                told(case, end.value)
                del asked[case]
    return chosen, list(records.values())


def _walk(arm: Arm) -> Generator[Arm, float, Rate]:
    """Asks for arms, is sent their losses, and ends with the rate of the least."""
    losses: dict[Rate, float] = {}
    best = rate_of(arm)
    losses[best] = yield with_rate(arm, best)
    for field in ("learning_rate", *(["grid_rate"] if best.grid_rate is not None else [])):
        start = best
        for factor in (FACTOR, 1 / FACTOR):
            for _ in range(MOST):
                rate = dataclasses.replace(best, **{field: float(f"{getattr(best, field) * factor:.2g}")})
                if rate.grid_rate is not None and rate.grid_rate >= 1:
                    break
                losses[rate] = yield with_rate(arm, rate)
                if not losses[rate] < losses[best]:
                    break
                best = rate
            if best != start:
                break
    return best


def cost(searched: Sequence[Arm], arms: Sequence[Arm], results: str | Path) -> float:
    """What a search for `searched` takes at the least, three rates each and two more for a grid, without what is there
    already: a share of the planned work of `arms`."""
    store = Store(results)
    work = 0
    for arm in searched:
        if store.find(arm_key(arm)) is None:
            work += (3 + 2 * find(arm.method).trains_grid(arm.scheme)) * planned_work(arm)
    return work / max(1, sum(map(planned_work, dict.fromkeys(arms))))
