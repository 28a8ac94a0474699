"""Oracles: counting in plain Python, transformers' own logits and loss."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from studylib.data import models
from studylib.data.corpora import _pairs_and_fours, text_statistics
from studylib.evaluate.scores import window_losses


def counted(windows):
    """The counts of text_statistics by brute force, for a vocabulary of 320."""
    grams = {n: [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in windows] for n in (2, 4)}
    share = {n: len(Counter(gram for row in rows for gram in row)) / sum(map(len, rows)) for n, rows in grams.items()}
    return {
        "distinct_2": share[2],
        "distinct_4": share[4],
        "repetition": np.mean([1 - len(set(row)) / len(row) for row in grams[4]]),
        "vocabulary": len({token for row in windows for token in row}) / 320,
    }


@pytest.mark.parametrize("tokens", [2, 5, 319], ids=["two kinds", "five kinds", "many kinds"])
def test_counts_equal_brute_force(tokens, tiny_model):
    windows = torch.randint(tokens, (7, 23), generator=torch.Generator().manual_seed(tokens))
    found = text_statistics(tiny_model, windows)
    expected = counted(windows.tolist())
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


@given(hnp.arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(4, 9)), elements=st.integers(0, 2)))
def test_n_grams_have_equal_numbers_exactly_where_they_are_equal(windows):
    for n, numbers in zip((2, 4), _pairs_and_fours(torch.from_numpy(windows)), strict=True):
        grams = [tuple(row[i : i + n]) for row in windows for i in range(len(row) - n + 1)]
        assert len(set(zip(grams, numbers.flatten().tolist(), strict=True))) == len(set(grams)) == len(numbers.unique())


def test_constant_text(tiny_model):
    found = text_statistics(tiny_model, torch.full((3, 13), 7))
    assert (found["distinct_2"], found["distinct_4"]) == (1 / 36, 1 / 30)
    assert (found["repetition"], found["vocabulary"]) == (pytest.approx(0.9), 1 / 320)


def test_text_without_repetition(tiny_model):
    found = text_statistics(tiny_model, torch.arange(320).view(10, 32))
    assert (found["distinct_2"], found["distinct_4"], found["repetition"], found["vocabulary"]) == (1, 1, 0, 1)


def test_entropy_and_loss_of_a_model_that_knows_nothing(tiny_model):
    tiny_model.get_output_embeddings().weight.data.zero_()
    found = text_statistics(tiny_model, torch.arange(32).view(2, 16))
    assert found["entropy"] == pytest.approx(np.log(320), rel=1e-6)
    assert found["loss"] == pytest.approx(np.log(320), rel=1e-6)


@torch.no_grad()
def test_entropy_and_loss_equal_those_of_the_logits(fp32, tiny_model):
    tiny_model.get_output_embeddings().weight.data.mul_(20)  # far from uniform
    windows = torch.randint(320, (20, 300), generator=torch.Generator().manual_seed(0))  # longer than a chunk
    chosen = windows[[0, 5, 10, 15]]
    p = tiny_model(chosen).logits.double().softmax(-1)
    found = text_statistics(tiny_model, windows, limit=4)
    assert found["entropy"] == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-5)
    assert found["loss"] == pytest.approx(window_losses(tiny_model, chosen).mean(), rel=1e-5)


def test_the_limit_keeps_fewer_windows(fp32, tiny_model):
    windows = torch.randint(320, (3, 16), generator=torch.Generator().manual_seed(0))
    few, all_of_them = (text_statistics(tiny_model, windows, limit)["loss"] for limit in (1, 16))
    losses = window_losses(tiny_model, windows)
    assert few == pytest.approx(losses[0], rel=1e-5) and all_of_them == pytest.approx(losses.mean(), rel=1e-5)


def test_windows_without_a_4_gram_are_refused():
    with pytest.raises(ValueError, match="3 tokens a window"):
        text_statistics(models.load_model("tiny-random"), torch.zeros(2, 3, dtype=torch.long))
