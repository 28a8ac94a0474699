"""Memory, planned without weights: the gigabytes that the papers report beside ours, and the claims' rules about them.

These rules need no records: plans are exact, and the same everywhere.
"""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

from studylib.config import NUMERICS, Adapter, Format, percent, usable, write_whole
from studylib.data import cache_folder
from studylib.evidence.measures import Measure
from studylib.evidence.rules import together
from studylib.evidence.statistics import Interval
from studylib.evidence.verdicts import GIGABYTES, MEMORY, TIMES, Effect, Outcome, Unit
from studylib.methods import find
from studylib.study import Record, digest

if TYPE_CHECKING:
    import pandas as pd

GB = 2**30  # bytes
DRIVER = 1.0  # GB that CUDA and its libraries take of a card, as the claims have it
CARD = 80  # GB, L4Q's
QLORA_CLAIMS = ("B6", "B7")
VERSION = 2  # of kept plans; raised when they change though no result does
COMPONENTS = ("models", "fine-tuning")  # of config.numerics, behind every plan, besides the method's own
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
NEARLY = 1.1  # "nearly": at most this many times what a card has
CLOSE, FAR = 1.1, 0.5  # "about LoRA's": at most this many times; "far below": at most this share


@dataclass(frozen=True)
class Reported:
    """A paper's number: GB of a part of Plan or of its total, None for "out of memory" on CARD.

    rank, length, checkpointing: of the step, at batch 1, whose plan stands beside it. reason: why that may differ by
    more than a tenth, as far as can be known.
    """

    claim: str
    model: str
    method: str
    part: str
    gigabytes: float | None
    rank: int
    length: int
    checkpointing: bool
    reason: str


_LLAMA = ("llama-7b", "llama-13b", "llama-33b", "llama-65b")
_L4Q_MODELS = ("open-llama-3b", *_LLAMA[:3])
_MODEL_PART = (
    "the paper's model part fits, within 1.1% at all four sizes, NF4 codes with fp32 scales (not quantized again), "
    "embeddings in 16 bits, a head in 32 bits and a constant 0.8 GB; with it, our total is within 3% of the paper's"
)
_SHARE = "the paper has no rank, but adapters of 0.2% of the weights in 16 bits; rank 5 comes nearest"
_INPUT_GRADIENTS = (
    "the paper estimates gradients with respect to inputs of adapters and base weights only (figure 6: no attention); "
    "ours is all that autograd keeps, and under checkpointing every layer's input and the whole of one layer"
)
_UNKNOWN = (
    "the paper gives no batch, length or checkpointing; ours is 1 x 2048, the reading that fits LoRA and L4Q at 3B-13B"
)
_L4Q_TABLE = {
    "lora": ((15.1, 25.1, 43.8, 71.9), _UNKNOWN),
    "qlora": ((5.2, 7.9, 19.6, 31.9), f"{_UNKNOWN}; with checkpointing ours is below the paper's"),
    "qa-lora": ((7.8, 14.8, 27.8, 67.2), _UNKNOWN),
    "qat": (
        (44.2, 79.5, None, None),
        "ours trains in fp32, 16 bytes a weight; with half of that, 37 and 71 GB",
    ),
    "qat-lora": (
        (22.6, 41.9, 70.6, None),
        "ours is plain autograd, which keeps several fp32 tensors of every weight's size; theirs, by the difference to "
        "LoRA, 2.3 to 2.8 bytes a weight",
    ),
    "l4q": ((15.3, 25.4, 44.3, 73.2), _UNKNOWN),
}
_CHECKPOINTED = (("llama-33b", "lora"), ("llama-33b", "l4q"))  # else they do not fit the paper's card of 80 GB
REPORTED = (
    *(  # QLoRA, figure 6: batch 1, 512 tokens; rank 64 on all layers is its default
        Reported("B6", model, "qlora", part, gigabytes, 64, 512, True, _MODEL_PART)
        for part, numbers in (
            ("total", (6.9, 11.3, 24.7, 45.0)),
            ("base", (5046 / 1024, 8476 / 1024, 19302 / 1024, 37074 / 1024)),
        )
        for model, gigabytes in zip(_LLAMA, numbers, strict=True)
    ),
    # QLoRA, section 2
    Reported("B7", "llama-7b", "qlora", "base", 5048 / 1024, 64, 512, True, _MODEL_PART),
    Reported("B7", "llama-7b", "qlora", "trained", 26 / 1024, 5, 512, True, _SHARE),
    Reported("B7", "llama-7b", "qlora", "activations", 567 / 1024, 5, 512, False, _INPUT_GRADIENTS),
    Reported("B7", "llama-7b", "qlora", "activations", 18 / 1024, 5, 512, True, _INPUT_GRADIENTS),
    *(  # L4Q, table of training memory
        Reported("C3", model, method, "total", gigabytes, 4, 2048, (model, method) in _CHECKPOINTED, reason)
        for method, (numbers, reason) in _L4Q_TABLE.items()
        for model, gigabytes in zip(_L4Q_MODELS, numbers, strict=True)
    ),
)


