"""In which order arms are carried out, by how many processes, and that each is carried out once."""

import contextlib
import gc
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout

from studylib.config import MAX_JOBS, Arm, check_whole, listed, remove, tell
from studylib.methods import find, title
from studylib.study import helpers
from studylib.study.machine import keep_freed_memory
from studylib.study.pace import Clock, Pace, planned_work
from studylib.study.records import ALL, COMPUTE, MISSING, NEW, REFERENCE, Record, Store, arm_key, read_records
from studylib.study.run import carry_out, check, data_folder, data_lock

GAPS = 3  # arms that the reference lacks, by name


def check_jobs(jobs: int) -> None:
    """ValueError for a number of arms computed at a time that is not a whole number from 1 to MAX_JOBS."""
    check_whole("jobs", jobs, 1, MAX_JOBS)


def run(
    arms: Sequence[Arm], results: str | Path, keep_checkpoints: bool = False, jobs: int = 1, compute: str = MISSING
) -> list[Record]:
    """The records of `arms`, in their order: loaded from results/records or from the reference results where present,
    computed and saved otherwise, those that take longest first, so that all jobs have work to the end.

    Shows one progress bar over the missing arms with an estimate of the time left. Killed at any point, the next call
    goes on: finished records are kept, generated data and training continue from their last batch and checkpoint.
    Two processes may work on the same folder; each arm is computed by one of them.
    keep_checkpoints: leave the end of each training (12 bytes a parameter) in results/checkpoints, from where an arm
    with more steps (Budget.extended_from) goes on; without, such an arm trains its first part again, to the same end.
    jobs: arms computed at a time, each in a process of its own with its share of the threads; memory grows with them.
    Arms of methods that are registered from outside this package are computed in this process.
    compute: "missing", as said; "all" does not look at the reference; "new" leaves out what the reference lacks of its
    own model and budget, and a line says so: a notebook that is opened to be read computes nothing.
    Raises ValueError for an arm that cannot be run, before anything is computed, and RecordError for a results folder
    that is not writable, or a record that may not be read.
    """
    check_jobs(jobs)
    if compute not in COMPUTE:
        raise ValueError(f"compute: {compute!r} is not allowed; use {', '.join(COMPUTE)}")
    store = Store(results, None if compute == ALL else REFERENCE)
    if compute == NEW:
        arms = _without_gaps(arms, store)
    missing = sorted(missing_arms(arms, store), key=planned_work, reverse=True)
    there = _of_arms(set(arms).difference(missing), store)
    if borrowed := sum(store.find(record.key) is None for record in there):
        rest = f"{len(missing)} are computed" if missing else "nothing is computed"
        print(f"The reference results hold the records of {borrowed} of {len(set(arms))} arms; {rest}.")
    compute_arms(missing, results, keep_checkpoints, jobs, pace=Pace(there))
    return _of_arms(arms, store)


def _without_gaps(arms: Sequence[Arm], store: Store) -> list[Arm]:
    """The arms without those that the reference could have, by its model and evaluations, and lacks."""
    lacking = {arm for arm in arms if store.load(arm_key(arm)) is None}
    covered = {(own.arm.model, own.arm.evaluation) for own in read_records(REFERENCE / "records")} if lacking else set()
    asked = [arm for arm in dict.fromkeys(arms) if arm in lacking and not getattr(arm.data, "usual", False)]
    gaps = [arm for arm in asked if (arm.model, arm.evaluation) in covered]
    if gaps:
        named = listed([title(arm) for arm in gaps[:GAPS]] + [f"{len(gaps) - GAPS} more"] * (len(gaps) > GAPS))
        print(f'{len(gaps)} arms are not in the reference results and are left out: {named}. compute = "{MISSING}" '
              "computes them.")  # fmt: skip
    return [arm for arm in arms if arm not in gaps]


def compute_arms(
    missing: Sequence[Arm],
    results: str | Path,
    keep_checkpoints: bool = False,
    jobs: int = 1,
    next_arms: Callable[[list[Arm]], list[Arm]] = lambda waiting: waiting,
    until: float = math.inf,
    pace: Pace | None = None,
) -> None:
    """Carry out arms in the order in which they are given, as `run` does.

    next_arms: given what waits, first of all and after each arm of this process, it says what of that comes now, in
    which order; helper processes, which finish others meanwhile, take it on. until: the time (as time.time has it)
    after which no further arm is begun. pace: what is known of how long arms take.
    """
    store = Store(results)
    shared = [arm for arm in missing if _is_known_elsewhere(arm)]
    further = min(jobs - 1, len(shared), max(0, len(missing) - 1))
    turns = helpers.Turns(len(shared))
    place = {arm: at for at, arm in enumerate(shared)}

    def then(waiting: list[Arm]) -> list[Arm]:
        chosen = next_arms(waiting)
        turns.set(place[arm] for arm in chosen if arm in place)
        return chosen

    turn = then(list(missing))
    with (
        _sharing_threads(further, turns, shared, results, keep_checkpoints, until),
        Clock(pace or Pace(), further + 1, hidden=not missing) as clock,
        contextlib.ExitStack() as afterwards,
    ):
        afterwards.callback(gc.unfreeze)
        _carry_out_all(missing, turn, store, keep_checkpoints, until, then, clock)


