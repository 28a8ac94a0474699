"""What a method is trained or calibrated on: windows of text, what they are like, and the teacher's outputs on them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from studylib.config.budgets import ATTENTION, CHAT, RealText, Sampling, Training
from studylib.config.files import write_whole
from studylib.data import corpora, models
from studylib.data.generation import chat_opening, generate_windows
from studylib.data.text_statistics import text_statistics
from studylib.train.distillation import keep_teacher_states

KEPT_STATES_BYTES = 8 * 2**30  # up to here the teacher's states on the training data are computed once and kept
SAMPLES, SAMPLE_TOKENS = 3, 96  # how much of the text is shown


@dataclass(frozen=True)
class TrainingData:
    """Windows [N, T] and what was found out about them; the teacher for training on them and its output matrix."""

    windows: Tensor
    statistics: dict[str, float]
    samples: list[str]
    teacher: np.ndarray | PreTrainedModel | None
    head: Tensor


def prepare(
    model: PreTrainedModel,
    tokenizer,
    settings: Sampling | RealText,
    training: Training | None,
    folder: Path,
    states: Path,
    teacher: Callable[[], PreTrainedModel],
    progress: Callable[[int], None] = lambda tokens: None,
) -> TrainingData:
    """The windows that `settings` describe, with their statistics and what `training` needs of the teacher.

    Everything is kept in `folder`, the teacher's hidden states in the file `states`, and read from there the next time.
    model: full precision, unchanged. teacher: loads a second copy of it, for losses that read more than hidden states.
    """
    windows = _windows(model, tokenizer, settings, folder, progress)
    kept = folder / "statistics.json"
    if not kept.exists():
        with models.autocast(model.device):
            found = text_statistics(model, windows)
        write_whole(kept, json.dumps(found))
    return TrainingData(
        windows,
        json.loads(kept.read_text()),
        [tokenizer.decode(window[:SAMPLE_TOKENS]) for window in windows[:SAMPLES]],
        _teacher(model, training, windows, states, teacher, progress),
        model.get_output_embeddings().weight.detach().clone(),
    )


def _teacher(
    model: PreTrainedModel,
    training: Training | None,
    windows: Tensor,
    states: Path,
    load: Callable[[], PreTrainedModel],
    progress: Callable[[int], None],
) -> np.ndarray | PreTrainedModel | None:
    """The teacher's kept hidden states where the loss needs no more and they fit, a second copy of the model where it
    does, nothing where no loss reads the teacher."""
    if training is None or not (training.needs_teacher_states or training.features):
        return None
    width = model.get_output_embeddings().weight.shape[1]
    if not training.features and windows.numel() * width * 4 <= KEPT_STATES_BYTES:
        return keep_teacher_states(model, windows, states, progress=progress)
    teacher = load().requires_grad_(False)
    if ATTENTION in training.features:
        teacher.set_attn_implementation("eager")
    return teacher


def _windows(
    model: PreTrainedModel, tokenizer, settings: Sampling | RealText, folder: Path, progress: Callable[[int], None]
) -> Tensor:
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(settings, RealText):
        return _real_windows(settings, tokenizer)
    opening = chat_opening(tokenizer) if settings.strategy == CHAT else ()
    return generate_windows(model, settings, folder, opening, progress)


def _real_windows(settings: RealText, tokenizer) -> Tensor:
    windows = corpora.windows(settings.corpus, tokenizer, settings.length, None, "training")
    shuffle = torch.Generator().manual_seed(settings.seed)
    rounds = -(-settings.count // len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=shuffle) for _ in range(rounds)])
    return windows[order[: settings.count]]
