"""Data-free generation: training text sampled from the full-precision model itself (LLM-QAT, section 2.1).

Fast: many sequences of equal age are decoded together, with a cache that is written in place and attention without
copies of it.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from studylib.config import (
    CHAT,
    GREEDY,
    GREEDY_TOKENS,
    Sampling,
    make_folder,
    remove_sealed,
    tell,
    usable,
    write_whole,
    written_whole,
)
from studylib.data import models
from studylib.data.corpora import begun

TURNS = 2  # of a chat: the user's and the assistant's, each closed by an end token


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens of a sequence that the model takes; None where its configuration names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_length(model: PreTrainedModel, length: int) -> None:
    """Raise ValueError where a sequence of `length` tokens is longer than the model's context."""
    context = context_length(model)
    if context is not None and length > context:
        raise ValueError(f"length: {length} tokens is longer than the model's context of {context}")


def _pick(logits: Tensor, settings: Sampling, generator: torch.Generator) -> Tensor:
    """Sample one token id [B] from each row of logits [B, V]."""
    if settings.top_k:
        logits, ids = logits.topk(min(settings.top_k, logits.shape[-1]))
    p = (logits.float() / settings.temperature).softmax(-1)
    picked = torch.multinomial(p, 1, generator=generator)
    return (ids.gather(1, picked) if settings.top_k else picked)[:, 0]


