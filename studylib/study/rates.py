"""The search for learning rates: one way for every method, on validation text that is neither trained on nor scored."""

import dataclasses
import math
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from studylib.config import BESIDE, NOTHING, Arm, Rate, Training, Tuning
from studylib.methods import Setting, find, rate_case
from studylib.study import schedule
from studylib.study.pace import planned_work
from studylib.study.records import ALL, Record, Store, arm_key

FACTOR = math.sqrt(10)  # from one rate that is tried to the next
GRID_RATE = 0.003  # that the search for a grid's rate begins with where a budget has none: a share of its scales a step
MOST = 8  # rates that are tried in one direction: four decades
USUAL, FURTHER = 1.25, 1.6  # trainings' worth that a search took for the default model, and that of a grid besides
BEHIND = 0.02  # of the loss after a quarter with the best rate so far: a rate that is further behind is given up there


def cases(arms: Sequence[Arm]) -> dict[str, Arm]:
    """For each setting whose rate is to be chosen, the arm that is trained for it: the plainest of the least seed,
    scored on nothing."""
    found: dict[str, Arm] = {}
    for arm in sorted((arm for arm in arms if arm.budget), key=lambda arm: (len(Setting.of(arm).changes), arm.seed)):
        found.setdefault(rate_case(arm.method, arm.bits, arm.format, arm.scheme), arm)
    return {
        case: _begun(dataclasses.replace(arm, evaluation=NOTHING, merge=BESIDE, merging=None))
        for case, arm in found.items()
    }


def _begun(arm: Arm) -> Arm:
    """As it is before it is extended, with a rate for the grid where one is learned."""
    if longer := _budget(arm).extended_from:
        arm = _with(arm, steps=longer[0], extended_from=())
    if not find(arm.method).trains_grid(arm.scheme):
        return arm
    rate = rate_of(arm)
    return with_rate(arm, dataclasses.replace(rate, grid_rate=rate.grid_rate or GRID_RATE))


def rate_of(arm: Arm) -> Rate:
    """The rates that an arm trains with."""
    return Rate(_budget(arm).learning_rate, _budget(arm).grid_rate)


def _budget(arm: Arm) -> Training | Tuning:
    assert arm.budget is not None
    return arm.budget


def with_rate(arm: Arm, rate: Rate) -> Arm:
    return _with(arm, learning_rate=rate.learning_rate, grid_rate=rate.grid_rate)


def _with(arm: Arm, **changes: Any) -> Arm:
    """The arm with other fields in its budget."""
    part = "training" if arm.training else "tuning"
    return dataclasses.replace(arm, **{part: dataclasses.replace(getattr(arm, part), **changes)})


def validation_losses(record: Record) -> list[float]:
    """Its curve: the held-out loss before training and at each point after; infinity from where it diverged."""
    losses = [math.inf if point["loss"] is None else point["loss"] for point in record.curve]
    return losses if record.finished else [*losses, math.inf]


def validation_loss(record: Record) -> float | None:
    """The last point of its curve; infinity where it diverged, None where it was given up before its end."""
    if record.finished and record.curve[-1]["step"] != _budget(record.arm).last:
        return None
    return validation_losses(record)[-1]


def search(
    arms: Sequence[Arm],
    results: str | Path,
    jobs: int = 1,
    told: Callable[[str, Rate], None] = lambda case, rate: None,
    until: float = math.inf,
    scheduler: str = "",
) -> tuple[dict[str, Rate], list[Record]]:
    """The rate of least validation loss half-way for each setting of `arms`, and the records of all that were tried.

    From the arm's own rate upwards by FACTOR while the loss falls, else downwards; where a grid is learned, its rate in
    the same way after that, or alone where nothing else is trained. Each training follows its whole schedule and is
    broken off half-way; one whose loss after a quarter is more than BEHIND above that of the best so far is given up
    there (after successive halving: Jamieson & Talwalkar 2016). Every method, width and grid is searched alike. What is
    tried is kept as records: a search that is stopped goes on, and one that is done costs nothing.
    until: the time (as time.time has it) after which nothing further is tried; then the settings that are not done have
    no rate. jobs, scheduler: as of schedule.run.
    """
    store = Store(results)
    walks = {case: _walk(arm) for case, arm in cases(arms).items()}
    asked = {case: next(walk) for case, walk in walks.items()}
    chosen, records = {}, {}
    while asked:
        tried = sorted(asked.values(), key=planned_work, reverse=True)
        missing = schedule.missing_arms(tried, store, bool(scheduler))
        schedule.compute_arms(missing, results, jobs=jobs, until=until, scheduler=scheduler)
        if schedule.missing_arms(tried, store, bool(scheduler)):
            break
        for record in schedule.run(tried, results, compute=ALL):
            records[record.key] = record
        for case, arm in list(asked.items()):
            try:
                asked[case] = walks[case].send(validation_losses(records[arm_key(arm)]))
            except StopIteration as end:
                chosen[case] = end.value
                told(case, end.value)
                del asked[case]
    return chosen, list(records.values())


def _half(arm: Arm, limit: float | None = None) -> Arm:
    """The arm with its training broken off half-way, and given up after a quarter where its loss is above `limit`."""
    steps = _budget(arm).steps
    return _with(arm, stop=(steps + 1) // 2, limit=limit) if steps > 1 else arm


def _walk(arm: Arm) -> Generator[Arm, list[float], Rate]:
    """Asks for arms, is sent the losses of their curves, and ends with the rate of the least at their end."""
    best = rate_of(arm)
    losses = yield _half(arm)
    weights = [] if find(arm.method).grid_alone else ["learning_rate"]
    for field in (*weights, *(["grid_rate"] if best.grid_rate is not None else [])):
        start = best
        for factor in (FACTOR, 1 / FACTOR):
            for _ in range(MOST):
                rate = dataclasses.replace(best, **{field: float(f"{getattr(best, field) * factor:.2g}")})
                if rate.grid_rate is not None and rate.grid_rate >= 1:
                    break
                limit = losses[1] * (1 + BEHIND) if math.isfinite(losses[-1]) else None
                own = yield _half(with_rate(arm, rate), limit)
                if len(own) < len(losses) or not own[-1] < losses[-1]:
                    break
                best, losses = rate, own
            if best != start:
                break
    return best


def cost(searched: Sequence[Arm], arms: Sequence[Arm], results: str | Path) -> float:
    """What a search for `searched` takes about, without what is there: a share of the planned work of `arms`."""
    store = Store(results)
    work = 0.0
    for arm in searched:
        if store.find(arm_key(_half(arm))) is None:
            method = find(arm.method)
            trainings = USUAL * (not method.grid_alone) + FURTHER * method.trains_grid(arm.scheme)
            work += trainings * planned_work(arm)
    return work / max(1, sum(map(planned_work, dict.fromkeys(arms))))
