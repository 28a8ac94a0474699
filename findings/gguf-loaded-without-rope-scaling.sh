#!/usr/bin/env bash
# transformers loads a GGUF file of a Llama model without its rotary scaling and attention biases, and does not say so.
#
# One would expect: a file that holds the whole model comes back as that model, or is refused. Llama 3.1 and later
# keep their rotary scaling as a tensor of divisors (rope_freqs.weight), a linear scaling is kept as metadata
# (rope.scaling.type and rope.scaling.factor), and biases are tensors beside the weights.
# Seen with transformers 5.17.0, gguf 0.19.0, files in fp32, so that nothing is rounded: a plain model comes back
# exactly. With the divisors of Llama 3 (factor 8) or a linear factor of 4, the loaded model has the plain rotary
# frequencies, which are up to 8 and 4 times those of the model. With attention biases in the file, the loaded model
# has none. No message says so at the normal level.
# Guess written down before the run: all of them come back, or an error names what cannot be loaded.
# Where it comes from: transformers/integrations/ggml.py, GGUF_CONFIG_MAPPING: its part for llama knows neither the
# scaling nor the biases. load_gguf_checkpoint in transformers/modeling_gguf_pytorch_utils.py then passes over the
# tensors for which the model built from that config has no place.
# Whom it hurts: anyone who measures a quantized GGUF model through transformers against its original. The loss that
# the missing scaling brings is booked on the bits. The original's rope_parameters have to be set by hand.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.17.0 accelerate==1.15.0 gguf==0.19.0
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - 2>messages <<'PYTHON'
import sys

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

HEADS = 2
shape = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "initializer_range": 0.2,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 2048,
}  # fmt: skip
llama3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
text = torch.randint(256, (1, 512), generator=torch.Generator().manual_seed(1))


def frequencies(model):
    return model.model.rotary_emb.inv_freq.numpy()


def write(model, path, plain):
    """The model as a GGUF file in fp32, with the halves of each head of queries and keys interleaved."""
    config, file = model.config, gguf.GGUFWriter(path, "llama")
    file.add_context_length(config.max_position_embeddings)
    file.add_block_count(config.num_hidden_layers)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(HEADS)
    file.add_head_count_kv(HEADS)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_dimension_count(config.head_dim)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_vocab_size(config.vocab_size)
    if config.rope_parameters["rope_type"] == "linear":
        file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        file.add_rope_scaling_factor(config.rope_parameters["factor"])
    if config.rope_parameters["rope_type"] == "llama3":
        file.add_tensor("rope_freqs.weight", (plain / frequencies(model)).astype(np.float32))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            halves = array.reshape(HEADS, 2, -1, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        file.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(array))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


found, plain = {}, None
for name, settings in (
    ("plain", {}),
    ("linear scaling", {"rope_parameters": linear}),
    ("Llama 3's scaling", {"rope_parameters": llama3}),
    ("biases", {"attention_bias": True}),
):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, **settings)).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter)
    plain = frequencies(model) if plain is None else plain
    write(model, "model.gguf", plain)
    loaded = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        right, got = model(text).logits, loaded(text).logits
    alike = (right.argmax(-1) == got.argmax(-1)).float().mean().item()
    fast = float((frequencies(loaded) / frequencies(model)).max())
    biases = [sum(key.endswith("bias") for key in each.state_dict()) for each in (model, loaded)]
    found[name] = alike, fast, biases
    print(
        f"{name}: rotary frequencies up to {fast:.0f} times those of the model, {biases[1]} of {biases[0]} biases, "
        f"the most likely token is the same at {alike:.0%} of 512 positions"
    )
if found["plain"] != (1, 1, [0, 0]):
    sys.exit("changed: a plain model no longer comes back exactly")
times = found["linear scaling"][1], found["Llama 3's scaling"][1]
if abs(times[0] - 4) > 0.01 or abs(times[1] - 8) > 0.01:
    sys.exit("changed: the loaded model has rotary frequencies nearer to its file's now")
if found["biases"][2] != [8, 0] or any(found[name][0] > 0.95 for name in found if name != "plain"):
    sys.exit("changed: biases are loaded now, or what is left out no longer matters")
PYTHON
if grep -iE "warn|rope|bias|unexpected|missing" messages; then
    echo "changed: a message tells now what was left out"
    exit 1
fi
