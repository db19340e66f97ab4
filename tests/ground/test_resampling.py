"""Intervals from sums over units: strata, too few units, and how often they hold the truth."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from moe_lens.errors import DataError
from moe_lens.resampling import FEW_UNITS, bounds_of, clustered_interval, in_words, interval_of


def test_a_ratio_is_held_about_as_often_as_the_level_says() -> None:
    rng = np.random.default_rng(0)
    for n_units, least in ((8, 0.85), (40, 0.9)):
        held = 0
        for _ in range(300):
            tokens = rng.integers(5, 30, n_units)
            events = rng.binomial(tokens, rng.beta(2, 6, n_units))
            low, high = interval_of(lambda a, n: a / n, [events, tokens], n_resamples=200)
            held += low <= 0.25 <= high
        assert least <= held / 300 <= 0.99


def test_strata_are_drawn_by_themselves() -> None:
    """Units of a stratum are alike, so a difference of strata does not vary; drawn together it would."""
    one, two = np.array([1.0, 1.0, 0.0, 0.0]), np.array([0.0, 0.0, 3.0, 3.0])
    low, high = interval_of(lambda a, b: a - b, [one, two], strata=np.array([0, 0, 1, 1]))
    assert (low, high) == (-4, -4)
    low, high = interval_of(lambda a, b: a - b, [one, two])
    assert low < -4 < high


def test_nan_draws_are_left_out_and_a_single_unit_has_no_interval() -> None:
    chosen, total = np.zeros((12, 2)), np.zeros((12, 2))
    chosen[[0, 2], 0], total[[0, 2], 0] = (1, 3), (2, 4)
    low, high = interval_of(lambda a, n: a / n, [chosen, total])
    assert 0.5 <= low[0] <= high[0] <= 0.75
    assert np.isnan([low[1], high[1]]).all()
    low, high = interval_of(lambda a: a, [chosen[:1]])
    assert np.isnan([*low, *high]).all()
    with pytest.raises(DataError, match="level must be a number between 0 and 1"):
        interval_of(lambda a: a, [chosen], level=95.0)  # not a share


def test_a_widened_mean_is_held_where_a_plain_one_is_not() -> None:
    """Ten clusters of four normal numbers that share half of their variance: percentiles are short."""
    rng = np.random.default_rng(1)
    labels = [str(number) for number in range(10) for _ in range(4)]
    held = plain = 0
    for _ in range(400):
        of_clusters = rng.normal(size=10)[:, None] + rng.normal(size=(10, 4))
        low, high = clustered_interval(of_clusters.ravel(), labels, n_resamples=400)
        held += low <= 0 <= high
        means = of_clusters.mean(1)[rng.integers(10, size=(400, 10))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        plain += low <= 0 <= high
    assert plain < 0.93 * 400 < held


def percentiles(draws: np.ndarray, n: int, level: float = 0.95) -> np.ndarray:
    """Expanded percentiles, by their formula."""
    t = stats.t.ppf((1 + level) / 2, n - 1)
    tail = stats.norm.cdf(-t * np.sqrt(n / (n - 1)))
    return np.quantile(draws, [tail, 1 - tail], axis=0)


@pytest.mark.parametrize("n_units", [10, 24])
def test_of_ten_units_or_more_the_bounds_are_percentiles_bit_for_bit(n_units: int) -> None:
    """Published numbers are of so many units; only fewer are widened further."""
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 5, n_units)
    labels = np.repeat([f"{number:02}" for number in range(n_units)], sizes)
    values = rng.exponential(size=len(labels))
    means = []
    for drawn in np.random.default_rng(7).integers(n_units, size=(500, n_units)):
        chosen = [values[labels == f"{number:02}"] for number in drawn]
        means.append(np.concatenate(chosen).mean())
    found = clustered_interval(values, list(labels), n_resamples=500, seed=7)
    assert found == pytest.approx(percentiles(np.array(means), n_units), rel=1e-12)

    events, tokens = rng.poisson(3.0, (n_units, 2)).astype(float), rng.integers(4, 9, n_units).astype(float)
    equal = np.full(n_units, 1 / n_units)
    weights = np.random.default_rng(7).multinomial(n_units, equal, 500).astype(float)
    expected = percentiles((weights @ events) / (weights @ tokens)[:, None], n_units)
    settings: Any = {"n_resamples": 500, "seed": 7}
    everyone = np.ones((n_units, 2), dtype=bool)
    for informs in (None, everyone):
        low, high = interval_of(lambda a, n: a / n[:, None], [events, tokens], informs=informs, **settings)
        assert np.array_equal(np.stack([low, high]), expected)
    assert FEW_UNITS == 10


def test_few_clusters_get_at_least_the_t_interval() -> None:
    """Of equal clusters scipy's own; a sandwich estimate by residuals where they differ."""
    values = np.array([0.2, 0.9, 0.4])
    low, high = clustered_interval(values, ["a", "b", "c"])
    mean, error = values.mean(), stats.sem(values)
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, mean, error))
    doubled = np.repeat(values, 2)  # the same three clusters, of two equal units each
    assert clustered_interval(doubled, list("aabbcc")) == pytest.approx((low, high))

    values, labels = np.array([1.0, 2.0, 6.0, 3.0, 5.0]), list("aaabc")
    residuals = values - values.mean()
    of_clusters = [residuals[:3].sum(), residuals[3], residuals[4]]
    error = np.sqrt(3 / 2 * np.square(of_clusters).sum()) / 5
    reach = stats.t.ppf(0.95, 2) * error
    low, high = clustered_interval(values, labels, level=0.9)
    assert low == pytest.approx(values.mean() - reach)
    assert high == 5.0 > values.mean() + reach  # a percentile: three times the last cluster