class Plan(NamedTuple):
    """Planned bytes of one training step by purpose (see evaluate.memory.TrainingMemory)."""

    base: int
    trained: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


def against_papers(rows: Iterable[Reported] = REPORTED) -> "pd.DataFrame":
    """The papers' gigabytes beside ours, a plan each: about a second a row the first time.

    Columns: claim, model, method, part, step, paper, ours (GB of 2^30 bytes), ratio, reason (where it is off by more
    than a tenth). QLoRA's adapters and their gradients are bf16, as in its code; AdamW's moments are fp32.
    """
    import pandas as pd

    return pd.DataFrame([_beside(row) for row in rows])


def _beside(row: Reported) -> dict[str, Any]:
    step = row.rank, row.length, row.checkpointing
    plan = planned_qlora(row.model, *step) if row.claim in QLORA_CLAIMS else planned(row.model, row.method, *step)
    ours = getattr(plan, row.part) / GB
    if row.gigabytes is None:
        ratio, reason = math.nan, f"the paper: out of memory; ours {'exceeds' if ours > CARD else 'fits'} {CARD} GB"
    else:
        ratio = ours / row.gigabytes
        reason = row.reason if abs(ratio - 1) > 0.1 else ""
    return {
        "claim": row.claim,
        "model": row.model,
        "method": row.method,
        "part": row.part,
        "step": f"1 x {row.length}, {'with' if row.checkpointing else 'without'} checkpointing",
        "paper": row.gigabytes,
        "ours": ours,
        "ratio": ratio,
        "reason": reason,
    }


@functools.cache
def planned(model: str, method: str, rank: int, length: int, checkpointing: bool = False) -> Plan:
    """The plan for one of the papers' models (config.budgets.SHAPES) at batch 1 and four bits, in its paper's groups.

    Kept in the cache folder, as it takes a second or two. Raises ValueError for a model or method that is not known.
    """
    group = 64 if method == "qlora" or model == "open-llama-3b" else 128  # L4Q: groups of 128, of 64 for the 3B model
    format, adapter = _usual(method, rank, group)

    def compute() -> list[int]:
        from studylib.evaluate import memory

        config = memory.read_config(model)
        found = memory.plan(config, method, format=format, adapter=adapter, length=length, checkpointing=checkpointing)
        return [getattr(found, part) for part in Plan._fields]

    return Plan(*_kept([model, method, group, rank, length, checkpointing], method, compute))


def planned_qlora(model: str, rank: int, length: int, checkpointing: bool) -> Plan:
    """`planned` for QLoRA, its adapters and their gradients in bf16 as in its code."""
    plan = planned(model, "qlora", rank, length, checkpointing)
    return plan._replace(trained=plan.trained // 2, gradients=plan.gradients // 2)


@functools.cache
def planned_inference(model: str, method: str, rank: int, length: int) -> int:
    """Bytes of what the method deploys in groups of 64, and of 16-bit keys and values of `length` tokens; kept as plans
    are."""
    format, adapter = _usual(method, rank, 64)

    def compute() -> list[int]:
        from studylib.evaluate import memory

        config = memory.read_config(model)
        return [memory.inference_bytes(config, method, format=format, adapter=adapter, length=length)]

    (found,) = _kept(["inference", model, method, rank, length], method, compute)
    return found


def _usual(method: str, rank: int, group: int) -> tuple[Format | None, Adapter | None]:
    own = find(method)
    return own.usual_format(4, group), Adapter(rank) if "adapter" in own.needs else None


def _kept(asked: Sequence[Any], method: str, compute: Callable[[], list[int]]) -> list[int]:
    """Numbers of bytes: what the cache folder keeps under the numerics versions of the components behind them
    and the libraries' versions, or else computed and kept there."""
    own = find(method)
    versions: dict[str, Any] = {name: NUMERICS[name].number for name in (*COMPONENTS, *own.numerics)}
    versions |= {f"method {method}": own.version, "plans": VERSION} | {name: _version(name) for name in LIBRARIES}
    name = digest(json.dumps(asked), json.dumps(versions, sort_keys=True))
    kept = cache_folder() / "plans" / f"{name}.json"
    with contextlib.suppress(OSError):  # damaged, in a cache that may not be written to
        if usable(kept):
            return json.loads(kept.read_text(encoding="utf-8"))
    found = compute()
    with contextlib.suppress(OSError):  # a cache that is full, or may not be written to
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps(found), sealed=True)
    return found


