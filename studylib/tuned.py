"""What each method of fine-tuning does to the model of its arm: attach, train, deploy."""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from studylib.adapters import LORA, attach
from studylib.arms import Arm
from studylib.corpora import Pair, instruction_pairs
from studylib.distill import check_head
from studylib.finetuning import fine_tune
from studylib.merging import FROM_ORIGINAL, QUANTIZED, merge
from studylib.methods import CALIBRATION_WINDOWS
from studylib.training import Log

VALIDATION_PAIRS = 8  # the last of the training split: for learning curves and learning rates, never trained on


@functools.cache
def training_pairs(source: str) -> tuple[list[Pair], list[Pair]]:
    """The pairs that are trained on, and those kept apart for validation. ValueError where none would be left."""
    pairs = instruction_pairs("training", source)
    if len(pairs) <= VALIDATION_PAIRS:
        raise ValueError(
            f"instructions {source!r}: {len(pairs)} pairs for training are too few; {VALIDATION_PAIRS} are kept "
            "apart for validation"
        )
    return pairs[:-VALIDATION_PAIRS], pairs[-VALIDATION_PAIRS:]


def tune(
    arm: Arm,
    model: PreTrainedModel,
    tokenizer,
    windows: Tensor | None,
    load: Callable[[], PreTrainedModel],
    checkpoints: Path,
    trained: Path,
    keep: bool,
    progress: Callable[[int], None],
) -> Log:
    """Fine-tune the model as the arm says and deploy it: plain linear layers with the weights of arm.merge.

    A training that diverged has nothing to deploy; its last loss says so.

    windows [N, T]: what GPTQ is calibrated on, the first of them. load: gives the model anew, for merges into its own
    weights. trained: a safetensors file of the trained parameters and the log, which arms share that differ in
    deployment and evaluation alone; it is written for methods that can be deployed in several ways. keep: leave a
    checkpoint of the end.
    """
    check_head(model)
    attach(
        model,
        arm.method,
        format=None if arm.method == LORA else arm.format,
        adapter=arm.adapter,
        seed=arm.seed,
        tokens=None if windows is None else windows[:CALIBRATION_WINDOWS],
    )
    if trained.exists():
        log = _load_trained(model, trained)
        progress(arm.tuning.steps * arm.tuning.batch * arm.instructions.length)
    else:
        pairs, validation = training_pairs(arm.instructions.source)
        log = fine_tune(
            model,
            tokenizer,
            pairs,
            arm.instructions,
            arm.tuning,
            checkpoints,
            held_out=validation,
            keep=keep,
            progress=progress,
        )
        if arm.method not in QUANTIZED:
            _save_trained(model, log, trained)
    if math.isfinite(log.steps[-1]["loss"]):
        merge(model, arm.merge, format=arm.format, original=load() if arm.merge in FROM_ORIGINAL else None)
    return log


def _save_trained(model: PreTrainedModel, log: Log, path: Path) -> None:
    own = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    partial = path.with_suffix(f".partial-{os.getpid()}")
    save_file(own, partial, {"log": json.dumps(dataclasses.asdict(log))})
    os.replace(partial, path)


def _load_trained(model: PreTrainedModel, path: Path) -> Log:
    own = dict(model.named_parameters())
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            own[name].data.copy_(file.get_tensor(name))
        return Log(**json.loads(file.metadata()["log"]))
