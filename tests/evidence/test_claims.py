"""Each rule against records for which the verdict is plain."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from studylib.config.budgets import EXECUTIONS
from studylib.config.settings import Adapter, Format, Scheme
from studylib.evidence.llm_qat import DEFAULT
from studylib.evidence.statistics import Interval
from studylib.evidence.verdicts import (
    ACCURACY,
    FAMILY,
    NO_DIFFERENCE,
    NOT_REPRODUCED,
    NOT_TESTED,
    RATE,
    REPRODUCED,
    UNDECIDED,
    Effect,
    judge,
)
from studylib.methods.arms import Setting
from studylib.report.ledger import CLAIMS
from studylib.study.records import DIVERGED


def verdict(claim, records):
    """The one word of the claim; what is shown beside it has none."""
    first, *beside = judge(CLAIMS[claim], records)
    assert not any(finding.verdict or finding.could or finding.parts for finding in beside)
    return first.verdict


def replaced(records, record):
    return [record if Setting.of(each.arm) == Setting.of(record.arm) else each for each in records]


TESTABLE = [claim for claim in CLAIMS if not CLAIMS[claim].untested]


SMALL_GROUPS = {"format": Format("int-full", 4, 32)}
NF4, INT4, INT3 = Format("nf", 4, 64, double=True), Format("int-full", 4), Format("int-full", 3)


@pytest.mark.parametrize("claim", TESTABLE)
def test_the_papers_picture_reproduces_every_claim(ablations, tuned, claim):
    assert verdict(claim, ablations + tuned) == REPRODUCED


def test_a_claim_that_nothing_here_can_test_says_what_it_would_take(ablations, tuned):
    for claim in set(CLAIMS) - set(TESTABLE):
        (finding,) = judge(CLAIMS[claim], ablations + tuned)
        assert finding.verdict == NOT_TESTED and len(finding.sentence) > 40


@pytest.mark.parametrize(
    ("claim", "method", "changes", "slower"),
    [
        ("B8", "qlora", {"format": NF4, "adapter": Adapter(256, 256), "tuning": {"paged": True}}, 1.05),
        ("C4", "l4q", {"format": Format("int-full", 4)}, 1.9),
    ],
)
def test_times_are_judged_where_they_were_taken_on_accelerators(make_record, claim, method, changes, slower):
    usual = changes | {"tuning": {}}

    def timed(accelerator, slower, seeds=(0, 1)):
        made = []
        for seed in seeds:
            for name, changed, seconds in (("qlora", usual, 60 + seed), (method, changes, (60 + seed) * slower)):
                record = make_record(name, "4-16-16", seed=seed, changes=changed)
                hardware = record.provenance["hardware"] | {"accelerator": accelerator}
                record.cost["seconds"]["train"] = seconds
                made.append(dataclasses.replace(record, provenance=record.provenance | {"hardware": hardware}))
        return made

    assert verdict(claim, timed("a GPU", slower)) == REPRODUCED
    assert verdict(claim, timed("a GPU", 2 * slower)) == NOT_REPRODUCED
    assert verdict(claim, timed("a GPU", slower, seeds=(0,))) == UNDECIDED
    assert verdict(claim, timed(None, slower)) == NOT_TESTED


@pytest.mark.parametrize(
    ("claim", "method", "bits", "loss", "changes"),
    [
        ("B1", "encoded", "4-16-16", 3.0, {"format": Format("int", 4)}),
        ("B2", "encoded", "4-16-16", 3.4, {"format": NF4}),  # double quantization costs something
        ("B4", "qlora", "4-16-16", 3.2, {"format": NF4}),
        ("B5", "qlora", "4-16-16", 2.5, {"format": NF4, "adapter": Adapter(layers="q_proj+v_proj")}),
        ("B5", "qlora", "4-16-16", 3.4, {"format": NF4, "adapter": Adapter(4, 4)}),
        ("B10", "qlora", "3-16-16", 3.4, {"format": Format("nf", 3, 64, double=True)}),
        ("C1", "qlora", "4-16-16", 2.5, {"format": INT4}),
        ("C2", "qa-lora", "3-16-16", 2.5, {"format": INT3}),
        ("C6", "l4q", "4-16-16", 2.5, {"format": INT4, "adapter": Adapter(init="symmetric")}),
        ("C7", "l4q", "4-16-16", 2.5, {"format": INT4, "adapter": Adapter(64, 64)}),
        ("C8", "l4q", "4-16-16", 2.5, SMALL_GROUPS),  # they help a lot
        ("C8", "l4q", "4-16-16", 2.9, SMALL_GROUPS),  # they hurt
    ],
)
def test_the_opposite_of_fine_tuning_claims_is_not_reproduced(tuned, make_record, claim, method, bits, loss, changes):
    accuracy = 0.55 - (loss - 2.75) * 0.5  # the worse, the fewer right answers
    changed = replaced(tuned, make_record(method, bits, loss=loss, accuracy=accuracy, changes=changes))
    assert verdict(claim, changed) == NOT_REPRODUCED


def test_bits_and_normality_are_counted_from_the_scores(tuned, make_record):
    same = make_record("encoded", "4-16-16", changes={"format": NF4})
    worse = dataclasses.replace(same, scores=same.scores | {"bits": [4.5], "non_normal": [0.3, 0.2] * 20})
    changed = replaced(tuned, worse)
    assert verdict("B3", changed) == verdict("B9", changed) == NOT_REPRODUCED


@pytest.mark.parametrize(("slower", "expected"), [(1.5, REPRODUCED), (1.05, NOT_REPRODUCED), (1.2, UNDECIDED)])
def test_decoding_is_judged_by_the_median_of_its_rounds(make_record, slower, expected):
    record = make_record("4-bit kernel", "4-16-16", changes={"format": Format("affine", 4)})
    noise = 1 + 0.02 * np.random.default_rng(0).normal(size=(len(EXECUTIONS), 16))
    noise[:, 3] = 9  # something else ran meanwhile
    times = noise * np.array([[0.06], [0.03], [0.03 * slower]])
    scores = {f"seconds/own/{kind}": row.tolist() for kind, row in zip(EXECUTIONS, times, strict=True)}
    timed = dataclasses.replace(record, scores=record.scores | scores)
    (finding,) = judge(CLAIMS["C5"], [timed])
    assert finding.verdict == expected and finding.found.startswith("Time of a token: 5")
    assert verdict("C5", [make_record("full-precision")]) == NOT_TESTED


@pytest.mark.parametrize(("slower", "expected"), [(1.5, REPRODUCED), (1.05, NOT_REPRODUCED), (1.2, UNDECIDED)])
def test_decoding_is_judged_over_processes_where_there_were_several(make_record, slower, expected):
    """Rounds of a process agree to 0.1%, processes to 2%: 200 rounds tell no more than their 8."""
    record, processes = make_record("4-bit kernel", "4-16-16", changes={"format": AFFINE}), 8
    random = np.random.default_rng(1)
    process = np.repeat(np.arange(float(processes)), 25)
    times = np.array([[0.06], [0.03], [0.03 * slower]]) * (1 + 0.001 * random.normal(size=(3, len(process))))
    apart = np.exp(0.02 * random.normal(size=processes))
    times[2] *= (apart / np.exp(np.log(apart).mean()))[process.astype(int)]
    scores = {f"seconds/own/{kind}": row.tolist() for kind, row in zip(EXECUTIONS, times, strict=True)}
    one = dataclasses.replace(record, scores=record.scores | scores)
    several = dataclasses.replace(one, scores=one.scores | {"process": process.tolist()})
    narrow, wide = (judge(CLAIMS["C5"], [timed])[0] for timed in (one, several))
    assert wide.verdict == expected
    assert wide.effect.interval.estimate == pytest.approx(slower, rel=2e-3) and wide.effect.interval.free == 7
    ratios = np.log(apart)
    error = ratios.std(ddof=1) / np.sqrt(processes)
    assert np.mean(wide.effect.interval.errors) == pytest.approx(error, rel=0.1)
    assert np.mean(narrow.effect.interval.errors) < error


AFFINE = Format("affine", 4)


def with_pairs(record, off):
    """The record with the loss of each validation pair: their mean, weighted by tokens, is the curve's."""
    tokens = np.array([10.0, 20.0, 30.0, 40.0, 10.0, 20.0, 30.0, 40.0])
    off = np.asarray(off) - np.average(off, weights=tokens)
    curve = [
        point | {"pairs": {"loss": (point["loss"] + off).tolist(), "tokens": tokens.tolist()}} for point in record.curve
    ]
    return dataclasses.replace(record, curve=curve)


