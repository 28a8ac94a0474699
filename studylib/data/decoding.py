"""Fast decoding of many sequences of equal age: a cache that is written in place, attention without copies of it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

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
