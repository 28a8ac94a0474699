#!/usr/bin/env bash
# Weights that lie on compressed-tensors' symmetric grid are moved when they are rounded again with the same settings.
#
# One would expect: rounding is a projection. Weights that a checkpoint decompresses to lie on its grid, so that the same
# scheme finds the same scales and codes, and nothing changes. So it is with symmetric integers from -7 to 7.
# Seen with compressed-tensors 0.19.0: the scale is max|w| / 7.5 at 4 bits, for codes from -8 to 7. A largest weight that is
# positive comes back as 7/7.5 of itself, a negative one as 8/7.5, so that the next scale is another: every group of normal
# weights moves, and the error grows by a quarter to a half with each rounding, at 8 bits as at 2. Asymmetric grids move nothing.
# Guess written down before the run: nothing moves, or only groups whose largest weight is positive (it is clipped).
# Where it comes from: compressed_tensors/quantization/utils/helpers.py, calculate_qparams: 2 max|w| over the 2^b - 1 steps.
# Whom it hurts: who decompresses a W4A16 or W8A16 model to look at it, merge an adapter or change a layer, and compresses it
# again with the same recipe: all other layers lose as well, and no message says so. Keep the scales, or the packed weights.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.17.0 compressed-tensors==0.19.0
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import sys

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams

GROUP = 32
weight = 0.02 * torch.randn(1024, 128, generator=torch.Generator().manual_seed(0))


def rounded(w, settings):
    groups = w.unflatten(1, (-1, GROUP))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), settings)
    return fake_quantize(w, scale, zero, settings)


moved, grown = {}, {}
for symmetric in (True, False):
    for bits in (8, 4, 3, 2):
        settings = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=GROUP)
        once = rounded(weight, settings)
        twice = rounded(once, settings)
        # by more than a thousandth of a step, which rounding errors of the scale may make
        step = (once.max() - once.min()) / 2**bits / 1000
        far = ((once - twice).abs() > step).unflatten(1, (-1, GROUP)).any(-1).float().mean().item()
        first, second = ((w - weight).norm().item() for w in (once, twice))
        moved[symmetric, bits], grown[symmetric, bits] = far, second / first
        print(
            f"{'symmetric' if symmetric else 'asymmetric'}, {bits} bits: the second rounding moves {far:.0%} of the groups; "
            f"error {second / first:.2f} times that of the first"
        )
for bits in (8, 4, 3, 2):
    if moved[True, bits] < 0.99 or not 1.2 < grown[True, bits] < 1.6:
        sys.exit("changed: the second symmetric rounding moves fewer groups, or costs something else")
    if grown[False, bits] > 1.1:
        sys.exit("changed: the second asymmetric rounding costs more than a tenth")
PYTHON
