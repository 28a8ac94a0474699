#!/usr/bin/env bash
# The tokenizer that transformers reads from a Llama GGUF file has the beginning-of-text token as its eos_token.
#
# One would expect: AutoTokenizer.from_pretrained with gguf_file gives the tokenizer that the file was written from.
# The file holds its tokens and merges, both special ids, whether a beginning is added, and the name of the rule that
# splits text into words and numbers.
# Seen with transformers 5.17.0, gguf 0.19.0, a byte-level BPE tokenizer of the Llama 3 kind: eos_token is the token
# that the file names as bos. A file with add_bos_token true gives ids without a beginning. The name of the splitting
# rule is not used. Numbers are split as in GPT-2, so that "1234567" is no longer 123, 456, 7. Text without numbers
# has the right ids.
# Guess written down before the run: the same ids, the same special tokens, and the beginning added where the file
# says so.
# Where it comes from: transformers/integrations/ggml.py. GGUFLlamaConverter.tokenizer looks eos_token up by the id of
# bos and hands the two over crosswise. GGUFLlamaConverter.converted sets one splitting rule for all byte-level files.
# Nothing there reads tokenizer.ggml.pre or tokenizer.ggml.add_bos_token.
# Whom it hurts: anyone who closes training texts with tokenizer.eos_token (the model learns to end with the
# beginning), or pads with it, or measures perplexity and arithmetic of a GGUF model. A part of what is booked on the
# bits is other input ids then. The config read from the same file has the right ids.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.17.0 gguf==0.19.0
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import json
import random
import sys

import gguf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer

rng = random.Random(0)
words = "the of a house river was built in and there were people who lived by it until year went past".split()
texts = [" ".join(rng.choices(words, k=8)) + f" {rng.randrange(10 ** rng.randrange(1, 8))}." for _ in range(4000)]
original = Tokenizer(models.BPE())
original.pre_tokenizer = pre_tokenizers.Sequence(
    [  # runs of at most three digits, as Llama 3 has them
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)
original.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
special = ["<|begin|>", "<|end|>"]
trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
original.train_from_iterator(texts, trainer)

table = json.loads(original.to_str())["model"]
tokens = sorted(table["vocab"], key=table["vocab"].get)
file = gguf.GGUFWriter("tokens.gguf", "llama")
file.add_context_length(128)
file.add_block_count(1)
file.add_embedding_length(32)
file.add_feed_forward_length(64)
file.add_head_count(2)
file.add_vocab_size(len(tokens))
file.add_tokenizer_model("gpt2")  # byte-level BPE
file.add_tokenizer_pre("llama-bpe")
file.add_token_list(tokens)
file.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
file.add_token_merges([" ".join(pair) for pair in table["merges"]])
file.add_bos_token_id(0)
file.add_eos_token_id(1)
file.add_add_bos_token(True)
file.write_header_to_file()
file.write_kv_data_to_file()
file.close()

loaded = AutoTokenizer.from_pretrained(".", gguf_file="tokens.gguf")
config = AutoConfig.from_pretrained(".", gguf_file="tokens.gguf")
print(f"the file: bos {special[0]} (0), eos {special[1]} (1), add_bos_token true")
print(f"the tokenizer: bos {loaded.bos_token} ({loaded.bos_token_id}), eos {loaded.eos_token} ({loaded.eos_token_id})")
print(f"the config: bos {config.bos_token_id}, eos {config.eos_token_id}")
first = loaded("the house")["input_ids"][0]
print(f"first id of a text: {first} ({tokens[first]!r})")


def other(text):
    """Whether a text has other ids than with the tokenizer that the file was written from, a beginning left aside."""
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    return ids != original.encode(text).ids


number = "the year 1234567"
print("pieces:", original.encode(number).tokens, "in the original,", loaded.tokenize(number), "from the file")
rows = [f"the house was built in {number}" for number in range(10_000, 1_000_000, 1234)]
numbers = sum(map(other, rows)) / len(rows)
plain = sum(other(" ".join(rng.choices(words, k=8))) for _ in rows) / len(rows)
print(f"other ids: {numbers:.0%} of the texts with numbers of five and six digits, {plain:.0%} of those without")
if (loaded.bos_token_id, loaded.eos_token_id) != (0, 0) or (config.bos_token_id, config.eos_token_id) != (0, 1):
    sys.exit("changed: the tokenizer or the config has other special ids now")
if first == 0:
    sys.exit("changed: the beginning is added now")
if numbers < 0.1 or plain:
    sys.exit("changed: numbers are split as in the original now, or other text is not")
PYTHON
