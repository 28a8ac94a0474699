"""The machine that a result is made on: its commit, versions and hardware, its memory, and how that is measured."""

import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib.metadata
import platform
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from studylib.data import compute_dtype, device

LIBRARIES = (
    *("torch", "transformers", "lm-eval", "accelerate", "datasets", "numpy"),
    *("peft", "bitsandbytes", "llmcompressor", "compressed-tensors"),
)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of mallopt(3)
MOST_BLOCKS, LARGE = 65_536, 1024**2  # how many blocks by themselves, as glibc begins, and from how many bytes on


class _Allocated(ctypes.Structure):
    """mallinfo2(3): what glibc's malloc holds, in bytes; fordblks is what was freed and kept."""

    _names = "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


@functools.cache
def _of_glibc(name: str) -> Callable | None:
    return getattr(ctypes.CDLL(None), name, None) if platform.libc_ver()[0] == "glibc" else None


def keep_freed_memory() -> None:
    """Let the C library keep memory that was freed, for the rest of the process; does nothing where it is not glibc.

    It would give large blocks back to the system and fetch them anew, page by page, for every tensor of every step: a
    fifth of a training step of 256 tokens on two cores.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def give_back_freed_memory() -> None:
    """Let the C library give every large block back as soon as it is freed, until keep_freed_memory is called; does
    nothing where it is not glibc.

    By itself it keeps blocks of up to 32 MB, with gaps between them, once such a block was freed: up to the size of a
    model in 16 bits, when a model's layers are converted one by one.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_MAX, MOST_BLOCKS)
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, LARGE)


def _memory_in_use(process: psutil.Process) -> int:
    """Resident bytes of this process, less those that it has freed and keeps (see keep_freed_memory)."""
    resident, allocated = process.memory_info().rss, _of_glibc("mallinfo2")  # there since glibc 2.33
    if allocated is None:
        return resident
    allocated.restype = _Allocated  # type: ignore[attr-defined]
    return resident - allocated().fordblks


@contextlib.contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Measure the peak of the work inside: {"bytes": int} is filled in at its end.

    On CUDA, the allocator's peak on the device of models; elsewhere, this process's resident memory seen every 50 ms,
    less what it has freed and keeps.
    """
    peak = {"bytes": 0}
    if (gpu := device()).type == "cuda":
        torch.cuda.reset_peak_memory_stats(gpu)
        try:
            yield peak
        finally:
            peak["bytes"] = torch.cuda.max_memory_allocated(gpu)
        return
    gc.collect()
    process, done = psutil.Process(), threading.Event()

    def watch() -> None:
        while True:
            peak["bytes"] = max(peak["bytes"], _memory_in_use(process))
            if done.wait(0.05):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


@functools.cache
def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ("git", *arguments), cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def _source() -> str:
    """SHA-256 of all modules of this package as they are now."""
    package = Path(__file__).parents[1]
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


SOURCE = _source()  # taken when the process starts, so that editing a module meanwhile cannot mislabel its records


@functools.cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def memory_bytes() -> int:
    """Of the device that models are on: the GPU's, or the machine's."""
    if (gpu := device()).type == "cuda":
        return torch.cuda.get_device_properties(gpu).total_memory
    return psutil.virtual_memory().total


def _accelerator() -> str | None:
    kind = device().type
    return torch.cuda.get_device_name() if kind == "cuda" else None if kind == "cpu" else kind


def environment() -> dict[str, Any]:
    """Where and with what a record was made: versions, commit, dirty flag, hardware, the type it multiplies in."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "source": SOURCE,
        "python": platform.python_version(),
        "libraries": dict(_versions()),
        "hardware": {
            "processor": torch.backends.cpu.get_cpu_capability(),
            "cores": torch.get_num_threads(),
            "memory_bytes": psutil.virtual_memory().total,
            "accelerator": _accelerator(),
        },
        "compute_dtype": str(compute_dtype()).removeprefix("torch."),
    }
