"""Arms by method: built from a budget, told apart by what they do otherwise than their method does, and named so."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeVar

from studylib.config import (
    ALL,
    ALPACA,
    BESIDE,
    CORPORA,
    DEQUANTIZED,
    KL,
    MERGED_16,
    MERGED_DISTILLED,
    MERGED_QUANTIZED,
    NOTHING,
    PARTS,
    PLAIN,
    PROFILES,
    REQUANTIZED,
    Adapter,
    Arm,
    BitWidths,
    Budget,
    Evaluation,
    Format,
    Profile,
    Rate,
    RealText,
    Sampling,
    Scheme,
    Terms,
    Training,
    Tuning,
    check_known,
    check_seed,
    shown,
)
from studylib.methods.base import METHODS, find

CORPUS_TITLES = dict(zip(CORPORA, ("Wikipedia", "C4"), strict=True))
GRID_TITLES = {
    "asymmetric": "asymmetric MinMax",
    "full-range": "full-range MinMax",
    "statsq": "StatsQ weights",
    "lsq": "LSQ weights",
    "paretoq": "ParetoQ weights",
    "mxfp": "MXFP",
    "nvfp": "NVFP",
}
KIND_TITLES = {"dora": "DoRA", "pissa": "PiSSA", "loftq": "LoftQ"}
MERGE_TITLES = {
    DEQUANTIZED: "adapter merged, 16 bits",
    REQUANTIZED: "adapter merged, rounded again",
    MERGED_16: "adapter merged into the 16-bit weights",
    MERGED_QUANTIZED: "adapter merged into the 16-bit weights, then rounded",
    MERGED_DISTILLED: "adapter merged into the 16-bit weights, then rounded and distilled",
}


Part = TypeVar("Part", Sampling, Training, Tuning)
Rated = TypeVar("Rated", Training, Tuning)
Case = tuple[str, str, Format | None, Scheme]  # of arms that share a learning rate: see rate_case


def build_arm(
    budget: Profile,
    model: str,
    method: str,
    bits: str = "16-16-16",
    seed: int = 0,
    *,
    corpus: str | None = None,
    sampling: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    tuning: Mapping[str, Any] | None = None,
    scheme: Scheme = Scheme(),
    format: Format | None = None,
    adapter: Adapter | None = None,
    merge: str = BESIDE,
) -> Arm:
    """The arm of a method at a budget; adapter: by default the usual one, for methods that have one, or the one of the
    budget's terms.

    corpus: real text in place of generated; sampling, training, tuning: fields to change. Raises ValueError for a
    method that is not known, a field that there is not, what the method takes none of, or what does not go together.
    """
    own = find(method)
    check_seed(seed)  # also where nothing is drawn
    for name, part, given in (
        ("corpus", "data", corpus),
        ("sampling", "data", sampling),
        ("training", "training", training),
        ("tuning", "tuning", tuning),
    ):
        if given is not None and part not in own.needs:
            raise ValueError(f"{name}: is given, but {method!r} takes none")
    parts: dict[str, Any] = dict.fromkeys(PARTS)
    if "data" in own.needs:
        parts["data"] = _changed("sampling", dataclasses.replace(budget.sampling, seed=seed), sampling)
        if budget.training_text and corpus is None:
            for field in sampling or {}:
                raise ValueError(f"sampling: {field!r} has no effect on the training text of the budget; leave it out")
            parts["data"] = dataclasses.replace(usual_text(budget), seed=seed)
        if corpus is not None:
            parts["data"] = RealText(corpus, parts["data"].count, parts["data"].length, parts["data"].seed)
            for field in sampling or {}:
                if not hasattr(parts["data"], field):
                    raise ValueError(f"sampling: {field!r} has no effect on the text of a corpus; leave it out")
    case = method, bits, format, scheme
    if "training" in own.needs:
        parts["training"] = _changed("training", usual_training(budget, case), training)
    if "tuning" in own.needs:
        parts["instructions"] = dataclasses.replace(budget.instructions, seed=seed)
        parts["tuning"] = _changed("tuning", usual_tuning(budget, case), tuning)
    if "decoding" in own.needs:
        parts["decoding"] = budget.decoding
    if "engines" in own.needs:
        parts["engines"] = budget.engines
    parts["merging"] = budget.merging if merge == MERGED_DISTILLED else None
    terms = budget.terms_of(method, _base(method, format))
    usual = terms.adapter if terms else own.usual_adapter()
    parts["format"], parts["adapter"] = format, usual if adapter is None else adapter
    arm = Arm(model, method, bits, usual_evaluation(budget, method), scheme, **parts, merge=merge)
    own.check(arm)
    if bits in own.few_shot_at and not Setting.of(arm).changes:
        scored = arm.evaluation.tasks
        few_shot = tuple(
            task for task in budget.few_shot if (own.few_shot is None or task in own.few_shot) and task not in scored
        )
        evaluation = dataclasses.replace(arm.evaluation, tasks=scored + few_shot)
        return dataclasses.replace(arm, evaluation=evaluation)
    return arm


def rate_case(method: str, bits: str, format: Format | None, scheme: Scheme) -> str:
    """What arms share a learning rate: method, bits, and the kind of format or grid that is trained on. Their other
    fields, what is compared above all, do not change it."""
    own, base = find(method), _base(method, format)
    on = base.kind if base else scheme.grid if "scheme" in own.takes else ""
    on += f" with {scheme.activations} activations" if scheme.activations else ""
    on += " rotated" * scheme.rotated
    return f"{method} {bits} {on}".rstrip()


def _base(method: str, format: Format | None) -> Format | None:
    """The format that is trained on; LoRA's says only what it is rounded to afterwards."""
    return format if method in METHODS and "format" in METHODS[method].needs else None


