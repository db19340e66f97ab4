"""Domain preference against scipy's entropy, joined with effects; and effects by expert against loops."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from moe_lens import collect_routing, driver_experts, effects_by_expert, organisms, virtual_ablation
from moe_lens.errors import DataError
from moe_lens.shape import MoEShape
from moe_lens.statistics.routing_stats import RoutingStats

CONFLICTS = organisms.world("specialised").conflicts("detection")[:8]


def groups() -> dict[str, RoutingStats]:
    model = organisms.load("specialised")
    texts = {"document": [c.open_book for c in CONFLICTS], "memory": [c.closed_book for c in CONFLICTS]}
    return {n: collect_routing(model, t, per_prompt=True, progress=False) for n, t in texts.items()}


def test_preference_is_one_minus_entropy_and_both_is_the_intersection() -> None:
    stats, effect = groups(), torch.arange(32.0).reshape(4, 8).flip(0) - 10
    found = driver_experts(stats, effect, least_tokens=1)
    for row in range(4):
        for expert in range(8):
            rates = [float(s.rates[row, expert]) for s in stats.values()]
            if sum(rates):
                expected = 1 - entropy(rates) / np.log(2)
                assert float(found.preference[row, expert]) == pytest.approx(expected, abs=1e-9)
            else:
                assert not found.eligible[row, expert]
    assert found.low is not None
    assert found.high is not None
    parts = [s.per_prompt.counts > 0 for s in stats.values() if s.per_prompt]
    n_prompts = torch.cat(parts).sum(0)
    assert torch.equal(found.low.isnan(), n_prompts < 2)
    assert bool(((found.low >= 0) & (found.high <= 1))[n_prompts > 1].all())
    sure = found.eligible & (sum(s.counts for s in stats.values()) > 30)
    assert bool((found.low <= found.preference + 1e-9)[sure].all())
    for domain in stats:
        experts = found.domain_experts(domain, share=0.5)
        mine = list(stats).index(domain)
        rates = [s.rates for s in stats.values()]
        assert all(rates[mine][e] >= rates[1 - mine][e] for e in experts)
        drivers = found.drivers(share=0.25)
        assert found.both(domain, share=0.25) == [
            e for e in found.domain_experts(domain, share=0.25) if e in drivers
        ]
        sizes = [abs(float(effect[e])) for e in drivers]
        assert sizes == sorted(sizes, reverse=True)
        assert len(drivers) == 8
    assert {layer for layer, _ in found.drivers(share=0.5, layers="early")} == {0}


def test_effects_by_expert_are_sums_over_tokens_and_means_over_prompts() -> None:
    model, prompts = (
        organisms.load("specialised"),
        [c.closed_book for c in CONFLICTS[:3]] + ["Document : the"],
    )
    found = virtual_ablation(model, prompts, exact=30, progress=False)
    effects = effects_by_expert(found, clusters="aabb")
    sums: dict[tuple[int, int], float] = defaultdict(float)
    counts: dict[tuple[int, int], int] = defaultdict(int)
    for cell in np.ndindex(*found.indices.shape):
        expert = int(found.indices[cell])
        if expert >= 0:
            sums[cell[0], expert] += float(found.changes[cell])
            counts[cell[0], expert] += 1
    for row in range(4):
        for expert in range(8):
            assert float(effects.effect[row, expert]) == pytest.approx(sums[row, expert] / 4, abs=1e-6)
            assert int(effects.n_chosen[row, expert]) == counts[row, expert]
    assert effects.n_units == 2
    assert effects.low is not None
    assert bool((effects.low <= effects.effect + 1e-9).all())
    highest = effects.highest(3)
    values = [float(effects.effect[e]) for e in highest]
    assert values == sorted(values, reverse=True)
    assert values[0] == float(effects.effect.max())
    assert float(effects.effect[effects.lowest(1)[0]]) == float(effects.effect.min())
    by_layer = effects.highest(50, layers=[2])
    assert {layer for layer, _ in by_layer} == {2}
    many = effects_by_expert(found)
    assert many.low is not None
    for e in many.highest(50, significant=True) if bool((many.low > 0).any()) else []:
        assert float(many.low[e]) > 0
    alone = effects_by_expert(virtual_ablation(model, "Document : the", exact=False, progress=False))
    assert alone.low is None
    with pytest.raises(DataError, match="has no interval"):
        alone.highest(1, significant=True)
    joined = driver_experts(groups(), many)
    assert torch.equal(joined.effect, many.effect)
    with pytest.raises(DataError, match="4 prompts need as many cluster labels; got 2"):
        effects_by_expert(found, clusters="ab")


def test_bad_input_is_refused() -> None:
    stats = groups()
    with pytest.raises(DataError, match="at least two domains"):
        driver_experts({"document": stats["document"]}, torch.zeros(4, 8))
    with pytest.raises(DataError, match=r"effects must be \[layer expert\]"):
        driver_experts(stats, torch.zeros(3, 8))
    with pytest.raises(DataError, match="NaN or infinite"):
        driver_experts(stats, torch.full((4, 8), torch.nan))
    with pytest.raises(DataError, match="The domains are document, memory"):
        driver_experts(stats, torch.zeros(4, 8)).both("code")
    other = collect_routing(organisms.load("null"), "the", progress=False)
    with pytest.raises(DataError, match="not comparable"):
        driver_experts({"a": stats["memory"], "b": other}, torch.zeros(4, 8))

    class Other:
        shape = MoEShape("another", (0, 1, 2, 3), 8, 2)
        effect = torch.zeros(4, 8)

    with pytest.raises(DataError, match="of another model"):
        driver_experts(stats, Other())
