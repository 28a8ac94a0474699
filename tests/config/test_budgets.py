"""Text, training, fine-tuning, evaluation: schedules, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from studylib.config.budgets import (
    Budget,
    Decoding,
    Evaluation,
    Instructions,
    RealText,
    Sampling,
    Training,
    Tuning,
    check_tasks,
    profile,
    split_loss,
)

BUDGET = Budget(steps=8, batch=2, learning_rate=1e-2)


def test_the_rate_rises_and_falls():
    warm = dataclasses.replace(BUDGET, steps=20, warmup=0.2)
    rates = [warm.rate(step) for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and rates[-1] == 0
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([nn.Parameter(torch.ones(1))], 1.0), 16)
    for rate in rates[4:]:
        assert rate == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        reference.optimizer.step()
        reference.step()
    extended = dataclasses.replace(warm, steps=30, extended_from=(20,))
    assert [extended.rate(step) for step in (19, 20, 22)] == pytest.approx([rates[19], 1 / 3, 1.0])


def test_a_constant_schedule_rises_as_the_other_and_stays():
    constant = dataclasses.replace(BUDGET, steps=20, warmup=0.2, schedule="constant")
    assert [constant.rate(step) for step in range(20)] == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 16)
    assert (
        dataclasses.replace(constant, warmup=0.0).rate(0) == dataclasses.replace(constant, warmup=0.0).rate(19) == 1.0
    )
    extended = dataclasses.replace(constant, steps=30, extended_from=(20,))
    assert [extended.rate(step) for step in (19, 20, 21, 22)] == pytest.approx([1.0, 1 / 3, 2 / 3, 1.0])


def test_the_held_out_loss_is_measured_at_the_quarters_of_each_part():
    assert [step for step in range(1, 9) if BUDGET.measured_at(step)] == [2, 4, 6, 8]
    extended = dataclasses.replace(BUDGET, steps=12, extended_from=(8,))
    assert extended.parts == [(0, 8), (8, 12)]
    assert [step for step in range(1, 13) if extended.measured_at(step)] == [2, 4, 6, 8, 9, 10, 11, 12]


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm: 0.0"),
        ({"weight_decay": -0.1}, "weight_decay: -0.1"),
        ({"warmup": 1.0}, "warmup: 1.0"),
        ({"grid_rate": 1.0}, "grid_rate: 1.0 is not allowed; use a share from 0 to below 1"),
        ({"grid_rate": -0.1}, "grid_rate: -0.1 is not allowed"),
        ({"grid_rate": "1e-3"}, "grid_rate: '1e-3' is not allowed"),
        ({"schedule": "linear"}, "schedule: 'linear' is not known; use one of cosine, constant"),
        ({"extended_from": (4, 4)}, r"extended_from: \(4, 4\) is not allowed"),
    ],
)
def test_bad_budgets_name_the_value(bad, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(BUDGET, **bad)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 0}, "tokens: 0 is not allowed; use a whole number from 1 to 1048576"),
        ({"shapes": ("llama-9b",)}, "shape: 'llama-9b' is not known; use one of llama-7b, llama-13b"),
    ],
)
def test_what_cannot_be_timed_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**fields)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (
            lambda: dataclasses.replace(BUDGET, steps=0),
            "steps: 0 is not allowed; use a whole number from 1",
        ),
        (lambda: dataclasses.replace(BUDGET, learning_rate=0), "learning_rate: 0 is not allowed; use a number above 0"),
        (
            lambda: Training(1, 1, 1.0, loss="kl+mse"),
            r"loss: 'mse' in 'kl\+mse' is not known; join parts of labels, kl",
        ),
        (lambda: Training(1, 1, 1.0, loss="kl+labels"), r"loss: 'kl\+labels' is not allowed; name one of labels"),
        (lambda: Training(1, 1, 1.0, loss="kl+kl"), r"loss: 'kl\+kl' is not allowed"),
        (lambda: Training(1, 1, 1.0, loss="labels", temperature=2.0), "temperature: 2.0 has no meaning for the loss"),
        (lambda: Training(1, 1, 1.0, temperature=0), "temperature: 0 is not allowed"),
        (lambda: Training(1, 1, 1.0, scale="sum"), "scale: 'sum' is not known; use one of token, batchmean"),
        (lambda: Training(1, 1, 1.0, masters="fp16"), "masters: 'fp16' is not known; use one of fp32, bf16"),
        (lambda: Tuning(0, 1, 1.0), "steps: 0"),
        (lambda: Sampling(4, 8, "beam"), "strategy: 'beam' is not known; use one of greedy"),
        (lambda: Sampling(4, 8, "greedy", top_k=5), "top_k: 5 has no effect on 'greedy'; leave it out"),
        (lambda: Sampling(4, 1), "length: 1 is not allowed; use a whole number from 2 to"),
        (lambda: Sampling(4, 8, temperature=0.0), "temperature: 0.0 is not allowed"),
        (
            lambda: RealText("pile", 1, 8),
            "corpus: 'pile' is not known; use one of wikipedia, c4, or the path of a .txt",
        ),
        (lambda: RealText("c4", 0, 8), "count: 0 is not allowed"),
        (lambda: Instructions("dolly"), "instructions: 'dolly' is not known; use alpaca, or the path of a .json"),
        (lambda: Instructions(length=1), "length: 1 is not allowed"),
        (lambda: Evaluation(("c4",), 1, 8, ("squad",)), "task: 'squad' is not known; use one of boolq, piqa"),
        (lambda: Evaluation(("c4",), 1, 8, items=0), "items: 0 is not allowed"),
        (lambda: Evaluation(("c4",), 1, 8, source="web"), "source: 'web' is not known; use one of archive, hub"),
        (lambda: check_tasks(["piqa", "squad"]), "task: 'squad' is not known"),
        (lambda: Decoding(context=0), "context: 0 is not allowed"),
    ],
)
def test_what_makes_no_sense_is_one_line(make, named):
    with pytest.raises(ValueError, match=named) as caught:
        make()
    assert "\n" not in str(caught.value)


NAN, INF, HUGE = float("nan"), float("inf"), 10**400


@pytest.mark.parametrize("value", [NAN, INF, -INF, True, None, "4", HUGE, -1, [4], np.ones(2)])
@pytest.mark.parametrize("name", ["count", "length", "top_k", "temperature", "seed", "batch"])
def test_numbers_of_a_sampling_are_numbers(name, value):
    refused(lambda: Sampling(**{"count": 4, "length": 8} | {name: value}))


@pytest.mark.parametrize("value", [NAN, INF, True, "4", HUGE, -1, [4]])
@pytest.mark.parametrize(
    "name", ["steps", "batch", "learning_rate", "max_grad_norm", "weight_decay", "warmup", "mask", "temperature"]
)
def test_numbers_of_a_training_are_numbers(name, value):
    refused(lambda: Training(**{"steps": 4, "batch": 2, "learning_rate": 0.1} | {name: value}))


def refused(make):
    with pytest.raises(ValueError, match=r"is not allowed|is not known|is there twice") as caught:
        make()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "make",
    [
        lambda: Evaluation(("c4",), 2.0, 8),
        lambda: Evaluation(("c4",), np.int64(2), 8),
        lambda: Sampling(4, 8, top_k=50.0),
        lambda: Sampling(4, 8, seed=2**32),
        lambda: RealText("c4", 4, 8, seed=-1),
        lambda: RealText("own\n.txt", 4, 8),
        lambda: RealText(3, 4, 8),
        lambda: Instructions(seed=2**32),
        lambda: Instructions(length=10**9),
        lambda: Budget(4, 2, 0.1, extended_from=(2.0,)),
        lambda: Budget(4, 2, 0.1, extended_from=[2]),
        lambda: Training(4, 2, 0.1, loss="attention+kl"),
        lambda: Training(4, 2, 0.1, loss=None),
        lambda: Tuning(4, 2, 0.1, paged="false"),
        lambda: Evaluation(["c4"], 1, 8),
        lambda: Evaluation(("c4", "c4"), 1, 8),
        lambda: Evaluation(("c4",), 1, 8, ("piqa", "piqa")),
        lambda: Decoding(rounds=2.0),
        lambda: Decoding(shapes=("llama-7b", "llama-7b")),
        lambda: dataclasses.replace(profile("smoke"), seeds=()),
        lambda: dataclasses.replace(profile("smoke"), seeds=(0, 0)),
        lambda: dataclasses.replace(profile("smoke"), group=0),
        lambda: dataclasses.replace(profile("smoke"), training=Tuning(4, 2, 0.1)),
        lambda: profile("smoke").extended(True),
        lambda: profile(["smoke"]),
    ],
)
def test_what_json_could_not_hold_or_no_generator_takes_is_one_line(make):
    refused(make)


@given(
    st.integers(1, 10**7),
    st.integers(2, 2**20),
    st.integers(0, 10**7),
    st.floats(0.01, 100),
    st.integers(0, 2**32 - 1),
)
def test_what_is_allowed_is_written_and_read_back(count, length, top_k, temperature, seed):
    made = Sampling(count, length, "sampled", top_k, temperature, seed)
    assert Sampling(**json.loads(json.dumps(dataclasses.asdict(made), allow_nan=False))) == made


def test_files_are_named_and_not_looked_for():
    assert RealText("/nowhere/a.txt", 1, 8).corpus == Evaluation(("/nowhere/a.txt",), 1, 8).corpora[0]
    assert Instructions("/nowhere/own.jsonl").source == "/nowhere/own.jsonl"


def test_a_loss_is_its_parts():
    assert split_loss("kl") == ("kl", ()) and split_loss("hidden") == (None, ("hidden",))
    assert split_loss("hidden+reverse-kl+attention") == ("reverse-kl", ("attention", "hidden"))
    assert Training(1, 1, 1.0).needs_teacher_states and not Training(1, 1, 1.0, loss="labels").needs_teacher_states
    assert Training(1, 1, 1.0, loss="labels+hidden").features == ("hidden",)
    assert Training(1, 1, 1.0, loss="kl+raw-hidden").features == ("raw-hidden",)
    with pytest.raises(ValueError, match="write 'kl\\+raw-hidden'"):
        Training(1, 1, 1.0, loss="raw-hidden+kl")
