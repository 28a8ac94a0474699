"""The papers' claims, each with its rule, written down before the runs that it judges (README: what changed)."""

from functools import partial

from studylib.evidence.effects import ACCURACY, BITS, COST, GIGABYTES, MEMORY, NEURONS, TIMES, WON_BACK, PaperNumber
from studylib.evidence.judging import Claim, learned, normality, planned_memory, stored_bits, timed
from studylib.evidence.measures import FULL, Setting, decoding_measures, perplexities, response_measures
from studylib.evidence.memory_rules import activations_dominate, fits_cards, near_lora
from studylib.evidence.rules import (
    alike,
    cache_breaks,
    converges_faster,
    decodes_faster,
    explodes,
    generalises,
    is_best,
    keeps_up,
    layers_matter,
    matches,
    near_normal,
    sampling_beats_greedy,
    saves_bits,
    small_gain,
    small_groups_help,
    smoothing,
    takes_at_most,
    wins_back,
)

DEFAULT = Setting("llm-qat", "4-8-4")
NF4, NF4_DQ, INT4, E2M1, E3M0 = (
    Setting("encoded", "4-16-16", variant) for variant in ("NF4", "NF4 + DQ", "Int4", "FP4 (E2M1)", "FP4 (E3M0)")
)
UNIFORM = {4: "affine Int4", 3: "affine Int3"}  # what the L4Q paper marks with a star


