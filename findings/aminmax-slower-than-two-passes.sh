#!/usr/bin/env bash
# torch.aminmax along the last axis is several times slower on a processor than amin and amax one after the other.
#
# One would expect: aminmax reads a row once and finds both ends, so it takes less than two reductions. Min-max observers
# and per-token activation quantizers call it for this reason, once for every layer and step.
# Seen with torch 2.13.0, one thread, rows of 64 to 4,096 numbers: 7 to 23 times as slow in fp32, 2 to 9 times in bf16. The
# values are the same. Guess written down before the run: 0.6 to 1.0 times.
# Where it comes from: amin and amax along the innermost axis go through vectorized reductions; aminmax with a dimension
# walks each row with a scalar loop (ATen/native/cpu/TensorCompareKernel.cpp, aminmax_kernel).
# Whom it hurts: fake quantization on processors. In one evaluation at 8-bit activations a tenth of the time was this call.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

import torch

torch.set_num_threads(1)


def seconds(call):
    best = float("inf")
    for _ in range(9):
        begun = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begun)
    return best


least = {}
for dtype in (torch.float32, torch.bfloat16):
    for shape in ((1024, 576), (576, 1536), (4096, 4096), (64, 2048)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        low, high = x.aminmax(dim=-1)
        assert torch.equal(low, x.amin(-1)) and torch.equal(high, x.amax(-1))
        times = seconds(lambda: x.aminmax(dim=-1)) / seconds(lambda: (x.amin(-1), x.amax(-1)))
        least[dtype] = min(times, least.get(dtype, times))
        print(f"{dtype} {shape}: aminmax takes {times:.1f} times as long as amin and amax")
if least[torch.float32] < 2:
    sys.exit("changed: aminmax is no longer at least twice as slow in fp32")
PYTHON
