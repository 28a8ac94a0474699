#!/usr/bin/env bash
# lm-eval's documented model_args load_in_4bit=True ends in a TypeError: transformers 5 does not know the argument.
#
# One would expect: `lm_eval --model hf --model_args pretrained=...,load_in_4bit=True`, which stands in lm-eval's
# README, loads the model in 4 bits, or says that it cannot: lm-eval checks that transformers is at least 4.30 for it.
# Seen with lm-eval 0.4.13, transformers 5.17.0, bitsandbytes 0.50.2: the argument reaches the model's constructor,
# which says "unexpected keyword argument 'load_in_4bit'"; load_in_8bit likewise. A quantization_config, which
# transformers wants in its place, cannot be given to HFLM either: "multiple values for keyword argument". What is left
# is a model that was saved in NF4, which is loaded in NF4 without any argument.
# Guess written down before the run: the model is in NF4 or FP4 afterwards, perhaps with a warning that the argument is
# old.
# Where it comes from: lm_eval/models/huggingface.py, _create_model passes load_in_4bit and bnb_4bit_* on to
# from_pretrained; transformers took them out in version 5, where they are fields of BitsAndBytesConfig alone. Its own
# argument quantization_config is the one of the model's config.json. lm-eval asks for transformers without an upper
# bound, so that a fresh environment has both.
# Whom it hurts: everyone who evaluates QLoRA's base or an adapter on it (peft=..., load_in_4bit=True) by the documented
# line, and scripts that did so for years.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 lm-eval==0.4.13 transformers==5.17.0 \
    accelerate==1.15.0 bitsandbytes==0.50.2
cd "$folder"
export OMP_NUM_THREADS=1 HF_HOME="$folder/home" HF_HUB_OFFLINE=1
"$folder/venv/bin/python" - 2>messages <<'PYTHON'
import sys

import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

torch.manual_seed(0)
letters = {"<unk>": 0, "<eos>": 1, **{chr(code): code for code in range(33, 127)}}
tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="<unk>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=128, **shape)).save_pretrained("plain")
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
AutoModelForCausalLM.from_pretrained("plain", quantization_config=nf4).save_pretrained("nf4")
for folder in ("plain", "nf4"):
    tokenizer.save_pretrained(folder)

found = {}
for name, pretrained, settings in (
    ("load_in_4bit=True", "plain", {"load_in_4bit": True}),
    ("load_in_8bit=True", "plain", {"load_in_8bit": True}),
    ("quantization_config", "plain", {"quantization_config": nf4}),
    ("saved in NF4", "nf4", {}),
):
    try:
        model = HFLM(pretrained=pretrained, device="cpu", **settings).model
        found[name] = type(model.model.layers[0].mlp.up_proj).__name__
    except TypeError as error:
        found[name] = f"TypeError: {error}"
    print(f"{name}: {found[name]}")
gone = "multiple values" in found["quantization_config"] and all(
    "unexpected keyword argument" in found[f"load_in_{bits}bit=True"] for bits in (4, 8)
)
sys.exit(0 if gone and found["saved in NF4"] == "Linear4bit" else 1)
PYTHON
