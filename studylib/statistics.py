"""Paired bootstrap intervals over seeds, windows and items, their correction for many claims, what they can show."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

CELLS = 2**22  # resampled numbers held at once
POWER = 0.8  # of the cases in which an effect as far from a bound as Interval.resolution is told from it


@dataclass(frozen=True)
class Interval:
    """An estimate with its percentile interval; `surely` is a wider one, by which one of several claims is judged."""

    estimate: float
    low: float
    high: float
    level: float = 0.95
    surely: tuple[float, float] | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """What a verdict rests on."""
        return self.surely or (self.low, self.high)

    @property
    def resolution(self) -> float:
        """How far from a bound an effect must lie for `bounds` to leave that bound out in POWER of all cases.

        The minimum detectable effect (Bloom 1995), in the estimate's unit: half the width of `bounds`, beyond which
        half of the cases would be told, plus the normal quantile of POWER times the standard error, which is taken from
        the interval's own width as if estimates were normal. 0 where nothing varies.
        """
        low, high = self.bounds
        error = (self.high - self.low) / 2 / ndtri((1 + self.level) / 2)
        return float((high - low) / 2 + ndtri(POWER) * error)

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
    family: int = 1,
) -> Interval:
    """Percentile interval of statistic(*samples), resampling items jointly (Efron & Tibshirani 1993, section 13.3).

    samples: scores of the same n items, [n] of one run or [S, n] of S seeds, the same S wherever it is above 1; strata:
    a label an item, items are resampled inside their stratum. statistic gets arrays [..., n], means over seeds, and
    reduces the last axis. Where there are seeds, S - 1 of them are resampled jointly too: the hierarchical bootstrap
    (Davison & Hinkley 1997, section 3.8), where S of S would make the variance of a mean too small by (S - 1) / S.
    family: how many claims are judged beside each other; `surely` is then the interval at the level that Bonferroni
    leaves to each of them.
    Raises ValueError for samples that are empty, of unequal length or not finite, or a level outside 0..1.
    """
    arrays = [np.atleast_2d(np.asarray(sample, dtype=np.float64)) for sample in samples]
    n = arrays[0].shape[-1] if arrays else 0
    seeds = max((len(array) for array in arrays), default=1)
    if n == 0 or any(array.ndim > 2 or array.shape[1] != n or len(array) not in (1, seeds) for array in arrays):
        raise ValueError(
            f"samples: shapes {[np.shape(sample) for sample in samples]} are not allowed; use [n] or [seeds, n] of one "
            "n above 0 and one number of seeds"
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
    values, most = [], max(1, CELLS // (n * seeds))
    for at in range(0, draws, most):
        rows = min(draws - at, most)
        index = np.empty((rows, n), dtype=np.intp)
        for group in groups:
            index[:, group] = group[generator.integers(len(group), size=(rows, len(group)))]
        runs = generator.integers(seeds, size=(rows, seeds - 1)) if seeds > 1 else None
        values.append(statistic(*(_resampled(array, index, runs) for array in arrays)))
    drawn = np.concatenate(values)
    tails = [(1 - level) / 2, (1 + level) / 2]
    sure = [(1 - level) / 2 / family, 1 - (1 - level) / 2 / family]
    low, high, *surely = map(float, np.quantile(drawn, tails + sure))
    estimate = float(statistic(*(array.mean(0) for array in arrays)))
    return Interval(estimate, low, high, level, tuple(surely) if family > 1 else None)


def _resampled(array: np.ndarray, index: np.ndarray, runs: np.ndarray | None) -> np.ndarray:
    """array [S, n] -> [rows, n]: the items of `index` [rows, n], averaged over the seeds of `runs` [rows, S - 1]."""
    if len(array) == 1:
        return array[0][index]
    return array[runs[:, :, None], index[:, None, :]].mean(1)
