"""On every family: plans for some prompts and positions steer those, and leave all others alone."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import SteeringPlan, exclude_experts, route_around, steer_hooks
from moe_lens.errors import HookError
from moe_lens.statistics.routing_stats import is_routing_point
from tests.edits import SPELLERS
from tests.families import every_family_in_every_dtype, one_of_each_kind
from tests.promises.decisions import Hooked, padded
from tests.tiny_models import tokens

pytestmark = pytest.mark.usefixtures("no_gradients")
IN, OUT = 3, 1


def first_layer(model: Any) -> int:
    return next(n for n in model.moe_layers if model.routing_rule(n).cannot_steer([IN], [OUT]) is None)


def routing(model: Any, hooks: Any, layer: int, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, indices and weights of a layer, [batch pos ...] each."""
    given = kwargs.pop("given", tokens(3, 6))
    with model.hooks(list(hooks)):
        _, cache = model.run_with_cache(given, names_filter=is_routing_point, **kwargs)
    logits, indices, weights = (cache[spell(layer)] for spell in SPELLERS)
    return logits, indices, weights


def assert_obeyed(indices: Tensor) -> None:
    assert bool((indices == IN).any(-1).all())
    assert not bool((indices == OUT).any())


def assert_same(ours: Any, theirs: Any, tokens_: Any) -> None:
    """Bit for bit; steered logits are float32, which holds every value of a coarser dtype."""
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine[tokens_].double(), other[tokens_].double())
    assert ours[2].dtype == theirs[2].dtype


