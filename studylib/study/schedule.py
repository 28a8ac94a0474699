"""In which order arms are carried out, in this process or by workers, and that each is carried out once.

What computes (studylib.study.run, and torch) is imported where something is computed: records that are there are read
without it.
"""

import contextlib
import gc
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import Timeout

from studylib.config import MEANINGLESS, NOTHING, Arm, check_jobs, check_scheduler, is_smoke, listed
from studylib.methods import find, title
from studylib.study import launch
from studylib.study.pace import Clock, Pace, planned_work, waited_for
from studylib.study.records import (
    ALL,
    COMPUTE,
    MISSING,
    NEW,
    REFERENCE,
    Record,
    Store,
    arm_key,
    is_installed,
    read_records,
)

if TYPE_CHECKING:
    from studylib.study.cluster import Crew

GAPS = 3  # arms that the reference lacks, by name
WATCHED = 0.5  # seconds after which it is looked again how workers are
LOST = 300  # seconds after which no worker is waited for any longer


def run(
    arms: Sequence[Arm],
    results: str | Path,
    keep_checkpoints: bool = False,
    jobs: int = 1,
    compute: str = MISSING,
    scheduler: str = "",
) -> list[Record]:
    """The records of `arms`, in their order: loaded from results/records or from the reference results where present,
    computed and saved otherwise, those that take longest first, so that all jobs have work to the end.

    Shows one progress bar over the missing arms with an estimate of the time left. Killed at any point, the next call
    goes on: finished records are kept, generated data and training continue from their last batch and checkpoint.
    Two processes may work on the same folder; each arm is computed by one of them.
    keep_checkpoints: leave the end of each training (12 bytes a parameter) in results/checkpoints, from where an arm
    with more steps (Budget.extended_from) goes on; without, such an arm trains its first part again, to the same end.
    jobs: arms computed at a time, each in a process of its own with its share of the threads; memory grows with them.
    scheduler: address or scheduler file of a dask cluster, whose workers compute them instead, one each at a time
    (docs/scaling.md). Arms of methods that are registered from outside this package are computed in this process.
    compute: "missing", as said; "all" does not look at the reference; "new" leaves out what the reference lacks of its
    own model and budget, and a line says so: a notebook that is opened to be read computes nothing.
    Raises ValueError for an arm that cannot be run, before anything is computed, and RecordError for a results folder
    that is not writable, or a record that may not be read.
    """
    check_jobs(jobs)
    check_scheduler(scheduler)
    if is_smoke(arm.evaluation for arm in arms):
        print(MEANINGLESS)
    if compute not in COMPUTE:
        raise ValueError(f"compute: {compute!r} is not allowed; use {', '.join(COMPUTE)}")
    store = Store(results, None if compute == ALL else REFERENCE)
    if compute == NEW:
        arms = _without_gaps(arms, store)
    there = {arm: record for arm in dict.fromkeys(arms) if (record := store.load(arm_key(arm))) is not None}
    missing = missing_arms([arm for arm in arms if arm not in there], store, bool(scheduler))
    if borrowed := sum(store.find(record.key) is None for record in there.values()):
        rest = f"{len(missing)} are computed" if missing else "nothing is computed"
        print(f"The reference results hold the records of {borrowed} of {len(set(arms))} arms; {rest}.")
    if missing:
        missing.sort(key=planned_work, reverse=True)
        compute_arms(missing, results, keep_checkpoints, jobs, pace=Pace(there.values()), scheduler=scheduler)
    there |= {arm: _there(arm, store) for arm in missing}
    # They name their files as they do now: what was run under another path is the same by its contents.
    return [replace(there[arm], arm=arm) for arm in arms]


def _there(arm: Arm, store: Store) -> Record:
    record = store.load(arm_key(arm))
    assert record is not None
    return record


