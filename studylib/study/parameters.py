"""What every parameter of every notebook may be: declared here, checked before any arm is made."""

import contextlib
import functools
import re
from collections.abc import Callable, Collection, MutableMapping
from dataclasses import dataclass
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from studylib.config import (
    ADAPTER_KINDS,
    AFFINE,
    ALWAYS,
    AUTO,
    CORPORA,
    FULL,
    GRIDS,
    INITS,
    MAX_BATCH,
    MAX_COUNT,
    MAX_GROUP,
    MAX_JOBS,
    MAX_LENGTH,
    MAX_RANK,
    MAX_SEED,
    MERGES,
    MXFP,
    NVFP,
    OFF,
    OWN_DATA,
    PROFILES,
    STRATEGIES,
    TEMPERATURES,
    WHEN,
    BitWidths,
    Scheme,
    check_corpus,
    check_layers,
    check_llama_cpp,
    check_loss,
    check_own,
    is_line,
    shown,
)
from studylib.methods import METHODS
from studylib.study.records import COMPUTE

MOST_ITEMS = 512  # of a list: as many as there are bit settings
NUMBER = r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?"


@dataclass(frozen=True)
class Parameter:
    """kind: its type and range, for pydantic. allowed: the same in words, after "use". example: a value that passes."""

    kind: Any
    allowed: str
    example: Any

    @functools.cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.kind, config=ConfigDict(strict=True, allow_inf_nan=False))

    def checked(self, value: Any) -> Any:
        """The value, as the type that is meant: 1 is 1.0 where a float is. ValueError says what is wrong with it."""
        use = f"use {self.allowed}, for example {self.example!r}"
        if value is None:
            raise ValueError(f"null is not allowed; leave the parameter out for its default, or {use}")
        try:
            found = self._adapter.validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            reason = str(first.get("ctx", {}).get("error", ""))  # of what is checked elsewhere too, its own words
            raise ValueError(reason or f"{shown(first['input'])} is not allowed; {use}") from error
        for item in found if isinstance(found, list) else ():
            if found.count(item) > 1:
                raise ValueError(f"{shown(item)} is there twice; name it once")
        return found


def _that(check: Callable[[Any], Any]) -> AfterValidator:
    """What `check` does not raise ValueError for, or answer False to."""

    def checked(value: Any) -> Any:
        if check(value) is False:
            raise ValueError
        return value

    return AfterValidator(checked)


def _whole(least: int, most: int, example: int) -> Parameter:
    return Parameter(Annotated[int, Field(ge=least, le=most)], f"a whole number from {least} to {most}", example)


def _one_of(choices: Collection[Any]) -> Parameter:
    *others, last = map(str, choices)
    first = next(iter(choices))
    kind: Any = type(first)
    return Parameter(Annotated[kind, _that(lambda value: value in choices)], f"{', '.join(others)} or {last}", first)


def _list(one: Parameter, what: str, example: list[Any], least: int = 0) -> Parameter:
    item: Any = one.kind
    kind = Annotated[list[item], Field(min_length=least, max_length=MOST_ITEMS)]
    return Parameter(kind, f"a list of {what}" + ", at least one" * (least > 0), example)


def _wholes(least: int, most: int, example: list[int], at_least: int = 0) -> Parameter:
    return _list(_whole(least, most, 0), f"whole numbers from {least} to {most}", example, at_least)


def _some_of(choices: Collection[Any], least: int = 0) -> Parameter:
    return _list(_one_of(choices), _one_of(choices).allowed, list(choices)[:2], least)


def _text(check: Callable[[str], Any], allowed: str, example: str) -> Parameter:
    return Parameter(Annotated[str, _that(check)], allowed, example)


def _as_number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and re.fullmatch(NUMBER, value) else value


def _as_flag(value: Any) -> Any:
    """papermill's -p passes true and false on as texts."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    """papermill's -p passes {windows: 32} on as a text."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with contextlib.suppress(yaml.YAMLError, RecursionError, ValueError):
            return yaml.safe_load(value)
    return value


