"""The time of a token that is decoded with 4-bit weights at work, measured in several fresh processes.

`python -m studylib.evaluate.decoding` is one of them: it reads what to time and writes the seconds, both as JSON.
"""

import copy
import json
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from studylib.config import EXECUTIONS, OWN, TIMED_LAYERS, Adapter, Decoding, Engines, Format
from studylib.data import models
from studylib.evaluate.memory import CONFIGURATIONS
from studylib.quant import Int4Linear, encode_model, int4_model

VOCABULARY = 1024  # of a shape that is timed
PROCESSES = 5  # at most: each loads and encodes the models anew, which takes as long as three rounds


def decoding_seconds(model: str, format: Format, settings: Decoding) -> dict[str, np.ndarray]:
    """Seconds that a decoded token takes, [rounds], of each model that is timed and each of EXECUTIONS, by
    "seconds/<model>/<execution>"; and "process", in which of the fresh processes each round was.

    The models: OWN, which is the one of this name, and settings.shapes. 4 bits: the weights rounded to `format`, as
    every method leaves them that deploys integers only; an adapter: of LoRA's usual rank on all layers. The rounds are
    shared between up to PROCESSES processes, one after the other: where memory lies, and what else was decided when a
    process began, is the same for all of its rounds. Raises ValueError, with its last line, where one fails.
    """
    return in_fresh_processes(__name__, {"model": model, "format": asdict(format)}, settings)


def in_fresh_processes(module: str, asked: dict[str, Any], settings: Decoding | Engines) -> dict[str, np.ndarray]:
    """What processes of `python -m module` write, one after the other, as decoding_seconds has it: numbers of each
    round, by name. Each reads `asked` with its share of the rounds in "settings", and "threads"."""
    found: dict[str, list[float]] = defaultdict(list)
    for process, rounds in enumerate(_shared(settings.rounds)):
        given = asked | {"settings": asdict(settings) | {"rounds": rounds}, "threads": torch.get_num_threads()}
        done = subprocess.run(
            [sys.executable, "-m", module], input=json.dumps(given), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ValueError(
                f"decoding: a process that timed it ended with status {done.returncode} "
                f"({''.join(done.stderr.rstrip().splitlines()[-1:])})"
            )
        for name, values in json.loads(done.stdout.splitlines()[-1]).items():
            found[name] += values
        found["process"] += [float(process)] * rounds
    return {name: np.array(values) for name, values in found.items()}


def _shared(rounds: int) -> list[int]:
    """How many of the rounds each process has."""
    count = min(PROCESSES, max(1, rounds // 2))
    return [rounds * (at + 1) // count - rounds * at // count for at in range(count)]


def seconds_in_this_process(model: str, format: Format, settings: Decoding) -> dict[str, list[float]]:
    """As decoding_seconds, all rounds in this process, after a token each that is not counted. Executions take turns,
    so that whatever else the machine does meets all alike."""
    sources = {OWN: lambda: models.load_model(model)} | {
        shape: lambda shape=shape: _layers_of(shape)  # type: ignore[misc]
        for shape in settings.shapes
    }
    found = {}
    for name, source in sources.items():
        original = source().cpu()  # the kernel is for processors
        dtype = models.compute_dtype(original.device)
        usual = copy.deepcopy(original).to(dtype).eval()
        integers = int4_model(encode_model(original, format), dtype)
        executions = (usual, integers, with_adapter(integers))
        for own in executions:
            pass_seconds(own, replace(settings, tokens=1))
        rounds = [[pass_seconds(own, settings)[1] for own in executions] for _ in range(settings.rounds)]
        for kind, times in zip(EXECUTIONS, np.array(rounds).T, strict=True):
            found[f"seconds/{name}/{kind}"] = times.tolist()
    return found


def with_adapter(model: nn.Module) -> nn.Module:
    """A copy of a model of 4-bit integers with LoRA's usual adapter beside each layer, as int4_model leaves it of one
    that `attach` has made: which would encode all weights again, to the same integers."""
    model, rank = copy.deepcopy(model), Adapter().rank
    for layer in model.modules():
        if isinstance(layer, Int4Linear):
            layer.lora_A = torch.randn(rank, layer.in_features).to(layer.dtype)
            layer.lora_B = torch.zeros(layer.out_features, rank).to(layer.dtype)
    return model


def _layers_of(shape: str) -> PreTrainedModel:
    config = copy.deepcopy(CONFIGURATIONS[shape])
    config.num_hidden_layers, config.vocab_size = TIMED_LAYERS, VOCABULARY
    return models.skeleton(config)


@torch.no_grad()
def pass_seconds(model: PreTrainedModel, settings: Decoding | Engines, batch: int = 1) -> tuple[float, float]:
    """Seconds of the pass over the context of `batch` sequences at a time, and of one that gives each of them a token
    after it: the mean over those that are decoded greedily."""
    cache = DynamicCache(config=model.config)
    context = (torch.arange(settings.context) % model.config.vocab_size).repeat(batch, 1)
    begun = time.perf_counter()
    logits = model(input_ids=context, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    read = time.perf_counter()
    for _ in range(settings.tokens):
        logits = model(input_ids=logits[:, -1].argmax(1, keepdim=True), past_key_values=cache, use_cache=True).logits
    return read - begun, (time.perf_counter() - read) / settings.tokens


def main() -> None:
    """Be one of the processes."""
    asked: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    settings = asked["settings"] | {"shapes": tuple(asked["settings"]["shapes"])}
    print(json.dumps(seconds_in_this_process(asked["model"], Format(**asked["format"]), Decoding(**settings))))


if __name__ == "__main__":
    main()
