"""RoutingStats of a cache, and their sums, against loops over Hugging Face's own router outputs."""

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lens.errors import DataError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.routed_model import RoutedModel
from moe_lens.shape import MoEShape
from moe_lens.statistics.collection import collect_routing
from moe_lens.statistics.routing_stats import RoutingStats, is_routing_point
from tests.families import core_family, every_dtype
from tests.statistics.sums import Hooked, add_up, agrees, one_by_one, random_stats, run_hf, same
from tests.tiny_models import (
    MOE_LAYERS,
    N_EXPERTS,
    TOP_K,
    plain_bridge,
    prompt,
    tiny_model,
    tokenizer,
    tokens,
)


@core_family
@every_dtype
def test_sums_equal_a_loop_over_hugging_faces_own_router_outputs(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    batch = tokens(3, 6)
    stats = RoutingStats.from_cache(hooked(recipe, dtype).run_with_cache(batch)[1])
    hf_model = tiny_model(recipe, dtype)
    # In bfloat16 the bridge's attention rounds otherwise than HF's, so the same attention must run.
    forward = hf_model if dtype == torch.float32 else plain_bridge(hf_model)
    assert agrees(stats, add_up(run_hf(hf_model, batch, forward), recipe, [True] * 18), 18)


@core_family
def test_the_shape_is_the_models_and_leaves_dense_layers_out(hooked: Hooked, recipe: str) -> None:
    shape = RoutingStats.from_cache(hooked(recipe).run_with_cache(tokens())[1]).shape
    assert (shape.layers, shape.n_experts, shape.top_k) == (
        MOE_LAYERS[recipe],
        N_EXPERTS[recipe],
        TOP_K[recipe],
    )
    assert shape == hooked(recipe).moe_shape


@core_family
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_a_mask_chooses_the_positions(hooked: Hooked, recipe: str, dtype: torch.dtype) -> None:
    batch, mask = tokens(3, 6), torch.rand(3, 6, generator=torch.Generator().manual_seed(3)) < 0.5
    stats = RoutingStats.from_cache(hooked(recipe).run_with_cache(batch)[1], mask.to(dtype))
    keep = mask.flatten().tolist()
    assert agrees(stats, add_up(run_hf(tiny_model(recipe), batch), recipe, keep), sum(keep))


@core_family
def test_padding_is_left_out_by_itself(hooked: Hooked, recipe: str) -> None:
    model, prompts = hooked(recipe), [prompt(2), prompt(9, 1), prompt(5, 2)]
    stats = RoutingStats.from_cache(model.run_with_cache(prompts)[1])
    assert stats.n_tokens == sum(model.to_tokens(text).numel() for text in prompts)
    assert same(stats, one_by_one(model, prompts))


def test_an_attention_mask_given_to_the_run_is_used(hooked: Hooked) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    batch = tokens(2, 5)
    _, cache = hooked("olmoe").run_with_cache(batch, attention_mask=mask)
    assert same(RoutingStats.from_cache(cache), one_by_one(hooked("olmoe"), [batch[:1, 2:], batch[1:]]))


def test_a_mask_overrules_the_cache(hooked: Hooked) -> None:
    _, cache = hooked("olmoe").run_with_cache([prompt(2), prompt(5)])
    assert RoutingStats.from_cache(cache, torch.ones(2, 6, dtype=torch.bool)).n_tokens == 12


@core_family
def test_a_cache_without_batch_dimension_counts_the_same(hooked: Hooked, recipe: str) -> None:
    model, batch = hooked(recipe), tokens(1, 6)
    _, cache = model.run_with_cache(batch, remove_batch_dim=True)
    assert same(RoutingStats.from_cache(cache), RoutingStats.from_cache(model.run_with_cache(batch)[1]))
    last = torch.tensor([False] * 5 + [True])
    sums = add_up(run_hf(tiny_model(recipe), batch), recipe, last.tolist())
    assert agrees(RoutingStats.from_cache(cache, last), sums, 1)


def test_a_plain_dictionary_counts_the_same_under_an_unknown_name(hooked: Hooked) -> None:
    _, cache = hooked("olmoe").run_with_cache(tokens())
    whole, plain = RoutingStats.from_cache(cache), RoutingStats.from_cache(dict(cache.cache_dict))
    assert plain.shape == dataclasses.replace(whole.shape, model="unknown")
    assert same(dataclasses.replace(plain, shape=whole.shape), whole, exact=True)


@core_family
def test_rates_and_means_are_shares_of_tokens(hooked: Hooked, recipe: str) -> None:
    stats = RoutingStats.from_cache(hooked(recipe).run_with_cache(tokens(3, 6))[1])
    ones = torch.ones(len(stats.shape.layers), dtype=torch.float64)
    torch.testing.assert_close(stats.rates.sum(-1), stats.shape.top_k * ones)
    assert stats.rates.min() >= 0
    assert stats.rates.max() <= 1
    torch.testing.assert_close(stats.mean_probability.sum(-1), ones, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.mean_weight, stats.weight_sums / 18)


def test_the_mean_weight_when_chosen_is_nan_for_an_expert_never_chosen() -> None:
    stats = random_stats(0, n_tokens=1)
    mean = stats.mean_weight_when_chosen
    assert torch.equal(mean.isnan(), stats.counts == 0)
    torch.testing.assert_close(mean.nan_to_num(0.0), stats.weight_sums)


@pytest.mark.parametrize("point", ["router_logits", "topk_indices", "topk_weights"])
def test_a_missing_tensor_is_named(hooked: Hooked, point: str) -> None:
    _, cache = hooked("olmoe").run_with_cache(tokens())
    lacking = {name: value for name, value in cache.items() if not name.endswith(f"1.mlp.hook_{point}")}
    lacking = {name: value for name, value in lacking.items() if name != f"blocks.1.hook_{point}"}
    with pytest.raises(DataError, match=rf"hook_{point} of layer 1"):
        RoutingStats.from_cache(lacking)


def test_a_cache_without_routing_is_refused() -> None:
    with pytest.raises(DataError, match="no routing"):
        RoutingStats.from_cache(plain_bridge(tiny_model()).run_with_cache(tokens())[1])


@pytest.mark.parametrize(
    "mask", [torch.zeros(2, 7, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool), torch.ones(7).bool()]
)
def test_a_mask_that_selects_nothing_or_has_another_shape_is_refused(hooked: Hooked, mask: Tensor) -> None:
    _, cache = hooked("olmoe").run_with_cache(tokens(2, 7))
    with pytest.raises(DataError, match="mask"):
        RoutingStats.from_cache(cache, mask)


def test_nan_logits_are_refused(hooked: Hooked) -> None:
    _, cache = hooked("olmoe").run_with_cache(tokens(), names_filter=is_routing_point)
    broken = {name: value.clone() for name, value in cache.items()}
    broken["blocks.0.mlp.hook_router_logits"][0, 0, 0] = torch.nan
    broken["blocks.0.hook_router_logits"] = broken["blocks.0.mlp.hook_router_logits"]
    with pytest.raises(DataError, match="NaN"):
        RoutingStats.from_cache(broken)


def test_an_expert_forced_twice_on_one_token_is_no_rate_above_one(hooked: Hooked) -> None:
    """Hooks on the chosen experts may repeat one; its rate stays a share of tokens, or it is refused."""
    name = "blocks.0.mlp.hook_topk_indices"
    model = hooked("olmoe")
    with model.hooks([(name, lambda indices, hook: torch.zeros_like(indices))]):
        _, cache = model.run_with_cache(tokens())
    try:
        stats = RoutingStats.from_cache(cache)
    except DataError:
        return
    assert stats.rates.max() <= 1


@settings(max_examples=30, deadline=None)
@given(seeds=st.tuples(*[st.integers(0, 10**6)] * 3), sizes=st.tuples(*[st.integers(1, 9)] * 3))
def test_addition_is_exact_commutative_and_associative(seeds: Any, sizes: Any) -> None:
    a, b, c = (random_stats(seed, n_tokens=n) for seed, n in zip(seeds, sizes, strict=True))
    assert same(a + b, b + a, exact=True)
    assert same((a + b) + c, a + (b + c))
    assert ((a + b) + c).counts.tolist() == (a.counts + b.counts + c.counts).tolist()
    assert torch.equal((a + b).probability_sums, a.probability_sums + b.probability_sums)
    assert (a + b).n_tokens == sizes[0] + sizes[1]


def test_adding_leaves_the_parts_alone() -> None:
    a, b = random_stats(0), random_stats(1)
    before = a.counts.clone()
    _ = a + b
    assert torch.equal(a.counts, before)


OTHER_SHAPES = {
    "model": MoEShape("other", (0, 2), 4, 2),
    "layers": MoEShape("m", (0, 1), 4, 2),
    "n_experts": MoEShape("m", (0, 2), 5, 2),
    "top_k": MoEShape("m", (0, 2), 4, 3),
}


@pytest.mark.parametrize("differs", OTHER_SHAPES)
def test_other_models_are_not_added(differs: str) -> None:
    with pytest.raises(DataError, match=differs):
        _ = random_stats(0) + random_stats(0, OTHER_SHAPES[differs])


def test_sum_adds_statistics(hooked: Hooked) -> None:
    model = hooked("olmoe")
    parts = [collect_routing(model, tokens(2, length), progress=False) for length in (3, 5)]
    assert torch.equal(sum(parts[1:], parts[0]).counts, sum(parts).counts)  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", [[[1, 1, 0]], [[True, True, False]], np.array([[1, 1, 0]])])
def test_a_mask_may_be_a_list_or_an_array(hooked: Hooked, mask: Any) -> None:
    _, cache = hooked("olmoe").run_with_cache(tokens(1, 3))
    expected = RoutingStats.from_cache(cache, torch.tensor([[True, True, False]]))
    assert torch.equal(RoutingStats.from_cache(cache, mask).counts, expected.counts)


@pytest.mark.parametrize("mask", [[[0.5, 1, 1]], [[float("nan"), 1, 1]], [[-1, 1, 1]], [["a", "b", "c"]]])
def test_a_mask_holds_only_true_and_false(hooked: Hooked, mask: Any) -> None:
    _, cache = hooked("olmoe").run_with_cache(tokens(1, 3))
    with pytest.raises(DataError, match="mask"):
        RoutingStats.from_cache(cache, mask)


def test_what_is_no_cache_is_refused(hooked: Hooked) -> None:
    for wrong in (None, hooked("olmoe").run_with_cache(tokens(1, 3))):
        with pytest.raises(DataError, match="second of the two"):
            RoutingStats.from_cache(wrong)


@pytest.mark.parametrize("wrapper", [HookedMoE.from_hf, RoutedModel])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["<pad>", "<eos>", "<bos>"])
def test_a_run_on_padded_tokens_without_a_mask_is_refused(wrapper: Any, side: str, pad: str) -> None:
    """As `collect_routing` leaves padding out, or refuses where what is padding cannot be known."""
    own = tokenizer()
    own.pad_token = pad
    model, texts = wrapper(tiny_model("olmoe"), own), [prompt(2), prompt(5, 1)]
    encoding = own(texts, padding=True, padding_side=side, return_tensors="pt")
    padded, mask = encoding["input_ids"], encoding["attention_mask"]
    assert own.pad_token_id in padded[0, [0, -1]]
    expected = collect_routing(model, texts, progress=False).counts
    given = [padded, padded.tolist()] if wrapper is RoutedModel else [padded]
    for tokens_ in given:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model says that it reads padding as text
            _, cache = model.run_with_cache(tokens_)
        with pytest.raises(DataError, match=r"attention_mask=; or say with mask= which positions count"):
            RoutingStats.from_cache(cache)
        assert RoutingStats.from_cache(cache, mask).n_tokens == 9
        assert RoutingStats.from_cache(cache, attention_mask=mask).n_tokens == 9
    for cache in (model.run_with_cache(padded, attention_mask=mask)[1], model.run_with_cache(texts)[1]):
        assert torch.equal(RoutingStats.from_cache(cache).counts, expected)


@pytest.mark.parametrize("pad", ["<eos>", "<bos>", "<pad>", None])
def test_rows_that_differ_in_no_padding_are_counted_whole(pad: str | None) -> None:
    """Rows that all begin with a BOS which pads, too, and padding tokens within a row."""
    own = tokenizer()
    own.pad_token = pad
    model = RoutedModel(tiny_model("olmoe"), own)
    rows = model.to_tokens([prompt(4), prompt(4, 1)])
    if own.pad_token_id is not None:
        rows[0, 2] = own.pad_token_id
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, cache = model.run_with_cache(rows)
        stats = RoutingStats.from_cache(cache)
    assert stats.n_tokens == rows.numel()
    assert torch.equal(stats.counts, collect_routing(model, rows, progress=False).counts)


def test_a_cache_that_cannot_tell_padding_warns(hooked: Hooked) -> None:
    _, several = hooked("olmoe").run_with_cache(tokens(2, 3), return_cache_object=False)
    with pytest.warns(UserWarning, match="padding"):
        RoutingStats.from_cache(several)
    _, one = hooked("olmoe").run_with_cache(tokens(1, 3), return_cache_object=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RoutingStats.from_cache(one)
