"""HookedMoE: the five promises of the design, attach and detach, loading, and what is refused.

Oracles: TransformerLens' plain bridge (bit for bit) where nothing is edited, and tests/oracle.py
(loops in float64) where something is.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from moe_lens import hook_names
from moe_lens.errors import HookError, MoELensError, RouterMismatchError, UnsupportedRouterError
from moe_lens.model.hooked_moe import HookedMoE, attach, detach
from moe_lens.routers.plain import SoftmaxTopK
from tests import oracle
from tests.families import core_family, every_dtype, every_recipe
from tests.model.test_layers import SoftmaxRouter, alter, four_outputs, other_renormalisation, scaling
from tests.tiny_models import (
    ALL_RECIPES,
    EVERY_FAMILY,
    MOE_LAYERS,
    N_EXPERTS,
    TOP_K,
    VOCAB_SIZE,
    hook_census,
    plain_bridge,
    prompt,
    randomised,
    router_of,
    save,
    sparse_blocks,
    tiny_model,
    tokenizer,
    tokens,
)

Hooked = Callable[..., HookedMoE]
MORE_SHAPES = [recipe for recipe in ALL_RECIPES if recipe not in EVERY_FAMILY]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest value compared
SPELLERS = (hook_names.router_logits, hook_names.topk_indices, hook_names.topk_weights)


def point_names(model: Any) -> list[str]:
    return [spell(layer) for layer in model.moe_layers for spell in SPELLERS]


def same(value: Tensor, hook: HookPoint) -> Tensor:
    return value


def on_logits(edit: Callable[[Tensor], Tensor], *layers: int) -> list[Any]:
    return [(hook_names.router_logits(layer), lambda z, hook: edit(z)) for layer in layers]


def negate(logits: Tensor) -> Tensor:
    return -logits


def roll(logits: Tensor) -> Tensor:
    return logits.roll(1, dims=-1)


def force_expert_0(logits: Tensor) -> Tensor:
    return logits + 8.0 * nn.functional.one_hot(torch.tensor(0), logits.shape[-1])


def halve_and_remove_expert_1(logits: Tensor) -> Tensor:
    gone = nn.functional.one_hot(torch.tensor(1), logits.shape[-1]).bool()
    return (logits / 2).masked_fill(gone, -float("inf"))


def reverse_ranks(logits: Tensor) -> Tensor:
    """The least likely expert becomes the likeliest; values half a unit apart, exact in every dtype."""
    return logits.argsort(dim=-1, stable=True).argsort(-1).to(logits.dtype) * -0.5


EDITS = [negate, roll, force_expert_0, halve_and_remove_expert_1]
every_edit = pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = expected.double().abs().max().item()
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


def padded() -> tuple[Tensor, Tensor]:
    """Left-padded tokens and their mask, [3 8]; the rows have 8, 5 and 2 tokens of their own."""
    mask = torch.arange(8) >= torch.tensor([[0], [3], [6]])
    return tokens(3, 8).masked_fill(~mask, 0), mask


class Record:
    """Hooks that keep what passes some points, one entry a forward pass."""

    def __init__(self, *names: str):
        self.seen: dict[str, list[Tensor]] = {name: [] for name in names}

    @property
    def hooks(self) -> list[tuple[str, Any]]:
        return [(name, self._keep) for name in self.seen]

    def _keep(self, value: Tensor, hook: Any) -> None:
        self.seen[hook.name].append(value.detach().clone())


def record_block(layer: int) -> Record:
    mlp = f"blocks.{layer}.mlp"
    return Record(f"{mlp}.hook_in", f"{mlp}.hook_out", *(spell(layer) for spell in SPELLERS))


def assert_block_ran_as_recorded(model: HookedMoE, layer: int, record: Record, dtype: torch.dtype) -> None:
    """Every pass: selection and weights follow from the recorded logits, the output from these."""
    block = sparse_blocks(model.original_model)[layer]
    assert len(record.seen[hook_names.router_logits(layer)]) > 0
    for hidden, output, logits, indices, weights in zip(*record.seen.values(), strict=True):
        expected = oracle.route(logits, model.top_k, oracle.renormalises(model.original_model))
        assert torch.equal(indices, expected[0])
        assert_close(weights, expected[1], dtype)
        assert_close(output, oracle.block_output(block, hidden, *expected), dtype)


# Promise 1: nothing hooked, nothing changed


@pytest.mark.parametrize("recipe", MORE_SHAPES)  # tests/promises/test_every_family.py has the others
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


# Promise 2: identity hooks


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


# Promise 3: an edit is causal


@every_recipe
def test_the_oracle_computes_what_the_model_computes(hooked: Hooked, recipe: str) -> None:
    expected = oracle.rewrite(tiny_model(recipe), {})(tokens()).logits
    assert_close(hooked(recipe)(tokens()), expected, torch.float32)


@every_recipe
@every_edit
def test_edited_logits_reroute(hooked: Hooked, recipe: str, edit: oracle.Edit) -> None:
    model = hooked(recipe)
    actual = model.run_with_hooks(tokens(), fwd_hooks=on_logits(edit, *model.moe_layers))
    rewritten = oracle.rewrite(tiny_model(recipe), dict.fromkeys(model.moe_layers, edit))
    assert_close(actual, rewritten(tokens()).logits, torch.float32)
    assert (actual - model(tokens())).abs().max() > 0.1


@core_family
def test_each_layer_has_its_own_point(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    for layer in model.moe_layers:
        actual = model.run_with_hooks(tokens(), fwd_hooks=on_logits(negate, layer))
        expected = oracle.rewrite(tiny_model(recipe), {layer: negate})(tokens()).logits
        assert_close(actual, expected, torch.float32)


@settings(max_examples=15, deadline=None)
@given(recipe=st.sampled_from(ALL_RECIPES), seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 3.0]))
def test_any_logits_reroute(hooked: Hooked, recipe: str, seed: int, scale: float) -> None:
    model = hooked(recipe)
    generator = torch.Generator().manual_seed(seed)
    noise = scale * torch.randn(2, 3, model.n_experts, generator=generator)

    def add_noise(logits: Tensor) -> Tensor:
        return logits + noise

    layer = model.moe_layers[seed % len(model.moe_layers)]
    actual = model.run_with_hooks(tokens(2, 3, seed), fwd_hooks=on_logits(add_noise, layer))
    expected = oracle.rewrite(tiny_model(recipe), {layer: add_noise})(tokens(2, 3, seed)).logits
    assert_close(actual, expected, torch.float32)


@every_recipe
@every_dtype
def test_each_block_follows_its_edited_logits(hooked: Hooked, recipe: str, dtype: torch.dtype) -> None:
    model = hooked(recipe, dtype)
    for layer in model.moe_layers:
        record = record_block(layer)
        model.run_with_hooks(tokens(), fwd_hooks=on_logits(reverse_ranks, layer) + record.hooks)
        assert_block_ran_as_recorded(model, layer, record, dtype)


@core_family
@every_dtype
def test_each_block_follows_its_edited_logits_under_left_padding(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    model, (input_ids, mask) = hooked(recipe, dtype), padded()
    layer = model.moe_layers[-1]
    record = record_block(layer)
    hooks = on_logits(reverse_ranks, *model.moe_layers) + record.hooks
    model.run_with_hooks(input_ids, fwd_hooks=hooks, attention_mask=mask.long())
    assert_block_ran_as_recorded(model, layer, record, dtype)


@core_family
def test_edited_logits_reroute_under_left_padding(hooked: Hooked, recipe: str) -> None:
    model, (input_ids, mask) = hooked(recipe), padded()
    actual = model.run_with_hooks(
        input_ids, fwd_hooks=on_logits(negate, *model.moe_layers), attention_mask=mask.long()
    )
    for row, own in enumerate(mask):
        alone = input_ids[row, own][None]
        expected = oracle.rewrite(tiny_model(recipe), dict.fromkeys(model.moe_layers, negate))(alone).logits
        torch.testing.assert_close(actual[row, own][None], expected, rtol=1e-3, atol=1e-4)


@core_family
@every_dtype
def test_each_block_follows_its_edited_logits_in_every_cached_step(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    model = hooked(recipe, dtype)
    layer = model.moe_layers[-1]
    record = record_block(layer)
    with model.hooks(on_logits(reverse_ranks, *model.moe_layers) + record.hooks):
        model.generate(tokens(2, 4), max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
    lengths = [logits.shape[1] for logits in record.seen[hook_names.router_logits(layer)]]
    assert lengths == [4, 1, 1, 1]
    assert_block_ran_as_recorded(model, layer, record, dtype)


@core_family
def test_the_gradient_at_the_logits_is_the_oracles(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    readout = torch.randn(2, 7, VOCAB_SIZE, generator=torch.Generator().manual_seed(5))

    def gradients(forward: Callable[[dict[int, oracle.Edit]], Tensor]) -> list[Tensor | None]:
        deltas = [torch.zeros(2, 7, model.n_experts, requires_grad=True) for _ in model.moe_layers]
        edits = {
            layer: lambda z, delta=delta: negate(z) + delta
            for layer, delta in zip(model.moe_layers, deltas, strict=True)
        }
        (forward(edits) * readout).sum().backward()
        return [delta.grad for delta in deltas]

    def hooked_forward(edits: dict[int, oracle.Edit]) -> Tensor:
        hooks = [hook for layer, edit in edits.items() for hook in on_logits(edit, layer)]
        return model.run_with_hooks(tokens(), fwd_hooks=hooks)

    ours = gradients(hooked_forward)
    theirs = gradients(lambda edits: oracle.rewrite(tiny_model(recipe), edits)(tokens()).logits)
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual is not None
        assert expected is not None
        assert expected.abs().max() > 1e-3
        assert_close(actual, expected, torch.float32)


@core_family
def test_the_gradient_at_the_logits_predicts_a_small_step(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    layer, step = model.moe_layers[0], 1e-3
    direction = torch.randn(2, 7, model.n_experts, generator=torch.Generator().manual_seed(6))

    def loss(size: float | Tensor) -> Tensor:
        hooks = on_logits(lambda z: z + size * direction, layer)
        return model.run_with_hooks(tokens(), fwd_hooks=hooks, return_type="loss")

    size = torch.zeros((), requires_grad=True)
    loss(size).backward()
    assert size.grad is not None
    difference = (loss(step) - loss(-step)).item() / (2 * step)
    assert size.grad.item() == pytest.approx(difference, rel=0.05, abs=1e-3)
    assert abs(difference) > 1e-3


@core_family
def test_gradients_reach_the_hook_in_bfloat16(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe, torch.bfloat16)
    delta = torch.zeros(2, 7, model.n_experts, requires_grad=True)
    hooks = on_logits(lambda z: z + delta.to(z.dtype), model.moe_layers[0])
    model.run_with_hooks(tokens(), fwd_hooks=hooks, return_type="loss").backward()
    assert delta.grad is not None
    assert torch.isfinite(delta.grad).all()
    assert delta.grad.abs().max() > 0


@every_recipe
@every_dtype
def test_edited_indices_run_with_the_weights_of_the_rule(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    model = hooked(recipe, dtype)
    layer, renormalise = model.moe_layers[-1], oracle.renormalises(model.original_model)
    record = record_block(layer)
    shift = (hook_names.topk_indices(layer), lambda indices, hook: (indices + 1) % model.n_experts)
    model.run_with_hooks(tokens(), fwd_hooks=[shift, *record.hooks])
    (hidden,), (output,), (logits,), (indices,), (weights,) = record.seen.values()
    unedited, _ = oracle.route(logits, model.top_k, renormalise)
    if dtype == torch.float32:  # in bfloat16 two logits can be equal
        assert torch.equal(indices, (unedited + 1) % model.n_experts)
    expected = torch.stack(
        [
            oracle.weigh(z, i.tolist(), renormalise)
            for z, i in zip(logits.flatten(0, 1), indices.flatten(0, 1), strict=True)
        ]
    ).reshape(weights.shape)
    assert_close(weights, expected, dtype)
    block = sparse_blocks(model.original_model)[layer]
    assert_close(output, oracle.block_output(block, hidden, indices, expected), dtype)


@core_family
def test_an_expert_may_be_chosen_twice(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    layer = model.moe_layers[0]
    record = record_block(layer)
    only_2 = (hook_names.topk_indices(layer), lambda indices, hook: torch.full_like(indices, 2))
    model.run_with_hooks(tokens(), fwd_hooks=[only_2, *record.hooks])
    (hidden,), (output,), _, (indices,), (weights,) = record.seen.values()
    assert (indices == 2).all()
    block = sparse_blocks(model.original_model)[layer]
    assert_close(output, oracle.block_output(block, hidden, indices, weights), torch.float32)


@every_recipe
@every_dtype
def test_edited_weights_scale_the_experts(hooked: Hooked, recipe: str, dtype: torch.dtype) -> None:
    model = hooked(recipe, dtype)
    layer = model.moe_layers[-1]
    factors = torch.linspace(-1.0, 2.0, model.top_k)
    record = record_block(layer)
    scale = (hook_names.topk_weights(layer), lambda weights, hook: (weights * factors).to(weights.dtype))
    model.run_with_hooks(tokens(), fwd_hooks=[scale, *record.hooks])
    (hidden,), (output,), (logits,), (indices,), _ = record.seen.values()
    p = [
        oracle.weigh(z, i.tolist(), oracle.renormalises(model.original_model)) * factors
        for z, i in zip(logits.flatten(0, 1), indices.flatten(0, 1), strict=True)
    ]
    expected = oracle.block_output(
        sparse_blocks(model.original_model)[layer], hidden, indices, torch.stack(p).reshape(indices.shape)
    )
    assert_close(output, expected, dtype)


def test_later_points_see_what_earlier_ones_edited(hooked: Hooked) -> None:
    model = hooked("mixtral")
    record = Record(*(spell(0) for spell in SPELLERS))
    model.run_with_hooks(tokens(), fwd_hooks=on_logits(force_expert_0, 0) + record.hooks)
    assert (record.seen[hook_names.topk_indices(0)][0][..., 0] == 0).all()
    assert (record.seen[hook_names.topk_weights(0)][0][..., 0] > 0.9).all()


def test_an_edit_in_place_is_an_edit(hooked: Hooked) -> None:
    def in_place(logits: Tensor, hook: HookPoint) -> None:
        logits[..., 0] = -float("inf")

    model = hooked("olmoe")
    hooks = [(hook_names.router_logits(1), in_place)]
    expected = model.run_with_hooks(
        tokens(), fwd_hooks=on_logits(lambda z: z.index_fill(-1, torch.tensor(0), -float("inf")), 1)
    )
    assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=hooks), expected)
    assert not torch.equal(expected, model(tokens()))


def test_hf_reports_the_edited_logits(hooked: Hooked) -> None:
    model = hooked("olmoe")
    record = Record(hook_names.router_logits(1))
    with model.hooks(on_logits(negate, 1) + record.hooks):
        reported = model.original_model(tokens(), output_router_logits=True).router_logits
    times = len(reported) // 3  # inside any bridge HF's recorder sees each router more than once
    edited = record.seen[hook_names.router_logits(1)][0].flatten(0, 1)
    assert all(torch.equal(logits, edited) for logits in reported[times : 2 * times])


# Promise 4: the sum


@every_recipe
@every_dtype
def test_weights_times_expert_outputs_sum_to_the_routed_output(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    model = hooked(recipe, dtype)
    _, cache = model.run_with_cache(tokens())
    for layer, block in sparse_blocks(model.original_model).items():
        expected = oracle.block_output(
            block,
            cache[f"blocks.{layer}.mlp.hook_in"],
            cache[hook_names.topk_indices(layer)],
            cache[hook_names.topk_weights(layer)],
        )
        assert_close(cache[f"blocks.{layer}.mlp.hook_out"], expected, dtype)


# Promise 5: a hook that could not fire raises


@core_family
def test_hooks_in_training_mode_are_refused(recipe: str) -> None:
    model = HookedMoE.from_hf(tiny_model(recipe)).train()
    unhooked = model(tokens())
    for name in point_names(model):
        with pytest.raises(HookError, match="training mode"):
            model.run_with_hooks(tokens(), fwd_hooks=[(name, same)])
    with pytest.raises(HookError, match="training mode"):
        model.run_with_cache(tokens())
    assert torch.equal(model(tokens()), unhooked)
    assert torch.equal(model.eval().run_with_cache(tokens())[0], unhooked)


@core_family
def test_a_fused_block_is_refused(recipe: str) -> None:
    model = HookedMoE.from_hf(tiny_model(recipe))
    layer = model.moe_layers[-1]
    block: Any = sparse_blocks(model.original_model)[layer]
    block.forward = lambda hidden: hidden
    with pytest.raises(HookError, match=f"blocks.{layer}.mlp.*without calling its router"):
        model.run_with_hooks(tokens(), fwd_hooks=on_logits(negate, layer))


@pytest.mark.parametrize("spell", SPELLERS)
def test_a_layer_without_router_is_refused(hooked: Hooked, spell: Callable[[int], str]) -> None:
    model = hooked("qwen2_moe")  # layer 1 is dense
    before = hook_census(model)
    name, alias = spell(1), spell(1).replace("mlp.", "")
    for absent in (name, alias, spell(17)):
        with pytest.raises(HookError, match=r"no router; the MoE layers are \(0, 2, 3\)"):
            model.run_with_hooks(tokens(), fwd_hooks=[(spell(0), same), (absent, same)])
        with pytest.raises(HookError, match="no router"):
            model.run_with_hooks(tokens(), bwd_hooks=[(absent, same)])
        with pytest.raises(HookError, match="no router"), model.hooks([(absent, same)]):
            pass
        with pytest.raises(HookError, match="no router"):
            model.add_hook(absent, same)
        with pytest.raises(HookError, match="no router"):
            model.add_perma_hook(absent, same)
        with pytest.raises(HookError, match="no router"):
            model.run_with_cache(tokens(), names_filter=absent)
        with pytest.raises(HookError, match="no router"):
            model.run_with_cache(tokens(), names_filter=[spell(0), absent])
    assert hook_census(model) == before


# What a hook may not return, seen through the bridge (all cases: test_router_hooks.py)


@pytest.mark.parametrize(
    ("spell", "bad"),
    [
        (hook_names.router_logits, lambda x, hook: x[..., 1:]),
        (hook_names.router_logits, lambda x, hook: x * float("nan")),
        (hook_names.topk_indices, lambda x, hook: x + 100),
        (hook_names.topk_indices, lambda x, hook: x.float()),
        (hook_names.topk_weights, lambda x, hook: (x, x)),
    ],
)
@core_family
def test_a_bad_return_is_named_and_leaves_no_hook(
    hooked: Hooked, recipe: str, spell: Callable[[int], str], bad: Any
) -> None:
    model = hooked(recipe)
    before, census, layer = model(tokens()), hook_census(model), model.moe_layers[-1]
    with pytest.raises(HookError, match=rf"blocks\.{layer}\.mlp"):
        model.run_with_hooks(tokens(), fwd_hooks=[(spell(layer), bad)])
    assert hook_census(model) == census
    assert torch.equal(model(tokens()), before)


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


# Loading


@core_family
@every_dtype
def test_from_pretrained_gives_the_saved_model(recipe: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save(tiny_model(recipe, dtype), tmp_path / "tiny-moe", tokenizer())
    model = HookedMoE.from_pretrained(folder, dtype=dtype)
    by_hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = HookedMoE.from_hf(by_hf)
    assert isinstance(model, HookedMoE)
    assert model.moe_shape.model == "tiny-moe"
    assert model.cfg.dtype == dtype
    assert not model.training
    for hooks in ([], on_logits(reverse_ranks, *model.moe_layers)):
        ours = model.run_with_hooks(tokens(), fwd_hooks=hooks)
        assert torch.equal(ours, expected.run_with_hooks(tokens(), fwd_hooks=hooks))


def test_from_pretrained_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    hf_model = tiny_model("mixtral")
    folder = save(hf_model, tmp_path, tokenizer(), max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = HookedMoE.from_pretrained(str(folder))
    torch.testing.assert_close(model(tokens()), hf_model(tokens()).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        router_of(sparse_blocks(model.original_model)[1]).weight, router_of(sparse_blocks(hf_model)[1]).weight
    )


@core_family
def test_layers_offloaded_to_disk_route_and_reroute(recipe: str, tmp_path: Path) -> None:
    folder = save(tiny_model(recipe), tmp_path / "model", tokenizer())
    in_memory = HookedMoE.from_pretrained(folder)
    n_layers = in_memory.cfg.n_layers
    device_map: dict[str, Any] = {
        f"model.layers.{number}": "disk" if number else "cpu" for number in range(n_layers)
    }
    for name in ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"):
        device_map[name] = "cpu"
    model = HookedMoE.from_pretrained(folder, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    assert router_of(sparse_blocks(model.original_model)[n_layers - 1]).weight.device.type == "meta"
    assert model.moe_shape == in_memory.moe_shape
    for hooks in ([], on_logits(negate, *model.moe_layers)):
        expected = in_memory.run_with_hooks(tokens(), fwd_hooks=hooks)
        assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=hooks), expected)
    detach(model)
    assert torch.equal(model(tokens()), in_memory(tokens()))


def test_the_self_check_sees_an_altered_router_that_is_offloaded(tmp_path: Path) -> None:
    folder = save(tiny_model("olmoe"), tmp_path / "model", tokenizer())
    device_map = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
    }
    model = HookedMoE.from_pretrained(folder, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    detach(model)
    router = router_of(sparse_blocks(model.original_model)[2])
    router.norm_topk_prob = True
    attach(model)
    assert model.routing_rule(2) == SoftmaxTopK(6, 3, renormalize=True)
    detach(model)
    loaded = vars(router)["forward"]
    router.forward = lambda hidden: scaling(*loaded(hidden))
    with pytest.raises(RouterMismatchError, match=r"blocks\.2\.mlp: OlmoeTopKRouter"):
        attach(model)


@core_family
def test_from_hf_puts_a_model_in_training_mode_into_eval_mode(recipe: str) -> None:
    model = HookedMoE.from_hf(tiny_model(recipe).train())
    assert not any(module.training for module in model.modules())
    assert not any(point.training for point in model.hook_dict.values())


# The self-check and bad models: refused, and left as they were


def dense(build: str) -> Any:
    if build == "gpt2":
        return randomised(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)))
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4
    )
    return randomised(lambda: LlamaForCausalLM(config))


def made_up() -> Any:
    """An OLMoE whose routers are of a class that moe_lens does not know."""
    hf_model = tiny_model("olmoe")
    for block in sparse_blocks(hf_model).values():
        cast(Any, block).gate = SoftmaxRouter(router_of(block))
    return hf_model.eval()


def assert_refused_untouched(hf_model: Any, error: type[MoELensError], words: str) -> None:
    with torch.no_grad():
        before = hf_model(tokens()).logits
        census, modules = hook_census(hf_model), [name for name, _ in hf_model.named_modules()]
        was_training = hf_model.training
        with pytest.raises(error, match=words):
            HookedMoE.from_hf(hf_model)
        assert [name for name, _ in hf_model.named_modules()] == modules
        assert hook_census(hf_model) == census
        assert hf_model.training == was_training
        assert torch.equal(hf_model(tokens()).logits, before)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: dense("gpt2"), "GPT2LMHeadModel has no Mixture-of-Experts layer"),
        (lambda: dense("llama").train(), "LlamaForCausalLM has no Mixture-of-Experts layer"),
        (lambda: made_up(), r"model\.layers\.0\.mlp.*SoftmaxRouter.*register_rule"),
    ],
)
def test_a_model_without_a_known_router_is_refused_untouched(build: Callable[[], Any], words: str) -> None:
    assert_refused_untouched(build(), UnsupportedRouterError, words)


@core_family
@pytest.mark.parametrize(
    ("alteration", "words"),
    [(other_renormalisation, "weights differ"), (scaling, "weights differ"), (four_outputs, "returns no")],
)
@pytest.mark.parametrize("as_subclass", [True, False])
def test_a_model_with_an_altered_router_is_refused_untouched(
    recipe: str, alteration: Callable[..., Any], words: str, as_subclass: bool
) -> None:
    hf_model = tiny_model(recipe)
    layer, block = list(sparse_blocks(hf_model).items())[-1]
    router = router_of(block)
    alter(router, alteration, as_subclass)
    if alteration is four_outputs:  # such a model cannot run, so only the refusal is looked at
        with pytest.raises(RouterMismatchError, match=words):
            HookedMoE.from_hf(hf_model)
        return
    expected = rf"model\.layers\.{layer}\.mlp: {type(router).__name__} .*{words}"
    assert_refused_untouched(hf_model, RouterMismatchError, expected)


@core_family
def test_attach_to_a_bridge_with_an_altered_router_is_refused_untouched(recipe: str) -> None:
    bridge = plain_bridge(tiny_model(recipe))
    layer, block = list(sparse_blocks(bridge.original_model).items())[-1]
    alter(router_of(block), scaling)
    before, names, census = bridge(tokens()), set(bridge.hook_dict), hook_census(bridge)
    with pytest.raises(
        RouterMismatchError, match=rf"blocks\.{layer}\.mlp: {type(router_of(block)).__name__}"
    ):
        attach(bridge)
    assert set(bridge.hook_dict) == names
    assert hook_census(bridge) == census
    assert torch.equal(bridge(tokens()), before)


@pytest.mark.parametrize("build", ["gpt2", "llama"])
def test_attach_to_a_dense_bridge_is_refused_untouched(build: str) -> None:
    bridge = plain_bridge(dense(build))
    before, names = bridge(tokens()), set(bridge.hook_dict)
    with pytest.raises(UnsupportedRouterError, match="no Mixture-of-Experts layer"):
        attach(bridge)
    assert set(bridge.hook_dict) == names
    assert torch.equal(bridge(tokens()), before)


def test_attach_to_a_bridge_with_an_unknown_router_is_refused() -> None:
    with pytest.raises(UnsupportedRouterError, match=r"blocks\.0\.mlp.*SoftmaxRouter"):
        attach(plain_bridge(made_up()))


def test_from_pretrained_of_a_dense_model_is_refused(tmp_path: Path) -> None:
    folder = save(dense("llama"), tmp_path, tokenizer())
    with pytest.raises(UnsupportedRouterError, match="no Mixture-of-Experts layer"):
        HookedMoE.from_pretrained(folder)


def test_layers_of_different_k_are_refused_untouched() -> None:
    hf_model = tiny_model("olmoe")
    router_of(sparse_blocks(hf_model)[1]).top_k = 2
    assert_refused_untouched(hf_model, UnsupportedRouterError, r"differ.*\(6, 3\).*\(6, 2\)")


def test_a_model_that_a_bridge_wraps_already_is_refused() -> None:
    hf_model = tiny_model("olmoe")
    bridge = plain_bridge(hf_model)
    before = bridge(tokens())
    for wrapped in (hf_model, bridge):
        with pytest.raises(MoELensError, match="attach"):
            HookedMoE.from_hf(wrapped)
    assert torch.equal(bridge(tokens()), before)


def test_text_needs_a_tokenizer_and_tokens_do_not() -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"))
    assert model(tokens()).shape == (2, 7, VOCAB_SIZE)
    with pytest.raises(Exception, match="okenizer"):
        model(prompt(3))


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


@pytest.mark.parametrize("wrong", ["a name", None, 3])
def test_what_is_no_model_is_refused(wrong: Any) -> None:
    for call in (HookedMoE.from_hf, attach, detach):
        with pytest.raises((MoELensError, TypeCheckError)):
            call(wrong)


def test_a_router_whose_weights_are_nan_is_refused_as_such() -> None:
    hf_model = tiny_model("olmoe")
    with torch.no_grad():
        router_of(sparse_blocks(hf_model)[1]).weight.fill_(float("nan"))
    with pytest.raises(RouterMismatchError, match=r"layers\.1.*NaN or infinite"):
        HookedMoE.from_hf(hf_model)


def test_a_hook_that_makes_the_weights_nan_is_named(hooked: Hooked) -> None:
    def spoil(weights: torch.Tensor, hook: Any) -> torch.Tensor:
        return weights * float("nan")

    with pytest.raises(HookError, match="hook on the weights"):
        hooked("olmoe").run_with_hooks(tokens(), fwd_hooks=[(hook_names.topk_weights(0), spoil)])


def test_an_unknown_router_is_refused_by_its_layer() -> None:
    bridge = plain_bridge(tiny_model("olmoe"))
    router = router_of(bridge.blocks[2].mlp.original_component)
    router.__class__ = type("BrandNewRouter", (torch.nn.Module,), {})
    with pytest.raises(UnsupportedRouterError, match=r"blocks\.2\.mlp.*BrandNewRouter"):
        attach(bridge)


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


def test_a_subclass_of_hooked_moe_makes_its_own_kind() -> None:
    class Mine(HookedMoE):
        pass

    model = Mine.from_hf(tiny_model("olmoe"))
    assert type(model) is Mine
    assert type(detach(model)) is Mine


def test_a_model_hooked_through_another_bridge_is_refused() -> None:
    hf_model = tiny_model("olmoe")
    HookedMoE.from_hf(hf_model)
    with pytest.raises(MoELensError, match="another bridge"):
        attach(plain_bridge(hf_model))


def test_from_pretrained_of_an_architecture_without_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "dbrx", "architectures": ["DbrxForCausalLM"]}')
    with pytest.raises(MoELensError, match="no adapter for the architecture"):
        HookedMoE.from_pretrained(tmp_path)
