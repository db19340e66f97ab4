"""On every family: what could not fire is refused; attach, detach, copies, loading and offloading."""

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from moe_lens.errors import HookError
from moe_lens.model.hooked_moe import HookedMoE, attach, detach
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan
from tests import router_oracle as oracle
from tests.edits import SPELLERS, on_logits, roll, same
from tests.families import one_of_each_kind, recipes
from tests.promises.decisions import Hooked, Plain, assert_near, hf_model
from tests.tiny_models import (
    EVERY_FAMILY,
    SOME_KINDS,
    hook_census,
    save,
    tiny_model,
    tokenizer,
    tokens,
)

pytestmark = pytest.mark.usefixtures("no_gradients")


@one_of_each_kind
def test_hooks_in_training_mode_are_refused(hooked: Hooked, recipe: str) -> None:
    model = copy.deepcopy(hooked(recipe)).train()
    for spell in SPELLERS:
        with pytest.raises(HookError, match="training mode"):
            model.run_with_hooks(tokens(), fwd_hooks=[(spell(model.moe_layers[-1]), same)])
    assert torch.equal(model.eval()(tokens()), hooked(recipe)(tokens()))


@one_of_each_kind
def test_a_block_that_bypasses_its_router_is_refused(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    for layer in model.moe_layers:
        block = oracle.moe_block(hf_model(model), layer)

        def fused(*args: Any, **kwargs: Any) -> Any:
            return args[0] if args else kwargs["hidden_states"]

        with (
            patch.object(block, "forward", fused),
            pytest.raises(HookError, match=rf"blocks\.{layer}\.mlp.*without calling its router"),
        ):
            model.run_with_hooks(tokens(), fwd_hooks=on_logits(roll, layer))


@one_of_each_kind
def test_detach_leaves_no_trace(hooked: Hooked, plain: Plain, recipe: str) -> None:
    model: Any = copy.deepcopy(hooked(recipe))
    bare: Any = copy.deepcopy(plain(recipe))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert detach(model) is model
    assert type(model) is TransformerBridge
    assert set(model.hook_dict) == set(bare.hook_dict)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in bare.named_modules()]
    assert hook_census(model) == hook_census(bare)
    for ours, theirs in zip(model.blocks, bare.blocks, strict=True):
        assert set(vars(ours)) == set(vars(theirs))
        assert ours.hook_aliases == theirs.hook_aliases
        assert hasattr(ours, "mlp") == hasattr(theirs, "mlp")
    for router in oracle.routers(hf_model(model)).values():
        assert "forward" not in vars(router)
    output, cache = model.run_with_cache(tokens())
    expected, their_cache = bare.run_with_cache(tokens())
    assert torch.equal(output, expected)
    assert set(cache.keys()) == set(their_cache.keys())


@one_of_each_kind
def test_attach_after_detach_gives_the_points_back(hooked: Hooked, recipe: str) -> None:
    model = attach(detach(copy.deepcopy(hooked(recipe))))
    hooks = on_logits(roll, *model.moe_layers)
    assert set(model.hook_dict) == set(hooked(recipe).hook_dict)
    expected = hooked(recipe).run_with_hooks(tokens(), fwd_hooks=hooks)
    assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=hooks), expected)


@one_of_each_kind
def test_a_deep_copy_has_points_of_its_own(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    before, clone, hooks = model(tokens()), copy.deepcopy(model), on_logits(roll, *model.moe_layers)
    edited = model.run_with_hooks(tokens(), fwd_hooks=hooks)
    with clone.hooks(hooks):
        assert torch.equal(clone(tokens()), edited)
        assert torch.equal(model(tokens()), before)
    with model.hooks(hooks):
        assert torch.equal(clone(tokens()), before)
    detach(clone)
    assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=hooks), edited)


@recipes(SOME_KINDS, (each for each in EVERY_FAMILY if not each.endswith("_vl") and each != "qwen3_vl_moe"))
def test_from_pretrained_gives_the_saved_model(hooked: Hooked, recipe: str, tmp_path: Path) -> None:
    in_memory = hooked(recipe)
    model = HookedMoE.from_pretrained(save(tiny_model(recipe), tmp_path / "tiny-moe", tokenizer()))
    assert isinstance(model, HookedMoE)
    assert model.moe_shape == replace(in_memory.moe_shape, model="tiny-moe")
    assert not model.training
    for hooks in ([], on_logits(roll, *model.moe_layers)):  # another attention implementation may serve here
        expected = in_memory.run_with_hooks(tokens(), fwd_hooks=hooks)
        assert_near(model.run_with_hooks(tokens(), fwd_hooks=hooks), expected)


@pytest.mark.parametrize("recipe", ["afmoe", "deepseek_v3", "ernie4_5_moe", "gemma4", "laguna", "minimax_m2"])
def test_parameters_that_the_rule_needs_may_be_offloaded_to_disk(recipe: str, tmp_path: Path) -> None:
    folder = save(tiny_model(recipe), tmp_path / "model", tokenizer())
    in_memory = HookedMoE.from_pretrained(folder)
    trunk: Any = in_memory.original_model.model
    device_map = {f"model.{name}": "cpu" for name, _ in trunk.named_children() if name != "layers"}
    device_map |= {f"model.layers.{n}": "disk" if n else "cpu" for n in range(in_memory.cfg.n_layers)}
    device_map["lm_head"] = "cpu"
    model = HookedMoE.from_pretrained(folder, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    layers = in_memory.moe_layers
    steered = steer_hooks(SteeringPlan([(n, 3) for n in layers], [(n, 0) for n in layers]))
    for hooks in ([], steered, on_logits(roll, *layers)):
        expected = in_memory.run_with_hooks(tokens(), fwd_hooks=hooks)
        assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=hooks), expected)


def test_a_router_alone_in_training_mode_is_refused() -> None:
    model = HookedMoE.from_hf(tiny_model("phimoe"))
    model.run_with_cache(tokens())
    for router in (module for module in model.modules() if type(module).__name__ == "PhimoeTopKRouter"):
        router.train()
    with pytest.raises(HookError, match="training mode"):
        model.run_with_cache(tokens())
