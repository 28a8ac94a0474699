#!/usr/bin/env bash
# llm-compressor's oneshot calibrates on 29% of the text with batch_size=8: each batch is cut to its shortest sample.
#
# One would expect: batch_size is for speed. Samples of a batch are padded, padded positions are left out of GPTQ's
# statistics, and the model is the same but for rounding.
# Seen with llm-compressor 0.14.0.1, GPTQ of a Llama at W4A16, 64 samples of 8 to 256 tokens (log-normal lengths, as
# instructions have), all of them used: with batch_size=1 all 4,195 tokens are seen, with 4 it is 43% of them, with 8
# 29%. With data_collator="padding" all are seen, and 1.3 times as many padded positions, which count as text does:
# nothing masks them. One weight in eight has another 4-bit code than with batch_size=1. A warning says that tokens are
# deleted or padding is added, among those that each run prints; it does not say how many.
# Guess written down before the run: batches are padded, and pads are masked.
# Where it comes from: llmcompressor/datasets/utils.py. data_collator is "truncation" by default, and
# DataCollatorWithTruncation cuts all samples of a batch to the length of the shortest. shuffle_calibration_samples is
# True by default, so that short and long samples meet in a batch; without it, samples are sorted by length.
# Whom it hurts: whoever raises batch_size, because a GPU has room, and compares the result with a published one of as
# many samples. Samples of equal length lose nothing.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.17.0 accelerate==1.15.0 \
  datasets==5.2.0 compressed-tensors==0.19.0 llmcompressor==0.14.0.1
cd "$folder"
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2>messages <<'PYTHON' || { tail -5 messages; exit 1; }
import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, PAD, SAMPLES = 512, 0, 64
torch.manual_seed(0)
shape = {"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=4)).save_pretrained("model")
words = Tokenizer(models.WordLevel({str(word): word for word in range(VOCABULARY)}, unk_token=str(PAD)))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token=str(PAD), pad_token=str(PAD))
tokenizer.save_pretrained("model")
lengths = torch.exp(4 + 0.8 * torch.randn(SAMPLES)).round().int().clamp(8, 256).tolist()
texts = [torch.randint(1, VOCABULARY, (length,)).tolist() for length in lengths]


def calibrated(**options):
    """The codes of one layer; how many positions with text and with padding it saw."""
    model = AutoModelForCausalLM.from_pretrained("model").eval()
    layer = model.model.layers[0].mlp.down_proj
    seen, rows = [], []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    layer.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[:-1].numel()))
    masks = [[1] * len(text) for text in texts]
    torch.manual_seed(0)
    oneshot(
        model=model,
        recipe=[GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])],
        dataset=Dataset.from_dict({"input_ids": texts, "attention_mask": masks}),
        num_calibration_samples=SAMPLES,
        max_seq_length=256,
        tokenizer=tokenizer,
        **options,
    )
    batches = {tuple(map(tuple, own.tolist())): own for own in seen if own.device.type == "cpu"}.values()  # each once
    padded = sum((own == PAD).sum().item() for own in batches)
    return layer.weight.detach().clone(), sum(own.numel() for own in batches) - padded, padded


whole = sum(lengths)
plain, tokens, padded = calibrated()
print(f"{SAMPLES} samples of {whole} tokens; batch_size=1: {tokens} tokens, {padded} padded positions")
found = {}
for options in ({"batch_size": 4}, {"batch_size": 8}, {"batch_size": 8, "data_collator": "padding"}):
    weight, own, pads = calibrated(**options)
    other = (weight != plain).float().mean().item()
    found[tuple(options.values())] = own / whole, pads / whole, other
    print(f"{options}: {own / whole:.0%} of the tokens, {pads / whole:.0%} as many pads, {other:.0%} other weights")
still = (
    tokens == whole
    and not padded
    and 0.25 < found[(4,)][0] < 0.5
    and 0.12 < found[(8,)][0] < 0.3
    and found[(8, "padding")][0] == 1
    and found[(8, "padding")][1] > 0.7
    and all(other > 0.1 for _, _, other in found.values())
)
print("as described above" if still else "not as described above any more")
sys.exit(not still)
PYTHON
