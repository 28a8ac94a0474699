"""L4Q's claims, each with its rule, written before the runs that it judges (docs/deviations.md: what changed)."""

from functools import partial

from studylib.config import FULL, LOFTQ, Format
from studylib.evidence.gigabytes import near_lora, planned_memory
from studylib.evidence.measures import answers, decoding_measures, nothing, response_measures, training_times
from studylib.evidence.rules import (
    alike,
    converges_faster,
    decodes_faster,
    is_best,
    small_groups_help,
    takes_at_most,
)
from studylib.evidence.verdicts import ACCURACY, TIMES, Claim, PaperNumber
from studylib.methods import setting

# The paper's grid, the same for all of its methods. Ours take it by default, but for QLoRA: the paper's star.
UNIFORM = {bits: {"format": Format(FULL, bits, 64)} for bits in (4, 3)}
CLAIMS = (
    *(
        Claim(
            name,
            f"L4Q is the best of the methods that leave weights at {bits} bits",
            reported,
            f"At {bits} bits L4Q beats LoRA on GPTQ (the paper's GPTQ may be without), LoftQ*, QLoRA*, QAT-LoRA, and "
            "QA-LoRA on rounded weights and on GPTQ's",
            (
                setting("l4q", f"{bits}-16-16"),
                setting("gptq+lora", f"{bits}-16-16"),
                setting("qlora", f"{bits}-16-16", UNIFORM[bits]),
                setting("qlora", f"{bits}-16-16", UNIFORM[bits] | {"adapter.kind": LOFTQ}),
                setting("qa-lora", f"{bits}-16-16"),
                setting("gptq+qa-lora", f"{bits}-16-16"),
                setting("qat-lora", f"{bits}-16-16"),
            ),
            is_best,
            primary=response_measures,
            beside=answers,
            effect=effect,
        )
        for name, bits, reported, effect in (
            (
                "C1",
                4,
                "LLaMA-2-7B, 7 tasks: GPTQ 60.7, LoftQ* 61.7, QLoRA* 61.3, QA-LoRA 61.0, QAT-LoRA 61.9, L4Q 63.6",
                PaperNumber(63.6 - 61.9, ACCURACY, "{} (QAT-LoRA)", of=(setting("qat-lora", "4-16-16"),)),
            ),
            (
                "C2",
                3,
                "LLaMA-2-7B, 7 tasks: GPTQ 57.6, LoftQ* 34.7, QLoRA* 57.6, QA-LoRA 56.3, QAT-LoRA 57.4, L4Q 61.3",
                PaperNumber(
                    61.3 - 57.6,
                    ACCURACY,
                    "{} (GPTQ, QLoRA*)",
                    of=(setting("gptq+lora", "3-16-16"), setting("qlora", "3-16-16", UNIFORM[3])),
                ),
            ),
        )
    ),
    Claim(
        "C3",
        "L4Q trains in about the memory of LoRA, far below that of quantization-aware training",
        "GB at 3B, 7B, 13B and 33B: LoRA 15.1, 25.1, 43.8, 71.9; L4Q 15.3, 25.4, 44.3, 73.2; QAT 44.2, 79.5, then "
        "out of memory",
        "Planned for 7B, L4Q takes at most 1.1 times LoRA's memory and half of QAT's",
        test=near_lora,
        primary=planned_memory,
        beside=nothing,
        effect=PaperNumber(25.4 / 25.1, TIMES),
    ),
    Claim(
        "C4",
        "L4Q trains in about the time of QLoRA in total",
        "7B: QLoRA* 9.9 hours, L4Q 10.1 at half the iterations: about 1.9 to 2.0 times as long for each",
        "A step of L4Q takes at most twice one of QLoRA*",
        (setting("qlora", "4-16-16", UNIFORM[4]), setting("l4q", "4-16-16")),
        partial(takes_at_most, 2.0),
        primary=training_times,
        beside=nothing,
        untested="times on shared processors say nothing; records of an accelerator do, and benchmarks/l4q_step.py "
        "measures steps side by side",
        effect=PaperNumber(10.1 / 9.9, TIMES, "{} QLoRA's hours"),
    ),
    Claim(
        "C5",
        "A fully quantized model decodes 1.2 times as fast as quantized weights with a 16-bit adapter, or faster",
        "Speed-up over FP16 of L4Q and QLoRA*: 7B 1.81 and 1.33, 13B 1.92 and 1.41, 30B 2.25 and 1.44",
        "On a kernel that multiplies 4-bit integers, L4Q, which leaves nothing else, decodes at least 1.2 times as "
        "fast as QLoRA*, whose adapter stays beside them",
        (setting("4-bit kernel", "4-16-16"),),
        partial(decodes_faster, 1.2),
        primary=decoding_measures,
        beside=nothing,
        untested="it takes times of the 4-bit kernel, which 08_low_bit_execution measures",
        effect=PaperNumber(1.81 / 1.33, TIMES, "{} as fast"),
    ),
    Claim(
        "C6",
        "L4Q's initialisation of scales is the best of four",
        "MMLU, 5-shot, LLaMA-2-7B: LSQ+ 25.7, symmetric 43.5, asymmetric 44.2, L4Q 45.3",
        "L4Q started from its own scales is better than from those of LSQ+, symmetric and asymmetric MinMax",
        (
            setting("l4q", "4-16-16"),
            *(setting("l4q", "4-16-16", {"adapter.init": name}) for name in ("lsq+", "symmetric", "asymmetric")),
        ),
        is_best,
        primary=response_measures,
        beside=answers,
        effect=PaperNumber(
            45.3 - 44.2,
            ACCURACY,
            "{} of MMLU (asymmetric)",
            of=(setting("l4q", "4-16-16", {"adapter.init": "asymmetric"}),),
        ),
    ),
    Claim(
        "C7",
        "Ranks beyond 4 barely help",
        "Mean of 7 tasks at rank 1 to 128: 62.6 62.6 63.0 63.1 62.8 63.2 63.1 63.0",
        "L4Q at rank 16 and 64 stays within 5% of perplexity or 2 points of rank 4",
        (
            setting("l4q", "4-16-16", {"adapter.rank": 4}),
            setting("l4q", "4-16-16"),
            setting("l4q", "4-16-16", {"adapter.rank": 64}),
        ),
        alike,
        primary=response_measures,
        beside=answers,
        effect=PaperNumber(63.0 - 62.8, ACCURACY, "{} (rank 16)", of=(setting("l4q", "4-16-16"),)),
    ),
    Claim(
        "C8",
        "Smaller groups help a little",
        "Mean of 7 tasks in groups of 128, 64 and 32: 63.6, 63.7, 63.9",
        "L4Q in groups of 32 is better than in groups of 64, by less than 5% of perplexity or 2 points",
        (setting("l4q", "4-16-16"), setting("l4q", "4-16-16", {"format": Format(FULL, 4, 32)})),
        small_groups_help,
        primary=response_measures,
        beside=answers,
        effect=PaperNumber(63.9 - 63.7, ACCURACY),
    ),
    Claim(
        "C9",
        "L4Q converges faster than QLoRA",
        "Figure only",
        "Half-way through training, the validation loss of L4Q is below that of QLoRA*, wherever both began",
        (setting("l4q", "4-16-16"), setting("qlora", "4-16-16", UNIFORM[4])),
        converges_faster,
        primary=response_measures,
        beside=nothing,
    ),
)
