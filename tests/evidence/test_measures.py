import dataclasses
import math

import numpy as np
import pytest

from studylib.config.budgets import profile
from studylib.config.settings import Adapter, Format, Scheme
from studylib.config.words import number, percent, points
from studylib.evidence.measures import (
    FULL,
    gather,
    identity,
    of_profile,
    perplexities,
    response_measures,
    right_answers,
    task_measures,
    text_measures,
    unchanged,
    usual_measures,
    with_further_seeds,
    won_back,
)
from studylib.methods.arms import Setting, build_arm, setting
from studylib.study.records import DIVERGED, arm_key, contents


@pytest.fixture
def budget(make_record):
    """Of make_record's arms."""
    return dataclasses.replace(profile("smoke"), evaluation=make_record("full-precision").arm.evaluation)


def measure(records, name):
    (found,) = [each for each in usual_measures(records) if each.name == name]
    return found


def test_cells_are_ordered_and_repeated_records_count_once(picture):
    cells = gather([*reversed(picture), picture[0]])
    assert [(own.method, own.bits) for own in cells][:4] == [
        ("full-precision", "16-16-16"),
        ("rtn", "8-8-8"),
        ("llm-qat", "8-8-8"),
        ("rtn", "8-8-4"),
    ]
    assert all(len(cell.records) == 1 for cell in cells.values())


def test_seeds_are_averaged_item_by_item(make_record):
    records = [make_record("llm-qat", "4-8-4", loss=loss, seed=seed) for seed, loss in enumerate((3.0, 3.4))]
    (cell,) = gather(records).values()
    found = measure(records, "perplexity/wikipedia")
    assert cell.seeds == [0, 1]
    assert found.value(identity, cell) == pytest.approx(math.exp(3.2))
    assert found.over_seeds(identity, cell) == pytest.approx((math.exp(3.0), math.exp(3.4)))


def test_measures_are_the_papers(picture):
    assert [(each.name, each.items) for each in usual_measures(picture)] == [
        ("perplexity/wikipedia", 32),
        ("perplexity/c4", 32),
        ("accuracy/mean", 300),
    ]
    cells = gather(picture)
    assert measure(picture, "accuracy/mean").value(identity, cells[Setting("rtn", "4-8-4")]) == pytest.approx(30.0)


def test_differences_are_paired(picture):
    # All arms share their windows' noise, so that a ratio of perplexities has no spread at all.
    cells = gather(picture)
    found = measure(picture, "perplexity/wikipedia").interval(
        lambda f, r: r / f, cells[FULL], cells[Setting("rtn", "4-8-4")]
    )
    assert (found.low, found.estimate, found.high) == pytest.approx((math.exp(1.2),) * 3)


def test_the_share_won_back(picture):
    cells = gather(picture)
    trio = cells[FULL], cells[Setting("rtn", "4-8-4")], cells[Setting("llm-qat", "4-8-4")]
    loss, share = won_back(measure(picture, "perplexity/c4"), *trio)
    f, r, q = np.exp([4.0, 5.2, 4.3])
    assert loss.estimate == pytest.approx(r - f) and share.estimate == pytest.approx((r - q) / (r - f))
    # At 8 bits nothing is lost in accuracy: there is nothing to win back.
    assert won_back(measure(picture, "accuracy/mean"), trio[0], cells[Setting("rtn", "8-8-8")], trio[2])[1] is None


def test_records_that_cannot_be_compared(make_record):
    first = make_record("rtn", "4-8-4")
    other = dataclasses.replace(first, key="x", arm=dataclasses.replace(first.arm, model="other"))
    with pytest.raises(ValueError, match="model 'tiny-random' and model 'other' cannot be compared"):
        gather([first, other])
    trained = make_record("llm-qat", "4-8-4")
    longer = dataclasses.replace(trained.arm.training, steps=99)
    with pytest.raises(ValueError, match="different arms of LLM-QAT at 4-8-4; only seeds may differ"):
        gather([trained, dataclasses.replace(trained, key="x", arm=dataclasses.replace(trained.arm, training=longer))])


