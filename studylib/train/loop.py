"""The training loop of every method: transformers' Trainer on examples in a given order, resumable at any point.

Trainer imports peft and bitsandbytes, which takes seconds: import this module where a training begins.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, save_fsdp_optimizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from studylib.config import (
    SUMS,
    UNREPORTED,
    Budget,
    Log,
    Report,
    kept_if_possible,
    make_folder,
    remove,
    seal_folder,
    tell,
    usable,
    written_whole,
)
from studylib.data import models
from studylib.quant import trained_grids

CHECKPOINT_SECONDS = 120  # a killed training loses at most about this much
COMPILED_STEPS = 20  # from so many steps on, compiling the layers pays for itself
PROJECT = "studylib"  # what trackers of several programs keep its runs under
OWNER = "owner.txt"  # in a checkpoint: the names of the training's folder and of the checkpoint that it was made as


HeldOut = dict[str, Any]  # "loss"; of a fine-tuning also "pairs" (see config.Log)


class Launched(Exception):
    """A training in several processes is at its end, which its last checkpoint holds for the one that goes on alone."""


class _InOrder(Trainer):
    """transformers' Trainer on examples in their given order, which is random already, with Budget's schedule."""

    budget: Budget
    run_dir: Path
    first_scales: list[Tensor]  # of each learned grid, before its training began
    rows: int | None  # of a batch, that are computed at a time
    weight: Callable[[dict[str, Tensor]], float]  # of rows of a batch, in its mean loss
    share = 1.0  # of the batch's loss, that the rows have which are computed just now

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args, **kwargs) -> Tensor:
        """Trainer's own, for some rows at a time where all are too many: their gradients add up to those of the batch.

        Trainer's accumulation takes batches for equally heavy: findings/trainer-accumulates-a-mean-as-a-sum.sh
        So do several processes, which have some rows each and average their gradients.
        """
        count = len(next(iter(inputs.values())))
        rows = self.rows or count
        if count <= rows and self.args.world_size == 1:
            return super().training_step(model, inputs, *args, **kwargs)
        parts = [{name: x[at : at + rows] for name, x in inputs.items()} for at in range(0, count, rows)]
        weights = [self.weight(part) for part in parts]
        whole = torch.tensor(float(sum(weights)), device=self.args.device)
        mean = self.accelerator.reduce(whole, "mean").item()  # over processes; of one its own
        loss: Any = 0.0
        try:
            for part, weight in zip(parts, weights, strict=True):
                self.share = weight / mean
                loss = loss + super().training_step(model, part, *args, **kwargs)
        finally:
            self.share = 1.0
        return loss

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * self.share

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Trainer's own, with learned grids in groups that have a rate of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.budget.grid_rate
        if rate is None:
            return optimizer
        grids = trained_grids(self.model)
        apart = {id(parameter) for own in grids for parameter in own}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in apart]
        for own, first in zip(grids, self.first_scales, strict=True):
            unit = first.square().mean().sqrt().item()
            optimizer.add_param_group({"params": own, "lr": rate * unit, "weight_decay": 0.0})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.budget.rate)
        return self.lr_scheduler

    def _run_epoch(self, *args, **kwargs) -> None:
        # Resumed at its end, Trainer takes one more step: findings/trainer-resumed-at-its-end-steps-again.sh
        measured = [entry["held_out_loss"] for entry in self.state.log_history if "held_out_loss" in entry]
        given_up = bool(measured) and self.budget.given_up(self.state.global_step, measured[-1])
        if self.state.global_step < self.budget.last and not given_up:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial=None) -> str:
        return str(self.run_dir)

    def _save_checkpoint(self, model: nn.Module, trial=None) -> None:
        """Trainer's own, whole and sealed, after which older ones are removed; a training goes on where it fails."""
        checkpoint = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self.state.train_batch_size = self.budget.batch  # of all processes
        if not self.is_world_process_zero():
            self._save_with_others(model, None)
            return
        alone = self.args.world_size == 1  # else the others would wait for what fails here
        with (
            kept_if_possible(str(checkpoint)) if alone else contextlib.nullcontext(),
            written_whole(checkpoint) as partial,
        ):
            self._save_with_others(model, partial.parent)
            _sign(partial, checkpoint)
        for other in _checkpoints(checkpoint.parent) if checkpoint.exists() else ():
            if other != checkpoint:
                with contextlib.suppress(OSError):
                    remove(other)

    def _save_with_others(self, model: nn.Module, folder: Path | None) -> None:
        """Trainer's own, of all processes into the folder of the first one."""
        told: list[Any] = [folder]
        self.run_dir = broadcast_object_list(told)[0]
        try:
            super()._save_checkpoint(model, None)
        except RuntimeError as error:  # so torch.save tells of a full disk
            raise OSError("torch could not write it; is the disk full?") from error
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.state.global_step < self.budget.last:  # at its end it has no use for them
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Trainer's own; of a sharded model it would write all weights as well."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        own = {name: _whole(parameter.detach()) for name, parameter in _trained(self.model).items()}
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(own, Path(output_dir, SAFE_WEIGHTS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        own = _trained(self.model)
        for name, saved in load_file(Path(resume_from_checkpoint, SAFE_WEIGHTS_NAME)).items():
            there = own[name].detach()
            if isinstance(there, DTensor):
                saved = distribute_tensor(saved.to(there.device), there.device_mesh, there.placements)
            there.copy_(saved)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, by name; the rest is made anew from the arm."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _whole(tensor: Tensor) -> Tensor:
    """Put together where it is sharded, which all processes take part in."""
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor  # a copy waits until it is there


_BEGUN: dict[str, HeldOut] = {}  # held-out losses of models before their training, which many arms begin alike


def _beginning(model: PreTrainedModel, text: bytes) -> str:
    """A digest of all that the held-out loss on this text depends on.

    An A that a B of zeros multiplies is no part of it: seeds begin alike.
    """
    digest = hashlib.sha256(f"{model} {model.config._attn_implementation} {models.compute_dtype()}".encode())
    digest.update(text)
    state, seen = model.state_dict(), set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.data_ptr() in seen:
            continue
        after = state.get(name.replace("lora_A", "lora_B")) if "lora_A" in name else None
        if after is None or after.any():
            seen.add(tensor.data_ptr())
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class _Watch(TrainerCallback):
    """Reports finished steps, measures the held-out loss, asks for checkpoints, stops where the loss is not finite."""

    def __init__(
        self,
        budget: Budget,
        tokens_per_step: int,
        held_out_loss: Callable[[], HeldOut] | None,
        beginning: str,
        keep: bool,
        progress: Callable[[int], None],
    ):
        self.beginning = beginning
        self.tell: Callable[[dict[str, float]], object] = lambda logs: None  # trackers
        self.budget, self.tokens_per_step, self.held_out_loss = budget, tokens_per_step, held_out_loss
        self.keep, self.progress, self.saved = keep, progress, time.monotonic()

    def measure(self, state) -> float:
        if self.held_out_loss is None:
            return math.nan
        known = self.beginning if state.global_step == 0 else ""
        found = _BEGUN.get(known)
        if found is None:
            found = self.held_out_loss()
            if known:
                _BEGUN[known] = found
        loss, others = found["loss"], {name: value for name, value in found.items() if name != "loss"}
        state.log_history.append({"step": state.global_step, "held_out_loss": loss} | others)
        self.tell({"eval_loss": loss})
        return loss

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        self.progress(state.global_step * self.tokens_per_step)
        if state.global_step == 0:
            self.measure(state)
            return
        # A checkpoint holds the rate that its own schedule had next; an extended training's schedule is another.
        lr_scheduler._last_lr = [base * self.budget.rate(state.global_step) for base in lr_scheduler.base_lrs]
        for group, rate in zip(optimizer.param_groups, lr_scheduler._last_lr, strict=True):
            group["lr"] = rate

    def on_step_end(self, args, state, control, **kwargs):
        self.progress(self.tokens_per_step)
        given_up = False
        if self.budget.measured_at(state.global_step):
            given_up = self.budget.given_up(state.global_step, self.measure(state))
        if given_up or state.global_step == self.budget.last:
            control.should_save, control.should_training_stop = self.keep, True
        elif time.monotonic() - self.saved > CHECKPOINT_SECONDS:
            control.should_save = True
        if args.world_size > 1:  # clocks differ
            told: list[Any] = [control.should_save, control.should_training_stop]
            control.should_save, control.should_training_stop = broadcast_object_list(told)
        if control.should_save:
            self.saved = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            control.should_training_stop = True
            control.should_save |= self.keep


def _trackers(report: Report) -> list[TrainerCallback]:
    """transformers' callbacks for the trackers, which keep what they are told in the report's folder. Where the
    environment has another place for MLflow or W&B, that is taken."""
    if not report.trackers:
        return []
    make_folder(report.folder)
    for name, usual in {
        "MLFLOW_TRACKING_URI": f"sqlite:///{report.folder.absolute()}/mlflow.db",
        "MLFLOW_EXPERIMENT_NAME": PROJECT,
        "WANDB_DIR": str(report.folder.absolute()),
        "WANDB_PROJECT": PROJECT,
    }.items():
        os.environ.setdefault(name, usual)
    found = [kind() for kind in get_reporting_integration_callbacks(list(report.trackers))]
    for callback in found:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(report.folder / "tensorboard" / report.run.replace(os.sep, "-"))
    return found


@contextlib.contextmanager
def compiled_layers(layers: list[nn.Module]) -> Iterator[None]:
    """Inside, the layers are compiled, each with the hooks that it has.

    PyTorch takes what it compiled of one layer for another one of its kind, and by default does not look at hooks: a
    rotated model would be trained without its rotations where the process has trained one without them before.
    """
    if not layers:
        yield
        return
    import torch._dynamo

    for layer in layers:
        layer.compile()
    try:
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


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


def fit(
    model: PreTrainedModel,
    loss_function: Callable[..., dict[str, Tensor]],
    examples: Dataset,
    budget: Budget,
    folder: str | Path,
    *,
    tokens_per_step: int,
    held_out_loss: Callable[[], HeldOut] | None = None,
    held_out_text: bytes = b"",
    collate: Callable[[list], dict[str, Tensor]] | None = None,
    compiled: bool = False,
    optimizer: str = "adamw_torch_fused",
    rows: int | None = None,
    weight: Callable[[dict[str, Tensor]], float] = lambda part: len(next(iter(part.values()))),
    seed: int = 0,
    keep: bool = False,
    progress: Callable[[int], None] = lambda tokens: None,
    report: Report = UNREPORTED,
) -> Log:
    """Train the parameters of `model` that require gradients, in place, on `examples` in their order, again and again.

    loss_function: what stands in for the model's forward pass while it trains, so that a wrapper (FSDP, autocast) sees
    all of it: fields of a batch -> {"loss"}. Products run in bf16 where the hardware has it. held_out_loss: the loss of
    the model as it is, as "loss", asked for now and then, and "pairs" where the curve is to have them; held_out_text:
    on what, in bytes, for a model that begins as another one did in this process is not measured again. compiled:
    compile the decoder's layers, where a compiler is found and the steps are many enough. optimizer: a name that
    TrainingArguments takes. rows: of a batch, computed at a time, where the whole takes too much memory; None for all.
    weight: what rows of a batch count in its mean loss; by default each as much as another.
    report: trackers that are told of each step's loss and rate, and of the held-out loss as eval/loss.
    folder holds the last checkpoint: a killed training called again goes on from it and ends with the same weights, and
    so does an extended one (budget.extended_from) from what was kept. keep: leave a checkpoint of the end as well.
    A last loss that is not finite means that the training diverged and was stopped there.
    In several processes (accelerate, torchrun) each takes its share of a batch, and the training ends with Launched.
    """
    bf16 = models.compute_dtype() == torch.bfloat16
    # Compiled layers fuse the fake quantizers, which cost as much as the products where those run in bf16.
    worth_it = compiled and bf16 and budget.steps >= COMPILED_STEPS
    compilers = ("gcc", "clang") if model.device.type == "cuda" else ("g++",)  # triton builds its launchers in C
    can_compile = worth_it and any(map(shutil.which, compilers))
    layers = list(getattr(model.base_model, "layers", [])) if can_compile else []
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=budget.steps,
        learning_rate=budget.learning_rate,
        weight_decay=budget.weight_decay,
        max_grad_norm=budget.max_grad_norm,
        optim=optimizer,
        bf16=bf16 and not _sharded(),  # accelerate would round what is sharded to bf16, before it is quantized
        use_cpu=model.device.type == "cpu",
        seed=seed,
        data_seed=seed,
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",  # Trainer would choose where trackers write
        run_name=report.run or None,
        save_strategy="no",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # with several, Trainer would wrap the model in DataParallel
    arguments.per_device_train_batch_size = budget.batch // arguments.world_size

    def measured() -> HeldOut:
        model.eval()
        if isinstance(model, FSDPModule):
            register_fsdp_forward_method(model, "held_out_loss")  # so that it sees whole parameters
        with torch.no_grad(), _uncompiled(layers), models.autocast(model.device):
            found = model.held_out_loss()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what no backward pass follows stays whole, and is no parameter of the optimizer
        model.train()
        return found

    resumed = last_checkpoint(folder, budget)
    beginning = _beginning(model, held_out_text) if held_out_text and resumed is None else ""
    grids = [scale for scale, *_ in trained_grids(model)]
    first = [scale.detach().clone() for scale in grids]
    model.forward = models.autocast(model.device)(loss_function) if _sharded() else loss_function
    model.held_out_loss = held_out_loss
    try:
        watch = _Watch(budget, tokens_per_step, held_out_loss and measured, beginning, keep, progress)
        trainer = _InOrder(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=collate,
            callbacks=[*_trackers(report), watch],  # in this order: the watch tells them what it measures first
        )
        if report.trackers:
            # A control of its own: told through the trainer's, this step's own loss would not be logged any more.
            watch.tell = lambda logs: trainer.callback_handler.on_log(
                trainer.args, trainer.state, TrainerControl(), logs
            )
        trainer.budget, trainer.run_dir, trainer.first_scales = budget, Path(folder), first
        trainer.rows, trainer.weight = rows, weight
        trainer.remove_callback(PrinterCallback)
        make_folder(Path(folder))
        with compiled_layers(layers):
            trainer.train(resume_from_checkpoint=resumed)
    finally:
        del model.forward, model.held_out_loss
        if "wandb" in report.trackers:
            import wandb

            wandb.finish()  # the next training would be told of in this one's run
        model.eval()
    if arguments.world_size > 1:
        raise Launched
    history = trainer.state.log_history
    return Log(
        [
            {name: entry[name] for name in ("step", "loss", "learning_rate", "grad_norm")}
            for entry in history
            if "loss" in entry
        ],
        [
            {"step": entry["step"], "tokens": entry["step"] * tokens_per_step, "loss": entry["held_out_loss"]}
            | ({"pairs": entry["pairs"]} if "pairs" in entry else {})
            for entry in history
            if "held_out_loss" in entry
        ],
        _moved(grids, first),
    )


@torch.no_grad()
def _moved(scales: list[Tensor], first: list[Tensor]) -> float | None:
    """The median share by which scales are others than at first; None where there are none."""
    if not scales:
        return None
    return torch.cat([(own / was - 1).abs().flatten() for own, was in zip(scales, first, strict=True)]).median().item()


def _sign(files: Path, checkpoint: Path) -> None:
    """Have the files that will be `checkpoint` say so, and seal them."""
    (files / OWNER).write_text(f"{checkpoint.parent.name}/{checkpoint.name}\n")
    seal_folder(files)


def take_over(kept: Path, folder: Path) -> None:
    """Begin a training in `folder` with a checkpoint that another one has kept; its files are shared, if possible."""

    def linked(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # a file system without links, or somebody else's file
            shutil.copyfile(source, target)

    make_folder(folder)
    with written_whole(folder / kept.name) as partial:
        shutil.copytree(kept, partial, copy_function=linked, ignore=shutil.ignore_patterns(OWNER, SUMS))
        _sign(partial, folder / kept.name)


def last_checkpoint(folder: str | Path, budget: Budget) -> str | None:
    """The newest checkpoint in `folder` that is whole and of this training, None where there is none.

    What comes before it and is neither is removed, and a line says so.
    """
    for checkpoint in reversed(_checkpoints(Path(folder))):
        if usable(checkpoint):
            if _is_of(checkpoint, budget):
                return str(checkpoint)
            tell(f"{checkpoint} is of another training; it is made again")
            remove(checkpoint)
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints by their step: what time they are of says nothing."""
    steps = {path: path.name.rpartition("-")[2] for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def _sharded() -> bool:
    """Whether accelerate's launcher has asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def _is_of(checkpoint: Path, budget: Budget) -> bool:
    """Whether a whole checkpoint was made for this folder, and of a training in these batches to this end."""
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    owner = (checkpoint / OWNER).read_text() if (checkpoint / OWNER).exists() else ""
    return (
        owner == f"{checkpoint.parent.name}/{checkpoint.name}\n"
        and state["global_step"] <= budget.last
        and state["max_steps"] in (budget.steps, *budget.extended_from)
        and state["train_batch_size"] == budget.batch
        # What shards of a model have written of their optimizer is for shards; the end of a training needs none.
        and ((checkpoint / OPTIMIZER_NAME).exists() or _sharded() or state["global_step"] == budget.last)
    )
