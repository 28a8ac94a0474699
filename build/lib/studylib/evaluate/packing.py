"""Log-likelihoods of many continuations in few forward passes: sequences packed into rows that share beginnings."""

import inspect
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

ROW = 512  # tokens of a row, beyond those that the sequence added last shares with others
CHUNK = 512  # positions whose fp32 logits are held at once


class _Row:
    """Token sequences as a tree: a prefix that several of them have is there once.

    tokens: their ids. parents: the index of the token before each, -1 for a first one. paths: (sequence, the indices of
    its tokens).
    """

    def __init__(self):
        self.tokens, self.parents, self.paths = [], [], []

    def shared(self, sequence: tuple[int, ...]) -> int:
        """How many tokens the sequence has in common with the one added last."""
        last = self.paths[-1][0] if self.paths else ()
        pairs = enumerate(zip(last, sequence, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(last), len(sequence)))

    def add(self, sequence: tuple[int, ...]) -> None:
        shared = self.shared(sequence)
        path = self.paths[-1][1][:shared] if shared else []
        path = [*path, *range(len(self.tokens), len(self.tokens) + len(sequence) - shared)]
        self.tokens += sequence[shared:]
        self.parents += [-1, *path][shared:-1]
        self.paths.append((sequence, path))

    def inputs(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """What the model's forward takes: each token attends to itself and those before it in its own sequences."""
        inputs = {"input_ids": torch.tensor([self.tokens], device=model.device)}
        if len(self.paths[-1][1]) == len(self.tokens):  # one chain, which is what a model takes a row for
            return inputs
        seen = np.zeros((len(self.tokens), len(self.tokens)), dtype=bool)
        for token, parent in enumerate(self.parents):
            if parent >= 0:
                seen[token] = seen[parent]
            seen[token, token] = True
        mask = np.where(seen, 0, -np.inf)[None, None]
        return inputs | {
            "attention_mask": torch.tensor(mask, dtype=model.dtype, device=model.device),
            "position_ids": torch.tensor(seen.sum(1) - 1, device=model.device)[None],
        }


@torch.no_grad()
def _longest_packed(model: PreTrainedModel) -> float:
    """How many tokens a sequence may have to share a row with others.

    0 where the model mixes what it is told to keep apart (recurrent layers, convolutions, ALiBi); where its attention
    has a window, no more than that.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return 0

    def last_logits(*sequences: tuple[int, ...], spread: int = 1) -> Tensor:
        row = _Row()
        for sequence in sequences:
            row.add(sequence)
        inputs = row.inputs(model)
        return model(**inputs | {"position_ids": inputs["position_ids"] * spread}, use_cache=False).logits[0, -1]

    # Rounding may change a lot in a low-bit model, so that only equal shapes are compared: what another sequence holds
    # must change nothing, and positions must count.
    row = last_logits((1, 2, 3, 4), (1, 2, 5))
    mixed = not torch.equal(row, last_logits((1, 2, 6, 7), (1, 2, 5)))
    if mixed or torch.equal(row, last_logits((1, 2, 3, 4), (1, 2, 5), spread=2)):
        return 0
    config = model.config.get_text_config()
    return min(getattr(config, name, None) or math.inf for name in ("sliding_window", "attention_chunk_size"))


def _rows(sequences: Iterable[tuple[int, ...]], longest: float) -> Iterator[_Row]:
    """Pack sorted sequences; one of more than `longest` tokens shares a row only with beginnings of itself."""
    row, previous = _Row(), ()
    for sequence in sequences:
        shared = row.shared(sequence)
        fits = len(row.tokens) + len(sequence) <= ROW + 2 * shared and max(map(len, (previous, sequence))) <= longest
        if shared < len(row.tokens) and not fits:
            yield row
            row = _Row()
        row.add(sequence)
        previous = sequence
    if row.tokens:
        yield row


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, requests: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[tuple[float, bool]]:
    """For each (context, continuation) of token ids, neither of them empty: the continuation's log-likelihood in nats,
    and whether greedy decoding would write it.

    Nothing is padded, a beginning that several requests have is computed once in a row, and the output head is applied
    only where a continuation is predicted. Softmax in fp32; products in the autocast type.
    """
    model.eval()
    asked = defaultdict(list)
    for number, (context, continuation) in enumerate(requests):
        asked[(*context, *continuation[:-1])].append(number)
    found = {}
    for row in _rows(sorted(asked), _longest_packed(model)):
        numbers = [number for sequence, _ in row.paths for number in asked[sequence]]
        continuations = [requests[number][1] for number in numbers]
        lengths = [len(continuation) for continuation in continuations]
        paths = [path for sequence, path in row.paths for _ in asked[sequence]]
        at = [index for path, length in zip(paths, lengths, strict=True) for index in path[-length:]]
        at, target = torch.tensor([at, list(itertools.chain(*continuations))], device=model.device)
        keep, at = at.unique(return_inverse=True)
        logits = model(**row.inputs(model), use_cache=False, logits_to_keep=keep).logits[0]
        normalizer, likeliest = [], []
        for part in logits.split(CHUNK):
            part = part.float()
            normalizer.append(part.logsumexp(1))
            likeliest.append(part.argmax(1))
        values = (logits[at, target].float() - torch.cat(normalizer)[at]).cpu().split(lengths)
        greedy = (torch.cat(likeliest)[at] == target).cpu().split(lengths)
        for number, log_probs, hits in zip(numbers, values, greedy, strict=True):
            found[number] = (log_probs.sum().item(), hits.all().item())
    return [found[number] for number in range(len(requests))]