def test_variants_are_cells_of_their_own_after_their_default(make_record):
    changes = [{"corpus": "c4"}, {}, {"training": {"loss": "labels"}}, {"scheme": Scheme(grid="asymmetric")}]
    cells = gather([make_record("llm-qat", "4-8-4", changes=change) for change in changes])
    assert [own.variant for own in cells] == ["", "C4 text", "loss labels", "asymmetric MinMax"]
    assert setting("llm-qat", "4-8-4", {"data.corpus": "c4"}).title == "LLM-QAT at 4-8-4 (C4 text)"


def test_few_shot_tasks_do_not_keep_arms_apart(make_record):
    plain, few = make_record("rtn", "4-8-8"), make_record("rtn", "4-8-4")
    evaluation = dataclasses.replace(few.arm.evaluation, tasks=(*few.arm.evaluation.tasks, "mmlu"))
    few = dataclasses.replace(
        few, arm=dataclasses.replace(few.arm, evaluation=evaluation), scores=few.scores | {"accuracy/mmlu": [0.0, 1.0]}
    )
    cells = gather([plain, few])
    names = [each.name for each in usual_measures([few, plain])]
    assert names == ["perplexity/wikipedia", "perplexity/c4", "accuracy/mean"]
    mmlu = task_measures([plain, few])[-1]
    assert mmlu.name == "accuracy/mmlu" and [mmlu.covers(cell) for cell in cells.values()] == [False, True]
    longer = dataclasses.replace(plain.arm, evaluation=dataclasses.replace(plain.arm.evaluation, windows=33))
    with pytest.raises(ValueError, match="cannot be compared"):
        gather([few, dataclasses.replace(plain, arm=longer)])


def test_diverged_runs_are_kept_apart(make_record):
    records = [make_record("llm-qat", "4-8-4", seed=0), make_record("llm-qat", "4-8-4", seed=1, status=DIVERGED)]
    (cell,) = gather(records).values()
    assert len(cell.records) == len(cell.diverged) == 1
    assert usual_measures(records[1:]) == []


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (number, 26.716, "26.7"),
        (number, 11_937.0, "11,900"),
        (number, -0.3149, "−0.315"),
        (number, 0.99951, "1.00"),
        (number, 0.0, "0"),
        (number, 2.5e7, "2.5e+07"),
        (number, math.inf, "∞"),
        (number, math.nan, "–"),
        (points, -0.01, "0.0"),
        (points, -1.25, "−1.2"),
        (percent, 0.0375, "3.8%"),
        (percent, -0.0001, "0.0%"),
        (percent, 0.628, "63%"),
        (percent, 12.43, "1,243%"),
    ],
)
def test_numbers_for_people(form, value, text):
    assert form(value) == text


def test_an_arm_that_was_run_again_to_the_same_scores_counts_once(make_record):
    first = make_record("rtn", "4-8-4")
    again = dataclasses.replace(first, key="another", cost={})
    (cell,) = gather([first, again]).values()
    assert cell.records == (first,)
    other = dataclasses.replace(again, scores=again.scores | {"loss/c4": [1.0] * 32})
    with pytest.raises(ValueError, match="different arms of RTN at 4-8-4"):
        gather([first, other])


def finished_at(record, day):
    return dataclasses.replace(record, key=f"key-{day}", provenance=record.provenance | {"finished": f"2026-01-0{day}"})


def test_the_records_of_a_profile_are_what_its_notebooks_could_have_made(picture, make_record, budget):
    changes = [{"training": {"loss": "labels"}}, {"sampling": {"top_k": 0}}, {"corpus": "c4"}]
    own = [*picture, *(make_record("llm-qat", "4-8-4", changes=change) for change in changes)]
    own.append(make_record("qlora", "4-16-16", changes={"format": Format("nf", 4, 64, True), "adapter": Adapter(4, 4)}))
    longer = make_record("llm-qat", "4-8-8", changes={"training": {"steps": 99}})
    other_data = make_record("llm-qat", "4-8-8", changes={"sampling": {"count": 99}})
    model = dataclasses.replace(picture[0], arm=dataclasses.replace(picture[0].arm, model="other"))
    evaluation = dataclasses.replace(picture[0].arm.evaluation, windows=33)
    scored = dataclasses.replace(picture[0], arm=dataclasses.replace(picture[0].arm, evaluation=evaluation))
    found = of_profile([longer, *own, other_data, model, scored], "tiny-random", budget)
    assert sorted(r.key for r in found) == sorted(r.key for r in own)
    gather(found)  # they can be compared


