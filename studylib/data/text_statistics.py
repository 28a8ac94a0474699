"""What a set of training text is like: how sure the model is of it, how varied it is, how much it repeats itself."""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from studylib.data.corpora import evenly_spaced
from studylib.data.models import autocast

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
