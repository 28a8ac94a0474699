"""QLoRA's claims, each with its rule, written before the runs that it judges (docs/deviations.md: what changed)."""

from functools import partial

from studylib.config import Format
from studylib.evidence.gigabytes import activations_dominate, fits_cards, planned_memory
from studylib.evidence.measures import (
    answers,
    normality,
    nothing,
    response_measures,
    stored_bits,
    training_times,
    unchanged_text,
)
from studylib.evidence.rules import (
    doubles_for_free,
    is_best,
    keeps_up,
    layers_matter,
    matches,
    near_normal,
    saves_bits,
    takes_at_most,
)
from studylib.evidence.verdicts import ACCURACY, BITS, COST, GIGABYTES, MEMORY, NEURONS, Claim, PaperNumber
from studylib.methods import setting

NF4, NF4_DQ, INT4, E2M1, E3M0 = (
    setting("encoded", "4-16-16", {"format": format})
    for format in (
        Format("nf", 4, 64),
        Format("nf", 4, 64, double=True),
        Format("int", 4, 64),
        Format("fp-e2m1", 4, 64),
        Format("fp-e3m0", 4, 64),
    )
)
WIDE = {"adapter.rank": 256}  # of a lower one bitsandbytes pages nothing, where the model is small (train.PAGED_FROM)
CLAIMS = (
    Claim(
        "B1",
        "NF4 beats FP4 and Int4",
        "Mean Pile-CC perplexity of models from 125M to 13B: Int4 34.34, FP4 (E2M1) 31.07, FP4 (E3M0) 29.48, NF4 + "
        "double quantization 27.41",
        "Weights rounded to NF4 with double quantization have a lower perplexity than to Int4 and both FP4, all in "
        "groups of 64",
        (NF4_DQ, INT4, E2M1, E3M0),
        is_best,
        beside=unchanged_text,
        effect=PaperNumber(29.48 / 27.41 - 1, COST, "{} (E3M0)", of=(E3M0,)),
    ),
    Claim(
        "B2",
        "NF4 is better than FP4, and double quantization costs nothing",
        "Figure only, of zero-shot tasks",
        "NF4 with double quantization stays within 5% of perplexity or 2 points of NF4; FP4 (E2M1) is worse",
        (NF4, NF4_DQ, E2M1),
        doubles_for_free,
    ),
    Claim(
        "B3",
        "Double quantization saves 0.373 bits a parameter",
        "32/64 = 0.5 bits of scales become 8/64 + 32/(64 x 256) = 0.127",
        "What is stored for a weight shrinks by 0.373 bits, to within 0.01",
        (NF4, NF4_DQ),
        partial(saves_bits, 0.373),
        primary=stored_bits,
        beside=nothing,
        effect=PaperNumber(0.373, BITS),
    ),
    Claim(
        "B4",
        "LoRA on NF4 with double quantization matches LoRA on 16 bits; on FP4 it is about one point behind",
        "MMLU, 5-shot, mean over LLaMA-7B to 65B, Alpaca and FLAN v2: BF16 53.0, FP4 52.2, NF4 + DQ 53.1",
        "QLoRA stays within 5% of perplexity or 2 points of LoRA; on FP4, where run, it is worse than on NF4",
        (setting("lora", "16-16-16"), setting("qlora", "4-16-16")),
        matches,
        optional=(setting("qlora", "4-16-16", {"format": Format("fp-bnb", 4, 64, double=True)}),),
        primary=response_measures,
        beside=answers,
        effect=PaperNumber(53.0 - 53.1, ACCURACY, "{} of MMLU", of=(setting("qlora", "4-16-16"),)),
    ),
    Claim(
        "B5",
        "LoRA must be on all linear layers; its rank hardly matters",
        "Figure only",
        "QLoRA on the query and value projections only is worse than on all layers; ranks 4 and 64 stay within 5% "
        "of perplexity or 2 points of rank 16",
        (
            setting("qlora", "4-16-16"),
            setting("qlora", "4-16-16", {"adapter.layers": "q_proj+v_proj"}),
            setting("qlora", "4-16-16", {"adapter.rank": 4}),
            setting("qlora", "4-16-16", {"adapter.rank": 64}),
        ),
        layers_matter,
        primary=response_measures,
        beside=answers,
    ),
    Claim(
        "B6",
        "65B fits one 48 GB card, 33B one of 24 GB or nearly, 7B a phone of 6 GB",
        "Total at batch 1 and 512 tokens: 6.9, 11.3, 24.7 and 45.0 GB for 7B, 13B, 33B and 65B",
        "Planned totals and 1 GB for the driver stay within the cards, that of 33B within 1.1 times its card",
        test=fits_cards,
        primary=planned_memory,
        beside=nothing,
        effect=PaperNumber(45.0, GIGABYTES),
    ),
    Claim(
        "B7",
        "Activation gradients dominate the memory of adapters, and checkpointing cuts them",
        "7B: base 5048 MB, adapters 26 MB, input gradients 567 MB, 18 MB with checkpointing",
        "Planned activations are more than half of what training adds to the base; checkpointing halves them",
        test=activations_dominate,
        primary=planned_memory,
        beside=nothing,
        effect=PaperNumber(567 / (567 + 26), MEMORY, "{} of input gradients and adapters"),
    ),
    Claim(
        "B8",
        "Paged optimizers survive memory spikes at the same speed",
        "65B on a 48 GB GPU at batch 16 (claimed, not measured)",
        "A run whose spike does not fit finishes with paging, at no less than 0.9 of the speed",
        (setting("qlora", "4-16-16", WIDE), setting("qlora", "4-16-16", WIDE | {"tuning.paged": True})),
        partial(takes_at_most, 1 / 0.9),
        primary=training_times,
        beside=nothing,
        untested="paging needs a CUDA device; arms of rank 256 there, with and without tuning.paged, tell its speed",
    ),
    Claim(
        "B9",
        "Trained weights are near-normal",
        "7.5% of LLaMA-7B's neurons fail Shapiro-Wilk at 5%",
        "At most 10% of the neurons fail at 5%, of which 5% of exactly normal ones would",
        (NF4_DQ,),
        near_normal,
        primary=normality,
        beside=nothing,
        effect=PaperNumber(7.5, NEURONS),
    ),
    Claim(
        "B10",
        "Left open: 3-bit bases and other adapters match LoRA on 16 bits",
        "No numbers: the authors leave it to others",
        "QLoRA on NF3, and DoRA and PiSSA on NF4 where run, lose less than 5% of perplexity or 2 points against "
        "LoRA on 16 bits",
        (setting("lora", "16-16-16"), setting("qlora", "3-16-16")),
        keeps_up,
        optional=(
            setting("qlora", "4-16-16", {"adapter.kind": "dora"}),
            setting("qlora", "4-16-16", {"adapter.kind": "pissa"}),
        ),
        primary=response_measures,
        beside=answers,
    ),
)
