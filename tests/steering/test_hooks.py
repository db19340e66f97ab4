"""Steering: the transform against the paper's formulas in float64, its guarantees, whole steered models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import hook_names
from moe_lens.errors import HookError, MoELensError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routers.plain import SoftmaxTopK
from moe_lens.steering import context
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import EPSILON_RANGE, SteeringPlan
from tests import oracle
from tests.families import core_family, every_dtype
from tests.tiny_models import (
    MOE_LAYERS,
    N_EXPERTS,
    TOP_K,
    hook_census,
    prompt,
    router_of,
    sparse_blocks,
    tiny_model,
    tokens,
)

Hooked = Callable[..., HookedMoE]


def formula(logits: Tensor, activate: list[int], deactivate: list[int], epsilon: float = 0.01) -> Tensor:
    """SteerMoE's equations in float64, one token and one expert at a time; -inf stays out of the minimum."""
    rows = []
    for z in logits.double().flatten(0, -2):
        log_sum = torch.log(torch.exp(z - z.max()).sum()) + z.max()
        s = [float(value - log_sum) for value in z]
        highest, lowest = max(s), min(value for value in s if value > -float("inf"))
        for expert in activate:
            s[expert] = highest + epsilon
        for expert in deactivate:  # after activation: deactivation wins
            s[expert] = lowest - epsilon
        rows.append(torch.tensor(s, dtype=torch.float64))
    return torch.stack(rows).reshape(logits.shape)


def full_plan(recipe: str) -> SteeringPlan:
    """In every MoE layer: activate the last expert, deactivate the first two."""
    last = N_EXPERTS[recipe] - 1
    layers = MOE_LAYERS[recipe]
    return SteeringPlan([(n, last) for n in layers], [(n, expert) for n in layers for expert in (0, 1)])


def edits(plan: SteeringPlan) -> dict[int, Callable[[Tensor], Tensor]]:
    """The plan as edits for `oracle.rewrite`, through `formula`."""

    def edit_of(layer: int) -> Callable[[Tensor], Tensor]:
        activate = [expert for at, expert in plan.activate if at == layer]
        deactivate = [expert for at, expert in plan.deactivate if at == layer]
        return lambda logits: formula(logits, activate, deactivate, plan.epsilon).float()

    return {layer: edit_of(layer) for layer, _ in plan.activate + plan.deactivate}