def _without_gaps(arms: Sequence[Arm], store: Store) -> list[Arm]:
    """The arms without those that the reference could have, by its model and evaluations, and lacks."""
    lacking = {arm for arm in arms if store.load(arm_key(arm)) is None}
    covered = {(own.arm.model, own.arm.evaluation) for own in read_records(REFERENCE / "records")} if lacking else set()
    asked = [arm for arm in dict.fromkeys(arms) if arm in lacking and not getattr(arm.data, "usual", False)]
    known = {model for model, _ in covered}
    gaps = [
        arm
        for arm in asked
        if (arm.model, arm.evaluation) in covered or (arm.evaluation == NOTHING and arm.model in known)
    ]
    if gaps:
        named = listed([title(arm) for arm in gaps], GAPS)
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
    scheduler: str = "",
) -> bool:
    """Carry out arms in the order in which they are given, as `run` does; False where some wait for want of time.

    next_arms: given what has no record, first of all and after each arm, it says what of that comes now, in which
    order. until: the time (as time.time has it) by which all is to be done: an arm that takes longer is not begun,
    unless it is the first, so that each call gets further. pace: what is known of how long arms take.
    """
    if jobs > 1 and not scheduler and os.environ.get(launch.LAUNCH):
        raise ValueError(f"jobs: {jobs} do not go with {launch.LAUNCH}, which gives one arm the machine; use 1")
    store, pace = Store(results), pace or Pace()
    if jobs > 1 or scheduler:  # no worker is started for what another run has computed meanwhile
        missing = [arm for arm in missing if not _is_there(arm, store, pace)]
    shared = [arm for arm in missing if is_installed(find(arm.method))]
    jobs = min(jobs, len(missing))
    if not shared or (jobs < 2 and not scheduler):
        with Clock(pace, hidden=not missing) as clock, contextlib.ExitStack() as afterwards:
            afterwards.callback(gc.unfreeze)
            return _carry_out_all(missing, store, keep_checkpoints, until, next_arms, clock)
    import torch

    from studylib.study import cluster  # of which dask is imported

    with contextlib.ExitStack() as afterwards:
        if scheduler:
            crew = afterwards.enter_context(cluster.of_scheduler(scheduler, store, keep_checkpoints, shared))
        else:
            threads = torch.get_num_threads()
            torch.set_num_threads(max(1, threads // jobs))
            afterwards.callback(torch.set_num_threads, threads)
            count = min(jobs, len(shared))
            crew = afterwards.enter_context(
                cluster.of_this_machine(count, torch.get_num_threads(), store, keep_checkpoints, shared)
            )
        clock = afterwards.enter_context(Clock(pace, jobs if not scheduler else len(crew.has)))
        most = 0 if scheduler else jobs
        return _Shares(missing, crew, most, keep_checkpoints, until, next_arms, clock).carry_out()


def missing_arms(arms: Sequence[Arm], store: Store, elsewhere: bool = False) -> list[Arm]:
    """Those without a record, each once and checked; elsewhere: not for what this machine is."""
    missing = [arm for arm in dict.fromkeys(arms) if store.load(arm_key(arm)) is None]
    if missing:
        from studylib.study.run import check

        for arm in missing:
            check(arm, elsewhere)
    return missing


def _is_there(arm: Arm, store: Store, pace: Pace) -> bool:
    """Whether another process has computed it; then the pace has learnt of it."""
    key = arm_key(arm)
    record = store.load(key) if store.find(key) else None
    if record is not None:
        pace.learn(record)
    return record is not None


def _in_time(arms: Iterable[Arm], until: float, pace: Pace, begun: bool) -> Iterator[Arm]:
    """Those that will be done until then; where none was begun yet, all, if there is any time."""
    left = until - time.time()
    for arm in arms if left > 0 else ():
        if not begun or left == math.inf or pace.total([arm]) <= left:
            yield arm


class _Shares:
    """Arms that workers and this process share: it watches them, and computes those whose methods it alone has.

    most: arms at a time, those of this process included; 0: as many as there are workers.
    """

    def __init__(
        self,
        missing: Sequence[Arm],
        crew: "Crew",
        most: int,
        keep_checkpoints: bool,
        until: float,
        then: Callable[[list[Arm]], list[Arm]],
        clock: Clock,
    ):
        self.crew, self.most, self.keep_checkpoints, self.until, self.then = crew, most, keep_checkpoints, until, then
        self.clock, self.store = clock, crew.store
        self.own = {arm for arm in missing if not is_installed(find(arm.method))}
        self.left = dict.fromkeys(missing)  # that have no record, in their order
        self.turn: list[Arm] = []
        self.any_begun = False

    def carry_out(self) -> bool:
        """All of them, each once; False where some wait for want of time. ValueError at the end where some were given
        up, and where no worker is left."""
        self._order()
        idle = time.monotonic()  # since then nothing is computed
        while True:
            self._give()
            here = next((arm for arm in self._waiting() if arm in self.own), None)
            if here is not None and self._room():
                self._carry_out_here(here)
                idle = time.monotonic()
            elif self.crew.busy:
                if self._collect(WATCHED):
                    self._give()  # before it is asked what comes then, which takes a while
                    self._order()
                idle = time.monotonic()
            elif not (waiting := list(self._waiting())):
                break
            elif time.monotonic() > idle + LOST:
                raise ValueError(f"scheduler: no worker is left for {len(waiting)} arms; start one, and run it again")
            else:
                time.sleep(WATCHED)
        if self.crew.given_up:
            raise ValueError(f"workers died of {listed(list(map(title, self.crew.given_up)))}; all other arms are done")
        return not any(arm in self.left for arm in self.turn)

    def _order(self) -> None:
        self.turn = self.then(list(self.left))
        self.clock.watch(self.crew.begun, list(self._waiting()))

    def _waiting(self) -> Iterator[Arm]:
        """What comes next, in its order."""
        for arm in _in_time(self.turn, self.until, self.clock.pace, self.any_begun):
            if arm in self.left and arm not in self.crew.begun and arm not in self.crew.given_up:
                yield arm

    def _apart(self) -> Iterator[Arm]:
        """Of what comes next, workers' arms: last those that would wait for text, integers or an adapter that another
        arm is making."""
        made = set().union(*map(waited_for, self.crew.begun)) - self.clock.pace.made
        late = []
        for arm in self._waiting():
            if arm not in self.own:
                if made and not made.isdisjoint(waited_for(arm)):
                    late.append(arm)
                else:
                    yield arm
        yield from late

    def _room(self) -> bool:
        return not self.most or len(self.crew.busy) < self.most

    def _give(self, here: int = 0) -> None:
        """Each worker without an arm gets the first that waits; here: arms that this process computes meanwhile."""
        for worker in self.crew.free():
            while not self.most or len(self.crew.busy) + here < self.most:
                arm = self.crew.first_for(worker, self._apart())
                if arm is None:
                    break
                if not _is_there(arm, self.store, self.clock.pace):
                    self.crew.give(worker, arm)
                    self.any_begun = True
                    break
                self.left.pop(arm)

    def _collect(self, seconds: float) -> bool:
        """Wait so long for arms that workers are done with; whether there were some."""
        done = self.crew.ended(seconds)
        for arm in done:
            begun, record = self.crew.begun.pop(arm), self.store.load(arm_key(arm))
            if record is not None:  # else it was damaged just now, and waits again
                self.clock.learn(record, begun)
                self.left.pop(arm)
        self.clock.watch(self.crew.begun)
        return bool(done)

    def _carry_out_here(self, arm: Arm) -> None:
        from studylib.study.machine import keep_freed_memory
        from studylib.study.run import carry_out, keep

        def progress(phase: str, tokens: int) -> None:
            self.clock.progress(phase, tokens)
            self._collect(0)
            self._give(here=1)

        keep_freed_memory()
        with self.store.lock(arm_key(arm)):
            if not _is_there(arm, self.store, self.clock.pace):
                self.any_begun = True
                self.clock.begin(arm, [other for other in self._waiting() if other != arm])
                record = carry_out(arm, self.store, self.keep_checkpoints, progress)
                keep(record, self.store, self.keep_checkpoints)
                self.clock.end(record)
            self.left.pop(arm)
        self._order()


def _carry_out_all(
    arms: Sequence[Arm],
    store: Store,
    keep_checkpoints: bool,
    until: float,
    then: Callable[[list[Arm]], list[Arm]],
    clock: Clock,
) -> bool:
    """In this process, those of `arms` whose turn it is, each once: first those that no other process is working on;
    False where some wait for want of time.

    then: what comes next, of those that wait.
    """
    from studylib.study.machine import keep_freed_memory
    from studylib.study.run import carry_out, keep

    keep_freed_memory()
    waiting, begun = list(arms), False
    turn = then(list(arms))
    while now := list(_in_time(turn, until, clock.pace, begun)):
        with _locked(now, store) as arm:
            waiting.remove(arm)
            record = store.load(arm_key(arm))
            if record is None:
                clock.begin(arm, [other for other in now if other != arm and store.find(arm_key(other)) is None])
                begun = True
                record = carry_out(arm, store, keep_checkpoints, clock.progress)
                keep(record, store, keep_checkpoints)
                clock.end(record)
                gc.freeze()  # what is left are libraries, half a second to walk through each time anew
            else:
                clock.pace.learn(record)
        turn = then(waiting)
    return not turn


@contextlib.contextmanager
def _locked(arms: Sequence[Arm], store: Store) -> Iterator[Arm]:
    """The first arm that no other process holds, held inside; where there is none, the first, once it is let go.

    Arms whose data another process is making just now come last.
    """
    from studylib.study.run import data_folder, data_lock

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
