#!/usr/bin/env bash
# Trainer's eval_loss depends on the batch size: the same model and texts have perplexity 1.87 by one, 1.44 by 64.
#
# One would expect: since transformers counts the tokens of all accumulated batches, a loss is a mean over tokens, in
# evaluation as in training; exp(eval_loss) is the perplexity, whatever the batch size.
# Seen with transformers 5.17.0, a Llama that was trained on texts of 4 to 128 tokens (log-normal lengths) whose first
# tokens are hard and the others easy, as in language. The perplexity over all tokens is 1.435. By eval_loss it is 1.865
# one text at a time, 1.477 with 8, 1.435 with all 64 at once, and 1.847 with 8 of like length. The training loss that
# Trainer logs for the same texts is 1.435, in one batch of 64 as in 64 accumulated ones.
# Guess written down before the run: evaluation weighs tokens as training does since version 5.
# Where it comes from: transformers/trainer.py. prediction_step asks the model for the mean over the tokens of its
# batch, since it does not hand on num_items_in_batch. evaluation_loop repeats that number for each row of the batch and
# takes the mean over rows: tokens of a batch of short texts count more than others.
# Whom it hurts: whoever compares eval_loss of runs with other batch sizes, on other numbers of GPUs or with
# group_by_length, as comparisons of adapters and quantized bases do, or reports exp(eval_loss) as perplexity.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.17.0 accelerate==1.15.0
cd "$folder"
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2>messages <<'PYTHON' || { tail -5 messages; exit 1; }
import math
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

VOCABULARY, STEPS = 97, 12  # a text counts by a step of its own: its second token is any of so many


def texts(count, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.exp(2.7 + 0.9 * torch.randn(count, generator=generator)).round().int().clamp(4, 128).tolist()
    starts = torch.randint(VOCABULARY, (count,), generator=generator).tolist()
    steps = torch.randint(1, STEPS + 1, (count,), generator=generator).tolist()
    return [
        {"input_ids": [(start + step * at) % VOCABULARY for at in range(length)]}
        for start, step, length in zip(starts, steps, lengths, strict=True)
    ]


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    ids, mask = torch.tensor(ids), torch.tensor(mask)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def trainer(model, rows, **options):
    arguments = TrainingArguments("out", report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", **options)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)


torch.manual_seed(0)
shape = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=4))
trainer(model, texts(12_800, 1), per_device_train_batch_size=32, learning_rate=3e-3, max_steps=400).train()
rows = texts(64, 2)
model.eval()
with torch.no_grad():
    batch = collate(rows)
    mean = model(**batch).loss.item()
print(f"mean over all tokens: perplexity {math.exp(mean):.3f}")


def evaluated(rows, size):
    return math.exp(trainer(model, rows, per_device_eval_batch_size=size).evaluate()["eval_loss"])


def training_loss(size):
    """What Trainer logs for one step over all rows, at a learning rate of 0."""
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 64 // size, "learning_rate": 0.0}
    return math.exp(trainer(model, rows, max_steps=1, **options).train().training_loss)


found = {size: evaluated(rows, size) for size in (1, 8, 64)}
by_length = evaluated(sorted(rows, key=lambda row: len(row["input_ids"])), 8)
trained = {size: training_loss(size) for size in (1, 64)}
for size, value in found.items():
    print(f"eval_loss, per_device_eval_batch_size={size}: perplexity {value:.3f}")
print(f"eval_loss, 8 of like length: perplexity {by_length:.3f}")
print("training loss: perplexity", ", ".join(f"{value:.3f} by {size}" for size, value in trained.items()))
still = (
    found[1] > 1.05 * found[8] > 1.05 * found[64]
    and abs(found[64] / math.exp(mean) - 1) < 0.001
    and by_length > 1.05 * found[8]
    and all(abs(value / math.exp(mean) - 1) < 0.001 for value in trained.values())
)
print("as described above" if still else "not as described above any more")
sys.exit(not still)
PYTHON
