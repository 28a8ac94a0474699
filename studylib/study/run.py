"""Arm -> Record: one arm is checked, carried out and scored; what it shares with others is made once."""

import contextlib
import dataclasses
import functools
import gc
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import set_seed
from filelock import Timeout
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studylib.config import (
    NOTHING,
    NUMERICS,
    OFF,
    UNREPORTED,
    Arm,
    Log,
    RealText,
    Report,
    Sampling,
    kept_if_possible,
    make_folder,
    remove,
    usable,
    wanted_trackers,
    write_whole,
)
from studylib.data import TODAY, beginning, corpora, models, writes_date
from studylib.evaluate import FullPrecision, decoding_seconds, evaluation_windows, score, weight_scores
from studylib.methods import Method, Work, find, title
from studylib.quant import (
    cache_bytes_per_token,
    keep_model,
    quantize_model,
    restore_model,
    rotate_model,
    stored_bytes,
)
from studylib.study import launch
from studylib.study.check import check
from studylib.study.executions import engine_seconds
from studylib.study.machine import environment, memory_bytes, peak_memory
from studylib.study.needs import rows_at_once
from studylib.study.pace import Clock, Pace
from studylib.study.records import DIVERGED, FINISHED, Record, Store, arm_key, contents, digest, numerics
from studylib.train import TrainingData, check_head, prepare

PROVENANCE = "provenance.json"  # for people; that it is there says that a text is made
Progress = Callable[[str, int], None]  # is told of finished work: the phase, and tokens