@every_family_in_every_dtype
def test_what_is_not_steered_keeps_its_route_bit_for_bit(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    model = hooked(recipe, dtype)
    layer = first_layer(model)
    plan = SteeringPlan([(layer, IN)], [(layer, OUT)])
    unhooked = routing(model, [], layer)
    some = torch.zeros(3, 6, dtype=torch.bool)
    some[1, 2:4] = some[2, 0] = True
    second, first_column = torch.zeros(2, 3, 6, dtype=torch.bool)
    second[1] = first_column[1:, 0] = True
    for hooks, steered in (
        (steer_hooks([None, plan, None]), second),
        (steer_hooks(plan, positions=some), some),
        (steer_hooks([None, plan, plan], positions=[0]), first_column),
        (route_around([(layer, OUT)], positions=some), some),
        (exclude_experts({layer: some[..., None] & (torch.arange(model.n_experts) == OUT)}), some),
    ):
        found = routing(model, hooks, layer)
        assert_same(found, unhooked, ~steered)
        assert not bool((found[1][steered] == OUT).any())
        if "Steering" in type(hooks[0][1]).__name__:
            assert_obeyed(found[1][steered])
        assert bool(found[2].isfinite().all())


@every_family_in_every_dtype
def test_several_plans_are_each_what_it_is_alone(hooked: Hooked, recipe: str, dtype: torch.dtype) -> None:
    model = hooked(recipe, dtype)
    layer = first_layer(model)
    plans = [
        SteeringPlan([(layer, IN)], [(layer, OUT)]),
        SteeringPlan(deactivate=[(layer, 0)], epsilon=0.5),
        SteeringPlan([(layer, OUT)], epsilon=2.0),
    ]
    input_ids, mask = padded()
    together = routing(model, steer_hooks(plans), layer, given=input_ids, **mask)
    for row, plan in enumerate(plans):
        alone = routing(model, steer_hooks(plan), layer, given=input_ids, **mask)
        assert_same(together, alone, row)


@one_of_each_kind
def test_a_plan_called_on_a_slice_steers_that_slice(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    layer = first_layer(model)
    [(name, plan)] = steer_hooks(SteeringPlan([(layer, IN)], [(layer, OUT)]))
    [(_, other)] = steer_hooks(SteeringPlan([(layer, OUT)], [(layer, IN)]))
    unhooked = routing(model, [], layer)

    def slices(logits: Tensor, hook: Any) -> Tensor:
        logits = logits.clone()
        logits[:1] = plan(logits[:1], hook)
        logits[1:, ::2] = other(logits[1:, ::2], hook)
        logits[1, 3] = plan(logits[1, 3], hook)
        return logits

    def copies(logits: Tensor, hook: Any) -> Tensor:
        edited = logits.clone()
        rows, columns = torch.tensor([0, 2]), torch.tensor([5, 1])
        edited[rows, columns] = plan(logits[rows, columns], hook).to(edited.dtype)
        return edited

    found = routing(model, [(name, slices)], layer)
    assert_obeyed(found[1][:1])
    assert bool((found[1][1:, ::2] == OUT).any(-1).all())
    assert not bool((found[1][1:, ::2] == IN).any())
    assert_obeyed(found[1][1, 3])
    left = torch.zeros(3, 6, dtype=torch.bool)
    left[1:, 1::2] = True
    left[1, 3] = False
    assert_same(found, unhooked, left)

    found = routing(model, [(name, copies)], layer)
    touched = torch.zeros(3, 6, dtype=torch.bool)
    touched[0, 5] = touched[2, 1] = True
    assert_obeyed(found[1][touched])
    assert_same(found, unhooked, ~touched)


def test_what_cannot_be_told_apart_is_refused(hooked: Hooked) -> None:
    model = hooked("deepseek_v3")
    layer = first_layer(model)
    [(name, plan)] = steer_hooks(SteeringPlan([(layer, IN)], [(layer, OUT)]))
    twins = tokens(1, 5).repeat(2, 1)

    def run(edit: Any) -> None:
        model.run_with_hooks(twins, fwd_hooks=[(name, edit)])

    with pytest.raises(HookError, match=r"positions="):
        run(lambda z, hook: torch.stack([plan(z[0].clone(), hook), z[1]]))  # both rows hold these values
    with pytest.raises(HookError, match=r"positions="):
        run(lambda z, hook: torch.cat([plan(z[:1] + 1, hook), z[1:]]))
    with pytest.raises(HookError, match=f"all {model.n_experts} experts"):
        run(lambda z, hook: torch.cat([plan(z[..., :5], hook), z[..., 5:]], -1))

    def set_rule(logits: Tensor, hook: Any) -> Tensor:
        part, hook.rule = hook.rule.steer(logits[:1], [IN], [OUT], 0.01)
        return torch.cat([part, logits[1:]])

    with pytest.raises(HookError, match=r"\[batch pos\] = \[2, 5\] are running"):
        run(set_rule)


def test_another_number_of_prompts_than_plans_is_refused(hooked: Hooked) -> None:
    model = hooked("olmoe")
    plan = SteeringPlan([(0, IN)])
    with pytest.raises(HookError, match=r"2 plans were given, one a prompt, and 3 prompts run"):
        model.run_with_hooks(tokens(3, 4), fwd_hooks=steer_hooks([plan, None]))
    one = model.run_with_hooks(tokens(3, 4), fwd_hooks=steer_hooks([plan]))
    assert torch.equal(one, model.run_with_hooks(tokens(3, 4), fwd_hooks=steer_hooks(plan)))


@one_of_each_kind
def test_soft_plans_are_the_formula_and_hold_nobody(hooked: Hooked, recipe: str) -> None:
    """z ± strength · std(z), written out token by token in float64."""
    model = hooked(recipe)
    layer = first_layer(model)
    plan = SteeringPlan([(layer, IN)], [(layer, OUT)])
    unhooked = routing(model, [], layer)
    assert_same(routing(model, steer_hooks(plan, strength=0), layer), unhooked, slice(None))
    for strength in (0.5, 3):
        logits, indices, weights = routing(model, steer_hooks(plan, strength=strength), layer)
        assert logits.dtype == unhooked[0].dtype
        for z, steered in zip(unhooked[0].flatten(0, 1).double(), logits.flatten(0, 1).double(), strict=True):
            std = math.sqrt(sum((float(x) - float(z.mean())) ** 2 for x in z) / len(z))
            expected = z.clone()
            expected[IN] += strength * std
            expected[OUT] -= strength * std
            torch.testing.assert_close(steered, expected, rtol=1e-5, atol=1e-5)
        by_rule = model.routing_rule(layer).route(logits.flatten(0, 1))
        assert torch.equal(indices.flatten(0, 1), by_rule.indices)
        torch.testing.assert_close(weights.flatten(0, 1), by_rule.weights.to(weights.dtype))
    assert_same(
        routing(model, steer_hooks(plan, strength=math.inf), layer),
        routing(model, steer_hooks(plan), layer),
        slice(None),
    )