def usual_evaluation(budget: Profile, method: str) -> Evaluation:
    """What a budget scores the arms of a method on."""
    own = find(method)
    if "engines" in own.needs:
        return NOTHING  # what it deploys is what "encoded" does
    if not budget.apart or not (own.rounds or own.needs):  # full precision is what all are compared with
        return budget.evaluation
    return budget.evaluation.of_pairs if "tuning" in own.needs else budget.evaluation.of_text


def usual_text(budget: Profile) -> Sampling | RealText:
    """What a budget calibrates and distils on: text that the model writes, or its own training text."""
    if not budget.training_text:
        return budget.sampling
    return RealText(budget.training_text, budget.sampling.count, budget.sampling.length, usual=True)


def usual_training(budget: Profile, case: Case) -> Training:
    """How a budget distils such an arm: at the rate that was chosen for it, else at its method's share of the
    budget's."""
    own = _shared_rate(budget.training, case[0])
    return dataclasses.replace(own, **_rates(budget, case, own))


def usual_tuning(budget: Profile, case: Case) -> Tuning:
    """How a budget fine-tunes such an arm: at the rate that was chosen for it, else on the terms that cover it, else at
    its method's share of the budget's rate."""
    method, _, format, _ = case
    terms = budget.terms_of(method, _base(method, format))
    own = terms.tuning if terms else _shared_rate(budget.tuning, method)
    return dataclasses.replace(own, **_rates(budget, case, own))


def _shared_rate(usual: Rated, method: str) -> Rated:
    """A budget at the method's share of its learning rate, as one would write it: 0.00006 is a fifth of 0.0003."""
    return dataclasses.replace(usual, learning_rate=float(f"{usual.learning_rate * find(method).relative_rate:.12g}"))


def _rates(budget: Profile, case: Case, usual: Budget) -> dict[str, Any]:
    """Only grids that are learned have a rate of their own."""
    method, _, _, scheme = case
    rate = dict(budget.rates).get(rate_case(*case), Rate(usual.learning_rate, usual.grid_rate))
    trained = find(method).trains_grid(scheme)
    return {"learning_rate": rate.learning_rate, "grid_rate": rate.grid_rate if trained else None}


def _changed(name: str, part: Part, changes: Mapping[str, Any] | None) -> Part:
    """The part of an arm with other values in some fields."""
    allowed = [field.name for field in dataclasses.fields(part)]
    if changes is not None and not isinstance(changes, Mapping):
        raise ValueError(f"{name}: {shown(changes)} is not allowed; use a dictionary of fields, {', '.join(allowed)}")
    for field in changes or {}:
        check_known(f"{name}: field", field, allowed)
    return dataclasses.replace(part, **(changes or {}))


