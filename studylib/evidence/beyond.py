"""What the papers leave open and later work claims, each with its rule, written before the runs that it judges."""

from functools import partial

from studylib.config import MERGED_DISTILLED, NVFP, Format
from studylib.evidence.measures import FULL, response_measures, unchanged_text
from studylib.evidence.rules import is_best, loses_little, stays_below, wins_back
from studylib.evidence.verdicts import TIMES, Claim, PaperNumber
from studylib.methods import setting

ROTATED = {"scheme.rotated": True}
ON_NVFP4 = {"scheme.grid": NVFP}
LITTLE = 0.01  # "next to no loss": less than this share of the perplexity
CLAIMS = (
    Claim(
        "O1",
        "Rotations make 4-bit activations work",
        "SpinQuant, LLaMA-2-7B at 4-4-4, WikiText-2: full precision 5.5, SpinQuant 5.9 (recalled)",
        "LLM-QAT of the rotated model at 4-4-16 has less than twice full precision's perplexity",
        (FULL, setting("llm-qat", "4-4-16", ROTATED)),
        stays_below,
        beside=unchanged_text,
        effect=PaperNumber(5.9 / 5.5, TIMES, recalled=True),
    ),
    Claim(
        "O2",
        "Without training, rotations keep more of 4-bit activations than SmoothQuant",
        "QuaRot, LLaMA-2-7B at 4-4-4, WikiText-2: SmoothQuant 83.1, QuaRot 6.1 (recalled)",
        "At 4-4-16 SmoothQuant and RTN are worse than RTN of the rotated model",
        (setting("rtn", "4-4-16", ROTATED), setting("smoothquant", "4-4-16"), setting("rtn", "4-4-16")),
        is_best,
    ),
    Claim(
        "O3",
        "Of today's 4-bit float formats NVFP4 keeps most",
        "NVFP4's smaller blocks and finer scales keep more than MXFP4's (NVIDIA; direction only)",
        "Weights rounded to MXFP4, with scales rounded down or to the even, are worse than to NVFP4",
        (
            setting("encoded", "4-16-16", {"format": Format("nvfp4", 4, 16)}),
            setting("encoded", "4-16-16", {"format": Format("mxfp4", 4, 32)}),
            setting("encoded", "4-16-16", {"format": Format("mxfp4-even", 4, 32)}),
        ),
        is_best,
    ),
    Claim(
        "O4",
        "QLoRA's adapter can be merged into 4-bit weights at next to no loss",
        "Left open: QLoRA keeps its adapter in 16 bits; of methods that merge without loss L4Q and QA-LoRA have others",
        "QLoRA merged into 4-bit weights and distilled shortly is less than 1% worse in response perplexity than "
        "unmerged",
        (setting("qlora", "4-16-16"), setting("qlora", "4-16-16", {"merge": MERGED_DISTILLED})),
        partial(loses_little, LITTLE),
        primary=response_measures,
    ),
    Claim(
        "O5",
        "Distillation wins back most of what NVFP4 loses in weights and activations",
        "Quantization-aware distillation (arXiv 2601.20088) brings NVFP4 near to 16 bits (direction only)",
        "LLM-QAT on NVFP4 at 4-4-16 wins back more than half of the perplexity that RTN on NVFP4 loses",
        (FULL, setting("rtn", "4-4-16", ON_NVFP4), setting("llm-qat", "4-4-16", ON_NVFP4)),
        wins_back,
        beside=unchanged_text,
    ),
)
