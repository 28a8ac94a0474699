#!/usr/bin/env bash
# torchao's 4-bit configs leave layers whose width is no multiple of 128 in 16 bits, and do not say so.
#
# One would expect: quantize_ rounds each linear layer, and a width that the group size does not divide is an error, as
# it is for torchao's IntxWeightOnlyConfig.
# Seen with torchao 0.18.0, torch 2.13.0, transformers 5.17.0, a Llama of SmolLM2-135M's widths (576 and 1,536), bf16,
# the config for processors: with the default group of 128 only the down projections are rounded, 25% of the weights of
# linear layers. The others stay as they were, without a word on the screen. With groups of 64 all are rounded.
# Int4WeightOnlyConfig, for GPUs, hands a layer of 576 back as it came in the same way.
# Guess written down before the run: an AssertionError that names 576 and 128, as IntxWeightOnlyConfig raises.
# Where it comes from: torchao/quantization/quant_api.py, _int4_weight_only_quantize_tensor (and its copy in
# torchao/prototype/quantization/int4): it returns such weights as they came, and tells so at level INFO, which is not
# shown.
# Whom it hurts: who measures "4 bits" of small models: three quarters of the weights are in 16, so the loss is small
# and the memory is not. Widths of 576 (SmolLM2-135M), 960 (SmolLM2-360M) and 2,880 (gpt-oss) are such.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.17.0 accelerate==1.15.0 torchao==0.18.0
cd "$folder"
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - >said 2>messages <<'PYTHON' || { cat said; tail -5 messages; exit 1; }
import sys

import torch
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH, WIDE = 576, 1536
shape = {"hidden_size": WIDTH, "intermediate_size": WIDE, "num_hidden_layers": 4, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 4096, "tie_word_embeddings": True}  # fmt: skip


def linear(module, name):
    return isinstance(module, torch.nn.Linear) and "head" not in name


def rounded(given):
    """The layers that are no longer in 16 bits, of how many, and the share of the weights that they hold."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16)
    quantize_(model, given, linear)
    layers = {name: module for name, module in model.named_modules() if linear(module, name)}
    size = {name: module.in_features * module.out_features for name, module in layers.items()}
    done = [name for name, module in layers.items() if type(module.weight) is not torch.nn.Parameter]
    return done, len(layers), sum(size[name] for name in done) / sum(size.values())


found = {group: rounded(PrototypeInt4WeightOnlyConfig(group_size=group)) for group in (128, 64)}
for group, (done, layers, share) in found.items():
    kinds = sorted({name.rpartition(".")[2] for name in done})
    print(f"groups of {group}: {len(done)} of {layers} layers are rounded ({', '.join(kinds)}), {share:.0%} of weights")
single = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH, bias=False)).to(torch.bfloat16)
before = single[0].weight
quantize_(single, Int4WeightOnlyConfig())
same = torch.equal(single[0].weight, before) and type(single[0].weight) is torch.nn.Parameter
print("Int4WeightOnlyConfig hands a layer of 576", "back as it came" if same else "back rounded")
try:
    quantize_(single, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(128)))
    refused = ""
except AssertionError as error:
    refused = str(error)
print("IntxWeightOnlyConfig:", refused)
(few, layers, share), (all_of_them, *_) = found.values()
downs = len(few) == 4 and all(name.endswith("down_proj") for name in few) and share < 0.3
sys.exit(0 if downs and len(all_of_them) == layers and same and refused else 1)
PYTHON
cat said
if grep -i "skipping" messages said; then exit 1; fi
