"""Adapters (PEFT) on attention, experts and routers, put in before the hook points or after them.

Oracle: the model that `merge_and_unload` makes of a copy.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moe_lens import HookedMoE, RoutedModel, SteeringPlan, attach, detach, hook_names, steered
from moe_lens.errors import HookError, MoELensError
from tests.families import recipes
from tests.tiny_models import tiny_model, tokens

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["o_proj"]},
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "routers": {"target_modules": [], "target_parameters": ["gate.weight"]},
    "all of them": {"target_modules": ["o_proj"], "target_parameters": ["gate.weight", *EXPERTS]},
}
PLAN = SteeringPlan(deactivate=[(1, 0), (1, 1)])
every_adapter = pytest.mark.parametrize("adapters", ADAPTERS)
every_recipe = recipes(("olmoe", "deepseek_v3"), ("mixtral", "qwen3_moe"))
every_order = pytest.mark.parametrize("order", ["adapters first", "points first", "points on its base"])


def with_adapters(model: Any, adapters: dict[str, Any]) -> Any:
    """Adapters with random weights, so that they change what the model computes."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **adapters)
    return peft.get_peft_model(model, config).eval()


def build(recipe: str, adapters: str, order: str) -> tuple[Any, RoutedModel]:
    """A PEFT model and a RoutedModel on it."""
    model = tiny_model(recipe)
    if order == "points first":
        routed = RoutedModel(model)
        return with_adapters(model, ADAPTERS[adapters]), routed
    adapted = with_adapters(model, ADAPTERS[adapters])
    return adapted, RoutedModel(adapted if order == "adapters first" else adapted.base_model.model)


def merged(recipe: str, adapters: str) -> Any:
    return with_adapters(tiny_model(recipe), ADAPTERS[adapters]).merge_and_unload().eval()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@every_recipe
@every_adapter
@every_order
def test_points_act_and_show_what_the_adapted_router_decides(recipe: str, adapters: str, order: str) -> None:
    adapted, routed = build(recipe, adapters, order)
    unhooked = adapted(tokens()).logits
    oracle = RoutedModel(merged(recipe, adapters))
    _, cache = routed.run_with_cache(tokens())
    _, expected = oracle.run_with_cache(tokens())
    for layer in routed.moe_layers:
        for point in hook_names.POINTS:
            name = hook_names.name(layer, point)
            assert cache[name].shape == expected[name].shape
            close(cache[name].float(), expected[name].float())
    with steered(adapted, PLAN):
        ours = adapted(tokens()).logits
    with steered(oracle, PLAN):
        theirs = oracle.hf_model(tokens()).logits
    close(ours, theirs)
    assert not torch.allclose(ours, unhooked, atol=1e-2)
    assert torch.equal(adapted(tokens()).logits, unhooked)


@every_recipe
@every_order
def test_steered_generation_equals_the_merged_models(recipe: str, order: str) -> None:
    adapted, _ = build(recipe, "all of them", order)
    oracle = merged(recipe, "all of them")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with steered(adapted, PLAN):
        ours = adapted.generate(input_ids=tokens(), **options)
    with steered(oracle, PLAN):
        assert torch.equal(ours, oracle.generate(input_ids=tokens(), **options))


@every_recipe
@every_order
def test_gradients_reach_adapters_through_hooks(recipe: str, order: str) -> None:
    adapted, _ = build(recipe, "all of them", order)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    adapted.train()
    with steered(adapted, PLAN, training=True):
        adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all("lora" in name for name in trained)
    without = [name for name, parameter in trained.items() if parameter.grad is None]
    assert without == []
    routers = [p.grad for name, p in trained.items() if ".gate." in name]
    assert routers
    assert all(bool(grad.abs().max() > 0) for grad in routers[-2:])


@pytest.mark.parametrize("order", ["adapters first", "points first"])
def test_adapters_are_saved_as_without_points(order: str, tmp_path: Path) -> None:
    adapted, _ = build("olmoe", "all of them", order)
    adapted.save_pretrained(tmp_path / "ours")
    with_adapters(tiny_model("olmoe"), ADAPTERS["all of them"]).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    loaded = peft.PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path / "ours").eval()
    close(loaded(tokens()).logits, adapted(tokens()).logits)


@every_order
def test_adapters_may_be_merged_under_the_points(order: str) -> None:
    adapted, routed = build("olmoe", "all of them", order)
    plain = merged("olmoe", "all of them")
    with steered(plain, PLAN):
        expected = plain(tokens()).logits
    unloaded = adapted.merge_and_unload()
    with steered(unloaded, PLAN):
        ours = unloaded(tokens()).logits
    close(ours, expected)
    assert not any("forward" in vars(part) for part in detach(routed).modules())
    assert unloaded.state_dict().keys() == plain.state_dict().keys()