def test_convergence_counts_validation_pairs_and_seeds(tuned):
    """Arms that differ by 0.1 on the mean of pairs, and by much more or less on single ones."""
    random = np.random.default_rng(3)
    hard = random.normal(size=8)
    alike = [with_pairs(record, hard) if record.curve else record for record in tuned]
    (finding,) = judge(CLAIMS["C9"], alike)
    assert finding.verdict == REPRODUCED and "8 validation pairs, 2 seeds" in finding.text
    own = CLAIMS["C9"].needs[0]
    apart = [
        with_pairs(record, hard + 0.5 * random.normal(size=8)) if Setting.of(record.arm) == own else record
        for record in alike
    ]
    (finding,), (before,) = (judge(CLAIMS["C9"], records) for records in (apart, tuned))
    assert finding.verdict == UNDECIDED and finding.effect.interval.estimate == pytest.approx(0.1)
    assert before.verdict == REPRODUCED and "(2 seeds)" in before.text  # an older record tells the mean alone
    one = [record for record in apart if record.arm.seed == 0]
    assert verdict("C9", one) == UNDECIDED
    mixed = [a if Setting.of(a.arm) == own else b for a, b in zip(apart, tuned, strict=True)]
    assert judge(CLAIMS["C9"], mixed) == [before]


