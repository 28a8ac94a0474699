"""The rules of claims about memory. They need no records: plans are exact, and the same everywhere."""

from studylib.adapters import L4Q, LORA, QAT, QLORA, usual_format
from studylib.comparison import Measure, percent
from studylib.planning import GB, SHAPES, inference_bytes
from studylib.published import planned
from studylib.rules import NOT_REPRODUCED, REPRODUCED, Outcome
from studylib.statistics import Interval

PLANNED = Measure("bytes", "planned memory", (), ())
DRIVER = 1.0  # GB that CUDA and its libraries take of a card before anything is computed
SLIGHTLY = 1.1  # "slightly over": at most this many times what a card has
CLOSE, FAR = 1.1, 0.5  # "about LoRA's": at most this many times; "far below": at most this share


def _exact(value: float) -> Interval:
    return Interval(value, value, value)


def _judged(holds: bool) -> str:
    return REPRODUCED if holds else NOT_REPRODUCED


def fits_cards(measure: Measure) -> Outcome:
    """Whether 65B fits 48 GB, 33B fits 24 GB or is slightly over, and 7B a phone of 6 GB, by NF4 + DQ."""
    large, middle = (planned(name, QLORA, 64, 512, True).total / GB + DRIVER for name in ("llama-65b", "llama-33b"))
    phone = inference_bytes(SHAPES["llama-7b"], usual_format(QLORA), 512) / GB
    text = (
        f"at 1 x 512 tokens, rank 64, checkpointing, and with {DRIVER:g} GB for the driver, 65B takes {large:.1f} of "
        f"48 GB and 33B {middle:.1f} of 24 GB; 7B takes {phone:.1f} of a phone's 6 GB."
    )
    return _exact(large / 48), _judged(large <= 48 and middle <= 24 * SLIGHTLY and phone <= 6), text


def activations_dominate(measure: Measure) -> Outcome:
    """Whether activations take more than everything else that adapters add, and checkpointing most of them away."""
    kept, less = (planned("llama-7b", QLORA, 64, 512, on) for on in (False, True))
    added = kept.trained + kept.gradients + kept.optimizer
    share = kept.activations / (kept.activations + added)
    text = (
        f"7B at 1 x 512 tokens and rank 64: activations are {percent(share)} of what training adds to the "
        f"base ({kept.activations / GB:.2f} GB); checkpointing leaves {percent(less.activations / kept.activations)}."
    )
    return _exact(share), _judged(share > 0.5 and less.activations < 0.5 * kept.activations), text


def near_lora(measure: Measure) -> Outcome:
    """Whether L4Q takes about LoRA's memory and far less than QAT's."""
    lora, l4q, qat = (planned("llama-7b", method, 4, 2048).total for method in (LORA, L4Q, QAT))
    text = (
        f"7B at 1 x 2048 tokens and rank 4: LoRA {lora / GB:.1f} GB, L4Q {l4q / GB:.1f}, QAT {qat / GB:.1f}; L4Q takes "
        f"{l4q / lora:.2f} times LoRA's and {percent(l4q / qat)} of QAT's."
    )
    return _exact(l4q / lora), _judged(l4q <= CLOSE * lora and l4q <= FAR * qat), text
