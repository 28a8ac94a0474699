"""Reproducibility: arms of the reference run anew, their numbers beside those that were published."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from scipy.stats import sem

from studylib.config import Arm, points
from studylib.methods import seedless, title
from studylib.study import schedule
from studylib.study.records import ALL, FINISHED, SHARED, Record, Store, arm_key, seconds_alone, shares

PERPLEXITY, ACCURACY = 0.02, 0.02  # what an arm may always be off by: 2% of a perplexity, 2 points
NUMBERS = ("perplexity/", "accuracy/")
TOGETHER = "all arms"
MANY = 1e9  # degrees of freedom, beyond which Student's t is normal
LEVEL = 0.05  # chance that any of the compared numbers fails where only the arithmetic is another


@dataclass(frozen=True)
class Difference:
    """A metric of an arm run anew, and its change from the reference record: of the logarithm of a perplexity, of a
    share of right answers. items, training: the change's standard errors between two runs whose arithmetic differs;
    count: the items behind the first. compared: how many numbers LEVEL is shared by. exact: every score of every item
    is the same to the last bit. arm TOGETHER: the mean change of all arms, where found is None."""

    arm: str
    metric: str
    found: float | None
    change: float
    items: float
    count: int
    training: float
    compared: int
    exact: bool

    @property
    def error(self) -> float:
        return math.hypot(self.items, self.training)

    @property
    def tolerance(self) -> float:
        floor = PERPLEXITY if self.metric.startswith("perplexity/") else ACCURACY
        if not self.error:
            return floor
        # Student's t, for so few items (Satterthwaite 1946, with the error of training as known)
        free = (self.count - 1) * (self.error / self.items) ** 4 if self.items else math.inf
        return max(floor, float(stdtrit(min(free, MANY), 1 - LEVEL / 2 / self.compared)) * self.error)

    @property
    def passed(self) -> bool:
        return abs(self.change) <= self.tolerance

    def text(self) -> str:
        """A line for a terminal."""
        how = "the same, item by item" if self.exact else f"off by {points(100 * self.change)}%"
        value = "on average" if self.arm == TOGETHER else "missing" if self.found is None else f"{self.found:.4g}"
        verdict, allowed = "pass" if self.passed else "FAIL", points(100 * self.tolerance)
        return f"{verdict}  {self.arm}: {self.metric} {value}, {how} (allowed {allowed}%)"


def choose(records: Sequence[Record], wanted: Sequence[str], minutes: float) -> list[Record]:
    """Reference records to run again: those whose title holds one of `wanted`, or as many as fit into `minutes`.

    The latter are the cheapest of each method in turn, the methods with the most arms first; what several of them share
    is made once. Raises ValueError where none is left, and for minutes that are not above 0.
    """
    if not minutes > 0:  # nor nan
        raise ValueError(f"minutes: {minutes:g} is not allowed; use a number above 0")
    finished = [record for record in records if record.status == FINISHED]
    if wanted:
        chosen = [record for record in finished if any(text in title(record.arm) for text in wanted)]
    else:
        seconds = seconds_alone(records)
        chosen, spent = [], 0.0
        by_method: dict[str, list[Record]] = {}
        for record in sorted(finished, key=lambda record: sum(seconds[record.key].values())):
            by_method.setdefault(record.arm.method, []).append(record)
        queues = sorted(by_method.values(), key=len, reverse=True)
        turns = [queue[i] for i in range(len(finished)) for queue in queues if i < len(queue)]
        for record in turns:
            made = {phase for phase in SHARED if any(shares(phase, record, other) for other in chosen)}
            further = sum(own for phase, own in seconds[record.key].items() if phase not in made) / 60
            if spent + further <= minutes:
                chosen.append(record)
                spent += further
    if not chosen:
        what = f"holds {' or '.join(map(repr, wanted))} in its title" if wanted else f"fits into {minutes:g} minutes"
        raise ValueError(f"reference: none of its {len(finished)} arms {what}; `study list --results` shows them")
    return chosen


def compare(pairs: Sequence[tuple[Record, Record]], records: Sequence[Record]) -> list[Difference]:
    """Each perplexity and accuracy of each (reference, found) pair.

    Where the arithmetic is another (threads, kernels, a type that the processor lacks) a rerun is like a fresh draw.
    Two draws differ by the noise of the items, the standard error of their paired differences, and by that of training,
    the standard deviation over seeds times the root of two: the arm's own in `records`, or the median of its method's
    if that is more or there is but one seed. A number passes inside the interval by Student's t that Bonferroni leaves
    to it.
    What moves all arms alike, each by less than its noise, shows in the mean change of each perplexity, which comes
    last, weighted by their precision. Arms share their text and its order, so that their trainings may well err alike.
    The means take one half of LEVEL, the single numbers the other.
    """
    metrics = [name for reference, _ in pairs for name in reference.metrics if name.startswith(NUMBERS)]
    means = sorted({name for name in metrics if name.startswith("perplexity/")}) if len(pairs) > 1 else []
    spreads, families = _spreads(records), 2 if means else 1
    found = [number for pair in pairs for number in _differences(*pair, spreads, families * len(metrics))]
    return found + [_mean([n for n in found if n.metric == metric], families * len(means)) for metric in means]


def _mean(numbers: Sequence[Difference], compared: int) -> Difference:
    weights = np.array([max(number.error, PERPLEXITY) ** -2 for number in numbers])
    change, training = weights @ [(number.change, number.training) for number in numbers] / weights.sum()
    items = np.linalg.norm(weights * [number.items for number in numbers]) / weights.sum()
    exact, count = all(number.exact for number in numbers), numbers[0].count
    return Difference(
        TOGETHER, numbers[0].metric, None, float(change), float(items), count, float(training), compared, exact
    )


def _differences(reference: Record, found: Record, spreads: dict[Any, float], compared: int) -> Iterator[Difference]:
    arm, alike = reference.arm, seedless(reference.arm)
    scores = [name for name in reference.scores if not name.startswith("seconds/")]
    exact = all(reference.scores[name] == found.scores.get(name) for name in scores)
    for metric in (name for name in reference.metrics if name.startswith(NUMBERS)):
        value, own = reference.metrics[metric], found.metrics.get(metric)
        change, noise, count, spread = 0.0 if own == value else np.inf, 0.0, 1, 0.0
        if own is not None and value is not None:
            change = _additive(metric, own) - _additive(metric, value)
            items = metric.replace("perplexity/", "loss/")
            apart = np.array(found.scores[items], float) - np.array(reference.scores[items], float)
            noise, count = _error(apart, reference.scores.get(items.replace("loss/", "tokens/"))), len(apart)
            spread = max(spreads.get(key, 0.0) for key in ((alike, metric), (arm.method, arm.model, metric)))
        yield Difference(title(arm), metric, own, float(change), noise, count, math.sqrt(2) * spread, compared, exact)


def _error(differences: np.ndarray, weights: Sequence[float | None] | None) -> float:
    """The standard error of the mean of the differences, weighted where texts differ in length."""
    if weights is None:
        return float(sem(differences))
    share = np.array(weights, float) / np.mean(np.array(weights, float))
    return float(sem(share * (differences - np.average(differences, weights=share))))


def _additive(metric: str, value: float) -> float:
    return float(np.log(value)) if metric.startswith("perplexity/") else value


def _spreads(records: Sequence[Record]) -> dict[Any, float]:
    """Standard deviations over seeds, of arms with several: by (seedless arm, metric), and the median of a method's by
    (method, model, metric)."""
    arms = defaultdict(list)
    for record in records:
        if record.status == FINISHED:
            arms[seedless(record.arm)].append(record)
    found: dict[Any, float] = {}
    methods = defaultdict(list)
    for key, seeds in arms.items():
        for metric in (name for name in seeds[0].metrics if name.startswith(NUMBERS)):
            known = [record.metrics.get(metric) for record in seeds]
            values = [_additive(metric, value) for value in known if value is not None]
            if len(values) > 1:
                found[key, metric] = float(np.std(values, ddof=1))
                methods[seeds[0].arm.method, seeds[0].arm.model, metric].append(found[key, metric])
    return found | {key: float(np.median(values)) for key, values in methods.items()}


def verify_records(
    records: Sequence[Record],
    wanted: Sequence[str],
    minutes: float,
    results: str | Path,
    jobs: int = 1,
    scheduler: str = "",
) -> list[Difference]:
    """Run the chosen arms of `records` in the folder `results`, and compare. Records there are used where they match.

    jobs: arms computed at a time, for `minutes` each. Each runs with as many threads as it once had: the order of a sum
    decides which way GPTQ rounds. scheduler: of a dask cluster that computes them instead (see schedule.run), with the
    threads of its workers. Raises ValueError as `choose` and schedule.run do.
    """
    chosen, threads, store = choose(records, wanted, minutes * max(1, jobs)), torch.get_num_threads(), Store(results)
    found: dict[Arm, Record] = {}
    if scheduler:
        arms = [record.arm for record in chosen]
        found |= zip(arms, schedule.run(arms, results, jobs=jobs, compute=ALL, scheduler=scheduler), strict=True)
        return compare([(record, found[record.arm]) for record in chosen], records)
    try:
        for cores in sorted({_threads(record) for record in chosen}):
            arms = [record.arm for record in chosen if _threads(record) == cores]
            missing = sum(store.load(arm_key(arm)) is None for arm in arms)
            torch.set_num_threads(cores * max(1, min(jobs, missing)))
            found |= zip(arms, schedule.run(arms, results, jobs=jobs, compute=ALL), strict=True)
    finally:
        torch.set_num_threads(threads)
    return compare([(record, found[record.arm]) for record in chosen], records)


def _threads(record: Record) -> int:
    return record.provenance["hardware"]["cores"]
