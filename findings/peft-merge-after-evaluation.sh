#!/usr/bin/env bash
# On processors with AVX512-BF16, peft merges an adapter into noise once the 4-bit model was evaluated.
#
# One would expect: a forward pass in eval mode changes nothing, so merge_and_unload gives the same model before and
# after it. Guess written down before the run: the merged weights are equal, and so is what a checkpoint holds.
# Seen with bitsandbytes 0.50.2, peft 0.21.2, transformers 5.17.0, torch 2.13.0: after one forward pass, merging
# gives weights whose cosine with the right ones is 0, without an error. The state dict has other scales as well: they
# went through bf16 and were quantized anew.
# Where it comes from: Linear4bit.forward in eval mode repacks the weight in place for its AVX512-BF16 kernel
# (functional._convert_weight_packed_for_cpu), and dequantize_4bit, which peft calls to merge (utils/integrations.py),
# reads the new layout as if it were the old one. Saving undoes the layout, but the scales were replaced.
# Whom it hurts: who trains QLoRA on a server without a GPU, evaluates and merges, the usual order. A processor without
# AVX512-BF16 has none of it, so tests there pass.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.17.0 accelerate==1.15.0 \
    bitsandbytes==0.50.2 peft==0.21.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

if not torch.cpu.get_capabilities().get("avx512_bf16", False):
    print("This processor has no AVX512-BF16: bitsandbytes repacks nothing, and there is nothing to see.")
    sys.exit()

torch.manual_seed(0)
shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=320, **shape)).save_pretrained("model")
tokens = torch.randint(0, 320, (2, 16))
kinds = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


def merged(evaluated):
    """The weights of q_proj after merging an adapter that changes nothing yet."""
    model = AutoModelForCausalLM.from_pretrained("model", quantization_config=kinds)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    if evaluated:
        with torch.no_grad():
            model(input_ids=tokens)
    layer = model.merge_and_unload().model.layers[0].self_attn.q_proj
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().flatten()


def scales(evaluated):
    """What the state dict holds of the scales of one quantized layer: codes, uint8."""
    model = AutoModelForCausalLM.from_pretrained("model", quantization_config=kinds).eval()
    if evaluated:
        with torch.no_grad():
            model(input_ids=tokens)
    return model.state_dict()["model.layers.0.mlp.up_proj.weight.absmax"]


before, after = merged(False), merged(True)
alike = torch.cosine_similarity(before, after, 0).item()
print(f"cosine of the merged weights, evaluated first or not: {alike:.3f}")
loaded, saved = scales(False), scales(True)
print(f"codes of scales that a checkpoint would have otherwise: {(loaded != saved).sum()} of {loaded.numel()}")
if abs(alike) > 0.5 or torch.equal(loaded, saved):
    sys.exit("changed: an evaluation no longer changes what is merged, or what is saved")
PYTHON
