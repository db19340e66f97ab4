"""On every family: a plan holds on every token; what cannot be kept is refused before the run."""

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from moe_lens import hook_names
from moe_lens.errors import PlanError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.statistics.routing_stats import is_routing_point
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan
from tests import router_oracle as oracle
from tests.families import every_dtype, every_family_in_every_dtype, one_of_each_kind
from tests.promises.decisions import Hooked, Plain, generate, hf_model, is_hash, padded, routing
from tests.tiny_models import (
    hook_census,
    tokens,
)

pytestmark = pytest.mark.usefixtures("no_gradients")


def group_limit(router: Any) -> tuple[int, int]:
    """Number of groups, and of how many of them experts may come."""
    if not hasattr(router, "topk_group") or getattr(router, "topk_method", "") == "greedy":
        return 1, 1
    return router.num_group, router.topk_group


def is_feasible(router: Any, n_experts: int, k: int, activate: list[int], deactivate: list[int]) -> bool:
    """Whether some choice of groups holds all activated experts and k that are not deactivated."""
    n_groups, n_chosen = group_limit(router)
    size = n_experts // n_groups
    for groups in itertools.combinations(range(n_groups), n_chosen):
        inside = [expert for expert in range(n_experts) if expert // size in groups]
        if set(activate) <= set(inside) and len(set(inside) - set(deactivate)) >= k:
            return True
    return False


def draw(generator: random.Random, n_experts: int, k: int, most: bool) -> tuple[list[int], list[int]]:
    """Random experts to activate and to deactivate, as many as possible if `most`."""
    n_activate = k if most else generator.randint(0, k)
    n_deactivate = n_experts - k if most else generator.randint(0, n_experts - k)
    experts = generator.sample(range(n_experts), n_activate + n_deactivate)
    return experts[:n_activate], experts[n_activate:]


def feasible_plan(model: HookedMoE, seed: int) -> SteeringPlan:
    """Every layer but hash layers is steered; with every third seed as much as possible."""
    generator, (n_experts, k) = random.Random(seed), (model.n_experts, model.top_k)
    activate, deactivate = [], []
    for layer, router in oracle.routers(hf_model(model)).items():
        if is_hash(router):
            continue
        drawn = (draw(generator, n_experts, k, seed % 3 == 0) for _ in itertools.count())
        ups, downs = next(each for each in drawn if is_feasible(router, n_experts, k, *each))
        activate += [(layer, expert) for expert in ups]
        deactivate += [(layer, expert) for expert in downs]
    epsilon = (0.01, 0.0001, 3.0)[seed % 3]
    return SteeringPlan(activate, deactivate, epsilon, shape=model.moe_shape)


class Obeyed:
    """Hooks that hold every forward's choice of experts against a plan."""

    def __init__(self, plan: SteeringPlan):
        self.plan, self.n_forwards = plan, 0
        layers = sorted({layer for layer, _ in (*plan.activate, *plan.deactivate)})
        self.hooks: list[Any] = [(hook_names.topk_indices(layer), self._check) for layer in layers]

    def _check(self, indices: Tensor, hook: HookPoint) -> None:
        layer = int(str(hook.name).split(".")[1])
        self.n_forwards += 1
        for steered, expert in self.plan.activate:
            assert steered != layer or (indices == expert).any(-1).all()
        for steered, expert in self.plan.deactivate:
            assert steered != layer or not (indices == expert).any()
        assert (indices.sort(-1).values.diff() > 0).all()  # no expert twice


@every_family_in_every_dtype
def test_steering_keeps_its_guarantee_on_every_token(hooked: Hooked, recipe: str, dtype: torch.dtype) -> None:
    model = hooked(recipe, dtype)
    before, (input_ids, mask) = model(tokens()), padded()
    for seed in range(3):
        plan = feasible_plan(model, seed)
        obeyed = Obeyed(plan)
        with model.hooks(steer_hooks(plan) + obeyed.hooks):
            assert torch.isfinite(model(tokens(2, 7, seed))).all()
            model(input_ids, **mask)
        assert obeyed.n_forwards == 2 * len(obeyed.hooks) > 0
    assert torch.equal(model(tokens()), before)
    assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=steer_hooks(SteeringPlan())), before)


