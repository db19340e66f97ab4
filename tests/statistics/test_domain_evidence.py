"""Evidence on divergences between groups: by brute force, and held against a router with known answers."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import false_discovery_control, t

from moe_lens.errors import DataError
from moe_lens.shape import MoEShape
from moe_lens.statistics.balance import domain_specialisation
from moe_lens.statistics.counts import PromptCounts, compact
from moe_lens.statistics.domain_evidence import clustered, domain_evidence
from moe_lens.statistics.routing_stats import RoutingStats
from tests.families import broad


def routed(
    generator: np.random.Generator, logits: np.ndarray, n_prompts: int, length: float = 20, own: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Counts [prompt 1 expert] and choices [prompt] of top-2 of logits + prompt effects + Gumbel noise."""
    tokens = np.maximum(3, length * np.exp(0.5 * generator.normal(size=n_prompts))).astype(int)
    prompt = np.repeat(np.arange(n_prompts), tokens)
    effects = logits + generator.normal(0, own, (n_prompts, len(logits)))
    noisy = effects[prompt] + generator.gumbel(size=(len(prompt), len(logits)))
    chosen = np.argpartition(-noisy, 2, axis=1)[:, :2]
    size = n_prompts * len(logits)
    counts = np.bincount((prompt[:, None] * len(logits) + chosen).ravel(), minlength=size)
    return counts.reshape(n_prompts, 1, len(logits)).astype(float), 2.0 * tokens


def stats_of(counts: np.ndarray, choices: np.ndarray) -> RoutingStats:
    table, tokens = torch.from_numpy(counts).long(), torch.from_numpy(choices / 2).long()
    zeros = torch.zeros(table.shape[1:], dtype=torch.float64)
    shape = MoEShape("m", tuple(range(table.shape[1])), table.shape[2], 2)
    per_prompt = PromptCounts(tokens, compact(table), torch.zeros(table.shape))
    return RoutingStats(shape, int(tokens.sum()), table.sum(0), zeros, zeros, per_prompt=per_prompt)


