"""The reference against itself, against something else, and as a command."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from studylib.cli import main
from studylib.config.budgets import Evaluation, profile
from studylib.methods.arms import build_arm, title
from studylib.study import schedule
from studylib.study.records import REFERENCE, Store, read_records
from studylib.study.verify import TOGETHER, choose, compare, verify_records

PUBLISHED = Path(__file__).parents[1] / "reference"
BUDGET = dataclasses.replace(profile("smoke"), evaluation=Evaluation(("wikipedia",), windows=4, length=32))
ARMS = [
    build_arm(BUDGET, "tiny-random", method, bits)
    for method, bits in (("full-precision", "16-16-16"), ("rtn", "4-8-4"))
]


@pytest.fixture
def reference(tmp_path):
    return tmp_path / "reference", schedule.run(ARMS, tmp_path / "reference")


def test_what_is_run_again_is_the_same_to_the_last_bit(reference, tmp_path, capsys):
    folder, records = reference
    found = verify_records(records, [], 15, tmp_path / "again")
    assert len(found) == 2 + 1 and all(difference.exact and difference.passed for difference in found)
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
    found = compare(list(zip(first, schedule.run([record.arm for record in first], tmp_path), strict=True)), records)
    assert len(found) == 4 + 2 and all(number.passed for number in found), [number.text() for number in found]


@pytest.mark.parametrize(("cores", "jobs"), [((2, 1), 1), ((1, 1), 2)])
def test_each_arm_has_as_many_threads_as_it_once_had(reference, tmp_path, cores, jobs):
    def on(cores, record):
        hardware = record.provenance["hardware"] | {"cores": cores}
        return dataclasses.replace(record, provenance=record.provenance | {"hardware": hardware})

    before = torch.get_num_threads()
    verify_records([on(*known) for known in zip(cores, reference[1], strict=True)], [], 15, tmp_path / "again", jobs)
    again = [Store(tmp_path / "again").load(record.key) for record in reference[1]]
    assert tuple(record.provenance["hardware"]["cores"] for record in again) == cores
    assert torch.get_num_threads() == before


def test_another_number_fails_and_says_so(reference, tmp_path, capsys):
    folder, records = reference
    wrong = dataclasses.replace(records[1], metrics=records[1].metrics | {"perplexity/wikipedia": 100.0})
    Store(folder).save(wrong)
    assert main(["verify", "--reference", str(folder), "--results", str(tmp_path / "again")]) == 1
    assert "FAIL  RTN 4-8-4: perplexity/wikipedia" in capsys.readouterr().out


def test_a_tolerance_is_the_noise_of_items_and_seeds(make_record):
    seeds = [make_record("llm-qat", "4-8-4", 3 + 0.1 * seed, seed=seed, spread=0.1 + 0.2 * seed) for seed in range(3)]
    alone, *others = compare([(seeds[0], seeds[1])], seeds[:1])
    apart = np.subtract(seeds[1].scores["loss/wikipedia"], seeds[0].scores["loss/wikipedia"])
    assert alone.metric == "perplexity/wikipedia" and alone.change == pytest.approx(abs(apart.mean()))
    level = 1 - 0.025 / (1 + len(others))
    assert alone.tolerance == pytest.approx(max(0.02, stats.t.ppf(level, 31) * stats.sem(apart)))
    own, *_ = compare([(seeds[0], seeds[1])], seeds)
    losses = [np.mean(record.scores["loss/wikipedia"]) for record in seeds]
    assert own.error == pytest.approx(np.hypot(stats.sem(apart), 2**0.5 * np.std(losses, ddof=1)))
    free = 31 * (own.error / stats.sem(apart)) ** 4
    assert own.passed and own.tolerance == pytest.approx(stats.t.ppf(level, free) * own.error)


def test_responses_weigh_by_their_tokens_in_the_noise_as_in_the_perplexity(make_record):
    one, other = make_record("rtn", "4-8-4"), make_record("rtn", "4-8-4")
    tokens = np.arange(1.0, 21)
    losses = np.linspace(2, 3, 20), np.linspace(2, 3, 20) + 0.01 * (tokens % 3)
    for record, own in zip((one, other), losses, strict=True):
        record.scores.update({"loss/responses": own.tolist(), "tokens/responses": tokens.tolist()})
        record.metrics["perplexity/responses"] = np.exp(np.average(own, weights=tokens))
    found = {number.metric: number for number in compare([(one, other)], [one])}["perplexity/responses"]
    apart = losses[1] - losses[0]
    assert found.change == pytest.approx(np.average(apart, weights=tokens))
    drawn = np.random.default_rng(0).integers(20, size=(20_000, 20))
    resampled = (apart[drawn] * tokens[drawn]).sum(1) / tokens[drawn].sum(1)
    assert found.items == pytest.approx(resampled.std() * (20 / 19) ** 0.5, rel=0.05)


def test_an_arm_of_one_seed_varies_as_its_method_does(make_record):
    many = [
        make_record("llm-qat", bits, loss=3 + step * seed, seed=seed)
        for bits, step in (("4-8-8", 0.1), ("8-8-8", 0.2), ("8-8-4", 0.4))
        for seed in range(2)
    ]
    one, rounded = make_record("llm-qat", "4-8-4"), make_record("rtn", "4-8-4")
    (trained, *_), (untrained, *_) = (compare([(record, record)], [*many, one, rounded]) for record in (one, rounded))
    assert untrained.error == 0 and untrained.tolerance == 0.02
    assert trained.error == pytest.approx(0.2)


def test_a_sample_fits_the_minutes_and_holds_every_method(picture):
    chosen = choose(picture, [], 1.2)  # an untrained arm took 3 seconds, a trained one 63
    assert {record.arm.method for record in chosen} == {"full-precision", "rtn", "llm-qat"}
    assert sum(sum(record.cost["seconds"].values()) for record in chosen) <= 72
    assert [title(record.arm) for record in choose(picture, ["8-8-8"], 1)] == ["RTN 8-8-8", "LLM-QAT 8-8-8"]
    with pytest.raises(ValueError, match="none of its 9 arms holds 'NF4' in its title"):
        choose(picture, ["NF4"], 15)
    with pytest.raises(ValueError, match=r"fits into 0\.01 minutes"):
        choose(picture, [], 0.01)


def test_what_an_arm_shared_counts_where_it_is_run_alone(make_record):
    first, other = (make_record("llm-qat", "4-8-4"), make_record("llm-qat", "4-8-8"))
    first.cost["seconds"]["data"], other.cost["seconds"]["data"] = 600.0, 0.1  # the first made the text of both
    assert choose([first, other], ["4-8-8"], 1) == [other]
    with pytest.raises(ValueError, match="fits into 5 minutes"):
        choose([first, other], [], 5)


def test_what_chosen_arms_share_is_made_once(make_record):
    first, other = (make_record("llm-qat", "4-8-4"), make_record("llm-qat", "4-8-8"))
    first.cost["seconds"]["data"], other.cost["seconds"]["data"] = 600.0, 0.1
    assert len(choose([first, other], [], 10 + 2 * 63 / 60 + 0.1)) == 2
    elsewhere = dataclasses.replace(other, arm=dataclasses.replace(other.arm, model="another"), cost=first.cost)
    assert len(choose([first, elsewhere], [], 10 + 2 * 63 / 60 + 0.1)) == 1


@pytest.mark.parametrize("minutes", ["nan", "0", "-1"])
def test_no_time_is_no_run(tmp_path, capsys, minutes):
    assert main(["verify", "--minutes", minutes, "--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"study: minutes: {minutes} is not allowed; use a number above 0\n"


def test_no_job_is_no_run(tmp_path, capsys):
    assert main(["verify", "--jobs", "0", "--results", str(tmp_path)]) == 2
    assert "jobs: 0 is not allowed; use a whole number from 1 to 1024" in capsys.readouterr().err


def test_a_reference_without_records_is_named(tmp_path, capsys):
    assert main(["verify", "--reference", str(tmp_path)]) == 2
    assert "holds no records" in capsys.readouterr().err


@pytest.fixture(scope="module")
def published():
    """The reference records of the repository."""
    return list(read_records(REFERENCE / "records"))


def test_another_seed_of_the_reference_passes(published):
    """A spread that has not seen the last seed is from two values; what it fails stays rare even so."""
    known = [record for record in published if record.arm.seed < 2]
    first = {title(record.arm): record for record in known if record.arm.seed == 0}
    pairs = [(first[title(record.arm)], record) for record in published if record.arm.seed == 2]
    found = compare(pairs, known)
    assert len(found) > 4 * len(pairs) >= 192 and sum(not number.passed for number in found) <= 0.01 * len(found)
    assert all(number.passed for number in found if number.arm == TOGETHER)
    apart = np.array([number.change / number.error for number in found if number.error])
    assert 0.8 < np.sqrt(np.mean(apart**2)) < 1.2


def test_what_a_processor_without_bf16_made_of_the_reference_passes(published):
    known = {record.key: record for record in published}
    again = list(read_records(REFERENCE / "without-bf16" / "records"))
    assert {record.provenance["compute_dtype"] for record in again} == {"float32"}
    found = compare([(known[record.key], record) for record in again], published)
    assert len(again) == 28 and not [number.text() for number in found if not number.passed]
    assert not any(number.exact for number in found)


def test_a_loss_that_is_larger_everywhere_fails(published):
    """0.1 nats on each item: twice what the study tolerates."""

    def worse(record):
        shifted = {name: (np.add(of, 0.1).tolist() if name == "loss/c4" else of) for name, of in record.scores.items()}
        perplexity = record.metrics["perplexity/c4"] * np.exp(0.1)
        return dataclasses.replace(record, scores=shifted, metrics=record.metrics | {"perplexity/c4": perplexity})

    trained = [record for record in published if record.curve]
    *_, c4, responses, wikipedia = compare([(record, worse(record)) for record in trained], published)
    assert c4.arm == TOGETHER and c4.metric == "perplexity/c4" and c4.change == pytest.approx(0.1) and not c4.passed
    assert responses.passed and wikipedia.passed
    untrained = [record for record in published if not record.curve and "perplexity/c4" in record.metrics]
    found = compare([(record, worse(record)) for record in untrained], published)
    assert all(number.passed != (number.metric == "perplexity/c4") for number in found)
