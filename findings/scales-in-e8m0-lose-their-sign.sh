#!/usr/bin/env bash
# A cast to torch's float8_e8m0fnu drops the sign of a scale and gives 0 a number; ml_dtypes' type of that name has NaN.
#
# One would expect: E8M0, the type of MXFP4's scales, holds powers of two from 2^-127 to 2^127 and NaN. What it does not
# hold becomes NaN, in both libraries that have the type under one name; and a scale cast to it is OCP's scale.
# Seen with torch 2.13.0 and ml_dtypes 0.7.0 (JAX's, also ONNX's): of -2 torch makes 2, ml_dtypes NaN. Of 0, the scale
# of a block of zeros, torch makes 2^-127, with which the block is right, ml_dtypes NaN, with which it is lost. Both take
# the nearest power, and the larger one at a tie (3 becomes 4, 6 becomes 8), where OCP's scale rounds down: of normal
# weights in blocks of 32, a scale max / 6 that is cast cuts the largest number of 5 blocks in 10, by up to a third;
# OCP's cuts it in 3 of 10, by up to a quarter.
# Guess written down before the run: both give NaN for -2 and for 0, and round ties to even exponents.
# Where it comes from: torch/headeronly/util/Float8_e8m0fnu.h, fp8e8m0fnu_from_fp32_value, takes the exponent's bits and
# looks at the mantissa for rounding, and never at the sign; ml_dtypes/include/float8.h, float8_e8m0fnu, has no zero.
# Whom it hurts: full-range integer grids have negative scales where a block's largest magnitude is positive (AutoRound's
# and llama.cpp's Q4_0): stored in this type the whole block changes its sign, without a word. And those who write scales
# with one library and compare with the other's: a block of zeros, as pruning and padding leave it, is NaN in one.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 ml_dtypes==0.7.0
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - 2>messages <<'PYTHON'
import sys

import ml_dtypes
import numpy as np
import torch

scales = [2.0, 0.0, -2.0, 1.25, 1.5, 3.0, 6.0]
by_torch = torch.tensor(scales).to(torch.float8_e8m0fnu).float().tolist()
by_ml_dtypes = np.array(scales, np.float32).astype(ml_dtypes.float8_e8m0fnu).astype(np.float32).tolist()
for scale, one, other in zip(scales, by_torch, by_ml_dtypes):
    print(f"{scale:g}: torch {one:g}, ml_dtypes {other:g}")

blocks = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(0))
largest = blocks.abs().amax(1)
cast = (largest / 6).to(torch.float8_e8m0fnu).float()
ocp = torch.exp2(largest.log2().floor() - 2)
cut = {}
for name, scale in (("max / 6, cast", cast), ("OCP's", ocp)):
    beyond = largest / scale / 6
    cut[name] = float((beyond > 1).float().mean()), 1 - 1 / float(beyond.max())
    print(f"scale {name}: cuts the largest number of {cut[name][0]:.0%} of blocks, by up to {cut[name][1]:.0%}")

block, scale = torch.tensor([-7.0, 3.0]), torch.tensor(-2.0)
print("a block of", (block * scale).tolist(), "comes back as", (block * scale.to(torch.float8_e8m0fnu).float()).tolist())
differ = by_torch[1] == 2.0**-127 and by_torch[2] == 2.0 and all(map(np.isnan, by_ml_dtypes[1:3]))
nearest = by_torch[3:] == by_ml_dtypes[3:] == [1.0, 2.0, 4.0, 8.0]
shares = [round(cut[name][0], 1) for name in cut] == [0.5, 0.3]
most = [round(cut[name][1], 2) for name in cut] == [0.33, 0.25]
sys.exit(0 if differ and nearest and shares and most else 1)
PYTHON
