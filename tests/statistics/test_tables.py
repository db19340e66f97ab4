"""The tables beside the sums (by prompt, position, token, pair of experts) against loops over single runs."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lens.errors import DataError, HookError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routers.plain import SoftmaxTopK
from moe_lens.statistics.collection import collect_routing, iterate_routing
from moe_lens.statistics.routing_stats import RoutingStats
from tests.statistics.sums import EVERYTHING, Hooked, random_cache, random_tables, same
from tests.tiny_models import (
    TOP_K,
    prompt,
    tokens,
)

FAMILIES_WITH_GROUPS = ("olmoe", "mixtral", "qwen2_moe", "deepseek_v3")
LENGTHS = (4, 7, 1, 6)


def sequences() -> list[Tensor]:
    return [tokens(1, length, seed)[0] % 9 + 4 for seed, length in enumerate(LENGTHS)]


def routes(model: HookedMoE, sequence: Tensor) -> dict[int, tuple[list[list[float]], list[list[int]]]]:
    """Layer -> (logits, chosen experts) of each token of one prompt, run alone."""
    _, cache = model.run_with_cache(sequence[None])
    return {
        layer: (cache["router_logits", layer][0].tolist(), cache["topk_indices", layer][0].tolist())
        for layer in model.moe_layers
    }


def entropy(logits: list[float]) -> float:
    total = sum(math.exp(z) for z in logits)
    return -sum(math.exp(z) / total * math.log(math.exp(z) / total) for z in logits)


@pytest.mark.parametrize("recipe", FAMILIES_WITH_GROUPS)
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_every_table_equals_a_loop(hooked: Hooked, recipe: str, batch_size: int) -> None:
    model = hooked(recipe)
    span = lambda t: (t != 6) | (torch.arange(len(t)) == 0)  # noqa: E731 (some positions between are left out)
    stats = collect_routing(model, sequences(), batch_size=batch_size, span=span, **EVERYTHING)
    layers, n_experts, k = model.moe_layers, model.n_experts, model.top_k
    size = (len(layers), n_experts)
    together, gaps = np.zeros((*size, n_experts)), np.zeros((size[0] - 1, n_experts, n_experts))
    overlaps, pairs = np.zeros(len(layers)), 0
    by_prompt, by_position = np.zeros((len(LENGTHS), *size)), np.zeros((max(LENGTHS), *size))
    by_token, entropies = np.zeros((*size, model.cfg.d_vocab)), np.zeros(len(layers))
    for prompt_number, sequence in enumerate(sequences()):
        kept = [position for position in range(len(sequence)) if bool(span(sequence)[position])]
        route = routes(model, sequence)
        pairs += sum(position + 1 in kept for position in kept)
        for row, layer in enumerate(layers):
            logits, chosen = route[layer]
            for position in kept:
                entropies[row] += entropy(logits[position])
                for i in chosen[position]:
                    by_prompt[prompt_number, row, i] += 1
                    by_position[position, row, i] += 1
                    by_token[row, i, int(sequence[position])] += 1
                    for j in chosen[position]:
                        together[row, i, j] += 1
                    if row + 1 < len(layers):
                        for j in route[layers[row + 1]][1][position]:
                            gaps[row, i, j] += 1
                if position + 1 in kept:
                    overlaps[row] += len(set(chosen[position]) & set(chosen[position + 1]))
    assert stats.coactivation.counts.tolist() == together.tolist()
    assert stats.transitions.counts.tolist() == gaps.tolist()
    assert stats.adjacent_overlap.n_adjacent == pairs < stats.n_tokens - len(LENGTHS)
    np.testing.assert_allclose(stats.adjacent_overlap.mean, overlaps / (k * pairs))
    np.testing.assert_allclose(stats.mean_entropy, entropies / stats.n_tokens, rtol=1e-5)
    assert stats.per_prompt is not None
    assert stats.by_position is not None
    assert stats.vocabulary is not None
    assert stats.per_prompt.counts.tolist() == by_prompt.tolist()
    assert stats.per_prompt.n_tokens.tolist() == [int(span(sequence).sum()) for sequence in sequences()]
    assert stats.by_position.counts.tolist() == by_position.tolist()
    torch.testing.assert_close(
        stats.per_prompt.probability_sums.double().sum(0), stats.probability_sums, rtol=1e-6, atol=1e-6
    )
    for row in range(len(layers)):
        assert stats.vocabulary.dense(row, n_experts).tolist() == by_token[row].tolist()
    assert len(stats.vocabulary.totals) == model.cfg.d_vocab


@pytest.mark.parametrize("recipe", ["olmoe", "mixtral", "qwen2_moe"])
def test_the_margin_is_the_gap_after_the_kth_logit(hooked: Hooked, recipe: str) -> None:
    model, k = hooked(recipe), TOP_K[recipe]
    stats = collect_routing(model, sequences(), batch_size=2, progress=False)
    expected = np.zeros(len(model.moe_layers))
    for sequence in sequences():
        for row, (logits, _) in enumerate(routes(model, sequence).values()):
            for token in logits:
                ordered = sorted(token, reverse=True)
                expected[row] += ordered[k - 1] - ordered[k]
    np.testing.assert_allclose(stats.mean_margin, expected / stats.n_tokens, rtol=1e-5, atol=1e-6)


def test_the_margin_under_a_bias_and_groups_is_the_rules_own(hooked: Hooked) -> None:
    model = hooked("deepseek_v3")
    stats = collect_routing(model, sequences(), batch_size=3, progress=False)
    for row, layer in enumerate(model.moe_layers):
        margins = [
            float(model.routing_rule(layer).routing_margin(torch.tensor(token)))
            for sequence in sequences()
            for token in routes(model, sequence)[layer][0]
        ]
        assert float(stats.mean_margin[row]) == pytest.approx(np.mean(margins), rel=1e-5)


def test_a_layer_that_routes_by_a_table_has_an_infinite_margin(hooked: Hooked, tmp_path: Path) -> None:
    stats = collect_routing(hooked("deepseek_v4_hash"), tokens(3, 4), batch_size=2, progress=False)
    assert stats.mean_margin.isinf().tolist() == [True, False, False]
    stats.save(tmp_path / "s")
    assert torch.equal(RoutingStats.load(tmp_path / "s").mean_margin, stats.mean_margin)


def test_rules_that_cannot_tell_a_margin_leave_it_nan() -> None:
    class Unknown(SoftmaxTopK):
        def routing_margin(self, logits: Tensor) -> Tensor:
            raise HookError("needs more than logits")

    rules = {
        0: Unknown(n_experts=4, top_k=2, renormalize=False),
        2: SoftmaxTopK(n_experts=4, top_k=2, renormalize=False),
    }
    stats = RoutingStats.from_cache(random_cache(0), rules=rules)
    assert stats.mean_margin.isnan().tolist() == [True, False]
    with pytest.raises(DataError, match="lacks layer 2"):
        RoutingStats.from_cache(random_cache(0), rules={0: rules[0]})
    with pytest.raises(DataError, match="rules"):
        _ = RoutingStats.from_cache(random_cache(0)).mean_margin


def test_a_caches_model_gives_the_rules(hooked: Hooked) -> None:
    model = hooked("olmoe")
    from_cache = RoutingStats.from_cache(model.run_with_cache(tokens())[1])
    streamed = collect_routing(model, tokens(), progress=False)
    torch.testing.assert_close(from_cache.mean_margin, streamed.mean_margin)
    assert (from_cache + streamed).n_tokens == 28


@pytest.mark.parametrize("recipe", FAMILIES_WITH_GROUPS)
@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=6), batch_size=st.integers(1, 7))
def test_streaming_in_any_batch_size_is_one_batch(
    hooked: Hooked, recipe: str, lengths: list[int], batch_size: int
) -> None:
    """Counts exactly; the sums as far as padding leaves the model's own float32 numbers alone."""
    prompts = [tokens(1, length, seed)[0] for seed, length in enumerate(lengths)]
    whole = collect_routing(hooked(recipe), prompts, batch_size=len(prompts), **EVERYTHING).tensors()
    streamed = collect_routing(hooked(recipe), prompts, batch_size=batch_size, **EVERYTHING).tensors()
    assert streamed.keys() == whole.keys()
    for name, tensor in streamed.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(tensor, whole[name]), name


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(1, 7), max_size=4, unique=True))
def test_parts_of_one_run_add_up_to_the_whole(seed: int, cuts: list[int]) -> None:
    whole, ids = random_cache(seed, (8, 5)), torch.randint(9, (8, 5))
    rules = {layer: SoftmaxTopK(n_experts=4, top_k=2, renormalize=False) for layer in (0, 2)}
    mask = torch.rand(8, 5) < 0.8
    mask[:, 0] = True

    def of(rows: slice) -> RoutingStats:
        return RoutingStats.from_cache(
            {name: value[rows] for name, value in whole.items()}, mask[rows], tokens=ids[rows], rules=rules,
            attention_mask=torch.ones_like(mask[rows]), per_prompt=True, positions=True, vocabulary=True,
        )  # fmt: skip

    bounds = [0, *sorted(cuts), 8]
    parts = [of(slice(start, stop)) for start, stop in itertools.pairwise(bounds)]
    added, expected = sum(parts[1:], parts[0]).tensors(), of(slice(0, 8)).tensors()
    for name, tensor in added.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-10, atol=0)
        else:
            assert torch.equal(tensor, expected[name]), name


