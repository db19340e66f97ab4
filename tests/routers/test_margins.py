"""Margins against brute force: every expert's score is moved, and a router written in plain Python asked."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lens.routers.biased import BiasedSoftmaxTopK, GroupLimitedSoftmax, SigmoidTopK
from moe_lens.routers.groups import GroupLimit, group_margin
from moe_lens.routers.plain import SoftmaxTopK, SparseMixer, TopKSigmoid, TopKSoftmax
from moe_lens.routers.rule import RoutingRule

# ------------------------------------------------------------------------------------------- the oracle


class Router(NamedTuple):
    """A router's numbers, in the order of `group_margin`'s arguments."""

    top_k: int
    n_groups: int
    n_chosen: int
    n_summed: int


def best_sets(scores: dict[int, float], k: int) -> list[list[int]]:
    """Every set of k keys with the largest scores: several where scores at the edge are equal."""
    edge = sorted(scores.values(), reverse=True)[k - 1]
    above = [key for key, score in scores.items() if score > edge]
    equal = [key for key, score in scores.items() if score == edge]
    return [above + list(some) for some in combinations(equal, k - len(above))]


def choices(scores: Sequence[float], router: Router) -> set[frozenset[int]]:
    """Every set of experts that the router may choose: several only where scores are equal."""
    size = len(scores) // router.n_groups
    members = [range(g * size, (g + 1) * size) for g in range(router.n_groups)]
    sums = {g: sum(sorted(scores[e] for e in members[g])[-router.n_summed :]) for g in range(router.n_groups)}
    return {
        frozenset(experts)
        for groups in best_sets(sums, router.n_chosen)
        for experts in best_sets({e: scores[e] for g in groups for e in members[g]}, router.top_k)
    }


def changes(scores: Sequence[float], router: Router, delta: float) -> bool:
    """Whether moving one score by delta, up or down, may give other experts."""
    before = choices(scores, router)
    if len(before) > 1:
        return True
    for expert, sign in product(range(len(scores)), (1, -1)):
        moved = list(scores)
        moved[expert] += sign * delta
        if choices(moved, router) != before:
            return True
    return False


def margin_of_integers(scores: Sequence[int], router: Router) -> float:
    """Every delta tried. Experts and sums of groups can become equal at integer deltas only."""
    farthest = 2 * router.n_summed * (max(scores) - min(scores)) + 2
    return next((delta for delta in range(farthest) if changes(scores, router, delta)), math.inf)


def assert_choice_changes_at(delta: float, scores: Sequence[float], router: Router, within: float) -> None:
    """Just beyond delta some move changes the choice; just below and far below none does."""
    if delta == math.inf:
        assert not changes(scores, router, 1e3)
        return
    assert changes(scores, router, delta + within)
    for smaller in (0.3 * delta, 0.7 * delta, delta - within):
        assert smaller <= 0 or not changes(scores, router, smaller)


# ----------------------------------------------------------------------------------------- group_margin


def routers(n_experts: int) -> list[Router]:
    """Every router of so many experts whose chosen groups hold k experts."""
    return [
        Router(top_k, n_groups, n_chosen, n_summed)
        for n_groups in range(1, n_experts + 1)
        if n_experts % n_groups == 0
        for n_chosen in range(1, n_groups + 1)
        for n_summed in (1, 2)
        if n_summed <= n_experts // n_groups
        for top_k in range(1, n_chosen * n_experts // n_groups + 1)
    ]


def margin(scores: Sequence[float], router: Router) -> float:
    return group_margin(torch.tensor(scores, dtype=torch.float64), *router).item()


router_and_scores = st.sampled_from([4, 6, 8, 9, 12]).flatmap(
    lambda n: st.tuples(
        st.sampled_from(routers(n)),
        st.integers(1, 25).flatmap(lambda high: st.lists(st.integers(-high, high), min_size=n, max_size=n)),
    )
)


@settings(max_examples=300, deadline=None)
@given(case=router_and_scores)
def test_group_margin_is_the_first_integer_that_changes_the_choice(case: tuple[Router, list[int]]) -> None:
    router, scores = case
    assert margin(scores, router) == margin_of_integers(scores, router)


@pytest.mark.parametrize(
    ("n_experts", "router"),
    [(8, Router(k, 4, 2, n_summed)) for k in (2, 3, 4) for n_summed in (1, 2)]
    + [(12, Router(k, 3, n_chosen, n_summed)) for k, n_chosen, n_summed in product((1, 3), (1, 2, 3), (1, 2))]
    + [(12, Router(8, 3, 2, 2)), (8, Router(8, 4, 4, 1))],
)
def test_group_margin_of_real_scores(n_experts: int, router: Router) -> None:
    generator = torch.Generator().manual_seed(n_experts + sum(router))
    draw = lambda: torch.randn(30, n_experts, generator=generator, dtype=torch.float64)  # noqa: E731
    strong_group = draw() + 3 * draw()[:, : router.n_groups].repeat_interleave(
        n_experts // router.n_groups, 1
    )
    biased = draw().sigmoid() + 4 * (draw() > 1)  # a bias may put scores far beyond 1
    for scores in torch.cat([draw().sigmoid(), strong_group, biased]).tolist():
        assert_choice_changes_at(margin(scores, router), scores, router, within=1e-9)


@pytest.mark.parametrize(
    ("router", "scores", "expected"),
    [
        # The weakest chosen group, sum 13, holds a chosen expert: 13 against 9 counts, not 12 against 1.
        (Router(2, 3, 2, 2), [20, 3, 12, 1, 5, 4], 4),
        # It holds none. Expert 5 must reach the k-th chosen, 17; it overtakes the group's 2 well before.
        (Router(2, 3, 2, 1), [20, 17, 2, 1, 0, 1], 15),
        # The group of expert 2 would overtake at +2, but 10 must reach 17 first.
        (Router(2, 3, 2, 2), [20, 17, 5, 5, 8, 0], 9),
        # A better expert waits in a group that is left out: it comes in as soon as its group does.
        (Router(2, 3, 2, 2), [20, 17, 15, 15, 19, 8], 2),
        # Either of 10 and 0 drags the only group that is chosen from, sum 10, below the third, sum 8.
        (Router(1, 3, 2, 2), [10, 0, 6, 5, 4, 4], 2),
        # None of 10, 9 and 9 drags the group's sum below 18, but 10 falls to 9.
        (Router(1, 2, 1, 2), [10, 9, 9, 8, 7, 0], 1),
        # One group and every expert of it; all groups and every expert.
        (Router(2, 2, 1, 1), [5, 4, 1, 0], 4),
        (Router(4, 2, 2, 2), [5, 4, 1, 0], math.inf),
        # Two groups are equal, but neither has a say in who is chosen.
        (Router(2, 3, 2, 2), [20, 17, 6, 4, 4, 6], 11),
        # Two groups are equal, and one of them is chosen from; two experts are equal.
        (Router(1, 2, 1, 2), [5, 1, 4, 2], 0),
        (Router(1, 2, 1, 1), [5, 5, 4, 2], 0),
    ],
)
def test_group_margin_by_hand(router: Router, scores: list[int], expected: float) -> None:
    assert margin(scores, router) == expected
    assert margin_of_integers(scores, router) == expected


def test_one_group_gives_the_gap_between_experts() -> None:
    scores = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    for k in range(1, 8):
        ordered = scores.sort(descending=True).values
        assert torch.equal(group_margin(scores, k, 1, 1, 2), ordered[:, k - 1] - ordered[:, k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_group_margin_works_on_any_batch_shape_and_dtype(dtype: torch.dtype) -> None:
    router = Router(3, 4, 2, 2)
    scores = torch.randint(-20, 20, (2, 3, 8), generator=torch.Generator().manual_seed(0))
    ours = group_margin(scores.to(dtype), *router)
    expected = [[margin_of_integers(token, router) for token in row] for row in scores.tolist()]
    assert ours.dtype == dtype
    assert ours.tolist() == expected
    assert group_margin(scores[0, 0].to(dtype), *router).item() == expected[0][0]


# ---------------------------------------------------------------------------------------- rules' margins


def logits(n_tokens: int = 40, n_experts: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed))


def changes_of(select: Any, n_experts: int, before: Tensor, delta: Tensor) -> Tensor:
    """For each token, whether `select` changes its set when one score is moved by delta; [token]."""
    changed = torch.zeros(len(delta), dtype=torch.bool)
    for expert, sign in product(range(n_experts), (1, -1)):
        move = torch.zeros(len(delta), n_experts)
        move[:, expert] = sign * delta
        changed |= (select(move).sort().values != before.sort().values).any(-1)
    return changed


def assert_margin_is_where_the_choice_changes(rule: RoutingRule, z: Tensor, select: Any) -> None:
    """`select` maps moves of the selection scores, [token, expert], to experts."""
    ours, before = rule.routing_margin(z), rule.select(z)
    assert ours.shape == z.shape[:-1]
    assert (ours > 0).all()
    assert ours.isfinite().all()
    assert changes_of(select, rule.n_experts, before, ours + 1e-5).all()
    for part in (0.5, 1.0):
        assert not changes_of(select, rule.n_experts, before, (part * ours - 1e-5).clamp(min=0)).any()


LOGIT_RULES = {
    "softmax_top_k": lambda k, n: SoftmaxTopK(n, k, renormalize=True),
    "top_k_softmax": lambda k, n: TopKSoftmax(n, k),
    "top_k_sigmoid": lambda k, n: TopKSigmoid(n, k),
}


@pytest.mark.parametrize("name", LOGIT_RULES)
@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_margin_of_a_logit_rule_is_in_nats(name: str, top_k: int) -> None:
    rule, z = LOGIT_RULES[name](top_k, 8), 3 * logits()
    assert_margin_is_where_the_choice_changes(rule, z, lambda move: rule.select(z + move))


def test_margin_of_sparsemixer_is_in_units_of_the_logit() -> None:
    rule, z = SparseMixer(8, jitter=0.01), logits()
    assert_margin_is_where_the_choice_changes(rule, z, lambda move: rule.select(z + move))


def select_each_token(rule: SigmoidTopK | BiasedSoftmaxTopK, z: Tensor, move: Tensor) -> Tensor:
    """What the rule itself selects when its bias carries the move, token by token."""
    assert rule.bias is not None
    each = [replace(rule, bias=rule.bias + m).select(token) for token, m in zip(z, move, strict=True)]
    return torch.stack(each)


BIAS = torch.tensor([0.0, 0.9, -0.4, 0.0, 2.5, 0.1, -1.5, 0.2])
GROUPS = {
    "none": None,
    "size_2": GroupLimit(4, 2, 2),
    "size_4": GroupLimit(2, 1, 2),
    "max": GroupLimit(4, 2, 1),
}


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_margin_of_the_sigmoid_rule_is_in_units_of_score_and_bias(
    score: str, groups: GroupLimit | None, top_k: int
) -> None:
    rule, z = SigmoidTopK(n_experts=8, top_k=top_k, bias=BIAS, score=score, groups=groups), logits(12)
    assert_margin_is_where_the_choice_changes(rule, z, lambda move: select_each_token(rule, z, move))


@pytest.mark.parametrize("top_k", [1, 3])
def test_margin_of_the_biased_softmax_rule_is_in_units_of_p_and_bias(top_k: int) -> None:
    rule, z = BiasedSoftmaxTopK(n_experts=8, top_k=top_k, bias=0.1 * BIAS), logits(12)
    assert_margin_is_where_the_choice_changes(rule, z, lambda move: select_each_token(rule, z, move))


@pytest.mark.parametrize("router", [Router(2, 4, 2, 1), Router(3, 4, 3, 1), Router(4, 2, 1, 1)])
def test_margin_of_the_group_limited_softmax_rule_is_in_units_of_p(router: Router) -> None:
    rule = GroupLimitedSoftmax(n_experts=8, top_k=router.top_k, groups=GroupLimit(*router[1:]))
    z = 2 * logits()
    for p, ours in zip(z.double().softmax(-1).tolist(), rule.routing_margin(z).tolist(), strict=True):
        assert_choice_changes_at(ours, p, router, within=1e-6)


@pytest.mark.parametrize(
    "rule",
    [
        SigmoidTopK(n_experts=8, top_k=3, bias=BIAS, groups=GroupLimit(4, 2, 2)),
        BiasedSoftmaxTopK(n_experts=8, top_k=3, bias=0.1 * BIAS, groups=GroupLimit(4, 2, 2)),
        GroupLimitedSoftmax(n_experts=8, top_k=3, groups=GroupLimit(4, 2, 2)),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_margin_of_a_rule_with_groups_is_group_margin_of_its_selection_scores(rule: RoutingRule) -> None:
    z = logits(300)
    assert torch.equal(rule.routing_margin(z), group_margin(rule.selection_scores(z), 3, 4, 2, 2))


EVERY_RULE = {
    **LOGIT_RULES,
    "sigmoid_top_k": lambda k, n: SigmoidTopK(n_experts=n, top_k=k, bias=torch.linspace(0, 0, n)),
    "biased_softmax": lambda k, n: BiasedSoftmaxTopK(n_experts=n, top_k=k, bias=torch.zeros(n)),
    "all_groups": lambda k, n: SigmoidTopK(n_experts=n, top_k=k, groups=GroupLimit(2, 2, 2)),
    "softmax_groups": lambda k, n: GroupLimitedSoftmax(n_experts=n, top_k=k, groups=GroupLimit(2, 2, 1)),
}


@pytest.mark.parametrize("name", EVERY_RULE)
def test_margin_is_infinite_where_every_expert_runs(name: str) -> None:
    assert EVERY_RULE[name](8, 8).routing_margin(logits(3)).tolist() == [math.inf] * 3


def test_margin_of_sparsemixer_is_infinite_with_two_experts() -> None:
    assert SparseMixer(2, jitter=0.01).routing_margin(logits(3, 2)).tolist() == [math.inf] * 3


@pytest.mark.parametrize("name", EVERY_RULE)
def test_margin_is_zero_where_equal_experts_are_in_and_out(name: str) -> None:
    tied = torch.tensor([[2.0, 1.0, 1.0, 0.0], [-1.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    assert EVERY_RULE[name](2, 4).routing_margin(tied).tolist() == [0.0] * 3


def test_margin_of_sparsemixer_is_zero_where_equal_experts_are_in_and_out() -> None:
    assert SparseMixer(4, jitter=0.01).routing_margin(torch.tensor([[2.0, 1.0, 1.0, 0.0]])).tolist() == [0.0]


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_margin_works_on_any_batch_shape(shape: tuple[int, ...]) -> None:
    z = torch.randn(*shape, 8, generator=torch.Generator().manual_seed(0))
    rule = SigmoidTopK(n_experts=8, top_k=3, bias=BIAS, groups=GroupLimit(4, 2, 2))
    ours = rule.routing_margin(z)
    assert ours.shape == shape
    assert torch.equal(ours.flatten(), rule.routing_margin(z.reshape(-1, 8)))
