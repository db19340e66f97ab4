"""Two groups of different prompts: intervals and p-values by brute force, honest about what they compare.

`python -m tests.detection.test_unpaired` prints the table of unpaired_statistics.py (a minute).
"""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens import organisms
from moe_lens.detection import (
    ExpertScores,
    PairedCounts,
    UnpairedCounts,
    bootstrap_scores,
    compare_routing,
    detect,
    interval,
    permutation_p,
    q_values,
    risk_difference,
    selection_stability,
    sign_flip_p,
    template_agreement,
)
from moe_lens.errors import DataError
from moe_lens.text import ContrastivePairs
from tests.detection.test_detecting import synthetic
from tests.families import broad

RATES = np.array([0.5, 0.3, 0.2]), np.array([0.3, 0.4, 0.3])


def beta_binomial(
    generator: np.random.Generator, rates: np.ndarray, n_prompts: int, length: float, correlation: float
) -> tuple[np.ndarray, np.ndarray]:
    """Events [prompt expert] and tokens [prompt] of prompts of different lengths."""
    tokens = np.maximum(3, length * np.exp(0.5 * generator.normal(size=n_prompts))).astype(int)
    scale, size = 1 / correlation - 1, (n_prompts, len(rates))
    chosen = generator.beta(np.broadcast_to(rates * scale, size), np.broadcast_to((1 - rates) * scale, size))
    return generator.binomial(tokens[:, None], chosen).astype(float), tokens.astype(float)


def welch(a: np.ndarray, n: np.ndarray, first: list[int]) -> float:
    """|difference of the rates| over its standard error, prompt by prompt."""
    rates, errors = [], []
    for group in (first, [i for i in range(len(a)) if i not in first]):
        rate = sum(a[i] for i in group) / sum(n[i] for i in group)
        squares = sum((a[i] - rate * n[i]) ** 2 for i in group)
        rates.append(rate)
        errors.append(squares * len(group) / (len(group) - 1) / sum(n[i] for i in group) ** 2)
    if abs(rates[0] - rates[1]) < 1e-12:
        return 0.0
    return float("inf") if sum(errors) < 1e-20 else abs(rates[0] - rates[1]) / sum(errors) ** 0.5


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), sizes=st.sampled_from([(4, 4), (3, 6), (2, 5), (6, 3)]))
def test_p_of_frequent_experts_counts_all_ways_to_choose_the_first_group(
    seed: int, sizes: tuple[int, int]
) -> None:
    generator = np.random.default_rng(seed)
    rates = np.array([0.5, 0.4, 0.6])
    one, two = (beta_binomial(generator, rates, size, 1000, 0.002) for size in sizes)
    counts = UnpairedCounts.of_prompts(*one, *two)
    p = permutation_p("risk_difference", counts)
    sums, tokens = np.concatenate([one[0], two[0]]), np.concatenate([one[1], two[1]])
    for expert in range(len(rates)):
        observed = welch(sums[:, expert], tokens, list(range(sizes[0])))
        ways = [welch(sums[:, expert], tokens, list(c)) for c in combinations(range(sum(sizes)), sizes[0])]
        assert p[expert] == pytest.approx(np.mean([way >= observed * (1 - 1e-9) for way in ways]))


def test_many_permutations_come_near_all_of_them() -> None:
    generator = np.random.default_rng(3)
    one, two = (beta_binomial(generator, np.full(6, 0.4), 9, 300, 0.02) for _ in range(2))
    counts = UnpairedCounts.of_prompts(*one, *two)
    few = permutation_p("risk_difference", counts, n_permutations=20_000)
    sums, tokens = np.concatenate([one[0], two[0]]), np.concatenate([one[1], two[1]])
    some = np.random.default_rng(0)
    for expert in range(6):
        observed = welch(sums[:, expert], tokens, list(range(9)))
        drawn = [welch(sums[:, expert], tokens, some.permutation(18)[:9].tolist()) for _ in range(1500)]
        share = np.mean([way >= observed for way in drawn])
        assert abs(few[expert] - share) <= 4 * np.sqrt(share * (1 - share) / 1500) + 1e-3


def test_each_group_is_resampled_by_itself() -> None:
    """The bootstrap's spread is √(Σ over groups of the variance of a resampled mean), written out."""
    generator = np.random.default_rng(0)
    one, two = generator.integers(0, 9, (12, 3)), generator.integers(0, 9, (30, 3))
    counts = UnpairedCounts.of_prompts(one, np.full(12, 8), two, np.full(30, 8))  # lengths alike: plain means
    drawn = bootstrap_scores("risk_difference", counts, n_resamples=20_000)
    expected = np.sqrt((one / 8).var(0) / 12 + (two / 8).var(0) / 30)
    np.testing.assert_allclose(drawn.std(0), expected, rtol=0.03)