def test_batches_added_in_order_are_the_whole_bit_for_bit(hooked: Hooked, tmp_path: Path) -> None:
    model, prompts = hooked("qwen2_moe"), [tokens(1, 2 + n % 5, n)[0] for n in range(13)]
    whole = collect_routing(model, prompts, batch_size=2, **EVERYTHING).tensors()
    total = None
    for part in iterate_routing(model, prompts, batch_size=2, **EVERYTHING):
        total = part if total is None else total + part
        total.save(tmp_path / "partial")  # an interrupted run continues from the file
        total = RoutingStats.load(tmp_path / "partial")
    assert total is not None
    in_order = torch.tensor([len(prompt) for prompt in prompts]).argsort(stable=True)  # shortest first
    assert total.tensors().keys() == whole.keys()
    for name, tensor in total.tensors().items():
        if name.startswith("per_prompt."):
            whole[name] = whole[name][in_order]
        assert torch.equal(tensor, whole[name]), name
        assert tensor.dtype == whole[name].dtype


@settings(max_examples=20, deadline=None)
@given(seeds=st.tuples(*[st.integers(0, 10**6)] * 3), sizes=st.tuples(*[st.integers(1, 6)] * 3))
def test_tables_add_associatively_and_exactly(seeds: Any, sizes: Any) -> None:
    a, b, c = (random_tables(seed, n) for seed, n in zip(seeds, sizes, strict=True))
    left, right = ((a + b) + c).tensors(), (a + (b + c)).tensors()
    for name, tensor in left.items():
        if name in ("probability_sums", "weight_sums", "entropy_sums"):
            torch.testing.assert_close(tensor, right[name])
        else:
            assert torch.equal(tensor, right[name]), name
    swapped = (b + a).tensors()
    for name in ("co_routing.coactivation", "by_position.counts", "vocabulary.counts", "vocabulary.totals"):
        assert torch.equal((a + b).tensors()[name], swapped[name])


