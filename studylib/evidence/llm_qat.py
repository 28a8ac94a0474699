"""LLM-QAT's claims, each with its rule, written before the runs that it judges (docs/deviations.md: what changed)."""

from studylib.evidence.measures import FULL, perplexities, unchanged_text
from studylib.evidence.rules import (
    cache_breaks,
    explodes,
    generalises,
    is_best,
    matches,
    sampling_beats_greedy,
    small_gain,
    smoothing,
    wins_back,
)
from studylib.evidence.verdicts import ACCURACY, TIMES, WON_BACK, Claim, PaperNumber
from studylib.methods import setting

DEFAULT = setting("llm-qat", "4-8-4")
CLAIMS = (
    Claim(
        "A1",
        "LLM-QAT recovers most of what 4-8-4 loses",
        "LLaMA-7B, mean of 8 zero-shot tasks: full precision 66.2, RTN 41.2, LLM-QAT 60.7",
        "LLM-QAT wins back more than half of what RTN loses at 4-8-4; undecided where that loss is not clearly above 0",
        (FULL, setting("rtn", "4-8-4"), setting("llm-qat", "4-8-4")),
        wins_back,
        effect=PaperNumber((60.7 - 41.2) / (66.2 - 41.2), WON_BACK, "{} of accuracy"),
    ),
    Claim(
        "A2",
        "The 4-bit key/value cache is where post-training quantization breaks",
        "LLaMA-30B at 8-8-4, zero-shot: SmoothQuant 50.7, LLM-QAT 69.7",
        "From 8-8-8 to 8-8-4 RTN loses more than 5% perplexity, or 2 points, and more than to 4-8-8; LLM-QAT at "
        "8-8-4, where run, is better than SmoothQuant",
        (setting("rtn", "8-8-8"), setting("rtn", "8-8-4"), setting("rtn", "4-8-8")),
        cache_breaks,
        optional=(setting("llm-qat", "8-8-4"), setting("smoothquant", "8-8-4")),
        effect=PaperNumber(69.7 - 50.7, ACCURACY, "{} gained over SmoothQuant", of=(setting("llm-qat", "8-8-4"),)),
    ),
    Claim(
        "A3",
        "With an 8-bit cache the gain of training is small",
        "LLaMA-30B at 4-8-8, zero-shot: RTN 69.1, LLM-QAT 70.5",
        "RTN's perplexity at 4-8-8 is less than 5% above LLM-QAT's, or its accuracy less than 2 points below",
        (setting("rtn", "4-8-8"), setting("llm-qat", "4-8-8")),
        small_gain,
        optional=(setting("rtn", "4-8-4"), setting("llm-qat", "4-8-4")),
        effect=PaperNumber(70.5 - 69.1, ACCURACY),
    ),
    Claim(
        "A4",
        "At 8 bits post-training quantization is enough",
        "LLaMA-7B at 8-8-8, zero-shot: RTN 65.6, SmoothQuant 66.3, LLM-QAT 66.0 (recalled); full precision 66.2",
        "RTN at 8-8-8 stays within 5% of full precision's perplexity, or 2 points: the whole interval inside is "
        "reproduced, the whole interval outside is not",
        (FULL, setting("rtn", "8-8-8")),
        matches,
        effect=PaperNumber(66.2 - 65.6, ACCURACY, recalled=True),
    ),
    Claim(
        "A5",
        "Rather 8 bits than a smaller model, and rather 4 bits by LLM-QAT than 8 bits of half the size",
        "A recommendation, from LLaMA-7B, 13B and 30B",
        "At equal bytes, the larger model at fewer bits is better: RTN's 8 bits than full precision of the smaller, "
        "LLM-QAT's 4 bits than RTN's 8 and than full precision, each in the pair of sizes that is nearest; equal are, "
        "with the cache, at most as many bytes and at least 75% of them",
        beside=perplexities,
        sizes=True,
        untested="it takes two sizes of one family; the package index has one",
    ),
    Claim(
        "A6",
        "Post-training quantization's perplexity explodes at 4-8-4",
        "LLaMA-7B, WikiText-2: full precision 10.4, RTN 151.4",
        "RTN's perplexity at 4-8-4 is at least twice full precision's",
        (FULL, setting("rtn", "4-8-4")),
        explodes,
        beside=unchanged_text,
        effect=PaperNumber(151.4 / 10.4, TIMES),
    ),
    Claim(
        "A7",
        "Generated data generalise better than a subset of real data",
        "LLaMA-7B at 4-6-16, zero-shot: hybrid generation 63.1, ahead of WikiText and C4 subsets (direction only)",
        "LLM-QAT on generated text is better than on as many tokens of Wikipedia or C4, by the corpus that the real "
        "text was not from",
        (
            DEFAULT,
            setting("llm-qat", "4-8-4", {"data.corpus": "wikipedia"}),
            setting("llm-qat", "4-8-4", {"data.corpus": "c4"}),
        ),
        generalises,
    ),
    Claim(
        "A8",
        "Sampled data beat greedy data",
        "direction only; the hybrid (first 3 to 5 tokens greedy, then sampled) is the default",
        "LLM-QAT on greedy text is worse than on hybrid and than on sampled text",
        (
            DEFAULT,
            setting("llm-qat", "4-8-4", {"data.strategy": "sampled"}),
            setting("llm-qat", "4-8-4", {"data.strategy": "greedy"}),
        ),
        sampling_beats_greedy,
    ),
    Claim(
        "A9",
        "Soft logits alone are the best target",
        "LLaMA-7B, zero-shot: logits 63.1, with attention maps 61.1, with hidden states 34.9",
        "LLM-QAT with KL on logits is better than with labels, and than with attention maps or raw hidden states added",
        (
            DEFAULT,
            *(
                setting("llm-qat", "4-8-4", {"training.loss": loss})
                for loss in ("labels", "kl+attention", "kl+raw-hidden")
            ),
        ),
        is_best,
        effect=PaperNumber(
            63.1 - 61.1,
            ACCURACY,
            "{} (attention maps)",
            of=(setting("llm-qat", "4-8-4", {"training.loss": "kl+attention"}),),
        ),
    ),
    Claim(
        "A10",
        "Symmetric MinMax beats grids that clip",
        "LSQ about 13 points worse; clipping starts at perplexity above 10,000",
        "LLM-QAT with weights on symmetric MinMax grids is better than on StatsQ and on LSQ",
        (
            DEFAULT,
            setting("llm-qat", "4-8-4", {"scheme.grid": "statsq"}),
            setting("llm-qat", "4-8-4", {"scheme.grid": "lsq"}),
        ),
        is_best,
        effect=PaperNumber(
            13.0, ACCURACY, "about 13 points (LSQ)", of=(setting("llm-qat", "4-8-4", {"scheme.grid": "lsq"}),)
        ),
    ),
    Claim(
        "A11",
        "SmoothQuant before training helps at 4-4 and not at 4-8",
        "LLaMA-7B, six tasks at W4A4: LLM-QAT 41.3, after SmoothQuant 46.4",
        "Without SmoothQuant, LLM-QAT at 4-4-16 is worse; at 4-8-4 by less than 5% of perplexity or 2 points",
        (
            setting("llm-qat", "4-4-16"),
            setting("smoothquant+llm-qat", "4-4-16"),
            DEFAULT,
            setting("smoothquant+llm-qat", "4-8-4"),
        ),
        smoothing,
        effect=PaperNumber(46.4 - 41.3, ACCURACY, of=(setting("llm-qat", "4-4-16"),)),
    ),
    Claim(
        "A12",
        "4-bit activations are not solved by training",
        "LLaMA-7B, six tasks at W4A4: LLM-QAT 41.3",
        "LLM-QAT's perplexity at 4-4-16 is at least twice full precision's",
        (FULL, setting("llm-qat", "4-4-16")),
        explodes,
        beside=unchanged_text,
    ),
)
