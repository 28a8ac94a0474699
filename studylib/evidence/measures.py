"""Arms side by side: the seeds of each gathered, and paired contrasts of what was measured on the same items."""

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np

from studylib.config import (
    ENGINES,
    EXECUTIONS,
    OWN,
    PASSES,
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
    PERCENT,
    PLAIN,
    POSITIVE,
    RATIO,
    Array,
    Interval,
    Scale,
    clustered,
    clusters_worth,
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
    pairs_title,
    seedless,
    setting,
    usual_evaluation,
    usual_text,
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

PROCESS = "process"  # the scores that say which process timed each round
Contrast = Callable[..., Any]  # of arrays [...], a value of each cell
# Of numbers that arms are compared by.
Kind = Literal["perplexity", "kl", "accuracy", "bits_per_byte", "probability", "share", "bits", "seconds", "bytes"]
IN_PERCENT = ("accuracy", "probability", "share")
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
    found: dict[Arm, list[Record]] = defaultdict(list)
    for record in records:
        if not any(_same_scores(record, other) for other in found[record.arm]):
            found[record.arm].append(record)
            unique.append(record)
    _check_shared("model", unique, lambda arm: arm.model)
    _check_evaluations(unique)
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


def _check_evaluations(records: Sequence[Record]) -> None:
    _check_shared("evaluation", records, lambda arm: _text(arm.evaluation))
    _check_shared("evaluation", records, lambda arm: _tasks(arm.evaluation))
    _check_shared("evaluation", records, lambda arm: _pairs(arm.evaluation))


def _check_shared(what: str, records: Sequence[Record], value_of: Callable[[Arm], Any]) -> None:
    """ValueError where arms have several of something."""
    values = list(filter(None, dict.fromkeys(value_of(record.arm) for record in records)))
    if len(values) > 1:
        raise ValueError(f"records: {what} {values[0]!r} and {what} {values[1]!r} cannot be compared")


def gather_family(records: Sequence[Record]) -> Cells:
    """Cells of models of one family beside each other, each setting with the name of its model, the smallest model
    first; of one model, what `gather` gives.

    Raises ValueError as `gather` does, and where the models were not scored on the same windows, as by different
    tokenizers, so far as the records tell.
    """
    by_model: dict[str, list[Record]] = {}
    for record in records:
        by_model.setdefault(record.arm.model, []).append(record)
    if len(by_model) < 2:
        return gather(records)
    _check_evaluations(records)
    _check_windows(records)
    names = model_names(by_model)
    gathered = {names[model]: gather(own) for model, own in by_model.items()}
    return {
        (named := replace(own, model=model)): replace(cell, setting=named)
        for model, cells in sorted(gathered.items(), key=lambda item: _largest(item[1].values()))
        for own, cell in cells.items()
    }


def model_names(models: Iterable[str]) -> dict[str, str]:
    """What each model is called beside the others: the last part of its name, where no other has it."""
    last = {model: re.split(r"[/\\]", model.rstrip("/\\"))[-1] for model in models}
    counts = Counter(last.values())
    return {model: name if counts[name] == 1 else model for model, name in last.items()}


def _largest(cells: Iterable[Cell]) -> float:
    """The bytes of weights of the largest cell: a model's, in full precision."""
    return max((cell.records[0].metrics["bytes/weights"] or 0.0 for cell in cells if cell.records), default=0.0)


def _check_windows(records: Sequence[Record]) -> None:
    """ValueError where records disagree on how many windows of a corpus there are, or from which documents."""
    seen: dict[str, tuple[str, list[float | None]]] = {}
    for record in records:
        for name, values in record.scores.items():
            kind, _, corpus = name.partition("/")
            if kind not in ("loss", "document") or corpus not in record.arm.evaluation.corpora:
                continue
            own: list[float | None] = list(values) if kind == "document" else [float(len(values))]
            model, known = seen.setdefault(name, (record.arm.model, own))
            if known != own:
                raise ValueError(
                    f"records: the windows of {corpus} of model {model!r} and model {record.arm.model!r} are not the "
                    "same and cannot be compared"
                )


def _text(evaluation: Evaluation) -> Any:
    """Which windows of which corpora are scored; None where none are."""
    return (evaluation.corpora, evaluation.windows, evaluation.length) if evaluation.corpora else None


def _tasks(evaluation: Evaluation) -> Any:
    """Which items of which zero-shot tasks are scored; None where none are."""
    tasks = _shared(evaluation).tasks
    return (tasks, evaluation.items, evaluation.source) if tasks else None


def _pairs(evaluation: Evaluation) -> Any:
    """Which held-out pairs are scored; None where none are."""
    return (evaluation.pairs, evaluation.instructions) if evaluation.pairs else None


def _same_scores(record: Record, other: Record) -> bool:
    """Whether two runs came to the same, as far as both tell: an older studylib kept less."""
    common = record.scores.keys() & other.scores.keys()
    return record.status == other.status and all(record.scores[name] == other.scores[name] for name in common)


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


def of_family(records: Sequence[Record], budgets: Mapping[str, Profile]) -> list[Record]:
    """`of_profile` for each model of a family, at its budget: with the learning rates that were chosen for it."""
    return [record for model, budget in budgets.items() for record in of_profile(records, model, budget)]


class Shown(list[Record]):
    """Records that are shown, and `known`: all of the run, which say how far runs of a kind lie apart."""

    def __init__(self, records: Iterable[Record], known: Iterable[Record]):
        super().__init__(records)
        self.known = tuple(known)


def with_further_seeds(records: Sequence[Record], known: Sequence[Record]) -> Shown:
    """The records, and those of `known` that repeat one of their settings with another seed: every run on record
    counts, in figures and tables as in verdicts, so that one number has one interval."""
    settings, keys = {Setting.of(record.arm) for record in records}, {record.key for record in records}
    others = [record for record in known if record.key not in keys]
    return Shown([*records, *(own for own in others if Setting.of(own.arm) in settings)], [*records, *others])


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
    evaluation, training, tuning = budget.evaluation, budget.training, budget.tuning
    if arm.method in METHODS:
        evaluation = usual_evaluation(budget, arm.method)
        case = arm.method, arm.bits, arm.format, arm.scheme
        training, tuning = usual_training(budget, case), usual_tuning(budget, case)
    if arm.model != model or _shared(arm.evaluation) != _shared(evaluation):
        return False
    data: Any = usual_text(budget)
    if isinstance(arm.data, RealText) and not budget.training_text:
        data = RealText(arm.data.corpus, data.count, data.length)
    elif budget.training_text and arm.data and arm.data != replace(data, seed=arm.data.seed):
        return False
    usual = {
        "data": data,
        "training": training,
        "instructions": budget.instructions,
        "tuning": tuning,
        "merging": budget.merging,
        "decoding": budget.decoding,
        "engines": budget.engines,
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

    kind and of: "perplexity" of a corpus, of "text" (geometric mean over the corpora) or of "responses"; "kl" to full
    precision, in nats, likewise; "accuracy", in %, of a task or as "mean" (zero-shot tasks, each weighing the same),
    and "bits_per_byte" and "probability", in %, of right answers likewise; "share", in %, of something; stored "bits" a
    weight; "seconds" of a model's decoded token, whose parts are EXECUTIONS, or of a pass, whose parts are ENGINES;
    planned "bytes".
    parts: the scores behind it. sizes: items of each part. weights: the scores that items weigh by, where they do not
    count alike: the tokens of each text. clusters: for each part, the scores that say which of its items belong
    together: windows of one document. short: the title where there is little room, if another. spreads: how far runs
    lie apart by the measure, for each kind of cell that was run with several seeds. alone: what it is a mean of.
    """

    kind: Kind
    of: str
    title: str
    parts: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    short: str = ""
    weights: str = ""
    clusters: tuple[str, ...] = ()
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
        """Whether the cell has finished records, all of which were scored on it."""
        return bool(cell.records) and all(part in record.scores for record in cell.records for part in self.parts)

    @property
    def items(self) -> int:
        return sum(self.sizes)

    @property
    def higher_is_better(self) -> bool:
        return self.kind in ("accuracy", "probability")

    def loss(self, reference: Any, value: Any) -> Any:
        """How much worse `value` is than `reference`, in the measure's unit; negative if better."""
        return reference - value if self.higher_is_better else value - reference

    def text(self, value: float) -> str:
        """The value as people read it: one decimal of a percentage, three digits of others."""
        return points(value) if self.kind in IN_PERCENT else number(value)

    def interval(self, contrast: Contrast, *cells: Cell) -> Interval:
        """95% interval of contrast(value of each cell), resampling the items that all of them were scored on.

        Items of one cluster are resampled together, where any of the cells' records says which these are: windows of
        one document are no independent evidence (Miller 2024, "Adding Error Bars to Evals", section 2.2). To that comes
        the variance between runs with other seeds: as `spreads` have it of each cell, also of one that was run once;
        where they do not, the spread over seeds that all cells with several have.
        """
        seeds = _common_seeds(cells)
        scale = self._scale(contrast)
        scores = [
            np.stack([self._scores(cell, seed) for seed in seeds])
            if len(seeds) > 1 and len(cell.records) > 1
            else self._scores(cell)
            for cell in cells
        ]
        own, count = self, None
        if labels := self._labels(cells):
            count = sum(clusters_worth(part) for part in labels)
            own = replace(self, sizes=tuple(len(np.unique(part)) for part in labels))
            scores = [self._by_cluster(values, labels) for values in scores]
        strata, statistic = own._statistic()
        draws = int(np.clip(RESAMPLED // own.items, 2_000, 10_000))
        n = len(cells)
        found = paired_bootstrap(
            lambda *values: contrast(*(statistic(value, *values[n:]) for value in values[:n])),
            *scores,
            *self._weights(cells),  # resampled with the items
            strata=strata,
            draws=draws,
            scale=scale,
            runs=own._between(contrast, scale, cells, scores, seeds),
            count=count,
        )
        return replace(found, kinds=frozenset(cell.kind for cell in cells if cell.kind))

    def _scale(self, contrast: Contrast) -> Scale:
        if self.is_perplexity and contrast in (identity, np.divide):
            return RATIO
        if contrast is not identity:
            return PLAIN
        return PERCENT if self.kind in IN_PERCENT else POSITIVE

    def _labels(self, cells: Sequence[Cell]) -> list[Array]:
        """The cluster of each item, part by part; nothing where no record has them of all parts. Cells that can be
        compared have the same items, so that any of them can tell."""
        records = [record for cell in cells for record in cell.records]
        having = [next((own for own in records if name in own.scores), None) for name in self.clusters]
        return [
            np.asarray(own.scores[name], dtype=float)
            for name, own in zip(self.clusters, having, strict=True)
            if own and None not in having
        ]

    def _by_cluster(self, values: Array, labels: Sequence[Array]) -> Array:
        """Scores [..., n] of items as one for each cluster, part by part."""
        parts = np.split(values, np.cumsum(self.sizes)[:-1], axis=-1)
        return np.concatenate([clustered(part, own) for part, own in zip(parts, labels, strict=True)], axis=-1)

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
        by_setting: dict[Setting, float] = defaultdict(float)
        for cell, change in zip(cells, changes, strict=True):
            by_setting[cell.setting] += change
        for cell, loss in dict(zip(cells, losses, strict=True)).items():
            if cell.kind:
                change = by_setting.pop(cell.setting, 0.0)  # of a cell beside itself: none
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
        parts, sizes, clusters = (
            tuple(getattr(own, name)[0] for own in others) for name in ("parts", "sizes", "clusters")
        )
        return replace(self, parts=parts, sizes=sizes, clusters=clusters)

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
        mean, unit = stratified_mean(strata), 100 if self.kind in IN_PERCENT else 1
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
    return replace(measure, spreads=_spreads(measure, records.known if isinstance(records, Shown) else tuple(records)))


@functools.lru_cache(maxsize=64)
def _spreads(measure: Measure, records: tuple[Record, ...]) -> dict[str, Spread]:
    runs: dict[str, dict[object, dict[int, float]]] = defaultdict(dict)
    for cell in gather_family(records).values():
        if cell.kind and measure.covers(cell):
            runs[cell.kind][cell.setting] = {
                seed: math.log(measure.value(identity, cell, seed=seed)) for seed in cell.seeds
            }
    pooled = {kind: pool(arms) for kind, arms in runs.items()}
    return {kind: spread for kind, spread in pooled.items() if spread}


def usual_measures(records: Sequence[Record]) -> list[Measure]:
    """Perplexity on each corpus and, where zero-shot tasks were run, their mean accuracy; only what was scored."""
    return perplexities(records) + accuracies(records)


def covering(measures: Sequence[Measure], records: Sequence[Record]) -> list[Measure]:
    """Those that all finished records were scored on."""
    cells = [cell for cell in gather(records).values() if cell.records]
    return [measure for measure in measures if all(map(measure.covers, cells))]


def perplexities(records: Sequence[Record]) -> list[Measure]:
    """Perplexity on each corpus."""
    return [with_spreads(measure, records) for measure in _of_corpora("perplexity", "loss", "perplexity", records)]


def divergences(records: Sequence[Record]) -> list[Measure]:
    """KL to full precision on all corpora together; empty where no arm has it."""
    each = _of_corpora("kl", "kl", "KL divergence from full precision", records)
    return [_together(each, "KL divergence from full precision")] if each else []


def _of_corpora(kind: Kind, score: str, what: str, records: Sequence[Record]) -> list[Measure]:
    """A measure of each corpus, of scores of its windows; of the corpora whose scores some arm has."""
    found = []
    scored = _finished([record for record in records if record.arm.evaluation.corpora])
    for corpus in scored.arm.evaluation.corpora if scored else ():
        part, title = f"{score}/{corpus}", f"{what} on {corpus_title(corpus)}"
        having = next((record for record in records if record.finished and part in record.scores), None)
        if having:
            size = len(having.scores[part])
            found.append(Measure(kind, corpus, title, (part,), (size,), clusters=(f"document/{corpus}",)))
    return found


def _together(each: Sequence[Measure], what: str) -> Measure:
    """The measure of all corpora, each weighing the same."""
    title = f"{what} on {listed([corpus_title(measure.of) for measure in each])}"
    parts, sizes, clusters = (
        tuple(getattr(measure, name)[0] for measure in each) for name in ("parts", "sizes", "clusters")
    )
    return Measure(each[0].kind, "text", title, parts, sizes, clusters=clusters, alone=tuple(each))


def accuracies(records: Sequence[Record]) -> list[Measure]:
    """The mean accuracy on the zero-shot tasks."""
    record = _finished([record for record in records if _tasks(record.arm.evaluation)])
    if record is None:
        return []
    tasks = _zero_shot(record)
    short = accuracy_title(tasks)
    title = short + (f" on {len(tasks)} zero-shot tasks" if len(tasks) > 1 else "")
    return [replace(_answers("accuracy", "mean", title, tasks, record), short=short)]


def right_answers(records: Sequence[Record]) -> list[Measure]:
    """How sure the right answers of the zero-shot tasks are: their bits a byte, and their probability among all
    choices. They tell arms apart that answer alike (DataDecide, arXiv 2504.11393). Empty where no arm has them."""
    parts = ("bits_per_byte", "probability")
    for record in records:
        tasks = _zero_shot(record)
        if tasks and all(f"{part}/{task}" in record.scores for part in parts for task in tasks):
            where = TASK_TITLES[tasks[0]] if len(tasks) == 1 else f"{len(tasks)} zero-shot tasks"
            return [
                _answers("bits_per_byte", "mean", f"bits a byte of right answers on {where}", tasks, record),
                _answers("probability", "mean", f"probability of right answers on {where}", tasks, record),
            ]
    return []


def answers(records: Sequence[Record]) -> list[Measure]:
    """Of fine-tuned models: the mean accuracy, and the bits a byte of right answers."""
    return accuracies(records) + right_answers(records)[:1]


def unchanged(records: Sequence[Record]) -> list[Measure]:
    """Of models that should stay what they were: all of text, and the answers."""
    return perplexities(records) + divergences(records) + answers(records)


def unchanged_text(records: Sequence[Record]) -> list[Measure]:
    """`unchanged`, without the answers."""
    return perplexities(records) + divergences(records)


def _zero_shot(record: Record) -> list[str]:
    return [task for task in record.arm.evaluation.tasks if task in ZERO_SHOT]


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
    return [with_spreads(_together(each, "perplexity"), records)]


def response_measures(records: Sequence[Record]) -> list[Measure]:
    """Perplexity of held-out responses, nats over tokens, a pair resampled as one item; empty where none were
    scored."""
    record = _finished([record for record in records if record.arm.evaluation.pairs])
    if record is None:
        return []
    title = f"perplexity of held-out {pairs_title(record.arm.evaluation.instructions)} responses"
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


def engine_measures(records: Sequence[Record]) -> list[Measure]:
    """The time of a pass in each engine, of prefill and decoding and each batch that was timed; empty where none was.
    "of" is the pass and the batch: "prefill/8"."""
    record = _finished([record for record in records if record.arm.engines])
    if record is None or record.arm.engines is None:
        return []
    settings = record.arm.engines
    return [
        Measure(
            "seconds",
            f"{stage}/{batch}",
            f"{stage}, batch {batch}",
            tuple(f"seconds/{stage}/{batch}/{engine}" for engine in ENGINES),
            (settings.rounds,) * len(ENGINES),
        )
        for stage in PASSES
        for batch in settings.batches
    ]


def tokens_a_second(measure: Measure, cell: Cell, engine: str) -> Interval:
    """Of all sequences of a batch together, by the median time in each process: their median and its 95% interval."""
    stage, _, batch = measure.of.partition("/")
    settings = cell.arm.engines
    assert settings is not None
    count = settings.tokens_of(stage, int(batch))
    seconds = by_process(cell, dict(zip(ENGINES, measure.parts, strict=True))[engine])
    return paired_bootstrap(lambda speeds: np.median(speeds, axis=-1), count / seconds)


def speedup(measure: Measure, cell: Cell, fast: str, slow: str) -> Interval:
    """How many times as fast a decoded token is in one of EXECUTIONS, or a pass in one of ENGINES, as in another: the
    ratio of the medians of their rounds, which took turns. Of several processes, the geometric mean, and the interval
    is over these."""
    parts = {part.rpartition("/")[2]: part for part in measure.parts}
    own, other = by_process(cell, parts[fast]), by_process(cell, parts[slow])
    if PROCESS not in cell.records[0].scores:
        return paired_bootstrap(lambda a, b: np.median(b, axis=-1) / np.median(a, axis=-1), own, other, scale=RATIO)
    return paired_bootstrap(lambda times: np.exp(times.mean(-1)), np.log(other / own), scale=RATIO)


def by_process(cell: Cell, part: str) -> Array:
    """The median of the rounds in each process that timed them; of an older record, which had one, the rounds."""
    times = cell.scores(part)
    if PROCESS not in cell.records[0].scores:
        return times
    process = cell.scores(PROCESS)
    return np.array([np.median(times[process == number]) for number in np.unique(process)])


def task_measures(records: Sequence[Record]) -> list[Measure]:
    """The accuracy on each task alone; few-shot tasks only where some arm was scored on them."""
    found: dict[str, Measure] = {}
    for record in records:
        if record.finished:
            found |= {
                task: _answers("accuracy", task, TASK_TITLES[task], [task], record)
                for task in record.arm.evaluation.tasks
                if task not in found
            }
    return list(found.values())


def _answers(kind: Kind, name: str, title: str, tasks: Sequence[str], record: Record) -> Measure:
    parts = tuple(f"{kind}/{task}" for task in tasks)
    return Measure(kind, name, title, parts, tuple(len(record.scores[part]) for part in parts))


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
