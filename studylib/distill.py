"""LLM-QAT: quantization-aware training towards the full-precision model."""

import contextlib
import itertools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from studylib import models
from studylib.losses import (
    ATTENTION,
    HIDDEN,
    KL,
    LABELS,
    LOGIT_LOSSES,
    attention_loss,
    hidden_loss,
    label_loss,
    soft_logit_loss,
    split_loss,
)
from studylib.sampling import check_length

CHECKPOINT_SECONDS = 120  # a killed training loses at most about this much
COMPILED_STEPS = 20  # from so many steps on, compiling the layers pays for itself
CURVE_PARTS = 4  # the held-out loss is measured before training and after each quarter of it
SCALES, MASTERS = ("token", "batchmean"), ("fp32", "bf16")


@dataclass(frozen=True)
class Training:
    """Budget, loss and optimizer of one training: AdamW, cosine schedule, no weight decay (LLM-QAT, section 3.1).

    steps optimizer steps of `batch` windows each. learning_rate 2e-5 is the paper's (on about 12,000 steps).
    loss: parts joined by "+". On logits: "labels" (cross-entropy with the text's next tokens), "kl" (KL(teacher ||
    student), LLM-QAT's), "reverse-kl" or "symmetric-kl" (the mean of both), at `temperature`. On features, averaged
    over layers: "attention" (KL of the attention maps), "hidden" (squared error of hidden states).
    scale: "token" averages over tokens, "batchmean" is the official code's, `length` times that.
    mask: the official gradient mask |x| >= 2, or None for the plain straight-through estimator.
    masters: the type that parameters are kept and updated in, "fp32" or, as in the official code, "bf16".
    extended_from: the step counts that this training stopped at before it was extended; at each of them the cosine
    schedule starts again from learning_rate (warm restart: Loshchilov & Hutter 2017).
    """

    steps: int
    batch: int
    learning_rate: float
    loss: str = KL
    temperature: float = 1.0
    scale: str = "token"
    max_grad_norm: float = 1.0
    mask: float | None = None
    masters: str = "fp32"
    extended_from: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed; use 1 or more")
        for name in ("learning_rate", "temperature", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed; use a number above 0")
        for name, allowed in (("scale", SCALES), ("masters", MASTERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not known; use one of {', '.join(allowed)}")
        logits, _ = split_loss(self.loss)
        if self.temperature != 1 and logits not in LOGIT_LOSSES[1:]:
            raise ValueError(
                f"temperature: {self.temperature} has no meaning for the loss {self.loss!r}; use it with a KL"
            )
        if any(end <= begin for begin, end in self.parts):
            raise ValueError(
                f"extended_from: {self.extended_from} is not allowed; use rising counts below steps {self.steps}"
            )

    @property
    def parts(self) -> list[tuple[int, int]]:
        """First and last step of each part that has a schedule of its own."""
        return list(itertools.pairwise((0, *self.extended_from, self.steps)))

    @property
    def needs_teacher_states(self) -> bool:
        """Whether the loss reads the teacher's last hidden states."""
        return split_loss(self.loss)[0] in LOGIT_LOSSES[1:]

    @property
    def features(self) -> tuple[str, ...]:
        """The parts of the loss that read the teacher's inside."""
        return split_loss(self.loss)[1]

    def rate(self, step: int) -> float:
        """The share of learning_rate at optimizer step `step` (from 0)."""
        begin, end = next((b, e) for b, e in self.parts if step < e or e == self.steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - begin) / (end - begin))))

    def measured_at(self, step: int) -> bool:
        """Whether the held-out loss is measured after `step` steps: at the quarters of each of its parts."""
        return any(
            step == begin + round((end - begin) * part / CURVE_PARTS)
            for begin, end in self.parts
            for part in range(1, CURVE_PARTS + 1)
        )


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

    Written whole or not at all; an existing file is opened as it is. Returns a read-only memory map.
    """
    path = Path(path)
    if not path.exists():
        partial = path.with_suffix(".partial")
        shape = (*windows.shape, teacher.get_output_embeddings().weight.shape[1])
        states = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
        for at in range(0, len(windows), batch):
            tokens = windows[at : at + batch].to(teacher.device)
            with models.autocast(teacher.device):
                states[at : at + batch] = last_hidden(teacher, tokens).float().cpu().numpy()
            progress(tokens.numel())
        states.flush()
        os.replace(partial, path)
    return np.load(path, mmap_mode="r")


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


class _InOrder(Trainer):
    """transformers' Trainer on windows in their given order, which is random already, with Training's schedule."""

    schedule: Training

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.schedule.rate)
        return self.lr_scheduler


class _Watch(TrainerCallback):
    """Reports finished steps, measures the held-out loss, asks for checkpoints, stops where the loss is not finite."""

    def __init__(
        self,
        settings: Training,
        tokens_per_step: int,
        held_out_loss: Callable[[], float] | None,
        keep: bool,
        progress: Callable[[int], None],
    ):
        self.settings, self.tokens_per_step, self.held_out_loss = settings, tokens_per_step, held_out_loss
        self.keep, self.progress, self.saved = keep, progress, time.monotonic()

    def measure(self, state) -> None:
        if self.held_out_loss is not None:
            state.log_history.append({"step": state.global_step, "held_out_loss": self.held_out_loss()})

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        self.progress(state.global_step * self.tokens_per_step)
        if state.global_step == 0:
            self.measure(state)
            return
        # A checkpoint holds the rate that its own schedule had next; an extended training's schedule is another.
        lr_scheduler._last_lr = [base * self.settings.rate(state.global_step) for base in lr_scheduler.base_lrs]
        for group, rate in zip(optimizer.param_groups, lr_scheduler._last_lr, strict=True):
            group["lr"] = rate

    def on_step_end(self, args, state, control, **kwargs):
        self.progress(self.tokens_per_step)
        if self.settings.measured_at(state.global_step):
            self.measure(state)
        if state.global_step == state.max_steps:
            control.should_save = self.keep
        elif time.monotonic() - self.saved > CHECKPOINT_SECONDS:
            control.should_save, self.saved = True, time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            control.should_training_stop = True


@dataclass(frozen=True)
class Log:
    """What a training leaves: steps, one {"step", "loss", "learning_rate", "grad_norm"} each (loss in nats a token with
    scale "token"); curve, {"step", "tokens", "loss"} before training and at each quarter, on held-out text."""

    steps: list[dict[str, float]]
    curve: list[dict[str, float]]


@contextlib.contextmanager
def _uncompiled(layers: list[nn.Module]) -> Iterator[None]:
    """Inside, the layers run as written: other shapes and modes would each be compiled anew."""
    before = [layer._compiled_call_impl for layer in layers]
    for layer in layers:
        layer._compiled_call_impl = None
    try:
        yield
    finally:
        for layer, call in zip(layers, before, strict=True):
            layer._compiled_call_impl = call


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
) -> Log:
    """Train a quantized student (see layers.quantize_model) in place towards the teacher.

    windows [N, T] are consumed in order, from the start again where steps x batch exceeds N. teacher: its last hidden
    states [N, T, D] of them (see keep_teacher_states), or the model itself, run at every step, or None where the loss
    is on labels only. The student's parameters are fp32 masters (bf16 with settings.masters); products run in bf16
    where the hardware has it. held_out [M, T']: tokens whose loss is measured as training goes on.
    folder holds the last checkpoint: a killed training called again goes on from it and ends with the same weights, and
    so does an extended one (settings.extended_from) from what was kept. keep: leave a checkpoint of the end as well.
    A last loss that is not finite means that the training diverged and was stopped there.
    Raises ValueError for windows longer than the model's context, parameters that are not fp32, a student whose logits
    are not its last hidden states times its head, or a loss that needs of a model what it does not have.
    """
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
        student.to(torch.bfloat16)
    bf16 = models.compute_dtype() == torch.bfloat16
    # Compiled layers fuse the fake quantizers, which cost as much as the products where those run in bf16.
    worth_it = bf16 and not settings.features and settings.steps >= COMPILED_STEPS
    can_compile = worth_it and (student.device.type == "cuda" or shutil.which("g++"))
    compiled = list(student.base_model.layers) if can_compile else []
    for layer in compiled:
        layer.compile()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.learning_rate,
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
        save_strategy="no",
        save_total_limit=1,
    )

    def held_out_loss() -> float:
        student.eval()
        with torch.no_grad(), _uncompiled(compiled), models.autocast(student.device):
            losses = [
                label_loss(
                    last_hidden(student, tokens)[:, :-1].flatten(0, 1),
                    student.get_output_embeddings().weight,
                    tokens[:, 1:].flatten(),
                )
                for tokens in held_out.to(student.device).split(settings.batch)
            ]
        student.train()
        return float(torch.stack(losses).mean())

    # The loss is the student's own forward pass while it trains, so that a wrapper (FSDP, autocast) sees all of it.
    student.forward = _loss_function(student, teacher, teacher_head, settings)
    try:
        trainer = _InOrder(
            model=student,
            args=arguments,
            train_dataset=_Examples(windows, teacher if isinstance(teacher, np.ndarray) else None),
            callbacks=[
                _Watch(
                    settings,
                    settings.batch * windows.shape[1],
                    None if held_out is None else held_out_loss,
                    keep,
                    progress,
                )
            ],
        )
        trainer.schedule = settings
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if Path(folder).is_dir() else None)
    finally:
        del student.forward
        for layer in compiled:
            layer._compiled_call_impl = None
        student.float().eval()
    history = trainer.state.log_history
    return Log(
        [
            {name: entry[name] for name in ("step", "loss", "learning_rate", "grad_norm")}
            for entry in history
            if "loss" in entry
        ],
        [
            {
                "step": entry["step"],
                "tokens": entry["step"] * settings.batch * windows.shape[1],
                "loss": entry["held_out_loss"],
            }
            for entry in history
            if "held_out_loss" in entry
        ],
    )


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
    for name in names if HIDDEN in settings.features else names[:2]:
        if getattr(own, name) != getattr(given, name):
            raise ValueError(
                f"loss: {settings.loss!r} compares models layer by layer; the student's {name} is "
                f"{getattr(own, name)}, the teacher's {getattr(given, name)}"
            )


def _loss_function(
    student: PreTrainedModel, teacher: PreTrainedModel | np.ndarray | None, teacher_head: Tensor, settings: Training
) -> Callable[..., dict[str, Tensor]]:
    """The training loss as a forward pass: tokens [B, T] -> {"loss"}."""
    logits, features = split_loss(settings.loss)
    wanted = {
        "use_cache": False,
        "output_attentions": ATTENTION in features,
        "output_hidden_states": HIDDEN in features,
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
        return {"loss": loss * tokens.shape[1] if settings.scale == "batchmean" else loss}

    return forward
