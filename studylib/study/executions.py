"""Prefill and decoding in engines side by side, in fresh processes: PyTorch in 16 bits, this study's 4-bit kernel and
llama.cpp, which reads the same weights from files. An adapter is beside 4 bits, or merged, which is 4 bits alone.

`python -m studylib.study.executions` is one of the processes: it reads what to time and writes the seconds, both as
JSON.
"""

import copy
import json
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from studylib.config import (
    KERNEL_4,
    KERNEL_ADAPTED,
    LLAMA_4,
    LLAMA_16,
    LLAMA_ADAPTED,
    PASSES,
    TORCH_16,
    Adapter,
    Engines,
    Format,
)
from studylib.data import models
from studylib.evaluate import in_fresh_processes, llamacpp, pass_seconds, with_adapter
from studylib.quant import Beside, DeployedLinear, decode_model, decoder_linears, encode_model, int4_model
from studylib.study import gguf

IN_16, IN_4 = "16.gguf", "4.gguf"


def engine_seconds(model: str, format: Format, settings: Engines) -> dict[str, np.ndarray]:
    """Seconds of a pass, [rounds], of each of PASSES, settings.batches and ENGINES, by
    "seconds/<pass>/<batch>/<engine>"; and "process", in which of the fresh processes each round was.

    4 bits: the weights rounded to `format`, in GGUF's blocks in llama.cpp; an adapter: of LoRA's usual rank on all
    layers. Raises ValueError where llama.cpp is missing or a process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_files(model, format, Path(folder))
        asked = {"model": model, "format": asdict(format), "folder": folder}
        return in_fresh_processes(__name__, asked, settings)


@torch.no_grad()
def write_files(model: str, format: Format, folder: Path) -> None:
    """The model as llama.cpp reads it: in 16 bits, in 4, and an adapter beside them that adds nothing."""
    original, tokenizer = models.load_model(model), models.load_tokenizer(model)
    gguf.write(folder / IN_16, original, tokenizer, Path(model).name)
    rounded = decode_model(encode_model(original, format))
    gguf.write(folder / IN_4, rounded, tokenizer, Path(model).name)
    adapter = Adapter()
    for layer in decoder_linears(rounded).values():
        assert isinstance(layer, DeployedLinear)
        a, b = torch.randn(adapter.rank, layer.in_features), torch.zeros(layer.out_features, adapter.rank)
        layer.beside = Beside(a, b, adapter.scaling)
    gguf.write_adapter(folder / gguf.ADAPTER, rounded, adapter.alpha, Path(model).name)


def seconds_in_this_process(model: str, format: Format, settings: Engines, folder: Path) -> dict[str, list[float]]:
    """As engine_seconds, all rounds in this process, after one that is not counted. Engines take turns, so that
    whatever else the machine does meets all alike."""
    engines = load_engines(model, format, settings, folder)
    found: dict[str, list[float]] = defaultdict(list)
    for counted in range(-1, settings.rounds):
        for batch in settings.batches:
            for name, engine in engines.items():
                if isinstance(engine, llamacpp.LlamaCpp):
                    times = engine.pass_seconds(settings, batch)
                else:
                    times = pass_seconds(engine, settings, batch)
                for stage, own in zip(PASSES, times, strict=True):
                    found[f"seconds/{stage}/{batch}/{name}"] += [own] * (counted >= 0)
    return found


def load_engines(model: str, format: Format, settings: Engines, folder: Path) -> dict[str, nn.Module]:
    """What is timed, by its name in ENGINES; folder: with what write_files has written. ValueError where llama.cpp is
    missing."""
    engines, length, most = torch_engines(model, format), settings.context + settings.tokens, max(settings.batches)
    llama = {LLAMA_16: (IN_16, None), LLAMA_4: (IN_4, None), LLAMA_ADAPTED: (IN_4, folder / gguf.ADAPTER)}
    return engines | {
        name: llamacpp.LlamaCpp(folder / file, length, adapter, most) for name, (file, adapter) in llama.items()
    }


def torch_engines(model: str, format: Format) -> dict[str, nn.Module]:
    """Those of ENGINES that PyTorch computes, by name."""
    original = models.load_model(model).cpu()  # the kernels are for processors
    dtype = models.compute_dtype(original.device)
    usual = copy.deepcopy(original).to(dtype).eval()
    integers = int4_model(encode_model(original, format), dtype)
    return {TORCH_16: usual, KERNEL_4: integers, KERNEL_ADAPTED: with_adapter(integers)}


def main() -> None:
    """Be one of the processes."""
    asked: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    settings = Engines(**asked["settings"] | {"batches": tuple(asked["settings"]["batches"])})
    folder = Path(asked["folder"])
    print(json.dumps(seconds_in_this_process(asked["model"], Format(**asked["format"]), settings, folder)))


if __name__ == "__main__":
    main()
