"""How far runs with other seeds lie apart: pooled over the arms of a kind, with its trend on what they lose."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

ENOUGH = 20  # degrees of freedom that a verdict on trained arms takes
TREND = 5  # arms that a trend takes
LEAST = 1e-5  # of the median: the smallest variance that counts, as two equal runs have none

Runs = Mapping[int, float]  # by seed: a mean loss in nats


@dataclass(frozen=True)
class Spread:
    """The variance of a run's mean loss (nats, squared) about its arm's, from arms that were run with several seeds.

    Few seeds tell little of one arm, so that arms lend to each other: log variance is a line over the mean loss, since
    runs that lose more lie further apart, and an arm's own variance counts with its degrees of freedom beside `prior`
    of the line (limma-trend: Smyth 2004, section 6; Phipson et al. 2016). What a seed does to all arms alike is apart
    from that: it cancels between arms of the same seeds.

    line: slope and intercept of the log variance. range: the losses it is drawn over. prior: its degrees of freedom.
    free: those of all arms together. own: variance and degrees of freedom of each arm. shared: the variance that all
    arms of a seed have in common, and its degrees of freedom.
    """

    line: tuple[float, float]
    range: tuple[float, float]
    prior: float
    free: float
    own: Mapping[object, tuple[float, float]]
    shared: tuple[float, float]

    def of(self, arm: object, loss: float) -> tuple[float, float]:
        """The variance of a run of the arm, which has this mean loss, and its degrees of freedom."""
        slope, start = self.line
        expected = math.exp(slope * min(max(loss, self.range[0]), self.range[1]) + start)
        variance, free = self.own.get(arm, (0.0, 0.0))
        if math.isinf(self.prior):
            return expected, self.free
        total = self.prior + free
        return (self.prior * expected + free * variance) / total, min(total, self.free)


def degrees(seeds: Collection[Collection[int]]) -> float:
    """The degrees of freedom that arms of one kind, run with these seeds each, have together: their repeats, without
    what the seeds do to all of them alike."""
    several = [own for own in seeds if len(own) > 1]
    repeats = sum(len(own) - 1 for own in several)
    return repeats - (len({seed for own in several for seed in own}) - 1 if len(several) > 1 else 0)


def pool(arms: Mapping[object, Runs]) -> Spread | None:
    """The spread of arms of one kind; None where none has two seeds, or too few to tell seeds from arms."""
    several = {arm: runs for arm, runs in arms.items() if len(runs) > 1}
    seeds = sorted({seed for runs in several.values() for seed in runs})
    repeats = sum(len(runs) - 1 for runs in several.values())
    total = degrees(list(several.values()))
    if total <= 0:
        return None
    kept = total / repeats  # of each arm's degrees of freedom
    of_seeds = _of_seeds(several, seeds) if len(several) > 1 else dict.fromkeys(seeds, 0.0)
    own, losses = {}, []
    for arm, runs in several.items():
        rest = np.array([loss - of_seeds[seed] for seed, loss in runs.items()])
        free = kept * (len(runs) - 1)
        own[arm] = float(((rest - rest.mean()) ** 2).sum() / free), free
        losses.append(float(np.mean(list(runs.values()))))
    variances, frees = np.array(list(own.values())).T
    line, prior = _trend(np.array(losses), variances, frees)
    common = float(np.var(list(of_seeds.values()), ddof=1)) - float(np.mean(variances)) / len(several)
    shared = max(0.0, common), float(len(seeds) - 1)
    return Spread(line, (min(losses), max(losses)), prior, float(total), own, shared)


def _of_seeds(arms: Mapping[object, Runs], seeds: list[int]) -> dict[int, float]:
    """What each seed does to all arms alike, by least squares; it is zero on average."""
    rows, losses = [], []
    for at, runs in enumerate(arms.values()):
        for seed, loss in runs.items():
            row = np.zeros(len(arms) + len(seeds))
            row[at] = row[len(arms) + seeds.index(seed)] = 1
            rows.append(row)
            losses.append(loss)
    found = np.linalg.lstsq(np.array(rows), np.array(losses), rcond=None)[0][len(arms) :]
    return dict(zip(seeds, (found - found.mean()).tolist(), strict=True))


def _trend(losses: np.ndarray, variances: np.ndarray, frees: np.ndarray) -> tuple[tuple[float, float], float]:
    """The line of the log variance over the losses, and how many degrees of freedom it is worth beside an arm's own:
    the fewer, the more the arms differ from it beyond what their own degrees of freedom explain."""
    from scipy.special import digamma, polygamma

    floor = LEAST * np.median(variances)
    if floor == 0:  # more than half of the arms came out the same with every seed
        floor = np.finfo(float).tiny
    logs = np.log(np.maximum(variances, floor)) - digamma(frees / 2) + np.log(frees / 2)
    noise = polygamma(1, frees / 2)
    straight = len(losses) >= TREND and np.ptp(losses) > 0
    slope, start = (
        np.polyfit(losses, logs, 1, w=noise**-0.5) if straight else (0.0, np.average(logs, weights=1 / noise))
    )
    rest = logs - slope * losses - start
    freedom = len(losses) - 1 - straight
    excess = float((rest**2).sum() / freedom - noise.mean()) if freedom > 0 else 0.0
    if excess <= 0:
        return (float(slope), float(start)), math.inf
    prior = 2 * _inverse_trigamma(excess)
    return (float(slope), float(start + digamma(prior / 2) - math.log(prior / 2))), prior


def _inverse_trigamma(value: float) -> float:
    """x above 0 with trigamma(x) = value."""
    from scipy.optimize import brentq
    from scipy.special import polygamma

    return math.exp(brentq(lambda x: math.log(polygamma(1, math.exp(x))) - math.log(value), -30, 30))
