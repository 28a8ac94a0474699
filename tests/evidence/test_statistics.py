"""Oracles: SciPy's bootstrap, the exact binomial, and coverage by simulation."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from studylib.evidence.statistics import (
    EXCESS,
    POWER,
    RATIO,
    Interval,
    clustered,
    clusters_worth,
    freedom,
    paired_bootstrap,
    perplexity,
    stratified_mean,
)


def difference(a, b):
    return a.mean(-1) - b.mean(-1)


def test_paired_intervals_equal_scipys():
    random = np.random.default_rng(1)
    a = random.normal(size=80)
    b = a + random.normal(0.1, 0.3, size=80)
    ours = paired_bootstrap(difference, a, b, draws=40_000)
    theirs = scipy.stats.bootstrap(
        (a, b), lambda x, y, axis=-1: x.mean(axis) - y.mean(axis), paired=True, method="percentile", n_resamples=40_000
    ).confidence_interval
    assert ours.estimate == pytest.approx(a.mean() - b.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.005)


def test_pairing_matters():
    random = np.random.default_rng(2)
    a = random.normal(0, 5, size=100)
    b = a + 0.1 + random.normal(0, 0.05, size=100)
    assert paired_bootstrap(difference, b, a).low > 0


def test_a_share_of_correct_items_has_the_binomial_interval():
    scores = np.repeat([1.0, 0.0], [60, 140])
    found = paired_bootstrap(lambda x: x.mean(-1), scores, draws=40_000)
    percentiles = scipy.stats.binom(200, 0.3).ppf([0.025, 0.975]) / 200
    students = scipy.stats.t.ppf(0.975, 199) / scipy.stats.norm.ppf(0.975) * np.sqrt(200 / 199)
    low, high = 0.3 + (percentiles - 0.3) * students
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.0051)


def test_intervals_cover_as_often_as_they_say():
    random = np.random.default_rng(3)
    hits = 0
    for _ in range(400):
        found = paired_bootstrap(lambda x: x.mean(-1), random.normal(1.0, 1.0, size=60), draws=1000)
        hits += found.low <= 1.0 <= found.high
    assert 0.91 <= hits / 400 <= 0.98


@pytest.mark.parametrize("clusters", [[5] * 12, [1] * 10 + [3] * 6 + [8] * 4])
def test_windows_of_a_document_count_together_where_documents_differ(clusters):
    """Half of the variance is between documents: plain intervals leave the truth out too often, those over documents
    do not."""
    random, labels = np.random.default_rng(11), np.repeat(np.arange(len(clusters)), clusters)
    plain = together = 0
    for _ in range(600):
        scores = random.normal(1.0, 1.0, size=len(clusters))[labels] + random.normal(size=len(labels))
        for own in (scores, clustered(scores, labels)):
            count = None if own is scores else clusters_worth(labels)
            found = paired_bootstrap(lambda x: x.mean(-1), own, draws=500, count=count)
            hit = found.low <= 1.0 <= found.high
            plain, together = plain + (own is scores) * hit, together + (own is not scores) * hit
    assert plain / 600 < 0.88 and 0.92 <= together / 600 <= 0.98


def test_what_clusters_are_worth():
    assert clusters_worth(np.repeat(np.arange(12), 5)) == 12
    assert clusters_worth(np.repeat(np.arange(20), [1] * 10 + [3] * 6 + [8] * 4)) == pytest.approx(11.25)
    assert clusters_worth(np.zeros(7)) == 1


def test_the_variance_over_documents_is_the_cluster_robust_one():
    random = np.random.default_rng(12)
    labels = random.integers(0, 9, size=40)
    scores = random.normal(size=(2, 40))
    found = clustered(scores, labels)
    np.testing.assert_allclose(found.mean(-1), scores.mean(-1), rtol=1e-12)
    for own, values in zip(found, scores, strict=True):
        sums = [(values - values.mean())[labels == label].sum() for label in np.unique(labels)]
        assert own.var() / len(own) == pytest.approx(np.square(sums).sum() / 40**2)


@given(arrays(float, st.integers(1, 30), elements=st.floats(-1e3, 1e3)), st.randoms())
def test_where_all_documents_differ_nothing_changes(scores, random):
    labels = np.array(random.sample(range(1000), len(scores)))
    assert clustered(scores, labels) is scores and clusters_worth(labels) == len(scores)


def test_strata_keep_their_sizes_and_weigh_the_same():
    strata = np.repeat([0, 1], [10, 90])
    scores = np.concatenate([np.full(10, 2.0), np.zeros(90)])
    statistic = stratified_mean(strata)
    assert statistic(scores) == 1.0
    found = paired_bootstrap(statistic, scores, strata=strata)
    assert (found.low, found.high) == (1.0, 1.0)  # nothing varies inside a stratum
    assert paired_bootstrap(lambda x: x.mean(-1), scores).high > 0.2


def test_answers_of_which_none_differs_do_not_say_that_none_ever_does():
    answers, half = np.ones(40), np.repeat([0, 1], [10, 30])
    found = paired_bootstrap(difference, answers, answers)
    assert (found.low, found.high) == pytest.approx(scipy.stats.t(39).ppf([0.025, 0.975]) / 40)
    found = paired_bootstrap(stratified_mean(half), answers, strata=half)
    assert found.high - found.estimate == pytest.approx(scipy.stats.t(39).ppf(0.975) * np.hypot(1 / 20, 1 / 60))
    found = paired_bootstrap(difference, 0.7 * answers, 0.7 * answers)
    assert (found.low, found.high) == (0, 0)  # these are no answers


@pytest.mark.parametrize("share", [0.025, 0.05, 0.2])
def test_intervals_of_answers_cover_where_few_differ(share):
    random, hits, runs = np.random.default_rng(12), 0, 400
    for _ in range(runs):
        found = paired_bootstrap(difference, np.ones(40), (random.random(40) >= share).astype(float), draws=400)
        hits += found.low <= share <= found.high
    assert hits / runs >= 0.92


def test_perplexity():
    assert perplexity(np.log([2.0, 8.0])) == pytest.approx(4.0)
    assert perplexity(np.array([1000.0])) == np.inf


def test_the_same_seed_gives_the_same_interval():
    sample = np.random.default_rng(0).normal(size=30)
    assert paired_bootstrap(perplexity, np.log(sample[:1] ** 2)).bounds(0.01) == 2 * (pytest.approx(sample[0] ** 2),)
    assert paired_bootstrap(lambda x: x.mean(-1), sample) == paired_bootstrap(lambda x: x.mean(-1), sample)


@pytest.mark.parametrize(
    ("samples", "settings", "message"),
    [
        (([],), {}, "shapes"),
        (([1.0], [1.0, 2.0]), {}, "shapes"),
        (([1.0, np.nan],), {}, "NaN"),
        (([1.0, 2.0],), {"strata": [0]}, "one label for each of the 2 items"),
    ],
)
def test_samples_that_cannot_be_compared(samples, settings, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(difference, *samples, **settings)


def test_with_one_seed_nothing_changes():
    scores = np.random.default_rng(4).normal(size=(2, 50))
    alone = paired_bootstrap(difference, *scores)
    assert paired_bootstrap(difference, *scores[:, None]) == alone


def draw_runs(random, seeds, items, effect):
    """Two arms: items that both share, a part of each seed, noise of each run on each item."""
    shared = random.normal(0, 1.0, size=items)
    return [
        mean + shared + random.normal(0, 0.1, size=(seeds, 1)) + random.normal(0, 0.3, size=(seeds, items))
        for mean in (effect, 0.0)
    ]


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_over_seeds_cover_as_often_as_they_say(seeds):
    random, hits, ignorant, runs = np.random.default_rng(5), 0, 0, 300
    for _ in range(runs):
        a, b = draw_runs(random, seeds, 40, 0.2)
        found = paired_bootstrap(difference, a, b, draws=600)
        averaged = paired_bootstrap(difference, a.mean(0), b.mean(0), draws=600)
        hits += found.low <= 0.2 <= found.high
        ignorant += averaged.low <= 0.2 <= averaged.high
    assert hits / runs >= 0.92 and ignorant < hits  # averaging seeds away pretends that there is no spread


@pytest.mark.parametrize("seeds", [2, 3])
def test_seeds_that_differ_make_no_effect_of_nothing(seeds):
    random, wrong, runs = np.random.default_rng(8), 0, 400
    for _ in range(runs):
        found = paired_bootstrap(difference, *draw_runs(random, seeds, 40, 0.0), draws=600)
        wrong += found.low > 0
    assert wrong / runs <= 0.05


def test_one_number_a_seed_gets_students_interval():
    values = np.random.default_rng(9).normal(1.0, 0.3, size=5)
    found = paired_bootstrap(lambda x: x.mean(-1), values[:, None])
    expected = scipy.stats.t.interval(0.95, 4, values.mean(), scipy.stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    low, high = scipy.stats.t.interval(1 - 0.05 / 12, 4, values.mean(), scipy.stats.sem(values))
    assert found.bounds(0.025 / 12) == pytest.approx((low, high))


def test_the_variance_between_runs_may_come_from_elsewhere():
    sample = np.random.default_rng(13).normal(size=30)
    alone = paired_bootstrap(lambda x: x.mean(-1), sample)
    known = paired_bootstrap(lambda x: x.mean(-1), sample, runs=(0.09, 20))
    assert known.errors == pytest.approx(np.sqrt(np.square(alone.errors) + 0.09))
    items = np.mean(alone.errors) ** 2
    assert known.free == pytest.approx((items + 0.09) ** 2 / (items**2 / 29 + 0.09**2 / 20))
    assert freedom((1.0, 5), (1.0, 5)) == 10 and freedom((0.0, 5)) == np.inf


def test_errors_that_multiply_add_up_on_a_log_scale():
    losses = np.random.default_rng(11).normal(3.0, 0.5, size=(2, 12))
    found = paired_bootstrap(perplexity, losses, scale=RATIO)
    plain = paired_bootstrap(lambda x: x.mean(-1), losses)
    assert (found.middle, *found.errors, found.free) == pytest.approx((plain.middle, *plain.errors, plain.free))
    assert found.bounds(0.01) == pytest.approx(tuple(np.exp(plain.bounds(0.01))))
    above = found.on(EXCESS)
    assert (above.estimate, above.low) == pytest.approx((found.estimate - 1, found.low - 1))


def test_a_few_items_get_nearly_students_interval():
    """Means of 8 normal numbers; percentiles alone leave the true mean out in one case of eight."""
    random, hits, runs = np.random.default_rng(10), 0, 600
    for _ in range(runs):
        found = paired_bootstrap(lambda x: x.mean(-1), random.normal(size=8), draws=1000)
        hits += found.low <= 0 <= found.high
    assert hits / runs == pytest.approx(0.95, abs=0.025)


@pytest.mark.parametrize("shapes", [[(2, 5), (3, 5)], [(2, 5), (2, 4)], [(2, 2, 5)]])
def test_runs_that_do_not_belong_together_are_refused(shapes):
    with pytest.raises(ValueError, match="one number of seeds"):
        paired_bootstrap(lambda *x: x[0].mean(-1), *(np.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("rate", [0.025, 0.002])
@pytest.mark.parametrize("items", [8, 60])
def test_an_effect_that_is_detectable_is_told_in_most_cases(rate, items):
    """Means of normal numbers against a bound of zero: how often the lower bound lies above it, by the noncentral t
    distribution, and by trying."""
    random, runs = np.random.default_rng(7), 4000
    error, student = 1 / np.sqrt(items), scipy.stats.t(items - 1)
    found = Interval(0.0, (error, error), items - 1).detectable(0.0, rate)
    power = scipy.stats.nct.sf(student.isf(rate), items - 1, found / error)
    assert power == pytest.approx(POWER, abs=1e-6)
    samples = random.normal(found, 1.0, size=(runs, items))
    bounds = samples.mean(1) - student.isf(rate) * samples.std(1, ddof=1) / np.sqrt(items)
    assert np.mean(bounds > 0) == pytest.approx(POWER, abs=0.03)


def test_a_detectable_ratio_is_counted_on_the_log_scale():
    error = np.log(2.0) / (scipy.stats.norm.isf(0.001) + scipy.stats.norm.ppf(POWER))
    found = Interval(np.log(1.2), (error, error), scale=RATIO)
    assert found.detectable(3.0, 0.001) == pytest.approx(6.0)
    assert found.on(EXCESS).detectable(0.0, 0.001) == pytest.approx(1.0)


def test_what_does_not_vary_detects_everything_and_what_is_not_known_nothing():
    assert Interval(3.0).detectable(1.0, 0.01) == 1.0 and Interval(3.0).bounds(0.01) == (3.0, 3.0)
    unknown = Interval(3.0, (np.inf, np.inf))
    assert unknown.detectable(1.0, 0.01) == np.inf and unknown.bounds(0.01) == (-np.inf, np.inf)
    assert unknown.text(str) == "3.0"
