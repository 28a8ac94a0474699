#!/usr/bin/env bash
# The nibbles of bitsandbytes' "fp4" are neither E2M1 floats nor indices of ascending levels; those of "nf4" are the latter.
#
# One would expect: FP4 is E2M1 (sign, two exponent bits, one mantissa bit), as in the OCP microscaling formats and in the
# hardware that multiplies them: nibbles 0 to 7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6, over 6. Or, as in NF4 of the same library,
# nibble i is the i-th level from below, so that a checkpoint can be read with a sorted table.
# Seen with bitsandbytes 0.50.2: nibbles 0 to 7 are 0, 0.0052, 0.6667, 1, 0.3333, 0.5, 0.1667, 0.25. The order is not that of
# E2M1, the smallest magnitude is 0.0625/12 in place of 1/12, and there are two zeros (0 and 8), so 15 levels.
# Guess written down before the run: E2M1 in E2M1's order, or both types as sorted tables.
# Where it comes from: bitsandbytes/functional.py, get_4bit_type("fp4"), and the tables of its kernels.
# Whom it hurts: who turns such a checkpoint into MXFP4 or NVFP4 by its nibbles, or decodes it with a sorted table: on normal
# numbers the decoded weights are then far from the ones that were stored (cosine below), with no error anywhere. And who
# compares "FP4" of this library with another's.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import sys

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
tables = {"E2M1": torch.cat([e2m1, -e2m1])}
ascending, levels, cosines = {}, {}, {}
for kind in ("nf4", "fp4"):
    packed, state = quantize_4bit(weight, blocksize=64, quant_type=kind)
    print(kind, "nibbles 0..15:", [round(float(level), 4) for level in state.code])
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    scales = state.absmax.repeat_interleave(64)
    true = dequantize_4bit(packed, state).flatten()
    assert torch.allclose(state.code[nibbles] * scales, true, atol=1e-6)
    ascending[kind], levels[kind] = bool((state.code.diff() > 0).all()), len(state.code.unique())
    for name, table in (tables | {"a sorted table": state.code.sort().values}).items():
        cosines[kind, name] = torch.nn.functional.cosine_similarity(table[nibbles] * scales, true, dim=0).item()
        print(f"{kind} read with {name}: cosine {cosines[kind, name]:.3f} with what was stored")
if not ascending["nf4"] or ascending["fp4"] or levels["fp4"] != 15:
    sys.exit("changed: the order or the number of the levels is another")
if max(cosines["fp4", name] for name in ("E2M1", "a sorted table")) > 0.9:
    sys.exit("changed: FP4 can be read as E2M1 or with a sorted table now")
PYTHON
