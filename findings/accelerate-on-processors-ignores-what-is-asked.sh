#!/usr/bin/env bash
# On processors accelerate's launcher starts one process where two are asked for, and FSDP that is asked for is left out.
#
# One would expect: `accelerate launch --cpu --num_processes 2` starts two processes, as its help says of the number; and
# two processes that ask for FSDP (ACCELERATE_USE_FSDP, FSDP_VERSION=2: what `accelerate launch --use_fsdp` sets) shard
# the model, as torch's FSDP2 does on gloo, or are refused.
# Seen with accelerate 1.15.0, torch 2.13.0: one process, and data parallelism with whole parameters in each. Neither is
# said. The first warns of three other values that were not passed.
# Guess written down before the run: two processes; an error for FSDP on a processor.
# Where it comes from: accelerate/commands/launch.py, launch_command: every launcher of several processes is guarded by
# `not args.cpu`, and without mpirun the simple one is left; accelerate/state.py, AcceleratorState: MULTI_CPU is not
# among the types that become FSDP, while Accelerator makes and drops the plugin.
# Whom it hurts: those who try a distributed training on processors before they pay for GPUs, and tests that do so in CI:
# loss curves are right, batches a half, and what fails with shards is not seen.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
cd "$folder"
cat > train.py <<'PYTHON'
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

accelerator = Accelerator(cpu=True)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
if accelerator.is_main_process:
    print(accelerator.num_processes, type(model).__name__, "sharded" if sharded else "whole")
PYTHON
export OMP_NUM_THREADS=1 HF_HOME="$folder/home"
launched=$("$folder/venv/bin/accelerate" launch --cpu --num_processes 2 train.py 2>/dev/null)
asked=$(ACCELERATE_USE_FSDP=true FSDP_VERSION=2 "$folder/venv/bin/torchrun" --nproc-per-node 2 train.py 2>/dev/null)
echo "accelerate launch --cpu --num_processes 2: $launched"
echo "torchrun --nproc-per-node 2, FSDP of version 2 asked for: $asked"
test "$launched" = "1 Sequential whole" && test "$asked" = "2 DistributedDataParallel whole"
