"""One step of L4Q beside LoRA by peft, same rank, batch and length, in one run: seconds, bytes kept for backward."""

import json
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from studylib.data import corpora, models
from studylib.quant.learned import l4q_model
from studylib.study.machine import environment, keep_freed_memory

MODEL, BATCH, LENGTH, STEPS, WARM = "smollm2-135m", 4, 256, 8, 2
RANK, ALPHA, BITS, GROUP = 4, 8, 4, 64


def prepared(name: str, method: str, group: int) -> nn.Module:
    """The model with frozen weights in the compute type and trained ones in fp32."""
    model = models.load_model(name, models.compute_dtype()).train()
    if method == "L4Q":
        return l4q_model(model, BITS, group=group, rank=RANK, alpha=ALPHA)
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    with models.autocast(tokens.device):
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def kept_bytes(model: nn.Module, tokens: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass: distinct storages, parameters and buffers aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model, tokens)
    return sum(storage.nbytes() for storage in kept.values())


def step(model: nn.Module, tokens: Tensor, optimizer: torch.optim.Optimizer) -> float:
    begun = time.perf_counter()
    loss = loss_of(model, tokens)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss.item()
    return time.perf_counter() - begun


def compare(name: str, windows: Tensor, compiled: bool, group: int) -> dict[str, dict[str, float]]:
    """What one step of each method takes and keeps, and L4Q's share of LoRA's."""
    trained = {method: prepared(name, method, group) for method in ("LoRA", "L4Q")}
    optimizers, seconds = {}, {method: [] for method in trained}
    for method, model in trained.items():
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizers[method] = torch.optim.AdamW(learned, lr=1e-5, fused=True)
        if compiled:
            for layer in model.get_decoder().layers:
                layer.compile()
    tokens = windows.to(model.device)
    for _ in range(STEPS):  # in turns: what else the machine does then slows both alike
        for method, model in trained.items():
            seconds[method].append(step(model, tokens, optimizers[method]))
    result = {
        "seconds": {method: round(statistics.median(times[WARM:]), 4) for method, times in seconds.items()},
        "first_step": {method: round(times[0], 1) for method, times in seconds.items()},
        "kept_bytes": {method: kept_bytes(model, tokens) for method, model in trained.items()},
    }
    result["times_lora"] = {
        what: round(result[what]["L4Q"] / result[what]["LoRA"], 3) for what in ("seconds", "kept_bytes")
    }
    return result


def measured(name: str = MODEL, group: int = GROUP) -> dict[str, dict[str, dict[str, float]]]:
    """What `compare` finds of the model, as written and with compiled layers."""
    keep_freed_memory()
    windows = corpora.windows("c4", models.load_tokenizer(name), LENGTH, BATCH, "training")
    result = {}
    for mode in ("eager", "compiled layers"):
        result[mode] = found = compare(name, windows, compiled=mode != "eager", group=group)
        for method, value in found["seconds"].items():
            kept = found["kept_bytes"][method] / 1e6
            print(f"{method + ', ' + mode:22} {value:7.2f} s a step   {kept:8.1f} MB kept", flush=True)
        print(f"{mode}: L4Q takes {found['times_lora']} times LoRA's", flush=True)
    return result


def main():
    result = {"what": __doc__} | measured() | {"environment": environment()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
