"""LLM-QAT: what a student is trained on, its teacher's outputs on that, and the training towards them."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from studylib.config import (
    ATTENTION,
    CHAT,
    CORPORA,
    HIDDEN,
    LABELS,
    RAW_HIDDEN,
    UNREPORTED,
    Log,
    RealText,
    Report,
    Sampling,
    Training,
    make_folder,
    split_loss,
    usable,
    write_whole,
    written_whole,
)
from studylib.data import (
    beginning,
    chat_opening,
    check_length,
    corpora,
    generate_windows,
    models,
    text_statistics,
)
from studylib.quant import cast_parameters
from studylib.train.losses import attention_loss, hidden_loss, label_loss, raw_hidden_loss, soft_logit_loss

MEASURED = 8  # rows of a batch, at least, where nothing is trained: low-bit weights are made once for all of them


def last_hidden(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The decoder's normalised last hidden states [B, T, D] for token ids [B, T]; times the head: the logits."""
    return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state


@torch.no_grad()
def check_head(model: PreTrainedModel) -> Tensor:
    """The output matrix [V, D]. ValueError where the logits are not simply hidden states times it."""
    head = model.get_output_embeddings()
    tokens = torch.arange(4, device=model.device)[None]
    logits = model(input_ids=tokens, use_cache=False).logits
    if not torch.allclose(F.linear(last_hidden(model, tokens), head.weight), logits, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{type(model).__name__}: its logits are not its last hidden states times lm_head (a bias, a scale "
            "or soft-capping?); distillation needs a model where they are"
        )
    return head.weight


@torch.no_grad()
def keep_teacher_states(
    teacher: PreTrainedModel,
    windows: Tensor,
    path: str | Path,
    batch: int = 8,
    progress: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """The teacher's last hidden states [N, T, D] (fp32) of windows [N, T], computed once, kept in the .npy file `path`.

    Written whole or not at all, and sealed; a file that is there is opened as it is. Returns a read-only memory map.
    """
    path = Path(path)
    if not usable(path):
        shape = (*windows.shape, teacher.get_output_embeddings().weight.shape[1])
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
        # One after the other, not through a memory map: that would end the process by a signal on a full disk.
        with written_whole(path, sealed=True, size=4 * math.prod(shape)) as partial, partial.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for at in range(0, len(windows), batch):
                tokens = windows[at : at + batch].to(teacher.device)
                with models.autocast(teacher.device):
                    states = last_hidden(teacher, tokens).float().cpu().numpy()
                file.write(states.tobytes())
                progress(tokens.numel())
    return np.load(path, mmap_mode="r")


def held_out_windows(names: Sequence[str], tokenizer, length: int, count: int) -> Tensor:
    """The first `count` evaluation windows of `length` tokens of each corpus, for learning curves."""
    return torch.cat([corpora.windows(corpus, tokenizer, length, count, "evaluation") for corpus in names])


def validation_windows(tokenizer, length: int, count: int) -> Tensor:
    """`count` windows of each corpus's training split, which is neither generated nor scored, to choose rates by."""
    return torch.cat([corpora.windows(corpus, tokenizer, length, count, "training") for corpus in CORPORA])


class _Examples(Dataset):
    def __init__(self, windows: Tensor, states: np.ndarray | None):
        self.windows, self.states = windows, states

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        example = {"tokens": self.windows[i]}
        if self.states is not None:
            example["teacher_hidden"] = torch.from_numpy(self.states[i].copy())
        return example


def train_llm_qat(
    student: PreTrainedModel,
    teacher: PreTrainedModel | np.ndarray | None,
    teacher_head: Tensor,
    windows: Tensor,
    settings: Training,
    folder: str | Path,
    seed: int = 0,
    held_out: Tensor | None = None,
    keep: bool = False,
    progress: Callable[[int], None] = lambda tokens: None,
    report: Report = UNREPORTED,
) -> Log:
    """Train a quantized student (see layers.quantize_model) in place towards the teacher.

    windows [N, T] are consumed in order, from the start again where steps x batch exceeds N. teacher: its last hidden
    states [N, T, D] of them (see keep_teacher_states), or the model itself, run at every step, or None where the loss
    is on labels only. The student's parameters are fp32 masters (bf16 with settings.masters); products run in bf16
    where the hardware has it. held_out [M, T']: tokens whose loss is measured as training goes on.
    folder holds the last checkpoint: a killed training called again goes on from it and ends with the same weights, and
    so does an extended one (settings.extended_from) from what was kept. keep: leave a checkpoint of the end as well.
    report: where it is told of as it goes on.
    A last loss that is not finite means that the training diverged and was stopped there.
    Raises ValueError for windows longer than the model's context, parameters that are not fp32, a student whose logits
    are not its last hidden states times its head, or a loss that needs of a model what it does not have.
    """
    from studylib.train.loop import fit

    check_length(student, windows.shape[1])
    check_head(student)
    _check_loss(student, teacher, settings)
    wrong = {str(p.dtype) for p in student.parameters() if p.dtype != torch.float32}
    if wrong:
        raise ValueError(
            f"the student's parameters are {', '.join(sorted(wrong))}; load it in float32: updates at small "
            "learning rates round away in lower precision"
        )
    if settings.masters == "bf16":
        cast_parameters(student, torch.bfloat16)

    def held_out_loss() -> dict[str, Any]:
        losses = [
            label_loss(
                last_hidden(student, tokens)[:, :-1].flatten(0, 1),
                student.get_output_embeddings().weight,
                tokens[:, 1:].flatten(),
            )
            * len(tokens)
            for tokens in held_out.to(student.device).split(max(settings.batch, MEASURED))
        ]
        return {"loss": (torch.stack(losses).sum() / len(held_out)).item()}

    try:
        return fit(
            student,
            _loss_function(student, teacher, teacher_head, settings),
            _Examples(windows, teacher if isinstance(teacher, np.ndarray) else None),
            settings,
            folder,
            tokens_per_step=settings.batch * windows.shape[1],
            held_out_loss=None if held_out is None else held_out_loss,
            held_out_text=b"" if held_out is None else held_out.numpy().tobytes(),
            compiled=not settings.features,
            seed=seed,
            keep=keep,
            progress=progress,
            report=report,
        )
    finally:
        cast_parameters(student, torch.float32)


def _check_loss(student: PreTrainedModel, teacher: PreTrainedModel | np.ndarray | None, settings: Training) -> None:
    if teacher is None and (settings.needs_teacher_states or settings.features):
        raise ValueError(f"loss: {settings.loss!r} needs a teacher")
    if not settings.features:
        return
    if not isinstance(teacher, PreTrainedModel):
        raise ValueError(f"loss: {settings.loss!r} needs the teacher itself, not only its last hidden states")
    if ATTENTION in settings.features:
        for model in (student, teacher):
            kind = model.config._attn_implementation
            if kind != "eager":
                raise ValueError(
                    f"loss: {settings.loss!r} needs attention maps, which the attention kernel {kind!r} does not "
                    "return; use model.set_attn_implementation('eager')"
                )
    own, given = (model.config.get_text_config() for model in (student, teacher))
    names = (
        "num_hidden_layers",
        "num_attention_heads" if ATTENTION in settings.features else "hidden_size",
        "hidden_size",
    )
    for name in names if _reads_states(settings.features) else names[:2]:
        if getattr(own, name) != getattr(given, name):
            raise ValueError(
                f"loss: {settings.loss!r} compares models layer by layer; the student's {name} is "
                f"{getattr(own, name)}, the teacher's {getattr(given, name)}"
            )


def _reads_states(features: tuple[str, ...]) -> bool:
    return HIDDEN in features or RAW_HIDDEN in features


def _loss_function(
    student: PreTrainedModel, teacher: PreTrainedModel | np.ndarray | None, teacher_head: Tensor, settings: Training
) -> Callable[..., dict[str, Tensor]]:
    """The training loss as a forward pass: tokens [B, T] -> {"loss"}."""
    logits, features = split_loss(settings.loss)
    wanted = {
        "use_cache": False,
        "output_attentions": ATTENTION in features,
        "output_hidden_states": _reads_states(features),
    }

    def forward(tokens: Tensor, teacher_hidden: Tensor | None = None) -> dict[str, Tensor]:
        own = student.base_model(input_ids=tokens, **wanted)
        if teacher_hidden is None and (logits != LABELS or features):
            with torch.no_grad():
                given = teacher.base_model(input_ids=tokens, **wanted)
            teacher_hidden = given.last_hidden_state
        hidden, head = own.last_hidden_state, student.get_output_embeddings().weight
        loss = hidden.new_zeros((), dtype=torch.float32)
        if logits == LABELS:
            loss = loss + label_loss(hidden[:, :-1].flatten(0, 1), head, tokens[:, 1:].flatten())
        elif logits:
            flat = hidden.flatten(0, 1), head, teacher_hidden.flatten(0, 1), teacher_head
            loss = loss + soft_logit_loss(*flat, logits, settings.temperature)
        if ATTENTION in features:
            loss = loss + attention_loss(own.attentions, given.attentions)
        if HIDDEN in features:
            loss = loss + hidden_loss(own.hidden_states[1:], given.hidden_states[1:])
        if RAW_HIDDEN in features:
            loss = loss + raw_hidden_loss(own.hidden_states[1:], given.hidden_states[1:])
        return {"loss": loss * tokens.shape[1] if settings.scale == "batchmean" else loss}

    return forward


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
    if not usable(kept):
        with models.autocast(model.device):
            found = text_statistics(model, windows)
        write_whole(kept, json.dumps(found), sealed=True)
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
    make_folder(folder)
    if isinstance(settings, RealText):
        return _real_windows(settings, tokenizer)
    opening = chat_opening(tokenizer) if settings.strategy == CHAT else ()
    return generate_windows(
        model, settings, folder, opening, progress, first=beginning(tokenizer), end=tokenizer.eos_token_id
    )


def _real_windows(settings: RealText, tokenizer) -> Tensor:
    windows = corpora.windows(settings.corpus, tokenizer, settings.length, None, "training")
    shuffle = torch.Generator().manual_seed(settings.seed)
    rounds = -(-settings.count // len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=shuffle) for _ in range(rounds)])
    return windows[order[: settings.count]]
