"""The pooled spread between runs: known truths, NumPy's least squares, how rarely a bound is wrong."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats

from studylib.evidence.spread import _inverse_trigamma, pool


def draw(random, losses, seeds=3, sd=lambda loss: 0.02, shared=0.0):
    """Arms that lose so much, a run each of every seed."""
    alike = random.normal(0, shared or 1e-300, seeds)
    return {
        at: {seed: loss + alike[seed] + random.normal(0, sd(loss)) for seed in range(seeds)}
        for at, loss in enumerate(losses)
    }


def test_the_trend_and_what_seeds_share_are_found():
    random, losses = np.random.default_rng(0), np.linspace(3, 4, 20)
    found = [pool(draw(random, losses, sd=lambda x: 0.01 * math.exp(x - 3), shared=0.03)) for _ in range(300)]
    for loss in (3.0, 3.5, 4.0):
        typical = math.exp(np.median([math.log(each.of("another", loss)[0]) for each in found]) / 2)
        assert typical == pytest.approx(0.01 * math.exp(loss - 3), rel=0.06)
    assert np.mean([each.shared[0] for each in found]) == pytest.approx(0.03**2, rel=0.15)
    assert all(each.free == pytest.approx(38) and each.shared[1] == 2 for each in found)
    assert np.median([each.prior for each in found]) == math.inf  # all arms lie on the line


def test_arms_that_differ_from_the_line_count_for_themselves():
    random = np.random.default_rng(1)
    arms = draw(random, np.full(40, 3.0), seeds=6, sd=lambda _: 0.02 * math.exp(random.normal(0, 1)))
    found = pool(arms)
    assert 1 < found.prior < 6  # log variances with a standard deviation of 2 say little of one another
    far = max(arms, key=lambda arm: np.var(list(arms[arm].values())))
    own, free = found.of(far, 3.0)
    assert found.of("another", 3.0)[0] < own < np.var(list(arms[far].values()), ddof=1)
    assert free == pytest.approx(found.prior + found.own[far][1])


def test_unequal_numbers_of_runs_are_fitted_by_least_squares():
    random = np.random.default_rng(2)
    arms = draw(random, [3.0, 3.2, 3.5, 3.6], seeds=4, shared=0.05)
    del arms[0][1], arms[2][0], arms[2][3]
    arms["once"] = {0: 3.1}  # which says nothing of seeds
    rows = [(arm, seed, loss) for arm in range(4) for seed, loss in arms[arm].items()]
    design = np.array([[arm == a for a in range(4)] + [seed == s for s in range(4)] for arm, seed, _ in rows], float)
    losses = np.array([loss for *_, loss in rows])
    fitted = design @ np.linalg.lstsq(design, losses, rcond=None)[0]
    found = pool(arms)
    assert sum(variance * free for variance, free in found.own.values()) == pytest.approx(
        ((losses - fitted) ** 2).sum()
    )
    assert found.free == pytest.approx(len(rows) - 4 - 3) and "once" not in found.own


def test_losses_that_were_not_seen_get_the_nearest_that_were():
    found = pool(draw(np.random.default_rng(3), np.linspace(3, 4, 30), sd=lambda x: 0.01 * math.exp(3 * (x - 3))))
    assert found.of("x", 9.0) == found.of("x", 4.0 + 0.2) and found.of("x", 0.0) == found.of("x", 2.5)
    assert found.of("x", 9.0)[0] > 50 * found.of("x", 0.0)[0]


def test_nothing_is_known_without_repeats():
    assert pool({}) is None and pool({"a": {0: 3.0}, "b": {0: 3.1}}) is None
    assert pool({"a": {0: 3.0, 1: 3.1}, "b": {2: 3.0, 3: 3.1}, "c": {0: 1.0}}) is None  # seeds or arms?
    alone = pool({"a": {0: 3.0, 1: 3.2, 2: 3.1}})
    unbiased = math.log(0.01) - scipy.special.digamma(1)  # of a log variance with two degrees of freedom
    assert alone.of("a", 3.1) == pytest.approx((math.exp(unbiased), 2)) and alone.shared[0] == 0


def test_runs_that_come_out_the_same_have_no_spread():
    found = pool({arm: dict.fromkeys(range(3), 3.0 + arm) for arm in range(12)})
    assert found.of(0, 3.0)[0] < 1e-24 and found.free == pytest.approx(22)


@pytest.mark.parametrize("value", [1e-6, 0.3, 2.0, 1e6])
def test_the_inverse_of_trigamma(value):
    assert scipy.special.polygamma(1, _inverse_trigamma(value)) == pytest.approx(value, rel=1e-9)


def test_bounds_of_a_single_run_are_wrong_as_rarely_as_they_say():
    """The run of an arm that has no other, by what the others show of runs; at a rate of one in a hundred."""
    random, wrong, trials, rate = np.random.default_rng(4), 0, 3000, 0.01
    losses = np.linspace(3, 3.6, 12)
    for _ in range(trials):
        found = pool(draw(random, losses, sd=lambda x: 0.02 * math.exp(x - 3)))
        variance, free = found.of("another", 3.3)
        run = random.normal(0, 0.02 * math.exp(0.3))
        wrong += run - scipy.stats.t.isf(rate, min(free, 1e9)) * math.sqrt(variance) > 0
    assert wrong / trials == pytest.approx(rate, abs=0.006)
