"""HookedMoE in TransformerLens' tools: caches, hooks, generation, padding, patching."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.patching import generic_activation_patch

from moe_lens import hook_names
from moe_lens.errors import DataError, HookError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.steering.plan import SteeringPlan
from tests import oracle
from tests.families import core_family
from tests.tiny_models import (
    hook_census,
    plain_bridge,
    prompt,
    router_of,
    sparse_blocks,
    tiny_model,
    tokenizer,
    tokens,
)

Hooked = Callable[..., HookedMoE]
PROMPTS = [prompt(3, seed=1), prompt(8, seed=2), prompt(5, seed=3)]


def negate(logits: Tensor, hook: Any) -> Tensor:
    return -logits


def negate_all(model: HookedMoE) -> list[tuple[str, Any]]:
    return [(hook_names.router_logits(layer), negate) for layer in model.moe_layers]


# run_with_cache


@core_family
def test_the_cache_answers_to_names_and_to_short_names(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    _, cache = model.run_with_cache(tokens())
    for layer in model.moe_layers:
        for short, spell, last in (
            ("router_logits", hook_names.router_logits, model.n_experts),
            ("topk_indices", hook_names.topk_indices, model.top_k),
            ("topk_weights", hook_names.topk_weights, model.top_k),
        ):
            assert torch.equal(cache[short, layer], cache[spell(layer)])
            assert cache[short, layer].shape == (2, 7, last)
        router = router_of(sparse_blocks(model.original_model)[layer])
        expected = cache[f"blocks.{layer}.mlp.hook_in"] @ router.weight.T
        torch.testing.assert_close(cache["router_logits", layer], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("names_filter", "expected"),
    [
        (hook_names.router_logits(2), {hook_names.router_logits(2)}),
        ("blocks.2.hook_router_logits", {hook_names.router_logits(2), "blocks.2.hook_router_logits"}),
        (
            [hook_names.topk_indices(0), hook_names.topk_weights(3)],
            {hook_names.topk_indices(0), hook_names.topk_weights(3)},
        ),
        (
            lambda name: name.endswith("mlp.hook_topk_indices"),
            {hook_names.topk_indices(layer) for layer in (0, 2, 3)},
        ),
    ],
)
def test_names_filter(hooked: Hooked, names_filter: Any, expected: set[str]) -> None:
    model = hooked("qwen2_moe")
    everything = model.run_with_cache(tokens())[1]
    logits, cache = model.run_with_cache(tokens(), names_filter=names_filter)
    assert set(cache.keys()) == expected
    assert torch.equal(logits, model(tokens()))
    for name in expected:
        assert torch.equal(cache[name], everything[name])


@pytest.mark.parametrize(("pos_slice", "columns"), [((2, 5), slice(2, 5)), (-1, slice(-1, None))])
def test_pos_slice(hooked: Hooked, pos_slice: Any, columns: slice) -> None:
    model = hooked("mixtral")
    everything = model.run_with_cache(tokens())[1]
    _, cache = model.run_with_cache(tokens(), pos_slice=pos_slice)
    for short in ("router_logits", "topk_indices", "topk_weights"):
        sliced = everything[short, 1][:, columns]
        assert torch.equal(cache[short, 1].reshape(sliced.shape), sliced)


def test_remove_batch_dim(hooked: Hooked) -> None:
    model = hooked("olmoe")
    with_batch = model.run_with_cache(tokens(1))[1]
    _, cache = model.run_with_cache(tokens(1), remove_batch_dim=True)
    assert torch.equal(cache["router_logits", 1], with_batch["router_logits", 1][0])


def test_stop_at_layer_caches_the_layers_before_it(hooked: Hooked) -> None:
    model = hooked("olmoe")
    _, cache = model.run_with_cache(tokens(), stop_at_layer=2)
    cached = {parsed[0] for name in cache if (parsed := hook_names.parse(name)) is not None}
    assert cached == {0, 1}


@core_family
def test_incl_bwd_caches_the_oracles_gradient(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    _, cache = model.run_with_cache(tokens(), incl_bwd=True, return_type="loss")
    delta = torch.zeros(2, 7, model.n_experts, requires_grad=True)
    layer = model.moe_layers[0]
    rewritten = oracle.rewrite(tiny_model(recipe), {layer: lambda z: z + delta})
    log_p = rewritten(tokens()).logits.log_softmax(-1)[:, :-1]
    (-log_p.gather(-1, tokens()[:, 1:, None]).mean()).backward()
    assert delta.grad is not None
    assert delta.grad.abs().max() > 1e-5
    gradient = cache[hook_names.router_logits(layer) + "_grad"]
    torch.testing.assert_close(gradient, delta.grad, rtol=1e-3, atol=1e-6)
    assert cache[hook_names.topk_weights(layer) + "_grad"].shape == (2, 7, model.top_k)


# Padding


@pytest.mark.parametrize("side", ["left", "right"])
@core_family
def test_the_cache_says_which_positions_are_the_prompts_own(recipe: str, side: str) -> None:
    model = HookedMoE.from_hf(tiny_model(recipe), tokenizer(side))
    _, cache = model.run_with_cache(PROMPTS)
    lengths = torch.tensor([[3], [8], [5]]) + int(model.cfg.default_prepend_bos)  # not in Qwen
    columns, longest = torch.arange(int(lengths.max())), lengths.max()
    own = columns >= longest - lengths if side == "left" else columns < lengths
    assert cache.attention_mask.dtype == torch.bool
    assert torch.equal(cache.attention_mask, own)
    input_ids = model.to_tokens(PROMPTS)
    assert torch.equal(input_ids != 0, own)


def test_a_mask_that_was_given_is_the_caches_mask(hooked: Hooked) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    model = hooked("olmoe")
    _, cache = model.run_with_cache(tokens(), attention_mask=mask)
    assert torch.equal(cache.attention_mask, mask.bool())
    _, cache = model.run_with_cache(tokens(), attention_mask=mask, pos_slice=(1, 4))
    assert torch.equal(cache.attention_mask, mask[:, 1:4].bool())


def test_the_mask_follows_padding_side_and_prepend_bos(hooked: Hooked) -> None:
    model = hooked("olmoe")
    _, cache = model.run_with_cache(PROMPTS[:2], padding_side="right", prepend_bos=False)
    assert torch.equal(cache.attention_mask, torch.arange(8) < torch.tensor([[3], [8]]))
    assert cache["router_logits", 0].shape[:2] == (2, 8)


def test_one_text_needs_no_mask(hooked: Hooked) -> None:
    for prompts in (PROMPTS[0], PROMPTS[:1]):
        assert hooked("olmoe").run_with_cache(prompts)[1].attention_mask is None


def test_tokens_are_all_counted_unless_some_are_pad_tokens(hooked: Hooked) -> None:
    model = hooked("olmoe")
    _, cache = model.run_with_cache(tokens())
    assert cache.attention_mask.shape == tokens().shape
    assert cache.attention_mask.all()
    padded = model.to_tokens(PROMPTS[:2])  # given without an attention mask
    _, cache = model.run_with_cache(padded)
    assert cache.attention_mask is None
    with pytest.raises(DataError, match="read padding as text"):
        RoutingStats.from_cache(cache)


def test_an_empty_list_of_prompts_is_refused(hooked: Hooked) -> None:
    with pytest.raises(DataError, match="at least one prompt"):
        hooked("olmoe").run_with_cache([])


@core_family
@pytest.mark.parametrize("steered", [False, True])
def test_a_padded_batch_is_each_prompt_alone(hooked: Hooked, recipe: str, steered: bool) -> None:
    model = hooked(recipe)
    with model.hooks(negate_all(model) if steered else []):
        together, cache = model.run_with_cache(PROMPTS)
        for row, text in enumerate(PROMPTS):
            alone, alone_cache = model.run_with_cache(text)
            own = cache.attention_mask[row]
            torch.testing.assert_close(together[row, own], alone[0], rtol=1e-3, atol=1e-4)
            for layer in model.moe_layers:
                ours, expected = cache["topk_indices", layer][row, own], alone_cache["topk_indices", layer]
                assert torch.equal(ours, expected[0])


def test_padded_tokens_without_a_mask_warn(hooked: Hooked) -> None:
    model = hooked("olmoe")
    padded = model.to_tokens(PROMPTS)
    mask = (padded != model.tokenizer.pad_token_id).long()
    for run in (model, model.run_with_cache, model.run_with_hooks):
        with pytest.warns(UserWarning, match="attention_mask") as found:
            run(padded)
        assert [warning.filename for warning in found] == [__file__]  # the user's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(padded, attention_mask=mask)
        model.run_with_cache(padded, attention_mask=mask)
        model(PROMPTS)
        model.generate(PROMPTS, max_new_tokens=2, verbose=False)
        model(model.to_tokens(max(PROMPTS, key=len)))


def test_a_plan_is_no_list_of_hooks(hooked: Hooked) -> None:
    model, plan = hooked("olmoe"), SteeringPlan(deactivate=[(0, 1)])
    for run in (lambda: model.run_with_hooks(PROMPTS[0], fwd_hooks=plan), lambda: model.hooks(plan)):
        with pytest.raises(HookError, match=r"steer_hooks\(plan\)"):
            run()
    with pytest.raises(HookError, match="pairs"):
        model.run_with_hooks(PROMPTS[0], fwd_hooks=[hook_names.router_logits(0)])


# Hooks of every kind


def test_hooks_act_inside_the_context_only(hooked: Hooked) -> None:
    model = hooked("qwen3_moe")
    before, census = model(tokens()), hook_census(model)
    with model.hooks(negate_all(model)):
        inside = model(tokens())
    assert torch.equal(inside, model.run_with_hooks(tokens(), fwd_hooks=negate_all(model)))
    assert not torch.equal(inside, before)
    assert torch.equal(model(tokens()), before)
    assert hook_census(model) == census


@pytest.mark.parametrize(
    "name",
    [
        hook_names.router_logits(0),
        "blocks.0.hook_router_logits",
        lambda name: name == hook_names.router_logits(0),
    ],
)
def test_add_hook_and_reset_hooks(hooked: Hooked, name: Any) -> None:
    model = hooked("olmoe")
    before = model(tokens())
    expected = model.run_with_hooks(tokens(), fwd_hooks=[(hook_names.router_logits(0), negate)])
    model.add_hook(name, negate)
    assert torch.equal(model(tokens()), expected)
    model.reset_hooks()
    assert torch.equal(model(tokens()), before)


def test_permanent_hooks_survive_a_reset(hooked: Hooked) -> None:
    model = hooked("olmoe")
    before = model(tokens())
    model.add_perma_hook(hook_names.router_logits(0), negate)
    edited = model(tokens())
    model.reset_hooks()
    assert torch.equal(model(tokens()), edited)
    assert not torch.equal(edited, before)
    model.reset_hooks(including_permanent=True)
    assert torch.equal(model(tokens()), before)


def test_hooks_on_one_point_act_in_the_order_given(hooked: Hooked) -> None:
    model, name = hooked("mixtral"), hook_names.router_logits(0)

    def add_ramp(logits: Tensor, hook: Any) -> Tensor:
        return logits + torch.linspace(0, 4, logits.shape[-1])

    def both(logits: Tensor, hook: Any) -> Tensor:
        return add_ramp(negate(logits, hook), hook)

    given = model.run_with_hooks(tokens(), fwd_hooks=[(name, negate), (name, add_ramp)])
    assert torch.equal(given, model.run_with_hooks(tokens(), fwd_hooks=[(name, both)]))
    turned = model.run_with_hooks(tokens(), fwd_hooks=[(name, add_ramp), (name, negate)])
    assert not torch.equal(given, turned)


def test_routing_hooks_compose_with_hooks_elsewhere(hooked: Hooked) -> None:
    model = hooked("olmoe")

    def double(residual: Tensor, hook: Any) -> Tensor:
        return 2 * residual

    elsewhere = ("blocks.1.hook_resid_pre", double)
    both = model.run_with_hooks(tokens(), fwd_hooks=[*negate_all(model), elsewhere])
    assert not torch.equal(both, model.run_with_hooks(tokens(), fwd_hooks=negate_all(model)))
    assert not torch.equal(both, model.run_with_hooks(tokens(), fwd_hooks=[elsewhere]))


def test_hooks_learn_their_name_and_layer(hooked: Hooked) -> None:
    model = hooked("qwen2_moe")
    seen: list[tuple[str | None, int]] = []
    hooks = [
        (hook_names.topk_weights(layer), lambda x, hook: seen.append((hook.name, hook.layer())))
        for layer in (0, 3)
    ]
    model.run_with_hooks(tokens(), fwd_hooks=hooks)
    assert seen == [(hook_names.topk_weights(0), 0), (hook_names.topk_weights(3), 3)]


@core_family
def test_a_backward_hook_can_stop_the_gradient(recipe: str) -> None:
    model = HookedMoE.from_hf(tiny_model(recipe))
    first, *_, last = model.moe_layers
    routers = {layer: router_of(block) for layer, block in sparse_blocks(model.original_model).items()}

    def stop(gradient: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(gradient)

    with model.hooks(bwd_hooks=[(hook_names.router_logits(last), stop)]):
        model(tokens(), return_type="loss").backward()
    assert routers[last].weight.grad.abs().max() == 0
    assert routers[first].weight.grad.abs().max() > 0


@core_family
@pytest.mark.parametrize("point", range(3))
def test_an_exception_in_a_hook_leaves_no_hook_behind(hooked: Hooked, recipe: str, point: int) -> None:
    class OnPurpose(Exception):
        pass

    def fail(value: Tensor, hook: HookPoint) -> Tensor:
        raise OnPurpose

    model = hooked(recipe)
    before, census = model(tokens()), hook_census(model)
    spell = (hook_names.router_logits, hook_names.topk_indices, hook_names.topk_weights)[point]
    hooks = [*negate_all(model), (spell(model.moe_layers[-1]), fail)]
    with pytest.raises(OnPurpose):
        model.run_with_hooks(tokens(), fwd_hooks=hooks)
    with pytest.raises(OnPurpose), model.hooks(hooks):
        model(tokens())
    with pytest.raises(OnPurpose), model.hooks(hooks):
        model.run_with_cache(tokens())
    with pytest.raises(OnPurpose), model.hooks(hooks):
        model.generate(tokens(), max_new_tokens=2, verbose=False)
    assert hook_census(model) == census
    assert all(not p.fwd_hooks and not p._forward_hooks for p in model.hook_dict.values())
    assert torch.equal(model(tokens()), before)


# Generation


def generated(model: HookedMoE, prompts: Any, cached: bool = True, **kwargs: Any) -> Any:
    options = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "verbose": False}
    return model.generate(prompts, use_past_kv_cache=cached, **options, **kwargs)


@core_family
@pytest.mark.parametrize("steered", [False, True])
def test_generation_with_the_cache_is_generation_without(hooked: Hooked, recipe: str, steered: bool) -> None:
    model = hooked(recipe)
    with model.hooks(negate_all(model) if steered else []):
        cached, plain = (generated(model, tokens(), c, output_logits=True) for c in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    for ours, expected in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@core_family
def test_steered_generation_is_the_oracles(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    with model.hooks(negate_all(model)):
        ours = generated(model, tokens(2, 4))
    rewritten = oracle.rewrite(tiny_model(recipe), dict.fromkeys(model.moe_layers, torch.neg))
    sequence = tokens(2, 4)
    for _ in range(6):
        sequence = torch.cat([sequence, rewritten(sequence).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ours, sequence)
    assert not torch.equal(ours, generated(model, tokens(2, 4)))


@core_family
def test_a_padded_batch_generates_what_each_prompt_does(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    with model.hooks(negate_all(model)):
        together = generated(model, PROMPTS, return_type="tokens")
        for row, text in enumerate(PROMPTS):
            assert torch.equal(together[row, -6:], generated(model, text, return_type="tokens")[0, -6:])


@core_family
def test_hf_generate_is_steered_too(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False}
    input_ids = model.to_tokens(PROMPTS[0], prepend_bos=True)
    unsteered: Any = model.hf_generate(input_ids, **options)
    with model.hooks(negate_all(model)):
        steered: Any = model.hf_generate(input_ids, **options)
        assert torch.equal(steered, generated(model, input_ids))
        text: Any = model.hf_generate(PROMPTS[0], **options)
        batch: Any = model.hf_generate(PROMPTS, **options)
    assert not torch.equal(steered, unsteered)
    expected = model.tokenizer.decode(steered[0], skip_special_tokens=True)
    assert text.split() == expected.split()
    assert batch[0].split() == expected.split()


# Patching


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 5].mean() - logits[:, -1, 6].mean()


def patch_position(corrupted: Tensor, index: Any, clean: Any) -> Tensor:
    _, pos = index
    corrupted[:, pos] = clean[:, pos]
    return corrupted


@pytest.mark.parametrize("recipe", ["olmoe", "mixtral"])
def test_activation_patching_of_router_logits(hooked: Hooked, recipe: str) -> None:
    model, clean, corrupted = hooked(recipe), tokens(2, 4, seed=1), tokens(2, 4, seed=2)
    _, cache = model.run_with_cache(clean)
    axes: Any = ("layer", "pos")
    with torch.no_grad():
        result = generic_activation_patch(
            model, corrupted, cache, metric, patch_position, "router_logits", axes
        )
        assert result.shape == (model.cfg.n_layers, 4)
        for layer in range(model.cfg.n_layers):
            for pos in range(4):

                def patch(logits: Tensor, hook: HookPoint, layer: int = layer, pos: int = pos) -> Tensor:
                    logits = logits.clone()
                    logits[:, pos] = cache[hook_names.router_logits(layer)][:, pos]
                    return logits

                hooks = [(hook_names.router_logits(layer), patch)]
                expected = metric(model.run_with_hooks(corrupted, fwd_hooks=hooks))
                assert result[layer, pos].item() == expected.item()
        assert result.std() > 1e-4


def test_patching_clean_into_clean_changes_nothing(hooked: Hooked) -> None:
    model = hooked("olmoe")
    clean_logits, cache = model.run_with_cache(tokens(2, 4))
    axes: Any = ("layer", "pos")
    result = generic_activation_patch(
        model, tokens(2, 4), cache, metric, patch_position, "router_logits", axes
    )
    assert (result == metric(clean_logits)).all()


def test_a_plain_bridge_refuses_none_of_this(hooked: Hooked) -> None:
    """The names that HookedMoE adds are the only ones that it adds."""
    model, plain = hooked("olmoe"), plain_bridge(tiny_model("olmoe"))
    added = set(model.hook_dict) - set(plain.hook_dict)
    assert all(hook_names.parse(name) for name in added)
    assert set(plain.hook_dict) <= set(model.hook_dict)