def known_divergence(record):
    """The record as one of today: with divergences from full precision, which has none, and sure answers."""
    lost = np.mean(record.scores["loss/c4"]) - 4 if record.finished else 0
    kl = {f"kl/{corpus}": (lost * np.linspace(0.9, 1.1, 32)).tolist() for corpus in ("wikipedia", "c4")}
    tasks = record.arm.evaluation.tasks
    sure = {f"bits_per_byte/{task}": (1 + lost * np.linspace(0.9, 1.1, 40)).tolist() for task in tasks}
    sure |= {f"probability/{task}": [0.5] * 40 for task in tasks}
    return dataclasses.replace(record, scores=record.scores | ({} if record.arm.tuning else kl) | sure)


@pytest.mark.parametrize("claim", TESTABLE)
def test_divergence_and_sure_answers_stand_beside_the_same_verdict(ablations, tuned, claim):
    records = [known_divergence(record) for record in ablations + tuned]
    assert verdict(claim, records) == REPRODUCED
    titles = [finding.measure for finding in judge(CLAIMS[claim], records)[1:]]
    kept = (claim[0] in "AO" and claim != "O4") or claim in ("B1", "B2")
    assert ("KL divergence from full precision on Wikipedia and C4" in titles) == kept
    judged = {title for title in titles if title.startswith(("mean accuracy", "bits a byte of right answers"))}
    assert len(judged) in (0, 2)  # one wherever the other


def test_a_claim_on_what_explodes_says_how_far_it_is_from_full_precision(ablations):
    records = [known_divergence(record) for record in ablations]
    (text,) = [own.text for own in judge(CLAIMS["A6"], records) if own.measure.startswith("KL")]
    assert text.startswith("RTN at 4-8-4 is worse than full precision by 1.20 [") and "nats a token" in text


def test_convergence_needs_several_seeds(tuned):
    one = [record for record in tuned if record.arm.seed == 0]
    assert verdict("C9", one) == UNDECIDED
    (finding,) = judge(CLAIMS["C9"], tuned)
    assert "is 0.100 [0.100, 0.100] nats (" in finding.text and "before training, 0.100" in finding.text


@pytest.mark.parametrize(
    ("claim", "method", "bits", "loss", "accuracy"),
    [
        ("A1", "llm-qat", "4-8-4", 4.1, 0.35),  # a little of the loss only
        ("A2", "rtn", "8-8-4", 3.012, 0.60),  # the 4-bit cache costs nothing
        ("A3", "rtn", "4-8-8", 5.0, 0.05),  # more is won at 4-8-8
        ("A4", "rtn", "8-8-8", 3.2, 0.50),
        ("A6", "rtn", "4-8-4", 3.2, 0.50),
        ("A11", "smoothquant+llm-qat", "4-4-16", 5.5, 0.2),  # it hurts at 4-4
        ("A11", "smoothquant+llm-qat", "4-8-4", 3.0, 0.60),  # it helps at 4-8 as well
        ("A12", "llm-qat", "4-4-16", 3.1, 0.58),
    ],
)
def test_the_opposite_is_not_reproduced(ablations, make_record, claim, method, bits, loss, accuracy):
    changed = replaced(ablations, make_record(method, bits, loss=loss, accuracy=accuracy))
    assert verdict(claim, changed) == NOT_REPRODUCED


