"""Interventions beside the tools that people already use, in one run: which sees what, and that all act."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import patching

from moe_lens import (
    HookedMoE,
    RouteRecord,
    SteeringPlan,
    bias_experts,
    hook_names,
    organisms,
    replay_hooks,
    route_around,
    scale_experts,
    steer_hooks,
    zero_ablate,
)
from tests.families import core_family
from tests.tiny_models import hook_census, prompt, tiny_model, tokenizer, tokens

Hooked = Callable[..., Any]
WRITE: dict[str, Any] = {
    "max_new_tokens": 4,
    "do_sample": False,
    "stop_at_eos": False,
    "verbose": False,
    "return_type": "tokens",
}


def run(model: Any, hooks: Any = (), given: Any = None) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(tokens(2, 6) if given is None else given, fwd_hooks=list(hooks))


def steering_vector(model: Any, layer: int) -> tuple[str, Any]:
    vector = torch.linspace(-1, 1, model.cfg.d_model)
    return f"blocks.{layer}.hook_resid_pre" if layer else "hook_embed", lambda resid, hook: resid + vector


@core_family
def test_a_steering_vector_patching_steering_and_ablation_act_together(hooked: Hooked, recipe: str) -> None:
    """Each alone and all together differ; together is what the hooks do one point at a time, by hand."""
    model = hooked(recipe)
    first, last = model.moe_layers[0], model.moe_layers[-1]
    _, clean = model.run_with_cache(tokens(2, 6, seed=7))
    patched = f"blocks.{last}.hook_resid_post"

    def patch(resid: Tensor, hook: Any) -> Tensor:
        resid = resid.clone()
        resid[:, 3] = clean[hook.name][:, 3]
        return resid

    parts = [
        [steering_vector(model, 0)],
        [(patched, patch)],
        steer_hooks(SteeringPlan(deactivate=[(first, 0)])),
        zero_ablate([(last, e) for e in range(model.n_experts)], positions=[1, 5]),
    ]
    together = run(model, [hook for part in parts for hook in part])
    apart = [run(model, part) for part in parts]
    for one in apart:
        assert not torch.equal(one, together)
    assert torch.equal(together[:, 3], run(model, [(patched, patch)])[:, 3])  # downstream of all the others
    # the order of points does not matter, since each point has one of them
    assert torch.equal(run(model, [hook for part in reversed(parts) for hook in part]), together)


def test_hooks_on_one_point_run_in_the_order_of_the_list(hooked: Hooked) -> None:
    model = hooked("olmoe")
    seen: list[Tensor] = []
    look = (hook_names.router_logits(0), lambda value, hook: seen.append(value.clone()))
    bias = bias_experts({0: torch.arange(6.0)})
    run(model, [look, *bias, look, *route_around([(0, 5)]), look])
    plain, biased, around = seen
    assert torch.equal(biased, plain + torch.arange(6.0))
    assert torch.equal(around[..., :5], biased[..., :5])
    assert bool((around[..., 5] == -torch.inf).all())


def test_points_fire_in_the_documented_order_wherever_hooks_stand_in_the_list() -> None:
    model = HookedMoE.from_hf(tiny_model("mixtral"), tokenizer())
    model.set_use_expert_out(True)
    order: list[str] = []
    spells = (
        hook_names.expert_out,
        hook_names.topk_weights,
        hook_names.router_logits,
        hook_names.topk_indices,
    )
    run(
        model, [(spell(0), lambda value, hook: order.append(hook.name.split("hook_")[1])) for spell in spells]
    )
    assert order == ["router_logits", "topk_indices", "topk_weights", "expert_out"]


@core_family
def test_caching_under_interventions_caches_what_the_model_used(hooked: Hooked, recipe: str) -> None:
    model, layer = hooked(recipe), hooked(recipe).moe_layers[0]
    hooks = scale_experts({layer: range(model.n_experts)}, 0.5)
    _, plain = model.run_with_cache(tokens(2, 6))
    with model.hooks(hooks):
        logits, cache = model.run_with_cache(tokens(2, 6))
    assert torch.equal(cache["topk_weights", layer], plain["topk_weights", layer] * 0.5)
    assert torch.equal(logits, run(model, hooks))


@core_family
def test_generation_under_all_of_them_is_the_same_with_and_without_cache(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    first, last = model.moe_layers[0], model.moe_layers[-1]
    hooks = [
        steering_vector(model, 0),
        *steer_hooks(SteeringPlan(activate=[(first, 1)], deactivate=[(last, 0)])),
        *scale_experts([(last, 1)], 3.0, positions="generated"),
    ]
    with torch.no_grad(), model.hooks(hooks):
        cached = model.generate([prompt(3), prompt(5, 1)], **WRITE)
        whole = model.generate([prompt(3), prompt(5, 1)], use_past_kv_cache=False, **WRITE)
    assert torch.equal(cached, whole)


def test_generic_activation_patching_under_replayed_routes(hooked: Hooked) -> None:
    """TransformerLens' own sweep over the residual stream, with the clean route frozen in every run."""
    model = hooked("olmoe")
    clean, corrupted = tokens(1, 4), tokens(1, 4, seed=3)
    _, cache = model.run_with_cache(clean)
    record = RouteRecord.from_cache(cache)

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, 7]

    with torch.no_grad(), model.hooks(replay_hooks(record)):
        swept = patching.get_act_patch_resid_pre(model, corrupted, cache, metric)
    for layer, pos in ((0, 3), (2, 1)):
        name = "hook_embed" if layer == 0 else f"blocks.{layer}.hook_resid_pre"

        def put(resid: Tensor, hook: Any, pos: int = pos, layer: int = layer) -> Tensor:
            resid = resid.clone()
            resid[:, pos] = cache["resid_pre", layer][:, pos]
            return resid

        by_hand = metric(run(model, [*replay_hooks(record), (name, put)], corrupted))
        torch.testing.assert_close(swept[layer, pos], by_hand)