@dataclass(frozen=True)
class Setting:
    """What is compared: a method at a bit setting, and by field what of it is not as by default.

    changes: (field, value) pairs, in the order of CHANGES, such as ("training.loss", "labels"). Fields of budgets, the
    seed and the evaluation are not part of it: arms that are compared share them. model: what the model is called
    among several that are compared; "": all arms share it.
    """

    method: str
    bits: str
    changes: tuple[tuple[str, Any], ...] = ()
    model: str = ""

    @classmethod
    def of(cls, arm: Arm) -> "Setting":
        """The setting of an arm. A format counts as changed where it is not its method's usual one at that width, an
        adapter where it is not the usual one, or not that of the paper's terms that it is trained on."""
        changes, terms = [], _terms(arm)
        usual = METHODS[arm.method].usual_adapter() if arm.method in METHODS else None
        adapter = terms.adapter if terms else usual or Adapter()
        for field, change in CHANGES.items():
            value, (part, _, name) = change.value(arm), field.partition(".")
            default = getattr(adapter, name) if part == "adapter" else change.default
            if value is not None and value != default:
                changes.append((field, value))
        return cls(arm.method, arm.bits, tuple(changes))

    def __getitem__(self, field: str) -> Any:
        """The value of a field that is changed, or what it is by default."""
        if field not in CHANGES:
            raise KeyError(f"{field!r} is no field of a setting; use one of {', '.join(CHANGES)}")
        return dict(self.changes).get(field, CHANGES[field].default)

    @property
    def variant(self) -> str:
        """In words, what is not as by default: the data, loss, grid, ... being studied."""
        return ", ".join(CHANGES[field].words(value) for field, value in self.changes)

    @property
    def title(self) -> str:
        """For sentences and tables: "LLM-QAT at 4-8-4 (loss labels)"; rounded weights go by their format."""
        method, of = METHODS.get(self.method), f" of {self.model}" if self.model else ""
        if method and method.checks_weights:
            return self.variant + of
        at = f" at {self.bits}" if method is None or method.rounds or method.needs else ""
        return method_title(self.method) + at + (f" ({self.variant})" if self.variant else "") + of


def _terms(arm: Arm) -> Terms | None:
    """A paper's terms that the arm is fine-tuned on, if it is."""
    known = (budget.terms_of(arm.method, _base(arm.method, arm.format)) for budget in PROFILES.values())
    return next((terms for terms in known if terms and terms.has_made(arm.tuning)), None)


def setting(method: str, bits: str, changes: Mapping[str, Any] | None = None) -> Setting:
    """A setting by its changed fields: setting("llm-qat", "4-8-4", {"training.loss": "labels"}).

    Raises KeyError for a field that no setting has.
    """
    given = dict(changes or {})
    for field in given:
        if field not in CHANGES:
            raise KeyError(f"{field!r} is no field of a setting; use one of {', '.join(CHANGES)}")
    return Setting(method, bits, tuple((field, given[field]) for field in CHANGES if field in given))


@dataclass(frozen=True)
class Change:
    """A field that settings tell apart: how an arm's value is found (None: it has none), the default, and the words."""

    value: Callable[[Arm], Any]
    default: Any
    words: Callable[[Any], str]


def _part(name: str, field: str, kind: type | None = None) -> Callable[[Arm], Any]:
    def value(arm: Arm) -> Any:
        part = getattr(arm, name)
        return None if part is None or (kind and not isinstance(part, kind)) else getattr(part, field)

    return value


def _compared_text(arm: Arm) -> str | None:
    """The corpus that an arm is trained on, where it is compared with other texts."""
    return arm.data.corpus if isinstance(arm.data, RealText) and not arm.data.usual else None


def _format(arm: Arm) -> Format | None:
    """The format, unless it is the usual one of its method at that width."""
    if arm.format is None or arm.method not in METHODS:
        return arm.format
    with contextlib.suppress(ValueError):  # a width that the usual format does not have
        if arm.format == METHODS[arm.method].usual_format(arm.format.bits):
            return None
    return arm.format


