"""On every family: without hooks, and with hooks that change nothing, it is the plain bridge bit for bit.

The oracle is TransformerLens' own bridge around the same weights.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from moe_lens import hook_names
from moe_lens.errors import HookError
from moe_lens.model.hooked_moe import HookedMoE, attach, detach
from tests import router_oracle as oracle
from tests.edits import SPELLERS, on_logits, same
from tests.families import every_family, every_family_in_every_dtype, one_of_each_kind
from tests.promises.decisions import (
    Hooked,
    Plain,
    assert_decided,
    assert_near,
    given,
    hf_model,
    on_all_points,
    padded,
    routing,
    shuffle,
)
from tests.tiny_models import (
    plain_bridge,
    tiny_model,
    tokens,
)

pytestmark = pytest.mark.usefixtures("no_gradients")


@every_family_in_every_dtype
def test_unhooked_it_is_the_plain_bridge_bit_for_bit(
    hooked: Hooked, plain: Plain, recipe: str, dtype: torch.dtype
) -> None:
    ours, theirs = hooked(recipe, dtype), plain(recipe, dtype)
    input_ids, mask = padded()
    assert torch.equal(ours(tokens()), theirs(tokens()))
    assert torch.equal(ours(input_ids, **mask), theirs(input_ids, **mask))
    assert torch.equal(ours(tokens(), return_type="loss"), theirs(tokens(), return_type="loss"))


@one_of_each_kind
def test_attach_to_a_plain_bridge_changes_no_bit_in_float16(recipe: str) -> None:
    bridge = plain_bridge(tiny_model(recipe, torch.float16))
    before = bridge(tokens())
    assert torch.isfinite(before).all()
    assert attach(bridge) is bridge
    assert isinstance(bridge, HookedMoE)
    assert torch.equal(bridge(tokens()), before)
    assert torch.equal(bridge.run_with_hooks(tokens(), fwd_hooks=on_all_points(bridge, same)), before)
    edit = shuffle(3.0, n_tokens=14)
    rerouted = bridge.run_with_hooks(tokens(), fwd_hooks=on_logits(edit, *bridge.moe_layers))
    with oracle.rerouted(hf_model(detach(bridge)), edit):
        assert torch.equal(rerouted, bridge(tokens()))
    assert not torch.equal(rerouted, before)


@one_of_each_kind
def test_gradients_are_those_of_the_plain_bridge(hooked: Hooked, plain: Plain, recipe: str) -> None:
    def gradients(bridge: TransformerBridge, hooks: list[Any]) -> dict[str, Tensor | None]:
        parameters = {n: p for n, p in hf_model(bridge).named_parameters() if p.requires_grad}
        with torch.enable_grad(), bridge.hooks(hooks):
            loss = bridge(tokens(), return_type="loss")
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return dict(zip(parameters, found, strict=True))

    model = hooked(recipe)
    expected = gradients(plain(recipe), [])
    unhooked, identity = gradients(model, []), gradients(model, on_all_points(model, same))
    embedding = next(name for name in expected if "embed_tokens" in name or "embeddings" in name)
    assert expected[embedding] is not None
    for name, gradient in expected.items():
        if gradient is None:
            assert unhooked[name] is identity[name] is None
        else:
            assert torch.equal(given(unhooked[name]), gradient), name
            assert_near(given(identity[name]), gradient, 1e-6)


@every_family_in_every_dtype
def test_identity_hooks_and_caching_change_no_bit(
    hooked: Hooked, plain: Plain, recipe: str, dtype: torch.dtype
) -> None:
    model = hooked(recipe, dtype)
    expected, their_cache = plain(recipe, dtype).run_with_cache(tokens())
    assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=on_all_points(model, same)), expected)
    output, our_cache = model.run_with_cache(tokens())
    assert torch.equal(output, expected)
    for name, value in their_cache.items():
        assert torch.equal(our_cache[name], value), name


@every_family_in_every_dtype
def test_the_points_have_their_names_shapes_and_dtypes(
    hooked: Hooked, plain: Plain, recipe: str, dtype: torch.dtype
) -> None:
    model, bare = hooked(recipe, dtype), plain(recipe, dtype)
    _, ours = model.run_with_cache(tokens())
    _, theirs = bare.run_with_cache(tokens())
    layers = oracle.routers(hf_model(bare))
    assert model.moe_layers == tuple(layers)
    assert set(ours.keys()) - set(theirs.keys()) == {
        f"blocks.{layer}.{mlp}{point}"
        for layer in layers
        for mlp in ("mlp.", "")
        for point in hook_names.POINTS
    }
    seen: oracle.Seen = {}
    with oracle.rerouted(hf_model(bare), {}, seen):
        bare(tokens())
    for layer, (decided,) in seen.items():
        n_experts, k = decided.logits.shape[-1], int(decided.chosen[0].sum())
        logits, indices, weights = (ours[spell(layer)] for spell in SPELLERS)
        assert logits.shape == (2, 7, n_experts)
        assert indices.shape == weights.shape == (2, 7, k)
        assert indices.dtype == torch.int64
        assert (n_experts, k) == (model.n_experts, model.top_k)
        assert_decided(routing(ours, layer), decided)
        for spell, point in zip(SPELLERS, ("router_logits", "topk_indices", "topk_weights"), strict=True):
            assert torch.equal(ours[point, layer], ours[spell(layer)])


@every_family
def test_a_layer_without_router_has_no_points(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    parsed = [hook_names.parse(name) for name in model.hook_dict]
    assert {found[0] for found in parsed if found} == set(model.moe_layers)
    for layer in {*range(model.cfg.n_layers + 1)} - set(model.moe_layers):
        with pytest.raises(HookError, match="no router"):
            model.run_with_hooks(tokens(), fwd_hooks=[(hook_names.router_logits(layer), same)])