def carry_out(
    arm: Arm, store: Store, keep_checkpoints: bool = False, progress: Progress = lambda phase, tokens: None
) -> Record:
    """Compute the record of one arm. progress is told of finished work.

    The deployed model of a trained arm is kept in the store, packed, beside its record.
    """
    set_seed(arm.seed)
    method, key = find(arm.method), arm_key(arm)
    seconds: dict[str, float] = {}
    tokens: dict[str, int] = {}
    scores: dict[str, Any] = {}

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - begun, 2)

    processes = None
    if launch.wanted(arm):
        with phase("train"):
            processes = _launch(arm, store, progress)
    with peak_memory() as peak:
        with phase("load"):
            work = _work_on(arm, store, keep_checkpoints, progress, phase)
        identity, vocabulary = models.identity(arm.model), work.model.config.get_text_config().vocab_size
        cache_bytes = cache_bytes_per_token(work.model, arm.bits, arm.scheme)
        full = None
        if arm.tuning is None and arm.evaluation.corpora:  # else it is not to stay what it was
            with phase("full precision"):
                full = _full_precision(work, store, key)
        log = _deploy(method, work, store, key, progress)
        if method.checks_weights:
            scores |= weight_scores(work.load(), work.model)
        if arm.decoding and arm.format:
            with phase("decode"):
                scores |= decoding_seconds(arm.model, arm.format, arm.decoding)
        if arm.engines and arm.format:
            with phase("decode"):
                scores |= engine_seconds(arm.model, arm.format, arm.engines)
        if work.data:
            tokens["data"] = work.data.windows.numel()
        if arm.training and arm.data:
            tokens["trained"] = arm.training.last * arm.training.batch * arm.data.length
        if arm.tuning:
            tokens["trained"] = int(log.curve[-1]["tokens"])
        diverged = not _converged(log)
        moved = {} if log.moved is None else {"moved/scales": log.moved}
        size = None if diverged else stored_bytes(work.model)
        sizes: dict[str, float | None] = {"bytes/weights": size, "bytes/cache_per_token": cache_bytes}
        with phase("evaluate"), _counted(work.model, progress) as seen:
            metrics, found = ({}, {}) if diverged else score(work.model, work.tokenizer, arm.evaluation, full)
        tokens["evaluated"] = seen["tokens"]
    finite = all(map(math.isfinite, metrics.values())) and not diverged
    _check_unchanged(arm, key)
    record = Record(
        key=key,
        arm=arm,
        status=FINISHED if finite else DIVERGED,
        metrics=_json_entries({**metrics, **sizes, **moved}),
        scores={name: _json_numbers(np.array(values)) for name, values in (found | scores).items()},
        training=[_json_entries(entry) for entry in log.steps],
        curve=[_json_entries(entry) for entry in log.curve],
        data={"statistics": work.data.statistics, "samples": work.data.samples} if work.data else {},
        cost={"seconds": seconds, "tokens": tokens, "peak_bytes": peak["bytes"]},
        provenance=environment()
        | {
            "numerics": numerics(arm),
            "contents": contents(arm),
            "model": identity | {"vocabulary": vocabulary},
            "rows_at_once": work.rows,
            "processes": processes,
            "text": _text_description(work.tokenizer),
            "corpora": {name: corpora.sha256(name) for name in arm.evaluation.corpora},
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )
    if arm.budget and arm.budget.stop is None and finite:
        _keep(work, store.model_file(key))
    del work
    gc.collect()
    return record


def keep(record: Record, store: Store, keep_checkpoints: bool = False) -> None:
    """Save the record; where there is no room, in the place of its model, which can be made again. The checkpoints that
    it came from are removed unless they are to be kept."""
    try:
        store.save(record)
    except OSError:
        model = store.model_file(record.key)
        if not model.exists():
            raise
        remove(model)
        store.save(record)
    if not keep_checkpoints:
        shutil.rmtree(store.checkpoint_folder(record.key), ignore_errors=True)


def _check_unchanged(arm: Arm, key: str) -> None:
    """ValueError where a file that the arm names is another than when its key was made."""
    if arm_key(arm) != key:
        names = ", ".join(contents(arm))
        raise ValueError(f"files were changed while {title(arm)} was computed from them ({names}); run it again")


def _text_description(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What comes into the model's texts beside what they say: the text that each begins with, and the date."""
    first, found = beginning(tokenizer), {}
    if first:
        found["beginning"] = tokenizer.decode(first)
    if writes_date(tokenizer):
        found["date"] = TODAY.strftime("%Y-%m-%d")
    return found


def _work_on(
    arm: Arm,
    store: Store,
    keep: bool,
    progress: Progress,
    phase: Callable[[str], contextlib.AbstractContextManager[None]],
) -> Work:
    load = functools.partial(_loaded, arm)
    model, tokenizer = load(), models.load_tokenizer(arm.model)
    if arm.budget:
        check_head(model)

    return Work(
        arm=arm,
        model=model,
        tokenizer=tokenizer,
        load=load,
        checkpoints=_checkpoints(arm, store) if arm.budget else Path(),
        trained=trained_adapter(arm, store),
        rounded=functools.partial(_rounded, arm, store),
        rows=rows_at_once(arm, memory_bytes()),
        keep=keep,
        report=_report(arm, store) if arm.budget else UNREPORTED,
        progress=functools.partial(progress, "train"),
        phase=phase,
    )


def _report(arm: Arm, store: Store) -> Report:
    return Report(wanted_trackers(), store.trackers, f"{title(arm)}, seed {arm.seed}, {arm_key(arm)[:8]}")


def _loaded(arm: Arm) -> PreTrainedModel:
    """The model that the method begins with."""
    model = models.load_model(arm.model)
    return rotate_model(model) if arm.scheme.rotated else model


def _deploy(method: Method, work: Work, store: Store, key: str, progress: Progress) -> Log:
    """Make of the loaded model what the arm is scored on. The log is empty where nothing was trained."""
    if work.arm.data:
        with work.phase("data"):
            work.data = _prepare_data(work, store, key, progress)
    with _alone(work.arm, store):
        return method.apply(work) or Log([], [])


def _launch(arm: Arm, store: Store, progress: Progress) -> int | None:
    """Have the arm trained by launched processes, which leave a checkpoint of the end; None where it is trained."""
    _checkpoints(arm, store)
    with _alone(arm, store):
        return None if arm.tuning and usable(trained_adapter(arm, store)) else launch.train(arm, store, progress)


def train_only(arm: Arm, store: Store, progress: Progress) -> None:
    """Be one of the launched processes: train to the end, which is kept, and raise train.Launched."""
    set_seed(arm.seed)
    work = _work_on(arm, store, True, progress, lambda name: contextlib.nullcontext())
    if arm.data:
        work.data = _prepare_data(work, store, arm_key(arm), progress)
    find(arm.method).apply(work)


def _alone(arm: Arm, store: Store) -> contextlib.AbstractContextManager[Any]:
    """Inside, no other process makes the adapter that the arm shares with others."""
    return store.lock(f"adapter-{trained_adapter(arm, store).stem}") if arm.tuning else contextlib.nullcontext()


def deployed(arm: Arm, store: Store, dense: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that the arm is scored on, and its tokenizer: as it is kept, or made again.

    Text, trained adapters and checkpoints that are still in the store are used; what it has not yet is computed, and of
    that all but checkpoints stays. dense: as of restore_model, where it is kept; False for codes that are only written.
    Raises what `schedule.run` raises.
    """
    check(arm)
    key = arm_key(arm)
    kept_model, checkpoints = store.model_file(key), store.checkpoint_folder(key)
    with store.lock(key):
        if usable(kept_model):
            return _restored(arm, kept_model, dense), models.load_tokenizer(arm.model)
        kept = arm.budget is not None and (checkpoints / f"checkpoint-{arm.budget.last}").exists()
        set_seed(arm.seed)
        with Clock(Pace(), hidden=not (arm.budget or arm.data)) as clock:
            clock.begin(dataclasses.replace(arm, evaluation=NOTHING))
            if launch.wanted(arm):
                _launch(arm, store, clock.progress)
            work = _work_on(arm, store, kept, clock.progress, lambda name: contextlib.nullcontext())
            log = _deploy(find(arm.method), work, store, key, clock.progress)
        if arm.budget and _converged(log):
            _keep(work, kept_model)
        if not kept:
            shutil.rmtree(checkpoints, ignore_errors=True)
    return work.model, work.tokenizer


def _restored(arm: Arm, path: Path, dense: bool) -> PreTrainedModel:
    """The deployed model from its file: weights, and the rounding of activations and cache on the fly. dense: False
    leaves out what codes say, and takes the rest as the model's files have it."""
    model = _loaded(arm) if dense else models.mapped_model(arm.model)
    if (arm.widths.activations, arm.widths.cache) != (OFF, OFF):
        quantize_model(model, f"{OFF}-{arm.widths.activations}-{arm.widths.cache}", arm.scheme)
    return restore_model(model, path, dense)


def _converged(log: Log) -> bool:
    return not log.steps or math.isfinite(log.steps[-1]["loss"])


def _keep(work: Work, path: Path) -> None:
    """Keep the deployed model; where there is no room, say so and go on: the record is worth more."""
    with kept_if_possible(f"the model of {title(work.arm)}"):
        keep_model(work.model, work.load(), path)


def trained_adapter(arm: Arm, store: Store) -> Path:
    """The file of what a fine-tuned arm trained, where it can be deployed in several ways."""
    return store.adapter_file(arm_key(find(arm.method).as_trained(arm))) if arm.tuning else Path()


def _json_entries(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers by name, also several or some by name, with None for those that are not finite."""
    return {name: _json_value(value) for name, value in numbers.items()}


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _json_entries(value)
    if isinstance(value, list):
        return [_json_value(own) for own in value]
    return value if value is not None and math.isfinite(value) else None


def _json_numbers(values: np.ndarray) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]


@contextlib.contextmanager
def _rounded(arm: Arm, store: Store) -> Iterator[Path]:
    """The file of what GPTQ makes of the arm's weights, beside the text that it calibrates on, held alone inside."""
    folder = data_folder(arm, store)
    made_of = {
        "rotated": arm.scheme.rotated,
        "bits": arm.widths.weights,
        "format": arm.format and dataclasses.asdict(arm.format),
        "numerics": {name: NUMERICS[name].number for name in ("ptq", *["rotation"] * arm.scheme.rotated)},
    }
    name = f"gptq-{digest(json.dumps(made_of, sort_keys=True))}"
    with store.lock(f"{data_lock(folder)}-{name}"):
        yield folder / f"{name}.safetensors"


def _data_description(arm: Arm) -> dict[str, Any]:
    """What an arm's text depends on, beside the contents that its key has: all arms that agree in it share the text."""
    assert arm.data is not None
    used = ("models", "corpora", "generation") if isinstance(arm.data, Sampling) else ("models", "corpora")
    names = (arm.model, arm.data.corpus) if isinstance(arm.data, RealText) else (arm.model,)
    return {
        "model": models.identity(arm.model),
        "contents": {name: found for name, found in contents(arm).items() if name in names},
        "data": dataclasses.asdict(arm.data),
        "numerics": {name: NUMERICS[name].number for name in used},
    }


def data_folder(arm: Arm, store: Store) -> Path:
    """Where the arm's text is kept."""
    return store.data_folder(digest(json.dumps(_data_description(arm), sort_keys=True)))


def is_made(folder: Path) -> bool:
    """Whether the text in this folder is there, with all that goes with it."""
    return (folder / PROVENANCE).exists()


def data_lock(folder: Path) -> str:
    """The name of the lock that is held while the text in this folder is made."""
    return f"data-{folder.name}"


def _prepare_data(work: Work, store: Store, key: str, progress: Progress) -> TrainingData:
    """The arm's windows, made once for all arms that share them."""
    arm = work.arm
    assert arm.data is not None
    folder = data_folder(arm, store)
    _check_unchanged(arm, key)  # what is kept there must be of the model that was loaded
    states = folder / f"teacher_states-{NUMERICS['distillation'].number}.npy"
    teacher = functools.partial(models.load_model, arm.model, models.compute_dtype())
    with store.lock(data_lock(folder)):
        told = functools.partial(progress, "data")
        data = prepare(work.model, work.tokenizer, arm.data, arm.training, folder, states, teacher, told)
        description = folder / PROVENANCE
        with kept_if_possible(str(description)):
            write_whole(description, json.dumps(_data_description(arm) | environment(), indent=1))
    return data


def _full_precision(work: Work, store: Store, key: str) -> FullPrecision | None:
    """What the loaded model predicts for the windows that the arm is scored on, made once for all arms of the model;
    None where there is no room for it."""
    windows, files = evaluation_windows(work.tokenizer, work.arm.evaluation), {}
    _check_unchanged(work.arm, key)
    with contextlib.ExitStack() as alone, kept_if_possible("what full precision predicts"):
        for corpus in sorted(windows):  # in one order, so that no two processes wait for each other
            folder = store.data_folder(digest(json.dumps(_windows_description(work.arm, corpus), sort_keys=True)))
            alone.enter_context(store.lock(data_lock(folder)))
            make_folder(folder)
            files[corpus] = folder / "full_precision_states.npy"
        model = work.model
        if work.arm.scheme.rotated and not all(map(usable, files.values())):
            model = models.load_model(work.arm.model)  # the states are for arms that are not rotated as well
        return FullPrecision(model, windows, files)
    return None


def _windows_description(arm: Arm, corpus: str) -> dict[str, Any]:
    """What the full-precision model's states depend on, in the windows of a corpus that arms are scored on."""
    return {
        "model": models.identity(arm.model),
        "contents": {name: found for name, found in contents(arm).items() if name in (arm.model, corpus)},
        "windows": [corpus, arm.evaluation.windows, arm.evaluation.length],
        "type": str(models.compute_dtype()),
        "numerics": {name: NUMERICS[name].number for name in ("models", "corpora")},
    }


def _checkpoints(arm: Arm, store: Store) -> Path:
    """The folder of the arm's last checkpoint; an extended arm's begins with what the arm it extends has kept."""
    folder, budget = store.checkpoint_folder(arm_key(arm)), arm.budget
    assert budget is not None
    if budget.extended_from and not any(folder.glob("checkpoint-*")):
        *before, last = budget.extended_from
        shorter: dict[str, Any] = {
            name: own and dataclasses.replace(own, steps=last, extended_from=tuple(before))
            for name, own in (("training", arm.training), ("tuning", arm.tuning))
        }
        key = arm_key(dataclasses.replace(arm, **shorter))
        kept = store.checkpoint_folder(key) / f"checkpoint-{last}"
        # What another process is writing just now is not waited for: to begin anew comes to the same end.
        with contextlib.suppress(Timeout), store.lock(key).acquire(blocking=False):
            if usable(kept):
                from studylib.train import take_over  # Trainer's imports take seconds

                with kept_if_possible(f"what {folder} begins with"):
                    take_over(kept, folder)
    return folder


@contextlib.contextmanager
def _counted(model: nn.Module, progress: Progress) -> Iterator[dict[str, int]]:
    """Count the tokens of every forward pass inside."""
    seen = {"tokens": 0}

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        seen["tokens"] += ids.numel()
        progress("evaluate", ids.numel())

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