@torch.no_grad()
def generate_sequences(
    model: PreTrainedModel,
    start: Tensor,
    settings: Sampling,
    seed: int,
    progress: Callable[[int], None] = lambda tokens: None,
    end: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sequences that begin with the rows of start [B, S], decoded together: their token ids, joined, and lengths [B].

    end: the tokenizer's end token, which ends them as those of the model's generation configuration do.
    progress is called with the number of tokens written at each step.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    rows, given = start.shape
    tokens = start.new_empty(rows, settings.length)
    tokens[:, :given] = start
    lengths = torch.full_like(tokens[:, 0], settings.length)
    greedy_until = torch.full_like(lengths, settings.length)
    if settings.strategy != GREEDY:
        choices = torch.tensor(GREEDY_TOKENS[settings.strategy], device=model.device)
        greedy_until = choices[torch.randint(len(choices), (rows,), generator=generator, device=model.device)]
    ends = torch.tensor(_end_tokens(model, end), device=model.device)
    ends_left = torch.full_like(lengths, TURNS if settings.strategy == CHAT else 1)
    active = torch.arange(rows, device=model.device)  # rows still being written; the cache holds just these
    progress(start.numel())
    seen = 0
    caching = decoding_cache(model, settings.length, models.compute_dtype())
    with models.autocast(model.device), caching as cache:
        for t in range(given, settings.length):
            new = tokens[active, seen:t]
            logits = model(new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]  # (B, V)
            seen = t
            greedy = greedy_until[active] > t
            if greedy.all():
                picked = logits.max(-1).indices
            else:
                picked = _pick(logits, settings, generator)
                if greedy.any():
                    picked = torch.where(greedy, logits.max(-1).indices, picked)
            tokens[active, t] = picked
            progress(len(active))
            ends_left[active] -= torch.isin(picked, ends).long()
            ended = ends_left[active] == 0
            if ended.any():
                lengths[active[ended]] = t + 1
                if ended.all():
                    break
                kept = fill_holes(~ended)
                active = active[kept]
                cache.batch_select_indices(kept)
    written = torch.arange(settings.length, device=model.device) < lengths[:, None]
    return tokens[written].cpu(), lengths.cpu()


def _end_tokens(model: PreTrainedModel, end: int | None) -> list[int]:
    own = model.generation_config.eos_token_id
    ends = [] if own is None else [own] if isinstance(own, int) else list(own)
    return ends if end is None or end in ends else [*ends, end]


def _start_tokens(vocabulary: int, seed: int, first: int, count: int) -> Tensor:
    """Vocabulary ids [count, 1] of the sequences from `first` on: one random order of all ids, then another, ..."""
    shuffle = torch.Generator().manual_seed(seed)
    rounds = -(-(first + count) // vocabulary)
    order = torch.cat([torch.randperm(vocabulary, generator=shuffle) for _ in range(rounds)])
    return order[first : first + count, None]


def _rows_wanted(lengths: Tensor, settings: Sampling, first: int = 0) -> int:
    """How many sequences the next batch decodes, after sequences of these lengths; 0 when there are enough tokens.

    As many as give the missing tokens at the mean length so far, and twice the standard error of their sum more. What
    all begin with, `first` tokens, is not counted.
    """
    missing = settings.count * (settings.length - first) - int(lengths.sum())
    if missing <= 0:
        return 0
    mean, deviation = float(settings.length - first), 0.0
    if len(lengths):
        mean, deviation = lengths.double().mean().item(), lengths.double().std(correction=0).item()
    rows = missing / mean
    return min(settings.batch, math.ceil(rows + 2 * math.sqrt(rows) * deviation / mean))


def generate_windows(
    model: PreTrainedModel,
    settings: Sampling,
    folder: str | Path,
    opening: Sequence[int] = (),
    progress: Callable[[int], None] = lambda tokens: None,
    *,
    first: Sequence[int] = (),
    end: int | None = None,
) -> Tensor:
    """Let the model write its own training text: token ids [settings.count, settings.length], int64.

    folder receives one `batch-NNNNN.npz` (token ids of its sequences joined, their lengths) per batch, each written
    whole and sealed, and `settings.json`: a killed run goes on after its last finished batch and ends with the same
    tokens, since a batch depends only on the settings and the batches before it. A damaged batch is made again, and so
    is all that is sealed in a folder of other settings.
    opening: token ids that every chat begins with, see `chat_opening`. first: those that every text begins with (see
    `beginning`): each sequence, which then goes on with a vocabulary id, and each window. end: see generate_sequences.
    progress is called with the number of tokens written at each step; a little more than the windows hold in all.
    Raises ValueError if the sequences are longer than the model's context, or if the opening is missing for a chat,
    given for anything else or not shorter than the sequences.
    """
    check_length(model, settings.length)
    if (settings.strategy == CHAT) != (len(opening) > 0):
        state = "given" if len(opening) else "missing"
        raise ValueError(f"opening: is {state}, but the strategy is {settings.strategy!r}; {CHAT!r} alone needs one")
    for given in (opening, first):
        if len(given) >= settings.length:
            raise ValueError(f"length: {settings.length} tokens leave no room after an opening of {len(given)}")
    folder = Path(folder)
    make_folder(folder)
    written = folder / "settings.json"
    described = json.dumps(asdict(settings) | {"opening": list(opening)} | ({"first": list(first)} if first else {}))
    if usable(written) and written.read_text() != described:
        tell(f"{folder} is not of the settings {described}; it is made again")
        remove_sealed(folder)
    if not written.exists():
        write_whole(written, described, sealed=True)

    vocabulary = model.config.get_text_config().vocab_size
    texts, lengths = [], torch.empty(0, dtype=torch.long)
    held = len(first) if not opening or list(opening[: len(first)]) == list(first) else 0
    while rows := _rows_wanted(lengths, settings, len(first)):
        path = folder / f"batch-{len(texts):05d}.npz"
        if usable(path):
            with np.load(path) as stored:
                text, made = torch.from_numpy(stored["tokens"]).long(), torch.from_numpy(stored["lengths"])
            progress(len(text))
        else:
            if opening:
                start = torch.tensor(opening).expand(rows, -1)
            else:
                start = begun(_start_tokens(vocabulary, settings.seed, len(lengths), rows), first)
            seed = int(np.random.SeedSequence([settings.seed, len(texts)]).generate_state(1)[0])
            text, made = generate_sequences(model, start.to(model.device), settings, seed, progress, end)
            arrays = {"tokens": text.numpy().astype(np.int32), "lengths": made.numpy()}
            size = sum(array.nbytes for array in arrays.values())
            with written_whole(path, sealed=True, size=size) as partial, partial.open("wb") as file:
                np.savez(file, **arrays)
        texts.append(_without_first(text, made, held))
        lengths = torch.cat([lengths, made - held])
    size = settings.length - len(first)
    return begun(torch.cat(texts)[: settings.count * size].view(settings.count, size), first)


def _without_first(text: Tensor, lengths: Tensor, held: int) -> Tensor:
    """Sequences, joined, without the first `held` tokens of each."""
    begins = lengths.cumsum(0) - lengths
    kept = torch.ones_like(text, dtype=torch.bool)
    kept[(begins[:, None] + torch.arange(held)).flatten()] = False
    return text[kept]


NAME = "studylib_decoding"
BLOCK = 64


class _InPlaceLayer(DynamicLayer):
    """Keys and values [B, H, columns, D] in buffers that grow by BLOCK columns: a step writes one and copies nothing.

    Attention sees the whole buffers, of which the mask hides what is not written yet: a product with a part of them
    would first copy that part.
    """

    def __init__(self, capacity: int, dtype: torch.dtype):
        super().__init__()
        self.capacity, self.buffer_dtype, self.length = capacity, dtype, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = (x[:, :, :0].to(self.buffer_dtype) for x in (key_states, value_states))

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._columns(self.length + query_length), 0

    def _columns(self, length: int) -> int:
        return min(-(-length // BLOCK) * BLOCK, self.capacity)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, self.length = self.length, self.length + key_states.shape[2]
        missing = self._columns(self.length) - self.keys.shape[2]
        if missing > 0:  # zeros, because what is hidden still takes part in a product, with weight zero
            self.keys, self.values = (F.pad(x, (0, 0, 0, missing)) for x in (self.keys, self.values))
        self.keys[:, :, before : self.length] = key_states
        self.values[:, :, before : self.length] = value_states
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows. Only rows that change their place are copied: see `fill_holes`."""
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        for buffer in (self.keys, self.values):
            buffer[moved] = buffer[indices[moved]]
        self.keys, self.values = (buffer[: len(indices)] for buffer in (self.keys, self.values))


def fill_holes(keep: Tensor) -> Tensor:
    """An order of the rows to keep ([B] bool) in which the fewest change place: holes are filled from the end.

    Worked: keep rows 0, 2, 3 of 4 -> (0, 3, 2).
    """
    rows = torch.arange(int(keep.sum()), device=keep.device)
    rows[~keep[: len(rows)]] = keep[len(rows) :].nonzero()[:, 0].flip(0) + len(rows)
    return rows


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **settings
) -> tuple[Tensor, None]:
    """Grouped attention of a single new token: query [B, H, 1, D], key and value [B, H / groups, T, D], none repeated;
    attention_mask [B, 1, 1, T], True where a column takes part.

    Anything longer goes to transformers' own scaled dot-product attention.
    """
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    scale = settings.get("scaling") or query.shape[-1] ** -0.5
    grouped = (query * scale).to(key.dtype).unflatten(1, (key.shape[1], -1)).squeeze(3)  # (B, Hkv, groups, D)
    scores = grouped @ key.transpose(-1, -2)  # (B, Hkv, groups, T)
    p = scores.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min).softmax(-1)  # in fp32 inside
    mixed = p.to(value.dtype) @ value  # (B, Hkv, groups, D)
    return mixed.flatten(1, 2)[:, None], None  # (B, 1, H, D)


def _mask(*args, **settings) -> Tensor:
    """transformers' own mask, never left out: buffers are longer than what is written."""
    return sdpa_mask(*args, **settings | {"allow_is_causal_skip": False})


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


@contextlib.contextmanager
def decoding_cache(model: PreTrainedModel, capacity: int, dtype: torch.dtype) -> Iterator[DynamicCache]:
    """An empty cache for `capacity` tokens a sequence; inside, `model` attends to it as above.

    Layers that attend to a sliding window keep transformers' own kind of cache; so does a model whose attention is not
    scaled dot-product attention, which stays as it is.
    """
    cache = DynamicCache(config=model.config)
    before = model.config._attn_implementation
    if before != "sdpa":
        yield cache
        return
    cache.layers = [_InPlaceLayer(capacity, dtype) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    model.set_attn_implementation(NAME)
    try:
        yield cache
    finally:
        model.set_attn_implementation(before)
