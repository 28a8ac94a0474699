"""What is run: an Arm says everything that determines a result, a Profile is a named budget to build arms from."""

import dataclasses
import functools
import json
import typing
from dataclasses import dataclass
from types import NoneType, UnionType

from studylib import adapters, merging
from studylib.adapters import GPTQ_LORA, L4Q, LORA, QA_LORA, QAT, QAT_LORA, QLORA, Adapter, usual_format
from studylib.distill import Training
from studylib.evaluation import ZERO_SHOT, Evaluation
from studylib.execution import Decoding, check_format
from studylib.finetuning import Instructions, Tuning
from studylib.formats import Format
from studylib.layers import AFTER_ROTARY, PER_HEAD, Scheme
from studylib.losses import ATTENTION, KL
from studylib.quantizers import BitWidths
from studylib.sampling import Sampling
from studylib.training_data import RealText

FULL_PRECISION, RTN, SMOOTHQUANT, GPTQ, AWQ, LLM_QAT, SMOOTHQUANT_QAT, ENCODED, EXECUTED = (
    "full-precision",
    "rtn",
    "smoothquant",
    "gptq",
    "awq",
    "llm-qat",
    "smoothquant+llm-qat",
    "encoded",
    "4-bit kernel",
)
TITLES = {
    FULL_PRECISION: "full precision",
    RTN: "RTN",
    SMOOTHQUANT: "SmoothQuant",
    GPTQ: "GPTQ",
    AWQ: "AWQ",
    LLM_QAT: "LLM-QAT",
    SMOOTHQUANT_QAT: "SmoothQuant + LLM-QAT",
    ENCODED: "rounded weights",
    EXECUTED: "4-bit kernel",
    LORA: "LoRA",
    QLORA: "QLoRA",
    GPTQ_LORA: "GPTQ + LoRA",
    QA_LORA: "QA-LoRA",
    QAT_LORA: "QAT-LoRA",
    L4Q: "L4Q",
    QAT: "QAT",
}
METHODS = tuple(TITLES)
TRAINED = (LLM_QAT, SMOOTHQUANT_QAT)
TUNED = adapters.METHODS
UNROUNDED = (FULL_PRECISION, LORA)
CALIBRATED = (SMOOTHQUANT, GPTQ, AWQ)
HEADLINE = {  # the settings of the papers' main tables, which few-shot tasks are run at as well: MMLU if fine-tuned
    FULL_PRECISION: ("16-16-16",),
    RTN: ("4-8-4",),
    LLM_QAT: ("4-8-4",),
    LORA: ("16-16-16",),
    QLORA: ("4-16-16",),
    L4Q: ("4-16-16",),
}
RATES = {
    L4Q: 0.3,
    QAT_LORA: 0.3,
    QA_LORA: 0.2,
    QAT: 0.05,
}  # of the adapters' learning rate, where scales or weights train
NOTHING = Evaluation((), windows=1, length=2)  # to score an arm on
DECODING = Decoding(shapes=("llama-7b",))  # L4Q's own model beside the study's
CORPUS_TITLES = {"wikipedia": "Wikipedia", "c4": "C4"}
GRID_TITLES = {"asymmetric": "asymmetric MinMax", "statsq": "StatsQ clipping", "lsq": "LSQ"}
KIND_TITLES = {"dora": "DoRA", "pissa": "PiSSA", "loftq": "LoftQ"}
MERGE_TITLES = {
    merging.DEQUANTIZED: "adapter merged, 16 bits",
    merging.REQUANTIZED: "adapter merged, rounded again",
    merging.MERGED_16: "adapter merged into the 16-bit weights",
    merging.MERGED_QUANTIZED: "adapter merged into the 16-bit weights, then rounded",
}


