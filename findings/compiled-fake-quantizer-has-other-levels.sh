#!/usr/bin/env bash
# torch.compile gives bf16 weights other 4-bit levels than eager PyTorch: one in 200 goes to the next level.
#
# One would expect: a fake quantizer (divide by the group's scale, round, clamp, multiply) gives the same levels
# compiled and eager, as it does in fp32, so that a model that was trained compiled is evaluated as what it was trained
# as.
# Seen with torch 2.13.0 on a processor, groups of 64, symmetric 4 bits: in fp32 all levels are the same. In bf16, 0.5%
# of the weights get another level, and 6% of the decoded values differ. The compiled ones are those of fp32, rounded to
# bf16 at the end (relative error 0.2%); the eager ones lie 2.6% from these, which is a tenth of what 4 bits lose. With
# the switch emulate_precision_casts of inductor's settings both are the same.
# Guess written down before the run: the same to the last bit, as each operation is elementwise.
# Where it comes from: inductor computes a fused chain in fp32 and rounds to bf16 where it is written to memory; eager
# PyTorch rounds after each operation, of the quotient too, which decides the level.
# Whom it hurts: quantization-aware training with masters or autocast in bf16 that is compiled for speed and exported or
# scored eagerly, or the other way around: the weights are right, the levels of one in 200 are not those of the
# training.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR="$folder/compiled" "$folder/venv/bin/python" - 2>messages <<'PYTHON'
import sys

import torch

GROUP, LARGEST = 64, 7


def levels(weights):
    grouped = weights.view(-1, GROUP)
    scales = grouped.abs().amax(-1, keepdim=True) / LARGEST
    return torch.clamp(torch.round(grouped / scales), -LARGEST - 1, LARGEST), scales


def fake_quantized(weights):
    found, scales = levels(weights)
    return (found * scales).view_as(weights)


def apart(function, weights, **settings):
    """The share of values that differ when it is compiled, and both results."""
    torch.compiler.reset()
    eager, compiled = function(weights), torch.compile(function, **settings)(weights)
    return float((eager != compiled).float().mean()), eager.float(), compiled.float()


normal = torch.randn(1024, 512, generator=torch.Generator().manual_seed(0)) * 0.02
found = {}
for dtype in (torch.float32, torch.bfloat16):
    weights = normal.to(dtype)
    of_levels, *_ = apart(lambda w: levels(w)[0], weights)
    of_values, eager, compiled = apart(fake_quantized, weights)
    exact = fake_quantized(weights.float())
    errors = [float((value - exact).norm() / exact.norm()) for value in (eager, compiled)]
    found[dtype] = of_levels, of_values, *errors
    print(f"{dtype}: {of_levels:.2%} of the levels and {of_values:.1%} of the values differ; from fp32, eager "
          f"{errors[0]:.2%}, compiled {errors[1]:.2%}")  # fmt: skip
lost = float((fake_quantized(normal) - normal).norm() / normal.norm())
emulated, *_ = apart(fake_quantized, normal.bfloat16(), options={"emulate_precision_casts": True})
print(f"4 bits lose {lost:.1%}; with emulate_precision_casts {emulated:.1%} of the values differ")
of_levels, of_values, eager, compiled = found[torch.bfloat16]
same = found[torch.float32][:2] == (0, 0) and emulated == 0
sys.exit(0 if same and 0.003 < of_levels < 0.008 and of_values > 0.04 and eager > 0.02 and compiled < 0.003 else 1)
PYTHON
