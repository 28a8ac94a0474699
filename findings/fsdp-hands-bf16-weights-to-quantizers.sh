#!/usr/bin/env bash
# Under FSDP, bf16=True hands fake quantizers weights in bf16: one in a hundred goes to another 4-bit level.
#
# One would expect: bf16 mixed precision of accelerate (Trainer's bf16=True) computes matrix products in bf16 and leaves
# parameters in fp32, as autocast does on one device and under data parallelism. Quantization-aware training depends on
# it: the quantizer in a layer's forward pass rounds the fp32 master weight.
# Seen with accelerate 1.15.0, torch 2.13.0: with the policy that accelerate's FSDP2 plugin makes of "bf16" the layer
# sees its weight in bf16. Under autocast it is fp32. Of the integers of a 4-bit grid 1.1% are others, and updates that
# are smaller than a step of bf16 reach the quantizer in jumps, though the optimizer's masters are fp32.
# Guess written down before the run: the same losses as with data parallelism but for the order of sums; they were off
# in the third digit from the first step on.
# Where it comes from: accelerate/utils/dataclasses.py, FullyShardedDataParallelPlugin.set_mixed_precision: param_dtype
# of the policy is bf16, to which torch casts what it gathers, before any forward pass.
# Whom it hurts: trainings with fake quantization (QAT, QAT-LoRA, BitNet-like) that move from one GPU or data parallelism
# to FSDP with the same arguments.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
cd "$folder"
cat > train.py <<'PYTHON'
import copy
import sys

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

dist.init_process_group("gloo")
torch.manual_seed(0)


class Quantized(torch.nn.Linear):
    """Weights rounded to a symmetric 4-bit grid, one scale a row; gradients pass straight through."""

    def forward(self, x):
        scale = self.weight.abs().amax(1, keepdim=True) / 7
        levels = (self.weight / scale).round()
        self.seen, self.levels = self.weight.dtype, levels.detach().float()
        return F.linear(x, self.weight + (levels * scale - self.weight).detach())


usual = Quantized(512, 512, bias=False)
sharded, x = copy.deepcopy(usual), torch.randn(8, 512)
with torch.autocast("cpu", torch.bfloat16):
    usual(x)
plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
plugin.set_mixed_precision("bf16")
fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)), mp_policy=plugin.mixed_precision_policy)
sharded(x)
others = (usual.levels != sharded.levels).float().mean().item()
print("autocast, as on one device and with data parallelism:", usual.seen)
print("FSDP2 with accelerate's policy for bf16:", sharded.seen)
print(f"4-bit integers that are others: {others:.1%}")
dist.destroy_process_group()
sys.exit((usual.seen, sharded.seen) != (torch.float32, torch.bfloat16) or not 0.005 < others < 0.1)
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/torchrun" --nproc-per-node 1 train.py 2>/dev/null
