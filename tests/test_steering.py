"""Steering: the transform against the paper's formulas in float64, its guarantees, whole steered models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lens import hook_names
from moe_lens.errors import HookError, MoELensError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.routing_rules import SoftmaxTopK
from moe_lens.steering import steer_hooks, steer_logits
from moe_lens.steering_plan import SteeringPlan
from tests import oracle
from tests.tiny_models import (
    FAMILIES,
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
every_family = pytest.mark.parametrize("recipe", FAMILIES)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
half_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


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


# The transform


@half_dtypes
@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
@pytest.mark.parametrize(
    ("activate", "deactivate"),
    [([2], []), ([], [0, 5]), ([1, 4], [3]), ([2, 3], [3, 6]), ([], list(range(5)))],
)
def test_scores_equal_the_papers_formulas(
    dtype: torch.dtype, scale: float, activate: list[int], deactivate: list[int]
) -> None:
    z = scale * torch.randn(4, 9, 7, generator=torch.Generator().manual_seed(0))
    z = z.to(dtype)
    before = z.clone()
    got = steer_logits(z, activate, deactivate)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), formula(z, activate, deactivate), rtol=1e-6, atol=2e-6)
    assert torch.equal(z, before)


@pytest.mark.parametrize("epsilon", [0.001, 0.5, 20.0])
def test_epsilon_is_the_distance_in_nats(epsilon: float) -> None:
    z = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    got = steer_logits(z, [2], [3], epsilon)
    torch.testing.assert_close(got.double(), formula(z, [2], [3], epsilon), rtol=1e-6, atol=2e-6)


def test_a_token_without_batch_dimensions_works_too() -> None:
    z = torch.tensor([0.3, -1.0, 2.0])
    assert torch.equal(steer_logits(z, [1], [2]), steer_logits(z[None, None], [1], [2])[0, 0])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, list[int], list[int], SoftmaxTopK]:
    """Logits of 16 tokens, a plan that fits, and the rule; at least k experts stay finite and free."""
    n_experts = draw(st.integers(2, 12))
    k = draw(st.integers(1, n_experts))
    order = draw(st.permutations(range(n_experts)))
    n_deactivate = draw(st.integers(0, n_experts - k))
    n_activate = draw(st.integers(0, k))
    deactivate, activate = order[:n_deactivate], order[n_deactivate:][:n_activate]
    z = torch.randn(16, n_experts, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    z = z * draw(st.sampled_from([0.0, 0.01, 1.0, 30.0, 100.0, 1e4]))
    if draw(st.booleans()):
        z = z.round()  # ties
    free = [expert for expert in range(n_experts) if expert not in deactivate]
    for expert in free[k:] + deactivate:
        if draw(st.integers(0, 3)) == 0:
            z[::2, expert] = -torch.inf
    z = z.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    return z, activate, deactivate, SoftmaxTopK(n_experts, k, renormalize=draw(st.booleans()))


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([0.001, 0.01, 1.0, 50.0]))
def test_activated_experts_are_chosen_and_deactivated_ones_are_not(case: Any, epsilon: float) -> None:
    z, activate, deactivate, rule = case
    chosen = rule.select(steer_logits(z, activate, deactivate, epsilon))
    for row in chosen.tolist():
        assert set(activate) <= set(row)
        assert not set(deactivate) & set(row)


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from([0.01, 1.0, 50.0]))
def test_other_experts_keep_their_order_and_mostly_their_scores(case: Any, epsilon: float) -> None:
    z, activate, deactivate, _ = case
    others = [expert for expert in range(z.shape[-1]) if expert not in activate + deactivate]
    s = torch.log_softmax(z.float(), -1)
    got = steer_logits(z, activate, deactivate, epsilon)
    for before, after in zip(s[:, others], got[:, others], strict=True):
        above = before[:, None] > before[None, :]
        assert bool((after[:, None] > after[None, :])[above].all())
    exact = formula(z, activate, deactivate, epsilon)
    depth = (exact - exact.logsumexp(-1, keepdim=True)).masked_fill(exact == -torch.inf, 0)
    shallow = (depth > -59.9).all(-1)
    assert torch.equal(got[shallow][:, others], s[shallow][:, others])


@settings(max_examples=60, deadline=None)
@given(cases())
def test_nothing_becomes_nan_or_overflows(case: Any) -> None:
    z, activate, deactivate, rule = case
    got = steer_logits(z, activate, deactivate)
    assert not got.isnan().any()
    weights = rule.weigh(got, rule.select(got))
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()


@pytest.mark.parametrize("epsilon", [1e-9, 1e-6, 1e10, 1e38])
def test_the_guarantee_holds_for_every_epsilon_that_a_plan_accepts(epsilon: float) -> None:
    z = torch.zeros(8, 6)  # one token of ties, seven without
    z[1:] = torch.randn(7, 6, generator=torch.Generator().manual_seed(0)) * 5
    for expert in range(6):
        others = [(0, other) for other in range(6) if other != expert]
        try:
            plans = SteeringPlan([(0, expert)], epsilon=epsilon), SteeringPlan([], others, epsilon)
        except MoELensError:
            return
        for plan in plans:
            [(_, hook)] = steer_hooks(plan)
            assert SoftmaxTopK(6, 1, renormalize=False).select(hook(z)).tolist() == [[expert]] * 8


@half_dtypes
def test_gradients_reach_the_logits_as_in_the_formula(dtype: torch.dtype) -> None:
    z = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, theirs = z.clone().requires_grad_(), z.double().requires_grad_()
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    (steer_logits(ours, [2], [4]) * weight).sum().backward()
    s = torch.log_softmax(theirs, -1)
    rows = []
    for row in s:
        parts = [row[i] for i in range(6)]
        parts[2], parts[4] = row.max() + 0.01, row.min() - 0.01
        rows.append(torch.stack(parts))
    (torch.stack(rows) * weight).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert bool(ours.grad.abs().max() > 0.1)
    torch.testing.assert_close(
        ours.grad.double(), theirs.grad, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-5
    )


# Whole models


@every_family
@both_dtypes
def test_an_empty_plan_gives_no_hooks_and_changes_nothing(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    model = hooked(recipe, dtype)
    hooks = steer_hooks(SteeringPlan())
    assert hooks == []
    assert torch.equal(steered(model, hooks, tokens()), logits_of(model, tokens()))


@every_family
def test_a_steered_model_equals_an_oracle_with_its_own_routers(hooked: Hooked, recipe: str) -> None:
    plan = full_plan(recipe)
    got = steered(hooked(recipe), steer_hooks(plan), tokens())
    close(got, oracle_logits(recipe, tokens(), edits(plan)))
    assert not torch.allclose(got, logits_of(hooked(recipe), tokens()), atol=0.01)


@every_family
def test_a_plan_for_one_layer_and_one_expert_equals_the_oracle(hooked: Hooked, recipe: str) -> None:
    layer = MOE_LAYERS[recipe][-1]
    for plan in (SteeringPlan([(layer, 1)], epsilon=1.0), SteeringPlan(deactivate=[(layer, 2)])):
        close(
            steered(hooked(recipe), steer_hooks(plan), tokens()), oracle_logits(recipe, tokens(), edits(plan))
        )


@every_family
def test_deactivation_wins_where_a_plan_names_an_expert_twice(hooked: Hooked, recipe: str) -> None:
    layer = MOE_LAYERS[recipe][0]
    both = SteeringPlan([(layer, 1), (layer, 2)], [(layer, 2)])
    one = SteeringPlan([(layer, 1)], [(layer, 2)])
    got = steered(hooked(recipe), steer_hooks(both), tokens())
    assert torch.equal(got, steered(hooked(recipe), steer_hooks(one), tokens()))
    close(got, oracle_logits(recipe, tokens(), edits(both)))


@every_family
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


@every_family
@both_dtypes
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


@every_family
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


@every_family
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


@every_family
def test_an_edit_before_the_plan_is_steered(hooked: Hooked, recipe: str) -> None:
    plan = full_plan(recipe)
    hooks = [(name, lambda z, hook: prefer_expert_0(z)) for name, _ in steer_hooks(plan)]
    changes = {n: (lambda z, then=then: then(prefer_expert_0(z))) for n, then in edits(plan).items()}
    close(
        steered(hooked(recipe), [*hooks, *steer_hooks(plan)], tokens()),
        oracle_logits(recipe, tokens(), changes),
    )


@every_family
@both_dtypes
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


@every_family
def test_a_residual_patch_elsewhere_composes(hooked: Hooked, recipe: str) -> None:
    plan, vector = full_plan(recipe), torch.linspace(-1, 1, 32)
    patch = ("blocks.1.hook_resid_pre", lambda resid, hook: resid + vector)
    rewritten = oracle.rewrite(tiny_model(recipe), edits(plan))
    rewritten.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + vector, *args[1:]))
    with torch.no_grad():
        expected = rewritten(tokens()).logits
    for hooks in ([patch, *steer_hooks(plan)], [*steer_hooks(plan), patch]):
        close(steered(hooked(recipe), hooks, tokens()), expected)


@every_family
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


@every_family
@both_dtypes
def test_the_model_is_unchanged_afterwards(hooked: Hooked, recipe: str, dtype: torch.dtype) -> None:
    model = hooked(recipe, dtype)
    before, hooks_before = logits_of(model, tokens()), hook_census(model)
    steered(model, steer_hooks(full_plan(recipe)), tokens())
    with model.hooks(steer_hooks(full_plan(recipe))):
        logits_of(model, tokens())
    assert hook_census(model) == hooks_before
    assert torch.equal(logits_of(model, tokens()), before)


@every_family
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


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 12),
    st.floats(0, 30),
    st.sampled_from([1e-4, 0.01, 1.0, 30.0]),
    st.integers(0, 2**31),
)
def test_the_survivors_are_chosen_however_low_they_stand(
    n_experts: int, log_spread: float, epsilon: float, seed: int
) -> None:
    """As many deactivated as possible, the best ones: the k lowest remain, at any spread of the logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = 10**log_spread * torch.randn(32, n_experts, generator=generator)
    top_k = 1 + seed % (n_experts - 1)
    for token in logits:
        deactivate = token.argsort(descending=True)[: n_experts - top_k].tolist()
        steered = steer_logits(token[None], [], deactivate, epsilon)
        chosen = SoftmaxTopK(n_experts, top_k, renormalize=True).select(steered)[0].tolist()
        assert not set(chosen) & set(deactivate)


def test_an_expert_that_an_earlier_hook_ruled_out_stays_out() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 2.0, 0.5]])
    steered = steer_logits(logits, [], [1, 2])
    assert steered[0, 1] == -torch.inf
    assert set(SoftmaxTopK(4, 2, renormalize=True).select(steered)[0].tolist()) == {0, 3}


def test_a_steering_hook_on_another_point_is_refused(hooked: Hooked) -> None:
    model = hooked("olmoe")
    [(_, hook)] = steer_hooks(SteeringPlan(deactivate=[(0, 1)]))
    for wrong in (hook_names.router_logits(1), hook_names.topk_weights(0), "blocks.0.hook_resid_pre"):
        with pytest.raises(HookError, match="was put on"):
            model.run_with_hooks(tokens(), fwd_hooks=[(wrong, hook)])
