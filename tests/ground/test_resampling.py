"""Intervals from sums over units: strata, too few units, and how often they hold the truth."""

import numpy as np
import pytest

from moe_lens.errors import DataError
from moe_lens.resampling import clustered_interval, interval_of


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
    chosen, total = (
        np.array([[1.0, 0.0], [0.0, 0.0], [3.0, 0.0]]),
        np.array([[2.0, 0.0], [0.0, 0.0], [4.0, 0.0]]),
    )
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
    assert clustered_interval(np.array([1.0, 2.0]), ["a", "a"]) == (1.5, 1.5)
