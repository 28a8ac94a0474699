"""Paired bootstrap intervals over windows and items."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

CELLS = 2**22  # resampled numbers held at once


@dataclass(frozen=True)
class Interval:
    """An estimate with its percentile interval."""

    estimate: float
    low: float
    high: float
    level: float = 0.95

    def text(self, form: Callable[[float], str]) -> str:
        """As people read it, each number written by `form`: "26.7 [24.9, 28.6]"."""
        return f"{form(self.estimate)} [{form(self.low)}, {form(self.high)}]"


def perplexity(losses: np.ndarray) -> np.ndarray:
    """exp of the mean loss (nats) over the last axis; infinite where it overflows."""
    with np.errstate(over="ignore"):
        return np.exp(np.mean(losses, axis=-1))


def stratified_mean(strata: ArrayLike) -> Callable[[np.ndarray], np.ndarray]:
    """A statistic over the last axis: the mean over strata of the mean inside each (every task weighs the same)."""
    masks = [np.asarray(strata) == label for label in np.unique(strata)]
    return lambda scores: np.mean([scores[..., mask].mean(-1) for mask in masks], axis=0)


def paired_bootstrap(
    statistic: Callable[..., np.ndarray],
    *samples: ArrayLike,
    strata: ArrayLike | None = None,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of statistic(*samples), resampling items jointly (Efron & Tibshirani 1993, section 13.3).

    samples: 1-D arrays of equal length n, scores of the same items; strata: a label an item, items are resampled inside
    their stratum. statistic gets arrays [..., n] and reduces the last axis.
    Raises ValueError for samples that are empty, of unequal length or not finite, or a level outside 0..1.
    """
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    n = len(arrays[0]) if arrays else 0
    if n == 0 or any(array.shape != (n,) for array in arrays):
        raise ValueError(
            f"samples: shapes {[array.shape for array in arrays]} are not allowed; use 1-D arrays of one length above 0"
        )
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("samples: they hold NaN or infinity; leave diverged runs out")
    if not 0 < level < 1:
        raise ValueError(f"level: {level!r} is not allowed; use a number between 0 and 1")
    labels = np.zeros(n, dtype=int) if strata is None else np.asarray(strata)
    if labels.shape != (n,):
        raise ValueError(f"strata: shape {labels.shape} is not allowed; use one label for each of the {n} items")
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    generator = np.random.default_rng(seed)
    values = []
    for at in range(0, draws, max(1, CELLS // n)):
        rows = min(draws - at, max(1, CELLS // n))
        index = np.empty((rows, n), dtype=np.intp)
        for group in groups:
            index[:, group] = group[generator.integers(len(group), size=(rows, len(group)))]
        values.append(statistic(*(array[index] for array in arrays)))
    low, high = np.quantile(np.concatenate(values), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(*arrays)), float(low), float(high), level)
