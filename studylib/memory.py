"""Bytes: what a quantized model takes by plan, and what a piece of work took at its peak."""

import contextlib
import ctypes
import functools
import gc
import platform
import threading
from collections.abc import Callable, Iterator

import psutil
import torch
from torch import nn

from studylib.layers import CACHE_PROJECTIONS, PER_HEAD, Scheme, decoder_linears, head_width, is_projection
from studylib.quantizers import OFF, BitWidths

SCALE_BYTES = 4  # scales are fp32
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
FLOAT_BYTES = 2  # what is not quantized is counted at 16 bits


def weight_bytes(model: nn.Module, bits: str | BitWidths, scheme: Scheme = Scheme()) -> int:
    """Bytes of all parameters with the decoder's linear weights packed at W bits and an fp32 scale a channel or group.

    Asymmetric grids add a zero point of W bits to each scale. Embeddings, head (once if tied), norms and biases at 16
    bits. Worked: a [64, 64] weight at 4 bits: 2048 + 256 bytes; in groups of 32: 2048 + 512.
    """
    bits = BitWidths.parse(bits)
    quantized = {id(linear.weight) for linear in decoder_linears(model).values()} if bits.weights != OFF else set()
    total = 0
    for parameter in model.parameters():
        if id(parameter) in quantized:
            rows = len(parameter) * (parameter.shape[1] // scheme.weight_group if scheme.weight_group else 1)
            total += _packed(parameter.numel(), rows, bits.weights, scheme)
        else:
            total += parameter.numel() * FLOAT_BYTES
    return total


def cache_bytes_per_token(model: nn.Module, bits: str | BitWidths, scheme: Scheme = Scheme()) -> int:
    """Bytes of keys and values that one token leaves in the cache, in all layers: KV bits, an fp32 scale for each.

    A scale is shared by all heads, or each head has its own (scheme.cache_scale); learned scales are the layer's,
    not the token's. Worked: 3 heads of 64 numbers at 4 bits: 96 + 4 bytes over all heads, 96 + 12 for each head.
    """
    width = BitWidths.parse(bits).cache
    outputs = [
        linear.out_features
        for name, linear in decoder_linears(model).items()
        if is_projection(name, *CACHE_PROJECTIONS)
    ]
    if not outputs:  # one projection of queries, keys and values
        heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
        outputs = [heads * head_width(model)] * (2 * model.config.num_hidden_layers)
    if width == OFF:
        return sum(outputs) * FLOAT_BYTES
    if scheme.grid == "lsq":
        return sum(n * width // 8 for n in outputs)
    return sum(
        _packed(n, n // head_width(model) if scheme.cache_scale == PER_HEAD else 1, width, scheme) for n in outputs
    )


def _packed(numbers: int, scales: int, bits: int, scheme: Scheme) -> int:
    zeros = scales if scheme.grid == "asymmetric" else 0
    return (numbers + zeros) * bits // 8 + scales * SCALE_BYTES


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


def _memory_in_use(process: psutil.Process) -> int:
    """Resident bytes of this process, less those that it has freed and keeps (see keep_freed_memory)."""
    resident, allocated = process.memory_info().rss, _of_glibc("mallinfo2")  # there since glibc 2.33
    if allocated is None:
        return resident
    allocated.restype = _Allocated
    return resident - allocated().fordblks


@contextlib.contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Measure the peak of the work inside: {"bytes": int} is filled in at its end.

    On CUDA, the allocator's peak on the current device; on a CPU, this process's resident memory seen every 50 ms, less
    what it has freed and keeps.
    """
    peak = {"bytes": 0}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        try:
            yield peak
        finally:
            peak["bytes"] = torch.cuda.max_memory_allocated()
        return
    gc.collect()
    process, done = psutil.Process(), threading.Event()

    def watch():
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
