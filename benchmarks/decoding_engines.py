"""Where the time of a decoded token goes: seconds of one core in each engine, and in each part of the 4-bit kernel's.

Seconds are of the processor, not of the clock, on one thread, so that other work on the machine matters less; the
engines take turns. llama.cpp is among them where llama-cpp-python is installed (docs/usage.md); "missing" names the
engines that were not measured. Notebook 08 has tokens a second of all cores.
"""

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from studylib.config.budgets import ENGINES, KERNEL_4, TORCH_16, Engines
from studylib.config.engines import INSTALL_LLAMA_CPP, llama_cpp_installed
from studylib.config.settings import Format
from studylib.evaluate import decoding, llamacpp
from studylib.quant.kernel import Int4Linear
from studylib.quant.layers import decoder_linears
from studylib.study import executions
from studylib.study.machine import environment

MODEL, FORMAT, ROUNDS = "smollm2-135m", Format("affine", 4, 64), 7
SETTINGS = Engines(context=64, tokens=16, rounds=ROUNDS, batches=(1,))


class Constant(nn.Module):
    """In the place of a linear layer: no product."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.output = torch.zeros(1, 1, layer.out_features, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output.expand(*x.shape[:-1], -1)


def milliseconds(work: Callable[[], object]) -> float:
    """The median over ROUNDS, after one that is not counted."""
    times = []
    for _ in range(ROUNDS + 1):
        begun = time.process_time()
        work()
        times.append(1000 * (time.process_time() - begun))
    return statistics.median(times[1:])


@torch.no_grad()
def parts(engines: dict[str, nn.Module]) -> dict[str, float]:
    """Milliseconds of a token in the parts of this study's 4-bit decoding, and of 16 bits' linear layers."""
    model, usual = engines[KERNEL_4], engines[TORCH_16]
    layers = [layer for layer in model.modules() if isinstance(layer, Int4Linear)]
    plain, head = list(decoder_linears(usual).values()), model.get_output_embeddings()
    rows = {width: torch.randn(1, width) for width in {layer.in_features for layer in layers}}
    bare = copy.deepcopy(model)
    for name, layer in list(bare.named_modules()):
        if isinstance(layer, Int4Linear):
            bare.set_submodule(name, Constant(layer, layer.dtype))
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    own = {layer: rows[layer.in_features].to(layer.grid.dtype) for layer in layers}
    given = {layer: rows[layer.in_features].to(layer.dtype) for layer in layers}
    wide = {layer: rows[layer.in_features].to(layer.weight.dtype) for layer in plain}
    last = torch.randn(1, head.in_features).to(head.weight.dtype)
    return {
        "4-bit products": milliseconds(lambda: [product(x, own.packed, own.group, own.grid) for own, x in own.items()]),
        "4-bit layers, with their casts": milliseconds(lambda: [layer(x) for layer, x in given.items()]),
        "16-bit layers": milliseconds(lambda: [layer(x) for layer, x in wide.items()]),
        "output head": milliseconds(lambda: head(last)),
        "all but the layers": 1000 * statistics.median(decoding.pass_seconds(bare, SETTINGS)[1] for _ in range(ROUNDS)),
    }


def main() -> None:
    installed = llama_cpp_installed()
    if not installed:
        print(f"llama.cpp is not installed; PyTorch's engines are measured without it; use {INSTALL_LLAMA_CPP}")
    torch.set_num_threads(1)
    decoding.time = llamacpp.time = SimpleNamespace(perf_counter=time.process_time)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if installed:
            executions.write_files(MODEL, FORMAT, Path(folder))
            engines = executions.load_engines(MODEL, FORMAT, SETTINGS, Path(folder))
        else:
            engines = executions.torch_engines(MODEL, FORMAT)
        rounds: dict[str, list[float]] = {name: [] for name in engines}
        for counted in range(-1, ROUNDS):
            for name, engine in engines.items():
                of_llama = isinstance(engine, llamacpp.LlamaCpp)
                times = engine.pass_seconds(SETTINGS) if of_llama else decoding.pass_seconds(engine, SETTINGS)
                rounds[name] += [1000 * times[1]] * (counted >= 0)
        tokens = {name: round(statistics.median(own), 2) for name, own in rounds.items()}
        result = {"what": __doc__, "ms_a_token": tokens, "missing": [name for name in ENGINES if name not in engines]}
        result["parts_of_the_4_bit_kernel"] = {name: round(own, 2) for name, own in parts(engines).items()}
    print(json.dumps(result, indent=1))
    Path(__file__).with_suffix(".json").write_text(json.dumps(result | {"environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
