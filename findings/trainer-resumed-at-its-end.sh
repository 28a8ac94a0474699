#!/usr/bin/env bash
# transformers' Trainer, resumed from the checkpoint of its last step, trains one step more.
#
# One would expect: a training of max_steps that goes on from a checkpoint of that step does nothing, and ends with the
# same weights. Guess written down before the run: equal, for the crash tests that found it were to show just that.
# Seen with transformers 5.17.0: another step is taken, with the learning rate that the schedule has after its end, and
# global_step is max_steps + 1. Where the examples are used up at max_steps (a whole number of epochs), nothing happens.
# Where it comes from: Trainer._run_epoch asks whether to stop only after a step; on_train_begin sets should_training_stop
# back to False (trainer.py, trainer_callback.py).
# Whom it hurts: whoever starts a job again that was killed between its last checkpoint and what came after, as batch
# systems do. With a schedule that does not end at zero the weights move, and no line says so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.17.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

EXAMPLES = [{"x": torch.full((4,), float(i))} for i in range(8)]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 1)

    def forward(self, x):
        return {"loss": self.linear(x).square().mean()}


def train(steps, resumed):
    """Steps taken in all, and the weight afterwards."""
    arguments = TrainingArguments(
        output_dir=f"to-{steps}",
        max_steps=steps,
        per_device_train_batch_size=2,
        lr_scheduler_type="constant",
        save_steps=steps,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        logging_strategy="no",
    )
    model = Model()
    trainer = Trainer(model, arguments, train_dataset=EXAMPLES)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resumed)
    return trainer.state.global_step, model.linear.weight.detach().clone()


for steps in (4, 3):
    whole, weight = train(steps, False)
    again, other = train(steps, True)
    print(f"max_steps {steps} of 4 in an epoch: {whole} steps, resumed {again}; same weights: {torch.equal(weight, other)}")
if again == whole:
    sys.exit("changed: a training that is resumed at its end stays there")
PYTHON
