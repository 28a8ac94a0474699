"""Distillation losses, and LLM-QAT: quantization-aware training towards the full-precision model's logits."""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from studylib import models
from studylib.sampling import Windows, check_length

CHUNK = 256  # tokens whose logits are held at once: 256 x 49,152 x 4 bytes = 50 MB a model


@dataclass(frozen=True)
class Training:
    """Budget and optimizer of one training: AdamW, cosine schedule, no weight decay (LLM-QAT, section 3.1).

    steps optimizer steps of `batch` windows each. learning_rate 2e-5 is the paper's (on about 12,000 steps).
    mask: the official gradient mask |x| >= 2, or None for the plain straight-through estimator.
    """

    steps: int
    batch: int
    learning_rate: float
    max_grad_norm: float = 1.0
    mask: float | None = None

    def __post_init__(self):
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed; use 1 or more")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: {self.learning_rate!r} is not allowed; use a number above 0")


class _SoftLogitLoss(torch.autograd.Function):
    """Mean KL(teacher || student) a token, with its gradients computed chunk by chunk in the forward pass.

    With p, q the softmax of the teacher's and student's logits z = h W^T: d KL / dz = q - p, so
    dh = (q - p) W and dW = (q - p)^T h. No chunk's logits outlive it.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
        tokens, dtype = len(hidden), _matmul_dtype(hidden)
        d_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        d_head = torch.zeros_like(head) if head.requires_grad else None
        w, teacher_w = head.to(dtype), teacher_head.to(dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        for at in range(0, tokens, CHUNK):
            h = hidden[at : at + CHUNK].to(dtype)
            log_q = (h @ w.T).float().log_softmax(-1)  # (C, V)
            log_p = (teacher_hidden[at : at + CHUNK].to(dtype) @ teacher_w.T).float().log_softmax(-1)
            p = log_p.exp()
            total += (p * log_p.sub_(log_q)).sum()
            d_logits = log_q.exp_().sub_(p).div_(tokens).to(dtype)
            if d_hidden is not None:
                d_hidden[at : at + CHUNK] = d_logits @ w
            if d_head is not None:
                d_head += d_logits.T @ h
        ctx.save_for_backward(d_hidden, d_head)
        return total / tokens

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return *(None if d is None else d * gradient for d in ctx.saved_tensors), None, None


def _matmul_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def soft_logit_loss(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Distillation on soft logits: the mean over tokens of KL(teacher || student), in nats (LLM-QAT, Eq. 3).

    hidden [N, D] and head [V, D]: the student's last hidden states and output matrix; teacher_hidden [N, D'] and
    teacher_head [V, D'] likewise. Full [N, V] logits are never held: CHUNK tokens at a time. Softmax in fp32, products
    in the autocast type. The official code's `batchmean` over [B, T, V] divides by B only, T times this value; under
    AdamW the two differ only through gradient clipping.
    Raises ValueError for no tokens, or shapes that do not belong together.
    """
    if hidden.ndim != 2 or len(hidden) == 0 or len(hidden) != len(teacher_hidden) or len(head) != len(teacher_head):
        raise ValueError(
            f"soft_logit_loss: hidden {tuple(hidden.shape)} and {tuple(teacher_hidden.shape)} must be [N, D] "
            f"with the same N > 0, heads {tuple(head.shape)} and {tuple(teacher_head.shape)} of one vocabulary"
        )
    return _SoftLogitLoss.apply(hidden, head, teacher_hidden.detach(), teacher_head.detach())


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
    windows: Windows,
    path: str | Path,
    batch: int = 8,
    progress: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """The teacher's last hidden states [N, T, D] (fp32) of every window, computed once, kept in the .npy file `path`.

    Written whole or not at all; an existing file is opened as it is. Returns a read-only memory map.
    """
    path = Path(path)
    if not path.exists():
        partial = path.with_suffix(".partial")
        shape = (*windows.tokens.shape, teacher.get_output_embeddings().weight.shape[1])
        states = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
        for at in range(0, len(windows.tokens), batch):
            tokens = windows.tokens[at : at + batch].to(teacher.device)
            with models.autocast(teacher.device):
                states[at : at + batch] = last_hidden(teacher, tokens).float().cpu().numpy()
            progress(tokens.numel())
        states.flush()
        os.replace(partial, path)
    return np.load(path, mmap_mode="r")


