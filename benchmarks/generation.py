"""Tokens a second of data generation, beside transformers' `generate` and a plain forward pass, in one run.

All sample with top-k 50 from a start token up to 256 tokens; what follows an end of text does not count.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from studylib.config.budgets import Sampling, profile
from studylib.data import models
from studylib.data.generation import generate_sequences, generate_windows
from studylib.evaluate.scores import window_losses
from studylib.study.machine import environment

MODEL, LENGTH = "smollm2-135m", 256
BATCHES = (64, 96)


def rate(run: Callable[[], int]) -> float:
    begun = time.perf_counter()
    tokens = run()
    return tokens / (time.perf_counter() - begun)


@torch.no_grad()
def theirs(model, start: Tensor) -> int:
    """The tokens that transformers' `generate` writes after start [B, 1]."""
    with models.autocast(model.device):
        found = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            top_k=50,
            max_length=LENGTH,
            pad_token_id=0,
        )[:, 1:]
    ended = (found == model.generation_config.eos_token_id).cumsum(1)
    return int((ended.cumsum(1) <= 1).sum())


def ours(model, start: Tensor) -> int:
    _, lengths = generate_sequences(model, start, Sampling(len(start), LENGTH, "sampled"), seed=0)
    return int((lengths - 1).sum())


def data_set(model, settings: Sampling) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return generate_windows(model, settings, folder).numel()


def forward(model) -> int:
    tokens = torch.randint(model.config.vocab_size, (8, LENGTH), generator=torch.Generator().manual_seed(0))
    window_losses(model, tokens)
    return tokens.numel()


def measured(name: str = MODEL, budget: str = "quick") -> dict[str, dict[str, float]]:
    """Tokens a second of the model; budget: the profile whose data set is made."""
    model = models.load_model(name)
    shuffle = torch.Generator().manual_seed(0)
    starts = torch.randperm(model.config.vocab_size, generator=shuffle)[:, None].to(model.device)
    forward(model)
    passes = "a forward pass with its loss"
    runs = {passes: rate(lambda: forward(model))}
    runs["generate, one at a time"] = rate(lambda: sum(theirs(model, start[None]) for start in starts[:3]))
    for batch in BATCHES:
        runs[f"generate, batch {batch}"] = rate(lambda: theirs(model, starts[:batch]))  # noqa: B023
        runs[f"this study, batch {batch}"] = rate(lambda: ours(model, starts[:batch]))  # noqa: B023
    runs[f"this study, data of the {budget} profile"] = rate(lambda: data_set(model, profile(budget).sampling))
    runs[f"{passes}, again"] = rate(lambda: forward(model))
    plain = (runs[passes] + runs[f"{passes}, again"]) / 2
    speedup = {batch: runs[f"this study, batch {batch}"] / runs[f"generate, batch {batch}"] for batch in BATCHES}
    return {
        "tokens_per_second": {name: round(value, 1) for name, value in runs.items()},
        "times_generate_at_the_same_batch": {str(batch): round(value, 2) for batch, value in speedup.items()},
        "times_a_forward_pass": {name: round(value / plain, 3) for name, value in runs.items()},
    }


def main():
    found = measured()
    result = {"what": __doc__} | found | {"environment": environment()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    for name, value in found["tokens_per_second"].items():
        print(f"{name:38} {value:8.1f} tokens/s   {found['times_a_forward_pass'][name]:5.2f} times a forward pass")
    for batch, value in found["times_generate_at_the_same_batch"].items():
        print(f"batch {batch}: {value:.2f} times generate")


if __name__ == "__main__":
    main()
