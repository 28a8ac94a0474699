"""Arms side by side: the seeds of each gathered, and paired contrasts of what was measured on the same items."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np

from studylib.config import (
    EXECUTIONS,
    OWN,
    TIMED_LAYERS,
    ZERO_SHOT,
    Arm,
    Evaluation,
    Profile,
    RealText,
    listed,
    number,
    points,
)
from studylib.evidence.spread import Spread, pool
from studylib.evidence.statistics import (
    EXCESS,
    LARGEST,
    PLAIN,
    RATIO,
    Array,
    Interval,
    Scale,
    freedom,
    paired_bootstrap,
    perplexity,
    stratified_mean,
)
from studylib.methods import (
    CHANGES,
    METHODS,
    Setting,
    corpus_title,
    order,
    seedless,
    setting,
    usual_training,
    usual_tuning,
)
from studylib.study import Record, arm_key, contents

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
STEP = 1e-5  # nats by which a mean loss is moved to see what a contrast makes of it
RESAMPLED = 20_000_000  # numbers drawn for one interval at most: 10,000 draws up to 2,000 items, never below 2,000

Contrast = Callable[..., Any]  # of arrays [...], a value of each cell
Kind = Literal["perplexity", "accuracy", "share", "bits", "seconds", "bytes"]  # of numbers that arms are compared by
FULL = setting("full-precision", "16-16-16")


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
    def arm(self) -> Arm:
        """That of its first seed."""
        return (*self.records, *self.diverged)[0].arm

    @property
    def tuned(self) -> bool:
        """Whether it learned from instructions."""
        return self.arm.tuning is not None

    @property
    def kind(self) -> str:
        """What seeds draw for its training, by which runs of it differ; cells of a kind share what is known of that.
        "": nothing is trained. What other calibration text would give is not counted."""
        return kind_of(self.arm)

    @property
    def seeds(self) -> list[int]:
        return [record.arm.seed for record in self.records]

    def scores(self, name: str, seed: int | None = None) -> Array:
        """Scores of the items [n], averaged over the finished seeds; of one seed where given and the cell has it."""
        chosen = [record for record in self.records if record.arm.seed == seed] or self.records
        return np.asarray(np.mean(np.array([record.scores[name] for record in chosen], dtype=float), axis=0))


Cells = dict[Setting, Cell]


def kind_of(arm: Arm) -> str:
    """What seeds draw for the arm's training (see Cell.kind)."""
    return "pairs" if arm.tuning else "text" if arm.training else ""


def gather(records: Sequence[Record]) -> Cells:
    """Cells by setting: full precision first, then from many bits to few, in the methods' order at equal bits; variants
    after each method's default, as they come.

    A record that is given twice counts once, and so does an arm that was run again to the same scores. Raises
    ValueError where records cannot be compared: different models or evaluations (beyond few-shot tasks), or two arms
    that differ in more than the seed at one setting.
    """
    return dict(_gathered(tuple(records)))


@functools.lru_cache(maxsize=16)  # every measure of every claim asks
def _gathered(records: tuple[Record, ...]) -> Cells:
    unique: list[Record] = []
    found: dict[Arm, list[dict[str, list[float | None]]]] = defaultdict(list)
    for record in records:
        if record.scores not in found[record.arm]:
            found[record.arm].append(record.scores)
            unique.append(record)
    wholes: list[tuple[str, Callable[[Arm], Any]]] = [
        ("model", lambda arm: arm.model),
        ("evaluation", lambda arm: _shared(arm.evaluation)),
    ]
    for what, value_of in wholes:
        values = list(dict.fromkeys(value_of(record.arm) for record in unique))
        if len(values) > 1:
            raise ValueError(f"records: {what} {values[0]!r} and {what} {values[1]!r} cannot be compared")
    grouped: dict[Setting, list[Record]] = {}
    for record in sorted(unique, key=lambda record: order(record.arm)):
        grouped.setdefault(Setting.of(record.arm), []).append(record)
    for own, group in grouped.items():
        if len({_compared(seedless(r.arm)) for r in group}) > 1 or len({r.arm.seed for r in group}) < len(group):
            raise ValueError(f"records: there are different arms of {own.title}; only seeds may differ")
    return {
        own: Cell(
            own,
            tuple(record for record in group if record.finished),
            tuple(record for record in group if not record.finished),
        )
        for own, group in grouped.items()
    }


