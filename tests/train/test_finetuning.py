"""Oracles: transformers' own loss on labels, training by hand."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from studylib.config.budgets import Instructions, Tuning
from studylib.config.settings import Adapter
from studylib.data.corpora import Pair, instruction_pairs
from studylib.data.prompts import conversation
from studylib.methods import attach
from studylib.train.finetuning import (
    BATCH_TOKENS,
    IGNORED,
    collate,
    encode,
    fine_tune,
    little_padded,
    random_order,
    response_loss,
    training_pairs,
)

PAIRS = [Pair(f"say {word}", word * 3) for word in ("ab", "cd", "efgh", "ij", "kl", "mnop")]
LEARN = Instructions(length=64)
BUDGET = Tuning(steps=6, batch=2, learning_rate=1e-2)


@pytest.fixture
def adapted(fp32, tiny_model):
    return attach(tiny_model, "lora", adapter=Adapter(rank=4))


def test_only_the_response_and_what_closes_it_is_learned(tiny_tokenizer):
    (row,) = encode(tiny_tokenizer, PAIRS[:1], 64)
    tokens, start = conversation(tiny_tokenizer, PAIRS[0])
    assert row["tokens"] == tokens
    assert row["labels"] == [IGNORED] * (start - 1) + tokens[start:] + [IGNORED]
    (cut,) = encode(tiny_tokenizer, PAIRS[:1], start + 2)
    assert [label for label in cut["labels"] if label != IGNORED] == tokens[start : start + 2]
    assert len(encode(tiny_tokenizer, [PAIRS[0], Pair("x" * 100, "y")], 64)) == 1
    with pytest.raises(ValueError, match="length: 4 tokens hold nothing of any response"):
        encode(tiny_tokenizer, PAIRS, 4)


@torch.no_grad()
def test_the_loss_is_that_of_transformers_and_padding_changes_nothing(fp32, tiny_model, tiny_tokenizer):
    rows = encode(tiny_tokenizer, PAIRS, 64)
    batch = collate(rows)
    longest = max(len(row["tokens"]) for row in rows)
    assert batch["tokens"].shape == batch["labels"].shape == (6, 8 * math.ceil(longest / 8))
    assert collate(rows, 50)["tokens"].shape[1] == 50 * math.ceil(longest / 50)
    logits = tiny_model(batch["tokens"]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(response_loss(tiny_model, **batch), expected)
    alone = [response_loss(tiny_model, **{name: torch.tensor([row[name]]) for name in row}) for row in rows]
    counts = torch.tensor([sum(label != IGNORED for label in row["labels"]) for row in rows])
    torch.testing.assert_close((torch.stack(alone) * counts).sum() / counts.sum(), expected)


def test_training_equals_a_hand_written_loop(adapted, tiny_tokenizer, tmp_path):
    by_hand = copy.deepcopy(adapted)
    log = fine_tune(adapted, tiny_tokenizer, PAIRS, LEARN, BUDGET, tmp_path / "c", held_out=PAIRS)
    rows = encode(tiny_tokenizer, PAIRS, LEARN.length)
    order = random_order([len(row["tokens"]) for row in rows], BUDGET.batch, LEARN.seed)
    parameters = [p for p in by_hand.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=BUDGET.learning_rate, weight_decay=0.0)
    for step in range(6):
        batch = collate([rows[order[(2 * step + i) % 6]] for i in range(2)])
        optimizer.param_groups[0]["lr"] = BUDGET.learning_rate * BUDGET.rate(step)
        optimizer.zero_grad()
        loss = response_loss(by_hand, **batch)
        loss.backward()
        assert log.steps[step]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    for (name, own), other in zip(adapted.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5, msg=name)
    with torch.no_grad():
        assert log.curve[-1]["loss"] == pytest.approx(response_loss(by_hand, **collate(rows)).item(), rel=1e-3)
    assert log.curve[-1]["loss"] < log.curve[0]["loss"] and len(log.curve) == 5
    shortest_first = sorted(rows, key=lambda row: len(row["tokens"]))
    with torch.no_grad():
        alone = [response_loss(by_hand, **collate([row])).item() for row in shortest_first]
    pairs = log.curve[-1]["pairs"]
    assert pairs["tokens"] == [sum(label != IGNORED for label in row["labels"]) for row in shortest_first]
    assert pairs["loss"] == pytest.approx(alone, rel=1e-3)
    assert np.average(pairs["loss"], weights=pairs["tokens"]) == pytest.approx(log.curve[-1]["loss"], rel=1e-9)


def test_a_random_order_pads_little_and_prefers_no_length():
    lengths = torch.randint(20, 256, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    order = random_order(lengths, 2, seed=1)
    assert sorted(order) == list(range(4000)) and order != random_order(lengths, 2, seed=2)

    def padding(order):
        pairs = [(lengths[a], lengths[b]) for a, b in zip(order[::2], order[1::2], strict=True)]
        return sum(abs(a - b) for a, b in pairs)

    assert padding(order) < 0.3 * padding(torch.randperm(4000).tolist())
    begun = [np.mean([lengths[i] for i in random_order(lengths, 2, seed)[:48]]) for seed in range(200)]
    assert np.mean(begun) == pytest.approx(np.mean(lengths), abs=4 * np.std(begun) / 200**0.5)


def test_what_is_measured_is_little_padded_and_complete():
    lengths = [60, 64, 250, 256]
    assert little_padded(lengths, 8) == [slice(0, 2), slice(2, 4)]
    assert little_padded([30, 31, 40], 8) == [slice(0, 3)] and little_padded([5] * 20, 8)[-1].stop == 20
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = sorted(rng.integers(2, 300, 7).tolist())
        cuts = [
            [at for at in range(1, 7) if choice >> (at - 1) & 1] for choice in range(2**6)
        ]  # all ways to cut seven rows
        costs = [
            sum(BATCH_TOKENS + (b - a) * lengths[b - 1] for a, b in itertools.pairwise([0, *cut, 7]))
            for cut in cuts
            if all(b - a <= 4 for a, b in itertools.pairwise([0, *cut, 7]))
        ]
        found = little_padded(lengths, 4)
        assert [row for rows in found for row in range(7)[rows]] == list(range(7))
        assert min(costs) == sum(BATCH_TOKENS + (s.stop - s.start) * lengths[s.stop - 1] for s in found)


def test_checkpointing_changes_no_number(adapted, tiny_tokenizer, tmp_path):
    plain, checkpointed = adapted, copy.deepcopy(adapted)
    logs = [
        fine_tune(model, tiny_tokenizer, PAIRS, LEARN, budget, tmp_path / name)
        for name, model, budget in (
            ("plain", plain, BUDGET),
            ("checkpointed", checkpointed, dataclasses.replace(BUDGET, checkpointing=True)),
        )
    ]
    assert logs[0] == logs[1] and not checkpointed.is_gradient_checkpointing


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_some_rows_at_a_time_train_as_the_whole_batch_does(rows, adapted, tiny_tokenizer, tmp_path):
    """A batch's loss is a mean over its tokens, and its rows have more and fewer of them."""
    budget = dataclasses.replace(BUDGET, batch=4)
    apart, together = copy.deepcopy(adapted), adapted
    logs = [
        fine_tune(model, tiny_tokenizer, PAIRS, LEARN, budget, tmp_path / name, held_out=PAIRS, rows=given)
        for name, model, given in (("apart", apart, rows), ("together", together, None))
    ]
    for name in ("loss", "grad_norm"):
        own, whole = ([step[name] for step in log.steps] for log in logs)
        assert own == pytest.approx(whole, rel=1e-4) and len(own) == budget.steps
    for own, whole in zip(apart.parameters(), together.parameters(), strict=True):
        assert torch.allclose(own, whole, atol=budget.learning_rate * 0.02)


def test_what_cannot_be_trained_is_refused(tiny_model, tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="attach an adapter first"):
        fine_tune(tiny_model.requires_grad_(False), tiny_tokenizer, PAIRS, LEARN, BUDGET, tmp_path)
    with pytest.raises(ValueError, match="instructions: 'dolly' is not known"):
        Instructions("dolly")
    with pytest.raises(ValueError, match="length: 1 is not allowed"):
        Instructions(length=1)


def test_validation_pairs_are_never_trained_on():
    training, validation = training_pairs("alpaca")
    held_out = instruction_pairs("evaluation")
    assert len(validation) == 8 and len(training) == 492 - 8
    assert not set(training) & set(validation) and not set(held_out) & {*training, *validation}


def test_too_few_pairs_are_refused(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(f'{{"instruction": "q{i}", "output": "a{i}"}}' for i in range(16)))
    with pytest.raises(ValueError, match=r"instructions '.*few\.jsonl': 8 pairs for training are too few; 8 are kept"):
        training_pairs(str(path))