CHANGES = {
    "data.corpus": Change(_compared_text, None, lambda corpus: f"{corpus_title(corpus)} text"),
    "data.strategy": Change(_part("data", "strategy", Sampling), "hybrid", str),
    "data.top_k": Change(_part("data", "top_k", Sampling), 50, lambda k: f"top-k {k or 'off'}"),
    "data.temperature": Change(_part("data", "temperature", Sampling), 1.0, "sampled at temperature {:g}".format),
    "training.loss": Change(_part("training", "loss"), KL, "loss {}".format),
    "training.temperature": Change(_part("training", "temperature"), 1.0, "KL at temperature {:g}".format),
    "training.scale": Change(_part("training", "scale"), "token", "loss scale {}".format),
    "training.mask": Change(_part("training", "mask"), None, "gradient mask ±{:g}".format),
    "training.masters": Change(_part("training", "masters"), "fp32", "{} masters".format),
    "scheme.grid": Change(_part("scheme", "grid"), "symmetric", lambda grid: GRID_TITLES[grid]),
    "scheme.activations": Change(_part("scheme", "activations"), None, "{} activations".format),
    "scheme.group": Change(_part("scheme", "group"), None, "weights in groups of {}".format),
    "scheme.cache_scale": Change(_part("scheme", "cache_scale"), "token", "cache scale a {}".format),
    "scheme.rotated": Change(_part("scheme", "rotated"), False, lambda on: "rotated"),
    "scheme.keys": Change(_part("scheme", "keys"), "before-rotary", lambda keys: f"keys {keys.replace('-', ' ')}"),
    "format": Change(_format, None, lambda format: format.title),
    "adapter.kind": Change(_part("adapter", "kind"), PLAIN, lambda kind: KIND_TITLES[kind]),
    "adapter.rank": Change(_part("adapter", "rank"), Adapter().rank, "rank {}".format),
    "adapter.scaling": Change(_part("adapter", "scaling"), Adapter().scaling, "scaled by {:g}".format),
    "adapter.dropout": Change(_part("adapter", "dropout"), 0.0, "dropout {:g}".format),
    "adapter.layers": Change(_part("adapter", "layers"), ALL, lambda layers: f"on {layers.replace('+', ' and ')} only"),
    "adapter.init": Change(_part("adapter", "init"), None, "{} initialisation".format),
    "tuning.checkpointing": Change(_part("tuning", "checkpointing"), False, lambda on: "checkpointing"),
    "tuning.paged": Change(_part("tuning", "paged"), False, lambda on: "paged optimizer"),
    "merge": Change(lambda arm: arm.merge, BESIDE, lambda merge: MERGE_TITLES[merge]),
}


def method_title(name: str) -> str:
    """What a method is called; its name where it is not registered here."""
    return METHODS[name].title if name in METHODS else name


def title(arm: Arm) -> str:
    """What an arm is called in lists: "LLM-QAT 4-8-4 (loss labels)"."""
    own = Setting.of(arm)
    method = METHODS.get(arm.method)
    bits = "" if method and not method.rounds and not method.needs else f" {arm.bits}"
    return method_title(arm.method) + bits + (f" ({own.variant})" if own.variant else "")


def file_title(path: str) -> str:
    return PurePath(path).stem


def corpus_title(corpus: str) -> str:
    """A corpus's name for people; the file's name where it is a path."""
    return CORPUS_TITLES.get(corpus) or file_title(corpus)


def pairs_title(source: str) -> str:
    """What instruction pairs are called: Alpaca, or by their file's name."""
    return "Alpaca" if source == ALPACA else file_title(source)


def own_files(arm: Arm) -> list[str]:
    """The files of one's own that an arm reads, by their names: pairs, texts that are scored, text that it is trained
    on."""
    found = [arm.instructions.source] if arm.instructions else []
    found += [arm.evaluation.instructions, *arm.evaluation.corpora]
    found += [arm.data.corpus] if isinstance(arm.data, RealText) else []
    return [PurePath(name).name for name in dict.fromkeys(found) if name not in (*CORPORA, ALPACA)]


def data_title(arm: Arm) -> str:
    """What an arm's training text is called beside others'."""
    if isinstance(arm.data, RealText):
        return CHANGES["data.corpus"].words(arm.data.corpus)
    words = [CHANGES[field].words(value) for field, value in Setting.of(arm).changes if field.startswith("data.")]
    return ", ".join(words) or CHANGES["data.strategy"].default


def order(arm: Arm) -> tuple[Any, ...]:
    """Sorts arms for tables: full precision first, then from many bits to few, in the methods' order at equal bits,
    variants after each method's default."""
    bits, names = BitWidths.parse(arm.bits), list(METHODS)
    rank = names.index(arm.method) if arm.method in names else len(names)
    return rank > 0, -bits.weights, -bits.activations, -bits.cache, rank, bool(Setting.of(arm).changes), arm.seed


@functools.cache
def seedless(arm: Arm) -> Arm:
    """The arm with seed 0: equal for arms that differ in no more."""
    changes: dict[str, Any] = {
        name: dataclasses.replace(part, seed=0)
        for name, part in (("data", arm.data), ("instructions", arm.instructions))
        if part is not None
    }
    return dataclasses.replace(arm, **changes)


def container(arm: Arm, wanted: str | None = None) -> str:
    """Which of base.CONTAINERS holds what the arm deploys: `wanted`, or the usual one. ValueError, with the reason,
    where it does not."""
    try:
        return find(arm.method).container(arm, wanted)
    except ValueError as error:
        raise ValueError(f"record: {title(arm)} cannot be exported; {error}") from None
