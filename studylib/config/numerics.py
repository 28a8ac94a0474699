"""What numbers mean: a version for each component that results pass through, raised by hand when they change.

A record is found again by its arm, by the contents of the files that the arm names, and by these versions: code can be
moved and reworded freely, on any Python and any build of a library. Golden values (tests/golden) fail where numbers
move and the version does not; CONTRIBUTING says how to raise one.
"""

from typing import NamedTuple

from studylib.config.arm import Arm
from studylib.config.budgets import HIDDEN, Sampling
from studylib.config.settings import FLOATING, OF_WEIGHTS


class Version(NamedTuple):
    """A number, and in a line why it was raised last."""

    number: int
    why: str


FIRST = "as it was when versions replaced hashes of source"
NUMERICS = {
    "models": Version(1, FIRST),  # weights as loaded, and the type that is computed in
    # documents, windows, instruction pairs and their prompts
    "corpora": Version(
        2, "windows begin with BOS where the tokenizer puts one; prompt and response are tokenized apart"
    ),
    # perplexity, loss on responses, benchmarks, weights
    "evaluation": Version(2, "responses weigh by their tokens; no question stands in its own few-shot prompt"),
    "grids": Version(1, FIRST),  # uniform grids, fake quantization, quantized layers
    # grids of weights alone: StatsQ, LSQ, ParetoQ. Apart from "grids", so that arms on MinMax grids keep their keys
    "weight grids": Version(1, "activations and cache beside them are MinMax; LSQ starts where the error is least"),
    "float grids": Version(1, "MXFP4, MXFP6, MXFP8, NVFP4 and FP8 for activations and cache"),
    "rotation": Version(2, "training keeps rotations where the process has compiled the same layers without them"),
    # NormalFloat, 4-bit floats, integers in groups, double quantization
    "formats": Version(2, "double quantization leaves no scale of our own formats negative"),
    # text that the model writes itself
    "generation": Version(2, "texts begin with BOS where the tokenizer puts one; a chat's turns end at its EOS, too"),
    "training": Version(1, FIRST),  # the loop: optimizer, schedule, order
    "distillation": Version(1, FIRST),  # losses towards the teacher, LLM-QAT
    # the loss "hidden"
    "hidden states": Version(1, "each token's error is relative to the teacher's state; the raw one is 'raw-hidden'"),
    # adapters, instruction pairs in batches, merging
    "fine-tuning": Version(2, "pairs are cut at the model's context, too"),
    "merging": Version(1, "a merged model is distilled towards the unmerged one"),
    # L4Q, QAT-LoRA, QAT with learned steps
    "learned grids": Version(2, "scales and offsets start on the grid of the arm's format"),
    "ptq": Version(1, FIRST),  # SmoothQuant, GPTQ and AWQ as llm-compressor computes them
    # integers multiplied as they are stored
    "execution": Version(2, "the 4-bit kernel is entered in bf16 on every processor; it had been in fp32 on some"),
}


def versions(arm: Arm, further: tuple[str, ...] = ()) -> dict[str, int]:
    """The versions of the components that the arm passes through; `further`: those that its method names.

    Raises ValueError for a component that there is none of.
    """
    names = {"models", "corpora", "evaluation", *further}
    names |= {"generation"} if isinstance(arm.data, Sampling) else set()
    names |= {"weight grids"} if arm.scheme.grid in OF_WEIGHTS else set()
    names |= {"float grids"} if arm.scheme.grid in FLOATING else set()
    names |= {"rotation"} if arm.scheme.rotated else set()
    names |= {"training", "distillation"} if arm.training else set()
    names |= {"hidden states"} if arm.training and HIDDEN in arm.training.features else set()
    names |= {"training", "fine-tuning"} if arm.tuning else set()
    names |= {"distillation", "merging"} if arm.merging else set()
    for name in sorted(names - NUMERICS.keys()):
        raise ValueError(f"numerics: {name!r} is not known; use some of {', '.join(NUMERICS)}")
    return {name: NUMERICS[name].number for name in sorted(names)}
