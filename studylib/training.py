"""What a training is given and what it leaves: the budget of every method, and the log."""

import itertools
import math
from dataclasses import dataclass

CURVE_PARTS = 4  # the held-out loss is measured before training and after each quarter of it


@dataclass(frozen=True)
class Budget:
    """Steps and optimizer of one training: AdamW, linear warm-up, cosine decay to zero.

    steps optimizer steps of `batch` examples each, at most `learning_rate`. warmup: the share of a part's steps in
    which the rate rises. extended_from: the step counts that this training stopped at before it was extended; at each
    of them the schedule starts again (warm restart: Loshchilov & Hutter 2017).
    """

    steps: int
    batch: int
    learning_rate: float
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    warmup: float = 0.0
    extended_from: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed; use 1 or more")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed; use a number above 0")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: {self.weight_decay!r} is not allowed; use 0 or more")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: {self.warmup!r} is not allowed; use a share from 0 to below 1")
        if any(end <= begin for begin, end in self.parts):
            raise ValueError(
                f"extended_from: {self.extended_from} is not allowed; use rising counts below steps {self.steps}"
            )

    @property
    def parts(self) -> list[tuple[int, int]]:
        """First and last step of each part that has a schedule of its own."""
        return list(itertools.pairwise((0, *self.extended_from, self.steps)))

    def rate(self, step: int) -> float:
        """The share of learning_rate at optimizer step `step` (from 0)."""
        begin, end = next((b, e) for b, e in self.parts if step < e or e == self.steps)
        warm = round(self.warmup * (end - begin))
        if step - begin < warm:
            return (step - begin + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - begin - warm) / (end - begin - warm))))

    def measured_at(self, step: int) -> bool:
        """Whether the held-out loss is measured after `step` steps: at the quarters of each of its parts."""
        return any(
            step == begin + round((end - begin) * part / CURVE_PARTS)
            for begin, end in self.parts
            for part in range(1, CURVE_PARTS + 1)
        )


@dataclass(frozen=True)
class Log:
    """What a training leaves: steps, one {"step", "loss", "learning_rate", "grad_norm"} each; curve, {"step", "tokens",
    "loss"} before training and at each quarter, on held-out text."""

    steps: list[dict[str, float]]
    curve: list[dict[str, float]]
