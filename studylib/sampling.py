"""Data-free generation: training text sampled from the full-precision model itself (LLM-QAT, section 2.1)."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from studylib import models
from studylib.decoding import fast_attention, fill_holes, new_cache

STRATEGIES = ("hybrid", "sampled", "greedy")


@dataclass(frozen=True)
class Sampling:
    """How training windows are generated.

    strategy: "hybrid" (LLM-QAT's: greedy until the text has j tokens, j drawn from 3, 4, 5, sampled after that),
    "sampled" or "greedy" throughout. Every sequence starts from a vocabulary id of its own, without BOS.
    count sequences of up to `length` tokens; one that emits end-of-text stops there. top_k 50 is the default that the
    official code inherits from transformers; 0 samples from the whole vocabulary. batch: sequences decoded together.
    """

    count: int
    length: int
    strategy: str = "hybrid"
    top_k: int = 50
    temperature: float = 1.0
    seed: int = 0
    batch: int = 64

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy: {self.strategy!r} is not known; use one of {', '.join(STRATEGIES)}")
        for name, least in (("count", 1), ("length", 2), ("top_k", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed; use {least} or more")
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature!r} is not allowed; use a number above 0")


@dataclass(frozen=True)
class Windows:
    """Token ids [N, T] (int64) and how many of each row are text [N]; the rest of a row is padding."""

    tokens: Tensor
    lengths: Tensor

    @property
    def mask(self) -> Tensor:
        """[N, T], True on text."""
        return torch.arange(self.tokens.shape[1]) < self.lengths[:, None]


def check_length(model: PreTrainedModel, length: int) -> None:
    """Raise ValueError where a sequence of `length` tokens is longer than the model's context."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and length > context:
        raise ValueError(f"length: {length} tokens is longer than the model's context of {context}")


def _pick(logits: Tensor, settings: Sampling, generator: torch.Generator) -> Tensor:
    """Sample one token id [B] from each row of logits [B, V]."""
    logits = logits.float() / settings.temperature
    if not settings.top_k:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    best, ids = logits.topk(min(settings.top_k, logits.shape[-1]), dim=-1)
    return ids.gather(1, torch.multinomial(best.softmax(-1), 1, generator=generator))[:, 0]


@torch.no_grad()
def _generate_batch(
    model: PreTrainedModel,
    start: Tensor,
    settings: Sampling,
    seed: int,
    pad: int,
    ends: Tensor,
    progress: Callable[[int], None],
) -> Windows:
    generator = torch.Generator(model.device).manual_seed(seed)
    rows = len(start)
    tokens = torch.full((rows, settings.length), pad, dtype=torch.long, device=model.device)
    tokens[:, 0] = start
    lengths = torch.full((rows,), settings.length, device=model.device)
    if settings.strategy == "hybrid":
        greedy_until = torch.randint(3, 6, (rows,), generator=generator, device=model.device)
    else:
        greedy_until = torch.full((rows,), settings.length if settings.strategy == "greedy" else 0, device=model.device)
    active = torch.arange(rows, device=model.device)  # rows still being written; the cache holds just these
    cache = new_cache(model, settings.length, models.compute_dtype())
    for t in range(1, settings.length):
        logits = model(tokens[active, t - 1 : t], past_key_values=cache, use_cache=True).logits[:, -1]  # (B, V)
        greedy = greedy_until[active] > t
        picked = (
            logits.argmax(-1)
            if greedy.all()
            else torch.where(greedy, logits.argmax(-1), _pick(logits, settings, generator))
        )
        tokens[active, t] = picked
        progress(len(active))
        ended = torch.isin(picked, ends)
        if ended.any():
            lengths[active[ended]] = t + 1
            if ended.all():
                break
            kept = fill_holes(~ended)
            active = active[kept]
            cache.batch_select_indices(kept)
    return Windows(tokens.cpu(), lengths.cpu())


def _end_tokens(model: PreTrainedModel) -> list[int]:
    end = model.generation_config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def generate_windows(
    model: PreTrainedModel,
    settings: Sampling,
    folder: str | Path,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Windows:
    """Let the model write its own training text: settings.count sequences of up to settings.length tokens.

    folder receives one `batch-NNNNN.npz` (token ids, lengths) per batch, each written whole, and `settings.json`: a
    killed run goes on after its last finished batch and ends with the same tokens, since every batch has a seed of its
    own. progress is called with the number of tokens decoded at each step.
    Raises ValueError if the sequences are longer than the model's context, or if the folder was begun with other
    settings.
    """
    check_length(model, settings.length)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written, described = folder / "settings.json", json.dumps(asdict(settings), sort_keys=True)
    if written.exists() and written.read_text() != described:
        raise ValueError(f"{folder} was begun with {written.read_text()}, not {described}; use another folder")
    written.write_text(described)

    vocabulary = model.config.get_text_config().vocab_size
    rounds = -(-settings.count // vocabulary)
    shuffle = torch.Generator().manual_seed(settings.seed)
    starts = torch.cat([torch.randperm(vocabulary, generator=shuffle) for _ in range(rounds)])[: settings.count]
    ends = _end_tokens(model)
    pad = ends[0] if ends else 0
    batches = []
    for index, start in enumerate(starts.split(settings.batch)):
        path = folder / f"batch-{index:05d}.npz"
        if path.exists():
            progress(len(start) * (settings.length - 1))
        else:
            seed = int(np.random.SeedSequence([settings.seed, index]).generate_state(1)[0])
            with models.autocast(model.device), fast_attention(model):
                made = _generate_batch(
                    model,
                    start.to(model.device),
                    settings,
                    seed,
                    pad,
                    torch.tensor(ends, device=model.device),
                    progress,
                )
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.savez(file, tokens=made.tokens.numpy().astype(np.int32), lengths=made.lengths.numpy())
            os.replace(partial, path)
        with np.load(path) as stored:
            batches.append((torch.from_numpy(stored["tokens"]).long(), torch.from_numpy(stored["lengths"])))
    tokens, lengths = (torch.cat(part) for part in zip(*batches, strict=True))
    return Windows(tokens, lengths)
