"""Paired intervals over seeds, windows and items, their correction for many claims, what they can show."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
CELLS = 2**22  # resampled numbers held at once
LARGEST = 700.0  # logarithm of what is written of intervals that are wider than a float can say
LEVEL = 0.95
POWER = 0.8  # of the cases in which an effect as far from a bound as Interval.resolution is told from it


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval; `surely` is a wider one, by which one of several claims is judged."""

    estimate: float
    low: float
    high: float
    surely: tuple[float, float] | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """What a verdict rests on."""
        return self.surely or (self.low, self.high)

    @property
    def resolution(self) -> float:
        """How far above a bound an effect must lie for `bounds` to leave that bound out in POWER of all cases.

        The minimum detectable effect (Bloom 1995), in the estimate's unit: the lower side of `bounds`, beyond which
        half of the cases would be told, plus the normal quantile of POWER times the standard error, which is taken from
        the lower side of the interval as if estimates were normal. 0 where nothing varies.
        """
        error = (self.estimate - self.low) / _normal_quantile((1 + LEVEL) / 2)
        return float(self.estimate - self.bounds[0] + _normal_quantile(POWER) * error)

    def mapped(self, increasing: Callable[[float], float]) -> "Interval":
        """The interval of an increasing function of the estimate."""
        surely = self.surely and (increasing(self.surely[0]), increasing(self.surely[1]))
        return Interval(increasing(self.estimate), increasing(self.low), increasing(self.high), surely)

    def text(self, form: Callable[[float], str]) -> str:
        """As people read it, each number written by `form`: "26.7 [24.9, 28.6]"."""
        return f"{form(self.estimate)} [{form(self.low)}, {form(self.high)}]"


def _normal_quantile(share: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(share))


def perplexity(losses: Array, tokens: Array | None = None) -> Array:
    """exp of the mean loss (nats a token) over the last axis; infinite where it overflows. tokens: of each text, where
    they differ; then the nats of all texts over their tokens."""
    mean = np.mean(losses, axis=-1) if tokens is None else (losses * tokens).sum(-1) / tokens.sum(-1)
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(mean))


def stratified_mean(strata: ArrayLike) -> Callable[[Array], Array]:
    """A statistic over the last axis: the mean over strata of the mean inside each (every task weighs the same)."""
    masks = [np.asarray(strata) == label for label in np.unique(strata)]
    return lambda scores: np.mean([scores[..., mask].mean(-1) for mask in masks], axis=0)