def _shared(evaluation: Evaluation) -> Evaluation:
    """What all arms are scored on, without the few-shot tasks that only some are."""
    return replace(evaluation, tasks=tuple(task for task in evaluation.tasks if task in ZERO_SHOT))


@functools.cache
def _compared(arm: Arm) -> Arm:
    """The arm as it is compared, whichever few-shot tasks it was scored on."""
    return replace(arm, evaluation=_shared(arm.evaluation))


def of_profile(records: Sequence[Record], model: str, budget: Profile) -> list[Record]:
    """The records of `model` that the profile's own notebooks could have made, a setting and seed once.

    Records of files that hold something else now are left out. Of several, the one that would be found now (see
    records.arm_key) is taken, else the one that finished last. Few-shot tasks may differ.
    """
    own = [record for record in records if _made_by(budget, model, record.arm) and _is_of_present_files(record)]
    ranked = sorted(own, key=lambda record: (_is_found(record), record.provenance["finished"]))
    return list({_compared(record.arm): record for record in ranked}.values())


def _is_of_present_files(record: Record) -> bool:
    """Whether what the arm names by a path has the contents that it had; what is gone cannot be told."""
    try:
        return bool(contents(record.arm) == record.provenance.get("contents", {}))
    except ValueError:
        return True


def _is_found(record: Record) -> bool:
    try:
        return record.key == arm_key(record.arm)
    except ValueError:  # a file that is gone, or a method that is not registered
        return False


def _made_by(budget: Profile, model: str, arm: Arm) -> bool:
    """Whether the arm is one of the model that differs from the budget's own in what settings name, and no more."""
    if arm.model != model or _shared(arm.evaluation) != _shared(budget.evaluation):
        return False
    training, tuning = budget.training, budget.tuning
    if arm.method in METHODS:
        case = arm.method, arm.bits, arm.format, arm.scheme
        training, tuning = usual_training(budget, case), usual_tuning(budget, case)
    data: Any = budget.sampling
    if isinstance(arm.data, RealText):
        data = RealText(arm.data.corpus, data.count, data.length)
    usual = {
        "data": data,
        "training": training,
        "instructions": budget.instructions,
        "tuning": tuning,
        "decoding": budget.decoding,
    }
    return all(_is_as_usual(name, getattr(arm, name), part) for name, part in usual.items())


def _is_as_usual(name: str, own: Any, usual: Any) -> bool:
    """Whether a part of an arm is the budget's, but for the seed and what settings name."""
    if own is None:
        return True
    free = {field.rpartition(".")[2] for field in CHANGES if field.startswith(f"{name}.")} | {"seed"}
    kept = {field.name: getattr(own, field.name) for field in fields(own) if field.name in free}
    return bool(own == replace(usual, **kept))