def logits_of(model: Any, batch: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(batch, **kwargs)


def steered(model: HookedMoE, hooks: list[Any], batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(batch, fwd_hooks=hooks)


def oracle_logits(recipe: str, batch: Tensor, changes: dict[int, Callable[[Tensor], Tensor]]) -> Tensor:
    with torch.no_grad():
        return oracle.rewrite(tiny_model(recipe), changes)(batch).logits


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("epsilon", EPSILON_RANGE)
def test_the_guarantee_holds_for_every_epsilon_that_a_plan_accepts(epsilon: float) -> None:
    z = torch.zeros(8, 6)  # one token of ties, seven without
    z[1:] = torch.randn(7, 6, generator=torch.Generator().manual_seed(0)) * 5
    for expert in range(6):
        others = [(0, other) for other in range(6) if other != expert]
        for plan in (SteeringPlan([(0, expert)], epsilon=epsilon), SteeringPlan([], others, epsilon)):
            [(_, hook)] = steer_hooks(plan)
            assert SoftmaxTopK(6, 1, renormalize=False).select(hook(z)).tolist() == [[expert]] * 8


# Whole models


@core_family
@every_dtype
def test_an_empty_plan_gives_no_hooks_and_changes_nothing(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    model = hooked(recipe, dtype)
    hooks = steer_hooks(SteeringPlan())
    assert hooks == []
    assert torch.equal(steered(model, hooks, tokens()), logits_of(model, tokens()))


@core_family
def test_a_steered_model_equals_an_oracle_with_its_own_routers(hooked: Hooked, recipe: str) -> None:
    plan = full_plan(recipe)
    got = steered(hooked(recipe), steer_hooks(plan), tokens())
    close(got, oracle_logits(recipe, tokens(), edits(plan)))
    assert not torch.allclose(got, logits_of(hooked(recipe), tokens()), atol=0.01)


@core_family
def test_a_plan_for_one_layer_and_one_expert_equals_the_oracle(hooked: Hooked, recipe: str) -> None:
    layer = MOE_LAYERS[recipe][-1]
    for plan in (SteeringPlan([(layer, 1)], epsilon=1.0), SteeringPlan(deactivate=[(layer, 2)])):
        close(
            steered(hooked(recipe), steer_hooks(plan), tokens()), oracle_logits(recipe, tokens(), edits(plan))
        )


@core_family
def test_deactivation_wins_where_a_plan_names_an_expert_twice(hooked: Hooked, recipe: str) -> None:
    layer = MOE_LAYERS[recipe][0]
    both = SteeringPlan([(layer, 1), (layer, 2)], [(layer, 2)])
    one = SteeringPlan([(layer, 1)], [(layer, 2)])
    got = steered(hooked(recipe), steer_hooks(both), tokens())
    assert torch.equal(got, steered(hooked(recipe), steer_hooks(one), tokens()))
    close(got, oracle_logits(recipe, tokens(), edits(both)))


@core_family
def test_the_largest_plan_dictates_every_route(hooked: Hooked, recipe: str) -> None:
    experts, k = list(range(N_EXPERTS[recipe])), TOP_K[recipe]
    layers = MOE_LAYERS[recipe]
    plan = SteeringPlan(
        [(n, e) for n in layers for e in experts[-k:]], [(n, e) for n in layers for e in experts[:-k]]
    )
    routes, record = recorder(recipe)
    steered(hooked(recipe), [*steer_hooks(plan), *record], tokens())
    for layer in layers:
        assert all(sorted(row) == experts[-k:] for row in routes[layer][0].flatten(0, 1).tolist())


def recorder(recipe: str) -> tuple[dict[int, list[Tensor]], list[Any]]:
    """Hooks that keep the chosen experts of every forward, by layer."""
    routes: dict[int, list[Tensor]] = {layer: [] for layer in MOE_LAYERS[recipe]}

    def keep(layer: int) -> Callable[..., None]:
        return lambda indices, hook: routes[layer].append(indices.clone())

    return routes, [(hook_names.topk_indices(layer), keep(layer)) for layer in routes]


@core_family
@every_dtype
def test_the_plan_holds_on_every_token_of_the_prompt_and_of_every_cached_step(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    model, routes_and_hooks = hooked(recipe, dtype), recorder(recipe)
    routes, record = routes_and_hooks
    with model.hooks([*steer_hooks(full_plan(recipe)), *record]):
        model.generate(
            [prompt(2), prompt(6, 1)], max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False
        )
    for layer in MOE_LAYERS[recipe]:
        lengths = [indices.shape[1] for indices in routes[layer]]
        assert lengths[0] >= 6  # prefill, left-padded
        assert lengths[1:] == [1] * 4  # the cache is used
        for indices in routes[layer]:
            assert bool((indices == N_EXPERTS[recipe] - 1).any(-1).all())
            assert not bool(((indices == 0) | (indices == 1)).any())


@core_family
def test_steered_generation_is_the_same_with_and_without_cache(hooked: Hooked, recipe: str) -> None:
    model: Any = hooked(recipe)
    prompts = [prompt(2), prompt(6, 1)]
    kwargs: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "stop_at_eos": False,
        "verbose": False,
        "return_type": "tokens",
    }
    with model.hooks(steer_hooks(full_plan(recipe))):
        cached = model.generate(prompts, use_past_kv_cache=True, **kwargs)
        uncached = model.generate(prompts, use_past_kv_cache=False, **kwargs)
    assert torch.equal(cached, uncached)


@core_family
def test_the_steered_continuation_is_greedy_on_the_oracle(hooked: Hooked, recipe: str) -> None:
    plan, sequence = full_plan(recipe), tokens(1, 4)
    expected = oracle.rewrite(tiny_model(recipe), edits(plan))
    with hooked(recipe).hooks(steer_hooks(plan)):
        got: Any = hooked(recipe).generate(
            sequence,
            max_new_tokens=4,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
            return_type="tokens",
        )
    with torch.no_grad():
        for _ in range(4):
            sequence = torch.cat([sequence, expected(sequence).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, sequence)


# Composition


def prefer_expert_0(logits: Tensor) -> Tensor:
    boost = torch.zeros(logits.shape[-1])
    boost[0], boost[-1] = 7.0, -7.0
    return logits + boost


@core_family
def test_an_edit_before_the_plan_is_steered(hooked: Hooked, recipe: str) -> None:
    plan = full_plan(recipe)
    hooks = [(name, lambda z, hook: prefer_expert_0(z)) for name, _ in steer_hooks(plan)]
    changes = {n: (lambda z, then=then: then(prefer_expert_0(z))) for n, then in edits(plan).items()}
    close(
        steered(hooked(recipe), [*hooks, *steer_hooks(plan)], tokens()),
        oracle_logits(recipe, tokens(), changes),
    )


@core_family
@every_dtype
def test_an_edit_after_the_plan_edits_steered_scores(hooked: Hooked, recipe: str, dtype: torch.dtype) -> None:
    plan, seen = full_plan(recipe), []

    def edit(z: Tensor, hook: Any) -> Tensor:
        seen.append(z.clone())
        return prefer_expert_0(z)

    hooks = [(name, edit) for name, _ in steer_hooks(plan)]
    got = steered(hooked(recipe, dtype), [*steer_hooks(plan), *hooks], tokens())
    assert len(seen) == len(MOE_LAYERS[recipe])
    for z in seen:
        assert z.dtype == torch.float32
        assert bool((z.argmax(-1) == N_EXPERTS[recipe] - 1).all())
    if dtype == torch.float32:
        changes = {n: (lambda z, first=first: prefer_expert_0(first(z))) for n, first in edits(plan).items()}
        close(got, oracle_logits(recipe, tokens(), changes))


@core_family
def test_a_residual_patch_elsewhere_composes(hooked: Hooked, recipe: str) -> None:
    plan, vector = full_plan(recipe), torch.linspace(-1, 1, 32)
    patch = ("blocks.1.hook_resid_pre", lambda resid, hook: resid + vector)
    rewritten = oracle.rewrite(tiny_model(recipe), edits(plan))
    rewritten.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + vector, *args[1:]))
    with torch.no_grad():
        expected = rewritten(tokens()).logits
    for hooks in ([patch, *steer_hooks(plan)], [*steer_hooks(plan), patch]):
        close(steered(hooked(recipe), hooks, tokens()), expected)


@core_family
def test_a_cache_taken_under_the_plan_holds_steered_scores_and_routes(hooked: Hooked, recipe: str) -> None:
    model, plan = hooked(recipe), full_plan(recipe)
    first = MOE_LAYERS[recipe][0]
    raw = model.run_with_cache(tokens())[1]["router_logits", first]
    with model.hooks(steer_hooks(plan)):
        logits, cache = model.run_with_cache(tokens())
    torch.testing.assert_close(
        cache["router_logits", first].double(), edits_at(plan, first, raw), rtol=1e-5, atol=1e-5
    )
    for layer in MOE_LAYERS[recipe]:
        assert not bool((cache["topk_indices", layer] <= 1).any())
    assert torch.equal(logits, steered(model, steer_hooks(plan), tokens()))


def edits_at(plan: SteeringPlan, layer: int, raw: Tensor) -> Tensor:
    activate = [expert for at, expert in plan.activate if at == layer]
    return formula(raw, activate, [expert for at, expert in plan.deactivate if at == layer])


@core_family
@every_dtype
def test_the_model_is_unchanged_afterwards(hooked: Hooked, recipe: str, dtype: torch.dtype) -> None:
    model = hooked(recipe, dtype)
    before, hooks_before = logits_of(model, tokens()), hook_census(model)
    steered(model, steer_hooks(full_plan(recipe)), tokens())
    with model.hooks(steer_hooks(full_plan(recipe))):
        logits_of(model, tokens())
    assert hook_census(model) == hooks_before
    assert torch.equal(logits_of(model, tokens()), before)


@core_family
@pytest.mark.parametrize("how", ["run_with_hooks", "hooks"])
def test_nan_logits_raise_by_the_name_of_the_layer_and_leave_no_hook(recipe: str, how: str) -> None:
    hf_model, layer = tiny_model(recipe), MOE_LAYERS[recipe][1]
    model = HookedMoE.from_hf(hf_model)
    logits_of(model, tokens())  # TransformerLens sets some hooks of its own in the first run
    before = hook_census(model)
    with torch.no_grad():
        router_of(sparse_blocks(hf_model)[layer]).weight[1] = torch.nan
    hooks = steer_hooks(full_plan(recipe))

    def run() -> None:
        if how == "run_with_hooks":
            model.run_with_hooks(tokens(), fwd_hooks=hooks)
        else:
            with model.hooks(hooks):
                model(tokens())

    with pytest.raises(MoELensError, match=rf"blocks\.{layer}\.mlp.*NaN"):
        run()
    assert hook_census(model) == before


def test_a_steering_hook_on_another_point_is_refused(hooked: Hooked) -> None:
    model = hooked("olmoe")
    [(_, hook)] = steer_hooks(SteeringPlan(deactivate=[(0, 1)]))
    for wrong in (hook_names.router_logits(1), hook_names.topk_weights(0), "blocks.0.hook_resid_pre"):
        with pytest.raises(HookError, match="was put on"):
            model.run_with_hooks(tokens(), fwd_hooks=[(wrong, hook)])


@core_family
def test_a_plan_on_some_of_its_layers_is_the_plan_of_these(hooked: Hooked, recipe: str) -> None:
    model, plan, batch = hooked(recipe), full_plan(recipe), tokens(2, 5)
    for layers in (model.moe_layers[0], model.moe_layers[1:], list(model.moe_layers)):
        kept = [layers] if isinstance(layers, int) else layers
        part = SteeringPlan(
            [pair for pair in plan.activate if pair[0] in kept],
            [pair for pair in plan.deactivate if pair[0] in kept],
        )
        assert len(part) > 0
        hooks = steer_hooks(plan, layers=layers)
        assert [name for name, _ in hooks] == [hook_names.router_logits(layer) for layer in kept]
        expected = steered(model, steer_hooks(part), batch)
        assert torch.equal(steered(model, hooks, batch), expected)
        with context.steered(model, plan, layers=layers):
            assert torch.equal(model(batch), expected)


@pytest.mark.parametrize("layers", [5, [0, 5], []])
def test_layers_that_no_plan_names_are_refused(layers: Any) -> None:
    with pytest.raises(MoELensError, match="layers"):
        steer_hooks(
            [SteeringPlan(deactivate=[(0, 1)]), SteeringPlan(deactivate=[(2, 1)]), None], layers=layers
        )