@pytest.mark.parametrize(
    ("claim", "change"),
    [
        ("A8", {"sampling": {"strategy": "greedy"}}),
        ("A9", {"training": {"loss": "labels"}}),
        ("A9", {"training": {"loss": "kl+raw-hidden"}}),
        ("A10", {"scheme": Scheme(grid="lsq")}),
    ],
)
def test_one_better_variant_is_enough_to_contradict(ablations, make_record, claim, change):
    changed = replaced(ablations, make_record("llm-qat", "4-8-4", loss=3.1, accuracy=0.58, changes=change))
    assert verdict(claim, changed) == NOT_REPRODUCED


def test_real_text_is_not_judged_by_the_corpus_it_is_from(ablations, make_record):
    better = make_record("llm-qat", "4-8-4", loss=3.1, accuracy=0.3, changes={"corpus": "c4"})
    elsewhere, own = (
        dataclasses.replace(better, scores=better.scores | {name: [x + 1 for x in better.scores[name]]})
        for name in ("loss/c4", "loss/wikipedia")
    )
    assert verdict("A7", replaced(ablations, elsewhere)) == NOT_REPRODUCED
    assert verdict("A7", replaced(ablations, own)) == REPRODUCED
    (first, *beside) = judge(CLAIMS["A7"], replaced(ablations, own))
    assert "Wikipedia text (on C4)" in first.text and "C4 text (on Wikipedia)" in first.text
    assert ["C4 text" in finding.text for finding in beside] == [True, False, True]  # by Wikipedia, C4, the tasks


def test_nothing_lost_means_nothing_to_win_back(ablations, make_record):
    same = replaced(ablations, make_record("rtn", "4-8-4", loss=3.0, accuracy=0.60))
    assert verdict("A1", same) == UNDECIDED
    assert "cannot be told" in judge(CLAIMS["A1"], same)[0].sentence


def test_a_missing_arm_is_named(picture):
    (finding,) = judge(CLAIMS["A3"], [r for r in picture if r.arm.bits != "4-8-8"])
    assert finding.verdict == NOT_TESTED and finding.effect is None
    assert finding.sentence == "Not tested here: RTN at 4-8-8 and LLM-QAT at 4-8-8 were not run."


def test_a_diverged_seed_is_told_not_averaged(picture, make_record):
    (finding,) = judge(CLAIMS["A1"], [*picture, make_record("llm-qat", "4-8-4", seed=1, status=DIVERGED)])
    assert finding.verdict == UNDECIDED
    assert finding.sentence.startswith("1 of 2 runs of LLM-QAT at 4-8-4 diverged")


def test_the_cache_claim_uses_training_where_it_was_run(ablations, make_record):
    better, worse = (
        make_record("llm-qat", "8-8-4", loss=loss, accuracy=acc) for loss, acc in ((3.1, 0.58), (3.5, 0.4))
    )
    assert "only this part of the claim is tested" in judge(CLAIMS["A2"], ablations)[0].sentence
    assert verdict("A2", [*ablations, better]) == REPRODUCED
    assert verdict("A2", [*ablations, worse]) == NOT_REPRODUCED


def test_the_cache_claim_is_about_where_it_breaks(picture, make_record):
    weights = make_record("rtn", "4-8-8", loss=3.6, accuracy=0.40)  # four bits for the weights cost more
    finding, *_ = judge(CLAIMS["A2"], replaced(picture, weights))
    assert finding.verdict == NOT_REPRODUCED
    assert "8-8-4 is better than 4-8-8 by 26% [26%, 26%]" in finding.text
    assert finding.by_part == (
        "Reproduced: lost by RTN from 8-8-8 to 8-8-4. Not reproduced: 8-8-4 behind 4-8-8, by RTN."
    )
    assert finding.sentence.endswith(f"Not reproduced. {finding.by_part}")


