"""`exclude_experts`: a mask of experts by token, on every family, against `rule.without` token by token."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import SteeringPlan, exclude_experts, route_around, steer_hooks
from moe_lens.errors import DataError, HookError
from moe_lens.statistics.routing_stats import is_routing_point
from tests.families import every_family_in_every_dtype, some_kinds
from tests.promises.decisions import Hooked
from tests.tiny_models import prompt, tokens


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def masks_for(model: Any, layer: int, seed: int = 0) -> Tensor:
    """Bool [batch pos expert]: on every token some experts, as many as may be on some."""
    generator = torch.Generator().manual_seed(seed)
    rule, n_experts = model.routing_rule(layer), model.n_experts
    mask = torch.zeros(2, 7, n_experts, dtype=torch.bool)
    for token in mask.flatten(0, 1):
        n_out = int(torch.randint(0, n_experts - model.top_k + 1, (1,), generator=generator))
        out = torch.randperm(n_experts, generator=generator)[:n_out]
        while rule.cannot_steer([], out.tolist()) is not None:
            out = out[:-1]
        token[out] = True
    return mask


def by_logits(model: Any) -> list[int]:
    return [n for n in model.moe_layers if model.routing_rule(n).chooses_by_logits]


@every_family_in_every_dtype
def test_excluded_experts_do_not_run_and_the_next_best_do(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    model = hooked(recipe, dtype)
    masks = {layer: masks_for(model, layer, layer) for layer in by_logits(model)}
    with model.hooks(exclude_experts(masks)):
        _, cache = model.run_with_cache(tokens(), names_filter=is_routing_point)
    for layer, mask in masks.items():
        indices, weights = cache["topk_indices", layer], cache["topk_weights", layer]
        assert not bool(mask.gather(-1, indices).any())
        assert bool((indices.sort(-1).values.diff() > 0).all())
        assert bool(weights.isfinite().all())


@some_kinds
def test_each_token_is_routed_around_what_its_mask_names(hooked: Hooked, recipe: str) -> None:
    """Token by token with `rule.without`, one call a token."""
    model = hooked(recipe)
    layer = by_logits(model)[0]
    rule, mask = model.routing_rule(layer), masks_for(model, layer)
    _, plain = model.run_with_cache(tokens(), names_filter=is_routing_point)
    with model.hooks(exclude_experts({layer: mask})):
        _, cache = model.run_with_cache(tokens(), names_filter=is_routing_point)
    for row in range(2):
        for pos in range(7):
            z, excluded = plain["router_logits", layer][row, pos], mask[row, pos].nonzero().flatten().tolist()
            logits, ruled = rule.without(z, excluded) if excluded else (z, rule)
            indices, weights = ruled.route(logits)
            found = cache["topk_indices", layer][row, pos]
            assert set(found.tolist()) == set(indices.tolist())
            ours = torch.zeros(model.n_experts).scatter(
                0, found, cache["topk_weights", layer][row, pos].float()
            )
            theirs = torch.zeros(model.n_experts).scatter(0, indices, weights.float())
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", ["olmoe", "deepseek_v3"])
def test_forms_of_masks(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    layer, last = model.moe_layers[0], model.moe_layers[-1]

    def run(hooks: Any) -> Tensor:
        return model.run_with_hooks(tokens(), fwd_hooks=hooks)

    one = torch.arange(model.n_experts) == 2
    around = run(route_around([(layer, 2), (last, 2)]))
    for mask in (one, one.expand(7, -1), one.expand(2, 7, -1), one.tolist()):
        assert torch.equal(run(exclude_experts(mask, layers=[layer, last])), around)
        assert torch.equal(run(exclude_experts({last: mask, layer: mask})), around)
    some = run(exclude_experts(one, layers=layer, positions=[0, -1]))
    assert torch.equal(some, run(route_around([(layer, 2)], positions=[0, -1])))
    by_column = one & (torch.arange(7) == 3)[:, None]
    assert torch.equal(run(exclude_experts({layer: by_column})), run(route_around([(layer, 2)], positions=3)))


def test_beside_a_plan_the_later_word_counts(hooked: Hooked) -> None:
    model = hooked("deepseek_v3")
    layer = model.moe_layers[0]
    out = exclude_experts(torch.arange(model.n_experts) == 3, layers=layer, positions=[1])
    plan = steer_hooks(SteeringPlan([(layer, 3)]))
    for hooks, is_there in (((*plan, *out), False), ((*out, *plan), True)):
        with model.hooks(list(hooks)):
            _, cache = model.run_with_cache(tokens(), names_filter=is_routing_point)
        runs = (cache["topk_indices", layer] == 3).any(-1)
        assert bool(runs[:, [0, 2, 3, 4, 5, 6]].all())
        assert runs[:, 1].tolist() == [is_there, is_there]


def test_a_generation_is_within_the_mask_only_where_positions_say_so(hooked: Hooked) -> None:
    model: Any = hooked("olmoe")
    text = prompt(5)
    mask = torch.zeros(model.to_tokens(text).shape[1], model.n_experts, dtype=torch.bool)
    mask[:, 0] = True
    options = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "verbose": False}
    with model.hooks(exclude_experts({0: mask}, positions="prompt")):
        model.generate(text, **options)
    with model.hooks(exclude_experts({0: mask})), pytest.raises(HookError, match="columns"):
        model.generate(text, **options)


def test_refused(hooked: Hooked) -> None:
    model = hooked("olmoe")  # 6 experts, k = 3
    too_many = torch.zeros(2, 7, 6, dtype=torch.bool)
    too_many[1, 4, :4] = True
    with pytest.raises(HookError, match=r"\[0, 1, 2, 3\] cannot be excluded on token \[1, 4\]"):
        model.run_with_hooks(tokens(), fwd_hooks=exclude_experts({0: too_many}))
    model.run_with_hooks(tokens(), fwd_hooks=exclude_experts({0: too_many}, positions=[0, 1]))
    grouped = hooked("deepseek_v2_grouped")
    rule = grouped.routing_rule(1)
    assert rule.groups is not None  # type: ignore[attr-defined]
    most = torch.arange(grouped.n_experts) % 2 == 0
    if rule.cannot_steer([], most.nonzero().flatten().tolist()) is not None:
        with pytest.raises(HookError, match=r"on token \[0, 0\]"):
            grouped.run_with_hooks(tokens(), fwd_hooks=exclude_experts({1: most}))
    with pytest.raises(HookError, match="about 5 experts"):
        model.run_with_hooks(tokens(), fwd_hooks=exclude_experts({0: too_many[..., :5]}))
    with pytest.raises(HookError, match="3 prompts"):
        model.run_with_hooks(tokens(), fwd_hooks=exclude_experts({0: torch.zeros(3, 7, 6, dtype=torch.bool)}))
    hashed = hooked("deepseek_v4_hash")
    none = exclude_experts(torch.zeros(hashed.n_experts, dtype=torch.bool), layers=hashed.moe_layers)
    with pytest.raises(HookError, match="table by token id"):
        hashed.run_with_hooks(tokens(), fwd_hooks=none)
    for wrong in ({}, None, {0: torch.zeros(6)}, {0: [[["x"]]]}, too_many, {0: torch.zeros(0).bool()}):
        with pytest.raises(DataError, match="exclude_experts"):
            exclude_experts(wrong)


def test_masks_that_do_not_fit_the_logits_are_refused(hooked: Hooked) -> None:
    rule = hooked("olmoe").routing_rule(0)
    with pytest.raises(HookError, match="must be bool"):
        rule.excluding(torch.zeros(4, 6), torch.zeros(6))
    with pytest.raises(HookError, match="does not fit"):
        rule.excluding(torch.zeros(4, 6), torch.zeros(3, 6, dtype=torch.bool))