@one_of_each_kind
@every_dtype
def test_steering_holds_in_generation_with_and_without_cache(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    model = hooked(recipe, dtype)
    plan = feasible_plan(model, 1)
    obeyed = Obeyed(plan)
    with model.hooks(steer_hooks(plan) + obeyed.hooks):
        cached = generate(model)
        grown = tokens(2, 4)
        for _ in range(4):
            grown = torch.cat([grown, model(grown)[:, -1:].argmax(-1)], dim=1)
    assert obeyed.n_forwards == 8 * len(obeyed.hooks)
    if dtype == torch.float32:  # in half precision cached and whole passes round differently
        assert torch.equal(cached, grown)


@one_of_each_kind
def test_what_groups_of_experts_exclude_is_refused_before_the_run(hooked: Hooked, recipe: str) -> None:
    model, generator = hooked(recipe), random.Random(5)
    before, (n_experts, k) = hook_census(model), (model.n_experts, model.top_k)
    refused = 0
    for layer, router in oracle.routers(hf_model(model)).items():
        for attempt in range(12):
            ups, downs = draw(generator, n_experts, k, attempt % 2 == 0)
            plan = SteeringPlan([(layer, up) for up in ups], [(layer, down) for down in downs])
            if len(plan) and (is_hash(router) or not is_feasible(router, n_experts, k, ups, downs)):
                refused += 1
                with pytest.raises(PlanError, match=f"Layer {layer} cannot be steered"):
                    model.run_with_hooks(None, fwd_hooks=steer_hooks(plan))
            else:
                with model.hooks(steer_hooks(plan)):
                    pass
    limited = [is_hash(r) or group_limit(r) != (1, 1) for r in oracle.routers(hf_model(model)).values()]
    assert (refused > 0) == any(limited)
    assert hook_census(model) == before


def ranks(router: Any, logits: Tensor, *rest: Any) -> Tensor:
    """HF's order of preference in no groups, [token expert], best is 0: it chooses 1, 2, 3... experts."""
    n_experts = logits.shape[-1]
    if type(router).__name__ == "PhimoeTopKRouter":  # always two; without groups or biases
        return logits.argsort(-1, descending=True).argsort(-1)
    chosen = [oracle.decide(router, logits, *rest, top_k=k + 1).chosen for k in range(n_experts)]
    return n_experts - torch.stack(chosen).sum(0)


@one_of_each_kind
@pytest.mark.parametrize("seed", [0, 1])
def test_steering_keeps_the_others_in_their_order(
    hooked: Hooked, plain: Plain, recipe: str, seed: int
) -> None:
    model = hooked(recipe)
    layer, router = list(oracle.routers(hf_model(plain(recipe))).items())[-1]
    rest = oracle.arguments(hf_model(plain(recipe)), layer, tokens())
    whole = feasible_plan(model, seed)
    ups, downs = (
        [expert for number, expert in part if number == layer] for part in (whole.activate, whole.deactivate)
    )
    plan = SteeringPlan([(layer, up) for up in ups], [(layer, down) for down in downs], whole.epsilon)
    _, unsteered = model.run_with_cache(tokens(), names_filter=is_routing_point)
    with model.hooks(steer_hooks(plan)):
        _, cache = model.run_with_cache(tokens(), names_filter=is_routing_point)
    logits = unsteered[hook_names.router_logits(layer)].flatten(0, 1)
    order, (_, weights, chosen) = ranks(router, logits, *rest), routing(cache, layer)
    others = [expert for expert in range(model.n_experts) if expert not in ups + downs]
    n_groups, n_chosen = group_limit(router)
    size = model.n_experts // n_groups
    for rank, picked in zip(order.tolist(), chosen.tolist(), strict=True):
        groups = {expert // size for expert, is_in in enumerate(picked) if is_in}
        inside = [expert for expert in others if expert // size in groups]
        assert len(groups) <= n_chosen
        best = sorted(inside, key=lambda expert: rank[expert])[: model.top_k - len(ups)]
        assert {expert for expert, is_in in enumerate(picked) if is_in} == {*ups, *best}
    change = (cache[hook_names.router_logits(layer)].flatten(0, 1) - logits)[:, others]
    if type(model.routing_rule(layer)).__name__ in ("SigmoidTopK", "TopKSigmoid", "SparseMixer"):
        assert torch.equal(change, torch.zeros_like(change))
    elif others:  # nats of log-probability
        torch.testing.assert_close(change, change[:, :1].expand_as(change), rtol=0, atol=1e-4)
    assert ((weights > 0) == chosen).all()


@one_of_each_kind
@every_dtype
def test_logits_that_a_later_hook_puts_back_undo_the_plan_if_it_says_so(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    model = hooked(recipe, dtype)
    layers = [n for n in model.moe_layers if model.routing_rule(n).cannot_steer([3], [0]) is None]
    clean, cache = model.run_with_cache(tokens(), names_filter=is_routing_point)

    def put_back(logits: Tensor, hook: HookPoint) -> Tensor:
        hook.rule = hook.rule.released(torch.ones(logits.shape[:2], dtype=torch.bool))  # type: ignore
        return cache[str(hook.name)]

    hooks: list[Any] = steer_hooks(SteeringPlan([(n, 3) for n in layers], [(n, 0) for n in layers]))
    assert not torch.equal(model.run_with_hooks(tokens(), fwd_hooks=hooks), clean)
    hooks += [(hook_names.router_logits(n), put_back) for n in layers]
    assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=hooks), clean)
