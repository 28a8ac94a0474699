"""Named budgets that arms are built from (methods.arms): how much data, training and evaluation a method may spend."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from studylib.config.budgets import ZERO_SHOT, Decoding, Evaluation, Instructions, Sampling, Training, Tuning
from studylib.config.settings import DEFAULT_GROUP

DECODING = Decoding(shapes=("llama-7b",))  # L4Q's own model beside the study's


@dataclass(frozen=True)
class Profile:
    """A budget: the data and training a method may spend, what every arm is scored on, and the seeds that make the
    interval over runs. few_shot: tasks that the headline settings are scored on as well. group: weights that share a
    scale where a method needs such groups."""

    sampling: Sampling
    training: Training
    instructions: Instructions
    tuning: Tuning
    evaluation: Evaluation
    seeds: tuple[int, ...]
    few_shot: tuple[str, ...] = ()
    group: int = DEFAULT_GROUP
    decoding: Decoding = DECODING

    def extended(self, steps: int) -> "Profile":
        """This budget with `steps` more for every training, which goes on from where it ended."""
        if steps == 0:
            return self
        if steps < 0:
            raise ValueError(f"extend: {steps} is not allowed; use 0 or more")
        longer: dict[str, Any] = {
            name: dataclasses.replace(own, steps=own.steps + steps, extended_from=(*own.extended_from, own.steps))
            for name, own in (("training", self.training), ("tuning", self.tuning))
        }
        return dataclasses.replace(self, **longer)


PROFILES = {
    "smoke": Profile(
        Sampling(count=8, length=32, batch=4),
        Training(steps=4, batch=2, learning_rate=1e-3),
        Instructions(length=128),
        Tuning(steps=4, batch=2, learning_rate=1e-3, weight_decay=0.01, warmup=0.1),
        Evaluation(("wikipedia", "c4"), windows=4, length=64, tasks=("openbookqa",), items=4, pairs=2),
        seeds=(0,),
        group=32,
        decoding=Decoding(context=4, tokens=2, rounds=4),
    ),
    "quick": Profile(
        Sampling(count=32, length=256, batch=64),
        Training(steps=32, batch=1, learning_rate=3e-4),
        Instructions(length=256),
        Tuning(steps=24, batch=2, learning_rate=1e-3, weight_decay=0.01, warmup=0.1),
        Evaluation(("wikipedia", "c4"), windows=16, length=256, tasks=("arc_easy",), items=40, pairs=16),
        seeds=(0,),
    ),
    "full": Profile(
        Sampling(count=4096, length=512, batch=128),
        Training(steps=512, batch=8, learning_rate=1e-4),
        Instructions(length=512),
        Tuning(steps=195, batch=32, learning_rate=5e-4, weight_decay=0.01, warmup=0.1),
        Evaluation(("wikipedia", "c4"), windows=128, length=512, tasks=ZERO_SHOT, items=1000, pairs=480),
        seeds=(0, 1, 2),
        few_shot=("mmlu", "triviaqa"),
    ),
    "paper": Profile(
        Sampling(count=96_000, length=2048, batch=256),
        Training(steps=12_000, batch=8, learning_rate=2e-5),
        Instructions(length=2048),
        Tuning(steps=195, batch=128, learning_rate=2e-4, weight_decay=0.01, warmup=0.1),
        Evaluation(("wikipedia", "c4"), windows=32, length=2048, tasks=ZERO_SHOT, items=None, pairs=480),
        seeds=(0, 1, 2),
        few_shot=("mmlu", "triviaqa"),
    ),
}


def profile(name: str) -> Profile:
    """The named budget; ValueError with the names there are."""
    if name not in PROFILES:
        raise ValueError(f"profile: {name!r} is not known; use one of {', '.join(PROFILES)}")
    return PROFILES[name]
