"""What a training leaves."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Log:
    """What a training leaves: steps, one {"step", "loss", "learning_rate", "grad_norm"} each; curve, {"step", "tokens",
    "loss"} before training and at each quarter, on held-out text."""

    steps: list[dict[str, float]]
    curve: list[dict[str, float]]