def test_logit_lens_and_attribution_of_transformer_lens_see_the_intervention() -> None:
    model = organisms.load("planted")
    text = organisms.world("planted").facts("test")[0].question
    answer = organisms.world("planted").facts("test")[0].answer
    caches = []
    for hooks in ([], zero_ablate({1: range(8)})):
        with torch.no_grad(), model.hooks(hooks):
            caches.append(model.run_with_cache(text)[1])
    stacks = [cache.accumulated_resid(layer=-1, incl_mid=False, pos_slice=-1) for cache in caches]
    assert torch.equal(stacks[0][:2], stacks[1][:2])  # before the ablated layer nothing changed
    assert not torch.equal(stacks[0][2:], stacks[1][2:])
    attributions = [
        cache.logit_attrs(stack, answer, pos_slice=-1) for cache, stack in zip(caches, stacks, strict=True)
    ]
    assert attributions[0].shape == attributions[1].shape
    assert not torch.equal(attributions[0], attributions[1])


def test_backward_hooks_see_gradients_through_interventions() -> None:
    model = HookedMoE.from_hf(tiny_model("mixtral"), tokenizer())
    gradients: dict[str, Tensor] = {}

    def keep(gradient: Tensor, hook: Any) -> None:
        gradients[hook.name] = gradient.clone()

    names = [hook_names.router_logits(0), hook_names.topk_weights(1)]
    with model.hooks(fwd_hooks=scale_experts({1: range(5)}, 2.0), bwd_hooks=[(name, keep) for name in names]):
        model(tokens(1, 4)).log_softmax(-1)[..., 3].sum().backward()
    assert set(gradients) == set(names)
    assert all(bool((gradient != 0).any()) for gradient in gradients.values())


@pytest.mark.parametrize("where", [hook_names.router_logits, hook_names.topk_weights, hook_names.expert_out])
def test_nothing_is_left_after_an_exception(where: Any) -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"), tokenizer())
    model.set_use_expert_out(True)
    model.run_with_cache(tokens(1, 2))  # transformers puts hooks of its own at the first such run
    plain, census = run(model), hook_census(model)

    class OnPurposeError(Exception):
        pass

    def fail(value: Tensor, hook: Any) -> None:
        raise OnPurposeError

    hooks = [*route_around([(0, 1)]), *zero_ablate([(1, 2)]), (where(2), fail)]
    for use in (
        lambda: run(model, hooks),
        lambda: model.generate(prompt(3), **WRITE),
        lambda: model.run_with_cache(tokens(1, 3)),
    ):
        with pytest.raises(OnPurposeError), model.hooks(hooks):
            use()
        assert hook_census(model) == census
        assert torch.equal(run(model), plain)
    with torch.no_grad():
        written = model.generate(tokens(1, 4), **WRITE)  # and positions know the prompt again
        with model.hooks(zero_ablate({0: range(6)}, positions="generated")):
            assert torch.equal(model(tokens(1, 4)), model(tokens(1, 4)))
            assert written.shape == model.generate(tokens(1, 4), **WRITE).shape


def test_permanent_hooks_and_reset() -> None:
    model = HookedMoE.from_hf(tiny_model("mixtral"), tokenizer())
    plain = run(model)
    for name, hook in zero_ablate({0: range(5)}):
        model.add_hook(name, hook)
    removed = run(model)
    assert not torch.equal(removed, plain)
    assert torch.equal(run(model), removed)
    model.reset_hooks()
    assert torch.equal(run(model), plain)


def test_a_partial_and_a_lambda_are_hooks_too(hooked: Hooked) -> None:
    def scale(weights: Tensor, hook: Any, factor: float) -> Tensor:
        return weights * factor

    model = hooked("olmoe")
    by_hand = [(hook_names.topk_weights(0), partial(scale, factor=2.0))]
    assert torch.equal(run(model, by_hand), run(model, scale_experts({0: range(6)}, 2.0)))
