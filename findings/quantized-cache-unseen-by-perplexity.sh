#!/usr/bin/env bash
# transformers' quantized KV cache changes nothing in a pass over a whole text, and rounds its exact tokens all at once.
#
# One would expect: perplexity with a 2-bit cache shows what 2 bits cost, whether a text is passed at once or token by
# token. The last residual_length tokens stay exact, those of the prompt included.
# Seen with transformers 5.17.0, optimum-quanto 0.2.7, 2 bits, residual_length 128: the logits of a text that is
# passed at once are those without a cache to the last bit, as the first call gets its own keys and values back
# unrounded. For the token after a prompt of 200 tokens, no token of the prompt is exact. The exact tokens then grow
# to 128, fall to the one new token, and grow again. A second call with 200 tokens leaves all 200 exact, more than
# residual_length.
# Guess written down before the run: each token is rounded once, and the last residual_length tokens stay exact, also
# after a long prompt.
# Where it comes from: transformers/cache_utils.py, QuantizedLayer.update.
# Whom it hurts: anyone who measures a quantized cache by the usual perplexity or by log-likelihoods of choices, one
# call for each text. Two bits look free there. And anyone who compares lengths or programs: the lengths of the prompt
# and of the answer decide how many tokens are exact.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.17.0 optimum-quanto==0.2.7
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import QuantizedCache

WINDOW, PROMPT = 128, 200
config = LlamaConfig(
    vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    initializer_range=0.2,
)  # fmt: skip
torch.manual_seed(0)
model = LlamaForCausalLM(config).eval()
text = torch.randint(64, (1, 600))


def new_cache():
    return QuantizedCache("quanto", config, nbits=2, residual_length=WINDOW)


def passed(lengths):
    cache, logits, at = new_cache(), [], 0
    with torch.no_grad():
        for length in lengths:
            logits.append(model(text[:, at : at + length], past_key_values=cache).logits)
            at += length
    return torch.cat(logits, 1).log_softmax(-1)


with torch.no_grad():
    right = model(text, use_cache=False).logits.log_softmax(-1)
whole, singly = passed([600]), passed([PROMPT] + [1] * 400)


def divergence(got):
    """Mean over the positions after the prompt of the Kullback-Leibler divergence from the model without a cache."""
    return (right.exp() * (right - got)).sum(-1)[0, PROMPT:].mean().item()


same, apart = torch.equal(whole, right), divergence(singly)
print(f"the text at once: divergence {divergence(whole):.2g} from no cache, equal to the last bit: {same}")
print(f"a prompt of {PROMPT}, then token by token: divergence {apart:.2g}")

keys = torch.randn(1, 2, 1000, 64)


def exact(lengths):
    """How many tokens are exact in what the last call gets back."""
    cache, at = new_cache(), 0
    for length in lengths:
        new = keys[:, :, at : at + length]
        got, _ = cache.update(new, new, 0)
        at += length
    return int((got == keys[:, :, :at]).all(-1).all(1).sum())


after = 0, 1, 2, WINDOW, WINDOW + 1, WINDOW + 2, 2 * WINDOW, 2 * WINDOW + 1
windows = [exact([PROMPT] + [1] * new) for new in after]
print(f"exact tokens after {', '.join(map(str, after))} tokens behind the prompt:", windows)
second = exact([PROMPT, PROMPT])
print(f"exact tokens after a second call with {PROMPT}: {second}; for one token more: {exact([PROMPT, PROMPT, 1])}")
if not same or apart < 0.1:
    sys.exit("changed: passing a text at once shows the cache's bits now, or token by token does not")
if windows != [PROMPT, 1, 2, WINDOW, 1, 2, WINDOW, 1] or second != PROMPT:
    sys.exit("changed: other tokens are exact")
PYTHON