def test_of_an_arm_that_was_run_several_times_one_counts(make_record, budget):
    record = make_record("rtn", "4-8-4")
    tasks = (*record.arm.evaluation.tasks, "mmlu")
    few_shot = dataclasses.replace(
        record, arm=dataclasses.replace(record.arm, evaluation=dataclasses.replace(record.arm.evaluation, tasks=tasks))
    )
    old, new = finished_at(record, 1), finished_at(few_shot, 3)
    assert of_profile([new, old], "tiny-random", budget) == [new]
    present = dataclasses.replace(finished_at(record, 2), key=arm_key(record.arm))
    assert of_profile([present, new, old], "tiny-random", budget) == [present]  # made by the code that there is now


def test_records_of_files_that_hold_something_else_now_are_left_out(make_record, budget, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("a document\n")
    record = make_record("llm-qat", "4-8-4", changes={"corpus": str(own)})
    known = dataclasses.replace(record, provenance=record.provenance | {"contents": contents(record.arm)})
    assert of_profile([known], "tiny-random", budget) == [known]
    own.write_text("another document\n")
    assert of_profile([known], "tiny-random", budget) == []
    own.unlink()
    assert of_profile([known], "tiny-random", budget) == [known]  # nobody can tell


def test_records_of_other_data_stay_apart(make_record, budget):
    """Other windows, other pairs, another text in the place of the generated one: each has a ledger of its own."""
    plain = [make_record("full-precision"), make_record("rtn", "4-8-4"), make_record("llm-qat", "4-8-4")]
    plain += [make_record("llm-qat", "4-8-4", changes={"corpus": "c4"}), make_record("lora")]
    givens = ({}, {"windows": 16}, {"pairs": "/nowhere/own.json"}, {"training_text": "c4"})
    by_data = []
    for own in givens:
        arms = [
            build_arm(budget.with_own(own), "tiny-random", r.arm.method, r.arm.bits) for r in plain if r is not plain[3]
        ]
        records = [dataclasses.replace(plain[0], key=f"{own} {at}", arm=arm) for at, arm in enumerate(arms)]
        by_data.append(records + plain[3:4] * (own == {}))
    every = [record for records in by_data for record in records]
    for own, records in zip(givens, by_data, strict=True):
        found = {record.arm for record in of_profile(every, "tiny-random", budget.with_own(own))}
        assert found == {record.arm for record in records}


def test_records_of_a_method_that_is_not_registered_here_are_kept(make_record, budget):
    record = make_record("rtn", "4-8-4")
    other = dataclasses.replace(record, key="other", arm=dataclasses.replace(record.arm, method="my rounding"))
    assert of_profile([record, other], "tiny-random", budget) == [record, other]
    cells = gather([other, record])
    assert [cell.title for cell in cells.values()] == ["RTN at 4-8-4", "my rounding at 4-8-4"]


def test_measures_are_named_by_what_they_are_of(make_record):
    record = make_record("full-precision")
    assert [(each.kind, each.of, each.short_title) for each in usual_measures([record])] == [
        ("perplexity", "wikipedia", "perplexity on Wikipedia"),
        ("perplexity", "c4", "perplexity on C4"),
        ("accuracy", "mean", "mean accuracy"),
    ]
    assert text_measures([record])[0].title == "perplexity on Wikipedia and C4"


def test_responses_weigh_by_their_tokens(make_record):
    full, low = make_record("full-precision"), make_record("rtn", "4-8-4", loss=3.4)
    tokens = [10.0] * 19 + [500.0]
    for record in (full, low):
        record.scores["tokens/responses"] = tokens
    cells = list(gather([full, low]).values())
    (measure,) = response_measures([full, low])
    each = [np.average(record.scores["loss/responses"], weights=tokens) for record in (full, low)]
    assert measure.value(identity, cells[0]) == pytest.approx(np.exp(each[0]))
    assert measure.interval(np.divide, cells[1], cells[0]).estimate == pytest.approx(np.exp(each[1] - each[0]))
    found = measure.interval(identity, cells[0])
    assert found.low < np.exp(np.mean(full.scores["loss/responses"])) < found.high  # one text rules it


def test_an_interval_stays_where_its_numbers_can_be(make_record):
    """An accuracy within 0 and 100 %, a divergence above 0; differences have no such ends."""
    right = [1.0] + [0.0] * 3
    few = with_scores(make_record("rtn", "4-8-4"), **{"accuracy/piqa": right, "accuracy/arc_easy": right})
    few = dataclasses.replace(
        few, arm=dataclasses.replace(few.arm, evaluation=dataclasses.replace(few.arm.evaluation, items=4))
    )
    accuracy = measure([few], "accuracy/mean")
    (cell,) = gather([few]).values()
    alone, beside = accuracy.interval(identity, cell), accuracy.interval(np.subtract, cell, cell)
    assert (alone.low, alone.estimate) == (0.0, 25.0) and 25 < alone.high <= 100
    assert alone.middle - alone.errors[0] * alone.quantile(0.025) < 0 and beside.estimate == 0


def with_scores(record, **scores):
    return dataclasses.replace(
        record, scores=record.scores | {name.replace("__", "/"): own for name, own in scores.items()}
    )


def test_intervals_over_windows_count_documents_where_records_know_them(make_record):
    """All windows of a document are off by the same, as far as an arm is."""
    noise = np.random.default_rng(5)
    full, low = make_record("full-precision"), make_record("rtn", "4-8-4")
    labels = {f"document/{corpus}": np.repeat(np.arange(8.0), 4).tolist() for corpus in ("wikipedia", "c4")}
    off = {corpus: np.repeat(noise.normal(0.3, 0.1, size=8), 4) for corpus in ("wikipedia", "c4")}
    moved = {f"loss__{corpus}": (np.array(full.scores[f"loss/{corpus}"]) + own).tolist() for corpus, own in off.items()}
    low = with_scores(low, **moved)
    known = dataclasses.replace(low, scores=low.scores | labels)
    distinct = {name: noise.permutation(32).astype(float).tolist() for name in labels}
    apart = dataclasses.replace(low, scores=low.scores | distinct)

    def found(low):
        (measure,), cells = text_measures([full, low]), gather([full, low])
        return measure.interval(np.divide, *reversed(cells.values()))

    plain, together = found(low), found(known)
    assert found(apart) == plain  # to the last bit
    assert together.estimate == pytest.approx(plain.estimate, rel=1e-12) and together.free < plain.free
    sums = [np.add.reduceat(own - own.mean(), range(0, 32, 4)) for own in off.values()]
    error = np.sqrt(sum(np.square(own).sum() for own in sums)) / 64 * np.sqrt(16 / 15)
    assert np.mean(together.errors) == pytest.approx(error, rel=0.05)
    assert np.mean(plain.errors) < 0.6 * error


def test_seeds_count_once_also_where_windows_are_counted_by_document(ablations, make_record):
    labels = {f"document/{corpus}": np.repeat(np.arange(8.0), 4).tolist() for corpus in ("wikipedia", "c4")}
    known = [dataclasses.replace(record, scores=record.scores | labels) for record in ablations]
    for records in (ablations, known):
        (measure,), cells = text_measures(records), gather(records)
        found = measure.interval(np.divide, cells[setting("llm-qat", "4-8-4")], cells[FULL])
        assert found.estimate == pytest.approx(np.exp(0.3)) and found.kinds == {"text"}


def answered(record, bits, items=40):
    """The record with sure answers: all arms share how hard items are."""
    hard = np.random.default_rng(9).uniform(0.5, 1.5, size=items)
    tasks = record.arm.evaluation.tasks
    own = {f"bits_per_byte__{task}": (bits * hard).tolist() for task in tasks}
    return with_scores(record, **own, **{f"probability__{task}": (0.5 / bits * hard).tolist() for task in tasks})


def test_arms_are_compared_by_the_bits_of_right_answers(make_record):
    full, low = answered(make_record("full-precision"), 1.0), answered(make_record("rtn", "4-8-4", accuracy=0.5), 1.1)
    cells = gather([full, low])
    bits, probability = right_answers([full, low])
    assert (bits.name, probability.name) == ("bits_per_byte/mean", "probability/mean")
    assert not bits.higher_is_better and probability.higher_is_better
    pair = cells[FULL], cells[Setting("rtn", "4-8-4")]
    hard = np.mean(full.scores["bits_per_byte/piqa"])
    worse = bits.interval(bits.loss, *pair)
    assert worse.estimate == pytest.approx(0.1 * hard) and 0 < worse.low < worse.high
    assert probability.interval(probability.loss, *pair).estimate == pytest.approx(50 * hard * (1 - 1 / 1.1))
    assert right_answers([make_record("full-precision")]) == []  # of an older studylib
    old = make_record("rtn", "4-8-4")
    assert [own.covers(gather([old])[Setting("rtn", "4-8-4")]) for own in right_answers([full, old])] == [False, False]


def test_the_divergence_stands_beside_text_and_answers(make_record):
    full, low = make_record("full-precision"), make_record("rtn", "4-8-4")
    assert [own.kind for own in unchanged([full, low])] == ["perplexity", "perplexity", "accuracy"]
    kl = {f"kl__{corpus}": np.linspace(0.1, 0.3, 32).tolist() for corpus in ("wikipedia", "c4")}
    full, low = with_scores(full, **dict.fromkeys(kl, [0.0] * 32)), answered(with_scores(low, **kl), 1.0)
    found = unchanged([full, low])
    assert [own.name for own in found if own.kind != "perplexity"] == ["kl/text", "accuracy/mean", "bits_per_byte/mean"]
    measure, pair = found[2], gather([full, low]).values()
    assert measure.title == "KL divergence from full precision on Wikipedia and C4"
    lost = measure.interval(measure.loss, *pair)
    assert lost.estimate == pytest.approx(0.2) and lost.low > 0


def test_a_run_of_an_older_studylib_and_one_of_today_count_once(make_record):
    old = make_record("rtn", "4-8-4")
    new = dataclasses.replace(answered(old, 1.0), key="another")
    (cell,) = gather([old, new]).values()
    assert cell.records == (old,)
    with pytest.raises(ValueError, match="different arms"):
        gather([old, with_scores(new, loss__c4=[1.0] * 32)])


def test_an_arm_beside_itself_differs_by_nothing(ablations):
    (measure,) = text_measures(ablations)
    cells = [cell for cell in gather(ablations).values() if cell.kind]
    assert measure.spreads and len(cells) > 1
    for cell in cells:
        same = measure.above(cell, cell)
        assert (same.estimate, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-9)
    assert measure.above(cells[0], cells[1]).low < measure.above(cells[0], cells[1]).high


def test_a_measure_covers_what_all_seeds_were_scored_on(make_record):
    """As where some seeds were run by an older studylib."""
    first, second = (make_record("llm-qat", "4-8-4", seed=seed) for seed in (0, 1))
    (measure, *_) = perplexities([first, second])
    lacking = dataclasses.replace(second, scores={"loss/c4": second.scores["loss/c4"]})
    assert [measure.covers(cell) for cell in gather([first, second]).values()] == [True]
    assert [measure.covers(cell) for cell in gather([first, lacking]).values()] == [False]


def test_an_interval_is_the_same_among_the_records_that_are_shown_and_among_all(ablations):
    """Runs of arms that are not shown tell how far runs of those that are lie apart."""
    one = [record for record in ablations if Setting.of(record.arm) == setting("llm-qat", "4-8-4")][:1]
    shown = with_further_seeds(one, ablations)
    assert len(one) < len(shown) < len(ablations)
    own, all_of_them, few = (
        text_measures(records)[0].interval(identity, gather(shown)[setting("llm-qat", "4-8-4")])
        for records in (shown, ablations, list(shown))
    )
    assert own == all_of_them != few
