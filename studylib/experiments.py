"""Arm -> Record: what is cached is loaded, what is missing is computed, nothing finished is lost."""

import contextlib
import dataclasses
import functools
import gc
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, set_seed

from studylib import corpora, models
from studylib.arms import LLM_QAT, RTN, Arm, Evaluation
from studylib.distill import keep_teacher_states, train_llm_qat
from studylib.evaluation import TASKS, task_scores, window_losses
from studylib.layers import freeze_weights, quantize_model
from studylib.memory import cache_bytes_per_token, peak_memory, weight_bytes
from studylib.ptq import round_to_nearest
from studylib.records import (
    DIVERGED,
    FINISHED,
    TRAINING_CODE,
    Record,
    Store,
    arm_code,
    arm_key,
    code_versions,
    digest,
    environment,
)
from studylib.sampling import Windows, check_length, generate_windows
from studylib.sources import fetch

TRAINING_WORK = 4  # a trained token costs about four forward passes: forward, twice that backward, loss and optimizer
ITEM_WORK = 100  # forward tokens that one benchmark item takes on average, for the estimate of the time left only
KEPT_STATES_BYTES = 8 * 2**30  # up to here the teacher's states on the training data are computed once and kept

Progress = Callable[[int], None]


def check(arm: Arm) -> None:
    """Everything that can be wrong with an arm beyond its fields, found before any long work starts: ValueError."""
    with torch.device("meta"):
        skeleton = models.skeleton(models.load_config(arm.model))
    quantize_model(skeleton, arm.bits)
    for length in (arm.evaluation.length, *([arm.sampling.length] if arm.sampling else [])):
        check_length(skeleton, length)
    _check_evaluation(arm.model, arm.evaluation)


@functools.lru_cache(maxsize=8)
def _check_evaluation(model: str, wanted: Evaluation) -> None:
    tokenizer = models.load_tokenizer(model)
    for corpus in wanted.corpora:
        corpora.windows(corpus, tokenizer, wanted.length, wanted.windows, "evaluation")
    if wanted.tasks and wanted.source == "archive":
        fetch("benchmarks")


def run(arms: Sequence[Arm], results: str | Path) -> list[Record]:
    """The records of `arms`, in their order: loaded from results/records where present, computed and saved otherwise.

    Shows one progress bar over the missing arms with an estimate of the time left. Killed at any point, the next call
    goes on: finished records are kept, generated data and training continue from their last batch and checkpoint.
    Two processes may work on the same folder; each arm is computed by one of them.
    Raises ValueError for an arm that cannot be run, before anything is computed, and RecordError for a results folder
    that is not writable or a record that cannot be read.
    """
    store = Store(results)
    missing = [arm for arm in dict.fromkeys(arms) if store.load(arm_key(arm)) is None]
    for arm in missing:
        check(arm)
    with tqdm(
        total=sum(map(_work, missing)),
        unit="tok",
        unit_scale=True,
        disable=not missing,
        mininterval=2,
        dynamic_ncols=True,
    ) as bar:
        done = 0
        for arm in missing:
            bar.set_description(arm.title)
            end = done + _work(arm)
            with store.lock(arm_key(arm)):
                if store.load(arm_key(arm)) is None:
                    store.save(carry_out(arm, store, functools.partial(_advance, bar, end)))
                    shutil.rmtree(store.checkpoint_folder(arm_key(arm)), ignore_errors=True)
            _advance(bar, end, end)
            done = end
    return [store.load(arm_key(arm)) for arm in arms]


def _advance(bar: tqdm, end: int, tokens: int) -> None:
    """Move the bar by `tokens`, at most to `end`: an arm that takes more than planned stays in its own part."""
    bar.update(min(tokens, end - bar.n))


