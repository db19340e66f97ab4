"""Choosing among groups of experts, with and without steering, against brute force over all choices."""

from collections.abc import Sequence
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.routers.groups import GroupLimit
from moe_lens.routers.hold import Hold

CONFIGS = [  # experts, k, groups, chosen groups
    (6, 2, 3, 1),
    (6, 3, 3, 2),
    (6, 3, 2, 1),
    (6, 4, 3, 2),
    (8, 2, 4, 1),
    (8, 3, 4, 2),
    (8, 4, 4, 3),
    (8, 3, 2, 1),
    (8, 5, 4, 3),
]


def possible(
    n_experts: int, k: int, n_groups: int, n_chosen: int, activate: Sequence[int], deactivate: Sequence[int]
) -> list[tuple[int, ...]]:
    """Every choice of groups that holds all activated experts, and k that are not deactivated."""
    size = n_experts // n_groups
    choices = []
    for groups in combinations(range(n_groups), n_chosen):
        members = {expert for group in groups for expert in range(group * size, (group + 1) * size)}
        if set(activate) <= members and len(members - set(deactivate)) >= k:
            choices.append(groups)
    return choices


def all_plans(n_experts: int, k: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every plan of at most k activated and at most E − k deactivated experts."""
    plans = []
    for wishes in product((-1, 0, 1), repeat=n_experts):
        activate = tuple(expert for expert in range(n_experts) if wishes[expert] == 1)
        deactivate = tuple(expert for expert in range(n_experts) if wishes[expert] == -1)
        if len(activate) <= k and len(deactivate) <= n_experts - k:
            plans.append((activate, deactivate))
    return plans


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_there_is_an_obstacle_exactly_where_no_choice_of_groups_serves(
    config: tuple[int, int, int, int],
) -> None:
    n_experts, k, n_groups, n_chosen = config
    limit = GroupLimit(n_groups, n_chosen, n_summed=1)
    verdicts = set()
    for activate, deactivate in all_plans(n_experts, k):
        reason = limit.obstacle(n_experts, k, activate, deactivate)
        serves = bool(possible(*config, activate, deactivate))
        assert (reason is None) == serves, (activate, deactivate, reason)
        hold = Hold.of_experts(activate, deactivate, n_experts)
        assert bool(limit.possible(hold.inside, hold.outside, k)) == serves, (activate, deactivate)
        verdicts.add(serves)
    assert verdicts == {True, False}


def test_an_obstacle_names_the_experts_and_the_groups() -> None:
    limit = GroupLimit(n_groups=4, n_chosen=2, n_summed=2)
    reason = limit.obstacle(8, 3, (7, 0, 3), ())
    assert reason == (
        "the activated experts [0, 3, 7] stand in 3 of the router's 4 groups, and experts come from 2 "
        "group(s) only"
    )
    reason = limit.obstacle(8, 3, (), (6, 4, 2, 0))
    assert reason == (
        "without the deactivated experts [0, 2, 4, 6], no 2 of the router's 4 groups hold the 3 experts that "
        "must run"
    )


@settings(max_examples=150, deadline=None)
@given(
    config=st.sampled_from([*CONFIGS, (12, 4, 3, 2), (12, 3, 6, 3), (12, 7, 4, 3)]),
    data=st.data(),
    ties=st.booleans(),
)
def test_the_groups_are_the_best_that_serve_the_steering(
    config: tuple[int, int, int, int], data: st.DataObject, ties: bool
) -> None:
    n_experts, k, n_groups, n_chosen = config
    order = data.draw(st.permutations(range(n_experts)))
    n_activate = data.draw(st.integers(0, min(k, 2)))
    n_deactivate = data.draw(st.sampled_from([0, 1, (n_experts - k) // 2, n_experts - k]))
    activate, deactivate = order[:n_activate], order[n_experts - n_deactivate :]
    choices = possible(*config, activate, deactivate)
    limit = GroupLimit(n_groups, n_chosen, n_summed=1)
    if not choices:
        return
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    span = 3 if ties else 10**6
    scores = torch.randint(-span, span, (6, n_groups), generator=generator).float()
    available = torch.tensor(limit.available(n_experts, deactivate)).expand(2, 3, n_groups)
    needed = torch.zeros(2, 3, n_groups, dtype=torch.bool)
    needed[..., limit.required(n_experts, activate)] = True
    picked = limit._feasible_groups(scores.view(2, 3, n_groups), needed, available, k).view(6, n_groups)
    required = {expert // (n_experts // n_groups) for expert in activate}
    for token, mask in zip(scores.tolist(), picked.tolist(), strict=True):
        worth = {
            groups: sorted((token[group] for group in groups if group not in required), reverse=True)
            for groups in choices
        }
        groups = tuple(group for group in range(n_groups) if mask[group])
        assert groups in choices
        assert worth[groups] == max(worth.values())


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.sampled_from([(4, 2, 1), (4, 2, 2), (2, 4, 2), (3, 4, 1), (3, 4, 3)]),  # groups, size, summed
    data=st.data(),
)
def test_without_steering_the_groups_with_the_largest_sums_are_chosen(
    sizes: tuple[int, int, int], data: st.DataObject
) -> None:
    n_groups, size, n_summed = sizes
    n_chosen = data.draw(st.integers(1, n_groups))
    score = st.lists(st.integers(-50, 50), min_size=n_groups * size, max_size=n_groups * size)
    scores = data.draw(score)
    allowed = GroupLimit(n_groups, n_chosen, n_summed).allowed(torch.tensor(scores).float(), 1, None).tolist()
    members = [range(group * size, (group + 1) * size) for group in range(n_groups)]
    sums = [sum(sorted(scores[expert] for expert in each)[-n_summed:]) for each in members]
    chosen = [group for group in range(n_groups) if allowed[group * size]]
    assert allowed == [expert // size in chosen for expert in range(n_groups * size)]
    assert sorted(sums[group] for group in chosen) == sorted(sums)[-n_chosen:]


def test_a_deactivated_expert_counts_as_the_lowest_in_its_groups_sum() -> None:
    limit = GroupLimit(n_groups=2, n_chosen=1, n_summed=2)
    scores = torch.tensor([9.0, 9.0, 1.0, 4.0, 4.0, 4.0])  # 18 against 8; without expert 0, 9 + 1 against 8
    assert limit.allowed(scores, 1, None).tolist() == [True] * 3 + [False] * 3
    assert limit.allowed(scores, 1, Hold.of_experts((), (0,), 6)).tolist() == [True] * 3 + [False] * 3
    assert limit.allowed(scores, 1, Hold.of_experts((), (0, 1), 6)).tolist() == [False] * 3 + [True] * 3


def test_the_group_of_an_activated_expert_is_chosen_however_low_it_stands() -> None:
    scores = torch.tensor([9.0, 9.0, 5.0, 5.0, -1e6, -1e6])
    for hold in (Hold.of_experts((4,), (), 6), Hold.of_experts((4,), (5,), 6)):
        assert GroupLimit(3, 1, 2).allowed(scores, 1, hold).tolist() == [False] * 4 + [True] * 2


def test_tokens_on_which_steering_holds_nobody_choose_their_groups_as_ever() -> None:
    limit, scores = GroupLimit(4, 2, 2), torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    nobody = Hold.of_experts((0,), (5,), 8).on(torch.zeros(50, dtype=torch.bool))
    assert torch.equal(limit.allowed(scores, 3, nobody), limit.allowed(scores, 3, None))
