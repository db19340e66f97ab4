"""Routing hooks under torch.compile: they act in every order of hooked and unhooked runs.

dynamo sets no guard on a module's hooks (skip_nnmodule_hook_guards), so a trace made without hooks must not
hold the router.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moe_lens import HookedMoE, SteeringPlan, hook_names, steer_hooks, zero_ablate
from moe_lens.hook_names import HookList
from tests.tiny_models import tiny_model, tokens

ORDERS = ("unhooked, plan, ablation", "ablation, plan, unhooked", "plan, unhooked, ablation")


@pytest.fixture(autouse=True)
def fresh_traces() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def hooks_of(model: HookedMoE, kind: str) -> HookList:
    layer = model.moe_layers[-1]
    return {
        "unhooked": [],
        "plan": steer_hooks(SteeringPlan([(layer, 1)], [(layer, 2)])),
        "ablation": zero_ablate([(layer, 0), (layer, 3)]),
        "weights": [(hook_names.topk_weights(layer), lambda weights, hook: weights * 2)],
        "indices": [(hook_names.topk_indices(layer), lambda indices, hook: (indices + 1) % model.n_experts)],
    }[kind]


def compiled(model: HookedMoE, how: str) -> Any:
    if how == "model.compile()":
        model.original_model.compile(backend="eager")
    elif how == "each layer":
        for block in model.blocks:
            block.compile(backend="eager")
    else:
        return torch.compile(lambda given: model(given), backend="eager")
    return model


@pytest.mark.parametrize("how", ["model.compile()", "each layer", "torch.compile(f)"])
@pytest.mark.parametrize(
    "order", [ORDERS[0], *(pytest.param(order, marks=pytest.mark.broad) for order in ORDERS[1:])]
)
@pytest.mark.parametrize("recipe", ["olmoe", "deepseek_v3"])
def test_hooks_act_in_any_order(recipe: str, order: str, how: str) -> None:
    plain, given = HookedMoE.from_hf(tiny_model(recipe)), tokens(2, 5)
    kinds = [*order.split(", "), "weights", "indices"]
    with torch.no_grad():
        expected = {kind: plain.run_with_hooks(given, fwd_hooks=hooks_of(plain, kind)) for kind in kinds}
        assert all(
            not torch.equal(expected[kind], expected["unhooked"]) for kind in kinds if kind != "unhooked"
        )
        model = HookedMoE.from_hf(tiny_model(recipe))
        run = compiled(model, how)
        for kind in kinds * 2:
            with model.hooks(hooks_of(model, kind)):
                assert torch.equal(run(given), expected[kind]), kind


def test_hooks_on_expert_outputs_act_too() -> None:
    plain, given = HookedMoE.from_hf(tiny_model("olmoe")), tokens(2, 5)
    model = HookedMoE.from_hf(tiny_model("olmoe"))
    model.original_model.compile(backend="eager")
    with torch.no_grad():
        before = model(given)
        for each in (plain, model):
            each.set_use_expert_out(True)
        hooks: HookList = [(hook_names.expert_out(1), lambda outputs, hook: outputs * 2)]
        edited = plain.run_with_hooks(given, fwd_hooks=hooks)
        assert not torch.equal(edited, before)
        assert torch.equal(model.run_with_hooks(given, fwd_hooks=hooks), edited)
        assert torch.equal(model(given), before)