def test_collections_of_other_sizes_are_compared_and_said_to_be_unpaired() -> None:
    one, two = synthetic(RATES[0], 17, 0), synthetic(RATES[1], 41, 1)
    scores = compare_routing(one, two)
    assert scores.evidence is not None
    assert not scores.evidence.is_paired
    assert "unpaired" in repr(scores)
    assert "unpaired, 17 and 41 prompts in 58 clusters" in scores.evidence.summary()
    assert torch.equal(scores.delta, risk_difference(one, two).delta)
    assert scores.low is not None
    assert scores.high is not None
    assert bool((scores.low <= scores.delta).all() and (scores.delta <= scores.high).all())
    assert float(scores.evidence.q[0, 0]) <= 0.001  # rates of 0.5 and 0.3
    with pytest.raises(DataError, match=r"got 17 and 41.*paired=False"):
        compare_routing(one, two, paired=True)


def test_as_many_prompts_are_pairs_unless_one_says_otherwise() -> None:
    one, two = synthetic(RATES[0], 20, 0), synthetic(RATES[1], 20, 1)
    kinds = [compare_routing(one, two, paired=paired).evidence for paired in (None, True, False)]
    assert [evidence.is_paired for evidence in kinds if evidence is not None] == [True, True, False]


def test_prompts_of_one_cluster_are_one_unit() -> None:
    """Every prompt written down five times gives no more evidence than once."""
    once = compare_routing(synthetic(RATES[0], 12, 0), synthetic(RATES[1], 25, 1))
    many = [synthetic(rate, n, seed) for rate, n, seed in zip(RATES, (12, 25), (0, 1), strict=True)]
    five = [stats + stats + stats + stats + stats for stats in many]
    labels = [f"{group}{row}" for group, n in (("a", 12), ("b", 25)) for row in range(n)]
    clustered = compare_routing(*five, clusters=(labels[:12] * 5, labels[12:] * 5))
    assert once.evidence is not None
    assert clustered.evidence is not None
    for name in ("low", "high", "p"):
        mine, theirs = getattr(clustered.evidence, name), getattr(once.evidence, name)
        assert torch.allclose(mine, theirs, atol=1e-6), name


def test_the_opposite_contrast_mirrors_the_evidence_and_files_keep_it(tmp_path: Path) -> None:
    one, two = synthetic(RATES[0], 17, 0), synthetic(RATES[1], 41, 1)
    scores = compare_routing(one, two)
    opposite, swapped = -scores, compare_routing(two, one)
    assert opposite.evidence is not None
    assert swapped.evidence is not None
    assert torch.equal(opposite.delta, swapped.delta)
    assert len(opposite.evidence.clusters) == 41
    opposite.save(tmp_path / "s.safetensors")
    back = ExpertScores.load(tmp_path / "s.safetensors")
    assert back.evidence is not None
    assert back.evidence.settings() == opposite.evidence.settings()
    assert repr(back) == repr(opposite)
    found = selection_stability(back, n=1).jaccard, selection_stability(opposite, n=1).jaccard
    assert np.array_equal(*found)


def test_right_against_wrong_answers_goes_from_outcomes_to_evidence() -> None:
    model, conflicts = organisms.load("null"), organisms.world("null").conflicts("detection")
    prompts = [c.open_book for c in conflicts] + [c.closed_book for c in conflicts[::2]]
    outcomes = [True] * len(conflicts) + [False] * len(conflicts[::2])
    questions = [c.entity for c in conflicts] + [c.entity for c in conflicts[::2]]
    groups = ContrastivePairs.from_outcomes(prompts, outcomes, span="last")
    scores = detect(model, groups, progress=False, n_resamples=50)
    assert scores.evidence is not None
    assert scores.alignment is None
    assert not scores.evidence.is_paired
    assert scores.stats_1.n_tokens == len(conflicts)
    across = ContrastivePairs.from_outcomes(prompts, outcomes, span="last", clusters=questions)
    both = detect(model, across, progress=False, n_resamples=50)
    assert both.evidence is not None
    assert both.evidence.clusters == tuple(c.entity for c in conflicts)
    assert torch.equal(both.delta, scores.delta)
    assert f"in {len(set(questions))} clusters" in both.evidence.summary()


