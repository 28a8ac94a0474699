"""Tokens a second that llama.cpp decodes in F16 and with Q4_0 weights, by the size of the model, in one run.

Shapes of SmolLM2 with random weights, which take as long as trained ones. Embeddings and head stay in F16, as the study
has them: of 135M parameters they are a fifth, of 1.7B a seventeenth. llama.cpp's own programs are taken from PATH
(docs/usage.md builds them); without them nothing is measured.
"""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np

from studylib.study.machine import environment

SHAPES = {  # hidden, intermediate, layers, heads, key and value heads
    "135M": (576, 1536, 30, 9, 3),
    "360M": (960, 2560, 32, 15, 5),
    "1.7B": (2048, 8192, 24, 32, 32),
}
VOCABULARY, TOKENS, ROUNDS = 49152, 32, 5
PROGRAMS = ("llama-bench", "llama-quantize")


def write_model(path: Path, hidden: int, inner: int, layers: int, heads: int, key_heads: int) -> None:
    """A Llama with a tied head and random weights, in F16."""
    file, width = gguf.GGUFWriter(path, "llama"), hidden // heads * key_heads
    file.add_context_length(2048)
    file.add_embedding_length(hidden)
    file.add_block_count(layers)
    file.add_feed_forward_length(inner)
    file.add_head_count(heads)
    file.add_head_count_kv(key_heads)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(VOCABULARY)
    file.add_tokenizer_model("none")
    file.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    drawn = (np.random.default_rng(0).standard_normal(inner * hidden) * 0.02).astype(np.float16)

    def add(name: str, rows: int, columns: int) -> None:
        file.add_tensor(f"{name}.weight", np.resize(drawn, (rows, columns)))

    add("token_embd", VOCABULARY, hidden)
    file.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(layers):
        for name, rows, columns in (
            ("attn_q", hidden, hidden),
            ("attn_k", width, hidden),
            ("attn_v", width, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):
            add(f"blk.{layer}.{name}", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            file.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def decoded(model: Path) -> float:
    """Tokens a second, one sequence, the median of ROUNDS."""
    command = ["llama-bench", "-m", model, "-p", "0", "-n", str(TOKENS), "-r", str(ROUNDS), "-o", "json"]
    (found,) = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return float(np.median(found["samples_ts"]))


def measured() -> dict[str, dict[str, float]]:
    result = {}
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            whole, packed = Path(folder, "f16.gguf"), Path(folder, "q4_0.gguf")
            write_model(whole, *shape)
            kept = ["--token-embedding-type", "f16", "--output-tensor-type", "f16"]
            command = ["llama-quantize", *kept, whole, packed, "Q4_0"]
            subprocess.run(command, check=True, capture_output=True)
            rates = [decoded(path) for path in (whole, packed, whole, packed)]
            f16, q4_0 = (rates[0] + rates[2]) / 2, (rates[1] + rates[3]) / 2
            result[name] = {
                "F16": round(f16, 2),
                "Q4_0": round(q4_0, 2),
                "times": round(q4_0 / f16, 2),
                "bytes of F16 over those of Q4_0": round(whole.stat().st_size / packed.stat().st_size, 2),
            }
    return result


def main():
    if not all(map(shutil.which, PROGRAMS)):
        print(f"{' and '.join(PROGRAMS)} are not on PATH; nothing is measured")
        return
    found = measured()
    result = {"what": __doc__, "tokens_per_second": found, "environment": environment()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    for name, own in found.items():
        print(f"{name:5} F16 {own['F16']:7.2f}   Q4_0 {own['Q4_0']:7.2f}   {own['times']:.2f} times")


if __name__ == "__main__":
    main()
