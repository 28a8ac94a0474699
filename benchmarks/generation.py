"""Tokens a second of data generation: batched with a cache, beside `generate` one sequence at a time, in one run."""

import json
import tempfile
import time
from pathlib import Path

import torch

from studylib import models
from studylib.evaluation import window_losses
from studylib.records import environment
from studylib.sampling import Sampling, generate_windows

MODEL, LENGTH = "smollm2-135m", 256


@torch.no_grad()
def one_at_a_time(model, sequences: int) -> float:
    """As the official code does it: a start token, then transformers' `generate`, sampled with top-k 50."""
    made, begun = 0, time.perf_counter()
    for start in torch.randint(model.config.vocab_size, (sequences, 1), generator=torch.Generator().manual_seed(0)):
        start = start[None].to(model.device)
        with models.autocast(model.device):
            found = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                do_sample=True,
                top_k=50,
                max_length=LENGTH,
                pad_token_id=0,
            )
        made += found.shape[1] - 1
    return made / (time.perf_counter() - begun)


def batched(model, batch: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        windows = generate_windows(model, Sampling(count=batch, length=LENGTH, batch=batch), folder)
        return int((windows.lengths - 1).sum()) / (time.perf_counter() - begun)


def forward(model) -> float:
    tokens = torch.randint(model.config.vocab_size, (8, LENGTH), generator=torch.Generator().manual_seed(0))
    window_losses(model, tokens)
    begun = time.perf_counter()
    window_losses(model, tokens)
    return tokens.numel() / (time.perf_counter() - begun)


def main():
    model = models.load_model(MODEL)
    runs = {
        "generate, one at a time": one_at_a_time(model, 3),
        "batch 64": batched(model, 64),
        "batch 96 (quick profile)": batched(model, 96),
        "batch 128 (full profile)": batched(model, 128),
        "generate, one at a time, again": one_at_a_time(model, 3),
        "a forward pass with its loss": forward(model),
    }
    single = (runs["generate, one at a time"] + runs["generate, one at a time, again"]) / 2
    result = {
        "what": __doc__,
        "tokens_per_second": {name: round(value, 1) for name, value in runs.items()},
        "times_one_at_a_time": {name: round(value / single, 1) for name, value in runs.items()},
        "environment": environment() | {"compute_dtype": str(models.compute_dtype())},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    for name, value in runs.items():
        print(f"{name:34} {value:8.1f} tokens/s   {value / single:5.1f} times one at a time")


if __name__ == "__main__":
    main()