def test_few_units_of_a_ratio_get_at_least_t_times_the_deviation_of_the_draws() -> None:
    events, tokens = np.array([[1.0, 4.0], [2.0, 4.0], [5.0, 4.0]]), np.array([3.0, 4.0, 5.0])
    weights = np.random.default_rng(2).multinomial(3, np.full(3, 1 / 3), 800)
    draws = (weights @ events) / (weights @ tokens)[:, None]
    reach = stats.t.ppf(0.975, 2) * draws.std(0) * np.sqrt(3 / 2)
    ratio = events.sum(0) / 12
    low, high = interval_of(lambda a, n: a / n[:, None], [events, tokens], n_resamples=800, seed=2)
    assert low == pytest.approx(ratio - reach)
    assert high == pytest.approx(ratio + reach)
    limits = (0.5, 1.0)
    low, high = interval_of(lambda a, n: a / n[:, None], [events, tokens], n_resamples=800, limits=limits)
    assert (low == 0.5).all()
    assert (high == 1.0).all()


def test_few_normal_numbers_are_held_where_percentiles_alone_are_not() -> None:
    rng, held, plain = np.random.default_rng(4), 0, 0
    for seed in range(300):
        values = rng.normal(size=3)
        low, high = clustered_interval(values, list("abc"), n_resamples=200, seed=seed)
        held += low <= 0 <= high
        draws = values[np.random.default_rng(seed).integers(3, size=(200, 3))].mean(1)
        low, high = percentiles(draws, 3)
        plain += low <= 0 <= high
    assert plain < 0.85 * 300 < 0.92 * 300 < held


def test_one_cluster_has_no_interval() -> None:
    assert np.isnan(clustered_interval(np.array([0.0, 0.5, 1.0]), ["a", "a", "a"])).all()
    low, high = bounds_of(np.array([1.0, 2.0]), np.ones((5, 2)), np.array([1, 2]), 0.95)
    assert np.isnan([low[0], high[0]]).all()
    assert (low[1], high[1]) == (1, 2)  # draws of 1, an estimate of 2
    assert in_words(*clustered_interval(np.array([0.5]), ["a"])) == "[one cluster, no interval]"


def test_an_interval_is_worth_the_units_that_inform_it() -> None:
    """Twenty prompts; an expert that one chose has no interval, one that three chose that of three."""
    rng = np.random.default_rng(5)
    counts = np.zeros((20, 3))
    counts[4, 0] = 3
    counts[[2, 8, 11], 1] = 4
    counts[:, 2] = 2
    sums = counts * rng.normal(1, 0.3, (20, 3))
    low, high = interval_of(lambda a, n: a / n, [sums, counts], informs=counts > 0)
    assert np.isnan([low[0], high[0]]).all()
    kept = sums[[2, 8, 11], 1] / 4
    t_low, t_high = stats.t.interval(0.95, 2, kept.mean(), stats.sem(kept))
    assert low[1] < t_low + 0.1 * (t_high - t_low)
    assert high[1] > t_high - 0.1 * (t_high - t_low)
    plain = interval_of(lambda a, n: a / n, [sums, counts])
    assert plain[0][0] == plain[1][0]  # which says that nothing is unsure
    assert (low[2], high[2]) == (plain[0][2], plain[1][2])


def test_an_expert_of_few_prompts_is_held_about_as_often_as_the_level_says() -> None:
    rng, held, plain = np.random.default_rng(6), 0, 0
    for seed in range(200):
        tokens = np.zeros(20)
        tokens[:2] = rng.integers(1, 6, 2)
        sums = tokens * rng.normal(1, 0.3, 20)
        for informs in (None, tokens > 0):
            low, high = interval_of(
                lambda a, n: a / n, [sums, tokens], informs=informs, n_resamples=200, seed=seed
            )
            if informs is None:
                plain += low <= 1 <= high
            else:
                held += low <= 1 <= high
    assert plain < 0.65 * 200 < 0.89 * 200 < held