CLAIMS = {
    claim.id: claim
    for claim in (
        Claim(
            "A1",
            "LLM-QAT recovers most of what 4-8-4 loses",
            "LLaMA-7B, mean of 8 zero-shot tasks: full precision 66.2, RTN 41.2, LLM-QAT 60.7",
            "LLM-QAT wins back more than half of what RTN loses at 4-8-4; undecided unless that loss is above 0",
            (FULL, Setting("rtn", "4-8-4"), Setting("llm-qat", "4-8-4")),
            wins_back,
            effect=PaperNumber((60.7 - 41.2) / (66.2 - 41.2), WON_BACK, "{} of accuracy"),
        ),
        Claim(
            "A2",
            "The 4-bit key/value cache is where post-training quantization breaks",
            "LLaMA-30B at 8-8-4, zero-shot: SmoothQuant 50.7, LLM-QAT 69.7 (RTN stands in for SmoothQuant here)",
            "From 8-8-8 to 8-8-4 RTN loses more than 5% perplexity, or 2 points, and more than to 4-8-8; LLM-QAT at "
            "8-8-4, where run, is better",
            (Setting("rtn", "8-8-8"), Setting("rtn", "8-8-4"), Setting("rtn", "4-8-8")),
            cache_breaks,
            optional=(Setting("llm-qat", "8-8-4"),),
            effect=PaperNumber(69.7 - 50.7, ACCURACY, "{} gained over SmoothQuant", of=(Setting("llm-qat", "8-8-4"),)),
        ),
        Claim(
            "A3",
            "With an 8-bit cache the gain of training is small",
            "LLaMA-30B at 4-8-8, zero-shot: RTN 69.1, LLM-QAT 70.5",
            "RTN's perplexity at 4-8-8 is less than 5% above LLM-QAT's, or its accuracy less than 2 points below",
            (Setting("rtn", "4-8-8"), Setting("llm-qat", "4-8-8")),
            small_gain,
            optional=(Setting("rtn", "4-8-4"), Setting("llm-qat", "4-8-4")),
            effect=PaperNumber(70.5 - 69.1, ACCURACY),
        ),
        Claim(
            "A4",
            "At 8 bits post-training quantization is enough",
            "LLaMA-7B at 8-8-8, zero-shot: RTN 65.6, SmoothQuant 66.3, LLM-QAT 66.0 (recalled); full precision 66.2",
            "RTN at 8-8-8 stays within 5% of full precision's perplexity, or 2 points: the whole interval inside is "
            "reproduced, the whole interval outside is not",
            (FULL, Setting("rtn", "8-8-8")),
            matches,
            effect=PaperNumber(66.2 - 65.6, ACCURACY, recalled=True),
        ),
        Claim(
            "A5",
            "Rather 8 bits than a smaller model, and rather 4 bits by LLM-QAT than 8 bits of half the size",
            "A recommendation, from LLaMA-7B, 13B and 30B",
            "At equal bytes, the larger model at fewer bits is better",
            untested="it takes two sizes of one family; the package index has one",
        ),
        Claim(
            "A6",
            "Post-training quantization's perplexity explodes at 4-8-4",
            "LLaMA-7B, WikiText-2: full precision 10.4, RTN 151.4",
            "RTN's perplexity at 4-8-4 is at least twice full precision's",
            (FULL, Setting("rtn", "4-8-4")),
            explodes,
            measures=perplexities,
            effect=PaperNumber(151.4 / 10.4, TIMES),
        ),
        Claim(
            "A7",
            "Generated data generalise better than a subset of real data",
            "LLaMA-7B at 4-6-16, zero-shot: hybrid generation 63.1, ahead of WikiText and C4 subsets (direction only)",
            "LLM-QAT on generated text is better than on as many tokens of Wikipedia or C4, on the tasks and on the "
            "corpus that the real text was not from",
            (DEFAULT, Setting("llm-qat", "4-8-4", "Wikipedia text"), Setting("llm-qat", "4-8-4", "C4 text")),
            generalises,
        ),
        Claim(
            "A8",
            "Sampled data beat greedy data",
            "direction only; the hybrid (first 3 to 5 tokens greedy, then sampled) is the default",
            "LLM-QAT on greedy text is worse than on hybrid and than on sampled text",
            (DEFAULT, Setting("llm-qat", "4-8-4", "sampled"), Setting("llm-qat", "4-8-4", "greedy")),
            sampling_beats_greedy,
        ),
        Claim(
            "A9",
            "Soft logits alone are the best target",
            "LLaMA-7B, zero-shot: logits 63.1, with attention maps 61.1, with hidden states 34.9",
            "LLM-QAT with KL on logits is better than with labels, and than with attention maps or hidden states added",
            (
                DEFAULT,
                *(Setting("llm-qat", "4-8-4", f"loss {loss}") for loss in ("labels", "kl+attention", "kl+hidden")),
            ),
            is_best,
            effect=PaperNumber(
                63.1 - 61.1, ACCURACY, "{} (attention maps)", of=(Setting("llm-qat", "4-8-4", "loss kl+attention"),)
            ),
        ),
        Claim(
            "A10",
            "Symmetric MinMax beats grids that clip",
            "LSQ about 13 points worse; clipping starts at perplexity above 10,000",
            "LLM-QAT on symmetric MinMax grids is better than on StatsQ and on LSQ",
            (DEFAULT, Setting("llm-qat", "4-8-4", "StatsQ clipping"), Setting("llm-qat", "4-8-4", "LSQ")),
            is_best,
            effect=PaperNumber(13.0, ACCURACY, "about 13 points (LSQ)", of=(Setting("llm-qat", "4-8-4", "LSQ"),)),
        ),
        Claim(
            "A11",
            "SmoothQuant before training helps at 4-4 and not at 4-8",
            "LLaMA-7B, six tasks at W4A4: LLM-QAT 41.3, after SmoothQuant 46.4",
            "Without SmoothQuant, LLM-QAT at 4-4-16 is worse; at 4-8-4 by less than 5% of perplexity or 2 points",
            (
                Setting("llm-qat", "4-4-16"),
                Setting("smoothquant+llm-qat", "4-4-16"),
                DEFAULT,
                Setting("smoothquant+llm-qat", "4-8-4"),
            ),
            smoothing,
            effect=PaperNumber(46.4 - 41.3, ACCURACY, of=(Setting("llm-qat", "4-4-16"),)),
        ),
        Claim(
            "A12",
            "4-bit activations are not solved by training",
            "LLaMA-7B, six tasks at W4A4: LLM-QAT 41.3",
            "LLM-QAT's perplexity at 4-4-16 is at least twice full precision's",
            (FULL, Setting("llm-qat", "4-4-16")),
            explodes,
            measures=perplexities,
        ),
        Claim(
            "B1",
            "NF4 beats FP4 and Int4",
            "Mean Pile-CC perplexity of models from 125M to 13B: Int4 34.34, FP4 (E2M1) 31.07, FP4 (E3M0) 29.48, NF4 + "
            "double quantization 27.41",
            "Weights rounded to NF4 with double quantization have a lower perplexity than to Int4 and both FP4, all in "
            "blocks of 64",
            (NF4_DQ, INT4, E2M1, E3M0),
            is_best,
            measures=perplexities,
            effect=PaperNumber(29.48 / 27.41 - 1, COST, "{} (E3M0)", of=(E3M0,)),
        ),
        Claim(
            "B2",
            "NF4 is better than FP4, and double quantization costs nothing",
            "Figure only, of zero-shot tasks",
            "NF4 with double quantization stays within 5% of perplexity or 2 points of NF4; FP4 (E2M1) is worse",
            (NF4, NF4_DQ, E2M1),
            matches,
        ),
        Claim(
            "B3",
            "Double quantization saves 0.373 bits a parameter",
            "32/64 = 0.5 bits of scales become 8/64 + 32/(64 x 256) = 0.127",
            "What is stored for a weight shrinks by 0.373 bits, to within 0.01",
            (NF4, NF4_DQ),
            partial(saves_bits, 0.373),
            measures=stored_bits,
            effect=PaperNumber(0.373, BITS),
        ),
        Claim(
            "B4",
            "LoRA on NF4 with double quantization matches LoRA on 16 bits; on FP4 it is about one point behind",
            "MMLU, 5-shot, mean over LLaMA-7B to 65B, Alpaca and FLAN v2: BF16 53.0, FP4 52.2, NF4 + DQ 53.1",
            "QLoRA stays within 5% of perplexity or 2 points of LoRA; on FP4, where run, it is worse than on NF4",
            (Setting("lora", "16-16-16"), Setting("qlora", "4-16-16")),
            matches,
            optional=(Setting("qlora", "4-16-16", "FP4 (bitsandbytes) + DQ"),),
            measures=learned,
            effect=PaperNumber(53.0 - 53.1, ACCURACY, "{} of MMLU", of=(Setting("qlora", "4-16-16"),)),
        ),
        Claim(
            "B5",
            "LoRA must be on all linear layers; its rank hardly matters",
            "Figure only",
            "QLoRA on the query and value projections only is worse than on all layers; ranks 4 and 64 stay within 5% "
            "of perplexity or 2 points of rank 16",
            (
                Setting("qlora", "4-16-16"),
                Setting("qlora", "4-16-16", "on q_proj and v_proj only"),
                Setting("qlora", "4-16-16", "rank 4"),
                Setting("qlora", "4-16-16", "rank 64"),
            ),
            layers_matter,
            measures=learned,
        ),
        Claim(
            "B6",
            "65B fits one 48 GB card, 33B one of 24 GB or nearly, 7B a phone of 6 GB",
            "Total at batch 1 and 512 tokens: 6.9, 11.3, 24.7 and 45.0 GB for 7B, 13B, 33B and 65B",
            "Planned totals and 1 GB for the driver stay within the cards, that of 33B within 1.1 times its card",
            test=fits_cards,
            measures=planned_memory,
            effect=PaperNumber(45.0, GIGABYTES),
        ),
        Claim(
            "B7",
            "Activation gradients dominate the memory of adapters, and checkpointing cuts them",
            "7B: base 5048 MB, adapters 26 MB, input gradients 567 MB, 18 MB with checkpointing",
            "Planned activations are more than half of what training adds to the base; checkpointing halves them",
            test=activations_dominate,
            measures=planned_memory,
            effect=PaperNumber(567 / (567 + 26), MEMORY, "{} of input gradients and adapters"),
        ),
        Claim(
            "B8",
            "Paged optimizers survive memory spikes at the same speed",
            "65B on a 48 GB GPU at batch 16 (claimed, not measured)",
            "A run whose spike does not fit finishes with paging, at no less than 0.9 of the speed",
            (Setting("qlora", "4-16-16"), Setting("qlora", "4-16-16", "paged optimizer")),
            partial(takes_at_most, 1 / 0.9),
            measures=timed,
            untested="paging needs a CUDA device; an arm with tuning.paged on one tells its speed",
        ),
        Claim(
            "B9",
            "Trained weights are near-normal",
            "7.5% of LLaMA-7B's neurons fail Shapiro-Wilk at 5%",
            "At most 10% of the neurons fail at 5%, of which 5% of exactly normal ones would",
            (NF4_DQ,),
            near_normal,
            measures=normality,
            effect=PaperNumber(7.5, NEURONS),
        ),
        Claim(
            "B10",
            "Left open: 3-bit bases and other adapters match LoRA on 16 bits",
            "No numbers: the authors leave it to others",
            "QLoRA on NF3, and DoRA and PiSSA on NF4 where run, lose less than 5% of perplexity or 2 points against "
            "LoRA on 16 bits",
            (Setting("lora", "16-16-16"), Setting("qlora", "3-16-16")),
            keeps_up,
            optional=(Setting("qlora", "4-16-16", "DoRA"), Setting("qlora", "4-16-16", "PiSSA")),
            measures=learned,
        ),
        *(
            Claim(
                name,
                f"L4Q is the best of the methods that leave weights at {bits} bits",
                paper,
                f"At {bits} bits L4Q beats LoRA on GPTQ (the paper's GPTQ may be without), QLoRA*, QA-LoRA and "
                "QAT-LoRA; LoftQ* is not run",
                (
                    Setting("l4q", f"{bits}-16-16"),
                    Setting("gptq+lora", f"{bits}-16-16"),
                    Setting("qlora", f"{bits}-16-16", UNIFORM[bits]),
                    Setting("qa-lora", f"{bits}-16-16"),
                    Setting("qat-lora", f"{bits}-16-16"),
                ),
                is_best,
                measures=learned,
                effect=effect,
            )
            for name, bits, paper, effect in (
                (
                    "C1",
                    4,
                    "LLaMA-2-7B, 7 tasks: GPTQ 60.7, LoftQ* 61.7, QLoRA* 61.3, QA-LoRA 61.0, QAT-LoRA 61.9, L4Q 63.6",
                    PaperNumber(63.6 - 61.9, ACCURACY, "{} (QAT-LoRA)", of=(Setting("qat-lora", "4-16-16"),)),
                ),
                (
                    "C2",
                    3,
                    "LLaMA-2-7B, 7 tasks: GPTQ 57.6, LoftQ* 34.7, QLoRA* 57.6, QA-LoRA 56.3, QAT-LoRA 57.4, L4Q 61.3",
                    PaperNumber(
                        61.3 - 57.6,
                        ACCURACY,
                        "{} (GPTQ, QLoRA*)",
                        of=(Setting("gptq+lora", "3-16-16"), Setting("qlora", "3-16-16", UNIFORM[3])),
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
            measures=planned_memory,
            effect=PaperNumber(25.4 / 25.1, TIMES),
        ),
        Claim(
            "C4",
            "L4Q trains in about the time of QLoRA in total",
            "7B: QLoRA* 9.9 hours, L4Q 10.1 at half the iterations: about 1.9 to 2.0 times as long for each",
            "A step of L4Q takes at most twice one of QLoRA*",
            (Setting("qlora", "4-16-16", UNIFORM[4]), Setting("l4q", "4-16-16")),
            partial(takes_at_most, 2.0),
            measures=timed,
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
            (Setting("4-bit kernel", "4-16-16"),),
            partial(decodes_faster, 1.2),
            measures=decoding_measures,
            untested="it takes times of the 4-bit kernel, which 08_low_bit_execution measures",
            effect=PaperNumber(1.81 / 1.33, TIMES, "{} as fast"),
        ),
        Claim(
            "C6",
            "L4Q's initialisation of scales is the best of four",
            "MMLU, 5-shot, LLaMA-2-7B: LSQ+ 25.7, symmetric 43.5, asymmetric 44.2, L4Q 45.3",
            "L4Q started from its own scales is better than from those of LSQ+, symmetric and asymmetric MinMax",
            (
                Setting("l4q", "4-16-16"),
                *(Setting("l4q", "4-16-16", f"{name} initialisation") for name in ("lsq+", "symmetric", "asymmetric")),
            ),
            is_best,
            measures=learned,
            effect=PaperNumber(
                45.3 - 44.2,
                ACCURACY,
                "{} of MMLU (asymmetric)",
                of=(Setting("l4q", "4-16-16", "asymmetric initialisation"),),
            ),
        ),
        Claim(
            "C7",
            "Ranks beyond 4 barely help",
            "Mean of 7 tasks at rank 1 to 128: 62.6 62.6 63.0 63.1 62.8 63.2 63.1 63.0",
            "L4Q at rank 16 and 64 stays within 5% of perplexity or 2 points of rank 4",
            (Setting("l4q", "4-16-16", "rank 4"), Setting("l4q", "4-16-16"), Setting("l4q", "4-16-16", "rank 64")),
            alike,
            measures=learned,
            effect=PaperNumber(63.0 - 62.8, ACCURACY, "{} (rank 16)", of=(Setting("l4q", "4-16-16"),)),
        ),
        Claim(
            "C8",
            "Smaller groups help a little",
            "Mean of 7 tasks in groups of 128, 64 and 32: 63.6, 63.7, 63.9",
            "L4Q in groups of 32 is better than in groups of 64, by less than 5% of perplexity or 2 points",
            (Setting("l4q", "4-16-16"), Setting("l4q", "4-16-16", "affine Int4, block 32")),
            small_groups_help,
            measures=learned,
            effect=PaperNumber(63.9 - 63.7, ACCURACY),
        ),
        Claim(
            "C9",
            "L4Q converges faster than QLoRA",
            "Figure only",
            "Half-way through training, the validation loss of L4Q is below that of QLoRA*, wherever both began",
            (Setting("l4q", "4-16-16"), Setting("qlora", "4-16-16", UNIFORM[4])),
            converges_faster,
            measures=response_measures,
        ),
    )
}
