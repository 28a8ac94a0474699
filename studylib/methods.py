"""What each method does to the model of its arm: quantize it, train it."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from studylib import corpora
from studylib.arms import AWQ, GPTQ, RTN, SMOOTHQUANT, SMOOTHQUANT_QAT, Arm
from studylib.distill import train_llm_qat
from studylib.layers import freeze_weights, quantize_model
from studylib.losses import ATTENTION
from studylib.ptq import awq, gptq, round_to_nearest, smoothquant
from studylib.training import Log
from studylib.training_data import TrainingData

CALIBRATION_WINDOWS = 32  # of the data, at most, for SmoothQuant and GPTQ, whose time grows with them
AWQ_WINDOWS = 8  # and for AWQ, which runs each of them some twenty times through every layer
HELD_OUT_WINDOWS = 1  # of each evaluation corpus, for learning curves


def quantize(arm: Arm, model: PreTrainedModel, windows: Tensor | None) -> None:
    """Everything that is done to the model before it is trained, or instead; windows [N, T]: the arm's data, if any."""
    calibration = None if windows is None else windows[:CALIBRATION_WINDOWS]
    if arm.method in (SMOOTHQUANT, SMOOTHQUANT_QAT):
        smoothquant(model, calibration)
    if arm.method in (RTN, SMOOTHQUANT):
        round_to_nearest(model, arm.bits, arm.scheme)
    elif arm.method == GPTQ:
        gptq(model, arm.bits, calibration)
    elif arm.method == AWQ:
        awq(model, arm.bits, calibration[:AWQ_WINDOWS])


def train(
    arm: Arm,
    model: PreTrainedModel,
    tokenizer,
    data: TrainingData,
    checkpoints: Path,
    keep: bool,
    progress: Callable[[int], None],
) -> Log:
    """LLM-QAT of the model, which then computes with the dequantized weights."""
    attention = model.config._attn_implementation
    if ATTENTION in arm.training.features:
        model.set_attn_implementation("eager")
    quantize_model(model, arm.bits, arm.scheme, mask=arm.training.mask, tokens=data.windows[: arm.training.batch])
    held_out = [
        corpora.windows(corpus, tokenizer, arm.data.length, HELD_OUT_WINDOWS, "evaluation")
        for corpus in arm.evaluation.corpora
    ]
    log = train_llm_qat(
        model,
        data.teacher,
        data.head,
        data.windows,
        arm.training,
        checkpoints,
        seed=arm.seed,
        held_out=torch.cat(held_out),
        keep=keep,
        progress=progress,
    )
    if ATTENTION in arm.training.features:
        model.set_attn_implementation(attention)
    freeze_weights(model)
    return log
