"""Workers of dask.distributed, each of which computes one arm at a time: processes of this machine, or those of a
scheduler that is there. dask starts, watches and restarts them; who computes what is decided here, arm by arm, so that
a new order of the arms takes effect at once."""

import contextlib
import json
import logging
import multiprocessing
import multiprocessing.resource_tracker
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import dask
import psutil
from distributed import Client, Future, KilledWorker, LocalCluster
from distributed.utils import get_mp_context

from studylib.config import Arm, tell
from studylib.data import device, gpu_count
from studylib.methods import title
from studylib.study import workers
from studylib.study.needs import ClusterError, Has, check_needs, fits, taken
from studylib.study.records import Store, arm_key, contents
from studylib.study.run import data_folder, data_lock, is_made

PACKAGE = "studylib"
PATIENCE = 10  # seconds in which a scheduler answers, and in which a record that another machine wrote is seen
LOOK = 1.0  # seconds after which the scheduler is asked anew which workers there are
DEATHS = 3  # workers that may die of an arm
# dask's own would set the number of threads. With one arena a thread gets memory as a process of its own does.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
SETTINGS: dict[str, Any] = {
    "distributed.nanny.pre-spawn-environ": ENVIRONMENT,
    "distributed.worker.profile.enabled": False,  # it would look at the stack a hundred times a second
    **{f"distributed.{part}.http.routes": [] for part in ("scheduler", "worker", "nanny")},  # nobody asks for pages
}
# What workers work with takes ten seconds to import. One process does that for all of them, and they are its forks.
LOADED = ("distributed", *(f"{PACKAGE}.{name}" for name in ("study.run", "evaluate.scores", "train.loop")))
FORKED, ANEW = "forkserver", "spawn"

# What is to be told is told here, and dask's threads log beyond the end of a cluster.
logging.getLogger("distributed").setLevel(logging.CRITICAL)


