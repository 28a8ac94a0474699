"""Seconds of one optimizer step: LLM-QAT at 4-8-4 beside plain fine-tuning on labels, in one run.

A batch has 256 tokens, as in `quick`, and with an argument as many times that. The study's trainings keep freed memory
for the process, which fine-tuning as transformers documents it does not; that is also measured with it.
"""

import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from studylib.config.budgets import Training
from studylib.data import corpora, models
from studylib.quant.layers import quantize_model
from studylib.study.machine import environment, keep_freed_memory
from studylib.train.distillation import keep_teacher_states, train_llm_qat

MODEL, LENGTH, STEPS, WARM = "smollm2-135m", 256, 12, 3
PLAIN = "labels, eager"


def label_steps(name: str, windows: Tensor, batch: int, compiled: bool) -> list[float]:
    """Fine-tuning as transformers documents it: the model's own loss on labels, AdamW, clipping, the same precision."""
    model = models.load_model(name).train()
    if compiled:
        for layer in model.base_model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    seconds = []
    for tokens in windows.split(batch):
        begun = time.perf_counter()
        tokens = tokens.to(model.device)
        with models.autocast(model.device):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - begun)
    return seconds


def distillation_steps(name: str, windows: Tensor, batch: int, kept: bool) -> list[float]:
    """The study's own training, the teacher's states kept from before or its forward pass run at every step."""
    teacher = models.load_model(name)
    head = teacher.get_output_embeddings().weight.detach().clone()
    student = quantize_model(models.load_model(name), "4-8-4")
    at = []
    with tempfile.TemporaryDirectory() as folder:
        states = keep_teacher_states(teacher, windows, Path(folder) / "states.npy") if kept else teacher
        settings = Training(len(windows) // batch, batch, learning_rate=1e-5)
        train_llm_qat(
            student, states, head, windows, settings, folder, progress=lambda n: at.append(time.perf_counter())
        )
    seconds = [after - before for before, after in itertools.pairwise(at)]
    return seconds


def measured(name: str = MODEL, batch: int = 1, steps: int = STEPS) -> dict[str, dict[str, float]]:
    """Seconds of a step of the model, by how it is trained: the median after WARM steps, and the first."""
    windows = corpora.windows("c4", models.load_tokenizer(name), LENGTH, batch * steps, "training")
    runs = {
        PLAIN: label_steps(name, windows, batch, compiled=False),
        "labels, compiled layers": label_steps(name, windows, batch, compiled=True),
        f"{PLAIN}, again": label_steps(name, windows, batch, compiled=False),
    }
    keep_freed_memory()
    runs |= {
        "labels, eager, freed memory kept": label_steps(name, windows, batch, compiled=False),
        "LLM-QAT 4-8-4, kept teacher states": distillation_steps(name, windows, batch, kept=True),
        "LLM-QAT 4-8-4, teacher at every step": distillation_steps(name, windows, batch, kept=False),
        "labels, eager, freed memory kept, again": label_steps(name, windows, batch, compiled=False),
    }
    medians = {name: statistics.median(seconds[WARM:]) for name, seconds in runs.items()}
    plain = statistics.mean([medians[PLAIN], medians[f"{PLAIN}, again"]])
    return {
        "tokens_a_step": {"all": batch * LENGTH},
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "times_plain": {name: round(value / plain, 2) for name, value in medians.items()},
        "first_step": {name: round(seconds[0], 1) for name, seconds in runs.items()},
    }


def main():
    found = measured(batch=int(sys.argv[1]) if sys.argv[1:] else 1)
    result = {"what": __doc__} | found | {"environment": environment()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    for name, value in found["seconds"].items():
        print(f"{name:40} {value:7.2f} s a step   {found['times_plain'][name]:5.2f} times plain")


if __name__ == "__main__":
    main()
