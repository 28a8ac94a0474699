"""Arm -> Record: what is cached is loaded, what is missing is computed, nothing finished is lost."""

import contextlib
import contextvars
import dataclasses
import functools
import gc
import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from filelock import Timeout
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studylib import corpora, methods, models
from studylib.adapters import adapted_layers, check_paging
from studylib.arms import AWQ, CALIBRATED, ENCODED, EXECUTED, NOTHING, RTN, SMOOTHQUANT, SMOOTHQUANT_QAT, Arm
from studylib.distill import check_head
from studylib.evaluation import TASKS, Evaluation, score
from studylib.execution import check_executable, decoding_seconds, executed_bytes, int4_model
from studylib.finetuning import encode
from studylib.formats import decode_model, encode_model, stored_bytes
from studylib.layers import decoder_linears, quantize_model
from studylib.memory import cache_bytes_per_token, keep_freed_memory, peak_memory, weight_bytes
from studylib.merging import inference_bytes
from studylib.ptq import check_smoothable
from studylib.records import (
    DATA_CODE,
    DIVERGED,
    FINISHED,
    Record,
    Store,
    arm_code,
    arm_key,
    code_hash,
    code_versions,
    digest,
    environment,
)
from studylib.sampling import CHAT, chat_opening, check_length
from studylib.sources import fetch
from studylib.training import Log
from studylib.training_data import RealText, TrainingData, prepare
from studylib.tuned import training_pairs, tune
from studylib.weight_statistics import weight_scores

TRAINING_WORK = 4  # a trained token costs about four forward passes: forward, twice that backward, loss and optimizer
GENERATION_WORK = 2  # a generated one two, with the teacher's pass over the finished text; calibrating takes as much
ITEM_WORK = 100  # forward tokens that one benchmark item takes on average

Progress = Callable[[int], None]
_identity = functools.cache(models.identity)
_planning = contextvars.ContextVar("planning", default=False)


class Planned(BaseException):
    """What `run` raises inside `planning`; not an error, so that no `except Exception` keeps it."""

    def __init__(self, arms: Sequence[Arm]):
        super().__init__(f"{len(arms)} arms")
        self.arms = list(arms)


@contextlib.contextmanager
def planning() -> Iterator[None]:
    """Inside, `run` checks its arms and raises Planned with them in place of computing them."""
    token = _planning.set(True)
    try:
        yield
    finally:
        _planning.reset(token)


def check(arm: Arm) -> None:
    """Everything that can be wrong with an arm beyond its fields, found before any long work starts: ValueError."""
    config = models.load_config(arm.model)  # which may write the weights first, so not under the meta device
    with torch.device("meta"):
        skeleton = models.skeleton(config)
    if arm.adapter:
        adapted_layers(skeleton, arm.adapter.layers)
    if arm.instructions:
        _check_instructions(arm.model, arm.instructions.source, arm.instructions.length)
    if arm.format:
        for linear in decoder_linears(skeleton).values():
            arm.format.check_width(linear.in_features)
    if arm.method == EXECUTED:
        check_executable(skeleton, arm.format)
    if arm.tuning and arm.tuning.paged:
        check_paging()
    grid = "symmetric" if arm.scheme.grid == "lsq" else arm.scheme.grid  # the same shapes, without a pass over data
    quantize_model(skeleton, arm.bits, dataclasses.replace(arm.scheme, grid=grid))
    for length in (arm.evaluation.length, *([arm.data.length] if arm.data else [])):
        check_length(skeleton, length)
    if arm.method in (SMOOTHQUANT, AWQ, SMOOTHQUANT_QAT):
        check_smoothable(skeleton)
    if isinstance(arm.data, RealText):
        corpora.windows(arm.data.corpus, models.load_tokenizer(arm.model), arm.data.length, 1, "training")
    elif arm.data and arm.data.strategy == CHAT:
        chat_opening(models.load_tokenizer(arm.model))
    _check_evaluation(arm.model, arm.evaluation)


@functools.lru_cache(maxsize=8)
def _check_instructions(model: str, source: str, length: int) -> None:
    encode(models.load_tokenizer(model), training_pairs(source)[0], length)


@functools.lru_cache(maxsize=8)
def _check_evaluation(model: str, wanted: Evaluation) -> None:
    tokenizer, rows = models.load_tokenizer(model), models.load_config(model).get_text_config().vocab_size
    for corpus in wanted.corpora:
        most = corpora.windows(corpus, tokenizer, wanted.length, wanted.windows, "evaluation").max()
        if most >= rows:
            raise ValueError(f"model: the tokenizer of {model!r} makes token {most}, but its embedding has {rows} rows")
    pairs = len(corpora.instruction_pairs("evaluation")) if wanted.pairs else 0
    if wanted.pairs > pairs:
        raise ValueError(f"pairs: {wanted.pairs} are more than the {pairs} that are held out")
    if wanted.tasks and wanted.source == "archive":
        fetch("benchmarks")


