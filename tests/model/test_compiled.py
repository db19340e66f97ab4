"""Routing hooks under torch.compile act in every order of hooked and unhooked runs; plans compile whole.

dynamo sets no guard on a module's hooks (skip_nnmodule_hook_guards), so a trace made without hooks must not
hold the router.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from moe_lens import HookedMoE, RoutedModel, SteeringPlan, hook_names, steer_hooks, zero_ablate
from moe_lens.hook_names import HookList
from tests.tiny_models import EVERY_FAMILY, tiny_model, tokens

pytestmark = pytest.mark.broad  # compilers take their time; test_routed_model_as_it_was.py compiles one

ORDERS = ("unhooked, plan, ablation", "ablation, plan, unhooked", "plan, unhooked, ablation")


@pytest.fixture(autouse=True)
def fresh_traces() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def hooks_of(model: Any, kind: str) -> HookList:
    layer = model.moe_layers[-1]
    return {
        "unhooked": [],
        "plan": steer_hooks(SteeringPlan([(layer, 1)], [(layer, 2)])),
        "ablation": zero_ablate([(layer, 0), (layer, 3)]),
        "weights": [(hook_names.topk_weights(layer), lambda weights, hook: weights * 2)],
        "indices": [(hook_names.topk_indices(layer), lambda indices, hook: (indices + 1) % model.n_experts)],
    }[kind]


def compiled(model: Any, how: str) -> Any:
    if how == "model.compile()":
        model.original_model.compile(backend="eager")
    elif how == "each layer":
        for block in model.blocks if isinstance(model, HookedMoE) else model.hf_model.model.layers:
            block.compile(backend="eager")
    elif how == "its forward":
        model.original_model.forward = torch.compile(model.original_model.forward, backend="eager")
    else:
        return torch.compile(lambda given: model(given), backend="eager")
    return model


def broad(*values: Any) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.broad) for value in values]


def broad_case(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.broad)


@pytest.mark.parametrize(
    ("recipe", "order", "how", "build"),
    [
        ("olmoe", ORDERS[0], "model.compile()", RoutedModel),
        broad_case("deepseek_v3", ORDERS[0], "model.compile()", RoutedModel),
        *(broad_case("olmoe", order, "model.compile()", RoutedModel) for order in ORDERS[1:]),
        *(
            broad_case("olmoe", ORDERS[0], how, RoutedModel)
            for how in ("each layer", "torch.compile(f)", "its forward")
        ),
        *(
            broad_case(recipe, ORDERS[0], how, HookedMoE.from_hf)
            for recipe, how in (("olmoe", "model.compile()"), ("deepseek_v3", "torch.compile(f)"))
        ),
    ],
)
def test_hooks_act_in_any_order(recipe: str, order: str, how: str, build: Callable[..., Any]) -> None:
    plain, given = build(tiny_model(recipe)), tokens(2, 5)
    kinds = [*order.split(", "), "weights", "indices"]
    with torch.no_grad():
        expected = {kind: plain.run_with_hooks(given, fwd_hooks=hooks_of(plain, kind)) for kind in kinds}
        assert all(
            not torch.equal(expected[kind], expected["unhooked"]) for kind in kinds if kind != "unhooked"
        )
        model = build(tiny_model(recipe))
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


@pytest.mark.broad
def test_hooks_act_in_a_compiled_generation_with_a_static_cache() -> None:
    model, given = RoutedModel(tiny_model("olmoe")), tokens(2, 5)
    hf_model: Any = model.hf_model
    options: Any = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}

    def written(**more: Any) -> list[torch.Tensor]:
        outputs = []
        for kind in ("unhooked", "plan", "ablation", "unhooked"):
            with model.hooks(hooks_of(model, kind)), torch.no_grad():
                outputs.append(hf_model.generate(given, **options, **more))
        return outputs

    expected = written()
    assert not torch.equal(expected[0], expected[1])
    hf_model.forward = torch.compile(hf_model.forward, backend="eager")
    for way in ({}, {"cache_implementation": "static"}):
        assert all(map(torch.equal, written(**way), expected)), way


@pytest.mark.parametrize("recipes", [["olmoe", "deepseek_v3"], *broad(EVERY_FAMILY)], ids=["two", "all"])
def test_a_model_steered_by_a_plan_compiles_whole(recipes: list[str]) -> None:
    command = [sys.executable, "-m", "tests.model.compiled_whole", *recipes]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout == "".join(f"{recipe} compiles whole\n" for recipe in recipes), run.stderr[-3000:]


@torch.no_grad()
def test_residual_hooks_act_too() -> None:
    model, given = RoutedModel(tiny_model("olmoe")), tokens(2, 5)
    hooks: HookList = [("blocks.1.hook_resid_pre", lambda value, hook: value * 0.5)]
    before, expected = model(given), model.run_with_hooks(given, fwd_hooks=hooks)
    run = compiled(model, "model.compile()")
    for _ in range(2):
        assert torch.equal(run(given), before)
        with model.hooks(hooks):
            assert torch.equal(run(given), expected)
    assert not torch.equal(before, expected)
