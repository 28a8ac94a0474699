"""Fast decoding of many sequences of equal age: a cache that is written in place, attention without copies of it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "studylib_decoding"


class _InPlaceLayer(DynamicLayer):
    """Keys and values [B, H, T, D] in a buffer of the final size: a step writes one column and copies nothing."""

    def __init__(self, capacity: int, dtype: torch.dtype):
        super().__init__()
        self.capacity, self.buffer_dtype, self.length = capacity, dtype, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.buffers = [
            x.new_empty(*x.shape[:2], self.capacity, x.shape[3], dtype=self.buffer_dtype)
            for x in (key_states, value_states)
        ]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, self.length = self.length, self.length + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, before : self.length] = states
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows. Only rows that change their place are copied: see `fill_holes`."""
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        for buffer in self.buffers:
            buffer[moved] = buffer[indices[moved]]
        self.buffers = [buffer[: len(indices)] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)


def new_cache(model: PreTrainedModel, capacity: int, dtype: torch.dtype) -> DynamicCache:
    """A cache for `capacity` tokens a sequence; layers that attend to a sliding window keep transformers' own kind."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_InPlaceLayer(capacity, dtype) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def fill_holes(keep: Tensor) -> Tensor:
    """An order of the rows to keep ([B] bool) in which the fewest change place: holes are filled from the end.

    Worked: keep rows 0, 2, 3 of 4 -> (0, 3, 2).
    """
    rows = torch.arange(int(keep.sum()), device=keep.device)
    rows[~keep[: len(rows)]] = keep[len(rows) :].nonzero()[:, 0].flip(0) + len(rows)
    return rows


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings
) -> tuple[Tensor, None]:
    """Grouped attention of a single new token: query [B, H, 1, D], key and value [B, H / groups, T, D], none repeated.

    Anything longer goes to transformers' own scaled dot-product attention.
    """
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    scale = settings.get("scaling") or query.shape[-1] ** -0.5
    grouped = (query * scale).to(key.dtype).unflatten(1, (key.shape[1], -1)).squeeze(3)  # (B, Hkv, groups, D)
    scores = grouped @ key.transpose(-1, -2)  # (B, Hkv, groups, T)
    if attention_mask is not None:  # (B, 1, 1, T)
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    mixed = scores.float().softmax(-1).to(value.dtype) @ value  # (B, Hkv, groups, D)
    return mixed.flatten(1, 2)[:, None], None  # (B, 1, H, D)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextlib.contextmanager
def fast_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model` attends as above, if it used scaled dot-product attention; other kinds stay as they are."""
    before = model.config._attn_implementation
    if before != "sdpa":
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
