#!/usr/bin/env bash
# transformers 5 gives no attention maps for its default attention: a loss on them is 0 and trains nothing.
#
# One would expect: output_attentions=True gives the map of each layer, as transformers 4 did by computing attention the
# plain way, or an error says that sdpa, which models are loaded with, has none.
# Seen with transformers 5.17.0, torch 2.13.0: `attentions` is an empty tuple, and one line at warning level says so. A
# distillation loss that sums over the layers of teacher and student is the number 0, in training too; with the loss on
# logits beside it, the training runs and its curve looks as it should. With "eager" there are as many maps as layers.
# Guess written down before the run: maps by way of the plain attention, with a warning that it is slower.
# Where it comes from: transformers/integrations/sdpa_attention.py warns and returns no weights;
# transformers/utils/output_capturing.py collects what the attention modules return and leaves out what is None.
# Whom it hurts: those who distil on attention maps (LLM-QAT's ablation of losses, MiniLM, TinyBERT) with code from
# before version 5: what they publish as "logits and attention maps" is logits alone.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.17.0
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - 2>messages <<'PYTHON'
import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

LAYERS = 2
config = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=300
)
ids = torch.randint(300, (1, 16), generator=torch.Generator().manual_seed(0))
found = {}
for attention in (None, "eager"):
    torch.manual_seed(0)
    settings = {"attn_implementation": attention} if attention else {}
    teacher, student = (AutoModelForCausalLM.from_config(config, **settings).train(mode) for mode in (False, True))
    with torch.no_grad():
        wanted = teacher(ids, output_attentions=True).attentions
    maps = student(ids, output_attentions=True).attentions
    loss = sum(torch.nn.functional.mse_loss(own, other) for own, other in zip(maps, wanted, strict=True))
    loss = float(loss.detach()) if maps else loss
    name = student.config._attn_implementation
    found[name] = len(wanted), len(maps), loss
    print(f"{name}: {len(maps)} maps of {LAYERS} layers, a loss on them of {loss:.3g}")
sys.exit(0 if found["sdpa"] == (0, 0, 0) and found["eager"][:2] == (LAYERS, LAYERS) and found["eager"][2] > 0 else 1)
PYTHON
