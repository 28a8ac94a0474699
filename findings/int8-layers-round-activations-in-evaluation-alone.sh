#!/usr/bin/env bash
# On processors bitsandbytes' 8-bit layer rounds activations in evaluation alone: in training mode it is weights only.
#
# One would expect: LLM.int8() multiplies 8-bit weights by 8-bit activations, with outlying columns apart, whatever mode
# the model is in: its layers have neither dropout nor statistics.
# Seen with bitsandbytes 0.50.2, torch 2.13.0, three columns of activations 60 times the others: after train() the
# outputs are those of unrounded activations, whatever the threshold is (error 0.75%). After eval() activations are
# rounded: 4.4% without a threshold, 0.77% with the usual one of 6. A layer is in training mode when it is made.
# Guess written down before the run: both modes give the same numbers.
# Where it comes from: bitsandbytes/autograd/_functions.py, matmul: for "cpu" and "xpu" a layer in training mode takes
# MatMul8bitFp, which decodes the weights and multiplies in floating point; its comment says that this is for speed.
# Whom it hurts: those who fine-tune an adapter on an 8-bit base on a processor or Intel GPU: it is trained on another
# function than it is evaluated as, and on CUDA. Those who measure what 8-bit activations cost and forget eval(): they
# find that they cost nothing.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - 2>messages <<'PYTHON'
import sys

import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt

weights = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02
x = torch.randn(32, 512, generator=torch.Generator().manual_seed(1))
x[:, [7, 100, 300]] *= 60
wanted = x @ weights.T

found = {}
for threshold in (0.0, 6.0):
    layer = Linear8bitLt(512, 256, bias=False, has_fp16_weights=False, threshold=threshold)
    layer.weight = Int8Params(weights.half(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    made = layer.training
    for training in (True, False):
        with torch.no_grad():
            y = layer.train(training)(x.half()).float()
        found[training, threshold] = float((y - wanted).norm() / wanted.norm())
        mode = "train()" if training else "eval()"
        print(f"threshold {threshold:.0f}, {mode}: error {found[training, threshold]:.2%}")
same = found[True, 0.0] == found[True, 6.0] < 0.009
sys.exit(0 if made and same and found[False, 0.0] > 0.03 and 0.005 < found[False, 6.0] < 0.012 else 1)
PYTHON
