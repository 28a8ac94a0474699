#!/usr/bin/env bash
# Trainer adds up the mean losses of accumulated batches: a distillation loss is four times as large over four of them.
#
# One would expect: with per_device_train_batch_size 1 and gradient_accumulation_steps 4 a Trainer whose compute_loss
# returns a mean (KL to a teacher, as distillation code has it) takes the step that it takes with a batch of 4.
# Seen with transformers 5.17.0, torch 2.13.0, accelerate 1.15.0: the gradient's norm and the logged loss are four times
# those of a batch of 4, where examples have labels. AdamW hides it from most steps, but clipping and the logged loss are
# others. Without labels, or for a model whose forward pass takes no further keyword arguments, the same compute_loss is
# divided as expected.
# Guess written down before the run: both steps are the same up to rounding, since Trainer has always divided.
# Where it comes from: transformers/trainer.py, training_step: the loss is divided only where the model accepts no loss
# kwargs or num_items_in_batch is None; Llama's forward pass has **kwargs, so that the loss counts as normalised by the
# number of labels, which a compute_loss of one's own need not know of.
# Whom it hurts: anyone who overrides compute_loss (distillation, preference or auxiliary losses) and raises the
# accumulation to fit memory: clipping, weight decay and learning curves change with it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.17.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import copy
import sys

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
teacher, student = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config)
rows = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(64, (4, 16))]


class Distilling(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            wanted = teacher(input_ids=inputs["input_ids"]).logits.log_softmax(-1)
        own = model(input_ids=inputs["input_ids"]).logits.log_softmax(-1)
        return F.kl_div(own.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean")


class WithoutFurtherArguments(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids)


def step(model, batch, accumulated):
    arguments = TrainingArguments(
        "out", max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated, use_cpu=True,
        logging_steps=1, report_to="none", save_strategy="no", max_grad_norm=1.0, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Distilling(copy.deepcopy(model), arguments, train_dataset=rows)
    trainer.train()
    return next((entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry)


ratios = {}
for name, model in (("Llama", student), ("without **kwargs", WithoutFurtherArguments(student))):
    whole, parts = step(model, 4, 1), step(model, 1, 4)
    ratios[name] = [part / one for part, one in zip(parts, whole)]
    print(f"{name}: loss and norm of the gradient, a batch of 4: {whole}; four batches of 1: {parts}")
ok = all(3.9 < ratio < 4.1 for ratio in ratios["Llama"])
sys.exit(not (ok and all(0.95 < ratio < 1.05 for ratio in ratios["without **kwargs"])))
PYTHON
