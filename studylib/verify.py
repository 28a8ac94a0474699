"""Reproducibility: arms of the reference run anew, their numbers beside those that were published."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from studylib import experiments
from studylib.comparison import points
from studylib.records import FINISHED, SHARED, Record, seconds_alone, shares

PERPLEXITY, ACCURACY = 0.02, 0.02  # tolerances where the reference has one seed: 2% of a perplexity, 2 points
SPREADS = 2.0  # with several seeds: so many times their standard deviation, if that is more


@dataclass(frozen=True)
class Difference:
    """A metric of a reference record and of its arm run anew: `change` relative for perplexities, absolute for shares
    of right answers. exact: every score of every item is the same to the last bit."""

    arm: str
    metric: str
    reference: float | None
    found: float | None
    change: float
    tolerance: float
    exact: bool

    @property
    def passed(self) -> bool:
        return self.change <= self.tolerance

    def text(self) -> str:
        """A line for a terminal."""
        how = "the same, item by item" if self.exact else f"off by {points(100 * self.change)}%"
        allowed = f"allowed {points(100 * self.tolerance)}%"
        return f"{'pass' if self.passed else 'FAIL'}  {self.arm}: {self.metric} {self.found:.4g}, {how} ({allowed})"


def choose(records: Sequence[Record], wanted: Sequence[str], minutes: float) -> list[Record]:
    """Reference records to run again: those whose title holds one of `wanted`, or as many as fit into `minutes`.

    The latter are the cheapest of each method in turn, the methods with the most arms first; what several of them share
    is made once. Raises ValueError where none is left.
    """
    finished = [record for record in records if record.status == FINISHED]
    if wanted:
        chosen = [record for record in finished if any(text in record.arm.title for text in wanted)]
    else:
        seconds = {record.key: seconds_alone(record, records) for record in finished}
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


def compare(reference: Record, found: Record, all_records: Sequence[Record]) -> list[Difference]:
    """Each perplexity and accuracy of the two records; tolerances from the spread over the seeds in `all_records`."""
    answers = [name for name in reference.scores if not name.startswith("seconds/")]
    exact = all(reference.scores[name] == found.scores.get(name) for name in answers)
    differences = []
    for metric, value in reference.metrics.items():
        if not metric.startswith(("perplexity/", "accuracy/")):
            continue
        relative = metric.startswith("perplexity/")
        own = found.metrics.get(metric)
        change = np.inf if own is None else abs(own - value) / (value if relative else 1)
        tolerance = _tolerance(metric, reference, all_records, relative)
        differences.append(Difference(reference.arm.title, metric, value, own, float(change), tolerance, exact))
    return differences


def _tolerance(metric: str, reference: Record, records: Sequence[Record], relative: bool) -> float:
    values = [
        record.metrics[metric]
        for record in records
        if record.status == FINISHED
        and (record.arm.title, record.arm.model) == (reference.arm.title, reference.arm.model)
    ]
    spread = SPREADS * float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return max(spread / (reference.metrics[metric] if relative else 1), PERPLEXITY if relative else ACCURACY)


def verify(records: Sequence[Record], wanted: Sequence[str], minutes: float, results: str | Path) -> list[Difference]:
    """Run the chosen arms of `records` in the folder `results`, and compare. Records there are used where they match.

    Each runs with as many threads as it once had: the order of a sum decides which way GPTQ rounds.
    Raises ValueError as `choose` does, or for an arm that cannot be run here.
    """
    chosen, threads = choose(records, wanted, minutes), torch.get_num_threads()
    found = {}
    try:
        for cores in sorted({_threads(record) for record in chosen}):
            torch.set_num_threads(cores)
            arms = [record.arm for record in chosen if _threads(record) == cores]
            found |= zip(arms, experiments.run(arms, results), strict=True)
    finally:
        torch.set_num_threads(threads)
    return [difference for record in chosen for difference in compare(record, found[record.arm], records)]


def _threads(record: Record) -> int:
    return record.provenance["hardware"]["cores"]
