"""Decoding in llama.cpp beside the study's own 4-bit kernel, in turns in one process: seconds of a token.

Needs llama-cpp-python (docs/usage.md). Each round decodes with every execution once, so that other work on the machine
meets all alike; what is compared are ratios within a round.
"""

import json
import statistics
import tempfile
from pathlib import Path

import torch

from studylib.config.budgets import Decoding
from studylib.config.engines import INSTALL_LLAMA_CPP, llama_cpp_installed
from studylib.config.settings import Format
from studylib.data import models
from studylib.evaluate.decoding import token_seconds
from studylib.evaluate.llamacpp import LlamaCpp
from studylib.quant.formats import encode_model
from studylib.quant.kernel import int4_model
from studylib.study import gguf
from studylib.study.machine import environment

MODEL, GROUP, ROUNDS = "smollm2-135m", 32, 7
SETTINGS = Decoding(context=64, tokens=16)
KINDS = {"Q4_0": Format("int", 4, GROUP), "Q4_1": Format("affine", 4, GROUP)}


def main() -> None:
    if not llama_cpp_installed():
        print(f"llama.cpp is not installed, so that nothing is compared; use {INSTALL_LLAMA_CPP}")
        return
    tokenizer, found = models.load_tokenizer(MODEL), {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name, format in {"F16": None, **KINDS}.items():
            model = models.load_model(MODEL)
            if format:
                encode_model(model, format)
            path = Path(folder, f"{name}.gguf")
            written, _ = gguf.write(path, model, tokenizer, MODEL)
            assert written == name
            engine = LlamaCpp(path, SETTINGS.context + SETTINGS.tokens)
            found[f"llama.cpp {name}"] = lambda settings, engine=engine: engine.pass_seconds(settings)[1]
        own = int4_model(encode_model(models.load_model(MODEL), KINDS["Q4_1"]), models.compute_dtype())
        found["this study's 4-bit kernel"] = lambda settings: token_seconds(own, settings)
        plain = models.load_model(MODEL, models.compute_dtype())
        found["PyTorch, 16 bits or fp32"] = lambda settings: token_seconds(plain, settings)
        for time in found.values():
            time(Decoding(context=8, tokens=1))
        rounds = [{name: time(SETTINGS) for name, time in found.items()} for _ in range(ROUNDS)]
    medians = {name: statistics.median(own[name] for own in rounds) for name in found}
    ratios = {
        name: statistics.median(own["llama.cpp F16"] / own[name] for own in rounds) for name in found
    }  # how many times as fast as llama.cpp's 16 bits
    result = {"tokens_a_second": {name: 1 / seconds for name, seconds in medians.items()}, "times_F16": ratios}
    result |= {"rounds": rounds, "threads": torch.get_num_threads(), "machine": environment()}
    print(json.dumps({name: result[name] for name in ("tokens_a_second", "times_F16")}, indent=1))
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