def paired_bootstrap(
    statistic: Callable[..., Any],
    *samples: ArrayLike,
    strata: ArrayLike | None = None,
    draws: int = 10_000,
    family: int = 1,
    multiplies: bool = False,
) -> Interval:
    """Interval of statistic(*samples) over items, resampled jointly (Efron & Tibshirani 1993, section 13.3), and seeds.

    samples: scores of the same n items, [n] of one run or [S, n] of S seeds, the same S wherever it is above 1; strata:
    a label an item, items are resampled inside their stratum. statistic gets arrays [..., n], means over seeds, and
    reduces the last axis.
    Each side of the percentile interval is widened to what so few items and seeds can tell (see _widened). Where every
    score is 0 or 1, its standard errors are at least what one item more or less of each stratum changes: that none of
    40 differs does not say that none ever does (Agresti & Min 2005 count half an item more on either side).
    family: how many comparisons are judged beside each other; `surely` is then the interval at the level that
    Bonferroni leaves to each of them. multiplies: the statistic is positive and its errors multiply, as those of
    perplexities and their ratios do, so that it is widened on a log scale.
    Raises ValueError for samples that are empty, of unequal length or not finite.
    """
    arrays: list[Array] = [np.atleast_2d(np.asarray(sample, dtype=np.float64)) for sample in samples]
    n = arrays[0].shape[-1] if arrays else 0
    seeds = max((len(array) for array in arrays), default=1)
    if n == 0 or any(array.ndim > 2 or array.shape[1] != n or len(array) not in (1, seeds) for array in arrays):
        raise ValueError(
            f"samples: shapes {[np.shape(sample) for sample in samples]} are not allowed; use [n] or [seeds, n] of one "
            "n above 0 and one number of seeds"
        )
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("samples: they hold NaN or infinity; leave diverged runs out")
    labels = np.zeros(n, dtype=int) if strata is None else np.asarray(strata)
    if labels.shape != (n,):
        raise ValueError(f"strata: shape {labels.shape} is not allowed; use one label for each of the {n} items")
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    generator = np.random.default_rng(0)
    means, values, most = [array.mean(0) for array in arrays], [], max(1, CELLS // n)
    measured: Callable[..., Any] = (lambda *scores: np.log(statistic(*scores))) if multiplies else statistic
    for at in range(0, draws, most):
        rows = min(draws - at, most)
        index = np.empty((rows, n), dtype=np.intp)
        for group in groups:
            index[:, group] = group[generator.integers(len(group), size=(rows, len(group)))]
        values.append(measured(*(mean[index] for mean in means)))
    estimate = float(measured(*means))
    of_seeds = [float(measured(*(array[min(at, len(array) - 1)] for array in arrays))) for at in range(seeds)]
    z = _normal_quantile((1 + LEVEL) / 2)
    ends = np.quantile(np.concatenate(values), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    errors = np.maximum((estimate - ends) * [1, -1], 0) / z * np.sqrt(n / max(1, n - 1))
    if all(np.isin(array, (0, 1)).all() for array in arrays):
        errors = np.maximum(errors, _error_of_an_item(measured, means, groups))
    low, high = _widened(estimate, errors, LEVEL, n, of_seeds)
    surely = _widened(estimate, errors, 1 - (1 - LEVEL) / family, n, of_seeds) if family > 1 else None
    found = Interval(estimate, low, high, surely)
    return found.mapped(lambda x: math.exp(min(x, LARGEST))) if multiplies else found


def _error_of_an_item(statistic: Callable[..., Any], samples: Sequence[Array], groups: Sequence[Array]) -> float:
    """What the statistic changes by where one right answer of each group becomes wrong, or one wrong right: the root of
    the sum of squares, by the sample that changes it most."""
    estimate, changes = statistic(*samples), np.zeros((len(groups), len(samples)))
    for at, group in enumerate(groups):
        for number, sample in enumerate(samples):
            other = sample.copy()
            other[group[0]] += 1 if other[group[0]] < 0.5 else -1
            changes[at, number] = statistic(*samples[:number], other, *samples[number + 1 :]) - estimate
    return float(np.linalg.norm(np.abs(changes).max(1)))


def _widened(estimate: float, errors: Array, level: float, n: int, of_seeds: list[float]) -> tuple[float, float]:
    """The interval at `level`, of standard errors below and above, as wide as n items and len(of_seeds) seeds ask for.

    The errors are those of a percentile interval made good for its variance, too small by (n - 1) / n; Student's t
    takes the place of normal quantiles, as in the expanded percentile interval (Hesterberg 2015, section 3.2). The
    variance of the mean over seeds, of_seeds, is added to that over items, and t takes the degrees of freedom of the
    sum (Satterthwaite 1946). To resample two or three seeds instead, as the hierarchical bootstrap does, leaves out the
    true value in one case of four. Percentiles further out are not drawn: they rest on a few draws of thousands.
    """
    from scipy.special import stdtrit  # a third of a second, which importing this module need not take

    items, seeds = float(np.mean(errors)) ** 2, np.var(of_seeds, ddof=1) / len(of_seeds) if len(of_seeds) > 1 else 0.0
    if items + seeds == 0:
        return estimate, estimate
    free = (items + seeds) ** 2 / (items**2 / max(1, n - 1) + seeds**2 / max(1, len(of_seeds) - 1))
    below, above = stdtrit(free, (1 + level) / 2) * np.sqrt(errors**2 + seeds)
    return float(estimate - below), float(estimate + above)