def _as_list(value: Any) -> Any:
    """papermill's -p passes [small, large] on as a text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(yaml.YAMLError, RecursionError, ValueError):
            return yaml.safe_load(value)
    return value


def _check_when(value: str) -> None:
    if value == ALWAYS:
        check_llama_cpp()


_NAME = Annotated[str, _that(is_line)]
NAME = Parameter(_NAME, "a known name, a local folder or a hub id", "smollm2-135m")
FAMILY = Parameter(
    Annotated[list[_NAME], BeforeValidator(_as_list), Field(min_length=2, max_length=MOST_ITEMS)],
    "a list of two or more models of one family: known names, local folders or hub ids",
    ["owner/small", "owner/large"],
)
FOLDER = _text(lambda path: not path or is_line(path), "the path of a folder, or '' for the usual one", "results/runs")
FLAG = Parameter(Annotated[bool, BeforeValidator(_as_flag)], "true or false", True)
SETTING = _text(BitWidths.parse, "bits of weights, activations and cache, each 2 to 8, or 16 for off", "4-8-4")
WITH_CACHE = _text(lambda bits: BitWidths.parse(bits).cache != OFF, "bit widths whose last is 2 to 8", "16-16-4")
WEIGHTS_ALONE = _list(
    _text(lambda bits: re.fullmatch("[2348]-16-16", bits) is not None, "", "4-16-16"),
    "2-16-16, 3-16-16, 4-16-16 or 8-16-16",
    ["4-16-16"],
)
SETTINGS = _list(SETTING, "bit widths", ["8-8-8", "4-8-4"])


def _floats(grid: str) -> Parameter:
    """Bit widths that a grid of floats has."""
    check = Scheme(grid).check_widths
    return _list(_text(lambda bits: check(BitWidths.parse(bits)), "", "4-8-8"), "bit widths", ["4-4-16", "4-8-8"])


GROUP = Parameter(
    Annotated[int, Field(ge=0, le=MAX_GROUP), _that(lambda group: group != 1)],
    f"a whole number from 2 to {MAX_GROUP}, or 0 for the profile's",
    64,
)
GROUPS = _wholes(2, MAX_GROUP, [32])
NUMBERS = _list(
    Parameter(Annotated[float, BeforeValidator(_as_number), Field(ge=TEMPERATURES[0], le=TEMPERATURES[1])], "", 1.0),
    "numbers from {:g} to {:g}".format(*TEMPERATURES),
    [0.7, 2.0],
)
CORPUS = _text(check_corpus, "", "c4")
CORPORA_LIST = _list(CORPUS, f"{', '.join(CORPORA)} or paths of .txt or .jsonl files", list(CORPORA))
KINDS = _some_of(ADAPTER_KINDS)
WAYS = _some_of(MERGES)
LOSS = _text(check_loss, "", "kl")
WIDTHS, ALL_WIDTHS = (4, 3, 2), (4, 3, 2, 8)  # of NormalFloat; of integers

# without training; of these, in groups; on a low-bit base; whose memory can be planned
ROUNDED = [name for name, method in METHODS.items() if method.rounds and method.needs <= {"data"}]
IN_GROUPS = [name for name, method in METHODS.items() if method.takes >= {"format"} and "data" in method.needs]
ON_A_BASE = [name for name, method in METHODS.items() if method.needs >= {"tuning", "format"}]
PLANNED = [name for name, method in METHODS.items() if "tuning" in method.needs and "data" not in method.needs]

CALIBRATED = _some_of(IN_GROUPS)
COMPUTED = Parameter(
    Annotated[str, _that(lambda value: value in COMPUTE)], "new, missing or all (see studylib.run)", COMPUTE[0]
)
LLAMA_CPP = Parameter(
    Annotated[str, _that(lambda value: value in WHEN), _that(_check_when)],
    "auto (where it is installed or on record), always or never",
    AUTO,
)
OWN = Parameter(
    Annotated[dict[str, Any], BeforeValidator(_as_parts), _that(check_own)],
    f"a dictionary of {', '.join(OWN_DATA)}",
    {"pairs": "mine.json", "windows": 32},
)
COMMON = {"model": NAME, "profile": _one_of(PROFILES), "own": OWN, "results": FOLDER, "output": FOLDER}
RUN = COMMON | {"compute": COMPUTED}
RATES_FILE = _text(lambda path: not path or is_line(path), "a file that `study rates` wrote, or ''", "rates.json")
RATES = {"rates": RATES_FILE}
SCHEDULER = _text(
    lambda where: not where or is_line(where), "the address of a scheduler, a scheduler file, or ''", "tcp://host:8786"
)
POOLED = RUN | {"jobs": _whole(1, MAX_JOBS, 2), "scheduler": SCHEDULER}
TRAINED = (
    POOLED
    | RATES
    | {
        "seeds": _wholes(0, MAX_SEED, [0, 1], at_least=1),
        "extend": _whole(0, MAX_COUNT, 32),
        "keep_checkpoints": FLAG,
    }
)
PARAMETERS = {
    "00_claims": COMMON | RATES,
    "01_sampling_strategy": TRAINED
    | {
        "bits": SETTING,
        "strategies": _some_of(STRATEGIES),
        "top_ks": _wholes(0, MAX_COUNT, [0, 10]),
        "temperatures": NUMBERS,
        "corpora": CORPORA_LIST,
        "chat": FLAG,
    },
    "02_distillation_loss": TRAINED
    | {
        "bits": SETTING,
        "losses": _list(LOSS, "losses, parts joined by '+'", ["labels", "kl+attention"]),
        "alone": _list(LOSS, "losses, parts joined by '+'", ["attention"]),
        "temperatures": NUMBERS,
    },
    "03_bit_allocation": TRAINED | {"settings": SETTINGS, "trained": SETTINGS},
    "04_ptq_vs_qat": TRAINED
    | {
        "settings": SETTINGS,
        "methods": _some_of(ROUNDED),
        "searched": SETTINGS,
        "grouped": WEIGHTS_ALONE,
        "calibrated": CALIBRATED,
        "symmetric": CALIBRATED,
        "hard": SETTING,
        "smoothed": SETTINGS,
    },
    "05_qlora_vs_l4q": TRAINED
    | {
        "methods": _some_of(ON_A_BASE),
        "further": _some_of(ON_A_BASE),
        "kinds": KINDS,
        "merges": WAYS,
        "bits": _some_of(ALL_WIDTHS, least=1),
        "integers": _some_of((FULL, AFFINE), least=1),
        "group": GROUP,
    },
    "06_number_formats": POOLED
    | {
        "widths": _some_of(WIDTHS, least=1),
        "group": GROUP,
        "groups": GROUPS,
        "fine": FLAG,
        "micro": FLAG,
        "calibrated": CALIBRATED,
    },
    "07_memory": RUN
    | {
        "methods": _some_of(PLANNED, least=1),
        "bits": _one_of(ALL_WIDTHS),
        "group": GROUP,
        "rank": _whole(1, MAX_RANK, 16),
        "batch": _whole(1, MAX_BATCH, 4),
        "length": _whole(2, MAX_LENGTH, 256),
    },
    "08_low_bit_execution": RUN | {"group": GROUP, "llama_cpp": LLAMA_CPP},
    "09_four_bit_activations": TRAINED
    | {
        "settings": SETTINGS,
        "methods": _some_of(("rtn", "gptq", "smoothquant")),
        "rotated": FLAG,
        "trained": SETTINGS,
        "smoothed": SETTINGS,
        "mxfp": _floats(MXFP),
        "nvfp": _floats(NVFP),
        "distilled": SETTINGS,
    },
    "10_model_sizes": {name: own for name, own in TRAINED.items() if name not in ("model", "rates")}
    | {
        "models": FAMILY,
        "rate_files": _list(
            RATES_FILE, "files that `study rates` wrote, one for each model", ["small.json", "large.json"]
        ),
        "settings": SETTINGS,
        "trained": SETTINGS,
    },
    "11_adapter_choices": TRAINED
    | {
        "bits": _one_of(ALL_WIDTHS),
        "l4q_format": _one_of((FULL, AFFINE)),
        "group": GROUP,
        "ranks": _wholes(1, MAX_RANK, [4, 64]),
        "groups": GROUPS,
        "initialisations": _some_of(INITS),
        "few": _text(check_layers, "all, or ends of layers' names joined by '+'", "q_proj+v_proj"),
        "kinds": KINDS,
        "merges": WAYS,
    },
    "12_quantization_grids": TRAINED
    | {
        "bits": SETTING,
        "grids": _some_of(GRIDS),
        "low": SETTINGS,
        "low_grids": _some_of(GRIDS),
        "cache_bits": WITH_CACHE,
    },
}


def check_parameter(notebook: str, name: str, value: Any) -> Any:
    """A value for a parameter of a notebook ("04_ptq_vs_qat"), as the type that is meant. ValueError in one line."""
    if name not in PARAMETERS.get(notebook, {}):
        raise ValueError(f"{notebook}: parameter {name}: is not declared; add it to studylib/study/parameters.py")
    try:
        return PARAMETERS[notebook][name].checked(value)
    except ValueError as error:
        raise ValueError(f"{notebook}: parameter {name}: {error}") from None


def check_parameters(notebook: str, names: MutableMapping[str, Any]) -> None:
    """Check the parameters of a notebook among `names`, its globals(), and leave each there as the type that is meant.

    Raises ValueError, in one line, for a value that is not allowed.
    """
    for name in PARAMETERS[notebook].keys() & names.keys():
        names[name] = check_parameter(notebook, name, names[name])
