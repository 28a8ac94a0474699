"""The gigabytes that the papers print, and our plans beside them."""

import contextlib
import functools
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import pandas as pd

from studylib.data.sources import cache_folder
from studylib.evaluate.memory import CARDS, GB, TrainingMemory, plan
from studylib.config.budgets import SHAPES
from studylib.methods.adapters import usual_format
from studylib.config.settings import Adapter
from studylib.study.machine import LIBRARIES
from studylib.study.records import TUNING_LIBRARIES, code_versions, digest
from studylib.config.files import write_whole

QLORA_CLAIMS = ("B6", "B7")
PLAN_CODE = (
    *("quantizers", "layers", "models", "formats", "losses", "distill", "sampling", "l4q", "adapters"),
    *("planning", "published"),
)


@dataclass(frozen=True)
class Published:
    """A paper's number: GB of a part of TrainingMemory or of its total, None for "out of memory" on 80 GB.

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
PUBLISHED = (
    *(  # QLoRA, figure 6: batch 1, 512 tokens; rank 64 on all layers is its default
        Published("B6", model, "qlora", part, gigabytes, 64, 512, True, _MODEL_PART)
        for part, numbers in (
            ("total", (6.9, 11.3, 24.7, 45.0)),
            ("base", (5046 / 1024, 8476 / 1024, 19302 / 1024, 37074 / 1024)),
        )
        for model, gigabytes in zip(_LLAMA, numbers, strict=True)
    ),
    # QLoRA, section 2
    Published("B7", "llama-7b", "qlora", "base", 5048 / 1024, 64, 512, True, _MODEL_PART),
    Published("B7", "llama-7b", "qlora", "trained", 26 / 1024, 5, 512, True, _SHARE),
    Published("B7", "llama-7b", "qlora", "activations", 567 / 1024, 5, 512, False, _INPUT_GRADIENTS),
    Published("B7", "llama-7b", "qlora", "activations", 18 / 1024, 5, 512, True, _INPUT_GRADIENTS),
    *(  # L4Q, table of training memory
        Published("C3", model, method, "total", gigabytes, 4, 2048, (model, method) in _CHECKPOINTED, reason)
        for method, (numbers, reason) in _L4Q_TABLE.items()
        for model, gigabytes in zip(_L4Q_MODELS, numbers, strict=True)
    ),
)


def against_papers(rows: Iterable[Published] = PUBLISHED) -> pd.DataFrame:
    """The papers' gigabytes beside ours, a plan each: about a second a row the first time.

    Columns: claim, model, method, part, step, paper, ours (GB of 2^30 bytes), ratio, reason (where it is off by more
    than a tenth). QLoRA's adapters and their gradients are bf16, as in its code; AdamW's moments are fp32.
    """
    return pd.DataFrame([_beside(row) for row in rows])


@functools.cache
def planned(model: str, method: str, rank: int, length: int, checkpointing: bool = False) -> TrainingMemory:
    """The plan for one of the papers' models at batch 1 and four bits, in the groups that its paper takes.

    Kept in the cache folder under the step and the versions of all code behind it, as it takes a second or two.
    """
    versions = code_versions(PLAN_CODE, LIBRARIES + TUNING_LIBRARIES)
    name = digest(json.dumps([model, method, rank, length, checkpointing]), json.dumps(versions))
    kept = cache_folder() / "plans" / f"{name}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # not there, or not as we leave it
        return TrainingMemory(**json.loads(kept.read_text(encoding="utf-8")))
    block = 64 if method == "qlora" or model == "open-llama-3b" else 128  # L4Q: groups of 128, of 64 for the 3B model
    adapter = None if method == "qat" else Adapter(rank)
    format = usual_format(method, 4, block)
    memory = plan(SHAPES[model], method, format=format, adapter=adapter, length=length, checkpointing=checkpointing)
    with contextlib.suppress(OSError):  # a cache that is full, or may not be written to
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps(asdict(memory)))
    return memory


def planned_qlora(model: str, rank: int, length: int, checkpointing: bool) -> TrainingMemory:
    """`planned` for QLoRA, its adapters and their gradients in bf16 as in its code."""
    memory = planned(model, "qlora", rank, length, checkpointing)
    return replace(memory, trained=memory.trained // 2, gradients=memory.gradients // 2)


def _beside(row: Published) -> dict:
    step = row.rank, row.length, row.checkpointing
    memory = planned_qlora(row.model, *step) if row.claim in QLORA_CLAIMS else planned(row.model, row.method, *step)
    ours = getattr(memory, row.part) / GB
    if row.gigabytes is None:
        ratio, reason = math.nan, f"the paper: out of memory; ours {'exceeds' if ours > CARDS[-1] else 'fits'} 80 GB"
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
