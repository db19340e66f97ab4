"""Selections: layers by name, stability against a loop, super experts that plans switch off, pruning."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_lens import (
    ContrastivePairs,
    ExpertScores,
    SteeringPlan,
    collect_routing,
    compare_routing,
    detect,
    exclude_experts,
    organisms,
    pruned,
    risk_difference,
    saliency,
    super_experts,
)
from moe_lens.errors import DataError, PlanError
from moe_lens.statistics import collect_by_prompt
from moe_lens.steering import random_sets

CONFLICTS = organisms.world("specialised").conflicts("detection")[:16]


def pairs() -> ContrastivePairs:
    return ContrastivePairs.from_lists([c.open_book for c in CONFLICTS], [c.closed_book for c in CONFLICTS])


@pytest.fixture(scope="module")
def scores() -> ExpertScores:
    return detect(organisms.load("specialised"), pairs(), n_resamples=50, outputs=True, progress=False)


def test_layers_are_chosen_by_name(scores: ExpertScores) -> None:
    bare = replace(scores, stats_1=scores.stats_1.without("outputs"))
    for name, wanted in (("early", {0}), ("middle", {1, 2}), ("late", {3}), ([0, 3], {0, 3})):
        plan = SteeringPlan.from_scores(bare, n_deactivate=2, layers=name)
        assert {layer for layer, _ in plan.deactivate} <= wanted
        ranked = [(s.layer, s.expert) for s in scores.ranked() if s.delta < 0 and s.layer in wanted]
        assert list(plan.deactivate) == ranked[:2]
    with pytest.raises(PlanError, match="early, middle, late; got 'top'"):
        SteeringPlan.from_scores(bare, n_deactivate=1, layers="top")
    with pytest.raises(PlanError, match="layers 'early'; ask for at most that many"):
        SteeringPlan.from_scores(bare, n_deactivate=9, layers="early")


def test_stable_experts_are_those_that_most_resamples_select(scores: ExpertScores) -> None:
    """The draws written anew: multinomial weights of the prompts, seed by seed."""
    bare = replace(scores, stats_1=scores.stats_1.without("outputs"))
    prompts = [s.per_prompt for s in (scores.stats_1, scores.stats_2)]
    n, n_resamples = len(CONFLICTS), 300
    weights = np.random.default_rng(5).multinomial(n, np.full(n, 1 / n), n_resamples)
    times: dict[tuple[int, int], int] = {}
    for draw in weights:
        rates = [
            (p.counts.double() * torch.from_numpy(draw)[:, None, None]).sum(0)
            / int((p.n_tokens.numpy() * draw).sum())
            for p in prompts
            if p is not None
        ]
        delta = rates[0] - rates[1]
        first = sorted(
            ((float(delta[layer, e]), layer, e) for layer in range(4) for e in range(8)),
            key=lambda item: item[0],
        )
        for value, layer, e in first[:4]:
            if value < 0:
                times[layer, e] = times.get((layer, e), 0) + 1
    for share in (0.3, 0.6, 0.9):
        expected = {e for e, number in times.items() if number >= share * n_resamples}
        plan = SteeringPlan.from_scores(bare, n_deactivate=4, stable=share, n_resamples=n_resamples, seed=5)
        ranked = [
            (s.layer, s.expert) for s in scores.ranked() if (s.layer, s.expert) in expected and s.delta < 0
        ]
        assert list(plan.deactivate) == ranked[:4]
        assert plan.activate == ()
    again = SteeringPlan.from_scores(bare, n_deactivate=4, stable=0.6, n_resamples=300, seed=5)
    assert again == SteeringPlan.from_scores(bare, n_deactivate=4, stable=0.6, n_resamples=300, seed=5)


def test_stability_is_refused_where_it_means_nothing(scores: ExpertScores) -> None:
    bare = replace(scores, stats_1=scores.stats_1.without("outputs"))
    with pytest.raises(PlanError, match="share of the resamples"):
        SteeringPlan.from_scores(bare, n_deactivate=2, stable=1.5)
    with pytest.raises(PlanError, match="Stability needs prompts to resample"):
        SteeringPlan.from_scores(risk_difference(scores.stats_1, scores.stats_2), n_deactivate=2, stable=0.5)
    model, conflicts = organisms.load("null"), organisms.world("null").conflicts("detection")[:40]
    halves = [
        collect_routing(model, [c.closed_book for c in conflicts[half::2]], per_prompt=True, progress=False)
        for half in (0, 1)
    ]
    null = compare_routing(*halves, paired=False, n_resamples=20, n_permutations=20)
    with pytest.raises(PlanError, match="No expert is selected on 100% of the resamples"):
        SteeringPlan.from_scores(null, n_deactivate=1, layers=[0], stable=1.0)


def test_plans_and_controls_that_switch_a_super_expert_off_warn(scores: ExpertScores) -> None:
    found = scores.super_experts
    assert found is not None
    assert found.max_abs.equal(super_experts([scores.stats_1, scores.stats_2]).max_abs)
    everybody = scores.ranked()
    star = found.experts[0]
    n = 1 + [(s.layer, s.expert) for s in everybody].index(star)
    delta = torch.full((4, 8), -0.001, dtype=torch.float64)
    delta[star] = -0.5
    pointed = replace(scores, delta=delta, evidence=None)
    with pytest.warns(
        UserWarning, match=rf"The plan switches off super experts, \[\({star[0]}, {star[1]}\)\]"
    ):
        SteeringPlan.from_scores(pointed, n_deactivate=1)
    assert n >= 1
    plan = SteeringPlan(deactivate=[(layer, e) for layer in range(4) for e in range(3)])
    model = organisms.load("specialised")
    with pytest.warns(UserWarning, match=r"A random set \(\d+ of 10\) switches off super experts"):
        random_sets(model, plan, 10, super_experts=found)
    assert risk_difference(scores.stats_1.without("outputs"), scores.stats_2).super_experts is None


def test_a_pruned_model_is_the_model_with_those_experts_excluded() -> None:
    model = organisms.load("specialised")
    prompts = [c.open_book for c in CONFLICTS[:3]]
    units = collect_by_prompt(model, prompts, outputs=True, progress=False)
    lowest = saliency(units, "reap").lowest(3)
    smaller = pruned(model, lowest)
    assert smaller.config.num_experts == 5
    masks = {}
    for layer in model.moe_layers:
        masks[layer] = torch.zeros(8, dtype=torch.bool)
        masks[layer][[e for other, e in lowest if other == layer]] = True
    for prompt in prompts:
        tokens = model.to_tokens(prompt)
        excluded = model.run_with_hooks(tokens, fwd_hooks=exclude_experts(masks))
        with torch.no_grad():
            logits = smaller(tokens).logits
        torch.testing.assert_close(logits, excluded, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits, model(tokens), atol=1e-2)
    with pytest.raises(PlanError, match="different numbers"):
        pruned(model, lowest[:-1])
    with pytest.raises((PlanError, DataError), match="expert 9 of layer 0 does not exist"):
        pruned(model, [(0, 9)])
