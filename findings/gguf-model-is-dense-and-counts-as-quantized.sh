#!/usr/bin/env bash
# A model that transformers has dequantized from a GGUF file counts as quantized: it can be neither trained nor saved.
#
# One would expect: by transformers' documentation a GGUF file is dequantized when it is loaded, so that the model can
# be fine-tuned and saved. A dense model in fp32 is like any other: Trainer trains it, and adapters of peft on it,
# save_pretrained writes it, and .half() makes it one in fp16.
# Seen with transformers 5.17.0, gguf 0.19.0, peft 0.21.2, a Llama whose file is in fp32: all parameters are dense, in
# fp32 and the model's to the last bit. Yet is_quantized is True. Trainer refuses to train it ("purely quantized
# models"), and refuses it with an adapter as well ("do not support training"). save_pretrained refuses to write it
# ("not serializable"). .float() and .half() raise; .to(torch.float16) and .bfloat16() work.
# What helps is to make a new model of the same configuration, without its quantization_config, and to load the weights
# into it: that one is trained and saved.
# Guess written down before the run: .float() is refused, as had been met before, and Trainer's check may refuse the
# model as well; with an adapter it trains, and it can be saved.
# Where it comes from: transformers/quantizers/quantizer_gguf.py. The loader gives the model a GgufConfig and this
# quantizer, whose is_serializable and is_trainable are False whether weights stay packed (on Metal) or not.
# modeling_utils.py and trainer.py ask the quantizer, not the weights.
# Whom it hurts: whoever begins from a file that was published as GGUF alone, to fine-tune it, to quantize it anew or to
# convert it back.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.17.0 accelerate==1.15.0 gguf==0.19.0 \
  peft==0.21.2
cd "$folder"
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2>messages <<'PYTHON' || { tail -5 messages; exit 1; }
import copy
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

HEADS = 2
torch.manual_seed(0)
shape = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
original = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=HEADS, num_key_value_heads=HEADS))
rows = [{"input_ids": row, "labels": row} for row in torch.randint(256, (4, 32))]


def write(model, path):
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
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            array = array.reshape(HEADS, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        file.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def loaded():
    return AutoModelForCausalLM.from_pretrained("file", gguf_file="model.gguf")


def made_anew():
    model = loaded()
    config = copy.deepcopy(model.config)
    del config.quantization_config
    fresh = LlamaForCausalLM(config)
    fresh.load_state_dict(model.state_dict())
    return fresh


def train(model):
    arguments = TrainingArguments("trained", max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    Trainer(model, arguments, train_dataset=rows).train()


def train_adapter(model):
    train(get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])))


Path("file").mkdir()
write(original, "file/model.gguf")
state = loaded().state_dict()
dense = all(torch.equal(state[name], tensor) for name, tensor in original.state_dict().items())
print(f"weights as they were, in {loaded().dtype}: {dense}; is_quantized: {loaded().is_quantized}")
tried = {
    "Trainer": train,
    "Trainer, with an adapter": train_adapter,
    "save_pretrained": lambda own: own.save_pretrained("saved"),
    ".float()": lambda own: own.float(),
    ".half()": lambda own: own.half(),
    ".to(fp16)": lambda own: own.to(torch.float16),
}
found = {}
for name, do in tried.items():
    for which, make in (("from GGUF", loaded), ("made anew", made_anew)):
        try:
            do(make())
            found[name, which] = "works"
        except ValueError as error:
            found[name, which] = f"ValueError: {str(error)[:88]}"
        print(f"{name:25} {which}: {found[name, which]}")
refused = [name for name in tried if found[name, "from GGUF"] != "works"]
still = (
    dense
    and loaded().is_quantized
    and refused == [name for name in tried if name != ".to(fp16)"]
    and all(found[name, "made anew"] == "works" for name in tried)
)
print("as described above" if still else "not as described above any more")
sys.exit(not still)
PYTHON
