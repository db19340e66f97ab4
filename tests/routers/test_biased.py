"""Rules with biases, groups and tables, against loops in float64; steering them, against brute force."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lens.errors import HookError, PlanError
from moe_lens.routers.biased import BiasedSoftmaxTopK, FixedExperts, GroupLimitedSoftmax, SigmoidTopK
from moe_lens.routers.groups import GroupLimit
from moe_lens.routers.hold import Hold
from moe_lens.steering.plan import EPSILON_RANGE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Plan = tuple[list[int], list[int]]
EVERYONE = GroupLimit(1, 1, 1)

# ------------------------------------------------------------------------------------------- the oracle


def softmax(z: list[float]) -> list[float]:
    powers = [math.exp(value - max(z)) for value in z]
    return [power / math.fsum(powers) for power in powers]


SCORE = {
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "sqrtsoftplus": lambda z: math.sqrt(math.log1p(math.exp(z))),
}


def possible_groups(n_experts: int, k: int, limit: GroupLimit, plan: Plan) -> list[tuple[int, ...]]:
    """Every choice of groups that holds all activated experts, and k that are not deactivated."""
    activate, deactivate = plan
    choices = []
    for groups in combinations(range(limit.n_groups), limit.n_chosen):
        members = members_of(groups, n_experts, limit)
        if set(activate) <= members and len(members - set(deactivate)) >= k:
            choices.append(groups)
    return choices


def members_of(groups: Sequence[int], n_experts: int, limit: GroupLimit) -> set[int]:
    size = n_experts // limit.n_groups
    return {expert for group in groups for expert in range(group * size, (group + 1) * size)}


def best(worth: dict[Any, list[float]]) -> list[Any]:
    """The keys of the largest lists, ties included."""
    return [key for key, each in worth.items() if each == max(worth.values())]


def best_sets(
    scores: list[float], k: int, limit: GroupLimit, plan: Plan, lowest: float
) -> list[frozenset[int]]:
    """The sets of k experts that a group-limited router may choose under a plan, by brute force.

    Of the choices of groups that serve the plan, those with the best groups; of the sets within, those with
    the best experts, steered ones aside. A deactivated expert counts as `lowest` in its group's float32 sum.
    """
    activate, deactivate = plan
    sums = {}
    for group in range(limit.n_groups):
        members = members_of([group], len(scores), limit)
        values = sorted(lowest if i in deactivate else scores[i] for i in members)[-limit.n_summed :]
        forced = bool(members & set(activate))
        sums[group] = math.inf if forced else float(np.sum(np.array(values, np.float32)))
    choices = possible_groups(len(scores), k, limit, plan)
    found = []
    for groups in best({each: sorted((sums[g] for g in each), reverse=True) for each in choices}):
        allowed = [
            frozenset(some)
            for some in combinations(sorted(members_of(groups, len(scores), limit)), k)
            if set(activate) <= set(some) and not set(deactivate) & set(some)
        ]
        others = {some: sorted((scores[i] for i in some - set(activate)), reverse=True) for some in allowed}
        found += best(others)
    return found


# ---------------------------------------------------------------------------------- selecting and weighing

BIAS = torch.tensor([0.0, 0.9, -0.4, 0.0, 2.5, 0.1, -1.5, 0.2])
N = 8


def logits(n_tokens: int = 40, n_experts: int = N, scale: float = 2.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed))


def some_indices(n_tokens: int, k: int, seed: int = 1) -> Tensor:
    """k different experts for each token, in any order."""
    return torch.rand(n_tokens, N, generator=torch.Generator().manual_seed(seed)).argsort(-1)[:, :k]


@pytest.mark.parametrize("score", SCORE)
@pytest.mark.parametrize(
    "groups", [None, GroupLimit(4, 2, 2), GroupLimit(2, 1, 2), GroupLimit(4, 3, 1)], ids=str
)
@pytest.mark.parametrize("bias", [None, BIAS, 1e6 * BIAS], ids=["none", "mild", "strong"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_the_sigmoid_rule_follows_its_formula(
    score: str, groups: GroupLimit | None, bias: Tensor | None, renormalize: bool
) -> None:
    rule = SigmoidTopK(
        n_experts=N, top_k=3, groups=groups, bias=bias, renormalize=renormalize, scaling=2.5, score=score
    )
    z = logits()
    indices, weights = rule.route(z)
    for token, chosen, ours in zip(z.tolist(), indices.tolist(), weights.tolist(), strict=True):
        s = [SCORE[score](value) for value in token]
        choice = [a + b for a, b in zip(s, (bias if bias is not None else 0 * BIAS).tolist(), strict=True)]
        allowed = best_sets(choice, 3, groups or EVERYONE, ([], []), 0.0)
        if bias is None or bias.abs().max() < 10:  # else float32 rounds s + bias to equals
            assert set(chosen) in allowed
        total = sum(s[i] for i in chosen) if renormalize else 1
        assert ours == pytest.approx([2.5 * s[i] / total for i in chosen], rel=1e-5)


@pytest.mark.parametrize("score", SCORE)
@pytest.mark.parametrize("sum_epsilon", [1e-20, 0.0, 0.5])
def test_the_sigmoid_rule_weighs_any_experts_without_their_bias(score: str, sum_epsilon: float) -> None:
    rule = SigmoidTopK(n_experts=N, top_k=3, bias=1e6 * BIAS, score=score, sum_epsilon=sum_epsilon)
    z, indices = logits(), some_indices(40, 3)
    for token, chosen, ours in zip(
        z.tolist(), indices.tolist(), rule.weigh(z, indices).tolist(), strict=True
    ):
        s = [SCORE[score](token[i]) for i in chosen]
        assert ours == pytest.approx([each / (sum(s) + sum_epsilon) for each in s], rel=1e-5)
        assert all(0 < each < math.inf for each in ours)


@pytest.mark.parametrize("smallest_sum", [1e-12, 0.6])
@pytest.mark.parametrize("bias", [0 * BIAS, 0.2 * BIAS], ids=["zero", "mild"])
def test_the_biased_softmax_rule_follows_its_formula(smallest_sum: float, bias: Tensor) -> None:
    rule = BiasedSoftmaxTopK(n_experts=N, top_k=3, bias=bias, smallest_sum=smallest_sum)
    z = logits()
    for indices in (rule.select(z), some_indices(40, 3)):
        weights = rule.weigh(z, indices)
        for token, chosen, ours in zip(z.tolist(), indices.tolist(), weights.tolist(), strict=True):
            p = softmax(token)
            total = max(sum(p[i] for i in chosen), smallest_sum)
            assert ours == pytest.approx([p[i] / total for i in chosen], rel=1e-5)
            assert all(0 < each < math.inf for each in ours)
    for token, chosen in zip(z.tolist(), rule.select(z).tolist(), strict=True):
        choice = [p + b for p, b in zip(softmax(token), bias.tolist(), strict=True)]
        assert chosen == sorted(range(N), key=lambda i: -choice[i])[:3]


@pytest.mark.parametrize("groups", [GroupLimit(4, 2, 1), GroupLimit(2, 1, 1), GroupLimit(4, 3, 1)], ids=str)
def test_the_group_limited_softmax_rule_follows_its_formula(groups: GroupLimit) -> None:
    rule = GroupLimitedSoftmax(n_experts=N, top_k=3, groups=groups, scaling=16.0)
    z = logits()
    chosen_ones = rule.select(z)
    for indices in (chosen_ones, some_indices(40, 3)):
        weights = rule.weigh(z, indices)
        for token, chosen, ours in zip(z.tolist(), indices.tolist(), weights.tolist(), strict=True):
            assert ours == pytest.approx([16 * softmax(token)[i] for i in chosen], rel=1e-5)
            assert all(0 < each < math.inf for each in ours)
    for token, chosen in zip(z.tolist(), chosen_ones.tolist(), strict=True):
        assert set(chosen) in best_sets(softmax(token), 3, groups, ([], []), 0.0)


def test_an_expert_that_the_router_takes_for_want_of_a_better_one_weighs_nothing() -> None:
    rule = GroupLimitedSoftmax(n_experts=6, top_k=3, groups=GroupLimit(2, 1, 1))
    z = torch.tensor([[0.0, -1.0, -999.0, -2.0, -2.0, -2.0]])  # in the chosen group, one underflows
    indices, weights = rule.route(z)
    makeshift = [i for i in indices[0].tolist() if i not in (0, 1)]
    assert len(makeshift) == 1
    assert weights[indices == makeshift[0]].tolist() == [0.0]
    for expert in {3, 4, 5} - set(makeshift):  # put in by an edit of the indices, it counts
        edited = rule.weigh(z, torch.tensor([[0, 1, expert]]))
        assert edited[0].tolist() == pytest.approx([softmax(z[0].tolist())[i] for i in (0, 1, expert)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_come_in_their_dtype_and_indices_in_int64(dtype: torch.dtype) -> None:
    z = logits().to(dtype)
    rules: list[tuple[Any, torch.dtype]] = [
        (SigmoidTopK(n_experts=N, top_k=3, bias=BIAS), torch.float32),
        (SigmoidTopK(n_experts=N, top_k=3, bias=BIAS, float32_scores=False), dtype),
        (SigmoidTopK(n_experts=N, top_k=3, weights_dtype=dtype), dtype),
        (BiasedSoftmaxTopK(n_experts=N, top_k=3, bias=BIAS), torch.float32),
        (BiasedSoftmaxTopK(n_experts=N, top_k=3, bias=BIAS, weights_dtype=dtype), dtype),
        (GroupLimitedSoftmax(n_experts=N, top_k=3, groups=GroupLimit(4, 2, 1)), torch.float32),
    ]
    for rule, expected in rules:
        for rule_now, z_now in ((rule, z), tuple(reversed(rule.steer(z, [1], [2], 0.5)))):
            indices, weights = rule_now.route(z_now)
            assert indices.dtype == torch.int64
            if rule_now is rule or z_now.dtype == dtype or getattr(rule, "weights_dtype", None):
                assert weights.dtype == expected


# ------------------------------------------------------------------------------------------ steering


@st.composite
def plans(draw: st.DrawFn, n_experts: int, k: int, limit: GroupLimit) -> Plan:
    """A plan that some choice of groups serves, often as large as possible."""
    order = draw(st.permutations(range(n_experts)))
    n_activate = draw(st.sampled_from([0, 1, k, k]).filter(lambda n: n <= k))
    n_most = n_experts - k
    n_deactivate = draw(st.sampled_from([0, 1, n_most // 2, n_most]).filter(lambda n: n <= n_most))
    activate, deactivate = order[:n_activate], order[n_experts - n_deactivate :]
    while not possible_groups(n_experts, k, limit, (activate, deactivate)):
        activate, deactivate = activate[1:], deactivate[1:]
    return activate, deactivate


def adversarial_bias(draw: Any, n_experts: int) -> Tensor:
    values = st.sampled_from(
        draw(st.sampled_from([[0.0], [1e6], [-1e6, 0.0, 1e6], [-1.0, 0.5, 0.25], [0.1, 0.3, -0.2, 0.7, 3.0]]))
    )
    return torch.tensor(draw(st.lists(values, min_size=n_experts, max_size=n_experts)))


def grid(n_experts: int, seed: int, stretch: float, dtype: torch.dtype) -> Tensor:
    """Logits of 8 tokens, multiples of 1/8 (exact in every dtype) with many ties, stretched."""
    generator = torch.Generator().manual_seed(seed)
    span = 2 + seed % 120
    return (stretch * torch.randint(-span, span, (8, n_experts), generator=generator) / 8).to(dtype)


seeds = st.integers(0, 10**6)
epsilons = st.sampled_from([*EPSILON_RANGE, 0.01, 1.0])
dtypes = st.sampled_from(DTYPES)
GROUPED = [  # experts, k, groups, chosen groups
    (8, 3, 4, 2),
    (8, 4, 4, 2),
    (8, 3, 2, 1),
    (8, 2, 4, 1),
    (8, 3, 4, 3),
    (12, 4, 3, 1),
    (12, 5, 3, 2),
]


def assert_weights_are_sound(rule: Any, indices: Tensor, weights: Tensor, activate: list[int]) -> None:
    assert weights.isfinite().all()
    largest = weights.amax(dim=-1)
    for expert in activate:
        assert (weights[indices == expert] >= largest * (1 - 1e-6)).all()


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    shape=st.sampled_from([*GROUPED, (2, 1, 1, 1), (5, 2, 1, 1), (6, 6, 1, 1), (8, 3, 1, 1)]),
    seed=seeds,
    score=st.sampled_from(sorted(SCORE)),
    float32_scores=st.booleans(),
    dtype=dtypes,
    epsilon=epsilons,
)
def test_a_steered_sigmoid_rule_runs_the_best_of_all_sets_that_the_plan_allows(
    data: st.DataObject,
    shape: tuple[int, int, int, int],
    seed: int,
    score: str,
    float32_scores: bool,
    dtype: torch.dtype,
    epsilon: float,
) -> None:
    n_experts, k, n_groups, n_chosen = shape
    limit = GroupLimit(n_groups, n_chosen, 2)
    plan = data.draw(plans(n_experts, k, limit))
    rule = SigmoidTopK(
        n_experts=n_experts,
        top_k=k,
        groups=None if n_groups == 1 else limit,
        bias=adversarial_bias(data.draw, n_experts),
        score=score,
        float32_scores=float32_scores,
    )
    z = grid(n_experts, seed, 1.0, dtype)
    steered, after = rule.steer(z, *plan, epsilon)
    others = [expert for expert in range(n_experts) if expert not in plan[0] + plan[1]]
    assert torch.equal(steered[:, others], z[:, others])
    assert steered.dtype == torch.float32
    assert isinstance(after, SigmoidTopK)
    indices, weights = after.route(steered)
    scores = rule.selection_scores(z)
    lowest = replace(after, hold=None).selection_scores(steered).amin(-1)
    for token, low, chosen in zip(scores.tolist(), lowest.tolist(), indices.tolist(), strict=True):
        assert set(chosen) in best_sets(token, k, limit, plan, low)
    assert_weights_are_sound(rule, indices, weights, plan[0])


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    n_experts=st.integers(2, 8),
    seed=seeds,
    stretch=st.sampled_from([0.125, 1.0, 64.0]),
    dtype=dtypes,
    epsilon=epsilons,
)
def test_a_steered_biased_softmax_runs_the_best_of_all_sets_that_the_plan_allows(
    data: st.DataObject, n_experts: int, seed: int, stretch: float, dtype: torch.dtype, epsilon: float
) -> None:
    k = data.draw(st.integers(1, n_experts))
    plan = data.draw(plans(n_experts, k, EVERYONE))
    bias = adversarial_bias(data.draw, n_experts)
    rule = BiasedSoftmaxTopK(n_experts=n_experts, top_k=k, bias=bias)
    z = grid(n_experts, seed, stretch, dtype)
    steered, after = rule.steer(z, *plan, epsilon)
    indices, weights = after.route(steered)
    near: Any = {"rel": 1e-5, "abs": 1e-12 if bias.any() else 0}  # p + bias is rounded, before and after
    for token, chosen in zip(rule.selection_scores(z).tolist(), indices.tolist(), strict=True):
        assert set(plan[0]) <= set(chosen)
        assert not set(plan[1]) & set(chosen)
        worth = sorted((token[i] for i in chosen if i not in plan[0]), reverse=True)
        [expected, *_] = best_sets(token, k, EVERYONE, plan, 0.0)
        assert worth == pytest.approx(
            sorted((token[i] for i in expected - set(plan[0])), reverse=True), **near
        )
    assert_weights_are_sound(rule, indices, weights, plan[0])


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    shape=st.sampled_from(GROUPED),
    seed=seeds,
    stretch=st.sampled_from([1.0, 64.0]),
    dtype=dtypes,
    epsilon=epsilons,
)
def test_a_steered_group_limited_softmax_runs_the_best_of_all_sets_that_the_plan_allows(
    data: st.DataObject,
    shape: tuple[int, int, int, int],
    seed: int,
    stretch: float,
    dtype: torch.dtype,
    epsilon: float,
) -> None:
    n_experts, k, n_groups, n_chosen = shape
    limit = GroupLimit(n_groups, n_chosen, 1)
    plan = data.draw(plans(n_experts, k, limit))
    assume(plan[0] or plan[1])
    rule = GroupLimitedSoftmax(n_experts=n_experts, top_k=k, groups=limit)
    z = grid(n_experts, seed, stretch, dtype)
    steered, after = rule.steer(z, *plan, epsilon)
    indices, weights = after.route(steered)
    for token, chosen in zip(z.tolist(), indices.tolist(), strict=True):  # p grows with its logit
        assert set(chosen) in best_sets(token, k, limit, plan, -math.inf)
    assert_weights_are_sound(rule, indices, weights, plan[0])
    assert ((weights > 0) == (torch.softmax(steered, -1).gather(-1, indices) > 0)).all()


def small_rules() -> list[Any]:
    bias = torch.tensor([1e6, 0.3, -1e6, 0.0, 1.0, 0.0])
    return [
        SigmoidTopK(n_experts=6, top_k=3, bias=bias, groups=GroupLimit(3, 2, 2)),
        SigmoidTopK(n_experts=6, top_k=2, bias=bias, groups=GroupLimit(2, 1, 2)),
        SigmoidTopK(n_experts=6, top_k=2, bias=bias),
        BiasedSoftmaxTopK(n_experts=6, top_k=2, bias=bias),
        BiasedSoftmaxTopK(n_experts=6, top_k=2, bias=bias, groups=GroupLimit(3, 1, 2)),
        GroupLimitedSoftmax(n_experts=6, top_k=2, groups=GroupLimit(3, 1, 1)),
        GroupLimitedSoftmax(n_experts=6, top_k=3, groups=GroupLimit(2, 1, 1)),
    ]


@pytest.mark.parametrize("rule", small_rules(), ids=lambda rule: f"{type(rule).__name__}-{rule.groups}")
def test_of_all_plans_exactly_those_that_groups_can_serve_are_steered_and_hold(rule: Any) -> None:
    z = torch.cat([logits(2, 6), 100 * logits(1, 6, seed=2), torch.zeros(1, 6)])
    limit = rule.groups or EVERYONE
    for wishes in product((-1, 0, 1), repeat=6):
        activate = [expert for expert in range(6) if wishes[expert] == 1]
        deactivate = [expert for expert in range(6) if wishes[expert] == -1]
        if len(activate) > rule.top_k or len(deactivate) > 6 - rule.top_k or not activate + deactivate:
            continue
        reason = rule.cannot_steer(activate, deactivate)
        choices = possible_groups(6, rule.top_k, limit, (activate, deactivate))
        assert (reason is None) == bool(choices), (activate, deactivate, reason)
        if reason is None:
            steered, after = rule.steer(z, activate, deactivate, 0.01)
            for chosen in after.select(steered).tolist():
                assert set(activate) <= set(chosen)
                assert not set(deactivate) & set(chosen)
                assert any(set(chosen) <= members_of(groups, 6, limit) for groups in choices)


STEERABLE: dict[str, Any] = {
    "sigmoid": SigmoidTopK(n_experts=N, top_k=3, bias=BIAS),
    "sigmoid_groups": SigmoidTopK(n_experts=N, top_k=3, bias=BIAS, groups=GroupLimit(4, 2, 2)),
    "sqrtsoftplus": SigmoidTopK(n_experts=N, top_k=3, bias=BIAS, score="sqrtsoftplus"),
    "biased_softmax": BiasedSoftmaxTopK(n_experts=N, top_k=3, bias=0.2 * BIAS),
    "softmax_groups": GroupLimitedSoftmax(n_experts=N, top_k=3, groups=GroupLimit(4, 2, 1)),
}
every_rule = pytest.mark.parametrize("rule", STEERABLE.values(), ids=STEERABLE)


@every_rule
def test_an_empty_plan_keeps_the_choice_and_the_weights(rule: Any) -> None:
    z = logits(200)
    steered, after = rule.steer(z, [], [], 0.01)
    ours, before = after.route(steered), rule.route(z)
    assert torch.equal(ours.indices.sort().values, before.indices.sort().values)
    torch.testing.assert_close(ours.weights.sort().values, before.weights.sort().values)
    assert rule.cannot_steer([], []) is None


@every_rule
def test_epsilon_sets_the_steered_logits_apart(rule: Any) -> None:
    z = logits()
    for epsilon in (0.01, 3.0):
        steered, _ = rule.steer(z, [1, 3], [2], epsilon)
        others = steered[:, [0, 4, 5, 6, 7]]
        spread = (z.amax(-1) - z.amin(-1)).double()
        gap = (steered[:, 1] - steered[:, 2]).double()
        torch.testing.assert_close(gap, spread + 2 * epsilon, atol=1e-5, rtol=1e-5)
        assert torch.equal(steered[:, 1], steered[:, 3])
        assert (steered[:, 1, None] > others).all()
        assert (steered[:, 2, None] < others).all()


@every_rule
def test_steering_works_on_any_batch_shape(rule: Any) -> None:
    z = logits(12)
    steered, after = rule.steer(z, [1], [2], 0.5)
    flat = after.route(steered)
    for shape in ((3, 4), (2, 1, 6)):
        in_shape, rule_now = rule.steer(z.view(*shape, N), [1], [2], 0.5)
        ours = rule_now.route(in_shape)
        assert torch.equal(in_shape.view(12, N), steered)
        assert torch.equal(ours.indices.view(12, 3), flat.indices)
        assert torch.equal(ours.weights.view(12, 3), flat.weights)
    one, rule_now = rule.steer(z[5], [1], [2], 0.5)
    assert torch.equal(rule_now.route(one).indices, flat.indices[5])


@every_rule
def test_two_plans_hold_together_where_there_is_room(rule: Any) -> None:
    steered, once = rule.steer(logits(), [1], [4], 0.01)
    steered, twice = once.steer(steered, [6], [3], 0.01)
    for chosen in twice.select(steered).tolist():
        assert {1, 6} <= set(chosen)
        assert not {3, 4} & set(chosen)


def test_two_plans_leave_a_biased_softmax_the_best_of_the_others() -> None:
    rule, z = STEERABLE["biased_softmax"], logits()
    steered, once = rule.steer(z, [1], [4], 3.0)
    steered, twice = once.steer(steered, [6], [3], 3.0)
    for token, chosen in zip(rule.selection_scores(z).tolist(), twice.select(steered).tolist(), strict=True):
        assert set(chosen) in best_sets(token, 3, EVERYONE, ([1, 6], [3, 4]), 0.0)


@every_rule
@pytest.mark.parametrize("plan", [([5], [0, 1, 2]), ([2], [4, 6, 7]), ([], [0, 1, 6, 7])], ids=str)
def test_logits_put_in_place_of_steered_ones_route_as_if_there_had_been_none_once_released(
    rule: Any, plan: Plan
) -> None:
    every_token = torch.ones(len(logits()), dtype=torch.bool)
    for dtype in (torch.float32, torch.bfloat16):
        z = logits().to(dtype)
        _, after = rule.steer(z, *plan, 0.01)
        other = 3 * logits().flip(0).to(dtype)
        for chosen in after.select(other).tolist():  # nobody said so
            assert set(plan[0]) <= set(chosen)
            assert not set(plan[1]) & set(chosen)
        after = after.released(every_token)
        for put in (z, other):
            assert torch.equal(after.route(put).indices, rule.route(put).indices)


@every_rule
@pytest.mark.parametrize("plan", [([5], [0, 1, 2]), ([2], [4, 6, 7]), ([], [0, 1, 6, 7])], ids=str)
def test_a_later_edit_frees_the_experts_whose_logits_it_changes_and_no_others(rule: Any, plan: Plan) -> None:
    steered, after = rule.steer(logits(), *plan, 0.01)
    edited = steered.clone()
    edited[:, 3] += 2.0  # of no plan
    edited[::2, plan[1][0]] += 50.0
    for token, chosen in enumerate(after.select(edited).tolist()):
        assert set(plan[0]) <= set(chosen)
        assert not set(plan[1][1:]) & set(chosen)
        assert token % 2 == 0 or plan[1][0] not in chosen
    steered[:, plan[1][0]] += 50.0  # in place: the rule remembers what it gave
    assert after.selection_scores(steered)[:, plan[1][0]].isfinite().all()


@every_rule
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (([0, 1, 2], []), ([6], [3])),  # four activated of three that run
        (([1], [4]), ([4], [1])),
        (([1], [4, 5, 7]), ([0], [2, 3, 6])),  # six deactivated of five that may be
        (([3], []), ([1, 6], [])),  # in three groups of two that are chosen
        (([], [0, 2]), ([], [4, 6])),  # no three are left in two groups
    ],
)
def test_of_two_plans_without_room_for_both_the_later_one_holds(rule: Any, first: Plan, second: Plan) -> None:
    steered, once = rule.steer(logits(), *first, 0.01)
    steered, twice = once.steer(steered, *second, 0.01)
    for chosen in twice.select(steered).tolist():
        assert len(set(chosen)) == 3
        assert set(second[0]) <= set(chosen)
        assert not set(second[1]) & set(chosen)


@every_rule
@pytest.mark.parametrize("gap", [50.0, 90.0, 200.0, 1e4])
def test_a_plan_against_an_expert_far_above_all_others_holds(rule: Any, gap: float) -> None:
    z = logits()
    z[:, 3] += gap
    for plan in (([], [3]), ([5], [3]), ([5, 0], [3, 1, 2]), ([3], [5])):
        steered, after = rule.steer(z, *plan, 0.01)
        indices, weights = after.route(steered)
        assert not after.selection_scores(steered).isnan().any()
        assert weights.isfinite().all()
        for chosen in indices.tolist():
            assert set(plan[0]) <= set(chosen)
            assert not set(plan[1]) & set(chosen)


@every_rule
def test_gradients_of_a_steered_choice_reach_unsteered_logits(rule: Any) -> None:
    z = logits(20, scale=0.3).requires_grad_()
    steered, after = rule.steer(z, [1], [2], 0.01)
    indices, weights = after.route(steered)
    (weights * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    runs = torch.zeros(20, N, dtype=torch.bool).scatter(1, indices, True)
    runs[:, [1, 2]] = False
    assert (z.grad[runs].abs() > 1e-6).all()


@every_rule
def test_steering_leaves_the_rule_and_the_logits_as_they_were(rule: Any) -> None:
    z = logits()
    bias: Any = getattr(rule, "bias", None)
    before, bias_before, route = z.clone(), None if bias is None else bias.tolist(), rule.route(z)
    rule.steer(z, [1], [2], 0.5)
    assert torch.equal(z, before)
    assert bias is None or bias.tolist() == bias_before
    assert rule.hold is None
    assert torch.equal(rule.route(z).indices, route.indices)


# ---------------------------------------------------------------------------------- a table by token id

TABLE = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(i))[:3] for i in range(20)])
FIXED = FixedExperts(N, 3, TABLE, SigmoidTopK(n_experts=N, top_k=3, score="sqrtsoftplus", scaling=1.5))


def test_fixed_experts_come_from_the_table_whatever_the_logits() -> None:
    token_ids = torch.tensor([[3, 0, 19, 3], [7, 7, 1, 2]])
    rule = FIXED.for_call(token_ids)
    for z in (logits(8).view(2, 4, N), torch.zeros(2, 4, N)):
        indices, weights = rule.route(z)
        assert indices.dtype == torch.int64
        for b, p in product(range(2), range(4)):
            assert indices[b, p].tolist() == TABLE[token_ids[b, p]].tolist()
            s = [SCORE["sqrtsoftplus"](z[b, p, i].item()) for i in indices[b, p].tolist()]
            assert weights[b, p].tolist() == pytest.approx([1.5 * each / sum(s) for each in s], rel=1e-5)


def test_fixed_experts_take_flat_token_ids_for_batched_logits() -> None:
    token_ids = torch.arange(8)
    z = logits(8)
    batched = FIXED.for_call(token_ids.view(2, 4)).route(z)
    assert torch.equal(batched.indices, FIXED.for_call(token_ids).select(z.view(2, 4, N)).view(8, 3))


def test_fixed_experts_refuse_to_select_without_token_ids() -> None:
    with pytest.raises(HookError, match=r"token ids.*rule\.for_call\(token_ids\)"):
        FIXED.select(logits())
    FIXED.for_call(torch.arange(3))
    with pytest.raises(HookError):
        FIXED.select(logits())
    assert FIXED.weigh(logits(4), some_indices(4, 3)).isfinite().all()


def test_fixed_experts_cannot_be_steered() -> None:
    for plan in (([1], []), ([], [2]), ([1], [2])):
        assert "table by token id" in str(FIXED.cannot_steer(*plan))
        with pytest.raises(PlanError, match="table by token id"):
            FIXED.for_call(torch.arange(20)).steer(logits(20), *plan, 0.01)


def test_steer_refuses_what_group_limits_exclude() -> None:
    rule = SigmoidTopK(n_experts=8, top_k=2, groups=GroupLimit(4, 1, 2))
    assert rule.cannot_steer([0, 7], []) is not None
    with pytest.raises(PlanError, match="2 of the router's 4 groups"):
        rule.steer(torch.randn(5, 8), [0, 7], [], 0.01)


def test_of_an_earlier_plan_what_there_is_room_for_stays() -> None:
    rule = SigmoidTopK(n_experts=8, top_k=2, groups=GroupLimit(4, 2, 2))
    z = torch.randn(5, 8)
    steered, first = rule.steer(z, [0], [5], 0.01)
    _, second = first.steer(steered, [2, 4], [], 0.01)  # no room for a third activated expert
    assert isinstance(second, SigmoidTopK)
    assert second.hold == Hold.of_experts((2, 4), (5,), 8).like(z)


def test_for_call_and_select_say_what_token_ids_they_need() -> None:
    with pytest.raises(HookError, match="for_call"):
        FIXED.for_call()
    with pytest.raises(HookError, match="3 token ids for the logits of 20 tokens"):
        FIXED.for_call(torch.arange(3)).select(logits(20))


# ---------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("rule", [*STEERABLE.values(), FIXED], ids=[*STEERABLE, "fixed"])
def test_rules_are_equal_where_all_their_parameters_are(rule: Any) -> None:
    assert rule == replace(rule)
    assert hash(rule) == hash(replace(rule))
    assert rule != replace(rule, top_k=2)
    assert rule != replace(rule, n_experts=N + 1)
    assert [each for each in [*STEERABLE.values(), FIXED] if each == rule] == [rule]
    if getattr(rule, "bias", None) is not None:
        assert rule == replace(rule, bias=rule.bias.clone())
        assert rule != replace(rule, bias=rule.bias + 1)
        assert rule != replace(rule, bias=rule.bias.half())
    if isinstance(rule, FixedExperts):
        assert rule == replace(rule, table=TABLE.clone())
        assert rule != replace(rule, table=TABLE.flip(0))
        assert rule != rule.for_call(torch.arange(3))
        assert rule.for_call(torch.arange(3)) == rule.for_call(torch.arange(3))
        assert rule.for_call(torch.arange(3)) != rule.for_call(torch.arange(4))
    else:
        assert rule.for_call(torch.arange(3)) is rule
        assert rule != rule.steer(logits(), [1], [2], 0.01)[1]
