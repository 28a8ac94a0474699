"""What a process is given, and what it took."""

import platform

import psutil
import pytest
import torch

from studylib.study.machine import keep_freed_memory, peak_memory


def test_peak_memory_sees_an_allocation_that_is_gone_at_the_end():
    with peak_memory() as small:
        pass
    with peak_memory() as large:
        block = torch.ones(2**30, dtype=torch.uint8)
        del block
    assert large["bytes"] - small["bytes"] > 0.8 * 2**30 or torch.cuda.is_available()


@pytest.mark.skipif(torch.cuda.is_available() or platform.libc_ver()[0] != "glibc", reason="the peak is malloc's own")
def test_peak_memory_leaves_out_what_was_freed_and_kept():
    keep_freed_memory()
    torch.ones(2**30, dtype=torch.uint8)  # gone at once
    with peak_memory() as peak:
        resident = psutil.Process().memory_info().rss
    assert resident - peak["bytes"] > 0.8 * 2**30
