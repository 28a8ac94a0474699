"""Text corpora cut into token windows, and what these are like; instruction pairs. Training text is kept apart."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    return next(fetch("corpora").rglob(FILES[corpus])) if corpus in FILES else _file("corpus", corpus)


def _pairs_path(source: str) -> Path:
    check_instructions(source)
    return next(fetch("corpora").rglob(PAIRS)) if source == ALPACA else _file("instructions", source)


def _file(kind: str, name: str) -> Path:
    if not Path(name).exists():
        raise ValueError(f"{kind}: there is no file {name!r}")
    if not Path(name).is_file():  # a folder, a pipe, a device
        raise ValueError(f"{kind}: {name!r} is no file of text")
    return Path(name)


def sha256(corpus: str) -> str:
    """SHA-256 of the corpus file."""
    return _sha256("corpus", _path(corpus))


def instructions_sha256(source: str) -> str:
    """SHA-256 of the file of instruction pairs."""
    return _sha256("instructions", _pairs_path(source))


def _sha256(kind: str, path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise ValueError(f"{kind} {path}: it cannot be read ({error.strerror})") from error


def _read_text(kind: str, path: Path) -> str:
    """The file's text, without a byte-order mark."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{kind} {path}: it cannot be read ({error.strerror})") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{kind} {path}: line {line} is not UTF-8 (byte 0x{data[error.start]:02x})") from error


def _check_unicode(what: str, text: str) -> None:
    """ValueError for halves of a character, which JSON can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half a character, {text[error.start]!r}") from error


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
    for number, line in enumerate(_read_text("corpus", path).split("\n"), 1):
        if line.strip():
            if path.suffix == ".jsonl":
                line = _text_of(line, f"corpus {path}: line {number}")
            texts.append(line.strip())
    chosen = [text for text in texts[SPLITS.index(split) :: 2] if text]
    if not chosen:
        raise ValueError(f"corpus {corpus!r} is empty: it has no {split} documents (it needs two documents or more)")
    return chosen


def _text_of(line: str, what: str) -> str:
    """The "text" of an object in a line of JSON."""
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{what} is not a JSON object with a "text"') from error
    if not isinstance(text, str):
        raise ValueError(f'{what} has a "text" that is {_kind(text)}')
    _check_unicode(what, text)
    return text


def _kind(value: object) -> str:
    """What a JSON value is, for messages."""
    return "null" if value is None else f"of type {type(value).__name__}"


def instruction_pairs(split: str, source: str = ALPACA) -> list[Pair]:
    """The pairs of one split, by the rule of `documents`; repeated ones and empty responses are left out.

    Raises ValueError for an unknown split or source, a file that holds no such pairs, or a split without any.
    """
    _check_split(split)
    path = _pairs_path(source)
    pairs = list(dict.fromkeys(_pair(row, path, number) for number, row in enumerate(_rows(path), 1)))
    chosen = [pair for pair in pairs[SPLITS.index(split) :: 2] if pair.response]
    if not chosen:
        raise ValueError(f"instructions {source!r}: it has no pairs for {split} (it needs two with a response or more)")
    return chosen


def _rows(path: Path) -> list:
    text, lines = _read_text("instructions", path), path.suffix == ".jsonl"
    parts = enumerate(text.split("\n"), 1) if lines else [(1, text)]
    rows = []
    for number, part in parts:
        if part.strip() or not lines:
            try:
                rows.append(json.loads(part))
            except (ValueError, RecursionError) as error:
                at = number + getattr(error, "lineno", 1) - 1
                why = getattr(error, "msg", "nested too deeply" if isinstance(error, RecursionError) else error)
                raise ValueError(f"instructions {path}: line {at} is not JSON ({why})") from error
    found = rows if lines else rows[0]
    if not isinstance(found, list):
        raise ValueError(f"instructions {path}: it is not a JSON list of pairs")
    return found


def _pair(row: object, path: Path, number: int) -> Pair:
    what = f"instructions {path}: entry {number}"
    if not isinstance(row, dict):
        raise ValueError(f'{what} is no object with the texts "instruction" and "output"')
    given = {name: row.get(name) for name in ("instruction", "input", "output")}
    if given["input"] is None:  # missing, or null as some files have it
        given["input"] = ""
    for name, text in given.items():
        if not isinstance(text, str):
            raise ValueError(f'{what} has no text "{name}"' + (f": it is {_kind(text)}" if name in row else ""))
        _check_unicode(what, text)
    instruction, further, response = (text.strip() for text in given.values())
    return Pair(INPUT.join(filter(None, (instruction, further))), response)


def evenly_spaced(count: int, available: int) -> Tensor:
    """The indices of `count` of `available` things, evenly spaced; of all where there are fewer."""
    count = min(count, available)
    return torch.arange(count) * available // count


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text: a BOS token, of most models nothing. Every window begins so, every
    prompt, and every text that the model writes."""
    plain = plain_ids(tokenizer, "text")
    whole = tokenizer("text").input_ids
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return whole[:at]
    return []


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@functools.lru_cache(maxsize=8)
def _stream(corpus: str, version: str, tokenizer, split: str) -> tuple[Tensor, Tensor]:
    """The split's documents joined by end-of-text, as token ids, and where each of them ends."""
    end = tokenizer.eos_token_id
    ids = [
        tokenizer(text, add_special_tokens=False).input_ids + ([] if end is None else [end])
        for text in documents(corpus, split)
    ]
    ends = torch.tensor([len(document) for document in ids]).cumsum(0)
    return torch.tensor([token for document in ids for token in document]), ends


def windows(corpus: str, tokenizer, length: int, count: int | None, split: str) -> Tensor:
    """`count` windows [count, length] of token ids, evenly spaced over the split's documents joined by end-of-text.

    They never overlap. Each begins with what the tokenizer puts before a text (see `beginning`). count None: all there
    are. Raises ValueError where the split has fewer.
    """
    return begun(_cut(corpus, tokenizer, length, count, split)[0], beginning(tokenizer))


def window_documents(corpus: str, tokenizer, length: int, count: int | None, split: str) -> Tensor:
    """Which of the split's documents each of these `windows` is from, [count]: that of its first token, where a window
    spans several."""
    return _cut(corpus, tokenizer, length, count, split)[1]


def _cut(corpus: str, tokenizer, length: int, count: int | None, split: str) -> tuple[Tensor, Tensor]:
    """The windows without what they begin with, and the document of each one's first token."""
    (stream, ends), first = _stream(corpus, sha256(corpus), tokenizer, split), beginning(tokenizer)
    size = length - len(first)
    if size < 1:
        raise ValueError(f"length: {length} tokens are no more than the {len(first)} that every text begins with")
    available = len(stream) // size
    count = available if count is None else count
    if count > available:
        raise ValueError(
            f"windows: {count} of {length} tokens are more than the {available} that {corpus!r} has for {split}"
        )
    chosen = evenly_spaced(count, available)
    return stream[: available * size].view(available, size)[chosen], torch.bucketize(chosen * size, ends, right=True)


def begun(texts: Tensor, first: Sequence[int]) -> Tensor:
    """Token ids [N, T] with those of `first` before each row."""
    return torch.cat([torch.tensor(first, dtype=texts.dtype).expand(len(texts), -1), texts], 1) if first else texts


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
