#!/usr/bin/env bash
# trl trains QLoRA's adapters in bf16, asked or not: at its own learning rate four in five numbers of A never move.
#
# One would expect: peft makes adapters in float32, also on a 4-bit base, so that small steps add up. SFTTrainer without
# bf16 trains them so, and LoRA on a dense base and QLoRA on an NF4 base differ by their base alone.
# Seen with trl 1.16.0, peft 0.21.2, transformers 5.17.0, bitsandbytes 0.50.2, a small Llama, rank 16, bf16=False,
# 100 steps at SFTConfig's own 2e-5, constant: on a dense base adapters are float32 and each number of A has moved. On
# NF4 they are bf16, 80% of A are to the last bit where they began, and what was learned is a quarter less. The same
# adapters put back into float32 after the trainer was made move whole, and learn as much as those on the dense base.
# Guess written down before the run: float32 as peft makes them, and all numbers move.
# Where it comes from: trl/trainer/sft_trainer.py casts what can be trained of a quantized model to bf16, for QLoRA's
# section 3. The optimizer's state and steps are in bf16 then: a number of 0.03 has its neighbours 0.0001 apart, and
# AdamW's step of 2e-5 is rounded away. trl leaves DoRA's magnitudes out of the cast for this reason. DPO and other
# trainers of trl have the same lines.
# Whom it hurts: who compares LoRA and QLoRA with trl, or tunes QLoRA's learning rate: small ones look worse than they
# are, and half of the adapter stays what chance made it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.17.0 accelerate==1.15.0 \
  datasets==5.2.0 peft==0.21.2 bitsandbytes==0.50.2 trl==1.16.0
cd "$folder"
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2>messages <<'PYTHON' || { tail -5 messages; exit 1; }
import contextlib
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

signs = ["<s>", "</s>", *map(chr, range(32, 127))]
letters = Tokenizer(models.WordLevel({sign: at for at, sign in enumerate(signs)}, unk_token="</s>"))
letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=letters, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="</s>"
)
texts = [{"text": f"The sum of {a} and {b} is {a + b}."} for a in range(20) for b in range(20)]
torch.manual_seed(0)
shape = {"vocab_size": len(signs), "hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 128}
heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LlamaForCausalLM(LlamaConfig(**shape, **heads)).save_pretrained("base")
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def trained(base, again_float32=False):
    """The type of the adapters, the share of A's numbers that never moved, and the loss at the beginning and end."""
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained("base", quantization_config=base, dtype=torch.float32)
    given = SFTConfig(
        output_dir="out", max_steps=100, lr_scheduler_type="constant", bf16=False, use_cpu=True, logging_steps=10,
        gradient_checkpointing=False, save_strategy="no", report_to=[],
    )  # fmt: skip
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    trainer = SFTTrainer(model, args=given, train_dataset=Dataset.from_list(texts), processing_class=tokenizer,
                         peft_config=adapter)  # fmt: skip
    own = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    for value in own.values():
        value.data = value.data.float() if again_float32 else value.data
    began = {name: value.detach().clone() for name, value in own.items() if "lora_A" in name}
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    still = sum(int((own[name] == value).sum()) for name, value in began.items())
    losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    kinds = {str(value.dtype).removeprefix("torch.") for value in own.values()}
    return kinds, still / sum(value.numel() for value in began.values()), losses[0] - losses[-1]


found = {
    "a dense base": trained(None),
    "an NF4 base": trained(NF4),
    "an NF4 base, adapters put back into float32": trained(NF4, again_float32=True),
}
for where, (kinds, still, gained) in found.items():
    print(f"{where}: adapters in {', '.join(kinds)}, {still:.0%} of A never moved, the loss fell by {gained:.3f}")
dense, four, back = found.values()
cast = dense[0] == back[0] == {"float32"} and four[0] == {"bfloat16"}
stands = dense[1] < 0.001 and back[1] < 0.001 and 0.7 < four[1] < 0.9
sys.exit(0 if cast and stands and four[2] < 0.9 * back[2] else 1)
PYTHON