def missing_arms(arms: Sequence[Arm], store: Store) -> list[Arm]:
    """Those without a record, each once and checked."""
    missing = [arm for arm in dict.fromkeys(arms) if store.load(arm_key(arm)) is None]
    for arm in missing:
        check(arm)
    return missing


def _of_arms(arms: Iterable[Arm], store: Store) -> list[Record]:
    """Their records, as they name their files now: what was run under another path is the same by its contents."""
    found = []
    for arm in arms:
        record = store.load(arm_key(arm))
        assert record is not None
        found.append(replace(record, arm=arm))
    return found


def _is_known_elsewhere(arm: Arm) -> bool:
    """Whether another process has the arm's method: one that was registered in a notebook or script is in this only."""
    return type(find(arm.method)).__module__.partition(".")[0] == __name__.partition(".")[0]


@contextlib.contextmanager
def _sharing_threads(count: int, turns: helpers.Turns, arms: Sequence[Arm], *where: Any) -> Iterator[None]:
    """Inside, so many further processes work on the same arms; what they fail at is left to this one."""
    threads = torch.get_num_threads()
    share = max(1, threads // (count + 1))
    torch.set_num_threads(share)
    try:
        with helpers.working(count, _help, share, turns, arms, *where) as processes:
            yield
            for process in processes:
                process.join()
    finally:
        torch.set_num_threads(threads)


def _help(
    threads: int, turns: helpers.Turns, arms: Sequence[Arm], results: str | Path, keep_checkpoints: bool, until: float
) -> None:
    torch.set_num_threads(threads)

    def then(waiting: list[Arm]) -> list[Arm]:
        left = set(waiting)
        return [arms[at] for at in turns.get() if arms[at] in left]

    try:
        _carry_out_all(arms, then(list(arms)), Store(results), keep_checkpoints, until, then)
    except (OSError, ValueError) as error:
        tell(f"a helper process stops: {error}")


def _carry_out_all(
    arms: Sequence[Arm],
    turn: list[Arm],
    store: Store,
    keep_checkpoints: bool,
    until: float,
    then: Callable[[list[Arm]], list[Arm]],
    clock: Clock | None = None,
) -> None:
    """Those of `arms` whose turn it is, each once: first those that no other process is working on.

    turn: what comes now; then: what does afterwards, of those that wait.
    """
    keep_freed_memory()
    clock = clock or Clock(Pace(), hidden=True)
    waiting = list(arms)
    while turn and time.time() < until:
        with _locked(turn, store) as arm:
            waiting.remove(arm)
            record = store.load(arm_key(arm))
            if record is None:
                clock.begin(arm, [other for other in turn if other != arm and store.find(arm_key(other)) is None])
                record = carry_out(arm, store, keep_checkpoints, clock.progress)
                _save(record, store)
                clock.end(record)
                gc.freeze()  # what is left are libraries, half a second to walk through each time anew
                if not keep_checkpoints:
                    shutil.rmtree(store.checkpoint_folder(arm_key(arm)), ignore_errors=True)
            else:
                clock.pace.learn(record)
        turn = then(waiting)


def _save(record: Record, store: Store) -> None:
    """Keep the record; where there is no room, in the place of its model, which can be made again."""
    try:
        store.save(record)
    except OSError:
        model = store.model_file(record.key)
        if not model.exists():
            raise
        remove(model)
        store.save(record)


@contextlib.contextmanager
def _locked(arms: Sequence[Arm], store: Store) -> Iterator[Arm]:
    """The first arm that no other process holds, held inside; where there is none, the first, once it is let go.

    Arms whose data another process is making just now come last.
    """

    def in_turn() -> Iterator[tuple[Arm, bool]]:  # no further than is needed: arms are many
        late = []
        for arm in arms:
            if arm.data is not None and store.is_held(data_lock(data_folder(arm, store))):
                late.append(arm)
            else:
                yield arm, False
        yield from ((arm, False) for arm in late)
        yield arms[0], True

    with contextlib.ExitStack() as held:
        for arm, wait in in_turn():
            try:
                held.enter_context(store.lock(arm_key(arm)).acquire(blocking=wait))
            except Timeout:
                continue
            yield arm
            return
