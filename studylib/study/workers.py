"""What a dask worker does for a study: it says what it is and has, and carries out one arm at a time.

Little is imported here, for a worker reads this in the thread that answers the scheduler; what it works with, which
takes seconds, it imports in another.
"""

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed import Lock, Worker, get_worker

from studylib import data
from studylib.config import NUMERICS, Arm
from studylib.methods import METHODS
from studylib.study.needs import GPU, MEMORY, Has
from studylib.study.records import Store, arm_key, is_installed

_ALONE = threading.Lock()  # two arms at a time would draw from the same generators of random numbers


@dataclass(frozen=True)
class Asked:
    """What a worker is held against: numerics versions by component; a file in the results folder; and by its key, each
    arm that names files of its own."""

    numerics: Mapping[str, int]
    probe: Path
    arms: Mapping[str, Arm]


def versions() -> dict[str, int]:
    """The numerics versions of all components and methods of this package."""
    own = {name: version.number for name, version in NUMERICS.items()}
    return own | {f"method {name}": method.version for name, method in METHODS.items() if is_installed(method)}


async def examine(asked: Asked, dask_worker: Worker) -> Has | str:
    """What the worker has, or why it cannot be used, in words that go on after its name."""
    return await asyncio.to_thread(_examine, asked, dask_worker)


def _examine(asked: Asked, worker: Worker) -> Has | str:
    own = versions()
    for name, number in asked.numerics.items():
        if own.get(name) != number:
            return f"has numerics version {own.get(name)} of {name!r}, not {number}; install the same studylib there"
    if not asked.probe.exists():
        return f"does not see the results folder {asked.probe.parents[1]}; share it under the same path"
    cache = data.cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot use the cache folder {cache} ({error.strerror}); set STUDY_CACHE to another one there"
    for key, arm in asked.arms.items():
        try:
            same = arm_key(arm) == key
        except (OSError, ValueError) as error:
            return f"lacks what an arm names ({error}); share it under the same path"
        if not same:
            return f"has other files than there are here for {arm.model!r} or its texts; share the same ones"
    import psutil

    declared = worker.state.total_resources
    limit = worker.memory_manager.memory_limit or psutil.virtual_memory().total
    gpus = declared.get(GPU, data.gpu_count())
    return Has(declared.get(MEMORY, limit), gpus, frozenset({GPU, MEMORY} & declared.keys()))


class Cancelled(Exception):
    """Nobody waits any longer for what is computed."""


class _Across(Store):
    """A results folder of several machines, whose file system may have no locks: the scheduler knows who holds one."""

    def lock(self, name: str) -> "_Lock":  # type: ignore[override]
        return _Lock(f"{self.folder}/{name}")


class _Lock:
    """As filelock's: held inside `with`, also that of `acquire`."""

    def __init__(self, name: str):
        self._lock = Lock(name)

    @contextlib.contextmanager
    def acquire(self, blocking: bool = True) -> Iterator[None]:
        """filelock's Timeout where another process holds it and that is not waited for."""
        from filelock import Timeout

        if not self._lock.acquire(blocking=blocking):
            raise Timeout(str(self._lock.name))
        try:
            yield
        finally:
            self._lock.release()

    def __enter__(self) -> None:
        self._held = self.acquire()
        self._held.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._held.__exit__(*error)


def carry_out(arm: Arm, key: str, results: Path, keep_checkpoints: bool, threads: int, across: bool) -> None:
    """Compute the record of an arm into the results folder, unless it is there.

    threads: of torch; 0: as many as the worker was started with. across: workers are on several machines (see _Across).
    Raises what run.carry_out does, and ValueError where the files that the arm names are not those of `key`.
    """
    import torch
    from tqdm import tqdm

    from studylib.study import run
    from studylib.study.machine import keep_freed_memory

    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a worker that is killed would leave
    worker = get_worker()
    name = worker.get_current_task()

    def progress(phase: str, tokens: int) -> None:
        task = worker.state.tasks.get(name)
        if task is None or task.state == "cancelled":
            raise Cancelled

    store = _Across(results) if across else Store(results)
    with _ALONE, store.lock(key):
        if arm_key(arm) != key:
            raise ValueError(f"files that {arm.model!r} or its texts name were changed since the start; run it again")
        if store.load(key) is None:
            keep_freed_memory()
            torch.set_num_threads(threads or worker.state.nthreads)
            run.keep(run.carry_out(arm, store, keep_checkpoints, progress), store, keep_checkpoints)
