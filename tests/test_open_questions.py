"""Each comparison with an interval in docs/open-questions.md is what the reference's records say."""

import re
from pathlib import Path

import pytest

from studylib.config import percent
from studylib.evidence import gather, perplexities, response_measures, text_measures
from studylib.study.records import REFERENCE, read_records

PAGE = (Path(__file__).parents[1] / "docs" / "open-questions.md").read_text(encoding="utf-8")
L4Q, L4Q_3, LORA, QLORA = "L4Q at 4-16-16", "L4Q at 3-16-16", "LoRA at 16-16-16", "QLoRA at 4-16-16"
L4Q_AFFINE, L4Q_3_AFFINE = f"{L4Q} (affine Int4)", f"{L4Q_3} (affine Int3)"
LLM_QAT, RTN = "LLM-QAT at 4-8-4", "RTN at 8-8-8"
# By the bold words that its paragraph begins with: arms, each with the one that it lies behind or ahead of.
RESPONSES = {
    "L4Q, on its paper's grid and on a better one": [
        ("GPTQ + LoRA at 4-16-16", L4Q),
        ("GPTQ + LoRA at 3-16-16", L4Q_3),
        (f"{L4Q} (asymmetric initialisation)", L4Q),
        (f"{QLORA} (affine Int4)", L4Q_AFFINE),
        ("QAT at 4-16-16 (affine Int4)", L4Q_AFFINE),
        ("QAT-LoRA at 3-16-16 (affine Int3)", L4Q_3_AFFINE),
        ("GPTQ + LoRA at 3-16-16 (affine Int3)", L4Q_3_AFFINE),
        ("GPTQ + QA-LoRA at 4-16-16 (affine Int4)", L4Q_AFFINE),
        ("GPTQ + QA-LoRA at 3-16-16 (affine Int3)", L4Q_3_AFFINE),
    ],
    "Blocks first, scales afterwards": [
        ("EfficientQAT at 4-16-16", L4Q),
        ("EfficientQAT at 3-16-16", L4Q_3),
        ("GPTQ + LoRA at 4-16-16", "EfficientQAT at 4-16-16"),
    ],
    "A start that knows the rounding error": [
        (f"{QLORA} (LoftQ)", LORA),
        (f"{QLORA} (full-range Int4, LoftQ)", L4Q),
        ("QLoRA at 3-16-16 (full-range Int3, LoftQ)", L4Q_3),
        ("GPTQ + QA-LoRA at 4-16-16", L4Q),
        ("GPTQ + QA-LoRA at 3-16-16", L4Q_3),
    ],
    "Merging an adapter into four bits loses nothing": [
        (f"{QLORA} (adapter merged into the 16-bit weights, then rounded)", QLORA),
        (f"{QLORA} (adapter merged, rounded again)", QLORA),
        (f"{QLORA} (adapter merged into the 16-bit weights, then rounded and distilled)", QLORA),
    ],
    "Plain QAT is a rival at its own rate": [("QAT at 4-16-16", L4Q), ("QAT at 3-16-16", L4Q_3)],
}
FULL, WAY, BEGUN = "full precision", "asymmetric MinMax, rotated", "asymmetric activations, rotated"
WAYS = "What makes 4-bit activations work"
TEXT = {
    "NF4 beside a good affine Int4": [("FP4 (bitsandbytes)", "FP4 (E2M1)")],
    "Grids that clip": [(f"{LLM_QAT} (LSQ weights)", LLM_QAT)],
    "Eight bits": [("LLM-QAT at 8-8-8", RTN)],
    WAYS: [(f"GPTQ + LLM-QAT at {bits} ({BEGUN})", f"LLM-QAT at {bits} ({WAY})") for bits in ("4-4-16", "4-4-4")],
}
TIMES = {
    WAYS: [
        ("LLM-QAT at 4-4-16 (rotated)", FULL),
        (f"LLM-QAT at 4-4-16 ({WAY})", FULL),
        (f"LLM-QAT at 4-4-4 ({WAY})", FULL),
        *[
            (f"{method} at {bits} ({BEGUN})", FULL)
            for method in ("GPTQ", "GPTQ + LLM-QAT")
            for bits in ("4-4-16", "4-4-4")
        ],
    ]
}
WIKIPEDIA = {
    "Grids that clip": [
        ("LLM-QAT at 3-8-4 (ParetoQ weights)", "LLM-QAT at 3-8-4"),
        (f"{LLM_QAT} (asymmetric MinMax)", LLM_QAT),
    ]
}


@pytest.fixture(scope="module")
def records():
    return list(read_records(REFERENCE / "records"))


def paragraph(words):
    (found,) = [" ".join(own.split()) for own in PAGE.split("\n\n") if own.startswith(f"**{words}")]
    return found


def apart(measure, cell, base):
    """How far a cell lies from another one, as the page writes it: without a sign, and with an interval to match."""
    found = measure.above(cell, base)
    low, high = (found.low, found.high) if found.estimate > 0 else (-found.high, -found.low)
    return f"{percent(abs(found.estimate))} [{percent(low)}, {percent(high)}]"


def times(measure, cell, base):
    """How many times another cell's perplexity a cell has, as the page writes it."""
    found = measure.above(cell, base)
    return f"{1 + found.estimate:.2f} [{1 + found.low:.2f}, {1 + found.high:.2f}]"


@pytest.mark.parametrize(
    ("wanted", "compared", "told"),
    [
        (response_measures, RESPONSES, apart),
        (text_measures, TEXT, apart),
        (lambda records: perplexities(records)[:1], WIKIPEDIA, apart),
        (text_measures, TIMES, times),
    ],
)
def test_comparisons_are_those_of_the_records(records, wanted, compared, told):
    (measure,) = wanted(records)
    cells = {cell.title: cell for cell in gather(records).values()}
    for words, pairs in compared.items():
        for cell, base in pairs:
            said = told(measure, cells[cell], cells[base])
            assert said in paragraph(words), f"{cell} beside {base} is {said}"


def test_no_other_comparison_has_an_interval_that_nothing_holds():
    """Those of claims are held by the ledger, whose claim the paragraph names."""
    held = [*RESPONSES, *TEXT, *WIKIPEDIA]
    for own in PAGE.split("\n\n"):
        if re.search(r"% \[", own) and not re.search(r"\([A-Z]\d+[;)]", own):
            assert any(own.startswith(f"**{words}") for words in held), own
