"""What is recommended, on records whose best recipe is known, and against brute force."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from studylib.config.settings import REQUANTIZED, Format
from studylib.evidence.measures import Cell, Measure, identity
from studylib.methods.arms import Setting, setting
from studylib.report import recipes
from studylib.report.recipes import frontier_figure
from studylib.study.records import DIVERGED

CACHE = 2048 * 100 / 1e6  # MB, of make_record's 100 bytes a token
NF4 = Format("nf", 4, 64, True)


def recommended(records, budget=None):
    (found,) = recipes.recommendations(records, budget)
    return found


def with_noise(record, share, size=1.0):
    """The record with scores that differ from its own by `share` nats on average, up and down by `size` besides."""
    noise = {name: share + size * (-1) ** np.arange(len(s)) for name, s in record.scores.items() if "loss/" in name}
    return dataclasses.replace(
        record, scores=record.scores | {name: (record.scores[name] + own).tolist() for name, own in noise.items()}
    )


def test_a_candidate_is_an_arm_as_it_is_deployed(picture):
    (family,) = recipes.families(picture)
    candidate = next(c for c in family.candidates if c.title == "LLM-QAT at 4-8-4")
    assert candidate.size == pytest.approx(4 + CACHE) and candidate.peak == 1 and candidate.trained
    assert family.loss(candidate) == pytest.approx(math.exp((3.3 + 4.3) / 2))  # the geometric mean over both corpora
    assert family.measure.title == "perplexity on Wikipedia and C4" and family.accuracy.name == "accuracy/mean"
    assert family.reference.title == "full precision" and len(family.candidates) == len(picture)


def test_a_model_that_knows_nothing_is_named(make_record):
    def of(loss, bits="16-16-16", method="full-precision", **known):
        record = make_record(method, bits, loss)
        return dataclasses.replace(record, provenance={"model": record.provenance["model"] | known})

    found = recommended([of(12.0, vocabulary=49_152), of(12.1, "2-16-16", "rtn", vocabulary=49_152)], budget=0.1)
    assert found.details[0].startswith(
        "All of this is meaningless: full precision has a perplexity on Wikipedia and C4"
    )
    assert "more than the 49,152 of guessing evenly among its tokens" in found.details[0]
    for fine in ([of(9.0, vocabulary=49_152)], [of(12.0)], [of(12.0, "2-16-16", "rtn", vocabulary=49_152)]):
        assert "meaningless" not in " ".join(recommended(fine).details)


def test_corpora_weigh_the_same_and_are_resampled_apart(make_record):
    (family,) = recipes.families([make_record("rtn", "4-8-4", spread=0.0)])
    found = family.measure.interval(identity, family.candidates[0].cell)
    assert (found.low, found.high) == pytest.approx((math.exp(3.5),) * 2)  # 3 nats on one and 4 on the other, always


def test_shared_work_counts_in_full_for_everyone(make_record):
    def record(method, bits, seconds, **changes):
        made = make_record(method, bits, changes=changes)
        return dataclasses.replace(made, cost=made.cost | {"seconds": {"evaluate": 2.0} | seconds})

    records = [
        record("qlora", "4-16-16", {"train": 600.0}, format=NF4),
        record("qlora", "4-16-16", {"train": 6.0}, format=NF4, merge=REQUANTIZED),
        record("llm-qat", "4-8-4", {"data": 60.0, "train": 30.0}),
        record("gptq", "4-8-4", {"data": 0.1, "quantize": 30.0}),
    ]
    minutes = {
        candidate.title: candidate.minutes for family in recipes.families(records) for candidate in family.candidates
    }
    assert minutes == {
        "QLoRA at 4-16-16": {"data": 0, "quantize": 0, "train": 10},
        "QLoRA at 4-16-16 (adapter merged, rounded again)": {"data": 0, "quantize": 0, "train": 10},
        "LLM-QAT at 4-8-4": {"data": 1, "quantize": 0, "train": 0.5},
        "GPTQ at 4-8-4": {"data": 1, "quantize": 0.5, "train": 0},
    }


def test_fine_tuned_models_are_a_family_of_their_own(make_record, tuned):
    general, learned = recipes.families([make_record("full-precision"), *tuned])
    assert {c.cell.method for c in general.candidates} == {"full-precision", "encoded"}
    assert learned.measure.name == "perplexity/responses" and learned.reference.title == "LoRA at 16-16-16"
    assert len(general.candidates) + len(learned.candidates) == len({Setting.of(r.arm) for r in tuned}) + 1
    (without,) = recipes.families([record for record in tuned if record.arm.method == "qlora"])
    assert without.reference.title == "QLoRA at 4-16-16"  # the best, for there is no LoRA on 16 bits


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=7), st.integers(1, 6))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_frontier_and_recommendation_against_brute_force(make_record, sizes_and_losses, budget):
    record = make_record("rtn", "4-8-4")
    candidates = []
    for at, (size, loss) in enumerate(sizes_and_losses):
        metrics = {"bytes/weights": size * 1e6, "bytes/cache_per_token": 0.0}
        own = dataclasses.replace(record, metrics=metrics, scores={"loss/x": [float(loss), float(loss)]})
        cell = Cell(setting("rtn", "4-8-4", {"scheme.group": at + 1}), (own,))
        candidates.append(recipes.Candidate(cell, {"train": 0.0}))
    measure = Measure("perplexity", "x", "perplexity on x", ("loss/x",), (2,))
    family = recipes.Family("x", measure, tuple(candidates), candidates[0], None, ())
    best = {
        (size, loss)
        for size, loss in sizes_and_losses
        if not any(s <= size and l <= loss and (s, l) != (size, loss) for s, l in sizes_and_losses)
    }
    front = [(c.size, round(math.log(family.loss(c)), 9)) for c in family.frontier()]
    assert front == sorted(best)

    found = recipes.recommend(family, budget)
    fitting = [(loss, size) for size, loss in sizes_and_losses if size <= budget]
    if not fitting:
        assert found.best is None and f"the smallest, {family.frontier()[0].title}" in found.headline
    else:
        assert (math.log(family.loss(found.best)), found.best.size) == pytest.approx(min(fitting))
        assert found.best in family.frontier()
        same = sum(loss == min(fitting)[0] for loss, _ in fitting)
        assert len(found.equals) == same - 1  # without noise, everything else is surely worse

    (whole, usual), found = sizes_and_losses[0], recipes.recommend(family)
    near = [size for size, loss in sizes_and_losses if loss <= usual]  # 1 nat is more than 5%
    smaller = [(loss, size) for size, loss in sizes_and_losses if size < whole]  # a size of 1 to 5 saves 10% or nothing
    if min(near) < whole:
        assert found.best.size == min(near)
    elif smaller:
        assert (math.log(family.loss(found.best)), found.best.size) == pytest.approx(min(smaller))
    else:
        assert found.best.size == whole and math.log(family.loss(found.best)) <= usual + 1e-9


def test_without_a_budget_the_smallest_within_five_percent(picture):
    found = recommended(picture)
    assert found.headline == (
        "The smallest within 5.0% of full precision: RTN at 8-8-8, perplexity on Wikipedia and C4 33.4, "
        "1.0% [1.0%, 1.0%] above full precision, in 8.20 MB."
    )
    assert found.chosen is found.best and not found.equals
    assert (
        "The next best of those that are no larger, LLM-QAT at 8-8-8, is worse by 1.0% [1.0%, 1.0%]." in found.details
    )
    assert any(text.startswith("RTN at 8-8-8 is better than all 7 others that are no larger") for text in found.details)
    assert (
        "Making RTN at 8-8-8 takes no time, without any training; with its evaluation, at most 1.00 GiB of memory."
        in (found.details)
    )
    key = found.best.cell.records[0].key[:8]
    command = f"study export {key} --output FOLDER, and with --format gguf for llama.cpp"
    assert f"For other software, as compressed-tensors: {command}" in found.details


def test_where_nothing_smaller_is_close_the_next_is_named(make_record):
    full = make_record("full-precision")
    found = recommended([full, make_record("rtn", "8-8-8", loss=3.2), make_record("rtn", "4-8-4", loss=4.0)])
    assert found.headline == (
        "Nothing that saves 10% of the size is within 5.0%: the nearest is RTN at 8-8-8, perplexity on Wikipedia and "
        "C4 40.4, 22% [22%, 22%] above full precision, in 8.20 MB."
    )
    assert found.chosen.title == "RTN at 8-8-8" and not any("further away" in text for text in found.details)
    alone = recommended([full])
    assert alone.headline == (
        "Nothing that was run saves 10% of the size of full precision: full precision, perplexity on Wikipedia and C4 "
        "33.1, in 16.2 MB."
    )
    assert alone.details[0] == "Nothing else was run of those that save as much."
    assert recommended([full], 20).details[0] == "Nothing else was run of those that fit."


def test_what_saves_nothing_is_no_smaller_model(make_record):
    def sized(method, bits, loss, megabytes, format=None):
        record = make_record(method, bits, loss, changes={"format": format} if format else None)
        return dataclasses.replace(record, metrics=record.metrics | {"bytes/weights": 1e6 * megabytes})

    adapter, merged = sized("lora", "16-16-16", 2.0, 16.2), sized("qlora", "4-16-16", 2.01, 16.0, NF4)
    found = recommended([adapter, merged, sized("l4q", "4-16-16", 2.3, 5, Format("int-full", 4, 64))])
    start = "Nothing that saves 10% of the size is within 5.0%: the nearest is L4Q at 4-16-16, perplexity of "
    assert found.headline.startswith(start) and ", 35% [35%, 35%] above LoRA at 16-16-16" in found.headline


def test_that_it_is_so_close_may_be_unsure(make_record):
    near = make_record("rtn", "8-8-8", loss=3.04)
    assert not any("further away" in text for text in recommended([make_record("full-precision"), near]).details)
    unsure = with_noise(near, 0.0, size=0.2)
    (text,) = [t for t in recommended([make_record("full-precision"), unsure]).details if "further away" in t]
    assert text.startswith("It may be further away than that: the interval reaches ")


def test_a_budget(picture):
    assert recommended(picture, 5).best.title == "LLM-QAT at 4-8-8"
    assert recommended(picture, 4 + CACHE).best.title == "LLM-QAT at 4-8-8"  # what takes exactly that much fits
    assert recommended(picture, 1e9).best.title == "full precision"
    assert recommended(picture, 5).headline.startswith("The best within 5 MB: LLM-QAT at 4-8-8, ")
    nothing = recommended(picture, 4 + CACHE / 2)
    assert nothing.best is None and nothing.equals == ()
    assert nothing.headline == "Nothing that was run fits in 4.1024 MB: the smallest, LLM-QAT at 4-8-8, takes 4.20 MB."


@pytest.mark.parametrize("budget", [0, -3.0, math.nan, math.inf])
def test_a_budget_that_is_none(picture, budget):
    with pytest.raises(ValueError, match=f"budget: {budget:g} MB is not allowed; use a number above 0"):
        recommended(picture, budget)


def test_what_is_as_good_and_costs_least(make_record):
    trained, plain = make_record("llm-qat", "4-8-8"), with_noise(make_record("rtn", "4-8-8"), 0.01)
    full, bad = make_record("full-precision", loss=2.9), make_record("rtn", "4-8-4", loss=4.0)
    found = recommended([full, trained, plain, bad], 5)
    assert found.best.title == "LLM-QAT at 4-8-8"
    assert [other.title for other in found.equals] == ["RTN at 4-8-8"] and found.chosen is found.equals[0]
    assert found.headline.startswith("The best within 5 MB: RTN at 4-8-8, perplexity on ")
    text = "As good, as far as these data can tell over 2 comparisons at once: LLM-QAT at 4-8-8 (4.20 MB)."
    assert found.details[0] == text
    assert found.details[1].startswith("LLM-QAT at 4-8-8 has the lowest perplexity of those that fit. RTN at 4-8-8 is ")
    assert found.details[1].endswith(" above it and costs much less to make.")
    table = recipes.frontier_table(found)
    assert list(table["Recipe"]) == ["LLM-QAT at 4-8-8", "RTN at 4-8-8 (recommended)", "Full precision"]


def test_what_is_worse_by_more_than_the_tolerance_is_not_as_good(make_record):
    """However little the data can tell."""
    plain = with_noise(make_record("rtn", "4-8-8"), 0.06, size=2.0)
    found = recommended([make_record("full-precision", loss=2.9), make_record("llm-qat", "4-8-8"), plain], 5)
    assert found.chosen.title == "LLM-QAT at 4-8-8" and found.equals == ()


def test_a_little_more_time_decides_nothing(make_record):
    """Of two that are as good, the better one, unless it needs a training or takes more than twice as long."""

    def taking(seconds, record):
        return dataclasses.replace(record, cost=record.cost | {"seconds": {"quantize": seconds}})

    for seconds, chosen in ((19.0, "GPTQ at 4-8-4"), (21.0, "AWQ at 4-8-4")):
        slower, faster = make_record("gptq", "4-8-4"), with_noise(make_record("awq", "4-8-4"), 0.01)
        found = recommended([taking(seconds, slower), taking(10.0, faster)], 5)
        assert found.chosen.title == chosen and len(found.equals) == 1


def test_time_on_a_slow_machine_counts_as_that_of_the_fastest(make_record):
    """One machine takes three times as long for everything; a median of what others evaluated there says so."""

    def made(*arm, seconds, slower, **fields):
        record = make_record(*arm, **fields)
        hardware = record.provenance["hardware"] | {"processor": "AVX2" if slower > 1 else "AVX512"}
        cost = record.cost | {"seconds": {"quantize": seconds * slower, "evaluate": 2.0 * slower}}
        return dataclasses.replace(record, cost=cost, provenance=record.provenance | {"hardware": hardware})

    for slower in (1, 3):  # 100 seconds beside 60 decide nothing, wherever they were measured
        records = [
            made("full-precision", "16-16-16", loss=3.0, seconds=0, slower=1),
            made("rtn", "8-8-8", loss=3.02, seconds=60, slower=1),
            made("gptq", "8-8-8", loss=3.01, seconds=100, slower=slower),
        ]
        (found,) = recipes.recommendations(records)
        assert found.chosen.arm.method == "gptq"
        assert found.chosen.minutes["quantize"] == pytest.approx(100 * slower / 60)


def test_what_is_useless_is_not_among_the_best_of_its_size(make_record):
    full, good, useless = make_record("full-precision"), make_record("rtn", "8-8-8"), make_record("rtn", "2-16-16", 4.2)
    useless = dataclasses.replace(useless, metrics=useless.metrics | {"bytes/weights": 1e6})
    found = recommended([full, good, useless])
    assert found.family.frontier()[0].title == "RTN at 2-16-16"
    assert recipes.frontier_table(found)["Recipe"][0] == "RTN at 8-8-8 (recommended)"


def test_more_comparisons_ask_for_more_distance(make_record):
    """2.3 standard errors are enough for one comparison (1.96), not for each of ten (2.81)."""
    best, near = make_record("rtn", "4-8-4"), with_noise(make_record("gptq", "4-8-4"), 0.1 * 2.3 / 8, size=0.1)
    others = [
        make_record("encoded", "4-16-16", loss=9.0, changes={"format": Format("int", 4, group)})
        for group in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    ]
    assert recommended([best, near], 5).equals == ()
    assert [other.title for other in recommended([best, near, *others], 5).equals] == ["GPTQ at 4-8-4"]


def test_many_equals_are_counted(make_record):
    others = [
        with_noise(make_record("encoded", "4-16-16", changes={"format": Format("int", 4, group)}), 0.01)
        for group in (1, 2, 4, 8, 16, 32, 64, 128)
    ]
    found = recommended([make_record("rtn", "4-8-4"), *others], 5)
    assert len(found.equals) == 8 and any(text.endswith(" and 2 more.") for text in found.details)


def test_one_seed_says_nothing_about_other_trainings(picture, make_record):
    said = "Intervals resample what was scored; with one seed they say nothing about other trainings."
    assert said in recommended(picture, 5).details
    two = [make_record("llm-qat", "4-8-8", loss=3.1, seed=seed) for seed in (0, 1)]
    assert said not in recommended(two, 5).details
    assert said not in recommended([make_record("rtn", "4-8-8")], 5).details


def test_text_of_the_kind_that_is_scored_is_said(make_record):
    found = recommended([make_record("llm-qat", "4-8-4", changes={"corpus": "c4"})], 5)
    assert "It was made on other documents of C4, which favours it there." in found.details


def test_what_diverged_is_left_out_and_said(picture, make_record):
    records = [*picture, make_record("llm-qat", "4-8-8", loss=1.0, seed=1, status=DIVERGED)]
    found = recommended(records, 5)
    assert found.best.title == "RTN at 4-8-8"
    assert found.details[-1] == "Left out, since a run of it diverged: LLM-QAT at 4-8-8."
    assert "LLM-QAT at 4-8-8" not in recipes.as_markdown_section(records).replace(found.details[-1], "")
    assert recommended(records, 0.5).details == (found.details[-1],)
    alone = [make_record("lora", status=DIVERGED)]
    assert recipes.recommendations(alone) == [] and recipes.as_markdown_section(alone) == "No arm finished."


def test_the_section_in_markdown_and_for_a_terminal(make_record, tuned):
    records = [make_record("full-precision"), *tuned]
    section, text = recipes.as_markdown_section(records, 5), recipes.as_text(records, 5)
    for found in recipes.recommendations(records, 5):
        assert f"**{found.family.title}.** {found.headline}\n\n- " in section
        assert f"{found.family.title}: {found.headline}\n  " in text
        assert all(sentence in section and sentence in text for sentence in found.details)
    header = (
        "| Recipe | Size, MB | Weights, MB | Cache, kB/token | Perplexity on Wikipedia and C4 | Above full precision |"
    )
    assert header in section and "| Making it, min | Peak, GiB |\n| --- | ---: |" in section
    assert section.endswith(recipes.SIZES) and text.startswith("Which recipe for this model\n\nServed as")


@pytest.mark.parametrize("budget", [None, 5.0, 0.5, 1e6])
def test_the_figure_names_the_frontier(picture, budget):
    found = recommended(picture, budget)
    figure = frontier_figure(found)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (ax,) = figure.axes
    assert f"{figure.get_suptitle()}.".replace("\n", " ") == found.headline
    names = [text.get_text() for text in ax.texts]
    assert all(any(name.startswith(c.title) for name in names) for c in found.family.frontier())
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in ax.texts]
    for a, b in itertools.combinations(boxes, 2):
        assert min(a.x1, b.x1) - max(a.x0, b.x0) <= 1 or min(a.y1, b.y1) - max(a.y0, b.y0) <= 0.25 * a.height
    points = [(*line.get_xdata(), *line.get_ydata()) for line in ax.lines if len(line.get_xdata()) == 1]
    assert (found.family.reference.size, 1.0) in points  # heights are beside the reference
    lines = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"]
    assert lines == ([budget] if budget and budget < 100 else [])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert ("recommended" in legend) == (found.chosen is not None) and ("within 5.0%" in legend) == (budget is None)