@dataclass(frozen=True)
class Measure:
    """A number that arms are compared by.

    kind and of: "perplexity" of a corpus, of "text" (geometric mean over the corpora) or of "responses"; "accuracy", in
    %, of a task or as "mean" (zero-shot tasks, each weighing the same); "share", in %, of something; stored "bits" a
    weight; "seconds" of a model's decoded token, whose parts are EXECUTIONS; planned "bytes".
    parts: the scores behind it. sizes: items of each part. weights: the scores that items weigh by, where they do not
    count alike: the tokens of each text. short: the title where there is little room, if another. spreads: how far
    runs lie apart by the measure, for each kind of cell that was run with several seeds. alone: what it is a mean of.
    """

    kind: Kind
    of: str
    title: str
    parts: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    short: str = ""
    weights: str = ""
    spreads: Mapping[str, Spread] = field(default_factory=dict, compare=False, repr=False)
    alone: tuple["Measure", ...] = field(default=(), compare=False, repr=False)

    @property
    def name(self) -> str:
        """For columns: "perplexity/wikipedia", "bits"."""
        return f"{self.kind}/{self.of}" if self.of else self.kind

    @property
    def is_perplexity(self) -> bool:
        return self.kind == "perplexity"

    @property
    def short_title(self) -> str:
        """For an axis, which has no room for how many tasks a mean is of."""
        return self.short or self.title

    def covers(self, cell: Cell) -> bool:
        """Whether the cell has finished records that were scored on it."""
        return bool(cell.records) and all(part in cell.records[0].scores for part in self.parts)

    @property
    def items(self) -> int:
        return sum(self.sizes)

    @property
    def higher_is_better(self) -> bool:
        return self.kind == "accuracy"

    def loss(self, reference: Any, value: Any) -> Any:
        """How much worse `value` is than `reference`, in the measure's unit; negative if better."""
        return reference - value if self.higher_is_better else value - reference

    def text(self, value: float) -> str:
        """The value as people read it: one decimal of a percentage, three digits of others."""
        return points(value) if self.kind in ("accuracy", "share") else number(value)

    def interval(self, contrast: Contrast, *cells: Cell) -> Interval:
        """95% interval of contrast(value of each cell), resampling the items that all of them were scored on.

        To that comes the variance between runs with other seeds: as `spreads` have it of each cell, also of one that
        was run once; where they do not, the spread over seeds that all cells with several have.
        """
        strata, statistic = self._statistic()
        seeds = _common_seeds(cells)
        scale = RATIO if self.is_perplexity and contrast in (identity, np.divide) else PLAIN
        draws = int(np.clip(RESAMPLED // self.items, 2_000, 10_000))
        scores = [
            np.stack([self._scores(cell, seed) for seed in seeds])
            if len(seeds) > 1 and len(cell.records) > 1
            else self._scores(cell)
            for cell in cells
        ]
        n = len(cells)
        found = paired_bootstrap(
            lambda *values: contrast(*(statistic(value, *values[n:]) for value in values[:n])),
            *scores,
            *self._weights(cells),  # resampled with the items
            strata=strata,
            draws=draws,
            scale=scale,
            runs=self._between(contrast, scale, cells, scores, seeds),
        )
        return replace(found, kinds=frozenset(cell.kind for cell in cells if cell.kind))

    def _between(
        self, contrast: Contrast, scale: Scale, cells: Sequence[Cell], scores: Sequence[Array], seeds: Sequence[int]
    ) -> tuple[float, float] | None:
        """The variance of the contrast on its scale between runs, and its degrees of freedom, by the cells' spreads;
        None where one is not known.

        A perplexity is exp of a mean loss, so that runs count by how the contrast changes with each cell's. What seeds
        do to single items is in that and in the variance over items: it is taken off once (Cameron, Gelbach & Miller
        2011), as far as several seeds show it.
        """
        kinds = {cell.kind for cell in cells if cell.kind}
        shares = self._shares(cells)
        losses = np.array([np.atleast_2d(own).mean(0) @ shares for own in scores])  # the means behind perplexities
        if not kinds or not kinds <= self.spreads.keys() or losses.max() > LARGEST:
            return None

        def moved(at: int, step: float) -> float:
            return scale.to(contrast(*np.exp(losses + step * (np.arange(len(cells)) == at))))

        changes = [(moved(at, STEP) - moved(at, -STEP)) / (2 * STEP) for at in range(len(cells))]
        parts: list[tuple[float, float]] = []
        weights: dict[str, dict[int, float]] = {kind: defaultdict(float) for kind in sorted(kinds)}
        for cell, loss, change in zip(cells, losses, changes, strict=True):
            if cell.kind:
                used = seeds if len(seeds) > 1 and len(cell.records) > 1 else cell.seeds
                variance, free = self.spreads[cell.kind].of(cell.setting, loss)
                parts.append((change**2 * variance / len(used), free))
                for seed in used:
                    weights[cell.kind][seed] += change / len(used)
        for kind, by_seed in weights.items():
            variance, free = self.spreads[kind].shared
            parts.append((variance * sum(weight**2 for weight in by_seed.values()), free))
        total = sum(variance for variance, _ in parts)
        return max(0.0, total - _interaction(scores, changes, shares, len(seeds))), freedom(*parts)

    def _shares(self, cells: Sequence[Cell]) -> Array:
        """What each item counts of a mean loss."""
        if self.weights:
            tokens = self._weights(cells)[0]
            return np.asarray(tokens / tokens.sum())
        return np.concatenate([np.full(size, 1 / (size * len(self.sizes))) for size in self.sizes])

    def above(self, cell: Cell, other: Cell) -> Interval:
        """A perplexity above another's, as a share."""
        return self.interval(np.divide, cell, other).on(EXCESS)

    def besides(self, corpus: str) -> "Measure":
        """Of the perplexity on several corpora, that on the others."""
        others = [measure for measure in self.alone if measure.of != corpus]
        if len(others) in (0, len(self.alone)):
            return self
        if len(others) == 1:
            return others[0]
        parts, sizes = (tuple(getattr(own, name)[0] for own in others) for name in ("parts", "sizes"))
        return replace(self, parts=parts, sizes=sizes)

    def value(self, contrast: Contrast, *cells: Cell, seed: int | None = None) -> float:
        """contrast(value of each cell), without an interval; of one seed where given."""
        _, statistic = self._statistic()
        weights = self._weights(cells)
        return float(contrast(*(statistic(self._scores(cell, seed), *weights) for cell in cells)))

    def over_seeds(self, contrast: Contrast, *cells: Cell) -> tuple[float, float] | None:
        """Lowest and highest value over the seeds that all cells with several have; None with fewer than two."""
        seeds = _common_seeds(cells)
        values = [self.value(contrast, *cells, seed=seed) for seed in seeds]
        return (min(values), max(values)) if len(values) > 1 else None

    def _scores(self, cell: Cell, seed: int | None = None) -> Array:
        return np.concatenate([cell.scores(part, seed) for part in self.parts])

    def _weights(self, cells: Sequence[Cell]) -> list[Array]:
        """What the items weigh, the same for all cells; nothing where they count alike."""
        return [cells[0].scores(self.weights)] if self.weights else []

    def _statistic(self) -> tuple[Array | None, Callable[..., Array]]:
        """Strata of the items, and the value of scores [..., n], and of what the items weigh where they do."""
        if self.is_perplexity and len(self.parts) == 1:
            return None, perplexity
        strata = np.repeat(np.arange(len(self.sizes)), self.sizes)
        mean, unit = stratified_mean(strata), 1 if self.kind == "bits" else 100
        if self.is_perplexity:
            return strata, lambda losses: perplexity(mean(losses)[..., None])
        return strata, lambda scores: unit * mean(scores)


def _interaction(scores: Sequence[Array], changes: Sequence[float], shares: Array, seeds: int) -> float:
    """The variance of what seeds do to single items, in a contrast of arms that changes so much with each one's loss; 0
    where one seed does not show it."""
    if seeds < 2:
        return 0.0
    items = len(shares)
    terms = sum(change * np.atleast_2d(own) for change, own in zip(changes, scores, strict=True))
    terms = np.broadcast_to(terms, (seeds, items)) * shares
    rest = terms - terms.mean(0) - terms.mean(1, keepdims=True) + terms.mean()
    return float((rest**2).sum() / (seeds - 1) / seeds * items / max(1, items - 1))


def _common_seeds(cells: Sequence[Cell]) -> list[int]:
    """The seeds that all cells with several of them have."""
    several = [set(cell.seeds) for cell in cells if len(cell.seeds) > 1]
    return sorted(set.intersection(*several)) if several else []


def accuracy_title(tasks: Sequence[str]) -> str:
    """What the accuracy on zero-shot tasks is called where there is no room for how many they are."""
    return f"accuracy on {TASK_TITLES[tasks[0]]}" if len(tasks) == 1 else "mean accuracy"


def with_spreads(measure: Measure, records: Sequence[Record]) -> Measure:
    """A perplexity that knows how far runs lie apart by it, of each kind of cell."""
    return replace(measure, spreads=_spreads(measure, tuple(records)))


@functools.lru_cache(maxsize=64)
def _spreads(measure: Measure, records: tuple[Record, ...]) -> dict[str, Spread]:
    runs: dict[str, dict[object, dict[int, float]]] = defaultdict(dict)
    for cell in gather(records).values():
        if cell.kind and measure.covers(cell):
            runs[cell.kind][cell.setting] = {
                seed: math.log(measure.value(identity, cell, seed=seed)) for seed in cell.seeds
            }
    pooled = {kind: pool(arms) for kind, arms in runs.items()}
    return {kind: spread for kind, spread in pooled.items() if spread}


def usual_measures(records: Sequence[Record]) -> list[Measure]:
    """Perplexity on each corpus and, where zero-shot tasks were run, their mean accuracy; empty if nothing finished."""
    return perplexities(records) + accuracies(records)


def perplexities(records: Sequence[Record]) -> list[Measure]:
    """Perplexity on each corpus."""
    record = _finished(records)
    if record is None:
        return []
    found = []
    for corpus in record.arm.evaluation.corpora:
        part = f"loss/{corpus}"
        title = f"perplexity on {corpus_title(corpus)}"
        found.append(with_spreads(Measure("perplexity", corpus, title, (part,), (len(record.scores[part]),)), records))
    return found


def accuracies(records: Sequence[Record]) -> list[Measure]:
    """The mean accuracy on the zero-shot tasks."""
    record = _finished(records)
    tasks = [] if record is None else [task for task in record.arm.evaluation.tasks if task in ZERO_SHOT]
    if record is None or not tasks:
        return []
    short = accuracy_title(tasks)
    title = short + (f" on {len(tasks)} zero-shot tasks" if len(tasks) > 1 else "")
    return [replace(_accuracy("mean", title, tasks, record), short=short)]


def nothing(records: Sequence[Record]) -> list[Measure]:
    """No measure beside the primary one."""
    return []


def _finished(records: Sequence[Record]) -> Record | None:
    """The first that did."""
    return next((record for record in records if record.finished), None)


def text_measures(records: Sequence[Record]) -> list[Measure]:
    """Perplexity on all corpora together, as their geometric mean; empty if nothing finished."""
    each = perplexities(records)
    if not each:
        return []
    title = f"perplexity on {listed([corpus_title(measure.of) for measure in each])}"
    parts, sizes = tuple(measure.parts[0] for measure in each), tuple(measure.sizes[0] for measure in each)
    return [with_spreads(Measure("perplexity", "text", title, parts, sizes, alone=tuple(each)), records)]


def response_measures(records: Sequence[Record]) -> list[Measure]:
    """Perplexity of held-out Alpaca responses, nats over tokens, a pair resampled as one item; empty where none were
    scored."""
    record = _finished([record for record in records if record.arm.evaluation.pairs])
    if record is None:
        return []
    title = "perplexity of held-out Alpaca responses"
    sizes = (record.arm.evaluation.pairs,)
    own = Measure("perplexity", "responses", title, ("loss/responses",), sizes, weights="tokens/responses")
    return [with_spreads(own, records)]


def lacks(primary: Callable[[Sequence[Record]], list[Measure]], evaluation: Evaluation) -> str:
    """What arms that are scored so cannot give a measure of text or responses, in words; "" where they can."""
    if primary is response_measures and not evaluation.pairs:
        return "no held-out pairs"
    return "no corpora" if primary is text_measures and not evaluation.corpora else ""


def normality(records: Sequence[Record]) -> list[Measure]:
    """The share of neurons whose weights fail a test for normality; empty where no arm has it."""
    record = next((record for record in records if "non_normal" in record.scores), None)
    if record is None:
        return []
    title = "share of neurons whose weights are not normal, %"
    return [Measure("share", "non_normal", title, ("non_normal",), (len(record.scores["non_normal"]),))]


def stored_bits(records: Sequence[Record]) -> list[Measure]:
    """Bits of a weight, counted from what is stored; empty where no arm has them."""
    if not any("bits" in record.scores for record in records):
        return []
    return [Measure("bits", "", "stored bits a weight", ("bits",), (1,))]


def training_times(records: Sequence[Record]) -> list[Measure]:
    """How long trainings took, where all ran on accelerators."""
    accelerators = [r.provenance["hardware"]["accelerator"] for r in records if r.arm.tuning]
    return [Measure("seconds", "", "time of training")] if accelerators and all(accelerators) else []


def decoding_measures(records: Sequence[Record]) -> list[Measure]:
    """The time of a decoded token, of each model that was timed; empty where none was."""
    record = _finished([record for record in records if record.arm.decoding])
    if record is None or record.arm.decoding is None:
        return []
    found, settings = [], record.arm.decoding
    for name in (OWN, *settings.shapes):
        title = "time of a token" + ("" if name == OWN else f" in {TIMED_LAYERS} layers of {name}")
        parts = tuple(f"seconds/{name}/{kind}" for kind in EXECUTIONS)
        found.append(Measure("seconds", name, title, parts, (settings.rounds,) * len(parts)))
    return found


def speedup(measure: Measure, cell: Cell, fast: str, slow: str) -> Interval:
    """How many times as fast a decoded token is in one of EXECUTIONS as in another: the ratio of the medians of their
    rounds, which took turns."""
    parts = dict(zip(EXECUTIONS, measure.parts, strict=True))
    return paired_bootstrap(
        lambda a, b: np.median(b, axis=-1) / np.median(a, axis=-1),
        cell.scores(parts[fast]),
        cell.scores(parts[slow]),
        scale=RATIO,
    )


def task_measures(records: Sequence[Record]) -> list[Measure]:
    """The accuracy on each task alone; few-shot tasks only where some arm was scored on them."""
    found: dict[str, Measure] = {}
    for record in records:
        if record.finished:
            found |= {
                task: _accuracy(task, TASK_TITLES[task], [task], record)
                for task in record.arm.evaluation.tasks
                if task not in found
            }
    return list(found.values())


def _accuracy(name: str, title: str, tasks: Sequence[str], record: Record) -> Measure:
    parts = tuple(f"accuracy/{task}" for task in tasks)
    return Measure("accuracy", name, title, parts, tuple(len(record.scores[part]) for part in parts))


def identity(value: Any) -> Any:
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


def won_back_share(full: Array, rtn: Array, qat: Array) -> Array:
    """1 where LLM-QAT is as good as full precision, 0 where it is as bad as RTN. Worked: 26, 82, 47: 35/56."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((rtn - qat) / (rtn - full))


def megabytes(cell: Cell) -> float:
    """MB (10^6 bytes) of weights and a cache of CONTEXT tokens."""
    sizes = cell.records[0].metrics
    weights, cache = sizes["bytes/weights"], sizes["bytes/cache_per_token"]
    assert weights is not None and cache is not None  # as of every arm that finished
    return (weights + CONTEXT * cache) / 1e6


def frontier(measure: Measure, shown: Sequence[Cell], sizes: Array) -> list[int]:
    """Indices of the cells that none is as small and as good as, in the order of size; the first of equal ones."""
    losses = [measure.loss(0, measure.value(identity, cell)) for cell in shown]
    found, least = [], np.inf
    for index in sorted(range(len(shown)), key=lambda i: (sizes[i], losses[i])):
        if losses[index] < least:
            found.append(index)
            least = losses[index]
    return found
