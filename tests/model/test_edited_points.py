"""HookedMoE: an edit of logits, chosen experts or weights is causal, and the outputs add up.

The oracle is tests/oracle.py: loops in float64.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from moe_lens import hook_names
from tests import oracle
from tests.edits import SPELLERS, on_logits
from tests.families import core_family, every_dtype, every_recipe
from tests.model.recorded import (
    Hooked,
    Record,
    assert_block_ran_as_recorded,
    assert_close,
    every_edit,
    force_expert_0,
    negate,
    padded,
    record_block,
    reverse_ranks,
)
from tests.tiny_models import (
    ALL_RECIPES,
    VOCAB_SIZE,
    sparse_blocks,
    tiny_model,
    tokens,
)


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
