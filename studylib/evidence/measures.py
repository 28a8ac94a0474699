"""Arms side by side: the seeds of each gathered, and paired contrasts of what was measured on the same items."""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np

from studylib.config.arm import Arm
from studylib.methods.base import METHODS
from studylib.evaluate.memory import TITLES
from studylib.methods.arms import corpus_title
from studylib.config.profiles import Profile
from studylib.config.words import listed, number, points
from studylib.config.budgets import ZERO_SHOT, Evaluation
from studylib.evidence.statistics import Interval, paired_bootstrap, perplexity, stratified_mean
from studylib.config.settings import BitWidths
from studylib.config.budgets import EXECUTIONS, OWN
from studylib.quant.kernel import LAYERS
from studylib.study.records import FINISHED, Record, arm_key
from studylib.config.budgets import RealText

TASK_TITLES = {
    "boolq": "BoolQ",
    "piqa": "PIQA",
    "siqa": "SIQA",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "arc_easy": "ARC-easy",
    "arc_challenge": "ARC-challenge",
    "openbookqa": "OpenBookQA",
    "mmlu": "MMLU",
    "triviaqa": "TriviaQA",
}
CONTEXT = 2048  # tokens whose cache counts as memory: the sequence length of LLM-QAT's paper
RESAMPLED = 20_000_000  # numbers drawn for one interval at most: 10,000 draws up to 2,000 items, never below 2,000

Contrast = Callable[..., np.ndarray]


class Setting(NamedTuple):
    """What is compared: a method at a bit setting, and in words what of it is not as by default (arms.Arm.variant)."""

    method: str
    bits: str
    variant: str = ""

    @classmethod
    def of(cls, arm: Arm) -> "Setting":
        return cls(arm.method, arm.bits, arm.variant)

    @property
    def title(self) -> str:
        if self.method == "encoded":
            return self.variant
        at = f" at {self.bits}" if self.method != "full-precision" else ""
        return TITLES[self.method] + at + (f" ({self.variant})" if self.variant else "")


FULL = Setting("full-precision", "16-16-16")


@dataclass(frozen=True)
class Cell:
    """A setting's finished records and those that diverged, one a seed."""

    setting: Setting
    records: tuple[Record, ...]
    diverged: tuple[Record, ...] = ()

    @property
    def method(self) -> str:
        return self.setting.method

    @property
    def bits(self) -> str:
        return self.setting.bits

    @property
    def title(self) -> str:
        return self.setting.title

    @property
    def seeds(self) -> list[int]:
        return [record.arm.seed for record in self.records]

    def scores(self, name: str, seed: int | None = None) -> np.ndarray:
        """Scores of the items [n], averaged over the finished seeds; of one seed where given and the cell has it."""
        chosen = [record for record in self.records if record.arm.seed == seed] or self.records
        return np.mean([record.scores[name] for record in chosen], axis=0)


Cells = dict[Setting, Cell]


def gather(records: Sequence[Record]) -> Cells:
    """Cells by setting: full precision first, then from many bits to few, in the methods' order at equal bits; variants
    after each method's default, as they come.

    A record that is given twice counts once, and so does an arm that was run again to the same scores. Raises
    ValueError where records cannot be compared: different models or evaluations (beyond few-shot tasks), or two arms
    that differ in more than the seed at one setting.
    """
    unique: list[Record] = []
    found: dict[Arm, list[dict]] = defaultdict(list)
    for record in records:
        if record.scores not in found[record.arm]:
            found[record.arm].append(record.scores)
            unique.append(record)
    records = unique
    for what, value_of in (("model", lambda arm: arm.model), ("evaluation", lambda arm: _shared(arm.evaluation))):
        values = list(dict.fromkeys(value_of(record.arm) for record in records))
        if len(values) > 1:
            raise ValueError(f"records: {what} {values[0]!r} and {what} {values[1]!r} cannot be compared")
    grouped: dict[Setting, list[Record]] = {}
    for record in sorted(records, key=_order):
        grouped.setdefault(Setting.of(record.arm), []).append(record)
    for setting, group in grouped.items():
        if len({seedless(record.arm) for record in group}) > 1 or len({r.arm.seed for r in group}) < len(group):
            raise ValueError(f"records: there are different arms of {setting.title}; only seeds may differ")
    return {
        setting: Cell(
            setting,
            tuple(record for record in group if record.status == FINISHED),
            tuple(record for record in group if record.status != FINISHED),
        )
        for setting, group in grouped.items()
    }


