"""Controls: random sets that every router accepts, and the experts that score least."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens import is_routing_point
from moe_lens.detection.expert_scores import ExpertScores
from moe_lens.errors import DataError, MoELensError, PlanError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.shape import MoEShape
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.steering.controls import bottom_set, random_pairs, random_sets, share_experts
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan
from tests.tiny_models import tiny_model, tokenizer, tokens

Hooked = Callable[..., HookedMoE]

PLANS = {
    "olmoe": SteeringPlan([(0, 1), (2, 3)], [(1, 0), (1, 2), (2, 5)]),
    "qwen2_moe": SteeringPlan([(0, 1)], [(2, 0), (3, 2)]),
    # room for three of eight experts, from two of four groups of two
    "deepseek_v3": SteeringPlan([(1, 0), (1, 1)], [(1, 4), (2, 0), (2, 5)]),
    "deepseek_v2_grouped": SteeringPlan([(1, 0), (1, 1), (2, 7)], [(1, 4), (2, 0)]),
    "deepseek_v4_hash": SteeringPlan([(1, 0)], [(2, 1), (2, 3)]),  # layer 0 routes by a table
}
every_plan = pytest.mark.parametrize("recipe", PLANS)


def by_layer(experts: Any) -> Counter[int]:
    return Counter(layer for layer, _ in experts)


def scores(delta: Any, shape: MoEShape) -> ExpertScores:
    zeros = torch.zeros(len(shape.layers), shape.n_experts, dtype=torch.float64)
    counts = zeros.long()
    counts[:, : shape.top_k] = 1
    stats = RoutingStats(shape, 1, counts, zeros, zeros)
    return ExpertScores(torch.as_tensor(delta, dtype=torch.float64), stats, stats)


@every_plan
@pytest.mark.parametrize("layer_matched", [False, True])
def test_sets_have_the_size_and_every_router_obeys_them(
    hooked: Hooked, recipe: str, layer_matched: bool
) -> None:
    model, plan = hooked(recipe), PLANS[recipe]
    sets = random_sets(model, plan, 12, seed=1, layer_matched=layer_matched)
    assert len(sets) == 12
    assert len(set(sets)) > 1
    for one in sets:
        assert (len(one.activate), len(one.deactivate)) == (len(plan.activate), len(plan.deactivate))
        assert not set(one.activate) & set(one.deactivate)
        assert (one.epsilon, one.shape) == (plan.epsilon, model.moe_shape)
        if layer_matched:
            assert by_layer(one.activate) == by_layer(plan.activate)
            assert by_layer(one.deactivate) == by_layer(plan.deactivate)
        with model.hooks(steer_hooks(one)):
            _, cache = model.run_with_cache(tokens(2, 5), names_filter=is_routing_point)
        for layer, expert in one.activate:
            assert (cache["topk_indices", layer] == expert).any(-1).all()
        for layer, expert in one.deactivate:
            assert not (cache["topk_indices", layer] == expert).any()


@pytest.mark.parametrize("recipe", ["deepseek_v3", "deepseek_v2_grouped"])
def test_some_draws_without_the_model_are_refused_so_the_rules_matter(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    plan = SteeringPlan([(1, 0), (1, 1), (1, 2)], shape=model.moe_shape)
    refused = 0
    for seed in range(30):
        one = plan.random_like(seed=seed, layer_matched=True)
        refused += model.routing_rule(1).cannot_steer(*one.in_layer(1)) is not None
    assert refused > 0
    for one in random_sets(model, plan, 30, layer_matched=True):
        groups = {expert // 2 for _, expert in one.activate}
        assert len(groups) <= 2  # topk_group, of groups of 8 / 4 experts


def test_any_layer_sets_never_use_the_hash_layer(hooked: Hooked) -> None:
    sets = random_sets(hooked("deepseek_v4_hash"), PLANS["deepseek_v4_hash"], 30)
    assert {layer for one in sets for layer, _ in one.activate + one.deactivate} == {1, 2}


def test_a_plan_that_no_draw_can_match_is_refused_by_its_layer(hooked: Hooked) -> None:
    model = hooked("deepseek_v4_hash")
    with pytest.raises(PlanError, match="layer 0"):
        random_sets(model, SteeringPlan(deactivate=[(0, 1)]), 1, layer_matched=True)


def test_many_experts_of_many_layers_beside_a_hash_layer() -> None:
    """Nearly every draw from all layers would name the hash layer."""
    layers = {
        "num_hidden_layers": 8,
        "mlp_layer_types": ["hash_moe"] + ["moe"] * 7,
        "layer_types": ["sliding_attention"] * 8,
    }
    model = HookedMoE.from_hf(tiny_model("deepseek_v4_hash", **layers), tokenizer())
    plan = SteeringPlan(deactivate=[(layer, e) for layer in range(1, 8) for e in range(3)])
    assert len(random_sets(model, plan, 1)[0]) == 21


@every_plan
def test_the_seed_makes_the_sets(hooked: Hooked, recipe: str) -> None:
    model, plan = hooked(recipe), PLANS[recipe]
    for matched in (False, True):
        first = random_sets(model, plan, 6, seed=5, layer_matched=matched)
        assert first == random_sets(model, plan, 6, seed=5, layer_matched=matched)
        assert first[:3] == random_sets(model, plan, 3, seed=5, layer_matched=matched)
        assert first != random_sets(model, plan, 6, seed=6, layer_matched=matched)


@pytest.mark.broad
def test_every_expert_is_drawn_about_equally_often(hooked: Hooked) -> None:
    model = hooked("olmoe")
    sets = random_sets(model, SteeringPlan(deactivate=[(0, 0), (1, 1), (1, 2)]), 600, seed=2)
    drawn = Counter(expert for one in sets for expert in one.deactivate)
    assert set(drawn) == {(layer, expert) for layer in range(3) for expert in range(6)}
    assert all(60 < number < 140 for number in drawn.values())  # 100 expected, sd 9
    matched = random_sets(model, SteeringPlan(deactivate=[(1, 1), (1, 2)]), 300, layer_matched=True)
    drawn = Counter(expert for one in matched for expert in one.deactivate)
    assert set(drawn) == {(1, expert) for expert in range(6)}
    assert all(60 < number < 140 for number in drawn.values())  # 100 expected, sd 8


OVERLAPPING = {
    "swapped": ([(0, 1), (2, 3)], [(1, 0), (1, 2)], [(1, 0), (1, 2)], [(0, 1), (2, 3)]),
    "in part": ([(0, 1)], [(1, 0), (2, 5)], [(1, 0), (2, 2)], [(0, 1), (1, 2)]),
    "in one role": ([], [(1, 0), (1, 2)], [], [(1, 2), (2, 0)]),
}


@pytest.mark.parametrize("layer_matched", [False, True])
@pytest.mark.parametrize("case", OVERLAPPING)
def test_random_pairs_share_what_the_plans_share(hooked: Hooked, case: str, layer_matched: bool) -> None:
    model = hooked("olmoe")
    on, off, on_2, off_2 = OVERLAPPING[case]
    plan, reverse = SteeringPlan(on, off), SteeringPlan(on_2, off_2)
    assert share_experts(plan, reverse)
    pairs = random_pairs(model, plan, reverse, 12, seed=1, layer_matched=layer_matched)
    assert len(set(pairs)) > 6
    for plus, minus in pairs:
        before, after = [*on, *off, *on_2, *off_2], [
            *plus.activate, *plus.deactivate, *minus.activate, *minus.deactivate
        ]  # fmt: skip
        assert len(before) == len(after)
        names = dict(zip(before, after, strict=True))  # the same expert has the same new name everywhere
        assert [names[expert] for expert in before] == after
        assert len(set(names.values())) == len(names)
        if layer_matched:
            assert all(old[0] == new[0] for old, new in names.items())
        for one, like in ((plus, plan), (minus, reverse)):
            one.check_fits(model.moe_shape)
            assert one.refused_layers(model) == []
            assert (len(one.activate), len(one.deactivate)) == (len(like.activate), len(like.deactivate))


@pytest.mark.parametrize("layer_matched", [False, True])
@pytest.mark.parametrize("recipe", ["deepseek_v3", "deepseek_v2_grouped", "deepseek_v4_hash"])
def test_random_pairs_of_routers_that_refuse_much(hooked: Hooked, recipe: str, layer_matched: bool) -> None:
    model, plan = hooked(recipe), PLANS[recipe]
    for plus, minus in random_pairs(model, plan, plan.reversed(), 20, layer_matched=layer_matched):
        assert minus == plus.reversed()
        assert plus.refused_layers(model) == minus.refused_layers(model) == []


def test_the_seed_makes_the_pairs(hooked: Hooked) -> None:
    model, plan = hooked("olmoe"), PLANS["olmoe"]
    both = (plan, plan.reversed())
    first = random_pairs(model, *both, 6, seed=5)
    assert first == random_pairs(model, *both, 6, seed=5)
    assert first[:3] == random_pairs(model, *both, 3, seed=5)
    assert first != random_pairs(model, *both, 6, seed=6)
    with pytest.raises(DataError, match="from 0 on"):
        random_pairs(model, *both, -1)


@pytest.mark.broad
@pytest.mark.parametrize("layer_matched", [False, True])
def test_every_expert_is_drawn_about_equally_often_for_pairs(hooked: Hooked, layer_matched: bool) -> None:
    plan = SteeringPlan([(1, 0)], [(1, 1)])
    pairs = random_pairs(hooked("olmoe"), plan, plan.reversed(), 600, seed=2, layer_matched=layer_matched)
    drawn = Counter(expert for plus, _ in pairs for expert in (*plus.activate, *plus.deactivate))
    layers = [1] if layer_matched else [0, 1, 2]
    assert set(drawn) == {(layer, expert) for layer in layers for expert in range(6)}
    expected = 1200 / len(drawn)
    assert all(0.7 * expected < number < 1.3 * expected for number in drawn.values())


@pytest.mark.parametrize("layer_matched", [False, True])
@pytest.mark.parametrize("expert", [(77, 0), (0, 300)])
def test_pairs_of_plans_for_another_model_are_refused(
    hooked: Hooked, expert: tuple[int, int], layer_matched: bool
) -> None:
    plan = SteeringPlan(deactivate=[expert])
    with pytest.raises(PlanError, match=f"{max(expert)}"):
        random_pairs(hooked("olmoe"), plan, plan.reversed(), 1, layer_matched=layer_matched)


def test_no_room_for_pairs_is_refused(hooked: Hooked) -> None:
    """The table of layer 0 decides there, and the other layers activate k experts each at most."""
    model = hooked("deepseek_v4_hash")
    k = model.moe_shape.top_k
    plan = SteeringPlan([(layer, e) for layer in range(3) for e in range(k)])
    with pytest.raises(PlanError, match="there is no room"):
        random_pairs(model, plan, SteeringPlan([(0, 0)], [(0, 5)]), 1)


def test_pairs_that_fit_with_little_room_to_spare_are_found(hooked: Hooked) -> None:
    """Every plan fills every layer: most orders of drawing leave no room for the last experts."""
    model = hooked("olmoe")
    layers = range(3)
    plan = SteeringPlan([(layer, e) for layer in layers for e in (0, 1, 2)])
    reverse = SteeringPlan([(layer, e) for layer in layers for e in (2, 3, 4)])
    assert model.moe_shape.top_k == 3
    for plus, minus in random_pairs(model, plan, reverse, 30):
        for one in (plus, minus):
            assert by_layer(one.activate) == {0: 3, 1: 3, 2: 3}
        assert len({*plus.activate} & {*minus.activate}) == 3


@pytest.mark.parametrize("arguments", [{"n": -1}, {"n": 1, "seed": -1}])
def test_numbers_from_0_on(hooked: Hooked, arguments: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="from 0 on"):
        random_sets(hooked("olmoe"), PLANS["olmoe"], **arguments)
    assert random_sets(hooked("olmoe"), PLANS["olmoe"], 0) == []


def test_a_plan_that_does_not_fit_the_model_is_refused(hooked: Hooked) -> None:
    with pytest.raises(MoELensError, match="expert 6"):
        random_sets(hooked("olmoe"), SteeringPlan(deactivate=[(0, 6)]), 1)


# The experts that score least

SHAPE = MoEShape("m", (1, 4), 6, 2)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(-3, 3).map(lambda i: i / 4), min_size=6, max_size=6), min_size=2, max_size=2
    ),
    st.integers(0, 8),
)
def test_bottom_has_the_smallest_scores_that_fit(delta: list[list[float]], n: int) -> None:
    room = SHAPE.max_deactivated
    size = {(layer, e): abs(delta[row][e]) for row, layer in enumerate((1, 4)) for e in range(6)}
    named = [(layer, e) for e in range(room) for layer in (1, 4)][:n]
    plan = SteeringPlan((), named, 0.3, SHAPE)
    bottom = bottom_set(scores(delta, SHAPE), plan)
    smallest = sorted(s for row in delta for s in sorted(map(abs, row))[:room])[:n]
    assert sorted(size[expert] for expert in bottom.deactivate) == smallest
    assert len(set(bottom.deactivate)) == n
    assert (bottom.activate, bottom.epsilon, bottom.shape) == ((), 0.3, SHAPE)
    bottom.check_fits(SHAPE)


def test_bottom_of_a_plan_with_activations_names_each_expert_once() -> None:
    delta = [[0.01, -0.02, 0.03, -0.04, 0.5, 0.6], [0.7, 0.8, -0.9, 0.05, 0.06, 1.0]]
    plan = SteeringPlan([(1, 4), (4, 0)], [(1, 5), (4, 2)], shape=SHAPE)
    bottom = bottom_set(scores(delta, SHAPE), plan)
    assert set(bottom.deactivate) == {(1, 0), (1, 1)}
    assert set(bottom.activate) == {(1, 2), (1, 3)}
    overruled = SteeringPlan([(1, 4), (1, 5)], [(1, 5)], shape=SHAPE)  # (1, 5) is deactivated only
    assert len(bottom_set(scores(delta, SHAPE), overruled)) == len(overruled) == 2


def test_a_layer_that_is_full_passes_on_to_the_next() -> None:
    delta = [[0.01] * 6, [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]]
    plan = SteeringPlan((), [(1, 0), (1, 1), (1, 2), (1, 3), (4, 4)], shape=SHAPE)
    bottom = bottom_set(scores(delta, SHAPE), plan)
    assert by_layer(bottom.deactivate) == {1: 4, 4: 1}
    assert (4, 0) in bottom.deactivate


def test_no_room_is_said() -> None:
    small = MoEShape("m", (1,), 6, 2)
    plan = SteeringPlan((), [(1, 0), (1, 1), (4, 0), (4, 1), (4, 2)], shape=SHAPE)
    with pytest.raises(PlanError, match="does not fit"):
        bottom_set(scores([[0.1] * 6], small), plan)
