#!/usr/bin/env bash
# compressed-tensors' cache with a scale per token has one per head: what is said of a token depends on later ones.
#
# One would expect: a dynamic kv_cache_scheme of strategy "token" gives the keys and values of each token scales of
# their own, as the same strategy does for activations, so that a causal model stays causal.
# Seen with compressed-tensors 0.19.0, transformers 5.17.0, torch 2.13.0, a Llama of SmolLM2's widths with eight layers:
# two texts that differ in their second half alone have other logits in their first half, by 1.9% of their size in 8
# bits and by 15% in 4 bits; without a quantized cache, and with strategy "group" over a head's numbers, they are equal.
# Guess written down before the run: the same logits up to rounding, perhaps one scale for all heads of a token.
# Where it comes from: compressed_tensors/quantization/utils/helpers.py, compute_dynamic_scales_and_zp keeps dimensions
# 0 and 1 for "token". Activations are [batch, tokens, width]; keys and values are [batch, heads, tokens, numbers].
# Whom it hurts: whoever measures the perplexity of a low-bit cache by it. The numbers are those of no cache that a
# program could have while it writes a text: tokens that are not there yet have set the scale.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.17.0 accelerate==1.15.0 \
  compressed-tensors==0.19.0
cd "$folder"
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2>messages <<'PYTHON' || { tail -5 messages; exit 1; }
import copy
import sys

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 4096}  # fmt: skip
plain = LlamaForCausalLM(LlamaConfig(**shape)).eval()
with torch.no_grad():
    for name, parameter in plain.named_parameters():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            parameter *= torch.exp(0.5 * torch.randn(len(parameter), 1))  # channels of unlike size, as in trained models


def with_cache(bits, **how):
    model = copy.deepcopy(plain)
    scheme = QuantizationArgs(num_bits=bits, symmetric=True, dynamic=True, observer=None, **how)
    apply_quantization_config(model, QuantizationConfig(config_groups={}, kv_cache_scheme=scheme))
    return model


half = 64
first, others = torch.randint(4096, (1, half)), torch.randint(4096, (2, half))
texts = torch.cat([first.expand(2, -1), others], 1)


@torch.no_grad()
def apart(model):
    """How far the logits of the first half are apart, as a share of their size, when the second half is another."""
    one, other = (model(input_ids=text[None], use_cache=False).logits[0, :half] for text in texts)
    return ((one - other).norm() / one.norm()).item()


seen = {
    "cache in fp32": apart(plain),
    "8 bits, token": apart(with_cache(8, strategy="token")),
    "4 bits, token": apart(with_cache(4, strategy="token")),
    "4 bits, group of a head's 64 numbers": apart(with_cache(4, strategy="group", group_size=64)),
}
for name, moved in seen.items():
    print(f"{name}: the first half's logits move by {moved:.2%} of their size when the second half is another")
exact = all(seen[name] < 1e-4 for name in ("cache in fp32", "4 bits, group of a head's 64 numbers"))
sys.exit(0 if exact and seen["8 bits, token"] > 0.005 and seen["4 bits, token"] > 0.05 else 1)
PYTHON
