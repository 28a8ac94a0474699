"""Benchmark items a second: packed rows, beside lm-eval's own model in padded batches, in one run.

Each is run twice, the second time in reversed order, and the faster time of each task counts.
"""

import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from lm_eval.models.huggingface import HFLM

from studylib.data import models
from studylib.evaluate import scores as evaluation
from studylib.evaluate.scores import TASKS, PackedLM, task_scores
from studylib.study.machine import environment

MODEL = "smollm2-135m"
ITEMS = {"piqa": 40, "hellaswag": 20, "winogrande": 40, "arc_easy": 40, "openbookqa": 40, "boolq": 12, "mmlu": 6}
RUNS = {  # name: lm-eval's model class with its batch size
    "lm-eval": functools.partial(HFLM, batch_size=1),
    "lm-eval, batch 8": functools.partial(HFLM, batch_size=8),
    "packed": PackedLM,
}
BASE = "lm-eval, batch 8"  # the faster over all tasks; BoolQ and MMLU, whose prompts are long, are faster one by one


def timed(model, tokenizer, kind: Callable[..., HFLM], items: dict[str, int]) -> dict[str, tuple[float, np.ndarray]]:
    """By task: the seconds from lm-eval's requests to their answers, and the scores of its items."""
    seconds = []

    def made(**settings) -> HFLM:
        scored = kind(**settings)
        answer = scored.loglikelihood

        def loglikelihood(*args, **kwargs):
            begun = time.perf_counter()
            answers = answer(*args, **kwargs)
            seconds.append(time.perf_counter() - begun)
            return answers

        scored.loglikelihood = loglikelihood
        return scored

    with mock.patch.object(evaluation, "PackedLM", made):
        scores = {task: task_scores(model, tokenizer, [task], n)[task][TASKS[task].metric] for task, n in items.items()}
    return {task: (spent, scores[task]) for task, spent in zip(items, seconds, strict=True)}


def measured(of: str = MODEL, items: dict[str, int] = ITEMS) -> dict[str, dict[str, dict[str, float]]]:
    """Items a second of the model, beside lm-eval's and whether the scores are equal, by run and task."""
    model, tokenizer = models.load_model(of), models.load_tokenizer(of)
    task_scores(model, tokenizer, ["piqa"], 4)
    seconds, scores = defaultdict(list), {}
    for name in [*RUNS, *reversed(RUNS)]:
        for task, (spent, values) in timed(model, tokenizer, RUNS[name], items).items():
            seconds[name, task].append(spent)
            scores[name, task] = values
    fastest = {key: min(both) for key, both in seconds.items()}
    for name in RUNS:
        fastest[name, "all"] = sum(fastest[name, task] for task in items)
        scores[name, "all"] = np.concatenate([scores[name, task] for task in items])
    return {
        name: {
            task: {
                "items_per_second": round(len(scores[name, task]) / fastest[name, task], 2),
                "times_lm_eval": round(fastest[BASE, task] / fastest[name, task], 2),
                "equal_scores": round(float(np.mean(scores[name, task] == scores[BASE, task])), 4),
            }
            for task in [*items, "all"]
        }
        for name in RUNS
    }


def main():
    found = measured()
    result = {"what": __doc__.partition("\n")[0], "items": ITEMS, "runs": found, "environment": environment()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    for name, by_task in found.items():
        for task, of in by_task.items():
            print(
                f"{name:24} {task:12} {of['items_per_second']:7.2f} items/s {of['times_lm_eval']:6.2f} times {BASE}"
                f" {of['equal_scores']:8.1%} equal scores"
            )


if __name__ == "__main__":
    main()
