"""Oracle: transformers' own cache and attention."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, MistralConfig, Qwen2Config

from studylib.data import generation as decoding
from studylib.data import models
from studylib.data.generation import decoding_cache, fill_holes


def logits_of_steps(model, tokens, cache, keep=None):
    found = []
    for t in range(tokens.shape[1]):
        found.append(model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits[:, 0])
        if keep is not None and t == tokens.shape[1] // 2:
            cache.batch_select_indices(keep)
            tokens = tokens[keep]
    return found


@pytest.mark.parametrize(
    "config",
    [LlamaConfig, Qwen2Config, functools.partial(MistralConfig, sliding_window=6)],
    ids=["llama", "qwen2", "sliding-window"],
)
@pytest.mark.parametrize("keep", [None, [True, False, False, True, True]], ids=["all rows", "rows that end"])
@torch.no_grad()
def test_steps_equal_transformers_own(config, keep, shape, monkeypatch):
    monkeypatch.setattr(decoding, "BLOCK", 5)  # the buffers grow twice, before and after rows are dropped
    torch.manual_seed(0)
    config = config(**shape)
    model = models.skeleton(config).eval()
    tokens = torch.randint(1, 320, (5, 12))
    order = None if keep is None else fill_holes(torch.tensor(keep))
    expected = logits_of_steps(model, tokens, DynamicCache(config=config), order)
    with decoding_cache(model, 12, torch.float32) as cache:
        assert model.config._attn_implementation != "sdpa"
        found = logits_of_steps(model, tokens, cache, order)
    assert model.config._attn_implementation == "sdpa"
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_several_tokens_at_once_then_one(tiny_model):
    tokens = torch.randint(1, 320, (2, 10))
    with decoding_cache(tiny_model, 10, torch.float32) as cache:
        first = tiny_model(tokens[:, :9], past_key_values=cache, use_cache=True).logits
        last = tiny_model(tokens[:, 9:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first, last], 1), tiny_model(tokens).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_other_kinds_of_attention_stay(tiny_model):
    tokens = torch.randint(1, 320, (2, 10))
    tiny_model.set_attn_implementation("eager")
    with decoding_cache(tiny_model, 10, torch.float32) as cache:
        assert tiny_model.config._attn_implementation == "eager"
        found = torch.stack(logits_of_steps(tiny_model, tokens, cache), 1)
    torch.testing.assert_close(found, tiny_model(tokens).logits, rtol=1e-4, atol=1e-5)


@given(st.lists(st.booleans(), min_size=1, max_size=30).filter(any))
def test_holes_are_filled_with_the_fewest_moves(keep):
    order = fill_holes(torch.tensor(keep)).tolist()
    assert sorted(order) == [row for row, kept in enumerate(keep) if kept]
    stay = [row for row in range(len(order)) if keep[row]]
    assert all(order[row] == row for row in stay)