def _version(library: str) -> str:
    """Without a build's label: "2.13.0" and "2.13.0+cpu" are the same."""
    try:
        return version(library).partition("+")[0]
    except PackageNotFoundError:
        return "none"


def planned_memory(records: Sequence[Record]) -> list[Measure]:
    """Nothing that records hold: the memory that is planned for the papers' models."""
    return [Measure("bytes", "", "planned memory")]


def _exact(
    value: float,
    unit: Unit,
    what: str,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    papers: bool = True,
) -> Effect:
    return Effect(Interval(value), unit, what, above, below, papers=papers)


def fits_cards(measure: Measure) -> Outcome:
    """Whether 65B fits 48 GB, 33B fits 24 GB or nearly, and 7B a phone of 6 GB, by NF4 + DQ."""
    large, middle = (planned_qlora(name, 64, 512, True).total / GB for name in ("llama-65b", "llama-33b"))
    phone = planned_inference("llama-7b", "qlora", 64, 512) / GB
    text = (
        f"at 1 x 512 tokens, rank 64, checkpointing, 65B takes {large:.1f} of 48 GB and 33B {middle:.1f} of 24, beside "
        f"{DRIVER:g} GB for the driver; 7B takes {phone:.1f} of a phone's 6 GB."
    )
    parts = [
        _exact(large, GIGABYTES, "for 65B on a card of 48 GB, less the driver's share", below=48 - DRIVER),
        _exact(middle, GIGABYTES, "for 33B on a card of 24 GB, or nearly", below=24 * NEARLY - DRIVER, papers=False),
        _exact(phone, GIGABYTES, "for 7B on a phone of 6 GB", below=6, papers=False),
    ]
    return together(parts, text)


def activations_dominate(measure: Measure) -> Outcome:
    """Whether activations take more than everything else that adapters add, and checkpointing most of them away."""
    kept, less = (planned_qlora("llama-7b", 64, 512, on) for on in (False, True))
    added = kept.trained + kept.gradients + kept.optimizer
    share, left = kept.activations / (kept.activations + added), less.activations / kept.activations
    text = (
        f"7B at 1 x 512 tokens and rank 64: activations are {percent(share)} of what training adds to the "
        f"base ({kept.activations / GB:.2f} GB); checkpointing leaves {percent(left)}."
    )
    parts = [  # the paper's number leaves gradients and the optimizer out, so that it is not of the same
        _exact(share, MEMORY, "that training adds, for activations", above=0.5, papers=False),
        _exact(left, MEMORY, "of activations, left by checkpointing", below=0.5, papers=False),
    ]
    return together(parts, text)


def near_lora(measure: Measure) -> Outcome:
    """Whether L4Q takes about LoRA's memory and far less than QAT's."""
    lora, l4q, qat = (planned("llama-7b", method, 4, 2048).total for method in ("lora", "l4q", "qat"))
    text = (
        f"7B at 1 x 2048 tokens and rank 4: LoRA {lora / GB:.1f} GB, L4Q {l4q / GB:.1f}, QAT {qat / GB:.1f}; L4Q takes "
        f"{l4q / lora:.2f} times LoRA's and {percent(l4q / qat)} of QAT's."
    )
    parts = [
        _exact(l4q / lora, TIMES, "LoRA's memory, by L4Q", below=CLOSE),
        _exact(l4q / qat, TIMES, "QAT's memory, by L4Q", below=FAR, papers=False),
    ]
    return together(parts, text)