@every_order
def test_adapters_that_are_switched_off_do_not_show(order: str) -> None:
    adapted, routed = build("olmoe", "routers", order)
    base = RoutedModel(tiny_model("olmoe"))
    with adapted.disable_adapter():
        _, cache = routed.run_with_cache(tokens())
    _, expected = base.run_with_cache(tokens())
    close(cache["router_logits", 0], expected["router_logits", 0])
    assert not torch.allclose(
        routed.run_with_cache(tokens())[1]["router_logits", 0], cache["router_logits", 0]
    )


@every_adapter
@every_order
def test_detaching_leaves_the_adapted_model(adapters: str, order: str) -> None:
    adapted, routed = build("olmoe", adapters, order)
    own = with_adapters(tiny_model("olmoe"), ADAPTERS[adapters])
    detach(routed)
    for (name, part), (own_name, own_part) in zip(adapted.named_modules(), own.named_modules(), strict=True):
        assert name == own_name
        assert vars(part).keys() == vars(own_part).keys()
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
    assert torch.equal(adapted(tokens()).logits, own(tokens()).logits)


def test_routers_that_are_trained_whole() -> None:
    adapted = with_adapters(tiny_model("olmoe"), {"target_modules": ["o_proj"], "modules_to_save": ["gate"]})
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    oracle = copy.deepcopy(adapted).merge_and_unload()
    _, cache = RoutedModel(adapted).run_with_cache(tokens())
    _, expected = RoutedModel(oracle).run_with_cache(tokens())
    close(cache["router_logits", 2], expected["router_logits", 2])
    with steered(adapted, PLAN), steered(oracle, PLAN):
        close(adapted(tokens()).logits, oracle(tokens()).logits)


@pytest.mark.parametrize("positions", [None, "prompt"])
def test_a_plan_does_not_pass_over_routers_that_are_switched_off(positions: str | None) -> None:
    """A policy and its reference model, turn by turn; and another adapter's routers."""
    trained = {"target_modules": ["o_proj"], "modules_to_save": ["gate"]}
    adapted = with_adapters(tiny_model("olmoe"), trained)
    adapted.add_adapter("other", peft.LoraConfig(r=4, **trained))
    with steered(adapted, PLAN, positions=positions):
        expected = adapted(tokens()).logits
        for _ in range(3):
            with (
                adapted.disable_adapter(),
                pytest.raises(HookError, match=r"another router.*disable_adapter"),
            ):
                adapted(tokens())
            assert torch.equal(adapted(tokens()).logits, expected)
            adapted.set_adapter("other")
            with pytest.raises(HookError, match=r"another router.*set_adapter"):
                adapted(tokens())
            adapted.set_adapter("default")
            assert torch.equal(adapted(tokens()).logits, expected)
    own = tiny_model("olmoe")
    with adapted.disable_adapter():
        plain = adapted(tokens()).logits
        with steered(adapted, PLAN, positions=positions), steered(own, PLAN, positions=positions):
            close(adapted(tokens()).logits, own(tokens()).logits)
            assert not torch.equal(adapted(tokens()).logits, plain)


def test_routers_that_are_copied_under_the_points_are_not_passed_over() -> None:
    model, trained = tiny_model("olmoe"), {"target_modules": ["o_proj"], "modules_to_save": ["gate"]}
    routed = RoutedModel(model)
    with_adapters(model, trained)
    with pytest.raises(HookError, match="modules_to_save"):
        routed.run_with_cache(tokens())
    for act in (attach, lambda model: steered(model, PLAN).__enter__()):
        with pytest.raises(HookError, match=r"not of one wrapper.*detach"):
            act(model)
    detach(model)
    routed.detach()
    own = with_adapters(tiny_model("olmoe"), trained)
    with steered(model, PLAN), steered(own, PLAN):
        assert torch.equal(model(tokens()).logits, own(tokens()).logits)


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_a_bridge_is_refused_with_what_to_do(adapters: str) -> None:
    adapted = with_adapters(tiny_model("olmoe"), ADAPTERS[adapters])
    before = adapted(tokens()).logits
    for model in (adapted, adapted.base_model.model):
        with pytest.raises(MoELensError, match=r"adapters.*RoutedModel.*merge_and_unload"):
            HookedMoE.from_hf(model)
    assert torch.equal(adapted(tokens()).logits, before)
    unloaded = adapted.merge_and_unload()
    close(HookedMoE.from_hf(unloaded)(tokens()), before)