def carry_out(arm: Arm, store: Store, progress: Progress = lambda tokens: None) -> Record:
    """Compute the record of one arm. progress is told of finished work, in tokens of a forward pass."""
    set_seed(arm.seed)
    seconds, tokens, log = {}, {}, []

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - begun, 2)

    with peak_memory() as peak:
        with phase("load"):
            model = models.load_model(arm.model)
            tokenizer = models.load_tokenizer(arm.model)
        identity = models.identity(arm.model)
        sizes = {
            "bytes/weights": weight_bytes(model, arm.bits),
            "bytes/cache_per_token": cache_bytes_per_token(model, arm.bits),
        }
        if arm.method == RTN:
            with phase("quantize"):
                round_to_nearest(model, arm.bits)
        elif arm.method == LLM_QAT:
            with phase("data"):
                windows, teacher, head = _training_data(arm, model, identity, store, progress)
            tokens["generated"] = int(windows.lengths.sum())
            with phase("train"):
                quantize_model(model, arm.bits, mask=arm.training.mask)
                log = train_llm_qat(
                    model,
                    teacher,
                    head,
                    windows,
                    arm.training,
                    store.checkpoint_folder(arm_key(arm)),
                    seed=arm.seed,
                    progress=lambda n: progress(n * TRAINING_WORK),
                )
            tokens["trained"] = arm.training.steps * arm.training.batch * arm.sampling.length
            del teacher, head
            freeze_weights(model)
        diverged = bool(log) and not math.isfinite(log[-1]["loss"])
        with phase("evaluate"), _counted(model, progress) as seen:
            metrics, scores = ({}, {}) if diverged else score(arm, model, tokenizer)
        tokens["evaluated"] = seen["tokens"]
    del model
    gc.collect()
    numbers = metrics | sizes
    finite = all(map(math.isfinite, numbers.values())) and not diverged
    return Record(
        key=arm_key(arm),
        arm=arm,
        status=FINISHED if finite else DIVERGED,
        metrics={name: value if math.isfinite(value) else None for name, value in numbers.items()},
        scores={name: _json_numbers(values) for name, values in scores.items()},
        training=[{name: value if math.isfinite(value) else None for name, value in entry.items()} for entry in log],
        cost={"seconds": seconds, "tokens": tokens, "peak_bytes": peak["bytes"]},
        provenance=environment()
        | {
            "compute_dtype": str(models.compute_dtype()).removeprefix("torch."),
            "code": arm_code(arm),
            "model": identity,
            "corpora": {name: corpora.sha256(name) for name in arm.evaluation.corpora},
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )


def _json_numbers(values: np.ndarray) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]


def score(arm: Arm, model: PreTrainedModel, tokenizer) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics by name and the per-item scores behind them, for what arm.evaluation asks for."""
    wanted = arm.evaluation
    metrics, scores = {}, {}
    for corpus in wanted.corpora:
        windows = corpora.windows(corpus, tokenizer, wanted.length, wanted.windows, "evaluation")
        losses = scores[f"loss/{corpus}"] = window_losses(model, windows)
        with np.errstate(over="ignore"):
            metrics[f"perplexity/{corpus}"] = float(np.exp(losses.mean()))
    if wanted.tasks:
        for task, by_metric in task_scores(model, tokenizer, wanted.tasks, wanted.items, wanted.source).items():
            scores |= {f"{metric}/{task}": values for metric, values in by_metric.items()}
            scores[f"accuracy/{task}"] = by_metric[TASKS[task].metric]
            metrics[f"accuracy/{task}"] = float(np.mean(scores[f"accuracy/{task}"]))
    return metrics, scores


def _training_data(
    arm: Arm, teacher: PreTrainedModel, identity: dict, store: Store, progress: Progress
) -> tuple[Windows, np.ndarray | PreTrainedModel, torch.Tensor]:
    """Generated windows, made once for all arms that share them, the teacher for them and its output matrix.

    The teacher is its kept hidden states, or a second copy of the model where those would pass KEPT_STATES_BYTES.
    """
    described = {"model": identity, "sampling": dataclasses.asdict(arm.sampling), "code": code_versions(TRAINING_CODE)}
    folder = store.data_folder(digest(json.dumps(described, sort_keys=True)))
    with store.lock(f"data-{folder.name}"):
        windows = generate_windows(teacher, arm.sampling, folder, progress)
        (folder / "provenance.json").write_text(json.dumps(described | environment(), indent=1))
        head = teacher.get_output_embeddings().weight.detach().clone()
        if windows.tokens.numel() * head.shape[1] * 4 > KEPT_STATES_BYTES:
            return windows, models.load_model(arm.model, models.compute_dtype()).requires_grad_(False), head
        states = keep_teacher_states(teacher, windows, folder / "teacher_states.npy", progress=progress)
    return windows, states, head


@contextlib.contextmanager
def _counted(model: nn.Module, progress: Progress) -> Iterator[dict[str, int]]:
    """Count the tokens of every forward pass inside."""
    seen = {"tokens": 0}

    def count(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        seen["tokens"] += ids.numel()
        progress(ids.numel())

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _work(arm: Arm) -> int:
    """Planned work in tokens of a forward pass."""
    wanted = arm.evaluation
    work = len(wanted.corpora) * wanted.windows * wanted.length
    work += sum(ITEM_WORK * TASKS[task].count(wanted.items) for task in wanted.tasks)
    if arm.method == LLM_QAT:
        work += 2 * arm.sampling.count * arm.sampling.length
        work += TRAINING_WORK * arm.training.steps * arm.training.batch * arm.sampling.length
    return work
