"""The rules of claims about memory. They need no records: plans are exact, and the same everywhere."""

from studylib.config.words import percent
from studylib.evaluate.memory import DRIVER, GB, inference_bytes
from studylib.config.budgets import SHAPES
from studylib.evidence.effects import GIGABYTES, MEMORY, TIMES, Effect, Unit
from studylib.evidence.measures import Measure
from studylib.evidence.published import planned, planned_qlora
from studylib.evidence.rules import Outcome, together
from studylib.evidence.statistics import Interval
from studylib.methods.adapters import usual_format
from studylib.config.settings import Adapter

PLANNED = Measure("bytes", "planned memory", (), ())
NEARLY = 1.1  # "nearly": at most this many times what a card has
CLOSE, FAR = 1.1, 0.5  # "about LoRA's": at most this many times; "far below": at most this share


def _exact(value: float, unit: Unit, what: str, **holds: float) -> Effect:
    return Effect(Interval(value, value, value), unit, what, **holds)


def fits_cards(measure: Measure) -> Outcome:
    """Whether 65B fits 48 GB, 33B fits 24 GB or nearly, and 7B a phone of 6 GB, by NF4 + DQ."""
    large, middle = (planned_qlora(name, 64, 512, True).total / GB for name in ("llama-65b", "llama-33b"))
    phone = inference_bytes(SHAPES["llama-7b"], "qlora", format=usual_format("qlora"), adapter=Adapter(64), length=512) / GB
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
