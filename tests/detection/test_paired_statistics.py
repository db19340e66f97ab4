"""Scores, intervals and p-values of paired counts against loops, exact enumeration and scipy."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moe_lens.detection.paired_counts import PairedCounts
from moe_lens.detection.paired_statistics import (
    bootstrap_scores,
    check_settings,
    interval,
    q_values,
    score,
    sign_flip_p,
)
from moe_lens.errors import DataError

NAMES = ["risk_difference", "log_odds_ratio", "probability_difference", "paired_t"]
seeds = st.integers(0, 10**6)


def random_counts(
    seed: int, n_units: int = 7, n_experts: int = 5, equal_lengths: bool = False
) -> PairedCounts:
    """Expert 0 never fires, expert 1 always."""
    generator = np.random.default_rng(seed)
    tokens_1 = generator.integers(3, 20, n_units)
    tokens_2 = tokens_1 if equal_lengths else generator.integers(3, 20, n_units)
    rates = generator.uniform(0.05, 0.9, (2, n_units, n_experts))
    sums = [
        generator.binomial(tokens[:, None], rate)
        for tokens, rate in zip((tokens_1, tokens_2), rates, strict=True)
    ]
    for one, tokens in zip(sums, (tokens_1, tokens_2), strict=True):
        one[:, 0], one[:, 1] = 0, tokens
    return PairedCounts.of_pairs(sums[0], tokens_1, sums[1], tokens_2)


def rows(counts: PairedCounts, chosen: list[int]) -> PairedCounts:
    return PairedCounts.of_pairs(
        counts.sums_1[chosen], counts.tokens_1[chosen], counts.sums_2[chosen], counts.tokens_2[chosen]
    )


def slow_score(name: str, counts: PairedCounts, expert: int) -> float:
    """One expert, from plain sums."""
    a1, a2 = sum(counts.sums_1[:, expert].tolist()), sum(counts.sums_2[:, expert].tolist())
    n1, n2 = sum(counts.tokens_1.tolist()), sum(counts.tokens_2.tolist())
    if name == "log_odds_ratio":
        odds_1, odds_2 = (a1 + 0.5) / (n1 - a1 + 0.5), (a2 + 0.5) / (n2 - a2 + 0.5)
        return 0.0 if a1 == a2 == 0 or (a1, a2) == (n1, n2) else math.log(odds_1 / odds_2)
    if name == "paired_t":
        first, second = (
            counts.sums_1[:, expert] / counts.tokens_1,
            counts.sums_2[:, expert] / counts.tokens_2,
        )
        return 0.0 if np.array_equal(first, second) else float(stats.ttest_rel(first, second).statistic)
    return (a1 * n2 - a2 * n1) / (n1 * n2)


def exact_flips(contributions: np.ndarray) -> float:
    """Share of all 2^n sign flips whose sum is at least as large."""
    size = abs(contributions.sum())
    flips = [abs(np.dot(s, contributions)) for s in itertools.product((-1, 1), repeat=len(contributions))]
    return float(np.mean(np.array(flips) >= size - 1e-9))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(2, 9))
def test_scores_are_their_formulas(name: str, seed: int, n_units: int) -> None:
    counts = random_counts(seed, n_units)
    expected = [slow_score(name, counts, expert) for expert in range(5)]
    capped = np.clip(expected, -1e6, 1e6)
    np.testing.assert_allclose(score(name, counts), capped, rtol=1e-9, atol=1e-12)


def test_paired_t_where_all_units_differ_alike() -> None:
    counts = PairedCounts.of_pairs([[3, 1, 2]] * 4, [10] * 4, [[2, 1, 3]] * 4, [10] * 4)
    assert score("paired_t", counts).tolist() == [1e6, 0.0, -1e6]
    low, high = interval("paired_t", counts)
    assert low.tolist() == high.tolist() == [1e6, 0.0, -1e6]


@pytest.mark.parametrize("name", NAMES)
def test_swapping_the_conditions_negates_scores_and_intervals(name: str) -> None:
    counts = random_counts(3, 14)
    swapped = PairedCounts.of_pairs(counts.sums_2, counts.tokens_2, counts.sums_1, counts.tokens_1)
    np.testing.assert_allclose(score(name, counts), -score(name, swapped), atol=1e-12)
    low, high = interval(name, counts)
    swapped_low, swapped_high = interval(name, swapped)
    np.testing.assert_allclose(low, -swapped_high, atol=1e-12)
    np.testing.assert_allclose(high, -swapped_low, atol=1e-12)
    np.testing.assert_allclose(sign_flip_p(name, counts), sign_flip_p(name, swapped), rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_the_bootstrap_is_the_score_of_the_units_drawn(name: str) -> None:
    counts = random_counts(5, 6)
    resampled = bootstrap_scores(name, counts, n_resamples=30, seed=4)
    assert resampled.shape == (30, 5)
    assert resampled.dtype == np.float32
    drawn = np.random.default_rng(4).multinomial(6, [1 / 6] * 6, 30)
    for row, weights in zip(resampled, drawn, strict=True):
        sample = rows(counts, np.repeat(np.arange(6), weights).tolist())
        np.testing.assert_allclose(row, score(name, sample), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(2, 30))
def test_intervals_hold_the_score_and_grow_with_the_level(name: str, seed: int, n_units: int) -> None:
    counts = random_counts(seed, n_units)
    narrow, wide = (interval(name, counts, level=level, n_resamples=200) for level in (0.8, 0.99))
    shown = score(name, counts)
    slack = 1e-9 * (1 + np.abs(shown))
    assert (wide[0] <= narrow[0] + slack).all()
    assert (narrow[0] <= shown + slack).all()
    assert (shown <= narrow[1] + slack).all()
    assert (narrow[1] <= wide[1] + slack).all()
    if name in ("risk_difference", "probability_difference"):
        assert (wide[0] >= -1).all()
        assert (wide[1] <= 1).all()


def leave_one_out_error(name: str, counts: PairedCounts, expert: int) -> float:
    n = counts.n_units
    left = [
        slow_score(name, rows(counts, [row for row in range(n) if row != out]), expert) for out in range(n)
    ]
    return math.sqrt((n - 1) / n * sum((one - np.mean(left)) ** 2 for one in left))


def test_the_interval_reaches_as_far_as_the_jackknife_and_as_the_widened_percentiles() -> None:
    counts = random_counts(8, 12)
    low, high = interval("risk_difference", counts, level=0.9, n_resamples=500, seed=2)
    t = stats.t.isf(0.05, 11)
    tail = stats.norm.sf(t * math.sqrt(12 / 11))
    resampled = bootstrap_scores("risk_difference", counts, 500, 2)
    for expert in range(2, 5):
        error = t * leave_one_out_error("risk_difference", counts, expert)
        centre = slow_score("risk_difference", counts, expert)
        percentiles = np.quantile(resampled[:, expert].astype(float), [tail, 1 - tail])
        assert low[expert] == pytest.approx(min(centre - error, percentiles[0]), abs=1e-6)
        assert high[expert] == pytest.approx(max(centre + error, percentiles[1]), abs=1e-6)


def test_the_interval_of_paired_t_is_that_of_the_mean_over_its_error() -> None:
    counts = random_counts(2, 200)
    differences = counts.rate_differences[:, 2]
    low, high = interval("paired_t", counts)
    known = stats.ttest_1samp(differences, 0).confidence_interval()
    error = differences.std(ddof=1) / math.sqrt(200)
    assert low[2] == pytest.approx(known.low / error, abs=0.3)  # the percentiles may reach a little further
    assert high[2] == pytest.approx(known.high / error, abs=0.3)
    assert low[2] <= known.low / error + 1e-9
    assert high[2] >= known.high / error - 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_that_never_fires_or_always_does_is_no_evidence(name: str) -> None:
    for n_units in (5, 40):
        counts = random_counts(1, n_units)
        low, high = interval(name, counts)
        assert score(name, counts)[:2].tolist() == low[:2].tolist() == high[:2].tolist() == [0, 0]
        assert sign_flip_p(name, counts)[:2].tolist() == [1, 1]


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(2, 9))
def test_few_units_get_the_exact_p_value(seed: int, n_units: int) -> None:
    counts = random_counts(seed, n_units, equal_lengths=True)
    total = counts.tokens_1.sum()
    risk, paired_t = sign_flip_p("risk_difference", counts), sign_flip_p("paired_t", counts)
    assert np.array_equal(risk, sign_flip_p("log_odds_ratio", counts))
    for expert in range(5):  # with equal lengths the pooled rate cancels
        plain = (counts.sums_1 - counts.sums_2)[:, expert] / total
        assert risk[expert] == pytest.approx(exact_flips(plain))
        assert paired_t[expert] == pytest.approx(exact_flips(counts.rate_differences[:, expert]))


def test_contributions_with_unequal_lengths_take_the_pooled_rate_off() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(20, 90, (2, 8)).astype(float)
    sums = np.floor(tokens * generator.uniform(0.3, 0.7, (2, 8)))
    counts = PairedCounts.of_pairs(sums[0][:, None], tokens[0], sums[1][:, None], tokens[1])
    pooled = sums.sum() / tokens.sum()
    each = (sums[0] - pooled * tokens[0]) / tokens[0].sum() - (sums[1] - pooled * tokens[1]) / tokens[1].sum()
    assert each.sum() == pytest.approx(score("risk_difference", counts)[0])
    assert sign_flip_p("risk_difference", counts)[0] == pytest.approx(exact_flips(each))


def test_random_flips_agree_with_all_of_them() -> None:
    counts = random_counts(6, 14, 8, equal_lengths=True)
    p = sign_flip_p("paired_t", counts, n_permutations=20000, seed=1)
    for expert in range(8):
        exact = exact_flips(counts.rate_differences[:, expert])
        assert p[expert] == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 20000) + 2e-4)


@pytest.mark.parametrize("m", [13, 20, 60])
def test_units_that_all_agree_reach_their_smallest_p_value(m: int) -> None:
    quiet = 5  # units in which nothing differs carry no evidence
    sums = np.array([[1.0]] * m + [[0.0]] * quiet)
    counts = PairedCounts.of_pairs(sums, [4] * (m + quiet), 0 * sums, [4] * (m + quiet))
    p = sign_flip_p("risk_difference", counts)[0]
    smallest = 2 * 0.5**m
    assert smallest <= p <= max(smallest * 1.0001, 2 / 1001)
    if m > 13:
        assert p == pytest.approx(smallest, rel=1e-3)


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_the_bound_is_never_below_the_exact_p_value(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n_units, tokens = 15, np.full(15, 50)
    second = generator.integers(0, 20, (n_units, 3))
    first = second + generator.integers(0, 15, (n_units, 3)) - np.array([0, 1, 2])
    first = np.clip(first, 0, 50)
    p = sign_flip_p(
        "paired_t", PairedCounts.of_pairs(first, tokens, second, tokens), n_permutations=1000, seed=seed
    )
    for expert in range(3):
        if p[expert] < 1 / 1001:
            exact = exact_flips((first - second)[:, expert] / 50)
            assert exact <= p[expert] * (1 + 1e-9) <= 60 * exact


def test_overwhelming_evidence_gives_a_positive_p_value() -> None:
    counts = PairedCounts.of_pairs(
        np.full((3000, 1), 3), np.full(3000, 4), np.zeros((3000, 1)), np.full(3000, 4)
    )
    p = sign_flip_p("risk_difference", counts)
    assert 0 < p[0] < 1e-300


def test_few_events_in_unequal_prompts_are_no_better_than_a_binomial_test() -> None:
    """Ten events in 20 long prompts, none in 20 short ones: 10 of 11 tokens are in the long ones anyhow."""
    sums = np.zeros((20, 1))
    sums[:10] = 1
    long, short = np.full(20, 160), np.full(20, 16)
    p = sign_flip_p("risk_difference", PairedCounts.of_pairs(sums, long, 0 * sums, short))[0]
    assert p == pytest.approx(min(1, 2 * (10 / 11) ** 10))
    equal = PairedCounts.of_pairs(sums, long, 0 * sums, long)
    p = sign_flip_p("risk_difference", equal, n_permutations=20000)[0]
    assert p == pytest.approx(2 * 0.5**10, abs=1.5e-3)


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_does_not_depend_on_its_neighbours_and_a_seed_repeats(name: str, monkeypatch) -> None:
    counts = random_counts(9, 30, 40)
    alone = PairedCounts.of_pairs(
        counts.sums_1[:, 7:9], counts.tokens_1, counts.sums_2[:, 7:9], counts.tokens_2
    )
    whole = (*interval(name, counts, seed=3), sign_flip_p(name, counts, seed=3))
    for one, own in zip(
        whole, (*interval(name, alone, seed=3), sign_flip_p(name, alone, seed=3)), strict=True
    ):
        np.testing.assert_allclose(one[7:9], own, rtol=1e-9)
    monkeypatch.setattr("moe_lens.detection.detecting.paired_statistics._CHUNK", 7000)  # 7 experts at a time
    again = (*interval(name, counts, seed=3), sign_flip_p(name, counts, seed=3))
    for one, own in zip(whole, again, strict=True):
        np.testing.assert_allclose(one, own, rtol=1e-9, atol=1e-12)
    assert not np.array_equal(whole[0], interval(name, counts, seed=4)[0])


def test_pairs_of_a_cluster_become_one_unit() -> None:
    pairs = random_counts(4, 5)
    clusters = ["b", "a", "b", "c", "a"]
    units = PairedCounts.of_pairs(pairs.sums_1, pairs.tokens_1, pairs.sums_2, pairs.tokens_2, clusters)
    for row, members in enumerate(([0, 2], [1, 4], [3])):  # in the order of their first pairs
        assert np.array_equal(units.sums_1[row], pairs.sums_1[members].sum(0))
        assert np.array_equal(units.sums_2[row], pairs.sums_2[members].sum(0))
        assert (units.tokens_1[row], units.tokens_2[row]) == (
            pairs.tokens_1[members].sum(),
            pairs.tokens_2[members].sum(),
        )
        np.testing.assert_allclose(units.rate_differences[row], pairs.rate_differences[members].mean(0))
    assert units.n_units == 3
    np.testing.assert_allclose(score("risk_difference", units), score("risk_difference", pairs), atol=1e-15)


def test_repeating_every_pair_within_its_cluster_adds_no_evidence() -> None:
    one = random_counts(11, 25)
    parts = {name: np.repeat(part, 4, 0) for name, part in vars(one).items() if part is not None}
    four = PairedCounts.of_pairs(**parts, clusters=[pair // 4 for pair in range(100)])
    for name in ("risk_difference", "paired_t"):
        # experts 2 to 4: enough events not to be held to the test of few events
        np.testing.assert_allclose(sign_flip_p(name, one)[2:], sign_flip_p(name, four)[2:], rtol=1e-6)
        np.testing.assert_allclose(interval(name, one), interval(name, four), rtol=1e-6, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_q_values_are_benjamini_and_hochbergs(p: list[float]) -> None:
    q = q_values(p)
    for own, one in zip(p, q, strict=True):
        candidates = [other * len(p) / sum(x <= other for x in p) for other in p if other >= own]
        assert one == pytest.approx(min(1, *candidates, 1.0))


FINE = {"sums_1": [[1.0], [2]], "tokens_1": [3, 3], "sums_2": [[0], [1]], "tokens_2": [4, 4]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sums_1": [1, 2]}, r"sums_1 must be \[unit expert\]"),
        ({"sums_1": np.zeros((0, 3))}, "at least one of each"),
        ({"sums_2": [[0]]}, "sums_2 has shape"),
        ({"tokens_2": [4]}, "tokens_2 has shape"),
        ({"sums_1": [[np.nan], [1]]}, "sums_1 holds NaN"),
        ({"tokens_1": [3, math.inf]}, "tokens_1 holds NaN or infinite"),
        ({"sums_2": [[0], [-1]]}, "must not be negative"),
        ({"tokens_1": [3, 0]}, "Unit 1 has no counted tokens under condition 1"),
        ({"sums_1": [[1], [5]]}, r"sums_1\[1, 0\] is 5, above"),
        ({"sums_1": [["a"], [1]]}, "sums_1 must be an array of numbers"),
        ({"sums_1": [[1], [2, 3]]}, "sums_1 must be an array of numbers"),
    ],
)
def test_counts_that_cannot_be_are_refused(change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PairedCounts.of_pairs(**(FINE | change))


@pytest.mark.parametrize(("clusters", "message"), [([1], "as many cluster"), ([[1], [2]], "list of labels")])
def test_clusters_that_fit_no_pairs_are_refused(clusters: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PairedCounts.of_pairs(**FINE, clusters=clusters)


def test_one_unit_says_nothing_of_chance() -> None:
    counts = PairedCounts.of_pairs([[1.0]], [3], [[0]], [4])
    assert score("risk_difference", counts).tolist() == [1 / 3]
    for ask in (
        lambda: score("paired_t", counts),
        lambda: interval("risk_difference", counts),
        lambda: sign_flip_p("risk_difference", counts),
        lambda: bootstrap_scores("risk_difference", counts),
    ):
        with pytest.raises(DataError, match=r"at least 2 independent units.*about 20"):
            ask()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "odds"}, "risk_difference, log_odds_ratio, probability_difference, paired_t"),
        ({"name": 3}, "There is no score 3"),
        ({"level": 95}, "level must be"),
        ({"level": 1.0}, "level must be"),
        ({"level": "0.95"}, "level must be"),
        ({"level": math.nan}, "level must be"),
        ({"n_resamples": 0}, "n_resamples must be"),
        ({"n_permutations": 2.5}, "n_permutations must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_settings(**({"name": "paired_t"} | wrong))


@pytest.mark.parametrize("p", [[], [0.5, 1.5], [-0.1], [math.nan], [[0.1]], ["x"]])
def test_q_values_need_p_values(p: list) -> None:
    with pytest.raises(DataError, match="p "):
        q_values(p)
