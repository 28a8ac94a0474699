"""The reference against itself, against something else, and as a command."""

import dataclasses
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from studylib import experiments
from studylib.arms import FULL_PRECISION, LLM_QAT, RTN, profile
from studylib.cli import main
from studylib.evaluation import Evaluation
from studylib.records import Store, read_records
from studylib.verify import choose, compare, verify

PUBLISHED = Path(__file__).with_name("reference")
BUDGET = dataclasses.replace(profile("smoke"), evaluation=Evaluation(("wikipedia",), windows=4, length=32))
ARMS = [BUDGET.arm("tiny-random", method, bits) for method, bits in ((FULL_PRECISION, "16-16-16"), (RTN, "4-8-4"))]


@pytest.fixture
def reference(tmp_path):
    return tmp_path / "reference", experiments.run(ARMS, tmp_path / "reference")


def test_what_is_run_again_is_the_same_to_the_last_bit(reference, tmp_path, capsys):
    folder, records = reference
    found = verify(records, [], 15, tmp_path / "again")
    assert len(found) == 2 and all(difference.exact and difference.passed for difference in found)
    assert main(["verify", "--reference", str(folder), "--arms", "RTN", "--results", str(tmp_path / "again")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("pass  RTN 4-8-4: perplexity/wikipedia") and "the same, item by item" in shown[0]
    assert shown[1] == "1 of 1 numbers of 1 arms are as published, 1 to the last bit."


def test_training_gives_here_what_it_gave_where_it_was_recorded(tmp_path):
    """LLM-QAT and L4Q on SmolLM2, two steps each: neither another machine nor a newer library changes them.

    The first seed was recorded on a processor that computes in bf16, the others on one that does not.
    """
    records = list(read_records(PUBLISHED / "records"))
    first = [record for record in records if record.arm.seed == 0]
    found = compare(list(zip(first, experiments.run([record.arm for record in first], tmp_path), strict=True)), records)
    assert len(found) == 4 and all(number.passed for number in found), [number.text() for number in found]


def test_each_arm_has_as_many_threads_as_it_once_had(reference, tmp_path):
    def on(cores, record):
        hardware = record.provenance["hardware"] | {"cores": cores}
        return dataclasses.replace(record, provenance=record.provenance | {"hardware": hardware})

    before = torch.get_num_threads()
    verify([on(cores, record) for cores, record in zip((2, 1), reference[1], strict=True)], [], 15, tmp_path / "again")
    again = [Store(tmp_path / "again").load(record.key) for record in reference[1]]
    assert [record.provenance["hardware"]["cores"] for record in again] == [2, 1]
    assert torch.get_num_threads() == before


def test_another_number_fails_and_says_so(reference, tmp_path, capsys):
    folder, records = reference
    wrong = dataclasses.replace(records[1], metrics=records[1].metrics | {"perplexity/wikipedia": 100.0})
    Store(folder).save(wrong)
    assert main(["verify", "--reference", str(folder), "--results", str(tmp_path / "again")]) == 1
    assert "FAIL  RTN 4-8-4: perplexity/wikipedia" in capsys.readouterr().out


def test_a_tolerance_is_the_noise_of_items_and_seeds(make_record):
    seeds = [make_record(LLM_QAT, "4-8-4", 3 + 0.1 * seed, seed=seed, spread=0.1 + 0.2 * seed) for seed in range(3)]
    alone, *others = compare([(seeds[0], seeds[1])], seeds[:1])
    apart = np.subtract(seeds[1].scores["loss/wikipedia"], seeds[0].scores["loss/wikipedia"])
    assert alone.metric == "perplexity/wikipedia" and alone.change == pytest.approx(abs(apart.mean()))
    z = statistics.NormalDist().inv_cdf(1 - 0.025 / (1 + len(others)))
    assert alone.tolerance == pytest.approx(max(0.02, z * stats.sem(apart)))
    own, *_ = compare([(seeds[0], seeds[1])], seeds)
    losses = [np.mean(record.scores["loss/wikipedia"]) for record in seeds]
    assert own.error == pytest.approx(np.hypot(stats.sem(apart), 2**0.5 * np.std(losses, ddof=1)))
    assert own.passed and own.tolerance == pytest.approx(z * own.error)


def test_an_arm_of_one_seed_varies_as_its_method_does(make_record):
    many = [
        make_record(LLM_QAT, bits, loss=3 + step * seed, seed=seed)
        for bits, step in (("4-8-8", 0.1), ("8-8-8", 0.2), ("8-8-4", 0.4))
        for seed in range(2)
    ]
    one, rounded = make_record(LLM_QAT, "4-8-4"), make_record(RTN, "4-8-4")
    (trained, *_), (untrained, *_) = (compare([(record, record)], [*many, one, rounded]) for record in (one, rounded))
    assert untrained.error == 0 and untrained.tolerance == 0.02
    assert trained.error == pytest.approx(0.2)


def test_a_sample_fits_the_minutes_and_holds_every_method(picture):
    chosen = choose(picture, [], 1.2)  # an untrained arm took 3 seconds, a trained one 63
    assert {record.arm.method for record in chosen} == {FULL_PRECISION, RTN, LLM_QAT}
    assert sum(sum(record.cost["seconds"].values()) for record in chosen) <= 72
    assert [record.arm.title for record in choose(picture, ["8-8-8"], 0)] == ["RTN 8-8-8", "LLM-QAT 8-8-8"]
    with pytest.raises(ValueError, match="none of its 9 arms holds 'NF4' in its title"):
        choose(picture, ["NF4"], 15)
    with pytest.raises(ValueError, match=r"fits into 0\.01 minutes"):
        choose(picture, [], 0.01)


def test_what_an_arm_shared_counts_where_it_is_run_alone(make_record):
    first, other = (make_record(LLM_QAT, "4-8-4"), make_record(LLM_QAT, "4-8-8"))
    first.cost["seconds"]["data"], other.cost["seconds"]["data"] = 600.0, 0.1  # the first made the text of both
    assert choose([first, other], ["4-8-8"], 0) == [other]
    with pytest.raises(ValueError, match="fits into 5 minutes"):
        choose([first, other], [], 5)


def test_what_chosen_arms_share_is_made_once(make_record):
    first, other = (make_record(LLM_QAT, "4-8-4"), make_record(LLM_QAT, "4-8-8"))
    first.cost["seconds"]["data"], other.cost["seconds"]["data"] = 600.0, 0.1
    assert len(choose([first, other], [], 10 + 2 * 63 / 60 + 0.1)) == 2
    elsewhere = dataclasses.replace(other, arm=dataclasses.replace(other.arm, model="another"), cost=first.cost)
    assert len(choose([first, elsewhere], [], 10 + 2 * 63 / 60 + 0.1)) == 1


def test_a_reference_without_records_is_named(tmp_path, capsys):
    assert main(["verify", "--reference", str(tmp_path)]) == 2
    assert "holds no records" in capsys.readouterr().err
