"""Helper processes, which end with the one that started them, however that ends.

Little is imported here: a helper imports what it works with, which takes seconds, when it is watching its parent.
"""

import contextlib
import importlib
import itertools
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

NO_MORE = -1  # behind the last of Turns


class Turns:
    """Places in a list of so many, in the order in which they are to be taken; one process sets it, others read it.

    Nothing is locked: a process that is killed while it holds a lock would stop all others for ever. Who reads while
    they are set may get some of the old ones and some of the new.
    """

    def __init__(self, count: int):
        self._places = multiprocessing.get_context("spawn").RawArray("i", [NO_MORE] * (count + 1))

    def set(self, places: Iterable[int]) -> None:
        """Each at most once."""
        chosen = [*places, NO_MORE]
        self._places[: len(chosen)] = chosen

    def get(self) -> list[int]:
        """Each once."""
        return list(dict.fromkeys(itertools.takewhile(lambda place: place != NO_MORE, self._places[:])))


@contextlib.contextmanager
def working(count: int, function: Callable[..., None], *arguments: Any) -> Iterator[list[BaseProcess]]:
    """Inside, so many processes call the function, one of a module, with the arguments; afterwards they are gone."""
    spawn = multiprocessing.get_context("spawn")
    named = (function.__module__, function.__name__, *arguments)
    processes: list[BaseProcess] = [spawn.Process(target=_watching, args=named, daemon=True) for _ in range(count)]
    try:
        with _deaf_to_interrupts():
            for process in processes:
                process.start()
        yield processes
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started inside get no Ctrl-C, which goes to the whole group: this one stops them.

    One that arrives meanwhile comes afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    multiprocessing.resource_tracker.ensure_running()  # starting it would take the mask away
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _watching(module: str, function: str, *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for systems without masks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    getattr(importlib.import_module(module), function)(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
