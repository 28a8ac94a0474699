"""What a method is: one object that says what it needs, what it is called, and does it; and the registry of all."""

import contextlib
import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from studylib.config import (
    BESIDE,
    FLOATING,
    INTEGER_FORMATS,
    LEARNED,
    NOTHING,
    OF_WEIGHTS,
    OFF,
    PACKED,
    PARTS,
    UNREPORTED,
    Adapter,
    Arm,
    Format,
    Report,
    Scheme,
    check_known,
    in_bitsandbytes,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from studylib.config import Log
    from studylib.train import TrainingData

INTEGERS, FOUR_BIT, PEFT, SIXTEEN_BITS, GGUF = CONTAINERS = (
    "compressed-tensors",
    "bitsandbytes",
    "peft adapter",
    "16-bit weights",
    "GGUF",
)  # of other software, for what is deployed
OPTIONS = {GGUF: "gguf", INTEGERS: "compressed-tensors", FOUR_BIT: "bnb", PEFT: "peft", SIXTEEN_BITS: "safetensors"}
ON_GRID, SHIFTED, STOCK, TABLE, ADAPTED, DENSE = (
    "integers",
    "integers with learned offsets",
    "4-bit floats of bitsandbytes",
    "a table of levels",
    "an adapter beside its base",
    "16-bit weights",
)  # what an arm deploys
HOLDS = {
    INTEGERS: (ON_GRID, SHIFTED),
    FOUR_BIT: (STOCK,),
    PEFT: (ADAPTED,),
    SIXTEEN_BITS: (ON_GRID, SHIFTED, STOCK, TABLE, ADAPTED, DENSE),
    GGUF: (ON_GRID, SHIFTED, ADAPTED, DENSE),
}
IN_16_BITS = f"--format {OPTIONS[SIXTEEN_BITS]} writes it in 16 bits"
USUAL = {ON_GRID: INTEGERS, SHIFTED: GGUF, STOCK: FOUR_BIT, ADAPTED: PEFT, DENSE: SIXTEEN_BITS}
LLM_QAT_PAPER, QLORA_PAPER, L4Q_PAPER = PAPERS = ("LLM-QAT", "QLoRA", "L4Q")  # that the study reruns


@dataclass(frozen=True)
class Look:
    """How a method's points are drawn: a colour, one of matplotlib's markers, filled or hollow."""

    colour: str = "#444444"
    marker: str = "*"
    hollow: bool = False


@dataclass
class Work:
    """What a method is given to do its work on, and told through.

    model: full precision, fp32, as it was loaded; `apply` turns it in place into what is scored. data: the windows [N,
    T] that it is calibrated or trained on and what was found out about them, for an arm that names some. load: the
    model anew. checkpoints: the folder of this training's last state; keep: leave the end of it there. trained: a file
    for what a fine-tuning trained, which arms share that differ in deployment alone. rounded: the file of the codes
    that GPTQ found, which arms share that differ in what comes afterwards, held alone inside; None where they are not
    kept. rows: of each of its batches that are computed at a time, None for all. report: where its training is told of.
    progress: told of finished work, in tokens of a forward pass. phase: entered, by name, around each kind of work; its
    seconds are recorded.
    """

    arm: Arm
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    load: Callable[[], "PreTrainedModel"]
    data: "TrainingData | None" = None
    checkpoints: Path = Path()
    trained: Path = Path()
    rounded: Callable[[], contextlib.AbstractContextManager[Path | None]] = contextlib.nullcontext
    rows: int | None = None
    keep: bool = False
    report: Report = UNREPORTED
    progress: Callable[[int], None] = lambda tokens: None
    phase: Callable[[str], contextlib.AbstractContextManager[None]] = field(
        default=lambda name: contextlib.nullcontext()
    )

    def calibration(self, most: int) -> "Tensor":
        """The first windows of the data, [at most `most`, T]."""
        assert self.data is not None
        return self.data.windows[:most]


class Method(ABC):
    """One way to make a low-bit model of a full-precision one. A subclass with `name`, `title` and `apply` is enough.

    name: what arms and records call it. title: for people. papers: those of PAPERS whose comparisons it takes part in;
    source: where it is described. look: how it is drawn.
    needs: the parts of an arm (config.arm.PARTS) that it cannot do without; takes: those that it may have besides, and
    "scheme". rounds: whether it leaves anything in low bits.
    numerics: the components of config.numerics that it passes through besides those that its arm's parts imply;
    version: its own, raised when its results change. relative_rate: its learning rate, as a share of LLM-QAT's (of
    the adapters', where it is fine-tuned), where none was chosen. learns_grid: whether scales are trained;
    grid_alone: and nothing else is, so that its learning_rate has no effect. few_shot_at: the bits at which
    few-shot tasks are run as well; few_shot: which of them (None: all that a profile has). checks_weights: whether
    the rounding error of each layer is recorded.
    by_gptq: whether GPTQ rounds its weights, once for all arms of the same text, basis, width and format.
    keeps_adapter: whether it leaves a 16-bit adapter beside the base; what a method without one makes is deployed in
    one way.
    """

    name: str
    title: str
    source: str = ""
    papers: tuple[str, ...] = ()
    look: Look = Look()
    needs: frozenset[str] = frozenset()
    takes: frozenset[str] = frozenset()
    rounds: bool = True
    numerics: tuple[str, ...] = ("grids",)
    version: int = 1
    few_shot_at: tuple[str, ...] = ()
    few_shot: tuple[str, ...] | None = None
    relative_rate: float = 1.0
    learns_grid: bool = False
    grid_alone: bool = False
    checks_weights: bool = False
    by_gptq: bool = False
    keeps_adapter: bool = False

    @abstractmethod
    def apply(self, work: Work) -> "Log | None":
        """Turn work.model in place into what is deployed and scored; the log of the training, if there was one.

        Layers in low bits answer `codes()` afterwards (see quant.storage), which tells what they take. A training that
        diverged leaves a last loss that is not finite.
        """

    def check(self, arm: Arm) -> None:
        """Raise ValueError unless everything in the arm goes with this method and with each other."""
        if (arm.bits == "16-16-16") == self.rounds:
            raise ValueError(
                f"bits: {arm.bits} does not go with {self.name!r}, "
                + ("which quantizes something" if self.rounds else "which is 16-16-16")
            )
        for part in PARTS:
            if getattr(arm, part) is None and part in self.needs:
                raise ValueError(f"{part}: is missing, but {self.name!r} needs it")
            if getattr(arm, part) is not None and part not in self.needs | self.takes:
                raise ValueError(f"{part}: is given, but {self.name!r} takes none")
        if arm.scheme != Scheme() and "scheme" not in self.takes:
            raise ValueError(f"scheme: {self.name!r} takes none; its grids are its own")
        arm.scheme.check_widths(arm.widths)
        if arm.widths.cache == OFF and (arm.scheme.cache_scale, arm.scheme.keys) != (Scheme.cache_scale, Scheme.keys):
            raise ValueError(
                f"cache_scale: {arm.scheme.cache_scale!r} with keys {arm.scheme.keys!r} has no effect at {arm.bits}, "
                "whose cache is not quantized; leave them out"
            )
        if arm.scheme.activations is not None and (arm.widths.activations, arm.widths.cache) == (OFF, OFF):
            raise ValueError(
                f"activations: {arm.scheme.activations!r} has no effect at {arm.bits}, which rounds neither them nor "
                "the cache; leave it out"
            )
        if arm.scheme.grid in LEARNED and "training" not in self.needs:
            raise ValueError(f"grid: {arm.scheme.grid!r} is learned in training, which {self.name!r} has none of")
        if arm.scheme.grid in OF_WEIGHTS and arm.widths.weights == OFF:
            raise ValueError(f"grid: {arm.scheme.grid!r} is one of weights, which {arm.bits} leaves as they are")
        if arm.budget and arm.budget.grid_rate is not None and not self.trains_grid(arm.scheme):
            raise ValueError(
                f"grid_rate: {arm.budget.grid_rate:g} has no effect on {self.name!r}, which learns no grid"
            )
        if arm.merge != BESIDE and "tuning" not in self.needs:
            raise ValueError(f"merge: is given, but {self.name!r} is not fine-tuned")
        if arm.format and "format" in self.needs and arm.bits != f"{arm.format.bits}-16-16":
            raise ValueError(
                f"bits: {arm.bits} does not go with the format {arm.format.title}; use {arm.format.bits}-16-16"
            )

    def trains_grid(self, scheme: Scheme) -> bool:
        """Whether an arm of it with this scheme trains scales."""
        return self.learns_grid or scheme.grid in LEARNED

    def check_merge(self, how: str, format: Format | None) -> None:
        """Raise ValueError unless what it trained can be deployed in this way (see methods.merge)."""
        if how != BESIDE and not self.keeps_adapter:
            raise ValueError(
                f"merge: {how!r} is not allowed for {self.name!r}, which leaves no adapter; use {BESIDE!r}"
            )
        if how in PACKED and format is None:
            raise ValueError(f"format: missing; {how!r} rounds to one")

    def check_model(self, arm: Arm, skeleton: "PreTrainedModel") -> None:  # noqa: B027
        """Raise ValueError unless it can be applied to the model; `skeleton`: that, without numbers."""

    def usual_format(self, bits: int = 4, group: int | None = 64, double: bool = True) -> Format | None:
        """How it keeps its base by default, for a method that has one: integers; `double` for formats that can."""
        return Format("affine", bits, group) if "format" in self.needs else None

    def usual_adapter(self) -> Adapter | None:
        return Adapter() if "adapter" in self.needs else None

    def deploys(self, arm: Arm) -> str:
        """What the arm deploys: ON_GRID, ... ValueError, with the reason, where nobody else's software computes it."""
        format = arm.format
        if not self.rounds and not arm.tuning:
            raise ValueError("it is the model as it was loaded")
        if arm.scheme.grid in FLOATING:
            raise ValueError("its numbers are floats in blocks, which no container holds here")
        if arm.scheme.rotated:
            raise ValueError("its activations are rotated on the way, which no container says here")
        if format and in_bitsandbytes(format):
            return STOCK
        if format and format.kind not in INTEGER_FORMATS:
            return TABLE
        if arm.widths.weights == OFF and not format:
            raise ValueError("its weights are not quantized")
        return ON_GRID

    def usual_container(self, arm: Arm) -> str | None:
        """Which of CONTAINERS holds best what the arm deploys; None where only its numbers can be written."""
        return USUAL.get(self.deploys(arm))

    def container(self, arm: Arm, wanted: str | None = None) -> str:
        """Which of CONTAINERS holds what the arm deploys: `wanted`, or the usual one. ValueError, with the reason and
        what to use instead, where it does not."""
        deployed = self.deploys(arm)
        usual = self.usual_container(arm)
        found = wanted or usual
        if found is None:
            title = arm.format.title if arm.format else deployed
            raise ValueError(f"neither compressed-tensors nor bitsandbytes has {title}; {IN_16_BITS}")
        if deployed not in HOLDS[found]:
            instead = IN_16_BITS if usual is None else f"use --format {OPTIONS[usual]}"
            raise ValueError(f"{found} does not hold {deployed}; {instead}")
        return found

    def as_trained(self, arm: Arm) -> Arm:
        """Deployed as it was trained, and scored on nothing: equal for arms that share what makes their weights."""
        return dataclasses.replace(arm, evaluation=NOTHING, merge=BESIDE, merging=None)


_METHODS: dict[str, Method] = {}
METHODS: Mapping[str, Method] = MappingProxyType(_METHODS)  # by name, in the order of tables and legends


def register(*methods: Method) -> None:
    """Make methods known by their names. A name that is taken is given to the new one: cells are run again.

    Raises ValueError for a name that cannot stand in a file's name.
    """
    for method in methods:
        if not re.fullmatch(r"[a-z0-9][a-z0-9+. -]*", method.name):
            raise ValueError(
                f"name: {method.name!r} is not allowed; use small letters, digits, '+', '.', '-' and spaces"
            )
        _METHODS[method.name] = method


def find(name: str) -> Method:
    """The method of this name; ValueError, with the names there are, where there is none."""
    check_known("method", name, _METHODS)
    return _METHODS[name]


def check(arm: Arm) -> None:
    """Raise ValueError unless the arm's method is known and takes it."""
    find(arm.method).check(arm)
