#!/usr/bin/env bash
# PyTorch's 4-bit kernel for processors is vectorized for bf16 alone, also on processors without instructions for bf16.
#
# One would expect: torch.ops.aten._weight_int4pack_mm_for_cpu is fastest in the type that the processor computes in.
# Without bf16 instructions that is fp32, and bf16 would have to be emulated.
# Seen with torch 2.13.0, with code paths for AVX2 (no bf16 instructions) and for AVX-512: a layer of 1536 x 576 in
# groups of 64 takes 15 to 100 times as long in fp32 and in fp16 as in bf16, for one row of input and for 64. In fp32 it
# is slower than the plain product of the unpacked weight in fp32.
# Guess written down before the run: without bf16 instructions fp32 is as fast as bf16, or up to twice as fast.
# Where it comes from: aten/src/ATen/native/cpu/int4mm_kernel.cpp: tinygemm_kernel has specializations for bf16 with
# AVX2 and AVX-512; every other type takes the generic template, which multiplies number by number.
# Whom it hurts: anyone who runs 4-bit weights through this kernel, or through libraries that call it, in the model's
# own fp32 or fp16, and concludes that 4 bits do not speed up a processor. Casting the input to bf16 is enough.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import statistics
import sys
import time

import torch

OUT, IN, GROUP, ROUNDS = 1536, 576, 64, 9
torch.manual_seed(0)
codes = torch.randint(0, 16, (OUT, IN), dtype=torch.int32)
packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
scales = torch.rand(IN // GROUP, OUT) + 0.5
grid = torch.stack([scales, torch.zeros_like(scales)], -1)
weight = ((codes - 8).view(OUT, -1, GROUP) * scales.T[..., None]).view(OUT, IN)
print("code paths:", torch.backends.cpu.get_cpu_capability())


def milliseconds(function):
    function()
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times)


slower = {}
for rows in (1, 64):
    x = torch.randn(rows, IN)
    took = {"plain product in fp32": milliseconds(lambda: x @ weight.T)}
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        own, input = grid.to(dtype), x.to(dtype)

        def run():
            return torch.ops.aten._weight_int4pack_mm_for_cpu(input, packed, GROUP, own)

        error = (run().float() - x @ weight.T).norm() / (x @ weight.T).norm()
        assert error < 0.01, error
        took[str(dtype).removeprefix("torch.")] = milliseconds(run)
    print(f"{rows} rows: " + ", ".join(f"{name} {value:.3f} ms" for name, value in took.items()))
    slower[rows] = [took[name] / took["bfloat16"] for name in ("float32", "float16")]
    print(f"{rows} rows: fp32 {slower[rows][0]:.0f} and fp16 {slower[rows][1]:.0f} times as long as bf16")
if min(min(times) for times in slower.values()) < 5:
    sys.exit("changed: other types are vectorized as well now")
PYTHON
