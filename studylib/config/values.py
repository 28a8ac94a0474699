"""Checks of single values, the same for all frozen values: ValueError with one line, what is there and what is allowed.

What passes can be written as JSON and read back as it was.
"""

import dataclasses
import functools
import re
import reprlib
import sys
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

MAX_SEED = 2**32 - 1  # numpy's generators take no larger one
MAX_COUNT = 10_000_000  # windows, steps, items: a hundred times the papers'
MAX_LENGTH = 2**20  # tokens of a sequence
MAX_BATCH = 2**16
MAX_JOBS = 1024  # arms computed at a time
ADDRESS = re.compile(r"(tcp|tls|ws|wss|ucx)://[^/\s]+:[0-9]+")  # of a scheduler
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120


def shown(value: Any) -> str:
    """A value on one line, cut where it is long."""
    try:
        return " ".join(_REPR.repr(value).split())
    except ValueError:  # Python writes no number of more than 4,300 digits
        return f"<{type(value).__name__}>"


def check_whole(name: str, value: Any, least: int, most: int = MAX_COUNT) -> None:
    """Raise ValueError unless `value` is an integer from `least` to `most`; True and 2.0 are none."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}: {shown(value)} is not allowed; use a whole number from {least} to {most}")


def check_jobs(jobs: Any) -> None:
    """Raise ValueError for a number of arms computed at a time that is no whole number from 1 to MAX_JOBS."""
    check_whole("jobs", jobs, 1, MAX_JOBS)


def check_scheduler(scheduler: str) -> None:
    """Raise ValueError for what is neither empty, an address nor an existing scheduler file of dask."""
    if scheduler and not (ADDRESS.fullmatch(scheduler) or ("://" not in scheduler and Path(scheduler).is_file())):
        raise ValueError(
            f"scheduler: {shown(scheduler)} is not allowed; use an address, for example tcp://10.0.0.5:8786, "
            "or a scheduler file that is there"
        )


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """Raise ValueError unless `value` is an integer or float from `least` to `most`."""
    if not _is_number(value) or not least <= value <= most:
        raise ValueError(f"{name}: {shown(value)} is not allowed; use a number from {least:g} to {most:g}")


def check_positive(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a finite integer or float above 0."""
    if not _is_number(value) or not value > 0:
        raise ValueError(f"{name}: {shown(value)} is not allowed; use a number above 0")


def check_share(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a number from 0 to below 1."""
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name}: {shown(value)} is not allowed; use a share from 0 to below 1")


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    return isinstance(value, int | float) and type(value) is not bool and abs(value) <= sys.float_info.max


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is True or False."""
    if type(value) is not bool:
        raise ValueError(f"{name}: {shown(value)} is not allowed; use True or False")


def check_known(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of the names."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: {shown(value)} is not known; use one of {', '.join(allowed)}")


def check_text(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a text that is not blank, of one line, and can be written as UTF-8."""
    if not isinstance(value, str) or not is_line(value):
        raise ValueError(f"{name}: {shown(value)} is not allowed; use one line of text")


def is_line(text: str) -> bool:
    """Whether it is not blank, and holds no control characters or halves of characters."""
    return bool(text.strip()) and not re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", text)


def check_several(name: str, values: Any, check: Callable[[Any], None]) -> None:
    """Raise ValueError unless `values` is a tuple whose items pass `check` and come once each."""
    if type(values) is not tuple:
        raise ValueError(f"{name}: {shown(values)} is not allowed; use a tuple")
    for value in values:
        check(value)
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{name}: {shown(value)} is there twice; name it once")


def check_parts(whole: Any) -> None:
    """Raise ValueError unless the fields of a dataclass that are to hold other dataclasses hold these."""
    declared: type = type(whole)
    for name, kinds in _parts(declared).items():
        if not isinstance(getattr(whole, name), kinds):
            allowed = " or ".join(kind.__name__ for kind in kinds).replace("NoneType", "None")
            raise ValueError(f"{name}: {shown(getattr(whole, name))} is not allowed; use {allowed}")


@functools.cache
def _parts(whole: type) -> dict[str, tuple[type, ...]]:
    hints = {name: hint for name, hint in typing.get_type_hints(whole).items() if typing.get_origin(hint) is not tuple}
    found = {name: typing.get_args(hint) or (hint,) for name, hint in hints.items()}
    return {name: kinds for name, kinds in found.items() if any(map(dataclasses.is_dataclass, kinds))}
