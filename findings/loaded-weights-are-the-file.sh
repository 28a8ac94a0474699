#!/usr/bin/env bash
# A model that transformers has loaded on the CPU still is its safetensors file: writing that file anew in place changes the model.
#
# One would expect: from_pretrained returns a model with weights of its own. What happens to the folder afterwards (a newer
# checkpoint copied over it, a sync) concerns the next load.
# Seen with transformers 5.17.0, safetensors 0.8.0, torch 2.13.0: where the file's type is the one that is asked for, the
# parameters are the mapped file. Written anew in place, as cp and rsync --inplace do, all matrices of the model that is in use are
# the new file's. Renamed over, as rsync does by itself, none change; nor do any where loading casts (stored in bf16, loaded in
# fp32).
# Guess written down before the run: weights are copied in all four cases.
# Where it comes from: safetensors' default reader on Linux, which maps the file, and transformers' loader, which takes its tensors
# as parameters without a copy where neither type nor device differ.
# Whom it hurts: a long evaluation or quantization on the CPU beside a job that publishes checkpoints into the same folder: the
# first half of the numbers is of the old weights, the second of the new ones, and a hash taken at either end vouches for both.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.17.0 safetensors==0.8.0
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)


def save(folder, seed, dtype):
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)


def vector(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


found = {}
for stored in (torch.float32, torch.bfloat16):
    for how in ("in place", "renamed over"):
        save("model", 0, stored)
        save("other", 1, stored)
        model = LlamaForCausalLM.from_pretrained("model", dtype=torch.float32)
        before = vector(model)
        new = Path("other/model.safetensors").read_bytes()
        if how == "in place":  # as cp, rsync --inplace or an editor do
            with Path("model/model.safetensors").open("r+b") as file:
                file.write(new)
        else:
            Path("model/new").write_bytes(new)
            Path("model/new").replace("model/model.safetensors")
        changed = (vector(model) != before).float().mean().item()
        found[stored, how] = changed
        print(f"stored in {stored}, loaded in fp32, file written anew {how}: {changed:.0%} of the loaded weights changed")
if found[torch.float32, "in place"] < 0.9:
    sys.exit("changed: a loaded model no longer follows its file")
if any(changed for case, changed in found.items() if case != (torch.float32, "in place")):
    sys.exit("changed: a model follows its file in other cases, too")
PYTHON