class Crew:
    """Workers by address, what each has, and the arm that it computes.

    threads: of torch, of each; 0: as many as it was started with. asked: what workers of other machines are held
    against, None for those of this one.
    """

    def __init__(self, client: Client, store: Store, keep: bool, threads: int = 0, asked: workers.Asked | None = None):
        self.client, self.store, self.keep, self.threads, self.asked = client, store, keep, threads, asked
        self.has: dict[str, Has] = {}
        self.refused: dict[str, str] = {}
        self.busy: dict[str, tuple[Arm, Future]] = {}
        self.begun: dict[Arm, float] = {}  # by arm that is computed, time.monotonic
        self.deaths: Counter[Arm] = Counter()
        self.given_up: list[Arm] = []
        self._ended: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._count, self._looked = 0, -LOOK
        self.look()

    def look(self) -> None:
        """Learn which workers there are now: those that came are examined, the arms of those that went are free."""
        if time.monotonic() < self._looked + LOOK:
            return
        there = set(_identity(self.client)["workers"])
        for address in (self.has.keys() | self.refused.keys()) - there:
            self.has.pop(address, None), self.refused.pop(address, None)
        for address in self.busy.keys() - there:
            self._lost(address)
        new = sorted(there - self.has.keys() - self.refused.keys())
        for address, found in self._examined(new):
            if isinstance(found, str):
                self.refused[address] = f"worker {address} {found}"
            else:
                self.has[address] = found
        self._looked = time.monotonic()

    def _examined(self, addresses: Sequence[str]) -> Iterator[tuple[str, Has | str]]:
        if not addresses:
            return
        if self.asked is None:
            yield from ((address, _here()) for address in addresses)
            return
        here, good = version(PACKAGE), []
        found = self.client.run(version, PACKAGE, workers=list(addresses), on_error="return")
        for address, there in found.items():
            if isinstance(there, PackageNotFoundError):
                yield address, f"has no {PACKAGE}; install version {here} there"
            elif isinstance(there, Exception):
                yield address, f"does not answer ({_first_line(there)})"
            elif there != here:
                yield address, f"has {PACKAGE} {there}, and not {here}; install the same version there"
            else:
                good.append(address)
        found = self.client.run(workers.examine, self.asked, workers=good, on_error="return") if good else {}
        for address, there in found.items():
            failed = isinstance(there, Exception)
            yield address, f"cannot import this {PACKAGE} ({_first_line(there)})" if failed else there

    def free(self) -> list[str]:
        """Workers without an arm, those with the least first, so that what others have is left for what needs it."""
        self.look()
        own = [address for address in self.has if address not in self.busy]
        return sorted(own, key=lambda address: (self.has[address].gpus, self.has[address].memory))

    def first_for(self, worker: str, arms: Iterable[Arm]) -> Arm | None:
        """The first of them that the worker has enough for, and whose text nobody is making just now; such arms come
        last."""
        late = None
        for arm in arms:
            if fits(arm, self.has[worker], self.has.values()):
                if not self._waits(arm):
                    return arm
                late = late or arm
        return late

    def _waits(self, arm: Arm) -> bool:
        if self.asked is None and self.store.is_held(arm_key(arm)):  # by another run
            return True
        if arm.data is None:
            return False
        folder = data_folder(arm, self.store)
        sharing = any((own.model, own.data) == (arm.model, arm.data) for own, _ in self.busy.values())
        return (sharing and not is_made(folder)) or (self.asked is None and self.store.is_held(data_lock(folder)))

    def give(self, worker: str, arm: Arm) -> None:
        """Have the worker compute the arm."""
        self._count += 1
        key = arm_key(arm)
        future = self.client.submit(
            workers.carry_out,
            arm,
            key,
            self.store.folder.resolve(),
            self.keep,
            self.threads,
            self.asked is not None,
            key=f"arm-{key}-{self._count}-{os.getpid()}",
            workers=[worker],
            priority=-self._count,
            resources=taken(arm, self.has[worker]),
        )
        self.busy[worker], self.begun[arm] = (arm, future), time.monotonic()
        future.add_done_callback(self._ended.put)

    def ended(self, seconds: float) -> list[Arm]:
        """Arms that were computed, whose records are there; [] after so many seconds without. Raises what one failed
        with."""
        try:
            found = [self._ended.get(timeout=seconds)]
        except queue.Empty:
            self.look()
            return []
        while not self._ended.empty():
            found.append(self._ended.get())
        done = []
        for future in found:
            worker = next((worker for worker, (_, own) in self.busy.items() if own is future), None)
            if worker is None:  # it was lost, and this came afterwards
                continue
            arm = self.busy[worker][0]
            if future.status == "finished":
                del self.busy[worker]
                self._see(arm, worker)
                done.append(arm)
            elif future.status == "error" and not isinstance(error := future.exception(), KilledWorker):
                raise error
            else:
                self._lost(worker)
        return done

    def _see(self, arm: Arm, worker: str) -> None:
        """Wait until a record is seen here that another machine wrote. ValueError where it is not."""
        end = time.monotonic() + PATIENCE
        while self.store.find(arm_key(arm)) is None:
            if time.monotonic() > end:
                raise ValueError(
                    f"results: the record of {title(arm)} that worker {worker} wrote is not in {self.store.folder}; "
                    "share one folder under the same path"
                )
            time.sleep(0.1)

    def _lost(self, worker: str) -> None:
        arm, future = self.busy.pop(worker)
        future.cancel()
        del self.begun[arm]
        self.deaths[arm] += 1
        if self.deaths[arm] < DEATHS:
            tell(f"a worker died while it computed {title(arm)}; another one goes on with it")
        else:
            self.given_up.append(arm)
            tell(f"{title(arm)} is given up: {DEATHS} workers died while they computed it, perhaps for want of memory")

    def stop(self) -> None:
        """Let go of what is computed just now: workers of other machines stop at their next step."""
        with contextlib.suppress(Exception):
            self.client.cancel([future for _, future in self.busy.values()], force=True)


def _here() -> Has:
    return Has(psutil.virtual_memory().total, gpu_count())


@contextlib.contextmanager
def of_this_machine(count: int, threads: int, store: Store, keep: bool, arms: Sequence[Arm]) -> Iterator[Crew]:
    """Inside, so many processes are there, each for one arm at a time with so many threads; afterwards they are gone.

    They end with this process, however that ends: dask's workers watch a pipe to it. ClusterError, in one line, for an
    arm that needs what this machine has not.
    """
    check_needs(arms, [_here()])
    before, environ = multiprocessing.active_children(), dict(os.environ)
    # CUDA cannot be used in a fork, and the frameworks of other systems than Linux are not made for it.
    started = FORKED if sys.platform == "linux" and device().type != "cuda" else ANEW
    settings = SETTINGS | {"distributed.worker.multiprocessing-method": started}
    cluster: LocalCluster | None = None
    client: Client | None = None
    with tempfile.TemporaryDirectory(prefix="study-", ignore_cleanup_errors=True) as scratch, dask.config.set(settings):
        try:
            with _deaf_to_interrupts():
                get_mp_context().set_forkserver_preload(list(LOADED))  # after dask has set its own
                cluster = LocalCluster(
                    n_workers=count,
                    threads_per_worker=1,
                    memory_limit=0,  # else workers are stopped at a share of the memory, whatever they compute
                    dashboard_address="127.0.0.1:0",
                    scheduler_kwargs={"dashboard": False},
                    security=True,  # other users of this machine reach its ports as well
                    silence_logs=logging.CRITICAL,  # as this process is
                    local_directory=scratch,
                )
                client = Client(cluster, set_as_default=False)
            yield Crew(client, store, keep, threads)
        finally:
            for nanny in cluster.workers.values() if cluster else ():
                nanny.auto_restart = False
            for process in multiprocessing.active_children():
                if process not in before and process.pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
            with contextlib.suppress(Exception):
                if client:
                    client.close(timeout=PATIENCE)
                if cluster:
                    cluster.close(timeout=PATIENCE)
            for name in ENVIRONMENT:  # dask leaves them in this process
                os.environ.pop(name, None)
            os.environ.update(environ)


