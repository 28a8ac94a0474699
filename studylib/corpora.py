"""Text corpora cut into token windows, and instruction pairs, with training and evaluation text kept apart."""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from studylib.sources import fetch

CORPORA = {"wikipedia": "wiki_demo.txt", "c4": "c4_demo.jsonl"}
SPLITS = ("evaluation", "training")
PAIRS = "alpaca_en_demo.json"
INPUT = "\n\n### Input:\n"  # what joins an instruction and its input in Alpaca's prompts


@dataclass(frozen=True)
class Pair:
    """An instruction, with its input where it has one, and the response to it."""

    instruction: str
    response: str


def check_corpus(corpus: str) -> None:
    """Raise ValueError unless `corpus` is a known name or a local .txt (a document a line) or .jsonl ("text") file."""
    if corpus not in CORPORA and not (corpus.endswith((".txt", ".jsonl")) and Path(corpus).is_file()):
        raise ValueError(
            f"corpus: {corpus!r} is not known; use one of {', '.join(CORPORA)}, or the path of a .txt (one "
            'document a line) or .jsonl (field "text") file'
        )


def _path(corpus: str) -> Path:
    check_corpus(corpus)
    if corpus not in CORPORA:
        return Path(corpus)
    (path,) = fetch("corpora").rglob(CORPORA[corpus])
    return path


def sha256(corpus: str) -> str:
    """SHA-256 of the corpus file."""
    return hashlib.sha256(_path(corpus).read_bytes()).hexdigest()


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


def instruction_pairs(split: str) -> list[Pair]:
    """The Alpaca pairs of one split, by the rule of `documents`; repeated ones and empty responses are left out.

    Raises ValueError for an unknown split or a file that is no list of such pairs.
    """
    _check_split(split)
    (path,) = fetch("corpora").rglob(PAIRS)
    try:
        pairs = [
            Pair(INPUT.join(filter(None, (row["instruction"].strip(), row["input"].strip()))), row["output"].strip())
            for row in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is not a JSON list of objects with "instruction", "input" and "output"') from error
    return [pair for pair in list(dict.fromkeys(pairs))[SPLITS.index(split) :: 2] if pair.response]


@functools.lru_cache(maxsize=8)
def _stream(corpus: str, tokenizer, split: str) -> Tensor:
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
    stream = _stream(corpus, tokenizer, split)
    available = len(stream) // length
    count = available if count is None else count
    if count > available:
        raise ValueError(
            f"windows: {count} of {length} tokens are more than the {available} that {corpus!r} has for {split}"
        )
    chosen = torch.arange(count) * available // count
    return stream[: available * length].view(available, length)[chosen]
