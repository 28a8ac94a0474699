"""The time of a decoded token: 16 bits, 4-bit integers multiplied as they are stored, and an adapter beside them."""

import copy
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from studylib.config.budgets import EXECUTIONS, OWN, TIMED_LAYERS, Decoding
from studylib.config.settings import Adapter, Format
from studylib.data import models
from studylib.evaluate.memory import CONFIGURATIONS
from studylib.methods.adapters import attach
from studylib.quant.formats import encode_model
from studylib.quant.kernel import int4_model

VOCABULARY = 1024  # of a shape that is timed


def decoding_seconds(
    load: Callable[[], PreTrainedModel], format: Format, settings: Decoding
) -> dict[tuple[str, str], np.ndarray]:
    """Seconds that a decoded token takes, [rounds], of each model that is timed and each of EXECUTIONS.

    The models: OWN, which `load` gives, and settings.shapes. 4 bits: the weights rounded to `format`, as every method
    leaves them that deploys integers only; an adapter: LoRA's usual one on all layers. Executions take turns, so that
    whatever else the machine does meets all alike.
    """
    sources = {OWN: load} | {shape: lambda shape=shape: _layers_of(shape) for shape in settings.shapes}
    found = {}
    for name, source in sources.items():
        executions = (
            source().cpu().to(models.compute_dtype()).eval(),
            int4_model(encode_model(source().cpu(), format), models.compute_dtype()),
            int4_model(attach(source().cpu(), "qlora", format=format, adapter=Adapter()), models.compute_dtype()),
        )
        rounds = [[_seconds(model, settings) for model in executions] for _ in range(settings.rounds + 1)]
        found |= {(name, kind): times for kind, times in zip(EXECUTIONS, np.array(rounds[1:]).T, strict=True)}
    return found


def _layers_of(shape: str) -> PreTrainedModel:
    config = copy.deepcopy(CONFIGURATIONS[shape])
    config.num_hidden_layers, config.vocab_size = TIMED_LAYERS, VOCABULARY
    return models.skeleton(config)


@torch.no_grad()
def _seconds(model: PreTrainedModel, settings: Decoding) -> float:
    """Seconds of one token, the mean over those that are decoded."""
    cache = DynamicCache(config=model.config)
    context = torch.arange(settings.context)[None] % model.config.vocab_size
    logits = model(input_ids=context, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    begun = time.perf_counter()
    for _ in range(settings.tokens):
        logits = model(input_ids=logits[:, -1].argmax(1, keepdim=True), past_key_values=cache, use_cache=True).logits
    return (time.perf_counter() - begun) / settings.tokens
