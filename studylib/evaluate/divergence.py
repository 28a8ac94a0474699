"""How far a model's predictions lie from those of full precision: KL divergence on the same windows."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from studylib.data import autocast
from studylib.train import keep_teacher_states

WINDOWS = 4  # of a batch, for full precision and what is held against it alike: other batches round otherwise
ROWS = 16  # tokens whose fp32 logits are held at once: these stay in a core's cache


class _Kept(nn.Module):
    """Stands in for a decoder: its last hidden states are there already."""

    states: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.states)


class FullPrecision:
    """The predictions of a model in full precision for token windows [N, T] of several corpora, computed again from the
    last hidden states that are kept in files (see train.keep_teacher_states).

    model: as it was loaded; what comes after its decoder (an output matrix, a scale, soft-capping) is copied, so that
    the model may be changed afterwards. files: where the states of each corpus are kept, or written to.
    """

    def __init__(self, model: PreTrainedModel, windows: dict[str, Tensor], files: dict[str, Path]):
        self.states = {
            corpus: keep_teacher_states(model.eval(), own, files[corpus], WINDOWS) for corpus, own in windows.items()
        }
        decoder, self.decoder = model.base_model, _Kept()
        self.rest = copy.copy(model)
        self.rest._modules = {
            name: self.decoder if module is decoder else copy.deepcopy(module)
            for name, module in model._modules.items()
        }

    @torch.no_grad()
    def logits(self, corpus: str, at: int, tokens: Tensor) -> Tensor:
        """Of the windows `tokens` [B, T], the corpus's from number `at` on: [B, T, V]."""
        self.rest.to(tokens.device)  # the student may have left for the processor, where its kernel is
        self.decoder.states = torch.from_numpy(self.states[corpus][at : at + len(tokens)].copy()).to(tokens.device)
        with autocast(tokens.device):
            # forward itself: hooks that count tokens are the model's
            return self.rest.forward(input_ids=tokens, use_cache=False).logits


def divergence(full: Tensor, own: Tensor) -> Tensor:
    """KL(full || own) in nats of each row of logits [N, V], with softmax in fp32: [N]. 0 where both are equal."""
    found = []
    for given, changed in zip(full.split(ROWS), own.split(ROWS), strict=True):
        log_p = given.float().log_softmax(1)
        found.append((log_p.exp() * log_p.sub(changed.float().log_softmax(1))).sum(1))
    return torch.cat(found)


def mean_divergence(full: FullPrecision, corpus: str, at: int, tokens: Tensor, logits: Tensor) -> np.ndarray:
    """For each window of `tokens` [B, T], the mean over the tokens after the first of KL(full || own), where `logits`
    [B * (T - 1), V] are the model's own: [B] float64."""
    given = full.logits(corpus, at, tokens)[:, :-1].flatten(0, 1)
    return divergence(given, logits).double().view(len(tokens), -1).mean(1).cpu().numpy()