@pytest.mark.parametrize("name", ["co_routing", "per_prompt", "by_position", "vocabulary", "entropy_sums"])
def test_a_table_that_only_one_has_is_not_added(name: str) -> None:
    whole = random_tables(0)
    for first, second in ((whole, whole.without(name)), (whole.without(name), whole)):
        with pytest.raises(DataError, match=rf"without\('{name}'\)"):
            _ = first + second
    assert getattr(whole.without(name) + whole.without(name), name) is None


def test_a_summary_has_the_sums_only() -> None:
    summary = random_tables(0).summary()
    assert set(summary.tensors()) == {"counts", "probability_sums", "weight_sums"}
    assert same(summary, random_tables(0), exact=True)
    with pytest.raises(DataError, match="counts"):
        summary.without("counts")
    for name in ("coactivation", "transitions", "adjacent_overlap", "mean_entropy", "position_rates"):
        with pytest.raises(DataError, match="hold no"):
            getattr(summary, name)


def test_one_prompt_without_batch_dimension_has_the_same_tables(hooked: Hooked) -> None:
    model, batch = hooked("olmoe"), tokens(1, 6)
    _, flat = model.run_with_cache(batch, remove_batch_dim=True)
    _, whole = model.run_with_cache(batch)
    options: dict[str, Any] = {"per_prompt": True, "positions": True, "vocabulary": True}
    first = RoutingStats.from_cache(flat, tokens=batch[0], **options)
    second = RoutingStats.from_cache(whole, tokens=batch, **options)
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name
    assert first.adjacent_overlap.n_adjacent == 5


