"""Logits read directly: only as they were seen to be, and otherwise by the router's own forward."""

import copy
from typing import Any

import pytest
import torch

from moe_lens import RoutedModel, SteeringPlan, hook_names, steer_hooks, with_top_k
from moe_lens.errors import PlanError
from tests.families import some_kinds
from tests.tiny_models import tiny_model, tokens


def both_ways(model: RoutedModel, plan: SteeringPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits under the plan alone, and beside a hook that does nothing."""
    given, hooks = tokens(2, 6), steer_hooks(plan)
    nothing = [(hook_names.topk_weights(layer), lambda weights, hook: None) for layer in model.moe_layers]
    return model.run_with_hooks(given, fwd_hooks=hooks), model.run_with_hooks(
        given, fwd_hooks=hooks + nothing
    )


def a_plan(model: RoutedModel) -> SteeringPlan:
    layer = model.moe_layers[-1]
    return SteeringPlan(activate=[(layer, 1)], deactivate=[(layer, 2)])


@some_kinds
@torch.no_grad()
def test_a_plan_alone_gives_what_it_gives_beside_other_hooks(recipe: str) -> None:
    model = RoutedModel(tiny_model(recipe))
    plan = a_plan(model)
    assert torch.equal(*both_ways(model, plan))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(*both_ways(model, plan))
    assert torch.equal(*both_ways(model.to(torch.bfloat16), plan))


@torch.no_grad()
def test_a_bias_that_was_zero_counts_when_it_is_loaded() -> None:
    source: Any = tiny_model("gpt_oss")
    weights = copy.deepcopy(source.state_dict())
    for name, parameter in source.named_parameters():
        if name.endswith("router.bias"):
            parameter.zero_()
    model, plan = RoutedModel(source), SteeringPlan(deactivate=[(0, 2)])
    model.run_with_hooks(tokens(2, 6), fwd_hooks=steer_hooks(plan))
    source.load_state_dict(weights)
    fresh = RoutedModel(tiny_model("gpt_oss"))
    expected = fresh.run_with_hooks(tokens(2, 6), fwd_hooks=steer_hooks(plan))
    assert torch.equal(model.run_with_hooks(tokens(2, 6), fwd_hooks=steer_hooks(plan)), expected)


@some_kinds
@torch.no_grad()
def test_a_router_in_float32_in_a_model_of_bfloat16(recipe: str) -> None:
    model = RoutedModel(tiny_model(recipe))
    plan = a_plan(model)
    both_ways(model, plan)
    routers = [model.hf_model.get_submodule(name) for name, _ in model.hf_model.named_modules() if name]
    kept = {id(module): module for module in routers if type(module).__name__.lower().endswith("router")}
    model.hf_model.to(torch.bfloat16)
    for module in kept.values():
        module.float()
    try:
        model(tokens(2, 6))
    except RuntimeError:
        pytest.skip("the plain model cannot run so")
    assert torch.equal(*both_ways(model, plan))


def test_another_k_is_asked_whether_it_can_obey() -> None:
    model = RoutedModel(tiny_model("olmoe"))  # 6 experts, k = 3
    for plan, k in (
        (SteeringPlan([(1, 0), (1, 2), (1, 3)]), 2),
        (SteeringPlan((), [(1, 0), (1, 2), (1, 3)]), 5),
    ):
        with model.hooks(steer_hooks(plan)), with_top_k(model, k), pytest.raises(PlanError, match="Layer 1"):
            model(tokens(1, 4))
        with with_top_k(model, 3), model.hooks(steer_hooks(plan)):
            model(tokens(1, 4))
