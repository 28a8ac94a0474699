"""What is run: an Arm says everything that determines a result, a Profile is a named budget to build arms from."""

import dataclasses
import json
import typing
from dataclasses import dataclass
from types import NoneType, UnionType

from studylib.distill import Training
from studylib.evaluation import ZERO_SHOT, Evaluation
from studylib.layers import AFTER_ROTARY, PER_HEAD, Scheme
from studylib.losses import ATTENTION, KL
from studylib.quantizers import BitWidths
from studylib.sampling import Sampling
from studylib.training_data import RealText

METHODS = FULL_PRECISION, RTN, SMOOTHQUANT, GPTQ, AWQ, LLM_QAT, SMOOTHQUANT_QAT = (
    "full-precision",
    "rtn",
    "smoothquant",
    "gptq",
    "awq",
    "llm-qat",
    "smoothquant+llm-qat",
)
TITLES = {
    FULL_PRECISION: "full precision",
    RTN: "RTN",
    SMOOTHQUANT: "SmoothQuant",
    GPTQ: "GPTQ",
    AWQ: "AWQ",
    LLM_QAT: "LLM-QAT",
    SMOOTHQUANT_QAT: "SmoothQuant + LLM-QAT",
}
TRAINED = (LLM_QAT, SMOOTHQUANT_QAT)
CALIBRATED = (SMOOTHQUANT, GPTQ, AWQ)
HEADLINE = ("16-16-16", "4-8-4")  # the settings of the papers' main tables, which few-shot tasks are run at as well
CORPUS_TITLES = {"wikipedia": "Wikipedia", "c4": "C4"}
GRID_TITLES = {"asymmetric": "asymmetric MinMax", "statsq": "StatsQ clipping", "lsq": "LSQ"}


@dataclass(frozen=True)
class Arm:
    """One thing to measure. Two arms that are equal have the same result on the same machine.

    method: one of METHODS; bits "W-A-KV"; scheme: grids and where they apply. data: what a method is calibrated or
    trained on, for those that need any (all but full precision and RTN); training: for the trained ones only.
    seed draws the data; it is 0 for methods that draw nothing, so that all seeds share one record.
    """

    model: str
    method: str
    bits: str
    evaluation: Evaluation
    scheme: Scheme = Scheme()
    data: Sampling | RealText | None = None
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
        for name, users in (("data", TRAINED + CALIBRATED), ("training", TRAINED)):
            if (getattr(self, name) is None) == (self.method in users):
                state = "is missing" if self.method in users else "is given"
                raise ValueError(
                    f"{name}: {state}, but {self.method!r} is {'one' if self.method in users else 'none'} of "
                    f"the methods that need it: {', '.join(users)}"
                )
        if self.scheme != Scheme() and self.method in (FULL_PRECISION, GPTQ, AWQ):
            raise ValueError(f"scheme: {self.method!r} takes none; its grids are its own")
        if self.scheme.grid == "lsq" and self.method not in TRAINED:
            raise ValueError(
                f"grid: 'lsq' is learned in training, which {self.method!r} has none of; use {' or '.join(TRAINED)}"
            )
        if (
            self.training
            and ATTENTION in self.training.features
            and self.scheme.keys == AFTER_ROTARY
            and bits.cache < 16
        ):
            raise ValueError(
                f"loss: {self.training.loss!r} needs attention maps, which the kernel that quantizes keys "
                f"{AFTER_ROTARY!r} does not return"
            )

    @property
    def seed(self) -> int:
        return self.data.seed if self.data else 0

    @property
    def variant(self) -> str:
        """In words, what an arm of its method and bits is not by default: the data, loss, grid, ... being studied."""
        return ", ".join(_data_words(self.data) + _training_words(self.training) + _scheme_words(self.scheme))

    @property
    def title(self) -> str:
        bits = "" if self.method == FULL_PRECISION else f" {self.bits}"
        return TITLES[self.method] + bits + (f" ({self.variant})" if self.variant else "")

    def canonical(self) -> str:
        """JSON with sorted keys: the same for equal arms.

        Fields that are as by default are left out, so that a new one changes no arm that does not use it.
        """
        return json.dumps(_chosen(self), sort_keys=True)

    @classmethod
    def from_dict(cls, fields: dict) -> "Arm":
        """From the dictionary of a record; fields that an arm does not have, and wrong types, raise ValueError."""
        return _build(cls, fields, "arm")


def corpus_title(corpus: str) -> str:
    """A corpus's name for people; the file's name where it is a path."""
    return CORPUS_TITLES.get(corpus, corpus.rpartition("/")[2].rpartition(".")[0])


def data_title(data: Sampling | RealText) -> str:
    """What a data set is called beside others."""
    return ", ".join(_data_words(data)) or data.strategy


def _data_words(data: Sampling | RealText | None) -> list[str]:
    if data is None:
        return []
    if isinstance(data, RealText):
        return [f"{corpus_title(data.corpus)} text"]
    words = [] if data.strategy == "hybrid" else [data.strategy]
    words += [] if data.top_k == 50 else [f"top-k {data.top_k or 'off'}"]
    return words + ([] if data.temperature == 1 else [f"sampled at temperature {data.temperature:g}"])