@dataclass(frozen=True)
class Arm:
    """One thing to measure. Two arms that are equal have the same result on the same machine.

    method: one of METHODS; bits "W-A-KV"; scheme: grids and where they apply. data: the text that a method is
    calibrated or distilled on, training: the distillation, for methods that have them.
    format: the number format of "encoded" weights, of those that the "4-bit kernel" multiplies (decoding: how that is
    timed), or of the base that the methods of TUNED fine-tune on `instructions` with `tuning`, through `adapter`;
    merge: how the result is deployed (see merging.merge).
    seed draws the data; it is 0 for methods that draw nothing, so that all seeds share one record.
    """

    model: str
    method: str
    bits: str
    evaluation: Evaluation
    scheme: Scheme = Scheme()
    data: Sampling | RealText | None = None
    training: Training | None = None
    format: Format | None = None
    adapter: Adapter | None = None
    instructions: Instructions | None = None
    tuning: Tuning | None = None
    merge: str = merging.ADAPTER
    decoding: Decoding | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method: {self.method!r} is not known; use one of {', '.join(METHODS)}")
        bits = BitWidths.parse(self.bits)
        if (str(bits) == "16-16-16") != (self.method in UNROUNDED):
            raise ValueError(
                f"bits: {self.bits} does not go with {self.method!r}; {' and '.join(UNROUNDED)} are 16-16-16, "
                "every other method quantizes something"
            )
        for name, users in (
            ("data", (*TRAINED, *CALIBRATED, GPTQ_LORA)),
            ("training", TRAINED),
            ("instructions", TUNED),
            ("tuning", TUNED),
            ("decoding", (EXECUTED,)),
        ):
            if (getattr(self, name) is None) == (self.method in users):
                state = "is missing" if self.method in users else "is given"
                raise ValueError(
                    f"{name}: {state}, but {self.method!r} is {'one' if self.method in users else 'none'} of "
                    f"the methods that need it: {', '.join(users)}"
                )
        if self.scheme != Scheme() and self.method not in (RTN, SMOOTHQUANT, *TRAINED):
            raise ValueError(f"scheme: {self.method!r} takes none; its grids are its own")
        self._check_format(bits)
        if self.scheme.grid == "lsq" and self.method not in TRAINED:
            raise ValueError(
                f"grid: 'lsq' is learned in training, which {self.method!r} has none of; use {' or '.join(TRAINED)}"
            )
        if self.scheme.grid == "lsq" and self.training.mask is not None:
            raise ValueError(f"mask: {self.training.mask} does not go with the grid 'lsq', whose gradients are its own")
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

    def _check_format(self, bits: BitWidths) -> None:
        if self.method in TUNED:
            merged_only = self.method == LORA and self.merge in merging.PACKED
            adapters.check(self.method, None if merged_only else self.format, self.adapter)
            merging.check_merge(self.method, self.merge, self.format)
        else:
            for name, given in (("adapter", self.adapter), ("merge", self.merge != merging.ADAPTER)):
                if given:
                    raise ValueError(f"{name}: is given, but {self.method!r} is not fine-tuned")
            if (self.format is None) == (self.method in (ENCODED, EXECUTED)):
                state, stores = ("is missing", "") if self.format is None else ("is given", "not ")
                raise ValueError(f"format: {state}, but {self.method!r} is {stores}one of {ENCODED!r} and {EXECUTED!r}")
            if self.method == EXECUTED:
                check_format(self.format)
        if self.format and self.method != LORA and str(bits) != f"{self.format.bits}-16-16":
            raise ValueError(
                f"bits: {self.bits} does not go with the format {self.format.title}; use {self.format.bits}-16-16"
            )

    @property
    def seed(self) -> int:
        """What draws the data."""
        source = self.instructions or self.data
        return source.seed if source else 0

    @property
    def variant(self) -> str:
        """In words, what an arm of its method and bits is not by default: the data, loss, grid, ... being studied."""
        return ", ".join(
            [
                *_data_words(self.data),
                *_training_words(self.training),
                *_scheme_words(self.scheme),
                *_format_words(self.method, self.format),
                *_adapter_words(self.adapter),
                *_tuning_words(self.tuning),
                *([MERGE_TITLES[self.merge]] if self.merge in MERGE_TITLES else []),
            ]
        )

    @property
    def title(self) -> str:
        bits = "" if self.method == FULL_PRECISION else f" {self.bits}"
        return TITLES[self.method] + bits + (f" ({self.variant})" if self.variant else "")

    @functools.cached_property
    def as_trained(self) -> "Arm":
        """Deployed as it was trained, and scored on nothing: equal for arms that share what makes their weights."""
        format = None if self.method == LORA else self.format
        return dataclasses.replace(self, evaluation=NOTHING, format=format, merge=merging.ADAPTER)

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


def _format_words(method: str, format: Format | None) -> list[str]:
    if format is None or (method != ENCODED and format == usual_format(method, format.bits)):
        return []
    return [format.title]


def _adapter_words(adapter: Adapter | None) -> list[str]:
    if adapter is None:
        return []
    words = [] if adapter.kind == adapters.PLAIN else [KIND_TITLES[adapter.kind]]
    words += [] if adapter.rank == Adapter().rank else [f"rank {adapter.rank}"]
    words += [] if adapter.scaling == Adapter().scaling else [f"scaled by {adapter.scaling:g}"]
    words += [] if adapter.dropout == 0 else [f"dropout {adapter.dropout:g}"]
    words += [] if adapter.layers == adapters.ALL else [f"on {adapter.layers.replace('+', ' and ')} only"]
    return words + ([] if adapter.init == Adapter().init else [f"{adapter.init} initialisation"])


def _tuning_words(tuning: Tuning | None) -> list[str]:
    if tuning is None:
        return []
    return ["checkpointing"] * tuning.checkpointing + ["paged optimizer"] * tuning.paged