def _shared(evaluation: Evaluation) -> Evaluation:
    return replace(evaluation, tasks=tuple(task for task in evaluation.tasks if task in ZERO_SHOT))


def of_profile(records: Sequence[Record], model: str, budget: Profile) -> list[Record]:
    """The records of `model` that the profile's own notebooks could have made, a setting and seed once.

    Of several, the one of the present code is taken, else the one that finished last. Few-shot tasks may differ.
    """
    ranked = sorted(records, key=lambda r: (r.key == arm_key(r.arm), r.provenance["finished"]))
    found = {_unevaluated(record.arm): record for record in ranked if _made_by(budget, model, record.arm)}
    return list(found.values())


def _unevaluated(arm: Arm) -> Arm:
    """The arm as it is compared, whichever few-shot tasks it was scored on."""
    return replace(arm, evaluation=_shared(arm.evaluation))


def _made_by(budget: Profile, model: str, arm: Arm) -> bool:
    """Whether the arm is one of the model that differs from the budget's own in what its variant names, and no more."""
    changes = {"scheme": arm.scheme, "format": arm.format, "adapter": arm.adapter, "merge": arm.merge}
    if isinstance(arm.data, RealText):
        changes["corpus"] = arm.data.corpus
    elif arm.data:
        changes["sampling"] = {name: getattr(arm.data, name) for name in ("strategy", "top_k", "temperature")}
    if arm.training:
        named = ("loss", "temperature", "scale", "mask", "masters")
        changes["training"] = {name: getattr(arm.training, name) for name in named}
    if arm.tuning:
        changes["tuning"] = {name: getattr(arm.tuning, name) for name in ("checkpointing", "paged")}
    same = budget.arm(model, arm.method, arm.bits, arm.seed, **changes)
    return _unevaluated(arm) == _unevaluated(same)


def _order(record: Record) -> tuple:
    bits = BitWidths.parse(record.arm.bits)
    method = METHODS.index(record.arm.method)
    return method > 0, -bits.weights, -bits.activations, -bits.cache, method, record.arm.variant != "", record.arm.seed


@functools.cache
def seedless(arm: Arm) -> str:
    """The arm without its seed and the tasks beyond ZERO_SHOT: equal for arms that differ in no more."""
    fields = asdict(arm)
    fields["evaluation"]["tasks"] = _shared(arm.evaluation).tasks
    for source in ("data", "instructions"):
        if fields[source]:
            fields[source]["seed"] = 0
    return str(fields)


