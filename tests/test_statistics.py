"""Oracles: SciPy's bootstrap, the exact binomial, and coverage by simulation."""

import numpy as np
import pytest
import scipy.stats

from studylib.statistics import Interval, paired_bootstrap, perplexity, stratified_mean


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
    low, high = scipy.stats.binom(200, 0.3).ppf([0.025, 0.975]) / 200
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.0051)


def test_intervals_cover_as_often_as_they_say():
    random = np.random.default_rng(3)
    hits = 0
    for _ in range(400):
        found = paired_bootstrap(lambda x: x.mean(-1), random.normal(1.0, 1.0, size=60), draws=1000)
        hits += found.low <= 1.0 <= found.high
    assert 0.91 <= hits / 400 <= 0.98


def test_strata_keep_their_sizes_and_weigh_the_same():
    strata = np.repeat([0, 1], [10, 90])
    scores = np.concatenate([np.ones(10), np.zeros(90)])
    statistic = stratified_mean(strata)
    assert statistic(scores) == 0.5
    found = paired_bootstrap(statistic, scores, strata=strata)
    assert (found.low, found.high) == (0.5, 0.5)  # nothing varies inside a stratum
    assert paired_bootstrap(lambda x: x.mean(-1), scores).high > 0.1


def test_perplexity():
    assert perplexity(np.log([2.0, 8.0])) == pytest.approx(4.0)
    assert perplexity(np.array([1000.0])) == np.inf


def test_the_same_seed_gives_the_same_interval():
    sample = np.random.default_rng(0).normal(size=30)
    assert paired_bootstrap(perplexity, np.log(sample[:1] ** 2)) == Interval(*[pytest.approx(sample[0] ** 2)] * 3)
    assert paired_bootstrap(lambda x: x.mean(-1), sample) == paired_bootstrap(lambda x: x.mean(-1), sample)


@pytest.mark.parametrize(
    ("samples", "settings", "message"),
    [
        (([],), {}, "shapes"),
        (([1.0], [1.0, 2.0]), {}, "shapes"),
        (([1.0, np.nan],), {}, "NaN"),
        (([1.0, 2.0],), {"strata": [0]}, "one label for each of the 2 items"),
        (([1.0, 2.0],), {"level": 1.5}, "1.5"),
    ],
)
def test_samples_that_cannot_be_compared(samples, settings, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(difference, *samples, **settings)
