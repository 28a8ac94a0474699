"""Which format of other software holds what an arm deploys."""

from studylib.config.arm import Arm
from studylib.config.budgets import TINY
from studylib.config.settings import (
    DEFAULT_GROUP,
    DEQUANTIZED,
    DORA,
    INTEGER_FORMATS,
    MERGED_16,
    OFF,
    PACKED,
    PLAIN,
)
from studylib.methods.arms import title
from studylib.methods.base import find
from studylib.methods.lora import FineTuned, in_bitsandbytes

INTEGERS, FOUR_BIT, ADAPTER, SIXTEEN = CONTAINERS = (
    "compressed-tensors",
    "bitsandbytes",
    "peft adapter",
    "16-bit weights",
)


def container(arm: Arm) -> str:
    """Which of CONTAINERS holds what the arm deploys. ValueError, with the reason, where none does."""
    method, bits, format = find(arm.method), arm.widths, arm.format

    def refused(why: str) -> ValueError:
        return ValueError(f"record: {title(arm)} cannot be exported; {why}")

    if not method.rounds and not arm.tuning:
        raise refused("it is the model as it was loaded")
    if isinstance(method, FineTuned) and arm.adapter and arm.merge not in PACKED:
        if arm.merge in (DEQUANTIZED, MERGED_16):
            return SIXTEEN
        if not method.keeps_adapter:
            raise refused("no format that transformers loads has an offset a group that is not a whole number of steps")
        stock = "format" not in method.needs or (in_bitsandbytes(format) and format.group == DEFAULT_GROUP)
        if not stock or arm.adapter.kind not in (PLAIN, DORA) or arm.model == TINY:
            raise refused("its adapter goes with a base that transformers does not make; take an arm that is merged")
        return ADAPTER
    if format and in_bitsandbytes(format):
        return FOUR_BIT
    if format and format.kind not in INTEGER_FORMATS:
        raise refused(f"neither compressed-tensors nor bitsandbytes has {format.title}")
    if bits.weights == OFF and not format:
        raise refused("its weights are not quantized")
    if arm.scheme.grid not in INTEGER_FORMATS.values() and bits.activations != OFF:
        raise refused(f"other software scales activations by their largest magnitude, not by {arm.scheme.grid!r}")
    return INTEGERS
