#!/usr/bin/env bash
# transformers' Trainer, resumed from the checkpoint of its last step, trains one step beyond max_steps.
#
# One would expect: train(resume_from_checkpoint=...) of a finished run does nothing: the model is the one of the checkpoint. Jobs
# on clusters are restarted with the same command until it succeeds, and a run killed between its last checkpoint and its end
# comes back to just this.
# Seen with transformers 5.17.0: where max_steps ends inside an epoch (6 steps, 4 an epoch), the resumed run goes to step 7 of 6.
# Under a constant rate each weight moves by up to the whole rate; under a linear schedule, whose rate is 0 by then, none does.
# Where max_steps is the end of an epoch (8 steps), nothing is trained. Resumed at step 3 of 6, the run ends with the same weights
# as one that was never stopped.
# Guess written down before the run: no step in any of the cases; the first try, with whole epochs, even seemed to confirm it.
# Where it comes from: the loop over an epoch's batches in transformers/trainer.py asks whether max_steps is reached after a step,
# never before the first one.
# Whom it hurts: who compares weights or losses of restarted runs to the last bit, or trains under a constant or cyclic rate (QLoRA's
# own recipe is a constant one): a restarted job is another model than one that was left alone, without a word.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.17.0 accelerate==1.15.0
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=32,
)  # fmt: skip
texts = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))  # four batches of two an epoch
examples = [{"input_ids": row, "labels": row} for row in texts]
RATE = 1e-3


def run(folder, steps, schedule, checkpoint=None):
    torch.manual_seed(0)
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=2, learning_rate=RATE, lr_scheduler_type=schedule,
        save_strategy="steps", save_steps=steps // 2, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=LlamaForCausalLM(config), args=arguments, train_dataset=examples)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer.state.global_step, torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach()


found = {}
for steps in (6, 8):
    for schedule in ("constant", "linear"):
        folder = f"{steps}-{schedule}"
        _, whole = run(folder, steps, schedule)
        for at in (steps // 2, steps):
            ended, weights = run(folder, steps, schedule, f"{folder}/checkpoint-{at}")
            apart = (weights - whole).abs().max().item()
            found[steps, schedule, at] = ended, apart
            print(f"{schedule}, resumed at step {at} of {steps}: ends at step {ended}, weights off by up to {apart:.2g}")
extra = {case: ended - case[0] for case, (ended, _) in found.items()}
if {case for case, steps in extra.items() if steps} != {(6, "constant", 6), (6, "linear", 6)}:
    sys.exit("changed: other runs than the two that had ended inside an epoch went on, or these do not any more")
if found[6, "constant", 6][1] < RATE / 2 or any(found[case][1] for case in found if not extra[case]):
    sys.exit("changed: the further step does not move the weights, or resuming in the middle changes them")
PYTHON
