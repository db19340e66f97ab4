"""`RoutingRule.without`: the expert is out, the others stay as they were, for every rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens import hook_names
from moe_lens.errors import HookError
from moe_lens.interventions import route_around
from moe_lens.routers.plain import ByOrderOfLogits, SoftmaxTopK, TopKSoftmax
from moe_lens.routers.rule import route_without
from moe_lens.routers.table import rule_for
from tests.tiny_models import tokens

FAMILIES = (
    "olmoe", "mixtral", "gemma4", "gpt_oss", "granitemoe", "llama4", "phimoe", "deepseek_v2_grouped",
    "deepseek_v3", "deepseek_v4", "ernie4_5_moe", "afmoe", "minimax_m2", "lfm2_moe", "laguna",
)  # fmt: skip
"""One at least of every rule."""


def _logits(rule, n_tokens=200, scale=2.0, seed=0):
    return scale * torch.randn(n_tokens, rule.n_experts, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expert_is_out_and_the_next_best_takes_its_place(hooked, family) -> None:
    model = hooked(family)
    rule = model.routing_rule(model.moe_layers[-1])
    logits = _logits(rule)
    before = rule.route(logits)
    for expert in range(rule.n_experts):
        edited, edited_rule = route_without(rule, logits, expert)
        indices, weights = edited_rule.route(edited)
        assert not bool((indices == expert).any())
        assert bool(torch.isfinite(weights).all())
        others = [i for i in range(rule.n_experts) if i != expert]
        assert torch.equal(edited[:, others].float(), logits[:, others]) or not isinstance(
            rule, ByOrderOfLogits
        )
        chosen = (before.indices == expert).any(-1)
        if getattr(rule, "groups", None) is None:
            scores = rule.selection_scores(logits).clone()
            scores[:, expert] = -torch.inf
            wanted = scores.topk(rule.top_k).indices
            assert torch.equal(indices.sort(-1).values, wanted.sort(-1).values)
            same = before.indices[~chosen].sort(-1).values
            assert torch.equal(indices[~chosen].sort(-1).values, same)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss", "llama4", "phimoe", "jetmoe", "gemma4"])
def test_plain_rules_route_as_with_a_logit_of_minus_infinity(hooked, family) -> None:
    model = hooked(family)
    rule = model.routing_rule(model.moe_layers[0])
    logits = _logits(rule)
    removed = logits.clone()
    removed[:, 1] = -torch.inf
    edited, edited_rule = route_without(rule, logits, 1)
    assert torch.equal(edited, removed)
    for ours, theirs in zip(edited_rule.route(edited), rule.route(removed), strict=True):
        assert torch.equal(ours, theirs)


@given(
    st.lists(st.floats(-300, 300, width=32), min_size=6, max_size=6),
    st.sets(st.integers(0, 5), min_size=1, max_size=4),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_out_even_where_softmax_underflows(numbers, experts, softmax_first) -> None:
    rule = SoftmaxTopK(6, 2, renormalize=True) if softmax_first else TopKSoftmax(6, 2)
    edited, edited_rule = route_without(rule, torch.tensor([numbers]), sorted(experts))
    indices, weights = edited_rule.route(edited)
    assert not experts & set(indices[0].tolist())
    assert float(weights.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "family", ["olmoe", "deepseek_v4", "deepseek_v3", "ernie4_5_moe", "phimoe", "llama4"]
)
def test_gradients_are_those_of_the_experts_that_run(hooked, family) -> None:
    model = hooked(family)
    rule = model.routing_rule(model.moe_layers[-1])
    logits = _logits(rule, 20).requires_grad_()
    edited, edited_rule = route_without(rule, logits, 0)
    edited_rule.route(edited).weights.square().sum().backward()
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())
    assert float(logits.grad[:, 0].abs().max()) < 1e-6 < float(logits.grad.abs().max())


def test_half_precision_routes_like_float32(hooked) -> None:
    for family in ("olmoe", "deepseek_v3", "ernie4_5_moe"):
        rule = hooked(family).routing_rule(1)
        edited, edited_rule = route_without(rule, _logits(rule).bfloat16(), [0, 2])
        assert not bool(torch.isin(edited_rule.route(edited).indices, torch.tensor([0, 2])).any())


@pytest.mark.parametrize("family", ["deepseek_v2_grouped", "olmoe", "jamba"])
def test_weights_of_softmax_routers_are_those_without_the_expert(hooked, family) -> None:
    """Probabilities over all experts: the one that is left out takes none."""
    rule = hooked(family).routing_rule(1)
    logits = _logits(rule)
    edited, edited_rule = route_without(rule, logits, 2)
    indices, weights = edited_rule.route(edited)
    others = [expert for expert in range(rule.n_experts) if expert != 2]
    p = torch.zeros_like(logits)
    p[:, others] = logits[:, others].softmax(-1)
    torch.testing.assert_close(weights, p.gather(-1, indices) * rule.scaling, rtol=1e-5, atol=1e-7)


def test_after_steering_both_hold(hooked) -> None:
    rule = hooked("deepseek_v3").routing_rule(1)
    steered, rule = rule.steer(_logits(rule), [5], [1], 0.01)
    edited, rule = route_without(rule, steered, 3)
    indices = rule.route(edited).indices
    assert bool((indices == 5).any(-1).all())
    assert not bool(torch.isin(indices, torch.tensor([1, 3])).any())


class _Downwards(SoftmaxTopK):
    """Has a way of its own to be without experts: the others' logits change places."""

    def without(self, logits, experts):
        return super().without(-logits, experts)


def test_a_rule_may_override_it_and_hooks_follow(hooked) -> None:
    model = hooked("olmoe")
    rule = _Downwards(6, 3, False)
    logits = _logits(rule)
    edited, edited_rule = route_without(rule, logits, 2)
    wanted = -logits
    wanted[:, 2] = -torch.inf
    assert torch.equal(edited, wanted)
    assert torch.equal(edited_rule.route(edited).indices, rule.route(wanted).indices)

    def put_rule(value, hook):
        hook.rule = rule

    point = hook_names.router_logits(1)
    hooks = [(point, put_rule), *route_around([(1, 2)])]
    with model.hooks(hooks):
        _, cache = model.run_with_cache(tokens())
    _, plain = model.run_with_cache(tokens())
    masked = -plain[point]
    masked[..., 2] = -torch.inf
    wanted = masked.topk(3).indices.sort(-1).values
    assert torch.equal(cache["topk_indices", 1].sort(-1).values, wanted)


def test_refused(hooked) -> None:
    rule = hooked("olmoe").routing_rule(0)  # 6 experts, k = 3
    logits = _logits(rule)
    for wrong in (-1, 6, True, 1.0, "1", None, []):
        with pytest.raises(HookError, match=r"experts|expert's number"):
            route_without(rule, logits, wrong)
    with pytest.raises(HookError, match="at most 3"):
        route_without(rule, logits, [0, 1, 2, 3])
    mostly_gone = logits.clone()
    mostly_gone[:, 2:] = -torch.inf
    with pytest.raises(HookError, match="finite logits"):
        route_without(rule, mostly_gone, int(rule.select(mostly_gone)[0, -1]))
    moe = next(iter(vars(hooked("deepseek_v4_hash"))["_routing_layers"].values()))
    with pytest.raises(HookError, match=r"FixedExperts .* table by token id"):
        route_without(rule_for(moe.router, moe.block), logits, 0)