def _training_words(training: Training | None) -> list[str]:
    if training is None:
        return []
    words = [] if training.loss == KL else [f"loss {training.loss}"]
    words += [] if training.temperature == 1 else [f"KL at temperature {training.temperature:g}"]
    words += [] if training.scale == "token" else [f"loss scale {training.scale}"]
    words += [] if training.mask is None else [f"gradient mask ±{training.mask:g}"]
    return words + ([] if training.masters == "fp32" else [f"{training.masters} masters"])


def _scheme_words(scheme: Scheme) -> list[str]:
    words = [] if scheme.grid == "symmetric" else [GRID_TITLES[scheme.grid]]
    words += [] if scheme.weight_group is None else [f"weight groups of {scheme.weight_group}"]
    words += ["cache scale a head"] if scheme.cache_scale == PER_HEAD else []
    return words + (["keys after rotary"] if scheme.keys == AFTER_ROTARY else [])


def _chosen(value):
    """A dataclass as a dictionary of the fields that are not as by default."""
    if not dataclasses.is_dataclass(value):
        return value
    named = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
    return {field.name: _chosen(own) for field, own in named if own != field.default}


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
    options = [option for option in options if option is not NoneType]
    kind = options[0]
    if len(options) > 1 and isinstance(value, dict):  # the one whose fields they are
        kind = next((option for option in options if set(value) <= set(typing.get_type_hints(option))), kind)
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
    """A budget: the data and training a method may spend, what every arm is scored on, and the seeds that make the
    interval over runs. few_shot: tasks that the headline settings are scored on as well."""

    sampling: Sampling
    training: Training
    evaluation: Evaluation
    seeds: tuple[int, ...]
    few_shot: tuple[str, ...] = ()

    def extended(self, steps: int) -> "Profile":
        """This budget with `steps` more for every training, which goes on from where it ended."""
        if steps == 0:
            return self
        if steps < 0:
            raise ValueError(f"extend: {steps} is not allowed; use 0 or more")
        done = self.training.steps
        longer = dict(steps=done + steps, extended_from=(*self.training.extended_from, done))
        return dataclasses.replace(self, training=dataclasses.replace(self.training, **longer))

    def arm(
        self,
        model: str,
        method: str,
        bits: str = "16-16-16",
        seed: int = 0,
        *,
        corpus: str | None = None,
        sampling: dict[str, object] | None = None,
        training: dict[str, object] | None = None,
        scheme: Scheme = Scheme(),
    ) -> Arm:
        """The arm of this budget. corpus: real text in place of generated; sampling, training: fields to change."""
        data = trained = None
        if method in TRAINED + CALIBRATED:
            data = dataclasses.replace(self.sampling, **({"seed": seed} | (sampling or {})))
            if corpus is not None:
                data = RealText(corpus, data.count, data.length, data.seed)
        if method in TRAINED:
            trained = dataclasses.replace(self.training, **(training or {}))
        arm = Arm(model, method, bits, self.evaluation, scheme, data, trained)
        if method in (FULL_PRECISION, RTN, LLM_QAT) and bits in HEADLINE and not arm.variant:
            evaluation = dataclasses.replace(self.evaluation, tasks=self.evaluation.tasks + self.few_shot)
            return dataclasses.replace(arm, evaluation=evaluation)
        return arm


PROFILES = {
    "smoke": Profile(
        Sampling(count=8, length=32, batch=4),
        Training(steps=4, batch=2, learning_rate=1e-3),
        Evaluation(("wikipedia", "c4"), windows=4, length=64, tasks=("piqa",), items=4, pairs=2),
        seeds=(0,),
    ),
    "quick": Profile(
        Sampling(count=32, length=256, batch=64),
        Training(steps=32, batch=1, learning_rate=3e-4),
        Evaluation(
            ("wikipedia", "c4"), windows=16, length=256, tasks=("piqa", "arc_easy", "openbookqa"), items=40, pairs=32
        ),
        seeds=(0,),
        few_shot=("mmlu", "triviaqa"),
    ),
    "full": Profile(
        Sampling(count=4096, length=512, batch=128),
        Training(steps=512, batch=8, learning_rate=1e-4),
        Evaluation(("wikipedia", "c4"), windows=128, length=512, tasks=ZERO_SHOT, items=1000, pairs=480),
        seeds=(0, 1, 2),
        few_shot=("mmlu", "triviaqa"),
    ),
    "paper": Profile(
        Sampling(count=96_000, length=2048, batch=256),
        Training(steps=12_000, batch=8, learning_rate=2e-5),
        Evaluation(("wikipedia", "c4"), windows=32, length=2048, tasks=ZERO_SHOT, items=None, pairs=480),
        seeds=(0, 1, 2),
        few_shot=("mmlu", "triviaqa"),
    ),
}


def profile(name: str) -> Profile:
    """The named budget; ValueError with the names there are."""
    if name not in PROFILES:
        raise ValueError(f"profile: {name!r} is not known; use one of {', '.join(PROFILES)}")
    return PROFILES[name]
