"""Claim A5: a larger model at fewer bits beside a smaller one at more, from records of several models."""

import dataclasses

import numpy as np
import pytest

from studylib.evidence.llm_qat import CLAIMS
from studylib.evidence.measures import gather, gather_family, megabytes, model_names, text_measures
from studylib.evidence.sizes import equal_pairs, judge_sizes
from studylib.evidence.verdicts import NOT_REPRODUCED, NOT_TESTED, REPRODUCED, UNDECIDED, judge

(CLAIM,) = (claim for claim in CLAIMS if claim.sizes)
MODELS = "a/small", "a/large"


def verdict(records):
    return judge_sizes(CLAIM, records)[0].verdict


@pytest.fixture
def untrained(make_record, of_model):
    """Two sizes in 16 and 8 bits, the larger `times` as large, with losses that differ by `more` and by noise of the
    `seed`."""

    def make(times=1.9, more=-0.5, seed=None):
        noise = np.random.default_rng(seed)
        found = []
        for model, factor, added in zip(MODELS, (1.0, times), (0.0, more), strict=True):
            for name, bits in (("full-precision", "16-16-16"), ("rtn", "8-8-8")):
                record = of_model(make_record(name, bits), model, factor, added)
                if seed is not None:
                    for part in ("loss/wikipedia", "loss/c4"):
                        record.scores[part] = list(np.array(record.scores[part]) + noise.normal(0, 0.1, 32))
                found.append(record)
        return found

    return make


def test_the_larger_model_that_is_better_at_equal_bytes_reproduces_it(family):
    finding, *beside = judge_sizes(CLAIM, family)
    assert finding.verdict == REPRODUCED and len(finding.parts) == 3 - 1
    assert "full precision of small (16.2 MB) is worse than RTN at 8-8-8 of large (15.6 MB) by 63%" in finding.text
    assert "RTN at 8-8-8 of small (8.20 MB) is worse than LLM-QAT at 4-8-8 of large (7.99 MB) by" in finding.text
    nearest = "LLM-QAT at 4-8-8 of large (7.99 MB) and full precision of small (16.2 MB)"
    assert finding.text.endswith(f"Not at equal bytes: for 4 bits by LLM-QAT beside 16 the nearest are {nearest}.")
    assert [found.measure for found in beside] == ["perplexity on Wikipedia", "perplexity on C4"]
    assert not any(found.verdict for found in beside)


def test_one_pair_in_which_it_is_worse_contradicts_it(family, of_model):
    worse = [
        of_model(r, r.arm.model, 1.0, 1.0 * (r.arm.model == "a/large" and r.arm.method == "llm-qat")) for r in family
    ]
    finding, *_ = judge_sizes(CLAIM, worse)
    assert finding.verdict == NOT_REPRODUCED
    assert dict(finding.parts) == {
        "full precision of small behind RTN at 8-8-8 of large": REPRODUCED,
        "RTN at 8-8-8 of small behind LLM-QAT at 4-8-8 of large": NOT_REPRODUCED,
    }


def test_it_waits_where_runs_of_one_seed_do_not_tell_how_far_they_lie_apart(family):
    once = [record for record in family if record.arm.seed == 0]
    finding, *_ = judge_sizes(CLAIM, once)
    assert finding.verdict == UNDECIDED and "and 20 are needed" in finding.text


def test_what_windows_cannot_tell_is_undecided_and_hardly_ever_a_word(untrained):
    """Two models that are as good as each other, by noise of many seeds; and one that is better by more than it."""
    words = [verdict(untrained(more=0.0, seed=seed)) for seed in range(12)]
    assert set(words) == {UNDECIDED}
    assert {verdict(untrained(more=-0.5, seed=seed)) for seed in range(4)} == {REPRODUCED}
    assert {verdict(untrained(more=0.5, seed=seed)) for seed in range(4)} == {NOT_REPRODUCED}


