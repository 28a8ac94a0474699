"""What is run: an Arm says everything that determines a result, a Profile is a named budget to build arms from."""

import dataclasses
import json
import typing
from dataclasses import dataclass
from types import NoneType, UnionType

from studylib.corpora import check_corpus
from studylib.distill import Training
from studylib.evaluation import ZERO_SHOT, validate_tasks
from studylib.quantizers import BitWidths
from studylib.sampling import Sampling

FULL_PRECISION, RTN, LLM_QAT = METHODS = ("full-precision", "rtn", "llm-qat")
TITLES = {FULL_PRECISION: "full precision", RTN: "RTN", LLM_QAT: "LLM-QAT"}


@dataclass(frozen=True)
class Evaluation:
    """What a model is scored on: `windows` windows of `length` tokens of each corpus, `items` of each task (None: all).

    source "archive" reads the pinned benchmark files, "hub" lm-eval's own data sets.
    """

    corpora: tuple[str, ...]
    windows: int
    length: int
    tasks: tuple[str, ...] = ()
    items: int | None = None
    source: str = "archive"

    def __post_init__(self):
        for corpus in self.corpora:
            check_corpus(corpus)
        validate_tasks(self.tasks)
        for name, least in (("windows", 1), ("length", 2), ("items", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: {value!r} is not allowed; use {least} or more")
        if self.source not in ("archive", "hub"):
            raise ValueError(f"source: {self.source!r} is not known; use 'archive' or 'hub'")


@dataclass(frozen=True)
class Arm:
    """One thing to measure. Two arms that are equal have the same result on the same machine.

    method "full-precision", "rtn" or "llm-qat"; bits "W-A-KV"; sampling and training for "llm-qat" only. seed draws the
    generated data; it is 0 for methods that draw nothing, so that all seeds share one record.
    """

    model: str
    method: str
    bits: str
    evaluation: Evaluation
    sampling: Sampling | None = None
    training: Training | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method: {self.method!r} is not known; use one of {', '.join(METHODS)}")
        bits = BitWidths.parse(self.bits)
        if (str(bits) == "16-16-16") != (self.method == FULL_PRECISION):
            raise ValueError(
                f"bits: {self.bits} does not go with {self.method!r}; full precision is 16-16-16, "
                "every other method quantizes something"
            )
        for name in ("sampling", "training"):
            if (getattr(self, name) is None) == (self.method == LLM_QAT):
                raise ValueError(
                    f"{name}: {'is missing' if self.method == LLM_QAT else 'is given'}; "
                    f"{LLM_QAT!r} needs it and no other method takes it"
                )

    @property
    def seed(self) -> int:
        return self.sampling.seed if self.sampling else 0

    @property
    def title(self) -> str:
        return TITLES[self.method] + ("" if self.method == FULL_PRECISION else f" {self.bits}")

    def canonical(self) -> str:
        """JSON with sorted keys: the same for equal arms."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_dict(cls, fields: dict) -> "Arm":
        """From the dictionary of a record; fields that an arm does not have, and wrong types, raise ValueError."""
        return _build(cls, fields, "arm")


def _build(cls, fields: dict, where: str):
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: {fields!r} is not a mapping of fields")
    types = typing.get_type_hints(cls)
    unknown = sorted(set(fields) - set(types))
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; allowed are {', '.join(types)}")
    missing = sorted(
        f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in fields
    )
    if missing:
        raise ValueError(f"{where}: the field {missing[0]!r} is missing")
    return cls(**{name: _convert(types[name], value, f"{where}.{name}") for name, value in fields.items()})


def _convert(kind, value, where: str):
    options = typing.get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if value is None and NoneType in options:
        return None
    (kind,) = [option for option in options if option is not NoneType]
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(_convert(typing.get_args(kind)[0], item, where) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(kind, type) or not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}: {value!r} is not a {getattr(kind, '__name__', kind)}")
    return value


@dataclass(frozen=True)
class Profile:
    """A budget: what LLM-QAT may spend, what every arm is scored on, and the seeds that make the interval over runs."""

    sampling: Sampling
    training: Training
    evaluation: Evaluation
    seeds: tuple[int, ...]

    def arm(self, model: str, method: str, bits: str = "16-16-16", seed: int = 0) -> Arm:
        if method != LLM_QAT:
            return Arm(model, method, bits, self.evaluation)
        return Arm(model, method, bits, self.evaluation, dataclasses.replace(self.sampling, seed=seed), self.training)


PROFILES = {
    "smoke": Profile(
        Sampling(count=8, length=32, batch=4),
        Training(steps=4, batch=2, learning_rate=1e-3),
        Evaluation(("wikipedia", "c4"), windows=4, length=64, tasks=("piqa",), items=4),
        seeds=(0,),
    ),
    "quick": Profile(
        Sampling(count=96, length=256, batch=96),
        Training(steps=96, batch=1, learning_rate=3e-4),
        Evaluation(("wikipedia", "c4"), windows=16, length=256, tasks=("piqa", "arc_easy", "openbookqa"), items=40),
        seeds=(0,),
    ),
    "full": Profile(
        Sampling(count=4096, length=512, batch=128),
        Training(steps=512, batch=8, learning_rate=1e-4),
        Evaluation(("wikipedia", "c4"), windows=128, length=512, tasks=(*ZERO_SHOT, "mmlu"), items=None),
        seeds=(0, 1, 2),
    ),
    "paper": Profile(
        Sampling(count=96_000, length=2048, batch=256),
        Training(steps=12_000, batch=8, learning_rate=2e-5),
        Evaluation(("wikipedia", "c4"), windows=64, length=2048, tasks=(*ZERO_SHOT, "mmlu", "triviaqa"), items=None),
        seeds=(0, 1, 2),
    ),
}


def profile(name: str) -> Profile:
    """The named budget; ValueError with the names there are."""
    if name not in PROFILES:
        raise ValueError(f"profile: {name!r} is not known; use one of {', '.join(PROFILES)}")
    return PROFILES[name]
