"""Patching sweeps against TransformerLens' generic_activation_patch and against patches made by hand."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float, TypeCheckError
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens import patching as transformer_lens_patching

from moe_lens import hook_names, zero_ablate
from moe_lens.errors import DataError, HookError, MoELensError
from moe_lens.interventions import stacked_runs
from moe_lens.interventions.patching import ROUTER_POINTS, patch_expert_outputs, patch_router
from moe_lens.interventions.stacked_runs import Cell, bytes_a_token, runs_that_fit
from moe_lens.model import edited_runs
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan
from tests.families import core_family, first_of, recipes, some_kinds
from tests.tiny_models import (
    FAMILIES,
    hook_census,
    plain_bridge,
    prompt,
    tiny_model,
    tokens,
)

Hooked = Callable[..., HookedMoE]
BATCH, N_POS = 2, 6
CLEAN, CORRUPTED = tokens(BATCH, N_POS, seed=1), tokens(BATCH, N_POS, seed=2)
OTHERS = ("deepseek_v3", "llama4", "jetmoe", "nemotron_h_latent")
SINGLE_POINTS = tuple(point for point in ROUTER_POINTS if point != "route")
TOLERANCE: dict[str, Any] = {"rtol": 0, "atol": 2e-5}


def metric(logits: Tensor) -> Tensor:
    """Depends on every row and on more than one position."""
    assert logits.shape[:2] == (BATCH, N_POS)
    return (logits[0, -1, 5] - 2 * logits[-1, 2, 7] + logits[:, -1].logsumexp(-1).mean()).float()


def cached(model: HookedMoE, clean: Any = CLEAN) -> ActivationCache:
    """A run with its routing, and with its experts' outputs where they are switched on."""
    return model.run_with_cache(clean, names_filter=lambda name: hook_names.parse(name) is not None)[1]


def by_transformer_lens(model: HookedMoE, cache: ActivationCache, point: str) -> Tensor:
    cells = [(layer, pos) for layer in model.moe_layers for pos in range(N_POS)]
    values = transformer_lens_patching.generic_activation_patch(
        model,
        CORRUPTED,
        cache,
        metric,
        transformer_lens_patching.layer_pos_patch_setter,
        point,
        index_df=pd.DataFrame(cells, columns=["layer", "pos"]),
    )
    assert isinstance(values, Tensor)
    return values.reshape(-1, N_POS)


def outputs_by_hand(
    model: HookedMoE, cache: ActivationCache, wanted: Callable[[int, int], bool]
) -> Float[Tensor, "layer"]:
    """For each MoE layer, the metric with clean outputs where `wanted(expert, pos)`: token by token."""
    values = []
    for layer in model.moe_layers:
        clean_indices, clean = cache["topk_indices", layer].tolist(), cache["expert_out", layer]

        def put(outputs: Tensor, hook: Any, there: Any = clean_indices, clean: Any = clean) -> Tensor:
            chosen = hook.chosen.tolist()
            for row, pos in itertools.product(range(BATCH), range(N_POS)):
                for slot, expert in enumerate(chosen[row][pos]):
                    if expert in there[row][pos] and wanted(expert, pos):
                        outputs[row, pos, slot] = clean[row, pos, there[row][pos].index(expert)]
            return outputs

        logits = model.run_with_hooks(CORRUPTED, fwd_hooks=[(hook_names.expert_out(layer), put)])
        values.append(metric(logits))
    return torch.stack(values)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(transformer_lens_patching, "tqdm", lambda rows: rows)
    monkeypatch.setattr(
        edited_runs, "clear_device_cache", lambda garbage_collection: None
    )  # collecting is slow
    with torch.no_grad():
        yield


# The numbers