def test_what_has_no_pairs_has_no_paired_score_and_no_templates() -> None:
    one, two = synthetic(RATES[0], 17, 0), synthetic(RATES[1], 41, 1)
    for options, words in (
        ({"score": "paired_t"}, "needs pairs"),
        ({"templates": ["a"] * 17}, "templates are labels of pairs"),
        ({"clusters": ["a"] * 17}, "two lists of clusters"),
        ({"clusters": (["a"] * 17, ["b"] * 41)}, "at least 2 independent units"),
        ({"clusters": "ab"}, "two lists of clusters"),
    ):
        with pytest.raises(DataError, match=words):
            compare_routing(one, two, **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no templates"):
        template_agreement(compare_routing(one, two))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sums_2": [[1.0, 2.0]]}, "as many experts"),
        ({"sums_1": [[5.0], [1.0]]}, "above the unit's 4"),
        ({"tokens_1": [4, 0], "sums_1": [[1.0], [0.0]]}, "has no counted tokens"),
        ({"clusters_1": ["a"]}, "as many cluster labels"),
        ({"sums_1": [[float("nan")], [1.0]]}, "NaN"),
    ],
)
def test_counts_that_cannot_be_are_refused(change: dict[str, Any], words: str) -> None:
    whole: dict[str, Any] = {
        "sums_1": [[1.0], [2.0]], "tokens_1": [4, 4], "sums_2": [[1.0]], "tokens_2": [4],
    }  # fmt: skip
    with pytest.raises(DataError, match=words):
        UnpairedCounts.of_prompts(**{**whole, **change})


def test_units_in_both_groups_are_resampled_together() -> None:
    """A difference that all units share has no spread, however much units differ."""
    generator = np.random.default_rng(0)
    base = generator.integers(0, 5, (30, 2)).astype(float)
    labels = [str(i) for i in range(30)]
    counts = UnpairedCounts.of_prompts(base + 2, np.full(30, 9), base, np.full(30, 9), labels, labels)
    low, high = interval("log_odds_ratio", counts)
    apart = UnpairedCounts.of_prompts(base + 2, np.full(30, 9), base, np.full(30, 9))
    wide = interval("log_odds_ratio", apart)
    assert (high - low < 0.5 * (wide[1] - wide[0])).all()
    assert (permutation_p("log_odds_ratio", counts) < 1e-6).all()


def test_groups_whose_units_are_all_in_both_are_tested_as_pairs_are() -> None:
    """Rare experts, which the guard for two groups would drown: u's two groups go together."""
    generator = np.random.default_rng(1)
    rates = generator.beta(0.3, 2.7, (20, 15))
    one = generator.binomial(20, np.minimum(rates + 0.1, 1)).astype(float)
    two = generator.binomial(20, rates).astype(float)
    labels, tokens = [str(i) for i in range(20)], np.full(20, 20)
    crossed = UnpairedCounts.of_prompts(one, tokens, two, tokens, labels, labels)
    pairs = PairedCounts.of_pairs(one, tokens, two, tokens, labels)
    p = permutation_p("risk_difference", crossed, seed=2)
    assert crossed.is_crossed
    assert np.array_equal(p, sign_flip_p("risk_difference", pairs, seed=2))
    found, expected = (interval("risk_difference", counts, seed=2) for counts in (crossed, pairs))
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])
    assert (p <= 0.05).mean() > 0.8
    some = UnpairedCounts.of_prompts(one, tokens, two, tokens, labels, [*labels[:19], "another"])
    assert not some.is_crossed
    assert not some.is_disjoint
    assert np.median(permutation_p("risk_difference", some, seed=2)) > 2 * np.median(p)


def test_crossed_groups_of_unequal_numbers_have_few_small_p_values_where_nothing_differs() -> None:
    """Twenty clusters of a prompt of one group and three of the other, prompts of a cluster alike."""
    generator, small, held = np.random.default_rng(2), [], []
    labels = [str(i) for i in range(20)]
    for seed in range(40):
        rates = generator.beta(0.5, 4.5, (20, 10))
        one = generator.binomial(20, rates).astype(float)
        two = generator.binomial(20, np.repeat(rates, 3, axis=0)).astype(float)
        counts = UnpairedCounts.of_prompts(
            one, np.full(20, 20), two, np.full(60, 20), labels, list(np.repeat(labels, 3))
        )
        small.append(permutation_p("risk_difference", counts, seed=seed, n_permutations=200) <= 0.05)
        low, high = interval("risk_difference", counts, seed=seed, n_resamples=200)
        held.append((low <= 0) & (high >= 0))
    assert 0.01 < np.mean(small) < 0.08
    assert 0.92 < np.mean(held) < 0.995


@pytest.mark.filterwarnings(
    "ignore:6 clusters give no p-value", "ignore:12 clusters give", "ignore:9 clusters give"
)
def test_scores_say_where_only_some_clusters_are_in_both_groups() -> None:
    one, two = (synthetic(np.array([0.4, 0.3, 0.2, 0.1]), 6, seed) for seed in (0, 1))
    labels = list("abcdef")
    for second, says in ((labels, False), (list("abcxyz"), True), (list("uvwxyz"), False)):
        scores = compare_routing(one, two, paired=False, clusters=[labels, second])
        assert scores.evidence is not None
        assert ("3 clusters in both: conservative" in scores.evidence.summary()) == says