def divergence(groups: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean KL divergence to the mixture, prompt sums by loops."""
    shares = [counts[:, 0].sum(0) / choices.sum() for counts, choices in groups]
    mixture = np.mean(shares, axis=0)
    parts = [sum(p * np.log(p / m) for p, m in zip(s, mixture, strict=True) if p > 0) for s in shares]
    return float(np.mean(parts))


def chance(groups: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """What is left of a divergence whose groups differ by chance, prompt by prompt."""
    mixture = np.mean([c[:, 0].sum(0) / n.sum() for c, n in groups], axis=0)
    total, w = 0.0, 1 / len(groups)
    for counts, choices in groups:
        rate, n = counts[:, 0].sum(0) / choices.sum(), len(choices)
        squares = np.sum([(c - rate * k) ** 2 for c, k in zip(counts[:, 0], choices, strict=True)], axis=0)
        total += w * (1 - w) * (n / (n - 1) * squares / choices.sum() ** 2 / mixture).sum()
    return total / 2


@pytest.mark.parametrize("sizes", [(12, 20), (9, 15, 12)])
def test_bias_interval_and_p_are_those_of_loops(sizes: tuple[int, ...]) -> None:
    generator = np.random.default_rng(2)
    logits = np.linspace(-1, 1, 6)
    groups = [routed(generator, logits + generator.normal(0, 0.4, 6), n) for n in sizes]
    found = domain_specialisation(
        {str(n): stats_of(*group) for n, group in enumerate(groups)}, n_resamples=4000, n_permutations=4000
    )
    assert found.evidence is not None
    assert float(found.divergence) == pytest.approx(divergence(groups))
    some, resampled, statistics = np.random.default_rng(5), [], []
    everything = np.concatenate([c for c, _ in groups]), np.concatenate([n for _, n in groups])
    cuts = np.cumsum(sizes)[:-1]
    for _ in range(800):
        rows = [some.integers(0, n, n) for n in sizes]
        resampled.append(divergence([(c[r], n[r]) for r, (c, n) in zip(rows, groups, strict=True)]))
        order = some.permutation(sum(sizes))
        parts = [(everything[0][r], everything[1][r]) for r in np.split(order, cuts)]
        statistics.append(divergence(parts) / chance(parts))
    spread = float(np.std(resampled))
    bias = np.mean(resampled) - divergence(groups)
    assert float(found.evidence.corrected) == pytest.approx(divergence(groups) - bias, abs=0.15 * spread)
    width = float(found.evidence.high - found.evidence.corrected)
    n = min(sizes)
    assert width == pytest.approx(t.ppf(0.975, n - 1) * spread * (n / (n - 1)) ** 0.5, rel=0.1)
    share = np.mean(np.array(statistics) >= divergence(groups) / chance(groups))
    assert abs(float(found.evidence.p) - share) <= 4 * np.sqrt(share * (1 - share) / 800) + 2e-3


def test_layers_are_tested_together_and_a_seed_repeats() -> None:
    generator = np.random.default_rng(0)
    base = np.linspace(-1, 1, 8)
    one = [routed(generator, base, 30) for _ in range(1)] * 3
    two = [routed(generator, base + shift, 25) for shift in (0.0, np.eye(8)[0] * 3, np.eye(8)[1])]
    counts_1 = np.concatenate([c for c, _ in one], axis=1)
    choices = two[0][1]
    counts_2 = np.concatenate([two[0][0], *(np.roll(two[0][0], places, axis=2) for places in (1, 4))], axis=1)
    groups = {"a": stats_of(counts_1, one[0][1]), "b": stats_of(counts_2, choices)}
    found, again = (domain_specialisation(groups, n_resamples=200).evidence for _ in range(2))
    other = domain_specialisation(groups, n_resamples=200, seed=1).evidence
    assert found is not None
    assert again is not None
    assert other is not None
    np.testing.assert_allclose(found.q, false_discovery_control(found.p.numpy()))
    assert float(found.q[2]) <= 0.01  # the experts' order turned round
    assert torch.equal(found.low, again.low)
    assert not torch.equal(found.high, other.high)
    assert found.to_dataframe()["layer"].tolist() == [0, 1, 2]
    assert bool((found.low[found.p > 0.05] == 0).all())


def test_prompts_of_one_cluster_are_one_unit() -> None:
    generator = np.random.default_rng(1)
    once = [routed(generator, np.linspace(-1, 1, 5) + shift, n) for n, shift in ((12, 0.0), (17, 0.3))]
    five = {
        name: stats_of(np.repeat(counts, 5, axis=0), np.repeat(choices, 5))
        for name, (counts, choices) in zip("ab", once, strict=True)
    }
    labels = {
        name: [f"{name}{n // 5:02}" for n in range(5 * len(once[row][1]))] for row, name in enumerate("ab")
    }
    clustered_, single = (
        domain_specialisation(groups, clusters=given).evidence
        for groups, given in (
            (five, labels),
            ({name: stats_of(*group) for name, group in zip("ab", once, strict=True)}, None),
        )
    )
    assert clustered_ is not None
    assert single is not None
    assert clustered_.n_units == single.n_units == (12, 17)
    for name in ("corrected", "low", "high", "p"):
        torch.testing.assert_close(getattr(clustered_, name), getattr(single, name))


def test_units_without_tokens_are_left_out() -> None:
    counts = np.array([[[1, 0]], [[0, 0]], [[0, 1]]])
    summed, choices = clustered(counts, np.array([1, 0, 1]), ["a", "b", "a"])
    assert (summed.tolist(), choices.tolist()) == ([[[1.0, 1.0]]], [2.0])


def test_without_counts_of_prompts_there_is_no_evidence_and_it_is_said() -> None:
    generator = np.random.default_rng(0)
    one, two = (stats_of(*routed(generator, np.zeros(4), 5)) for _ in range(2))
    found = domain_specialisation({"a": one.summary(), "b": two})
    assert found.evidence is None
    assert "no intervals" in found.summary()
    assert "of 1 layers" in domain_specialisation({"a": one, "b": two}).summary()


def test_too_few_prompts_for_any_small_p_are_said() -> None:
    generator = np.random.default_rng(0)
    few, more = ({n: stats_of(*routed(generator, np.zeros(4), size)) for n in "ab"} for size in (3, 4))
    with pytest.warns(UserWarning, match=r"3 / 3 units .* no p-value below 0\.1;"):  # 2 of 20 ways
        found = domain_specialisation(few).evidence
    assert found is not None
    assert float(found.p) > 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        domain_specialisation(more)  # 2 of 70


def test_groups_that_are_the_same_prompts_do_not_differ() -> None:
    one = stats_of(*routed(np.random.default_rng(0), np.zeros(4), 9))
    found = domain_specialisation({"a": one, "b": one}).evidence
    assert found is not None
    assert (float(found.p), float(found.low)) == (1, 0)


def test_clusters_and_settings_that_do_not_fit_are_refused() -> None:
    generator = np.random.default_rng(0)
    one, two = (stats_of(*routed(generator, np.zeros(4), 3)) for _ in range(2))
    groups = {"a": one, "b": two}
    refused: list[tuple[Any, str]] = [
        ({"clusters": {"a": "xyz"}}, "names of the groups"),
        ({"clusters": {"a": "xyz", "b": "uv"}}, "3 prompts and 2 clusters"),
        ({"clusters": {"a": "xyz", "b": "zuv"}}, "in the groups 'a' and 'b'"),
        ({"clusters": {"a": "xxx", "b": "uvw"}}, "one cluster only"),
        ({"level": 1.0}, "level"),
        ({"n_resamples": 1}, "n_resamples"),
        ({"n_permutations": 0}, "n_permutations"),
    ]
    for options, words in refused:
        with pytest.raises(DataError, match=words):
            domain_specialisation(groups, **options)
    with pytest.raises(DataError, match="no counts per prompt"):
        domain_specialisation({"a": one.summary(), "b": two}, clusters={"a": "xyz", "b": "uvw"})


BASE = np.linspace(-1.5, 1.5, 16)
DESIGNS = [  # prompts, lengths, and how much prompts differ, of each group
    ((20, 20), (20, 20), (1.0, 1.0)),
    ((20, 60, 60), (20, 20, 60), (1.0, 1.0, 1.0)),
    ((50, 100), (20, 40), (0.7, 1.0)),
]


def repeated(groups: Any, truth: float, n_sets: int) -> tuple[float, float]:
    """Shares of data sets, from `groups(seed)`, whose 95 % interval holds the truth, and with p ≤ 0.05."""
    held, small = 0, 0
    for seed in range(n_sets):
        drawn = groups(seed)
        weights, shape = np.full(len(drawn), 1 / len(drawn)), MoEShape("m", (0,), 16, 2)
        found = domain_evidence(drawn, weights, shape, n_resamples=300, n_permutations=199, seed=seed)
        held += float(found.low) <= truth <= float(found.high)
        small += float(found.p) <= 0.05
    return held / n_sets, small / n_sets


@broad
@pytest.mark.parametrize("design", DESIGNS, ids=str)
@pytest.mark.parametrize("effect", [0.2, 0.5, 1.0])
def test_intervals_hold_the_truth_as_often_as_they_say(design: Any, effect: float) -> None:
    """Prompts are drawn from 5,000 of each group, whose divergence is the truth."""
    sizes, lengths, spreads = design
    generator = np.random.default_rng(sizes[0])
    populations = [
        routed(generator, BASE + generator.normal(0, effect, 16), 5000, length, own)
        for length, own in zip(lengths, spreads, strict=True)
    ]

    def groups(seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        rows = [generator.integers(0, 5000, n) for n in sizes]
        return [(c[r], n[r]) for r, (c, n) in zip(rows, populations, strict=True)]

    held, small = repeated(groups, divergence(populations), 200)
    assert held >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / 200)
    if effect == 1:
        assert small >= 0.9
        assert held < 1  # not so wide that it says nothing


@broad
@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_groups_that_are_alike_are_seldom_said_to_differ(design: Any) -> None:
    """Groups of other sizes and lengths, whose true shares are equal."""
    sizes, lengths, _ = design
    generator = np.random.default_rng(sizes[0])

    def groups(seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [routed(generator, BASE, n, length) for n, length in zip(sizes, lengths, strict=True)]

    held, small = repeated(groups, 0.0, 300)
    error = np.sqrt(0.95 * 0.05 / 300)
    assert held >= 0.95 - 3 * error
    assert 0.01 <= small <= 0.05 + 3 * error
