"""Points put into a bridge in place and taken out again; copies and subclasses."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from moe_lens import RoutedModel, SteeringPlan, hook_names, steer_hooks, steered
from moe_lens.errors import HookError
from moe_lens.model.attaching import attach, detach
from moe_lens.model.hooked_moe import HookedMoE
from tests.edits import on_logits, same
from tests.families import core_family
from tests.model.recorded import Hooked, negate, point_names
from tests.tiny_models import (
    MOE_LAYERS,
    hook_census,
    plain_bridge,
    router_of,
    sparse_blocks,
    tiny_model,
    tokenizer,
    tokens,
)


@core_family
def test_attach_puts_the_points_into_a_bridge_in_place(hooked: Hooked, recipe: str) -> None:
    bridge = plain_bridge(tiny_model(recipe))
    before = bridge(tokens())
    assert attach(bridge) is bridge
    assert isinstance(bridge, HookedMoE)
    assert bridge.moe_layers == MOE_LAYERS[recipe]
    assert torch.equal(bridge(tokens()), before)
    hooks = on_logits(negate, *MOE_LAYERS[recipe])
    expected = hooked(recipe).run_with_hooks(tokens(), fwd_hooks=hooks)
    assert torch.equal(bridge.run_with_hooks(tokens(), fwd_hooks=hooks), expected)


def test_attach_works_on_a_subclass() -> None:
    class MyBridge(TransformerBridge):
        pass

    bridge = plain_bridge(tiny_model("olmoe"))
    bridge.__class__ = MyBridge
    before = bridge(tokens())
    assert attach(bridge) is bridge
    assert isinstance(bridge, MyBridge)
    assert isinstance(bridge, HookedMoE)
    assert not torch.equal(bridge.run_with_hooks(tokens(), fwd_hooks=on_logits(negate, 0)), before)


def test_attaching_twice_changes_nothing() -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"))
    before = model(tokens())
    names, census = set(model.hook_dict), hook_census(model)
    points = [model.hook_dict[name] for name in point_names(model)]
    attach(model)
    assert set(model.hook_dict) == names
    assert hook_census(model) == census
    assert all(model.hook_dict[name] is point for name, point in zip(point_names(model), points, strict=True))
    assert torch.equal(model(tokens()), before)
    times: list[int] = []
    model.run_with_hooks(tokens(), fwd_hooks=[(hook_names.router_logits(0), lambda z, hook: times.append(1))])
    assert times == [1]


@core_family
def test_detach_leaves_a_plain_bridge(recipe: str) -> None:
    model, plain = HookedMoE.from_hf(tiny_model(recipe)), plain_bridge(tiny_model(recipe))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert detach(model) is model
        assert set(model.hook_dict) == set(plain.hook_dict)
        assert set(model.mod_dict) == set(plain.mod_dict)
    for block in sparse_blocks(model.original_model).values():
        assert "forward" not in vars(router_of(block))
    assert hook_census(model) == hook_census(plain)
    ours, cache = model.run_with_cache(tokens())
    theirs, plain_cache = plain.run_with_cache(tokens())
    assert torch.equal(ours, theirs)
    assert set(cache.keys()) == set(plain_cache.keys())


@core_family
def test_a_routing_hook_after_detach_does_not_pass_silently(recipe: str) -> None:
    model = detach(HookedMoE.from_hf(tiny_model(recipe)))
    name = hook_names.router_logits(MOE_LAYERS[recipe][0])
    for absent in (name, name.replace("mlp.", "")):
        with pytest.raises(Exception, match="hook_router_logits"):
            model.run_with_hooks(tokens(), fwd_hooks=[(absent, same)])
        with pytest.raises(Exception, match="hook_router_logits"):
            model.add_hook(absent, same)
        with pytest.raises(Exception, match="hook_router_logits"):
            model.run_with_cache(tokens(), names_filter=absent)


@core_family
def test_attach_after_detach_works(recipe: str) -> None:
    model = HookedMoE.from_hf(tiny_model(recipe))
    names, hooks = set(model.hook_dict), on_logits(negate, *MOE_LAYERS[recipe])
    expected = model.run_with_hooks(tokens(), fwd_hooks=hooks)
    for _ in range(2):
        attach(detach(model))
    assert set(model.hook_dict) == names
    assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=hooks), expected)
    alias = [(name.replace("mlp.", ""), hook) for name, hook in hooks]
    assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=alias), expected)


def test_detach_of_a_bridge_without_points_changes_nothing() -> None:
    bridge = plain_bridge(tiny_model("olmoe"))
    names, before = set(bridge.hook_dict), bridge(tokens())
    detach(bridge)
    assert set(bridge.hook_dict) == names
    assert torch.equal(bridge(tokens()), before)


@core_family
def test_hooks_on_a_deep_copy_act_on_the_copy_and_only_there(recipe: str) -> None:
    model = HookedMoE.from_hf(tiny_model(recipe))
    before, hooks = model(tokens()), on_logits(negate, *MOE_LAYERS[recipe])
    edited = model.run_with_hooks(tokens(), fwd_hooks=hooks)
    clone = copy.deepcopy(model)
    assert torch.equal(clone(tokens()), before)
    assert torch.equal(clone.run_with_hooks(tokens(), fwd_hooks=hooks), edited)
    with clone.hooks(hooks):
        assert torch.equal(clone(tokens()), edited)
        assert torch.equal(model(tokens()), before)
    with model.hooks(hooks):
        assert torch.equal(clone(tokens()), before)
        assert torch.equal(model(tokens()), edited)


def test_detaching_a_deep_copy_leaves_the_original_attached() -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"))
    before, clone = model(tokens()), copy.deepcopy(model)
    detach(clone)
    assert not any("router_logits" in name for name in clone.hook_dict)
    assert torch.equal(clone(tokens()), before)
    assert not torch.equal(model.run_with_hooks(tokens(), fwd_hooks=on_logits(negate, 0)), before)


def copied_block(model: Any) -> Any:
    return copy.deepcopy(model.model.layers[1])


def new_block(model: Any) -> Any:
    return tiny_model("olmoe").model.layers[1]


@pytest.mark.parametrize("block", [copied_block, new_block])
def test_a_replaced_block_is_not_passed_over(block: Callable[[Any], Any]) -> None:
    model, plan = tiny_model("olmoe"), SteeringPlan(deactivate=[(0, 0), (1, 0)])
    routed, plain = RoutedModel(model), model(tokens()).logits
    with steered(model, plan):
        expected = model(tokens()).logits
        model.model.layers[1] = new_block(model)
        with pytest.raises(HookError, match=r"blocks\.1\.mlp: this block was replaced"):
            model(tokens())
    model.model.layers[1] = block(model)
    for act in (
        lambda: steered(model, plan).__enter__(),
        lambda: attach(model),
        lambda: routed.run_with_hooks(tokens(), fwd_hooks=steer_hooks(plan)),
        lambda: routed.run_with_hooks(tokens(), fwd_hooks=[("blocks.1.hook_resid_post", print)]),
    ):
        with pytest.raises(HookError, match=r"replaced.*detach"):
            act()
    assert torch.equal(model(tokens()).logits, plain)
    detach(model)
    with steered(model, plan):
        assert torch.equal(model(tokens()).logits, expected)


@pytest.mark.parametrize(
    "hooks",
    [
        lambda plan: steer_hooks(plan),
        lambda plan: steer_hooks(plan, positions="prompt"),
        lambda plan: [(hook_names.router_logits(1), same)],
        lambda plan: [(hook_names.topk_indices(1), same)],
    ],
)
def test_a_block_replaced_under_any_hooks_is_not_passed_over(hooks: Callable[[SteeringPlan], Any]) -> None:
    model = tiny_model("olmoe")
    routed = RoutedModel(model)
    with routed.hooks(hooks(SteeringPlan(deactivate=[(1, 0)]))):
        model(tokens())
        model.model.layers[1] = new_block(model)
        with pytest.raises(HookError, match=r"blocks\.1\.mlp: this block was replaced"):
            model(tokens())


def test_a_router_that_is_compiled_by_itself_is_still_that_router() -> None:
    model, plan = tiny_model("olmoe"), SteeringPlan(deactivate=[(0, 0), (1, 0)])
    routed = RoutedModel(model)
    hooks = steer_hooks(plan)
    expected = routed.run_with_hooks(tokens(), fwd_hooks=hooks)
    for layer in model.model.layers:
        layer.mlp.gate = torch.compile(layer.mlp.gate, backend="eager")
    for _ in range(3):
        assert torch.allclose(routed.run_with_hooks(tokens(), fwd_hooks=hooks), expected, atol=1e-6)


def test_an_attached_bridge_knows_padding_and_refuses_absent_layers() -> None:
    bridge = attach(plain_bridge(tiny_model("qwen2_moe"), tokenizer()))
    _, cache = bridge.run_with_cache(["w1 w2 w3", "w4"])
    assert vars(cache)["attention_mask"].tolist() == [[True, True, True], [False, False, True]]
    with pytest.raises(HookError, match="layer 1 has no router"):
        bridge.run_with_hooks(tokens(), fwd_hooks=[(hook_names.router_logits(1), same)])


def test_detach_gives_an_object_of_its_own_class_back() -> None:
    class MyBridge(TransformerBridge):
        pass

    bridge = plain_bridge(tiny_model("olmoe"))
    bridge.__class__ = MyBridge
    assert type(detach(attach(bridge))) is MyBridge
    assert type(detach(HookedMoE.from_hf(tiny_model("olmoe")))) is TransformerBridge


def test_a_subclass_of_hooked_moe_makes_its_own_kind() -> None:
    class Mine(HookedMoE):
        pass

    model = Mine.from_hf(tiny_model("olmoe"))
    assert type(model) is Mine
    assert type(detach(model)) is Mine