DESIGNS = [  # prompts, lengths, correlations within prompts, of both groups
    ((20, 20), (20, 20), (0.1, 0.1)),
    ((10, 40), (20, 200), (0.1, 0.1)),
    ((50, 200), (20, 100), (0.05, 0.1)),
]
LADDER = np.geomspace(0.005, 0.5, 30)


def repeated(design: Any, rates_2: np.ndarray, n_sets: int) -> tuple[np.ndarray, np.ndarray]:
    """[expert] shares of data sets whose 95 % interval holds the difference, and with p ≤ 0.05."""
    sizes, lengths, correlations = design
    generator = np.random.default_rng(sizes[0])
    held, small = np.zeros(len(LADDER)), np.zeros(len(LADDER))
    for seed in range(n_sets):
        sides = [
            beta_binomial(generator, rates, size, length, correlation)
            for rates, size, length, correlation in zip(
                (LADDER, rates_2), sizes, lengths, correlations, strict=True
            )
        ]
        counts = UnpairedCounts.of_prompts(*sides[0], *sides[1])
        low, high = interval("risk_difference", counts, seed=seed, n_resamples=500)
        held += (low <= LADDER - rates_2) & (LADDER - rates_2 <= high)
        small += permutation_p("risk_difference", counts, seed=seed) <= 0.05
    return held / n_sets, small / n_sets


@broad
@pytest.mark.parametrize("design", DESIGNS, ids=str)
@pytest.mark.parametrize("differ", [False, True])
def test_intervals_hold_the_truth_as_often_as_they_say(design: Any, differ: bool) -> None:
    n_sets = 150
    rates_2 = np.roll(LADDER, 3) if differ else LADDER
    held, small = repeated(design, rates_2, n_sets)
    frequent = (LADDER >= 0.1) & (rates_2 >= 0.1)
    error = np.sqrt(0.95 * 0.05 / n_sets)
    assert abs(held[frequent].mean() - 0.95) <= 2 * error
    assert held[~frequent].mean() >= 0.95 - 2 * error  # rare ones: at least
    if not differ:
        for group in (frequent, ~frequent):
            assert small[group].mean() <= 0.05 + 2 * error
        assert small[frequent].mean() >= 0.02  # a test that never rejects would pass the rest


@broad
def test_the_corner_where_it_is_liberal_is_no_worse_than_the_docstring_says() -> None:
    """A small group whose prompts vary much; and the opposite, which is conservative."""
    held, small = repeated(((20, 80), (20, 20), (0.3, 0.05)), LADDER, 100)
    other_held, other_small = repeated(((80, 20), (20, 20), (0.3, 0.05)), LADDER, 100)
    for group in (LADDER >= 0.1, (LADDER >= 0.02) & (LADDER < 0.1)):
        assert held[group].mean() >= 0.87
        assert 0.05 < small[group].mean() <= 0.13
        assert other_held[group].mean() >= 0.95
        assert other_small[group].mean() <= 0.04


@broad
def test_no_more_false_discoveries_than_q_promises() -> None:
    generator, proportions, found = np.random.default_rng(0), [], []
    rates_2 = np.tile(LADDER, 10)
    rates_1 = rates_2.copy()
    raised = np.arange(20, 300, 30)  # rates of 0.11 and more, raised by 0.15
    rates_1[raised] += 0.15
    null = np.setdiff1d(np.arange(300), raised)
    for seed in range(60):
        one = beta_binomial(generator, rates_1, 60, 20, 0.1)
        two = beta_binomial(generator, rates_2, 90, 40, 0.1)
        chosen = (
            q_values(permutation_p("risk_difference", UnpairedCounts.of_prompts(*one, *two), seed=seed))
            <= 0.1
        )
        proportions.append(chosen[null].sum() / max(1, chosen.sum()))
        found.append(chosen[raised].mean())
    assert np.mean(proportions) <= 0.1 + 2 * np.std(proportions) / np.sqrt(60)
    assert np.mean(found) > 0.5


def main() -> None:
    """Print the table of the docstring of unpaired_statistics.py."""
    classes = LADDER >= 0.1, (LADDER >= 0.02) & (LADDER < 0.1), LADDER < 0.02
    table = [((20, 20), (0.1, 0.1)), ((20, 80), (0.1, 0.1)), ((200, 200), (0.1, 0.1))]
    table += [(sizes, (0.3, 0.05)) for sizes in ((20, 80), (80, 20))]
    for sizes, correlations in table:
        held, small = repeated((sizes, (20, 20), correlations), LADDER, 150)
        shown = [f"{100 * share[group].mean():5.1f}" for share in (held, small) for group in classes]
        print(sizes, correlations, *shown, flush=True)


if __name__ == "__main__":
    main()