@recipes(("olmoe", "deepseek_v3"), FAMILIES + OTHERS)
def test_router_patches_are_transformer_lens_own(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    cache = cached(model)
    for point in SINGLE_POINTS:
        expected = by_transformer_lens(model, cache, point)
        one_by_one = patch_router(model, cache, CORRUPTED, metric, point=point, batch_size=1, reuse=False)
        assert torch.equal(one_by_one, expected)
        stacked = patch_router(model, cache, CORRUPTED, metric, point=point)
        torch.testing.assert_close(stacked, expected, **TOLERANCE)
        assert expected.std() > 1e-4
        assert stacked.dtype == torch.float32
        assert stacked.shape == (len(model.moe_layers), N_POS)


@pytest.mark.parametrize("recipe", ["olmoe", "deepseek_v3"])
def test_in_bfloat16_one_by_one_is_bit_for_bit(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe, torch.bfloat16)
    cache = cached(model)
    for reuse in (True, False):  # skipped layers change no bit
        found = patch_router(model, cache, CORRUPTED, metric, batch_size=1, reuse=reuse)
        assert torch.equal(found, by_transformer_lens(model, cache, "router_logits"))


@some_kinds
def test_every_kind_can_be_patched(with_outputs: Hooked, recipe: str) -> None:
    """Its own cache changes nothing, stacking changes nothing, a route is indices and weights."""
    model = with_outputs(recipe)
    own, clean, plain = cached(model, CORRUPTED), cached(model), metric(model(CORRUPTED))
    routes, experts = partial(patch_router, point="route"), patch_expert_outputs
    for sweep in (patch_router, routes, experts, partial(experts, by="pos")):
        unchanged = sweep(model, own, CORRUPTED, metric)
        torch.testing.assert_close(unchanged, plain.expand_as(unchanged), **TOLERANCE)
    for sweep in (routes, experts):
        found = sweep(model, clean, CORRUPTED, metric)
        torch.testing.assert_close(sweep(model, clean, CORRUPTED, metric, batch_size=4), found, **TOLERANCE)
        assert (found - plain).abs().max() > 1e-3

    def put(value: Tensor, hook: Any) -> Tensor:
        return torch.cat([value[:, :3], clean[hook.name][:, 3:4], value[:, 4:]], dim=1)

    layer = model.moe_layers[-1]
    hooks: Any = [(hook_names.topk_indices(layer), put), (hook_names.topk_weights(layer), put)]
    by_hand = metric(model.run_with_hooks(CORRUPTED, fwd_hooks=hooks))
    by_route = routes(model, clean, CORRUPTED, metric)
    torch.testing.assert_close(by_route[-1, 3], by_hand, **TOLERANCE)
    if not recipe.endswith("hash"):  # its logits do not say which experts run
        by_logits = patch_router(model, clean, CORRUPTED, metric)
        torch.testing.assert_close(by_route, by_logits, **TOLERANCE)


@pytest.mark.broad
@pytest.mark.parametrize("recipe", FAMILIES + OTHERS)
def test_expert_outputs_are_put_in_where_the_expert_runs_in_both(with_outputs: Hooked, recipe: str) -> None:
    model = with_outputs(recipe)
    cache = cached(model)
    by_expert = patch_expert_outputs(model, cache, CORRUPTED, metric)
    by_pos = patch_expert_outputs(model, cache, CORRUPTED, metric, by="pos")
    assert by_expert.shape == (len(model.moe_layers), model.n_experts)
    assert by_pos.shape == (len(model.moe_layers), N_POS)
    for expert in range(model.n_experts):
        by_hand = outputs_by_hand(model, cache, lambda e, pos, expert=expert: e == expert)
        torch.testing.assert_close(by_expert[:, expert], by_hand, **TOLERANCE)
    for position in range(N_POS):
        by_hand = outputs_by_hand(model, cache, lambda e, pos, position=position: pos == position)
        torch.testing.assert_close(by_pos[:, position], by_hand, **TOLERANCE)


def test_an_expert_that_never_runs_in_both_has_the_unpatched_metric(with_outputs: Hooked) -> None:
    model = with_outputs("qwen3_moe")
    cache = cached(model)
    corrupted = model.run_with_cache(CORRUPTED)[1]
    found = patch_expert_outputs(model, cache, CORRUPTED, metric, batch_size=1)
    plain, n_apart = metric(model(CORRUPTED)).detach(), 0
    for row, layer in enumerate(model.moe_layers):
        for expert in range(model.n_experts):
            runs = [(c["topk_indices", layer] == expert).any(-1) for c in (cache, corrupted)]
            if not (runs[0] & runs[1]).any():
                n_apart += 1
                assert torch.equal(found[row, expert], plain)
            else:
                assert not torch.equal(found[row, expert], plain)
    assert n_apart > 0


@pytest.mark.parametrize("recipe", ["olmoe", "qwen2_moe", "llama4"])
def test_where_routes_agree_by_pos_is_transformer_lens_own(with_outputs: Hooked, recipe: str) -> None:
    """All experts of this model run in the same order everywhere: the corrupted run's routes are forced."""
    model = with_outputs(recipe)
    forced = torch.arange(model.top_k).expand(BATCH, N_POS, -1)
    handles: Any = [
        (hook_names.topk_indices(layer), lambda i, hook: forced.to(i)) for layer in model.moe_layers
    ]
    with model.hooks(handles):
        cache = cached(model)
        found = patch_expert_outputs(model, cache, CORRUPTED, metric, by="pos", batch_size=1)
        expected = by_transformer_lens(model, cache, "expert_out")
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert expected.std() > 1e-4


# Stacking


@pytest.mark.parametrize("point", first_of([next(iter(ROUTER_POINTS)), "expert"], [*ROUTER_POINTS, "pos"]))
def test_any_number_of_patches_a_forward_gives_the_same(with_outputs: Hooked, point: str) -> None:
    model = with_outputs("qwen2_moe")
    cache = cached(model)

    def sweep(size: int) -> Tensor:
        if point in ROUTER_POINTS:
            return patch_router(model, cache, CORRUPTED, metric, point=point, batch_size=size)
        return patch_expert_outputs(model, cache, CORRUPTED, metric, by=point, batch_size=size)

    one_by_one = sweep(1)

    @settings(max_examples=4, deadline=None, derandomize=True)
    @given(batch_size=st.integers(2, 30))
    def same(batch_size: int) -> None:
        torch.testing.assert_close(sweep(batch_size), one_by_one, **TOLERANCE)

    same()


def test_a_forward_holds_as_many_runs_as_asked(hooked: Hooked) -> None:
    model = hooked("olmoe")
    cache, rows = cached(model), []
    with model.hooks([("hook_embed", lambda value, hook: rows.append(len(value)))]):
        patch_router(model, cache, CORRUPTED, metric, batch_size=7)  # 3 layers, 6 positions
        patch_router(model, cache, CORRUPTED, metric)
    assert rows == [7 * BATCH, 7 * BATCH, 4 * BATCH, 18 * BATCH]


def test_out_of_memory_halves_the_stack_and_goes_on(hooked: Hooked) -> None:
    model, tried = hooked("olmoe"), []
    cache = cached(model)
    expected = patch_router(model, cache, CORRUPTED, metric)

    def small_memory(value: Tensor, hook: Any) -> None:
        tried.append(len(value) // BATCH)
        if tried[-1] > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    with model.hooks([("blocks.2.hook_resid_pre", small_memory)]):
        found = patch_router(model, cache, CORRUPTED, metric)
        assert tried == [18, 9, 4, 4, 4, 4, 2]
        with pytest.raises(torch.OutOfMemoryError):  # the number that was asked for is kept
            patch_router(model, cache, CORRUPTED, metric, batch_size=6)
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_memory_that_never_suffices_and_other_errors_are_raised(hooked: Hooked) -> None:
    model = hooked("olmoe")
    cache = cached(model)

    def raises(text: str) -> Any:
        def hook(value: Tensor, hook: Any) -> None:
            raise RuntimeError(text)

        return [("blocks.0.hook_resid_pre", hook)]

    for text in ("CUDA out of memory. Tried to allocate 1.00 GiB.", "something else"):
        with model.hooks(raises(text)), pytest.raises(RuntimeError, match=text):
            patch_router(model, cache, CORRUPTED, metric)


def test_the_estimate_follows_memory_and_size(hooked: Hooked, monkeypatch: pytest.MonkeyPatch) -> None:
    model, long = hooked("olmoe"), tokens(2, 60)
    a_run = bytes_a_token(model, 60) * long.numel()
    for available, expected in ((0, 1), (2 * a_run, 1), (20 * a_run, 10), (10**15, 2**13 // 120)):
        monkeypatch.setattr(stacked_runs, "available_memory", lambda device, n=available: n)
        assert runs_that_fit(model, long) == expected
    assert bytes_a_token(model, 60) > bytes_a_token(model, 6) > 4 * (model.cfg.d_vocab + model.cfg.d_model)
    assert bytes_a_token(hooked("llama4"), 6) > bytes_a_token(hooked("llama4", num_local_experts=2), 6)


# What may be given


def test_prompts_as_text_or_tokens_and_one_clean_prompt_for_many(with_outputs: Hooked) -> None:
    model = with_outputs("olmoe")
    text = [prompt(N_POS - 1, seed=seed) for seed in (3, 4)]
    cache = cached(model, prompt(N_POS - 1, seed=5))
    assert cache["router_logits", 0].shape[0] == 1
    both = patch_router(model, cache, text, metric)
    assert torch.equal(patch_router(model, cache, model.to_tokens(text), metric), both)

    def of_one(logits: Tensor) -> Tensor:
        return logits.logsumexp(-1).sum()

    for sweep in (patch_router, patch_expert_outputs):
        each = [sweep(model, cache, one, of_one) for one in (text[0], model.to_tokens(text[1])[0])]
        torch.testing.assert_close(sum(each), sweep(model, cache, text, of_one), rtol=1e-5, atol=0)
    cache.remove_batch_dim()
    assert torch.equal(patch_router(model, cache, text, metric), both)
    assert patch_expert_outputs(model, cache, text[0], of_one).shape == (3, 6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_padding_is_masked(with_outputs: Hooked, dtype: torch.dtype) -> None:
    """A row with two columns of padding before it gives what it gives alone."""
    model = with_outputs("olmoe")
    padded, mask = CORRUPTED.clone(), torch.ones(BATCH, N_POS, dtype=dtype)
    padded[1, :2], mask[1, :2] = 0, 0

    def second_row(logits: Tensor) -> Tensor:
        return logits[-1, -4:].square().mean()

    _, cache = model.run_with_cache(padded, attention_mask=mask.long())
    _, alone = model.run_with_cache(CLEAN[1:, 2:])
    for name in list(alone.keys()):
        if hook_names.parse(name):
            cache.cache_dict[name][1, 2:] = alone[name][0]
    for sweep in (patch_router, lambda *args, **kwargs: patch_expert_outputs(*args, by="pos", **kwargs)):
        together = sweep(model, cache, padded, second_row, attention_mask=mask)
        torch.testing.assert_close(
            together[:, 2:], sweep(model, alone, CORRUPTED[1:, 2:], second_row), rtol=1e-4, atol=0
        )


def test_a_number_is_a_number(hooked: Hooked) -> None:
    model = hooked("olmoe")
    cache = cached(model)
    expected = patch_router(model, cache, CORRUPTED, metric)
    for form in (float, lambda n: n.reshape(1, 1), lambda n: n.double(), lambda n: n.detach().numpy()):
        found = patch_router(model, cache, CORRUPTED, lambda logits, form=form: form(metric(logits)))
        assert torch.equal(found, expected)
    right = patch_router(model, cache, CORRUPTED, lambda logits: bool(metric(logits) > expected.mean()))
    assert torch.equal(right, (expected > expected.mean()).float())
    low = patch_router(model, cache, CORRUPTED, lambda logits: -torch.inf)
    assert torch.isinf(low).all()


def test_the_metric_sees_the_logits_without_gradients_and_cannot_spoil_others(hooked: Hooked) -> None:
    model = hooked("olmoe")
    cache = cached(model)
    expected = patch_router(model, cache, CORRUPTED, metric)

    def spoils(logits: Tensor) -> Tensor:
        assert not logits.requires_grad
        value = metric(logits)
        logits.zero_()
        return value

    assert torch.equal(patch_router(model, cache, CORRUPTED, spoils), expected)
    with torch.enable_grad():
        assert torch.equal(patch_router(model, cache, CORRUPTED, spoils), expected)
        assert torch.is_grad_enabled()


def test_hooks_on_the_model_act_in_patched_runs(hooked: Hooked) -> None:
    model = hooked("olmoe")
    cache = cached(model)
    plain = patch_router(model, cache, CORRUPTED, metric)
    with model.hooks(zero_ablate({0: [1, 4]})):
        found = patch_router(model, cache, CORRUPTED, metric, batch_size=1)
        torch.testing.assert_close(found, by_transformer_lens(model, cache, "router_logits"), **TOLERANCE)
        torch.testing.assert_close(patch_router(model, cache, CORRUPTED, metric), found, **TOLERANCE)
    assert not torch.allclose(found, plain)


@pytest.mark.parametrize("recipe", ["olmoe", "deepseek_v3", "ernie4_5_moe", "deepseek_v2_grouped"])
def test_a_plan_does_not_hold_where_clean_logits_are_patched_in(hooked: Hooked, recipe: str) -> None:
    """As if the layer's plan left the patched position out."""
    model = hooked(recipe)
    cache = cached(model)
    plans = {n: SteeringPlan([(n, 3)], [(n, 1), (n, 2)]) for n in model.moe_layers}
    under = [hook for plan in plans.values() for hook in steer_hooks(plan)]
    expected = []
    for layer, pos in itertools.product(model.moe_layers, range(N_POS)):

        def put(logits: Tensor, hook: Any, pos: int = pos) -> Tensor:
            logits = logits.clone()
            logits[:, pos] = cache[hook.name][:, pos]
            return logits

        others = [column for column in range(N_POS) if column != pos]
        hooks = [hook for n in plans if n != layer for hook in steer_hooks(plans[n])]
        hooks += steer_hooks(plans[layer], positions=others)
        logits = model.run_with_hooks(CORRUPTED, fwd_hooks=[*hooks, (hook_names.router_logits(layer), put)])
        expected.append(metric(logits))
    found = patch_router(model, cache, CORRUPTED, metric, hooks=under)
    torch.testing.assert_close(found, torch.stack(expected).reshape(-1, N_POS), **TOLERANCE)
    with model.hooks(under):
        assert not torch.allclose(found, by_transformer_lens(model, cache, "router_logits"))


@core_family
def test_a_patch_acts_on_its_own_position_and_later_ones(hooked: Hooked, recipe: str) -> None:
    """And in the last layer, with no attention after it, on its own position only."""
    model = hooked(recipe)
    cache = cached(model)

    def third(logits: Tensor) -> Tensor:
        return logits[0, 2].square().mean()

    plain = third(model(CORRUPTED))
    for found in (
        patch_router(model, cache, CORRUPTED, third, batch_size=1),
        patch_router(model, cache, CORRUPTED, third, point="topk_weights", batch_size=1),
    ):
        acts = (found - plain).abs() > 1e-6  # a product's rounding depends on what runs beside it
        assert not acts[:, 3:].any()
        assert acts[:-1, :3].all()
        assert acts[-1].tolist() == [False, False, True, False, False, False]


# The model is left as it was found


@pytest.mark.parametrize("on", [False, True])
def test_nothing_is_left_behind(on: bool) -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"))
    model.set_use_expert_out(True)
    cache = cached(model)
    model.set_use_expert_out(on)
    before, names, n_cached = (
        hook_census(model),
        set(model.hook_dict),
        {k: v.clone() for k, v in cache.items()},
    )

    def fails(logits: Tensor) -> Tensor:
        raise ZeroDivisionError("the user's own")

    for sweep in (patch_router, patch_expert_outputs):
        sweep(model, cache, CORRUPTED, metric)
        with pytest.raises(ZeroDivisionError, match="the user's own"):
            sweep(model, cache, CORRUPTED, fails)
        assert hook_census(model) == before
        assert set(model.hook_dict) == names
        assert model.use_expert_out is on
    assert all(torch.equal(cache[name], value) for name, value in n_cached.items())


# What is refused


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (lambda logits: logits[:, -1, 3], r"one real number; it gave a tensor of shape \(2,\)"),
        (lambda logits: None, "it gave None"),
        (lambda logits: "high", "it gave 'high'"),
        (lambda logits: torch.empty(0), r"a tensor of shape \(0,\)"),
        (lambda logits: torch.tensor(1j), "one real number"),
        (lambda logits: {"a": 1.0}, "one real number"),
        (3.0, "metric must be a function"),
    ],
)
def test_a_metric_that_gives_no_number_is_refused(with_outputs: Hooked, value: Any, says: str) -> None:
    model = with_outputs("olmoe")
    for sweep in (patch_router, patch_expert_outputs):
        with pytest.raises(DataError, match=says):
            sweep(model, cached(model), CORRUPTED, value)


def test_nan_is_refused_with_its_place(with_outputs: Hooked) -> None:
    model = with_outputs("qwen2_moe")
    cache = cached(model)
    expected = patch_router(model, cache, CORRUPTED, metric, batch_size=1)
    place = expected[1:].argmax()  # in the second or third MoE layer, 2 or 3
    highest, layer, pos = expected[1:].max(), model.moe_layers[1 + int(place) // N_POS], int(place) % N_POS

    def nan_there(logits: Tensor) -> float:
        return torch.nan if abs(metric(logits) - highest) < 1e-6 else 0.0

    with pytest.raises(DataError, match=f"at layer {layer}, position {pos}. Look for"):
        patch_router(model, cache, CORRUPTED, nan_there, batch_size=1)
    with pytest.raises(DataError, match="NaN on the corrupted run, unpatched"):
        patch_expert_outputs(model, cache, CORRUPTED, lambda logits: torch.nan)
    plain = float(metric(model(CORRUPTED)))
    with pytest.raises(DataError, match="NaN on the corrupted run, with the patch at layer 0, expert"):
        patch_expert_outputs(
            model, cache, CORRUPTED, lambda z: 0.0 if abs(metric(z) - plain) < 1e-6 else torch.nan
        )


def test_other_caches_are_refused(with_outputs: Hooked) -> None:
    model = with_outputs("olmoe")
    cache = cached(model)

    def refused(cache: Any, says: str, sweep: Any = patch_router, corrupted: Any = CORRUPTED) -> None:
        with pytest.raises(DataError, match=says):
            sweep(model, cache, corrupted, metric)

    for nothing in (None, {}, {"hook_embed": torch.zeros(2)}, [1], CLEAN):
        refused(nothing, "holds no routing")
    model.set_use_expert_out(False)
    _, without = model.run_with_cache(CLEAN)
    refused(
        without,
        r"lacks hook_expert_out of layer 0; call model.set_use_expert_out\(True\) before",
        patch_expert_outputs,
    )
    for name in ("blocks.1.mlp.hook_router_logits", "blocks.1.hook_router_logits"):
        without.cache_dict.pop(name, None)
    refused(without, "lacks hook_router_logits of layer 1; let the names_filter")
    for other in ("mixtral", "olmoe_norm_gqa", "qwen2_moe"):
        refused(cached(with_outputs(other)), "another model|lacks")
    deeper = cached(with_outputs("olmoe", num_hidden_layers=4))
    refused(deeper, r"routing of layers \[3\].*another model's")
    refused(cached(with_outputs("olmoe", num_experts=7)), "this model runs 3 of 6 experts")
    refused(cached(with_outputs("olmoe", num_experts_per_tok=2)), "another model", patch_expert_outputs)
    wider = cached(with_outputs("olmoe", hidden_size=64))
    refused(wider, "expert outputs have shape", patch_expert_outputs)
    refused(cache, r"corrupted tokens are \[batch pos\] = \[2, 5\]", corrupted=tokens(2, 5))
    refused(cache, r"\[3, 6\]", patch_expert_outputs, corrupted=tokens(3, 6))


def test_other_arguments_are_refused(hooked: Hooked) -> None:
    model = hooked("olmoe")
    cache = cached(model)

    def refused(says: str, corrupted: Any = CORRUPTED, sweep: Any = patch_router, **options: Any) -> None:
        with pytest.raises(DataError, match=says):
            sweep(model, cache, corrupted, metric, **options)

    refused("point must be one of 'router_logits', .*; got 'resid'", point="resid")
    refused("by must be 'expert' or 'pos'; got 'layer'", sweep=patch_expert_outputs, by="layer")
    for size in (0, -1, True):
        refused("batch_size must be a whole number from 1 on", batch_size=size)
    refused(r"have \[4, 6\] tokens; patching by position needs equal lengths", [prompt(3), prompt(5)])
    refused("Prompt 0 must be a non-empty sequence", CORRUPTED.float())
    refused("outside the vocabulary", CORRUPTED + 100)
    refused("list of prompts is empty", [])
    refused("must be strings, chats", 3)
    for mask in (torch.ones(2, 5), 3 * torch.ones(2, 6), [1, 1]):
        refused("attention_mask must hold", attention_mask=mask)
    refused("attention_mask must be a tensor", attention_mask="all")
    plain: Any = plain_bridge(tiny_model("olmoe"))
    with pytest.raises((MoELensError, TypeCheckError), match=r"or RoutedModel is needed|patch_router"):
        patch_router(plain, cache, CORRUPTED, metric)


def test_training_mode_is_refused() -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"))
    model.set_use_expert_out(True)
    cache = cached(model)
    model.train()
    for sweep in (patch_router, patch_expert_outputs):
        with pytest.raises(HookError, match="training mode"):
            sweep(model, cache, CORRUPTED, metric)


def test_cells_are_grouped_by_layer() -> None:
    found = stacked_runs.by_layer([Cell(0, 4), Cell(3, 1), Cell(0, 2), Cell(3, 0)])
    assert {layer: [each.tolist() for each in places] for layer, places in found.items()} == {
        0: [[0, 2], [4, 2]],
        3: [[1, 3], [1, 0]],
    }


@pytest.mark.parametrize("patch", [patch_router, patch_expert_outputs])
def test_hooks_are_the_hooks_around_it(hooked: Hooked, patch: Callable[..., Tensor]) -> None:
    model = hooked("olmoe")
    model.set_use_expert_out(True)
    try:
        cache = cached(model)
        hooks = zero_ablate({0: [1, 2], 2: [3]})
        found = patch(model, cache, CORRUPTED, metric, hooks=hooks, progress=False)
        with model.hooks(hooks):
            around = patch(model, cache, CORRUPTED, metric, progress=False)
        plain = patch(model, cache, CORRUPTED, metric, progress=False)
    finally:
        model.set_use_expert_out(False)
    assert torch.equal(found, around)
    assert not torch.equal(found, plain)
