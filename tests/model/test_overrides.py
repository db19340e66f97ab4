"""HookedMoE's overrides show TransformerLens' parameters and pass them on; from_hf; layers out of place."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from transformer_lens.model_bridge import TransformerBridge

from moe_lens import hook_names
from moe_lens.errors import DataError, MoELensError, UnsupportedRouterError
from moe_lens.model import hooked_moe
from moe_lens.model.hooked_moe import HookedMoE, attach, detach
from moe_lens.model.layers import MoELayer, find_moe_layers, no_moe
from moe_lens.model.registration import routing_layers
from moe_lens.model.self_check import check_router
from moe_lens.model.wrapper import check_hooked
from tests.tiny_models import plain_bridge, tiny_model, tokens

Hooked = Callable[..., HookedMoE]

# What help and completion show

OVERRIDDEN = {
    name: member
    for name, member in vars(HookedMoE).items()
    if inspect.isfunction(member) and not name.startswith("_") and hasattr(TransformerBridge, name)
}


def test_the_methods_of_transformer_lens_that_are_overridden() -> None:
    assert set(OVERRIDDEN) == {
        "forward", "generate", "hf_generate", "generate_stream", "run_with_cache", "run_with_hooks", "hooks",
        "add_hook", "enable_compatibility_mode",
    }  # fmt: skip


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_override_has_the_parameters_of_transformer_lens(name: str) -> None:
    ours = inspect.signature(getattr(HookedMoE, name)).parameters.values()
    theirs = inspect.signature(getattr(TransformerBridge, name)).parameters.values()
    assert [(p.name, p.kind) for p in ours] == [(p.name, p.kind) for p in theirs]
    for mine, base in zip(ours, theirs, strict=True):
        no_hooks = base.default == [] and mine.default == ()
        left_out = (name, mine.name) == ("run_with_cache", "input")
        assert mine.default == base.default or no_hooks or left_out
    documentation = getattr(HookedMoE, name).__doc__
    assert documentation.startswith("As in TransformerLens")


def test_what_an_override_takes_reaches_transformer_lens(hooked: Hooked) -> None:
    model = hooked("olmoe")
    output, cache = model.run_with_cache(
        tokens(), return_cache_object=False, remove_batch_dim=False, stop_at_layer=2,
        names_filter=lambda name: name.endswith("hook_router_logits"), pos_slice=[1, 3], clear_contexts=True,
    )  # fmt: skip
    assert type(cache) is dict
    assert {name for name in cache if "mlp" in name} == {hook_names.router_logits(layer) for layer in (0, 1)}
    assert cache[hook_names.router_logits(0)].shape == (2, 2, 6)
    assert output.shape == (2, 7, 32)  # the residual stream
    hooks = [(hook_names.topk_weights(0), lambda weights, hook: 0 * weights)]
    assert model.run_with_hooks(tokens(), hooks, return_type=None) is None
    assert model.run_with_hooks(tokens(), hooks, stop_at_layer=1).shape == (2, 7, 32)
    model.run_with_hooks(tokens(), hooks, reset_hooks_end=False)
    assert model.hook_dict[hook_names.topk_weights(0)].fwd_hooks
    model.reset_hooks()
    with model.hooks(hooks, [], False):
        pass
    assert model.hook_dict[hook_names.topk_weights(0)].fwd_hooks
    model.reset_hooks()


def test_from_hf_checks_each_router_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []

    def counted(moe: MoELayer) -> None:
        checked.append(moe.router)
        check_router(moe)

    monkeypatch.setattr(hooked_moe, "check_router", counted)
    model = HookedMoE.from_hf(tiny_model("olmoe"))
    routers = [moe.router for moe in routing_layers(model).values()]
    assert len(routers) == 3
    assert list(map(id, checked)) == list(map(id, routers))
    attach(detach(model))
    assert list(map(id, checked)) == 2 * list(map(id, routers))  # at attach, again


def test_moe_layers_outside_the_blocks_are_named() -> None:
    elsewhere = list(find_moe_layers(tiny_model("mixtral")))
    assert "no Mixture-of-Experts layer" in str(no_moe("llama"))
    assert "outside the blocks of the bridge (model.layers.0.mlp, model" in str(no_moe("llama", elsewhere))
    bridge: Any = plain_bridge(tiny_model("olmoe"))
    bridge.blocks = nn.ModuleList()
    bridge.elsewhere = nn.ModuleList(moe.block for moe in elsewhere)
    with pytest.raises(UnsupportedRouterError, match=r"outside the blocks of the bridge .*elsewhere\.1"):
        attach(bridge)


# What is no HookedMoE


def test_what_is_no_hooked_moe_is_refused_in_one_sentence(hooked: Hooked) -> None:
    check_hooked(hooked("olmoe"))
    check_hooked(hooked("olmoe"), HookedMoE)
    bridge = plain_bridge(tiny_model("olmoe"))
    sentence = r"is needed here \(from_pretrained, or attach\(model\).*\); got "
    with pytest.raises(DataError, match=f"A HookedMoE {sentence}TransformerBridge"):
        check_hooked(bridge, HookedMoE, error=DataError)
    for wrong in (None, "olmoe", tiny_model("olmoe"), bridge):
        with pytest.raises(
            MoELensError, match=f"A HookedMoE or RoutedModel {sentence}{type(wrong).__name__}"
        ):
            check_hooked(wrong)