def _chosen(value):
    """A dataclass as a dictionary of the fields that are not as by default, with a float where one is meant."""
    if not dataclasses.is_dataclass(value):
        return value
    types, chosen = typing.get_type_hints(type(value)), {}
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        if own != field.default:
            kind = types[field.name]
            chosen[field.name] = (
                float(own) if float in (kind, *typing.get_args(kind)) and own is not None else _chosen(own)
            )
    return chosen


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
    interval over runs. few_shot: tasks that the headline settings are scored on as well. block: weights that share a
    scale where a method needs such blocks."""

    sampling: Sampling
    training: Training
    instructions: Instructions
    tuning: Tuning
    evaluation: Evaluation
    seeds: tuple[int, ...]
    few_shot: tuple[str, ...] = ()
    block: int = 64
    decoding: Decoding = DECODING

    def extended(self, steps: int) -> "Profile":
        """This budget with `steps` more for every training, which goes on from where it ended."""
        if steps == 0:
            return self
        if steps < 0:
            raise ValueError(f"extend: {steps} is not allowed; use 0 or more")
        longer = {
            name: dataclasses.replace(own, steps=own.steps + steps, extended_from=(*own.extended_from, own.steps))
            for name, own in (("training", self.training), ("tuning", self.tuning))
        }
        return dataclasses.replace(self, **longer)

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
        format: Format | None = None,
        adapter: Adapter | None = None,
        tuning: dict[str, object] | None = None,
        merge: str = merging.ADAPTER,
    ) -> Arm:
        """The arm of this budget; adapter: by default Adapter(), for methods that have one.

        corpus: real text in place of generated; sampling, training, tuning: fields to change.
        """
        data = trained = instructions = tuned = None
        if method in (*TRAINED, *CALIBRATED, GPTQ_LORA):
            data = dataclasses.replace(self.sampling, **({"seed": seed} | (sampling or {})))
            if corpus is not None:
                data = RealText(corpus, data.count, data.length, data.seed)
        if method in TRAINED:
            trained = dataclasses.replace(self.training, **(training or {}))
        if method in TUNED:
            instructions = dataclasses.replace(self.instructions, seed=seed)
            rate = self.tuning.learning_rate * RATES.get(method, 1.0)
            tuned = dataclasses.replace(self.tuning, **({"learning_rate": rate} | (tuning or {})))
            adapter = adapter or (None if method == QAT else Adapter())
        chosen = {"format": format, "adapter": adapter, "instructions": instructions, "tuning": tuned, "merge": merge}
        chosen["decoding"] = self.decoding if method == EXECUTED else None
        arm = Arm(model, method, bits, self.evaluation, scheme, data, trained, **chosen)
        if bits in HEADLINE.get(method, ()) and not arm.variant:
            few_shot = tuple(task for task in self.few_shot if task == "mmlu" or method not in TUNED)
            evaluation = dataclasses.replace(self.evaluation, tasks=self.evaluation.tasks + few_shot)
            return dataclasses.replace(arm, evaluation=evaluation)
        return arm


PROFILES = {
    "smoke": Profile(
        Sampling(count=8, length=32, batch=4),
        Training(steps=4, batch=2, learning_rate=1e-3),
        Instructions(length=128),
        Tuning(steps=4, batch=2, learning_rate=1e-3, weight_decay=0.01, warmup=0.1),
        Evaluation(("wikipedia", "c4"), windows=4, length=64, tasks=("openbookqa",), items=4, pairs=2),
        seeds=(0,),
        block=32,
        decoding=Decoding(context=4, tokens=2, rounds=4),
    ),
    "quick": Profile(
        Sampling(count=32, length=256, batch=64),
        Training(steps=32, batch=1, learning_rate=3e-4),
        Instructions(length=256),
        Tuning(steps=24, batch=2, learning_rate=1e-3, weight_decay=0.01, warmup=0.1),
        Evaluation(("wikipedia", "c4"), windows=16, length=256, tasks=("arc_easy",), items=40, pairs=16),
        seeds=(0,),
    ),
    "full": Profile(
        Sampling(count=4096, length=512, batch=128),
        Training(steps=512, batch=8, learning_rate=1e-4),
        Instructions(length=512),
        Tuning(steps=195, batch=32, learning_rate=5e-4, weight_decay=0.01, warmup=0.1),
        Evaluation(("wikipedia", "c4"), windows=128, length=512, tasks=ZERO_SHOT, items=1000, pairs=480),
        seeds=(0, 1, 2),
        few_shot=("mmlu", "triviaqa"),
    ),
    "paper": Profile(
        Sampling(count=96_000, length=2048, batch=256),
        Training(steps=12_000, batch=8, learning_rate=2e-5),
        Instructions(length=2048),
        Tuning(steps=195, batch=128, learning_rate=2e-4, weight_decay=0.01, warmup=0.1),
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
