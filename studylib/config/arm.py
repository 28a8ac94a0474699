"""What is run: an Arm says everything that determines a result, as one frozen value that is written as JSON."""

import dataclasses
import functools
import json
import typing
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from studylib.config.budgets import Decoding, Engines, Evaluation, Instructions, RealText, Sampling, Training, Tuning
from studylib.config.settings import BESIDE, MERGED_DISTILLED, MERGES, Adapter, BitWidths, Format, Scheme
from studylib.config.values import check_known, check_parts, check_text

PARTS = (  # that an arm may have or not
    "data",
    "training",
    "format",
    "adapter",
    "instructions",
    "tuning",
    "decoding",
    "engines",
)


@dataclass(frozen=True)
class Arm:
    """One thing to measure. Two arms that are equal have the same result on the same machine.

    method: the name of one that is registered (see methods.base), which says what goes with it (`Method.check`).
    bits "W-A-KV"; scheme: grids and where they apply. data: the text that a method is calibrated or distilled on,
    training: the distillation. format: the number format of rounded weights, or of the base that is fine-tuned on
    `instructions` with `tuning`, through `adapter`; merge: how the result is deployed (see methods.merge), and merging:
    the distillation that "merged-distilled" takes, on the same instructions.
    decoding: how tokens a second are timed; engines: how those of several engines are.
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
    merge: str = BESIDE
    merging: Tuning | None = None
    decoding: Decoding | None = None
    engines: Engines | None = None

    def __post_init__(self) -> None:
        check_text("model", self.model)
        check_text("method", self.method)
        check_text("bits", self.bits)
        BitWidths.parse(self.bits)
        check_known("merge", self.merge, MERGES)
        if (self.merging is not None) != (self.merge == MERGED_DISTILLED):
            raise ValueError(
                f"merging: {'missing' if self.merging is None else 'not allowed'} with merge {self.merge!r}; "
                f"it is the distillation of {MERGED_DISTILLED!r}"
            )
        check_parts(self)

    @property
    def widths(self) -> BitWidths:
        return BitWidths.parse(self.bits)

    @property
    def seed(self) -> int:
        """What draws the data."""
        source = self.instructions or self.data
        return source.seed if source else 0

    @property
    def budget(self) -> Training | Tuning | None:
        """Of its training, if it has one."""
        return self.training or self.tuning

    @property
    def timed(self) -> bool:
        """Whether its result is seconds, which other work on the machine would change."""
        return self.decoding is not None or self.engines is not None

    def canonical(self) -> str:
        """JSON with sorted keys: the same for equal arms.

        Fields that are as by default are left out, so that a new one changes no arm that does not use it.
        """
        return json.dumps(_chosen(self), sort_keys=True)

    @classmethod
    def from_dict(cls, fields: Any) -> "Arm":
        """From the dictionary of a record; fields that an arm does not have, and wrong types, raise ValueError."""
        try:
            return _adapter().validate_json(json.dumps(fields), strict=True)
        except ValidationError as error:
            raise ValueError(_one_line(error)) from error


@functools.cache
def _adapter() -> TypeAdapter[Arm]:
    for kind in (
        Arm,
        *(option for hint in typing.get_type_hints(Arm).values() for option in (hint, *typing.get_args(hint))),
    ):
        if dataclasses.is_dataclass(kind):
            kind.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[union-attr]
    return TypeAdapter(Arm)


UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")  # pydantic's names for a field that there is not
TEXTS = {"Sampling": Sampling, "RealText": RealText}  # what `data` may be


def _one_line(error: ValidationError) -> str:
    """The first thing that is wrong: where it is, what is there, what is allowed."""
    errors = error.errors()

    def wrong(text: str) -> tuple[int, int]:
        found = [one["type"] in UNKNOWN for one in errors if text in one["loc"]]
        return sum(found), len(found)

    not_meant = max(reversed(TEXTS), key=wrong)  # of the two, the one that fewer of the given fields belong to
    first = next(one for one in errors if not_meant not in one["loc"])
    names = [str(part) for part in first["loc"] if part not in TEXTS]
    where = ".".join(["arm", *names])
    if first["type"] == "value_error":
        return f"{where}: {first['ctx']['error']}" if names else str(first["ctx"]["error"])
    if first["type"] in UNKNOWN:
        allowed = ", ".join(field.name for field in dataclasses.fields(_class_at(first["loc"][:-1])))
        return f"{where.rpartition('.')[0]}: unknown field {names[-1]!r}; allowed are {allowed}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{where.rpartition('.')[0]}: the field {names[-1]!r} is missing"
    return f"{where}: {first['input']!r} is not allowed; {first['msg'][:1].lower()}{first['msg'][1:]}"


def _class_at(path: tuple[int | str, ...]) -> type:
    """The dataclass that the fields of an arm on this path lead to."""
    found: type = Arm
    for part in path:
        if part in TEXTS:
            found = TEXTS[str(part)]
        else:
            hint = typing.get_type_hints(found)[str(part)]
            options = [option for option in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(option)]
            found = typing.cast(type, options[0])
    return found


def _chosen(value: Any) -> Any:
    """A dataclass as a dictionary of the fields that are not as by default, with a float where one is meant."""
    if not dataclasses.is_dataclass(value):
        return value
    chosen = {}
    for name, default, floats in _fields(value.__class__):
        own = getattr(value, name)
        if own != default:
            chosen[name] = float(own) if floats and own is not None else _chosen(own)
    return chosen


@functools.cache
def _fields(kind: Any) -> list[tuple[str, Any, bool]]:
    """Each field's name, its default, and whether it takes floats."""
    types = typing.get_type_hints(kind)
    return [
        (own.name, own.default, float in (types[own.name], *typing.get_args(types[own.name])))
        for own in dataclasses.fields(kind)
    ]
