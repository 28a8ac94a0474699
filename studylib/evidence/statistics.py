"""Paired intervals over seeds, windows and items, and what they can show."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
MANY = 1e4  # degrees of freedom at which Student's t is the normal distribution
CELLS = 2**22  # resampled numbers held at once
LARGEST = 700.0  # logarithm of what is written of intervals that are wider than a float can say
LEVEL = 0.95
POWER = 0.8  # of the cases in which an effect as large as Interval.detectable is told from the bound


@dataclass(frozen=True)
class Scale:
    """How numbers are compared: `to` takes one to where its errors add up, `back` takes it back."""

    to: Callable[[float], float]
    back: Callable[[float], float]


PLAIN = Scale(float, float)
POSITIVE = Scale(float, lambda x: max(x, 0.0))  # what is never below 0, and has no interval there
PERCENT = Scale(float, lambda x: min(max(x, 0.0), 100.0))
RATIO = Scale(math.log, lambda x: math.exp(min(x, LARGEST)))  # perplexities and their ratios, whose errors multiply
EXCESS = Scale(math.log1p, lambda x: math.expm1(min(x, LARGEST)))  # what a ratio is above 1


@dataclass(frozen=True)
class Interval:
    """An estimate that errs: `middle`, its standard errors below and above, and their degrees of freedom, on `scale`.

    One that was counted or planned has no errors; where nothing is known of them, they are infinite. kinds: what was
    run with seeds and is part of it (measures.Cell.kind). items, runs: the variance over items and that between runs,
    of which the errors are made, each with its degrees of freedom.
    """

    middle: float
    errors: tuple[float, float] = (0.0, 0.0)
    free: float = math.inf
    scale: Scale = PLAIN
    kinds: frozenset[str] = frozenset()
    items: tuple[float, float] = (0.0, math.inf)
    runs: tuple[float, float] = (0.0, math.inf)

    @property
    def estimate(self) -> float:
        return self.scale.back(self.middle)

    def bounds(self, rate: float) -> tuple[float, float]:
        """What the true value lies above, and what it lies below: each is wrong in a share `rate` of cases."""
        if not any(self.errors):
            return self.estimate, self.estimate
        below, above = (self.quantile(rate) * error for error in self.errors)
        return self.scale.back(self.middle - below), self.scale.back(self.middle + above)

    def quantile(self, rate: float) -> float:
        """How many standard errors a bound that is wrong in a share `rate` of cases lies from the estimate."""
        return _students_quantile(self.free, 1 - rate)

    @property
    def low(self) -> float:
        """Of the 95% interval."""
        return self.bounds((1 - LEVEL) / 2)[0]

    @property
    def high(self) -> float:
        return self.bounds((1 - LEVEL) / 2)[1]

    def detectable(self, bound: float, rate: float) -> float:
        """The smallest true value whose lower bound at `rate` lies above `bound` in POWER of all cases.

        The minimum detectable effect (Bloom 1995), by the noncentral t distribution of what is told, on the scale on
        which errors add up. `bound` itself where nothing varies.
        """
        if not any(self.errors):
            return bound
        quantile = _students_quantile(self.free, 1 - rate)
        return self.scale.back(self.scale.to(bound) + _noncentrality(self.free, quantile) * self.errors[0])

    def with_runs(self, share: float, free: float) -> "Interval":
        """What is to be expected of it where so many more runs were made that the variance between them is this share
        of what it is, on at least `free` degrees of freedom."""
        variance, known = self.runs
        below, above = (math.sqrt(max(0.0, error**2 - (1 - share) * variance)) for error in self.errors)
        runs = share * variance, max(known, free)
        return replace(self, errors=(below, above), free=freedom(self.items, runs), runs=runs)

    def chance_between(self, low: float, high: float, then: "Interval") -> float:
        """The chance that the estimate, on its scale, will lie between two values when the errors have become those of
        `then`.

        The estimate then is this one and what the further runs move it by: Student's t, of these degrees of freedom,
        times the root of what the variance loses (predictive power: Spiegelhalter, Freedman & Blackburn 1986).
        """
        if low >= high:
            return 0.0
        now, later = (float(np.mean(np.square(own.errors))) for own in (self, then))
        moves = math.sqrt(max(0.0, now - later))
        if moves == 0:
            return float(low < self.middle < high)
        return _students_share(self.free, (high - self.middle) / moves) - _students_share(
            self.free, (low - self.middle) / moves
        )

    def on(self, scale: Scale) -> "Interval":
        """The same, written otherwise: a ratio as what it is above 1."""
        return replace(self, scale=scale)

    def text(self, form: Callable[[float], str]) -> str:
        """As people read it, each number written by `form`: "26.7 [24.9, 28.6]"; without what is not known."""
        if math.inf in self.errors:
            return form(self.estimate)
        return f"{form(self.estimate)} [{form(self.low)}, {form(self.high)}]"


@functools.cache
def _students_quantile(free: float, share: float) -> float:
    from scipy.special import stdtrit  # a third of a second, which importing this module need not take

    return float(stdtrit(free, share)) if math.isfinite(free) else _normal_quantile(share)


def _students_share(free: float, value: float) -> float:
    """How much of the t distribution lies below."""
    from scipy.special import ndtr, stdtr

    return float(ndtr(value) if free > MANY else stdtr(free, value))


@functools.cache
def _noncentrality(free: float, quantile: float) -> float:
    """That of the t distribution which lies above `quantile` with a chance of POWER."""
    from scipy.special import nctdtrinc

    if free > MANY:
        return quantile + _normal_quantile(POWER)
    return float(nctdtrinc(free, 1 - POWER, quantile))


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


def clustered(scores: Array, labels: Array) -> Array:
    """Scores [..., n] of items as one for each cluster of them, [..., clusters], with the same mean.

    A cluster's is the mean plus what its items lie off it, summed, so that the mean over clusters varies as the
    cluster-robust variance says (Liang & Zeger 1986; Miller 2024, "Adding Error Bars to Evals"). labels: the cluster of
    each item; where all differ, the scores are as they were.
    """
    found, index = np.unique(labels, return_inverse=True)
    if len(found) == scores.shape[-1]:
        return scores
    mean = scores.mean(-1, keepdims=True)
    return np.asarray(mean + (scores - mean) @ np.eye(len(found))[index] * len(found) / len(index))


def clusters_worth(labels: Array) -> float:
    """How many clusters of equal size tell as much as these, given the cluster of each item: n^2 over the sum of
    squared sizes (Carter, Schnepel & Steigerwald 2017, "Asymptotic behavior of a t-test robust to cluster
    heterogeneity", for items of a cluster that are all alike). Worked: 12 of 5: 12; 10 of 1, 6 of 3 and 4 of 8: 11.25.
    """
    sizes = np.unique(labels, return_counts=True)[1]
    return float(sizes.sum() ** 2 / np.square(sizes).sum())


def paired_bootstrap(
    statistic: Callable[..., Any],
    *samples: ArrayLike,
    strata: ArrayLike | None = None,
    draws: int = 10_000,
    scale: Scale = PLAIN,
    runs: tuple[float, float] | None = None,
    count: float | None = None,
) -> Interval:
    """Interval of statistic(*samples) over items, resampled jointly (Efron & Tibshirani 1993, section 13.3), and seeds.

    samples: scores of the same n items, [n] of one run or [S, n] of S seeds, the same S wherever it is above 1; strata:
    a label an item, items are resampled inside their stratum. statistic gets arrays [..., n], means over seeds, and
    reduces the last axis; its errors add up on `scale`.
    The errors are those of the percentile interval, made good for its variance, too small by (n - 1) / n; bounds take
    Student's t in the place of normal quantiles, as the expanded percentile interval does (Hesterberg 2015, section
    3.2). Percentiles further out are not drawn: they rest on a few draws of thousands. Where every score is 0 or 1, the
    errors are at least what one item more or less of each stratum changes: that none of 40 differs does not say that
    none ever does (Agresti & Min 2005 count half an item more on either side).
    To their square the variance between runs is added, and t takes the degrees of freedom of the sum (Satterthwaite
    1946). To resample two or three seeds instead, as the hierarchical bootstrap does, leaves out the true value in one
    case of four. runs: that variance, of the statistic on `scale`, and its degrees of freedom; without it, those of the
    samples' own seeds, and nothing for one. count: how many items of one size these are worth (see clusters_worth),
    instead of n.
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
    means = [array.mean(0) for array in arrays]
    measured: Callable[..., Any] = (lambda *scores: np.log(statistic(*scores))) if scale is RATIO else statistic
    drawn = _drawn if draws * n <= CELLS else _draw
    values = [
        measured(*(mean.take(index) for mean in means))
        for index in drawn(tuple(tuple(group.tolist()) for group in groups), draws)
    ]
    middle, count = float(measured(*means)), n if count is None else count
    ends = np.quantile(np.concatenate(values), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    errors = np.maximum((middle - ends) * [1, -1], 0) / _normal_quantile((1 + LEVEL) / 2)
    errors = errors * np.sqrt(count / max(1, count - 1))
    if all(np.isin(array, (0, 1)).all() for array in arrays):
        errors = np.maximum(errors, _error_of_an_item(measured, means, groups))
    if runs is None:
        of_seeds = [float(measured(*(array[min(at, len(array) - 1)] for array in arrays))) for at in range(seeds)]
        runs = (float(np.var(of_seeds, ddof=1)) / seeds, seeds - 1) if seeds > 1 else (0.0, 1)
    below, above = (float(error) for error in np.sqrt(errors**2 + runs[0]))
    items = float(np.mean(errors)) ** 2, float(count - 1)
    return Interval(middle, (below, above), freedom(items, runs), scale, items=items, runs=runs)


def _draw(groups: tuple[tuple[int, ...], ...], draws: int) -> Iterator[Array]:
    """Which items each draw takes in the place of which, [rows, n] at a time; the same in every call."""
    generator, n = np.random.default_rng(0), sum(map(len, groups))
    most = max(1, CELLS // n)
    for at in range(0, draws, most):
        index = np.empty((min(draws - at, most), n), dtype=np.intp)
        for group in map(np.array, groups):
            index[:, group] = group[generator.integers(len(group), size=(len(index), len(group)))]
        yield index


@functools.lru_cache(maxsize=4)  # a page asks some thousand times, for three or four numbers of items
def _drawn(groups: tuple[tuple[int, ...], ...], draws: int) -> list[Array]:
    return list(_draw(groups, draws))


def freedom(*parts: tuple[float, float]) -> float:
    """The degrees of freedom of a sum of variances, given each with its own (Satterthwaite 1946)."""
    total = sum(variance for variance, _ in parts)
    return 1 / sum((variance / total) ** 2 / max(1, free) for variance, free in parts) if total else math.inf


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