@contextlib.contextmanager
def of_scheduler(address: str, store: Store, keep: bool, arms: Sequence[Arm]) -> Iterator[Crew]:
    """Inside, the workers of the scheduler at an address, or in a scheduler file, are there for these arms.

    ClusterError, in one line, for a scheduler that does not answer or has no workers, for workers that lack something,
    and for an arm that needs what no worker has. What is computed when this ends is let go of.
    """
    probe = store.folder.resolve() / "locks" / f".seen-{os.getpid()}"
    named = {arm_key(arm): arm for arm in {tuple(contents(arm)): arm for arm in arms}.values() if contents(arm)}
    client = _connected(address)
    crew = None
    try:
        probe.touch()
        crew = Crew(client, store, keep, asked=workers.Asked(workers.versions(), probe, named))
        for reason in crew.refused.values():
            raise ClusterError(f"scheduler: {reason}")
        if not crew.has:
            raise ClusterError(f"scheduler: {address} has no workers; start one with `dask worker {address}`")
        check_needs(arms, crew.has.values())
        shown = "dashboard" in _identity(client)["services"]
        tell(f"{len(crew.has)} workers of {address}" + f"; dashboard: {client.dashboard_link}" * shown)
        yield crew
    finally:
        probe.unlink(missing_ok=True)
        if crew:
            crew.stop()
        with contextlib.suppress(Exception):
            client.close(timeout=PATIENCE)


def _connected(address: str) -> Client:
    """A client of the scheduler; ClusterError where it does not answer, or cannot compute with this package."""
    try:
        found = address if "://" in address else json.loads(Path(address).read_text())["address"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ClusterError(f"scheduler: {address} is no scheduler file, which `dask scheduler` writes") from error
    try:
        client = Client(found, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"scheduler: {address} does not answer within {PATIENCE} s; give one that does, or leave it out"
        ) from error
    here = version(PACKAGE)
    try:
        there: Any = client.run_on_scheduler(version, PACKAGE)
    except Exception:
        there = None
    if there != here:
        client.close(timeout=PATIENCE)
        raise ClusterError(
            f"scheduler: {address} has {PACKAGE} {there}, and not {here}; install the same version there"
        )
    return client


def _identity(client: Client) -> dict[str, Any]:
    """What the scheduler says of itself now, its "workers" by address; ClusterError where it is gone."""
    try:
        return client.sync(client.scheduler.identity, n_workers=-1)
    except (OSError, AttributeError) as error:
        raise ClusterError("scheduler: it answers no longer; when it does, the same command goes on") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started inside, or later by a thread that was, get no Ctrl-C, which goes to the whole group:
    this one stops them. What would interrupt this process meanwhile does so afterwards, whichever thread gets it; a
    second time does so at once."""
    late: list[int] = []

    def later(number: int, frame: Any) -> None:
        late.append(number)
        handler = handlers[signal.Signals(number)]
        if len(late) > 1 and callable(handler):
            handler(number, frame)

    here = threading.current_thread() is threading.main_thread()  # the only one that Python lets handle signals
    usual = {own: signal.getsignal(own) for own in (signal.SIGINT, signal.SIGTERM)} if here else {}
    handlers = {own: handler for own, handler in usual.items() if handler is not None}  # None: not Python's
    for own in handlers:
        signal.signal(own, later)
    masked = hasattr(signal, "pthread_sigmask")
    if masked:
        multiprocessing.resource_tracker.ensure_running()  # starting it would take the mask away
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        for own, handler in handlers.items():
            signal.signal(own, handler)
        if masked:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if late:
            signal.raise_signal(late[0])
