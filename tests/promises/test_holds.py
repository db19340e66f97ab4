"""On every family: a plan holds beside any hook that is about other experts, or about all of them.

The oracle is brute force: of all sets of k experts that the plan allows, the chosen one is as good as the
router's own scores of the edited logits make any (`Obeyed` in test_steering.py, and the order here).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import SteeringPlan, bias_experts, hook_names, route_around, steer_hooks
from moe_lens.statistics.routing_stats import is_routing_point
from tests.families import every_family_in_every_dtype, one_of_each_kind
from tests.promises.decisions import Hooked
from tests.tiny_models import tokens

pytestmark = pytest.mark.usefixtures("no_gradients")
IN, OUT, OTHER = 3, 1, 0

Edit = Callable[[Tensor], Tensor]


def noise(logits: Tensor, scale: float = 0.1) -> Tensor:
    drawn = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    return (scale * drawn).to(logits.dtype)


EDITS: dict[str, Edit] = {
    "shift": lambda z: z + 0.1,
    "noise": lambda z: z + noise(z),
    "loud noise": lambda z: z + noise(z, 5.0),
    "temperature": lambda z: z / 3,
    "dense vector": lambda z: z + torch.linspace(-2, 2, z.shape[-1]).to(z.dtype),
    "bfloat16": lambda z: z.bfloat16(),
    "float16": lambda z: z.half(),
    "bfloat16 and back": lambda z: z.bfloat16().float(),
    "another expert": lambda z: z + 0.1 * (torch.arange(z.shape[-1]) == OTHER).to(z.dtype),
    "another expert, far": lambda z: z + 1e4 * (torch.arange(z.shape[-1]) == OTHER).to(z.dtype),
    "in place": lambda z: z.add_(0.3),
}


def steerable(model: Any) -> list[int]:
    return [n for n in model.moe_layers if model.routing_rule(n).cannot_steer([IN], [OUT]) is None]


def plan_for(layers: list[int]) -> SteeringPlan:
    return SteeringPlan([(n, IN) for n in layers], [(n, OUT) for n in layers])


def assert_holds(cache: Any, layers: list[int]) -> None:
    for layer in layers:
        indices = cache["topk_indices", layer]
        assert bool((indices == IN).any(-1).all())
        assert not bool((indices == OUT).any())
        assert bool((indices.sort(-1).values.diff() > 0).all())
        assert bool(cache["topk_weights", layer].isfinite().all())


@every_family_in_every_dtype
def test_a_plan_holds_beside_hooks_on_the_logits(hooked: Hooked, recipe: str, dtype: torch.dtype) -> None:
    model = hooked(recipe, dtype)
    layers = steerable(model)
    assert layers
    for name, edit in EDITS.items():
        later: list[Any] = [(hook_names.router_logits(n), lambda z, hook, edit=edit: edit(z)) for n in layers]
        with model.hooks([*steer_hooks(plan_for(layers)), *later]):
            _, cache = model.run_with_cache(tokens(), names_filter=is_routing_point)
        try:
            assert_holds(cache, layers)
        except AssertionError as error:
            raise AssertionError(f"beside: {name}") from error


@pytest.mark.broad
@one_of_each_kind
def test_a_plan_holds_beside_hooks_under_autocast(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    layers = steerable(model)
    for edit in EDITS.values():
        later: list[Any] = [(hook_names.router_logits(n), lambda z, hook, edit=edit: edit(z)) for n in layers]
        with torch.autocast("cpu", torch.bfloat16), model.hooks([*steer_hooks(plan_for(layers)), *later]):
            _, cache = model.run_with_cache(tokens(), names_filter=is_routing_point)
        assert_holds(cache, layers)


@one_of_each_kind
def test_plans_interventions_and_casts_add_up(hooked: Hooked, recipe: str) -> None:
    """A plan, a bias on another expert, an expert routed around, in both orders."""
    model = hooked(recipe)
    layers = [n for n in steerable(model) if model.routing_rule(n).cannot_steer([IN], [OUT, OTHER]) is None]
    if not layers:
        pytest.skip("its groups have no room for a third expert")
    bias = 0.1 * torch.eye(model.n_experts)[2]
    around = route_around([(n, OTHER) for n in layers])
    for hooks in (
        [*steer_hooks(plan_for(layers)), *bias_experts(dict.fromkeys(layers, bias)), *around],
        [*around, *steer_hooks(plan_for(layers)), *bias_experts(dict.fromkeys(layers, bias))],
    ):
        with model.hooks(hooks):
            _, cache = model.run_with_cache(tokens(), names_filter=is_routing_point)
        assert_holds(cache, layers)
        assert not any(bool((cache["topk_indices", n] == OTHER).any()) for n in layers)


@one_of_each_kind
def test_the_others_keep_the_order_that_the_later_hook_gives_them(hooked: Hooked, recipe: str) -> None:
    """Beside a bias on another expert: the best of the others, by the unsteered rule on biased logits."""
    model = hooked(recipe)
    layer = steerable(model)[-1]
    rule = model.routing_rule(layer)
    bias = 0.3 * torch.eye(model.n_experts)[2]
    _, plain = model.run_with_cache(tokens(), names_filter=is_routing_point)
    with model.hooks([*steer_hooks(plan_for([layer])), *bias_experts({layer: bias})]):
        _, cache = model.run_with_cache(tokens(), names_filter=is_routing_point)
    if getattr(rule, "groups", None) is not None or type(rule).__name__ == "BiasedSoftmaxTopK":
        assert_holds(cache, [layer])  # a bias on one logit moves the p of all: no order to compare with
        return
    scores = rule.selection_scores(plain["router_logits", layer] + bias).flatten(0, 1)
    for token, chosen in zip(
        scores.tolist(), cache["topk_indices", layer].flatten(0, 1).tolist(), strict=True
    ):
        others = [expert for expert in range(model.n_experts) if expert not in (IN, OUT)]
        best = sorted(others, key=lambda expert: -token[expert])[: model.top_k - 1]
        assert set(chosen) == {IN, *best}


@one_of_each_kind
def test_a_later_hook_about_a_steered_expert_sets_it_free(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    layer = steerable(model)[-1]

    def lower(logits: Tensor, hook: Any) -> Tensor:
        logits = logits.clone()
        logits[0, :, IN] -= 1e4
        return logits

    with model.hooks([*steer_hooks(plan_for([layer])), (hook_names.router_logits(layer), lower)]):
        _, cache = model.run_with_cache(tokens(), names_filter=is_routing_point)
    indices = cache["topk_indices", layer]
    biased = getattr(model.routing_rule(layer), "bias", None) is not None
    assert biased or not bool((indices[0] == IN).any())
    assert bool((indices[1] == IN).any(-1).all())
    assert not bool((indices == OUT).any())  # that one stays held


@one_of_each_kind
def test_of_two_plans_on_one_layer_the_later_one_counts(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    layer = steerable(model)[-1]
    first, second = SteeringPlan([(layer, IN)], [(layer, OUT)]), SteeringPlan([(layer, OUT)], [(layer, IN)])
    with model.hooks([*steer_hooks(first), *steer_hooks(second, positions=[0, 1])]):
        _, cache = model.run_with_cache(tokens(), names_filter=is_routing_point)
    indices = cache["topk_indices", layer]
    assert bool((indices[:, 2:] == IN).any(-1).all())
    assert not bool((indices[:, 2:] == OUT).any())
    assert bool((indices[:, :2] == OUT).any(-1).all())
    assert not bool((indices[:, :2] == IN).any())