class _Examples(Dataset):
    def __init__(self, windows: Windows, states: np.ndarray | None):
        self.windows, self.states, self.mask = windows, states, windows.mask

    def __len__(self) -> int:
        return len(self.windows.tokens)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        example = {"tokens": self.windows.tokens[i], "mask": self.mask[i]}
        if self.states is not None:
            example["teacher_hidden"] = torch.from_numpy(self.states[i].copy())
        return example


class _InOrder(Trainer):
    """transformers' Trainer on windows in their generated order, which is random already."""

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


class _Watch(TrainerCallback):
    """Reports finished steps and stops a training whose loss is not finite."""

    def __init__(self, progress: Callable[[int], None], tokens_per_step: int):
        self.progress, self.tokens_per_step = progress, tokens_per_step

    def on_train_begin(self, args, state, control, **kwargs):
        self.progress(state.global_step * self.tokens_per_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.progress(self.tokens_per_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            control.should_training_stop = True


def train_llm_qat(
    student: PreTrainedModel,
    teacher: PreTrainedModel | np.ndarray,
    teacher_head: Tensor,
    windows: Windows,
    settings: Training,
    folder: str | Path,
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[dict[str, float]]:
    """Train a quantized student (see layers.quantize_model) in place towards the teacher's logits.

    windows [N, T] are consumed in order, from the start again where steps x batch exceeds N. teacher: its last hidden
    states [N, T, D] of them (see keep_teacher_states), or the model itself, run at
    every step. The student's parameters are fp32 masters; products run in bf16 where the hardware has it.
    folder holds the last checkpoint: a killed training called again goes on from it and ends with the same weights.
    Returns one {"step", "loss", "learning_rate", "grad_norm"} a step (loss in nats a token); a last loss that is not
    finite means that the training diverged and was stopped there.
    Raises ValueError for windows longer than the model's context, parameters that are not fp32, or a student whose
    logits are not its last hidden states times its head.
    """
    check_length(student, windows.tokens.shape[1])
    check_head(student)
    wrong = {str(p.dtype) for p in student.parameters() if p.dtype != torch.float32}
    if wrong:
        raise ValueError(
            f"the student's parameters are {', '.join(sorted(wrong))}; load it in float32: updates at small "
            "learning rates round away in lower precision"
        )
    bf16 = models.compute_dtype() == torch.bfloat16
    # Compiled layers fuse the fake quantizers, which cost as much as the products where those run in bf16.
    compiled = (
        list(student.base_model.layers) if bf16 and (student.device.type == "cuda" or shutil.which("g++")) else []
    )
    for layer in compiled:
        layer.compile()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=bf16,
        use_cpu=student.device.type == "cpu",
        seed=seed,
        data_seed=seed,
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        save_steps=max(1, settings.steps // 4),
        save_total_limit=1,
    )

    states = teacher if isinstance(teacher, np.ndarray) else None

    def forward(tokens: Tensor, mask: Tensor, teacher_hidden: Tensor | None = None) -> dict[str, Tensor]:
        if teacher_hidden is None:
            with torch.no_grad():
                teacher_hidden = last_hidden(teacher, tokens)
        hidden = last_hidden(student, tokens)
        return {
            "loss": soft_logit_loss(
                hidden[mask], student.get_output_embeddings().weight, teacher_hidden[mask], teacher_head
            )
        }

    # The loss is the student's own forward pass while it trains, so that a wrapper (FSDP, autocast) sees all of it.
    student.forward = forward
    try:
        trainer = _InOrder(
            model=student,
            args=arguments,
            train_dataset=_Examples(windows, states),
            callbacks=[_Watch(progress, settings.batch * windows.tokens.shape[1])],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if Path(folder).is_dir() else None)
    finally:
        del student.forward
        for layer in compiled:
            layer._compiled_call_impl = None  # evaluation has other shapes, each of which would be compiled anew
        student.eval()
    return [
        {name: entry[name] for name in ("step", "loss", "learning_rate", "grad_norm")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