@dataclass(frozen=True)
class Measure:
    """A number that arms are compared by.

    name: "perplexity/<corpus>", "perplexity/text" (geometric mean over the corpora) or "perplexity/responses";
    "accuracy/mean" (zero-shot tasks, each weighing the same) or "accuracy/<task>", in %; "share/<of what>", in %;
    "bits", stored bits a weight; "seconds/<model>", of a decoded token, whose parts are execution.EXECUTIONS.
    parts: the scores behind it. sizes: items of each part. family: how many comparisons are judged by it at once.
    """

    name: str
    title: str
    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    family: int = 1

    @property
    def is_perplexity(self) -> bool:
        return self.name.startswith("perplexity/")

    @property
    def short_title(self) -> str:
        """For an axis, which has no room for how many tasks a mean is of."""
        is_mean = self.name == "accuracy/mean" and len(self.parts) > 1
        return self.title.partition(" on ")[0] if is_mean else self.title

    def covers(self, cell: Cell) -> bool:
        """Whether the cell has finished records that were scored on it."""
        return bool(cell.records) and all(part in cell.records[0].scores for part in self.parts)

    @property
    def items(self) -> int:
        return sum(self.sizes)

    @property
    def higher_is_better(self) -> bool:
        return self.name.startswith("accuracy/")

    def loss(self, reference: np.ndarray, value: np.ndarray) -> np.ndarray:
        """How much worse `value` is than `reference`, in the measure's unit; negative if better."""
        return reference - value if self.higher_is_better else value - reference

    def text(self, value: float) -> str:
        """The value as people read it: one decimal of a percentage, three digits of others."""
        return points(value) if self.name.startswith(("accuracy/", "share/")) else number(value)

    def interval(self, contrast: Contrast, *cells: Cell) -> Interval:
        """95% interval of contrast(value of each cell), resampling the items that all of them were scored on.

        The spread counts too over seeds that all cells with several have; else scores are averaged over them.
        """
        strata, statistic = self._statistic()
        seeds = _common_seeds(cells)
        multiplies = self.is_perplexity and contrast in (identity, np.divide)
        draws = int(np.clip(RESAMPLED // self.items, 2_000, 10_000))
        scores = [
            np.stack([self._scores(cell, seed) for seed in seeds])
            if len(seeds) > 1 and len(cell.records) > 1
            else self._scores(cell)
            for cell in cells
        ]
        return paired_bootstrap(
            lambda *values: contrast(*map(statistic, values)),
            *scores,
            strata=strata,
            draws=draws,
            family=self.family,
            multiplies=multiplies,
        )

    def above(self, cell: Cell, other: Cell) -> Interval:
        """A perplexity above another's, as a share."""
        return self.interval(np.divide, cell, other).mapped(lambda times: times - 1)

    def value(self, contrast: Contrast, *cells: Cell, seed: int | None = None) -> float:
        """contrast(value of each cell), without an interval; of one seed where given."""
        _, statistic = self._statistic()
        return float(contrast(*(statistic(self._scores(cell, seed)) for cell in cells)))

    def over_seeds(self, contrast: Contrast, *cells: Cell) -> tuple[float, float] | None:
        """Lowest and highest value over the seeds that all cells with several have; None with fewer than two."""
        seeds = _common_seeds(cells)
        values = [self.value(contrast, *cells, seed=seed) for seed in seeds]
        return (min(values), max(values)) if len(values) > 1 else None

    def _scores(self, cell: Cell, seed: int | None = None) -> np.ndarray:
        return np.concatenate([cell.scores(part, seed) for part in self.parts])

    def _statistic(self) -> tuple[np.ndarray | None, Callable[[np.ndarray], np.ndarray]]:
        if self.is_perplexity and len(self.parts) == 1:
            return None, perplexity
        strata = np.repeat(np.arange(len(self.sizes)), self.sizes)
        mean, unit = stratified_mean(strata), 1 if self.name == "bits" else 100
        if self.is_perplexity:
            return strata, lambda losses: perplexity(mean(losses)[..., None])
        return strata, lambda scores: unit * mean(scores)


def _common_seeds(cells: Sequence[Cell]) -> list[int]:
    """The seeds that all cells with several of them have."""
    several = [set(cell.seeds) for cell in cells if len(cell.seeds) > 1]
    return sorted(set.intersection(*several)) if several else []


def accuracy_title(tasks: Sequence[str]) -> str:
    """What the accuracy on zero-shot tasks is called where there is no room for how many they are."""
    return f"accuracy on {TASK_TITLES[tasks[0]]}" if len(tasks) == 1 else "mean accuracy"


def measures(records: Sequence[Record]) -> list[Measure]:
    """Perplexity on each corpus and, where zero-shot tasks were run, their mean accuracy; empty if nothing finished."""
    record = next((record for record in records if record.status == FINISHED), None)
    if record is None:
        return []
    evaluation = record.arm.evaluation
    found = [
        Measure(
            f"perplexity/{corpus}",
            f"perplexity on {corpus_title(corpus)}",
            (f"loss/{corpus}",),
            (len(record.scores[f"loss/{corpus}"]),),
        )
        for corpus in evaluation.corpora
    ]
    tasks = [task for task in evaluation.tasks if task in ZERO_SHOT]
    if tasks:
        title = accuracy_title(tasks) + (f" on {len(tasks)} zero-shot tasks" if len(tasks) > 1 else "")
        found.append(_accuracy("mean", title, tasks, record))
    return found


def perplexities(records: Sequence[Record]) -> list[Measure]:
    """Perplexity on each corpus."""
    return [measure for measure in measures(records) if measure.is_perplexity]


def accuracies(records: Sequence[Record]) -> list[Measure]:
    """The mean accuracy on the zero-shot tasks."""
    return [measure for measure in measures(records) if not measure.is_perplexity]


def text_measures(records: Sequence[Record]) -> list[Measure]:
    """Perplexity on all corpora together, as their geometric mean; empty if nothing finished."""
    each = perplexities(records)
    if not each:
        return []
    title = f"perplexity on {listed([measure.title.removeprefix('perplexity on ') for measure in each])}"
    parts, sizes = (tuple(getattr(measure, name)[0] for measure in each) for name in ("parts", "sizes"))
    return [Measure("perplexity/text", title, parts, sizes)]


def response_measures(records: Sequence[Record]) -> list[Measure]:
    """Perplexity of held-out Alpaca responses, a pair counting as one item; empty where none were scored."""
    record = next((record for record in records if record.status == FINISHED and record.arm.evaluation.pairs), None)
    if record is None:
        return []
    title = "perplexity of held-out Alpaca responses"
    return [Measure("perplexity/responses", title, ("loss/responses",), (record.arm.evaluation.pairs,))]


def weight_measures(records: Sequence[Record]) -> list[Measure]:
    """What encoded weights were scored on: neurons that are not normal, stored bits; empty where no arm has them."""
    record = next((record for record in records if "non_normal" in record.scores), None)
    if record is None:
        return []
    title = "share of neurons whose weights are not normal, %"
    return [
        Measure("share/non_normal", title, ("non_normal",), (len(record.scores["non_normal"]),)),
        Measure("bits", "stored bits a weight", ("bits",), (1,)),
    ]


def decoding_measures(records: Sequence[Record]) -> list[Measure]:
    """The time of a decoded token, of each model that was timed; empty where none was."""
    record = next((record for record in records if record.arm.decoding and record.status == FINISHED), None)
    if record is None:
        return []
    found, settings = [], record.arm.decoding
    for name in (OWN, *settings.shapes):
        title = "time of a token" + ("" if name == OWN else f" in {LAYERS} layers of {name}")
        parts = tuple(f"seconds/{name}/{kind}" for kind in EXECUTIONS)
        found.append(Measure(f"seconds/{name}", title, parts, (settings.rounds,) * len(parts)))
    return found


def speedup(measure: Measure, cell: Cell, fast: str, slow: str) -> Interval:
    """How many times as fast a decoded token is in one of execution.EXECUTIONS as in another: the ratio of the medians
    of their rounds, which took turns."""
    times = [cell.scores(f"{measure.name}/{kind}") for kind in (fast, slow)]
    return paired_bootstrap(
        lambda a, b: np.median(b, axis=-1) / np.median(a, axis=-1), *times, family=measure.family, multiplies=True
    )


def task_measures(records: Sequence[Record]) -> list[Measure]:
    """The accuracy on each task alone; few-shot tasks only where some arm was scored on them."""
    found = {}
    for record in records:
        if record.status == FINISHED:
            found |= {
                task: _accuracy(task, TASK_TITLES[task], [task], record)
                for task in record.arm.evaluation.tasks
                if task not in found
            }
    return list(found.values())


def _accuracy(name: str, title: str, tasks: Sequence[str], record: Record) -> Measure:
    parts = tuple(f"accuracy/{task}" for task in tasks)
    return Measure(f"accuracy/{name}", title, parts, tuple(len(record.scores[part]) for part in parts))


def identity(value: np.ndarray) -> np.ndarray:
    """The contrast of a single cell: its value."""
    return value


def won_back(measure: Measure, full: Cell, rtn: Cell, qat: Cell) -> tuple[Interval, Interval | None]:
    """What RTN loses against full precision, and the share of it that LLM-QAT wins back.

    The share is None where the loss is not clearly above zero: a ratio to nearly nothing says nothing.
    """
    loss = measure.interval(measure.loss, full, rtn)
    if loss.low <= 0:
        return loss, None
    return loss, measure.interval(won_back_share, full, rtn, qat)


def won_back_share(full: np.ndarray, rtn: np.ndarray, qat: np.ndarray) -> np.ndarray:
    """1 where LLM-QAT is as good as full precision, 0 where it is as bad as RTN. Worked: 26, 82, 47: 35/56."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (rtn - qat) / (rtn - full)


def megabytes(cell: Cell) -> float:
    """MB (10^6 bytes) of weights and a cache of CONTEXT tokens."""
    sizes = cell.records[0].metrics
    return (sizes["bytes/weights"] + CONTEXT * sizes["bytes/cache_per_token"]) / 1e6


def frontier(measure: Measure, shown: list[Cell], sizes: np.ndarray) -> list[int]:
    """Indices of the cells that none is as small and as good as, in the order of size; the first of equal ones."""
    losses = [measure.loss(0, measure.value(identity, cell)) for cell in shown]
    found, least = [], np.inf
    for index in sorted(range(len(shown)), key=lambda i: (sizes[i], losses[i])):
        if losses[index] < least:
            found.append(index)
            least = losses[index]
    return found
