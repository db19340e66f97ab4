"""HookedMoE: with nothing edited it is the plain bridge, bit for bit; what it knows of its model.

The oracle is TransformerLens' plain bridge.
"""

from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from moe_lens import hook_names
from moe_lens.errors import HookError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routers.plain import SoftmaxTopK
from tests import oracle
from tests.edits import on_logits, same
from tests.families import core_family, every_dtype, every_recipe
from tests.model.recorded import Hooked, negate, padded, point_names
from tests.tiny_models import (
    ALL_RECIPES,
    EVERY_FAMILY,
    MOE_LAYERS,
    N_EXPERTS,
    TOP_K,
    VOCAB_SIZE,
    plain_bridge,
    prompt,
    router_of,
    sparse_blocks,
    tiny_model,
    tokens,
)

MORE_SHAPES = [recipe for recipe in ALL_RECIPES if recipe not in EVERY_FAMILY]


@pytest.mark.parametrize("recipe", MORE_SHAPES)  # tests/promises/ has the others
@every_dtype
def test_unhooked_it_is_the_plain_bridge_bit_for_bit(hooked: Hooked, recipe: str, dtype: torch.dtype) -> None:
    model, plain = hooked(recipe, dtype), plain_bridge(tiny_model(recipe, dtype))
    assert torch.equal(model(tokens()), plain(tokens()))
    input_ids, mask = padded()
    assert torch.equal(
        model(input_ids, attention_mask=mask.long()), plain(input_ids, attention_mask=mask.long())
    )
    assert torch.equal(model(tokens(), return_type="loss"), plain(tokens(), return_type="loss"))


@core_family
def test_unhooked_gradients_are_those_of_the_plain_bridge(recipe: str) -> None:
    gradients = []
    for wrap in (HookedMoE.from_hf, plain_bridge):
        hf_model = tiny_model(recipe)
        wrap(hf_model)(tokens(), return_type="loss").backward()
        blocks = sparse_blocks(hf_model).values()
        gradients.append([router_of(block).weight.grad for block in blocks])
    assert all(g.abs().max() > 0 for g in gradients[0])
    assert all(torch.equal(ours, plain) for ours, plain in zip(*gradients, strict=True))


@core_family
def test_unhooked_the_rule_never_runs(hooked: Hooked, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any) -> Any:
        raise AssertionError("the rule ran")

    model = hooked(recipe)
    monkeypatch.setattr(SoftmaxTopK, "select", forbidden)
    model(tokens())
    with pytest.raises(AssertionError, match="the rule ran"):
        model.run_with_hooks(tokens(), fwd_hooks=on_logits(negate, model.moe_layers[0]))


@pytest.mark.parametrize("recipe", MORE_SHAPES)
@every_dtype
def test_identity_hooks_change_no_bit(hooked: Hooked, recipe: str, dtype: torch.dtype) -> None:
    model, plain = hooked(recipe, dtype), plain_bridge(tiny_model(recipe, dtype))
    hooks = [(name, same) for name in point_names(model)]
    assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=hooks), plain(tokens()))
    for hook in hooks:
        assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=[hook]), plain(tokens()))


@core_family
@every_dtype
def test_caching_changes_no_bit_and_no_other_activation(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    ours, our_cache = hooked(recipe, dtype).run_with_cache(tokens())
    theirs, their_cache = plain_bridge(tiny_model(recipe, dtype)).run_with_cache(tokens())
    assert torch.equal(ours, theirs)
    assert set(our_cache.keys()) - set(their_cache.keys()) == {
        f"blocks.{layer}.{mlp}{point}"
        for layer in MOE_LAYERS[recipe]
        for mlp in ("mlp.", "")
        for point in hook_names.POINTS
    }
    for name, value in their_cache.items():
        assert torch.equal(our_cache[name], value), name


@core_family
def test_identity_hooks_change_no_gradient(recipe: str) -> None:
    gradients = []
    for hook_all in (True, False):
        model = HookedMoE.from_hf(tiny_model(recipe))
        hooks = [(name, same) for name in point_names(model) if hook_all]
        model.run_with_hooks(tokens(), fwd_hooks=hooks, return_type="loss").backward()
        blocks = sparse_blocks(model.original_model).values()
        gradients.append([router_of(block).weight.grad for block in blocks])
    for with_hooks, without in zip(*gradients, strict=True):
        torch.testing.assert_close(with_hooks, without, rtol=1e-6, atol=1e-9)


# attach and detach
@core_family
def test_it_is_a_transformer_bridge(hooked: Hooked, recipe: str) -> None:
    assert isinstance(hooked(recipe), TransformerBridge)


@every_recipe
def test_it_knows_its_layers_experts_and_k(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    assert model.moe_layers == MOE_LAYERS[recipe]
    assert (model.n_experts, model.top_k) == (N_EXPERTS[recipe], TOP_K[recipe])
    for layer in model.moe_layers:
        rule = model.routing_rule(layer)
        assert rule == SoftmaxTopK(
            N_EXPERTS[recipe],
            TOP_K[recipe],
            renormalize=oracle.renormalises(model.original_model),
            float32_weights=recipe == "mixtral",
        )


def test_routing_rule_of_a_dense_layer_is_refused(hooked: Hooked) -> None:
    with pytest.raises(HookError, match=r"layer 1 has no router; the MoE layers are \(0, 2, 3\)"):
        hooked("qwen2_moe").routing_rule(1)


def test_the_shape_carries_the_name_without_folders() -> None:
    hf_model = tiny_model("olmoe")
    assert HookedMoE.from_hf(hf_model).moe_shape.model == "OlmoeForCausalLM"
    hf_model = tiny_model("olmoe")
    hf_model.config.name_or_path = "/somebody/folder/my-olmoe/"
    assert HookedMoE.from_hf(hf_model).moe_shape.model == "my-olmoe"


def test_text_needs_a_tokenizer_and_tokens_do_not() -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"))
    assert model(tokens()).shape == (2, 7, VOCAB_SIZE)
    with pytest.raises(Exception, match="okenizer"):
        model(prompt(3))


@pytest.mark.parametrize("recipe", ["olmoe", "mixtral"])
def test_the_weights_point_shows_the_dtype_that_hf_uses_even_after_a_float32_edit(
    hooked: Hooked, recipe: str
) -> None:
    model = hooked(recipe, torch.bfloat16)
    _, cache = model.run_with_cache(tokens())
    with model.hooks([(hook_names.router_logits(0), lambda logits, hook: logits.float() * 2)]):
        _, edited = model.run_with_cache(tokens())
    expected = torch.float32 if recipe == "mixtral" else torch.bfloat16
    assert cache["topk_weights", 0].dtype == edited["topk_weights", 0].dtype == expected
