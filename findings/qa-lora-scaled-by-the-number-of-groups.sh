#!/usr/bin/env bash
# peft's QA-LoRA multiplies pooled inputs by the number of groups, where the paper multiplies by their size.
#
# One would expect: QA-LoRA's adapter sees the sum of each group of inputs, as the mean times the group's size, since a
# shift of a group's zero point is multiplied by that sum. Then the same A and B mean the same shift in a narrow and in
# a wide layer, and the adapter is merged into the zero points: that is what the method is for.
# Seen with peft 0.21.2 and its own groups of 16: the adapter is 2.25 times the paper's in a layer of 576 inputs, 6
# times in one of 1,536, 16 times at 4,096 and 43 times at 11,008. It cannot be merged: NotImplementedError.
# Guess written down before the run: the sum, and merging moves the zero points.
# Where it comes from: peft/tuners/lora/variants.py, QALoraLinearVariant.forward: the mean is multiplied by
# in_features // group_size. QA-LoRA (arXiv 2309.14717), algorithm 1, multiplies by D_in // L, where L is the number of
# groups, so that D_in // L is their size. Both are right where there are as many groups as inputs in one.
# Whom it hurts: who trains QA-LoRA with peft at the paper's lora_alpha and learning rate: layers learn at up to 43
# times the size, the wide ones more than the narrow ones; and who trains it for its merge, and cannot have it.
# peft takes QA-LoRA on GPTQ layers alone. Here the class that it puts around them is around a dense layer, which gives
# the same adapter without GPTQ's kernels.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.17.0 accelerate==1.15.0 peft==0.21.2
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - 2>messages <<'PYTHON' || { tail -5 messages; exit 1; }
import sys

import torch
from peft import LoraConfig
from peft.tuners.lora.gptq import GPTQLoraLinear

RANK, OUT = 8, 64


def beside_the_paper(width):
    """The adapter's output over that of the sums of groups, and whether it says what it adds to the weights."""
    given = LoraConfig(r=RANK, lora_alpha=RANK, use_qalora=True)
    layer = GPTQLoraLinear(torch.nn.Linear(width, OUT, bias=False), "default", given, r=RANK, lora_alpha=RANK)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = torch.randn(4, width)
    theirs = layer(x) - layer.base_layer(x)
    papers = x.view(4, -1, given.qalora_group_size).sum(-1) @ a.T @ b.T
    ratio = float((theirs * papers).sum() / (papers * papers).sum())
    assert torch.allclose(theirs, ratio * papers, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    try:
        layer.lora_variant["default"].get_delta_weight(layer, "default")
    except NotImplementedError:
        return ratio, False
    return ratio, True


torch.manual_seed(0)
found = {width: beside_the_paper(width) for width in (256, 576, 1536, 4096, 11008)}
for width, (ratio, merges) in found.items():
    print(f"{width:6} inputs: {ratio:5.2f} times the paper's adapter, {'merges' if merges else 'cannot be merged'}")
groups = all(abs(ratio - width / 16 / 16) < 0.01 * ratio for width, (ratio, _) in found.items())
sys.exit(0 if groups and not any(merges for _, merges in found.values()) else 1)
PYTHON