@pytest.mark.parametrize("times", [2.01, 1.4, 8.0])
def test_sizes_without_a_pair_at_equal_bytes_are_not_judged(untrained, times):
    (finding,) = judge_sizes(CLAIM, untrained(times))
    assert finding.verdict == NOT_TESTED and finding.effect is None
    assert finding.text.startswith(
        "no two sizes take equal bytes: for 8 bits beside 16 the nearest are RTN at 8-8-8 of "
    )
    assert "for 4 bits by LLM-QAT beside 8 there are no arms of two sizes" in finding.text


def test_a_pair_takes_at_most_as_many_bytes_and_the_nearest_is_compared(untrained, of_model):
    """Of three sizes, the two that are nearest; the larger is what takes more bytes in full precision."""
    middle = [of_model(record, "a/middle", 1.7 / 1.9) for record in untrained() if record.arm.model == "a/large"]
    for records in (untrained() + middle, middle + untrained()):
        (pair,) = equal_pairs(records)
        assert (pair.larger.setting.model, pair.smaller.setting.model) == ("large", "small")
        assert pair.share == megabytes(pair.larger) / megabytes(pair.smaller) == pytest.approx(0.962, abs=0.001)
    assert not equal_pairs(untrained(1.0))  # of one size


def test_without_full_precision_nothing_says_which_model_is_larger(untrained):
    records = [record for record in untrained() if record.arm.method == "rtn"]
    assert judge_sizes(CLAIM, records)[0].text.count("there are no arms of two sizes") == 3


def test_an_arm_that_diverged_leaves_it_open(family):
    large = [r for r in family if r.arm.model == "a/large"]
    lost = next(r for r in large if (r.arm.method, r.arm.bits, r.arm.seed) == ("llm-qat", "4-8-8", 2))
    records = [dataclasses.replace(r, status="diverged", scores={}) if r is lost else r for r in family]
    finding, *_ = judge_sizes(CLAIM, records)
    assert finding.verdict == UNDECIDED and "1 of 3 runs of LLM-QAT at 4-8-8 of large diverged" in finding.text


def test_one_model_leaves_the_claim_as_it_was(family):
    own = [record for record in family if record.arm.model == "a/small"]
    (finding,) = judge(CLAIM, own)
    assert finding.verdict == NOT_TESTED and finding.text == f"{CLAIM.untested}."
    assert gather_family(own) == gather(own)


def test_cells_of_a_family_name_their_models_the_smallest_first(family):
    cells = gather_family(family[::-1])
    assert list(dict.fromkeys(own.model for own in cells)) == ["small", "large"] and len(cells) == 18
    assert all(cell.setting == own and own.title.endswith(f" of {own.model}") for own, cell in cells.items())
    assert model_names(["a/one", "b/one", "/x/two/"]) == {"a/one": "a/one", "b/one": "b/one", "/x/two/": "two"}


def test_the_spread_between_seeds_is_pooled_over_the_sizes(family):
    (measure,) = text_measures(family)
    own, both = (text_measures(records)[0].spreads["text"].free for records in (family[: len(family) // 2], family))
    assert measure.spreads.keys() == {"text"} and both > own


def test_what_was_not_scored_alike_is_refused(family):
    with pytest.raises(ValueError, match="model 'a/small' and model 'a/large' cannot be compared"):
        gather(family)
    other = family[-1]
    shorter = dataclasses.replace(other.arm, evaluation=dataclasses.replace(other.arm.evaluation, length=32))
    with pytest.raises(ValueError, match=r"evaluation .* cannot be compared"):
        gather_family([*family[:-1], dataclasses.replace(other, arm=shorter)])
    for part, values in (("loss/c4", other.scores["loss/c4"][:-1]), ("document/c4", [1.0] * 32)):
        changed = [dataclasses.replace(r, scores=r.scores | {"document/c4": [0.0] * 32}) for r in family]
        changed[-1] = dataclasses.replace(changed[-1], scores=changed[-1].scores | {part: values})
        with pytest.raises(
            ValueError, match="the windows of c4 of model 'a/small' and model 'a/large' are not the same"
        ):
            gather_family(changed)