def test_a_difference_within_the_tolerance_is_none(ablations, make_record):
    """Its parts say each for itself; the worst of them stands for the claim, but for what is undecided."""
    near = make_record("llm-qat", "4-8-4", loss=3.3, accuracy=0.5, changes={"training": {"loss": "labels"}})
    scores = {f"loss/{corpus}": near.scores[f"loss/{corpus}"] for corpus in ("wikipedia", "c4")}
    for at, values in enumerate(scores.values()):
        scores[f"loss/{('wikipedia', 'c4')[at]}"] = [x + 0.005 * (-1) ** item for item, x in enumerate(values)]
    near = dataclasses.replace(near, scores=near.scores | scores)
    finding, *_ = judge(CLAIMS["A9"], replaced(ablations, near))
    assert finding.verdict == NO_DIFFERENCE
    assert finding.by_part == (
        "Reproduced: loss kl+attention behind LLM-QAT at 4-8-4 and loss kl+raw-hidden behind LLM-QAT at 4-8-4. "
        "No difference: loss labels behind LLM-QAT at 4-8-4."
    )


def test_sentences_carry_the_numbers(ablations):
    sentence = judge(CLAIMS["A1"], ablations)[0].sentence
    assert sentence == (
        "Perplexity on Wikipedia and C4: full precision 33.1, RTN at 4-8-4 110, LLM-QAT at 4-8-4 44.7: "
        "LLM-QAT wins back 85% [85%, 85%] of what RTN loses (single seeds: 85% to 85%). Reproduced."
    )


def test_several_seeds_are_shown(picture, make_record):
    more = [*picture, make_record("llm-qat", "4-8-4", loss=3.4, accuracy=0.5, seed=1)]
    assert "(single seeds: 79% to 85%)" in judge(CLAIMS["A1"], more)[0].sentence


def test_a_verdict_on_trained_arms_waits_until_runs_tell_how_far_they_lie_apart(
    picture, ablations, seeded, make_record
):
    once = [record for record in ablations if record.arm.seed == 0]
    for records, free in ((picture, 0), (once, 0), (picture + seeded(picture[-1]), 2)):
        finding, *_ = judge(CLAIMS["A1"], records)
        assert finding.verdict == UNDECIDED
        assert f"rests on {free} degrees of freedom, and 20 are needed" in finding.sentence
    assert verdict("A4", picture) == REPRODUCED  # which nothing was trained for
    weights = make_record("rtn", "4-8-8", loss=3.6)  # contradicts, whatever was trained besides
    both = [*replaced(picture, weights), make_record("llm-qat", "8-8-4", loss=3.1)]
    finding, *_ = judge(CLAIMS["A2"], both)
    assert finding.verdict == NOT_REPRODUCED and "waits" not in finding.sentence
    assert finding.by_part.endswith("Undecided: gained by LLM-QAT over RTN at 8-8-4.")


def test_the_spread_of_other_arms_counts_for_one_that_was_run_once(ablations, seeded):
    """Records of three seeds that lie apart; the arm itself has one."""
    runs = [run for record in ablations if record.arm.seed == 0 for run in seeded(record, losses=(0.0, 0.05, -0.05))]
    own = [r for r in runs if Setting.of(r.arm) != DEFAULT or r.arm.seed == 0]
    apart, alike = judge(CLAIMS["A1"], own)[0].effect.interval, judge(CLAIMS["A1"], ablations)[0].effect.interval
    assert apart.high - apart.low > 5 * (alike.high - alike.low)


def test_a_false_word_on_a_page_is_rare_because_every_claim_that_can_err_is_counted():
    exact = {"A5", "B3", "B6", "B7", "C3"}  # on a page of its own; counted or planned
    assert len(CLAIMS) - len(exact) == FAMILY == 31
    assert pytest.approx(0.05 / 31 / 3) == RATE
    page = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    assert f"bounds are wrong in one of {1 / RATE:,.0f} cases each" in " ".join(page.split())


