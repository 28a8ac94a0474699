"""What an arm needs of a machine: memory as it is planned, and a GPU for what only CUDA computes."""

import functools
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from studylib import data, evaluate  # doors: schedulers and workers read this, who have no time for what is behind
from studylib.config import Adapter, Arm, Format
from studylib.methods import find, title

GPU, MEMORY = "GPU", "memory"  # resources of dask that arms take: devices, and bytes
# A bound of what a training takes, bytes: of each parameter; of each token of a step, layer and hidden dimension. Three
# times what plans come to, which take seconds each: only what may not fit is planned.
OF_PARAMETERS, OF_TOKENS = 24, 100
ROOM = 0.8  # of the memory: the rest is for what plans leave out, such as temporaries, gaps and the driver


class ClusterError(ValueError):
    """A scheduler or workers that cannot be used, found before any work."""


@dataclass(frozen=True)
class Has:
    """What a worker has: bytes of memory, GPUs, and which of these it declared to dask as resources."""

    memory: float
    gpus: float
    declared: frozenset[str] = frozenset()


def needs(arm: Arm, enough: float) -> dict[str, float]:
    """What the arm takes of dask's resources by name: GPU for a paged optimizer, and bytes of memory where a plan can
    be made and a bound is above `enough`: those of one row of a batch at a time (see rows_at_once)."""
    found = {GPU: 1.0} if arm.tuning and arm.tuning.paged else {}
    planned = _planned_above(arm, enough, 1)
    return found | ({} if planned is None else {MEMORY: planned})


def rows_at_once(arm: Arm, memory: float) -> int | None:
    """As many rows of each batch of a fine-tuning as a plan puts into ROOM of so many bytes, at least one; None for all
    of them, and where no plan can be made."""
    room = ROOM * memory
    whole = _planned_above(arm, room, arm.tuning.batch) if arm.tuning else None
    if whole is None or whole <= room:
        return None
    assert arm.tuning is not None
    one = _planned_above(arm, 0, 1)
    assert one is not None
    each = (whole - one) / (arm.tuning.batch - 1) if arm.tuning.batch > 1 else whole
    return max(1, int((room - one) / each) + 1) if one < room else 1


def fits(arm: Arm, has: Has, everyone: Iterable[Has]) -> bool:
    """Whether a worker has what the arm needs; everyone: all workers, of whose least what surely fits needs no plan."""
    wanted = needs(arm, min(own.memory for own in everyone))
    return wanted.get(GPU, 0) <= has.gpus and wanted.get(MEMORY, 0) <= has.memory


def taken(arm: Arm, has: Has) -> dict[str, float]:
    """What the arm takes of the resources that a worker declared to dask, which its other tasks leave then."""
    wanted = needs(arm, has.memory)
    if MEMORY in has.declared and arm.tuning:
        whole = _planned_above(arm, 0, arm.tuning.batch)
        wanted |= {} if whole is None else {MEMORY: min(whole, has.memory)}
    return {name: amount for name, amount in wanted.items() if name in has.declared}


def check_needs(arms: Iterable[Arm], everyone: Collection[Has]) -> None:
    """ClusterError, in one line, for an arm that needs what no worker has."""
    most = max(own.memory for own in everyone)
    for arm in arms:
        if any(fits(arm, has, everyone) for has in everyone):
            continue
        wanted = needs(arm, min(own.memory for own in everyone))
        if wanted.get(GPU, 0) > max(own.gpus for own in everyone):
            raise ClusterError(f"{GPU}: {title(arm)} takes a CUDA device, and no worker has one; start one that has")
        size, largest = wanted.get(MEMORY, 0) / evaluate.GB, most / evaluate.GB
        raise ClusterError(
            f"{MEMORY}: {title(arm)} takes {size:.1f} GB as `study plan` counts, and no worker has more than "
            f"{largest:.1f} GB; start a worker that has, or use a smaller model or profile"
        )


@functools.lru_cache(maxsize=64)
def _bound(model: str, tokens: int) -> float:
    text = data.models.load_config(model).get_text_config()
    of_tokens = OF_TOKENS * tokens * text.num_hidden_layers * text.hidden_size
    return OF_PARAMETERS * data.models.parameter_count(model) + of_tokens


def _planned_above(arm: Arm, enough: float, rows: int) -> float | None:
    """What a step of so many rows is planned to take, bytes; None where a bound is below `enough`, and for what cannot
    be planned."""
    if not (arm.tuning and arm.instructions):
        return None
    length, checkpointing = arm.instructions.length, arm.tuning.checkpointing
    if _bound(arm.model, rows * length) <= enough:
        return None
    dtype = data.models.compute_dtype()
    tuned = _planned(arm.model, arm.method, arm.format, arm.adapter, rows, length, checkpointing, dtype)
    if tuned is None or not arm.merging:
        return tuned
    assert arm.format is not None
    # What it is merged into trains all weights, and the unmerged model is its teacher (methods.lora).
    grid = find("qat").usual_format(4, arm.format.group)
    distilled = _planned(arm.model, "qat", grid, None, rows, length, False, dtype)
    beside = evaluate.inference_bytes(
        data.models.load_config(arm.model),
        arm.method,
        format=arm.format,
        adapter=arm.adapter,
        length=length,
        batch=rows,
    )
    return None if distilled is None else max(tuned, distilled + beside)


@functools.lru_cache(maxsize=1024)
def _planned(
    model: str,
    method: str,
    format: Format | None,
    adapter: Adapter | None,
    batch: int,
    length: int,
    checkpointing: bool,
    dtype: Any,
) -> float | None:
    """Bytes; None for what cannot be planned (see evaluate.plan)."""
    try:
        config = data.models.load_config(model)
        return evaluate.plan(config, method, format=format, adapter=adapter, batch=batch, length=length,
                    checkpointing=checkpointing, dtype=dtype).total  # fmt: skip
    except ValueError:
        return None
