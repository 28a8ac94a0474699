"""Text corpora cut into token windows, and what these are like; instruction pairs. Training text is kept apart."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from studylib.config import ALPACA, check_corpus, check_instructions, file_sha256
from studylib.data.models import autocast
from studylib.data.sources import fetch

FILES = {"wikipedia": "wiki_demo.txt", "c4": "c4_demo.jsonl"}  # in the archive
SPLITS = ("evaluation", "training")
PAIRS = "alpaca_en_demo.json"
INPUT = "\n\n### Input:\n"  # what joins an instruction and its input in Alpaca's prompts


@dataclass(frozen=True)
class Pair:
    """An instruction, with its input where it has one, and the response to it."""

    instruction: str
    response: str


def _path(corpus: str) -> Path:
    check_corpus(corpus)
    if corpus not in FILES:
        if not Path(corpus).is_file():
            raise ValueError(f"corpus: there is no file {corpus!r}")
        return Path(corpus)
    (path,) = fetch("corpora").rglob(FILES[corpus])
    return path


def sha256(corpus: str) -> str:
    """SHA-256 of the corpus file."""
    return file_sha256(_path(corpus))


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not known; use one of {', '.join(SPLITS)}")


def documents(corpus: str, split: str) -> list[str]:
    """The documents of one split: the first, third, ... are for "evaluation", the others for "training".

    Raises ValueError for an unknown corpus or split, a malformed line, or a split without text.
    """
    _check_split(split)
    path = _path(corpus)
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            try:
                line = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'corpus {path}: line {number} is not a JSON object with a "text"') from error
        texts.append(line.strip())
    chosen = [text for text in texts[SPLITS.index(split) :: 2] if text]
    if not chosen:
        raise ValueError(f"corpus {corpus!r} is empty: it has no {split} documents (it needs two documents or more)")
    return chosen


def instruction_pairs(split: str, source: str = ALPACA) -> list[Pair]:
    """The pairs of one split, by the rule of `documents`; repeated ones and empty responses are left out.

    Raises ValueError for an unknown split or source, a file that holds no such pairs, or a split without any.
    """
    _check_split(split)
    check_instructions(source)
    if source != ALPACA and not Path(source).is_file():
        raise ValueError(f"instructions: there is no file {source!r}")
    path = Path(source) if source != ALPACA else next(fetch("corpora").rglob(PAIRS))
    pairs = list(dict.fromkeys(_pair(row, path, number) for number, row in enumerate(_rows(path), 1)))
    chosen = [pair for pair in pairs[SPLITS.index(split) :: 2] if pair.response]
    if not chosen:
        raise ValueError(f"instructions {source!r}: it has no pairs for {split} (it needs two with a response or more)")
    return chosen


def _rows(path: Path) -> list:
    text = path.read_text(encoding="utf-8")
    try:
        rows = (
            [json.loads(line) for line in text.split("\n") if line.strip()]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except ValueError as error:
        raise ValueError(f"instructions {path}: it is not JSON ({error})") from error
    if not isinstance(rows, list):
        raise ValueError(f"instructions {path}: it is not a JSON list of pairs")
    return rows


def _pair(row: dict, path: Path, number: int) -> Pair:
    try:
        instruction = INPUT.join(filter(None, (row["instruction"].strip(), row.get("input", "").strip())))
        return Pair(instruction, row["output"].strip())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'instructions {path}: entry {number} is no object with the texts "instruction" and "output"'
        ) from error


def conversation(tokenizer, pair: Pair) -> tuple[list[int], int]:
    """The token ids of a pair, and how many of them come before the response, which ends with what closes it.

    In the tokenizer's chat template, or in Alpaca's prompt where it has none.
    """
    if tokenizer.chat_template:
        mark = "\N{OBJECT REPLACEMENT CHARACTER}"
        messages = [{"role": "user", "content": pair.instruction}, {"role": "assistant", "content": mark}]
        before, _, after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(mark)
        response = pair.response + after.rstrip()
    else:
        given = ", paired with an input that provides further context" if INPUT in pair.instruction else ""
        before = (
            f"Below is an instruction that describes a task{given}. Write a response that appropriately completes the "
            f"request.\n\n### Instruction:\n{pair.instruction}\n\n### Response:"
        )
        response = pair.response + (tokenizer.eos_token or "")
    special = not tokenizer.chat_template  # a template writes them itself
    start = len(tokenizer(before, add_special_tokens=special).input_ids)
    return tokenizer(before + response, add_special_tokens=special).input_ids, start


def evenly_spaced(count: int, available: int) -> Tensor:
    """The indices of `count` of `available` things, evenly spaced; of all where there are fewer."""
    count = min(count, available)
    return torch.arange(count) * available // count


@functools.lru_cache(maxsize=8)
def _stream(corpus: str, version: str, tokenizer, split: str) -> Tensor:
    end = tokenizer.eos_token_id
    ids = [
        tokenizer(text, add_special_tokens=False).input_ids + ([] if end is None else [end])
        for text in documents(corpus, split)
    ]
    return torch.tensor([token for document in ids for token in document])


def windows(corpus: str, tokenizer, length: int, count: int | None, split: str) -> Tensor:
    """`count` windows [count, length] of token ids, evenly spaced over the split's documents joined by end-of-text.

    They never overlap. count None: all there are. Raises ValueError where the split has fewer.
    """
    stream = _stream(corpus, sha256(corpus), tokenizer, split)
    available = len(stream) // length
    count = available if count is None else count
    if count > available:
        raise ValueError(
            f"windows: {count} of {length} tokens are more than the {available} that {corpus!r} has for {split}"
        )
    return stream[: available * length].view(available, length)[evenly_spaced(count, available)]


CHUNK = 256  # tokens whose fp32 logits are held at once: 256 x 49,152 x 4 bytes = 50 MB


def text_statistics(model: PreTrainedModel, windows: Tensor, limit: int = 16) -> dict[str, float]:
    """Statistics of token windows [N, T].

    Of at most `limit` evenly spaced windows: "entropy", the mean entropy of the model's next-token distribution at
    their positions, and "loss", the mean negative log-likelihood of their tokens after the first, both in nats a token;
    softmax in fp32, products in bf16 where the hardware computes in it.
    Of all windows: "distinct_2" and "distinct_4", distinct n-grams over all n-grams (Li et al. 2016); "repetition", the
    mean over windows of the share of 4-grams that occurred in the window before (seq-rep-4, Welleck et al. 2020);
    "vocabulary", the share of the vocabulary's ids that occur. An n-gram never crosses windows.
    Raises ValueError for windows of fewer than 4 tokens.
    """
    if windows.shape[1] < 4:
        raise ValueError(f"windows: {windows.shape[1]} tokens a window hold no 4-gram; use 4 or more")
    entropy, loss = _entropy_and_loss(model, windows[evenly_spaced(limit, len(windows))])
    pairs, fours = _pairs_and_fours(windows)
    ordered = fours.sort(1).values
    distinct_inside = 1 + (ordered.diff(dim=1) != 0).sum(1)  # (N,)
    vocabulary = model.config.get_text_config().vocab_size
    return {
        "entropy": entropy,
        "loss": loss,
        "distinct_2": len(pairs.unique()) / pairs.numel(),
        "distinct_4": len(fours.unique()) / fours.numel(),
        "repetition": 1 - distinct_inside.double().mean().item() / fours.shape[1],
        "vocabulary": len(windows.unique()) / vocabulary,
    }


def _pairs_and_fours(windows: Tensor) -> tuple[Tensor, Tensor]:
    """A number for each 2-gram [N, T - 1] and each 4-gram [N, T - 3]: equal n-grams have equal numbers."""
    found, pairs = (windows[:, :-1] * (windows.max() + 1) + windows[:, 1:]).unique(return_inverse=True)
    return pairs, pairs[:, :-2] * len(found) + pairs[:, 2:]


@torch.no_grad()
def _entropy_and_loss(model: PreTrainedModel, windows: Tensor) -> tuple[float, float]:
    entropies, losses = [], []
    with autocast(model.device):
        for window in windows.to(model.device):
            logits = model(window[None], use_cache=False).logits[0]
            targets = F.pad(window[1:], (0, 1), value=-100)  # the last position has none
            for part, ids in zip(logits.split(CHUNK), targets.split(CHUNK), strict=True):
                log_p = part.float().log_softmax(-1)
                entropies.append(-(log_p.exp() * log_p).sum(-1))
                losses.append(F.nll_loss(log_p, ids, ignore_index=-100, reduction="none")[ids >= 0])
    return torch.cat(entropies).double().mean().item(), torch.cat(losses).double().mean().item()