def test_the_papers_numbers_are_those_of_its_text():
    """Each effect follows from the numbers that the claim quotes; recalled ones say so."""
    assert {name: claim.effect.text for name, claim in CLAIMS.items() if claim.effect} == {
        "A1": "78% of the loss of accuracy",
        "A2": "19.0 points gained over SmoothQuant",
        "A3": "1.4 points",
        "A4": "0.6 points (recalled)",
        "A6": "14.6 times",
        "A9": "2.0 points (attention maps)",
        "A10": "about 13 points (LSQ)",
        "A11": "5.1 points",
        "B1": "7.6% (E3M0)",
        "B3": "0.373 bits",
        "B4": "−0.1 points of MMLU",
        "B6": "45.0 GB",
        "B7": "96% of the memory of input gradients and adapters",
        "B9": "7.5%",
        "C1": "1.7 points (QAT-LoRA)",
        "C2": "3.7 points (GPTQ, QLoRA*)",
        "C3": "1.01 times",
        "C4": "1.02 times QLoRA's hours",
        "C5": "1.36 times as fast",
        "C6": "1.1 points of MMLU (asymmetric)",
        "C7": "0.2 points (rank 16)",
        "C8": "0.2 points",
        "O1": "1.07 times (recalled)",
    }
    assert all(claim.effect.recalled == ("recalled" in claim.reported) for claim in CLAIMS.values() if claim.effect)


@pytest.mark.parametrize("claim", TESTABLE)
def test_a_verdict_follows_from_the_effect_that_is_shown_beside_it(ablations, tuned, make_record, claim):
    """Also where the claim's parts disagree: what is shown is the part that decides."""
    opposite = [
        make_record("rtn", "4-8-8", loss=5.0, accuracy=0.05),
        make_record("rtn", "8-8-8", loss=3.2, accuracy=0.50),
        make_record("llm-qat", "4-8-4", loss=3.1, accuracy=0.58, changes={"training": {"loss": "labels"}}),
        make_record("smoothquant+llm-qat", "4-8-4", loss=3.0, accuracy=0.60),
        make_record("qlora", "4-16-16", loss=3.4, accuracy=0.2, changes={"format": NF4, "adapter": Adapter(4, 4)}),
    ]
    records = ablations + tuned
    for changed in (records, *(replaced(records, record) for record in opposite)):
        finding, *beside = judge(CLAIMS[claim], changed)
        effect, words = finding.effect, dict(finding.parts)
        assert words[effect.what] == finding.verdict and effect.holds
        assert set(words.values()) == {REPRODUCED} or finding.verdict != REPRODUCED
        assert bool(finding.could) == (finding.verdict == UNDECIDED)
        assert all(other.effect.what and other.effect.holds for other in beside)


def test_what_is_undecided_says_what_could_have_been_detected(make_record):
    noisy = make_record("rtn", "8-8-8", loss=3.05, spread=0.5, accuracy=0.60)
    for corpus in ("wikipedia", "c4"):
        noisy.scores[f"loss/{corpus}"].reverse()
    records = [make_record("full-precision", spread=0.5, accuracy=0.61), noisy]
    finding, *_ = judge(CLAIMS["A4"], records)
    assert finding.verdict == UNDECIDED and finding.effect.smallest > finding.effect.bounds[1] - 0.1
    assert finding.sentence.endswith(f"Undecided (minimum detectable effect: {finding.could}).")
    assert finding.could.endswith("% or more")
    wide = dataclasses.replace(finding, effect=Effect(Interval(0.0, (18.0, 18.0)), ACCURACY, "", above=0))
    assert wide.could == "74.0 points or more"  # (3.27 + 0.84) standard errors
    wider = dataclasses.replace(finding, effect=Effect(Interval(0.0, (40.0, 40.0)), ACCURACY, "", above=0))
    assert wider.could == "no difference, however large"
    once = dataclasses.replace(finding, effect=Effect(Interval(0.0, (math.inf, math.inf)), ACCURACY, "", above=0))
    assert once.could == "" and once.effect.text == "0.0 points"


def test_the_papers_number_stands_beside_ours_where_it_is_of_the_same_kind(ablations, tuned, make_record):
    def marks(claim, records=ablations + tuned):
        return [f.effect.mark(CLAIMS[claim].effect) is not None for f in judge(CLAIMS[claim], records)]

    assert marks("A1") == [True] * 4 and marks("A6") == [True] * 3
    assert marks("A11") == [False] * 3 + [True]  # points of accuracy do not stand beside % of perplexity
    assert marks("A2") == [False] * 4  # a gain does not stand beside a loss
    assert marks("A9") == [False] * 4  # the nearest are labels here, the paper's are attention maps
    attention = make_record("llm-qat", "4-8-4", loss=3.31, accuracy=0.5, changes={"training": {"loss": "kl+attention"}})
    assert marks("A9", replaced(ablations, attention)) == [False] * 3 + [True]
    assert marks("B3") == marks("B6") == marks("B9") == marks("C3") == [True] and marks("B7") == [False]