def test_positions_start_at_each_prompts_first_token(hooked: Hooked) -> None:
    model, texts = hooked("olmoe"), [prompt(2), prompt(5, 1)]
    _, cache = model.run_with_cache(texts)  # 3 and 6 tokens with BOS, padded on the left
    stats = RoutingStats.from_cache(cache, positions=True)
    assert stats.by_position is not None
    assert stats.by_position.n_tokens.tolist() == [2, 2, 2, 1, 1, 1]
    last = torch.zeros(2, 6).bool()
    last[:, -1] = True
    by_position = RoutingStats.from_cache(cache, last, positions=True).by_position
    assert by_position is not None
    assert by_position.n_tokens.tolist() == [0, 0, 1, 0, 0, 1]
    with pytest.raises(DataError, match="attention_mask"):
        RoutingStats.from_cache(random_cache(0, (2, 3)), torch.ones(2, 3), positions=True)


@pytest.mark.parametrize("wrong", [None, torch.ones(2, 3), torch.ones(3, 2, dtype=torch.int64), "text"])
def test_a_vocabulary_needs_the_tokens_of_the_run(wrong: Any) -> None:
    cache = random_cache(0, (2, 3))
    with pytest.raises(DataError, match="tokens"):
        RoutingStats.from_cache(cache, torch.ones(2, 3), tokens=wrong, vocabulary=True)


def test_an_expert_named_twice_on_one_token_is_refused() -> None:
    cache = random_cache(0, (1, 9))
    indices = cache["blocks.0.mlp.hook_topk_indices"]
    indices[0, 0] = indices[0, 0, 0]
    with pytest.raises(DataError, match="twice"):
        RoutingStats.from_cache(cache)


def test_a_single_token_has_no_neighbour() -> None:
    stats = RoutingStats.from_cache(random_cache(0, (1, 1)))
    assert stats.adjacent_overlap.n_adjacent == 0
    assert bool(stats.adjacent_overlap.mean.isnan().all())


def test_a_prompt_of_which_nothing_counts_keeps_its_row() -> None:
    stats = RoutingStats.from_cache(
        random_cache(0, (2, 3)), torch.tensor([[0, 0, 0], [1, 1, 0]]), per_prompt=True
    )
    assert stats.per_prompt is not None
    assert stats.per_prompt.n_tokens.tolist() == [0, 2]


@pytest.mark.parametrize("recipe", ["olmoe", "deepseek_v3"])
def test_top_experts_are_those_of_a_sort_by_hand(hooked: Hooked, recipe: str) -> None:
    stats = collect_routing(hooked(recipe), tokens(3, 6), progress=False)
    every = [
        (-stats.counts[row, expert].item(), layer, expert)
        for row, layer in enumerate(stats.shape.layers)
        for expert in range(stats.shape.n_experts)
    ]
    for layer in (None, *stats.shape.layers):
        expected = sorted(entry for entry in every if layer in (None, entry[1]))
        for n in (1, len(expected)):
            found = stats.top_experts(n, layer)
            assert list(zip(-found["count"], found["layer"], found["expert"], strict=True)) == expected[:n]
    for row in stats.to_dataframe().to_dict("records"):
        at = stats.shape.layers.index(row["layer"]), row["expert"]
        assert (row["rate"], row["mean_probability"], row["mean_weight"]) == (
            stats.rates[at], stats.mean_probability[at], stats.mean_weight[at]
        )  # fmt: skip


def test_top_experts_that_there_are_not(hooked: Hooked) -> None:
    stats = collect_routing(hooked("deepseek_v3"), tokens(1, 4), progress=False)
    with pytest.raises(DataError, match=r"Layer 0 has no counts here; those that have: \(1"):
        stats.top_experts(1, layer=0)  # a dense layer
    for n in (0, -1, stats.shape.n_experts + 1, True):
        with pytest.raises(DataError, match="n must be a whole number from 1 to"):
            stats.top_experts(n, layer=1)
