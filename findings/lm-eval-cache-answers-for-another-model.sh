#!/usr/bin/env bash
# lm-eval's response cache does not know the model: with the same use_cache, a second model gets the first's scores.
#
# One would expect: a cache of model responses holds them for each model, so that another folder, revision or
# quantization of the weights is asked anew. The path is given once, for a whole sweep.
# Seen with lm-eval 0.4.13: three models of one shape with different weights, given as pretrained=FOLDER, score
# differently without a cache. With one path for all, the second and third model are loaded but never asked, and have
# the accuracy of the first. With a path for each, the scores are right again.
# Guess written down before the run: the arguments of the model are part of the key, or of the name of the file.
# Where it comes from: lm_eval/api/model.py, hash_args and CachingLM: the key is the kind of the request and its
# texts. The name of the file (lm_eval/evaluator.py, simple_evaluate) is the given path and the rank.
# Whom it hurts: anyone who compares bit widths, methods or checkpoints. All rows of the table equal the first one to
# the last digit, which looks like a method that costs nothing.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.17.0 accelerate==1.15.0 \
    lm-eval==0.4.13 datasets==5.2.0
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import json
import sys
from pathlib import Path

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = ["<unk>", "<s>", "What", "is", "times", "Question", ":", "?", "Answer", *map(str, range(400))]
table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
table.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=table, unk_token="<unk>", bos_token="<s>", eos_token="<s>")
config = LlamaConfig(
    vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=1,
)  # fmt: skip
for seed in range(3):
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(f"model{seed}")
    tokenizer.save_pretrained(f"model{seed}")
asks = [(f"What is {i} times 3", [str(3 * i), str(3 * i + 1)]) for i in range(100)]
rows = [{"question": question, "choices": choices, "label": 0} for question, choices in asks]
Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
Path("choice.yaml").write_text(
    "task: choice\ndataset_path: json\n"
    f"dataset_kwargs: {{data_files: {{validation: {Path('rows.jsonl').absolute()}}}}}\nvalidation_split: validation\n"
    'output_type: multiple_choice\ndoc_to_text: "Question: {{question}}?\\nAnswer:"\n'
    "doc_to_choice: choices\ndoc_to_target: label\n"
)
asked = []
answer = HFLM.loglikelihood


def counted(self, requests, *rest, **named):
    asked.append(len(requests))
    return answer(self, requests, *rest, **named)


HFLM.loglikelihood = counted  # to see how many requests come to a model


def accuracy(seed, cache):
    results = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained=model{seed}", device="cpu", batch_size=16, use_cache=cache,
        tasks=["choice"], task_manager=TaskManager(include_path=".", include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    return results["results"]["choice"]["acc,none"]


found = {}
for name, paths in {
    "no cache": [None] * 3,
    "one cache": ["cache"] * 3,
    "a cache for each": ["cache-0", "cache-1", "cache-2"],
}.items():
    asked.clear()
    found[name] = [accuracy(seed, path) for seed, path in enumerate(paths)]
    print(f"{name}: accuracies of the three models {found[name]}, requests that came to a model {asked}")
    if name == "one cache" and len(asked) != 1:
        sys.exit("changed: the other models are asked as well, now")
if len(set(found["no cache"])) < 3 or found["a cache for each"] != found["no cache"]:
    sys.exit("changed: the models no longer differ without a common cache")
if found["one cache"] != found["no cache"][:1] * 3:
    sys.exit("changed: the cache no longer answers for another model")
PYTHON
