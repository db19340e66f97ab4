"""The number of clusters that is promised to be enough is enough, by brute force through the test itself."""

import numpy as np
import pytest
import torch

from moe_lens.detection import (
    AssumedRouting,
    ExpertScores,
    PairedCounts,
    UnpairedCounts,
    compare_routing,
    permutation_p,
    q_values,
    required_pairs,
    risk_difference,
    sign_flip_p,
)
from moe_lens.errors import DataError
from moe_lens.shape import MoEShape
from moe_lens.statistics.counts import PromptCounts
from moe_lens.statistics.routing_stats import RoutingStats
from tests.families import broad

N_TOKENS, N_EXPERTS = 20, 64


def drawn(
    generator: np.random.Generator, rates: np.ndarray, n: int, correlation: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    scale, size = 1 / correlation - 1, (n, len(rates))
    chosen = generator.beta(np.broadcast_to(rates * scale, size), np.broadcast_to((1 - rates) * scale, size))
    return generator.binomial(N_TOKENS, chosen).astype(float), np.full(n, float(N_TOKENS))


def power_of(n_clusters: int, effect: float, n_affected: int, paired: bool, n_sets: int) -> float:
    """Share of affected experts with q ≤ 0.05 among all, in data sets drawn anew."""
    generator, found = np.random.default_rng(9), []
    rates_2 = np.full(N_EXPERTS, 0.1)
    rates_1 = rates_2.copy()
    rates_1[:n_affected] += effect
    for seed in range(n_sets):
        if paired:
            sides = drawn(generator, rates_1, n_clusters), drawn(generator, rates_2, n_clusters)
            p = sign_flip_p("risk_difference", PairedCounts.of_pairs(*sides[0], *sides[1]), seed=seed)
        else:
            halves = (n_clusters + 1) // 2, n_clusters // 2
            sides = drawn(generator, rates_1, halves[0]), drawn(generator, rates_2, halves[1])
            p = permutation_p("risk_difference", UnpairedCounts.of_prompts(*sides[0], *sides[1]), seed=seed)
        found.append((q_values(p)[:n_affected] <= 0.05).mean())
    return float(np.mean(found))


def pilot(n: int, n_experts: int = 8, seed: int = 0) -> ExpertScores:
    """k = 1 and 8 experts: rates of about 0.125, Dirichlet-multinomial within prompts."""
    sides = []
    for number in range(2):
        generator = np.random.default_rng([seed, number])
        shares = generator.dirichlet(np.full(n_experts, 9 / n_experts), n)  # correlation 1 / (9 + 1)
        counts = np.stack([generator.multinomial(N_TOKENS, share) for share in shares])[:, None, :]
        total = torch.from_numpy(counts.sum(0))
        sums = total.double()
        table = PromptCounts(
            torch.full((n,), N_TOKENS), torch.from_numpy(counts.astype(np.uint8)),
            torch.from_numpy((counts * 0.5).astype(np.float32)),
        )  # fmt: skip
        shape = MoEShape("synthetic", (0,), n_experts, 1)
        sides.append(RoutingStats(shape, n * N_TOKENS, total, 0.5 * sums, 0.7 * sums, per_prompt=table))
    return compare_routing(sides[0], sides[1], n_resamples=20)


@broad
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("n_affected", [1, 8])
def test_the_promised_power_is_reached(paired: bool, n_affected: int) -> None:
    assumed = AssumedRouting(0.1, N_TOKENS, 0.1, N_EXPERTS, paired)
    needed = required_pairs(assumed, effect=0.15, n_affected=n_affected, n_simulations=300)
    assert needed.n_clusters is not None
    reached = power_of(needed.n_clusters, 0.15, n_affected, paired, 150)
    assert 0.8 - 0.1 <= reached <= 0.8 + 0.14  # 3 standard errors of both; discoveries help each other
    assert power_of(needed.n_clusters // 2, 0.15, n_affected, paired, 60) < 0.6


@broad
def test_a_pilot_promises_what_the_process_behind_it_keeps() -> None:
    """The pilot's rates (1/8) and correlation are those of `AssumedRouting`, which knows them."""
    known = required_pairs(AssumedRouting(0.125, N_TOKENS, 0.1, 8), effect=0.15, n_simulations=400).n_clusters
    told = [required_pairs(pilot(60, seed=seed), effect=0.15).n_clusters for seed in range(5)]
    assert known is not None
    assert abs(np.mean([number or 0 for number in told]) / known - 1) < 0.2


@broad
def test_larger_effects_and_more_affected_experts_need_fewer_clusters() -> None:
    scores = pilot(40)

    def needed(**changes: float) -> int:
        result = required_pairs(scores, n_simulations=60, **{"effect": 0.2, **changes})  # type: ignore[arg-type]
        assert result.n_clusters is not None
        return result.n_clusters

    assert needed(effect=0.4) < needed() < needed(effect=0.1)
    assert needed(n_affected=6) < needed() < needed(power=0.95)
    result = required_pairs(scores, effect=0.2, n_simulations=20)
    assert [row.share for row in result.rows] == [0.1, 0.5, 0.9]
    assert result.n_prompts == result.n_clusters
    assert list(result.to_dataframe().columns) == ["share", "layer", "expert", "rate", "n_clusters", "power"]
    assert "difference of rates 0.2, power 0.8" in repr(result)


def test_what_cannot_be_reached_is_said() -> None:
    scores = pilot(20)
    out_of_reach = required_pairs(scores, effect=0.01, most=30, n_simulations=10)
    assert out_of_reach.n_clusters is None
    assert out_of_reach.n_prompts is None
    assert "too many" in repr(out_of_reach)
    for options, words in (
        ({"effect": 1.5}, "effect must be"),
        ({"effect": 0.99}, "cannot differ by"),
        ({"effect": 0.1, "power": 1.0}, "power must be"),
        ({"effect": 0.1, "n_affected": 9}, "n_affected must be"),
    ):
        with pytest.raises(DataError, match=words):
            required_pairs(scores, **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no evidence"):
        required_pairs(risk_difference(scores.stats_1, scores.stats_2), effect=0.1)
    with pytest.raises(DataError, match="cannot grow"):
        required_pairs(AssumedRouting(0.9, 20, 0.1, 8), effect=0.2)
