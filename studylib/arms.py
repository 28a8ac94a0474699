"""What is run: an Arm says everything that determines a result."""

import dataclasses
import functools
import json
import typing
from dataclasses import dataclass
from types import NoneType, UnionType

from studylib import adapters, merging
from studylib.adapters import GPTQ_LORA, L4Q, LORA, QA_LORA, QAT, QAT_LORA, QLORA, Adapter, usual_format
from studylib.distill import Training
from studylib.evaluation import Evaluation
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
NOTHING = Evaluation((), windows=1, length=2)  # to score an arm on
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