def check_jobs(jobs: int) -> None:
    """ValueError for a number of arms computed at a time that is not 1 or more."""
    if jobs < 1:
        raise ValueError(f"jobs: {jobs} is not allowed; use 1 or more")


def run(arms: Sequence[Arm], results: str | Path, keep_checkpoints: bool = False, jobs: int = 1) -> list[Record]:
    """The records of `arms`, in their order: loaded from results/records where present, computed and saved otherwise,
    those that take longest first, so that all jobs have work to the end.

    Shows one progress bar over the missing arms with an estimate of the time left. Killed at any point, the next call
    goes on: finished records are kept, generated data and training continue from their last batch and checkpoint.
    Two processes may work on the same folder; each arm is computed by one of them.
    keep_checkpoints: leave the end of each training (12 bytes a parameter) in results/checkpoints, from where an arm
    with more steps (Budget.extended_from) goes on; without, such an arm trains its first part again, to the same end.
    jobs: arms computed at a time, each in a process of its own with its share of the threads; memory grows with them.
    Raises ValueError for an arm that cannot be run, before anything is computed, and RecordError for a results folder
    that is not writable, whose records are of other weights by the model's name, or a record that cannot be read.
    """
    check_jobs(jobs)
    store = Store(results)
    for model in dict.fromkeys(arm.model for arm in arms):
        store.hold(model, models.version(model))
    missing = [arm for arm in dict.fromkeys(arms) if store.load(arm_key(arm)) is None]
    missing.sort(key=_work, reverse=True)
    for arm in missing:
        check(arm)
    if _planning.get():
        raise Planned(arms)
    helpers = max(0, min(jobs, len(missing)) - 1)
    with (
        _sharing_threads(helpers, missing, results, keep_checkpoints),
        tqdm(
            total=sum(map(_work, missing)),
            unit="tok",
            unit_scale=True,
            disable=not missing,
            mininterval=2,
            dynamic_ncols=True,
        ) as bar,
        contextlib.ExitStack() as afterwards,
    ):
        afterwards.callback(gc.unfreeze)
        _carry_out_all(missing, store, keep_checkpoints, bar)
    return [store.load(arm_key(arm)) for arm in arms]


@contextlib.contextmanager
def _sharing_threads(helpers: int, arms: Sequence[Arm], *where) -> Iterator[None]:
    """Inside, so many further processes work on the same arms; what they fail at is left to this one."""
    threads = torch.get_num_threads()
    share = max(1, threads // (helpers + 1))
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_help, args=(share, arms, *where), daemon=True) for _ in range(helpers)]
    try:
        torch.set_num_threads(share)
        for process in processes:
            process.start()
        yield
        for process in processes:
            process.join()
    finally:
        torch.set_num_threads(threads)
        for process in processes:
            process.kill()


def _help(threads: int, arms: Sequence[Arm], results: str | Path, keep_checkpoints: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent stops this process
    torch.set_num_threads(threads)
    _carry_out_all(arms, Store(results), keep_checkpoints, tqdm(disable=True))


def _carry_out_all(arms: Sequence[Arm], store: Store, keep_checkpoints: bool, bar: tqdm) -> None:
    """Every arm once: first those that no other process is working on."""
    keep_freed_memory()
    waiting, parent = list(arms), multiprocessing.parent_process()
    while waiting and (parent is None or parent.is_alive()):
        with _locked(waiting, store) as arm:
            waiting.remove(arm)
            bar.set_description(arm.title)
            end = bar.n + _work(arm)
            if store.load(arm_key(arm)) is None:
                store.save(carry_out(arm, store, keep_checkpoints, functools.partial(_advance, bar, end)))
                gc.freeze()  # what is left are libraries, half a second to walk through each time anew
                if not keep_checkpoints:
                    shutil.rmtree(store.checkpoint_folder(arm_key(arm)), ignore_errors=True)
            _advance(bar, end, end)


@contextlib.contextmanager
def _locked(arms: Sequence[Arm], store: Store) -> Iterator[Arm]:
    """The first arm that no other process holds, held inside; where there is none, the first, once it is let go.

    Arms whose data another process is making just now come last.
    """

    def awaits_data(arm: Arm) -> bool:
        return arm.data is not None and store.is_held(_data_lock(_data_folder(arm, store)))

    with contextlib.ExitStack() as held:
        for arm, wait in [*((arm, False) for arm in sorted(arms, key=awaits_data)), (arms[0], True)]:
            try:
                held.enter_context(store.lock(arm_key(arm)).acquire(blocking=wait))
            except Timeout:
                continue
            yield arm
            return


def _advance(bar: tqdm, end: int, tokens: int) -> None:
    """Move the bar by `tokens`, at most to `end`: an arm that takes more than planned stays in its own part."""
    bar.update(min(tokens, end - bar.n))


def carry_out(
    arm: Arm, store: Store, keep_checkpoints: bool = False, progress: Progress = lambda tokens: None
) -> Record:
    """Compute the record of one arm. progress is told of finished work, in tokens of a forward pass."""
    set_seed(arm.seed)
    seconds, tokens, load = {}, {}, functools.partial(models.load_model, arm.model)

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - begun, 2)

    with peak_memory() as peak:
        with phase("load"):
            model = load()
            tokenizer = models.load_tokenizer(arm.model)
        if arm.training or arm.tuning:
            check_head(model)
        identity, vocabulary = _identity(arm.model), model.config.vocab_size
        besides = {}
        if arm.method == ENCODED:
            with phase("quantize"):
                besides = weight_scores(load(), encode_model(model, arm.format))
        if arm.method == EXECUTED:
            with phase("quantize"):
                model = int4_model(encode_model(model.cpu(), arm.format))
            with phase("decode"):
                timed = decoding_seconds(load, arm.format, arm.decoding)
                besides = {f"seconds/{name}/{kind}": values for (name, kind), values in timed.items()}
        sizes = {
            "bytes/weights": _weight_bytes(arm, model),
            "bytes/cache_per_token": cache_bytes_per_token(model, arm.bits, arm.scheme),
        }
        data, log = _deploy(arm, model, tokenizer, store, keep_checkpoints, progress, phase)
        if data:
            tokens["data"] = data.windows.numel()
        if arm.training:
            tokens["trained"] = arm.training.steps * arm.training.batch * arm.data.length
        if arm.tuning:
            tokens["trained"] = log.curve[-1]["tokens"]
        diverged = bool(log.steps) and not math.isfinite(log.steps[-1]["loss"])
        with phase("evaluate"), _counted(model, progress) as seen:
            metrics, scores = ({}, {}) if diverged else score(model, tokenizer, arm.evaluation)
        scores |= {name: np.array(values) for name, values in besides.items()}
        tokens["evaluated"] = seen["tokens"]
    del model
    gc.collect()
    numbers = metrics | sizes
    finite = all(map(math.isfinite, numbers.values())) and not diverged
    return Record(
        key=arm_key(arm),
        arm=arm,
        status=FINISHED if finite else DIVERGED,
        metrics=_json_entries(numbers),
        scores={name: _json_numbers(values) for name, values in scores.items()},
        training=[_json_entries(entry) for entry in log.steps],
        curve=[_json_entries(entry) for entry in log.curve],
        data={"statistics": data.statistics, "samples": data.samples} if data else {},
        cost={"seconds": seconds, "tokens": tokens, "peak_bytes": peak["bytes"]},
        provenance=environment()
        | {
            "code": arm_code(arm),
            "model": identity | {"vocabulary": vocabulary},
            "corpora": {name: corpora.sha256(name) for name in arm.evaluation.corpora},
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )


def _deploy(
    arm: Arm,
    model: PreTrainedModel,
    tokenizer,
    store: Store,
    keep_checkpoints: bool,
    progress: Progress,
    phase: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> tuple[TrainingData | None, Log]:
    """Make of the loaded model, in place, what the arm is scored on. phase: entered, by name, around each kind of
    work."""
    data, log = None, Log([], [])
    if arm.data:
        with phase("data"):
            data = _prepare_data(arm, model, tokenizer, store, progress)
    decode_model(model)
    if arm.method in (*CALIBRATED, SMOOTHQUANT_QAT, RTN):
        with phase("quantize"):
            methods.quantize(arm, model, data and data.windows)

    def work(tokens: int) -> None:
        progress(TRAINING_WORK * tokens)

    if arm.training:
        with phase("train"):
            log = methods.train(arm, model, tokenizer, data, _checkpoints(arm, store), keep_checkpoints, work)
    if arm.tuning:
        with phase("train"):
            trained, load = trained_adapter(arm, store), functools.partial(models.load_model, arm.model)
            windows, checkpoints = data and data.windows, _checkpoints(arm, store)
            with store.lock(f"adapter-{trained.stem}"):
                log = tune(arm, model, tokenizer, windows, load, checkpoints, trained, keep_checkpoints, work)
    return data, log


def deployed(arm: Arm, store: Store) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that the arm is scored on, made again, and its tokenizer.

    Text, trained adapters and checkpoints that are still in the store are used; what it has not yet is computed, and of
    that all but checkpoints stays. Raises what `run` raises.
    """
    store.hold(arm.model, models.version(arm.model))
    check(arm)
    checkpoints = store.checkpoint_folder(arm_key(arm))
    with store.lock(arm_key(arm)):
        budget = arm.training or arm.tuning
        kept = budget is not None and (checkpoints / f"checkpoint-{budget.steps}").exists()
        set_seed(arm.seed)
        model, tokenizer = models.load_model(arm.model), models.load_tokenizer(arm.model)
        if arm.method in (ENCODED, EXECUTED):
            encode_model(model, arm.format)
        work = _work(dataclasses.replace(arm, evaluation=NOTHING))
        with tqdm(total=work, unit="tok", unit_scale=True, disable=not work, desc=arm.title, mininterval=2) as bar:
            _deploy(arm, model, tokenizer, store, kept, functools.partial(_advance, bar, work))
            _advance(bar, work, work)
        if not kept:
            shutil.rmtree(checkpoints, ignore_errors=True)
    return model, tokenizer


def trained_adapter(arm: Arm, store: Store) -> Path:
    """The file of what a fine-tuned arm trained, where it can be deployed in several ways."""
    return store.adapter_file(arm_key(arm.as_trained))


def _json_entries(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _json_numbers(values: np.ndarray) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]


def _weight_bytes(arm: Arm, model: PreTrainedModel) -> int:
    if arm.tuning:
        return inference_bytes(model, arm.method, arm.format, arm.adapter, arm.merge)
    if arm.method == EXECUTED:
        return executed_bytes(model)
    return stored_bytes(model) if arm.format else weight_bytes(model, arm.bits, arm.scheme)


def _data_description(arm: Arm) -> dict:
    return {
        "model": _identity(arm.model),
        "data": dataclasses.asdict(arm.data),
        "code": code_versions((*DATA_CODE, "corpora"), ("torch", "transformers")),
    }


def _data_folder(arm: Arm, store: Store) -> Path:
    return store.data_folder(digest(json.dumps(_data_description(arm), sort_keys=True)))


def _data_lock(folder: Path) -> str:
    return f"data-{folder.name}"


def _prepare_data(arm: Arm, model: PreTrainedModel, tokenizer, store: Store, progress: Progress) -> TrainingData:
    """The arm's windows, made once for all arms that share them."""
    folder = _data_folder(arm, store)
    states = folder / f"teacher_states-{code_hash('distill')[:8]}.npy"
    teacher = functools.partial(models.load_model, arm.model, models.compute_dtype())
    with store.lock(_data_lock(folder)):
        data = prepare(model, tokenizer, arm.data, arm.training, folder, states, teacher, progress)
        (folder / "provenance.json").write_text(json.dumps(_data_description(arm) | environment(), indent=1))
    return data


def _checkpoints(arm: Arm, store: Store) -> Path:
    """The folder of the arm's last checkpoint; an extended arm's begins with what the arm it extends has kept."""
    folder = store.checkpoint_folder(arm_key(arm))
    name, budget = ("training", arm.training) if arm.training else ("tuning", arm.tuning)
    *before, last = budget.extended_from or (None,)
    if last is not None and not folder.exists():
        shorter = dataclasses.replace(budget, steps=last, extended_from=tuple(before))
        kept = store.checkpoint_folder(arm_key(dataclasses.replace(arm, **{name: shorter}))) / f"checkpoint-{last}"
        if kept.exists():
            shutil.copytree(kept, folder / kept.name, copy_function=os.link)
    return folder


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
    work = (len(wanted.corpora) * wanted.windows + wanted.pairs) * wanted.length
    work += sum(ITEM_WORK * TASKS[task].count(wanted.items) for task in wanted.tasks)
    if arm.tuning:
        work += TRAINING_WORK * arm.tuning.steps * arm.tuning.batch * arm.instructions.length
    if arm.data:
        work += GENERATION_WORK * arm.data.count * arm.data.length
    if arm.training:
        work += TRAINING_WORK * arm.training.steps * arm.training.batch * arm.data.length
    return work
