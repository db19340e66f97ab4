"""Views of the co-routing tables against loops over tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lens.errors import DataError
from moe_lens.statistics.co_routing import CoActivation, CoRouting, Transitions, adjacent_overlap, pair_counts


def routes(seed: int, n_tokens: int, n_experts: int, k: int, n_layers: int = 2) -> list[Tensor]:
    """Random experts of each layer, [token k]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n_tokens, n_experts, generator=generator).topk(k).indices for _ in range(n_layers)]


def counts_of(indices: list[Tensor], n_experts: int) -> Tensor:
    return torch.stack([torch.bincount(layer.flatten(), minlength=n_experts) for layer in indices])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n_tokens=st.integers(1, 20), k=st.integers(1, 3))
def test_views_equal_loops(seed: int, n_tokens: int, k: int) -> None:
    layers = routes(seed, n_tokens, 5, k)
    table = CoRouting.count(layers, torch.ones(1, n_tokens).bool(), 5)
    together = CoActivation(table.coactivation, n_tokens)
    steps = Transitions(table.transitions, counts_of(layers, 5), n_tokens)
    sets = [[set(token) for token in layer.tolist()] for layer in layers]
    for i in range(5):
        for j in range(5):
            a = [i in token for token in sets[0]]
            b = [j in token for token in sets[0]]
            c = [j in token for token in sets[1]]
            both, either = np.logical_and(a, b).sum(), np.logical_or(a, b).sum()
            assert int(together.counts[0, i, j]) == both
            agrees(together.jaccard[0, i, j], both, either)
            agrees(together.conditional[0, i, j], both, np.sum(a))
            agrees(together.lift[0, i, j], both * n_tokens, np.sum(a) * np.sum(b))
            agrees(steps.conditional[0, i, j], np.logical_and(a, c).sum(), np.sum(a))
            agrees(steps.lift[0, i, j], np.logical_and(a, c).sum() * n_tokens, np.sum(a) * np.sum(c))
    table.check(counts_of(layers, 5), n_tokens, k)


def agrees(value: Tensor, numerator: float, denominator: float) -> None:
    if denominator == 0:
        assert bool(value.isnan())
    else:
        assert float(value) == pytest.approx(numerator / denominator)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n_prompts=st.integers(1, 4), length=st.integers(1, 6))
def test_overlap_counts_neighbours_of_one_prompt_that_both_count(
    seed: int, n_prompts: int, length: int
) -> None:
    keep = torch.rand(n_prompts, length, generator=torch.Generator().manual_seed(seed)) < 0.7
    n_tokens = int(keep.sum())
    layers = routes(seed, n_tokens, 6, 2)
    table = CoRouting.count(layers, keep, 6)
    places = keep.nonzero().tolist()
    pairs, shared = 0, [0, 0]
    for one, (prompt, position) in enumerate(places):
        if [prompt, position + 1] in places:
            other = places.index([prompt, position + 1])
            pairs += 1
            for row, layer in enumerate(layers):
                shared[row] += len(set(layer[one].tolist()) & set(layer[other].tolist()))
    assert int(table.n_adjacent) == pairs
    assert table.overlaps.tolist() == shared


def test_independent_tokens_overlap_as_expected() -> None:
    """Expected overlap is a mean over random pairs of tokens, not something about neighbours."""
    n_tokens, n_experts, k = 20_000, 8, 2
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n_tokens, n_experts, generator=generator) + torch.arange(n_experts) / 4
    layers = [logits.topk(k).indices]
    table = CoRouting.count(layers, torch.ones(1, n_tokens).bool(), n_experts)
    found = adjacent_overlap(table, counts_of(layers, n_experts), n_tokens, k)
    assert float(found.mean) == pytest.approx(float(found.expected), abs=0.01)
    sticky = [
        torch.tensor(sorted(sorted(token) for token in layers[0].tolist()))
    ]  # the same tokens, like by like
    table = CoRouting.count(sticky, torch.ones(1, n_tokens).bool(), n_experts)
    found = adjacent_overlap(table, counts_of(sticky, n_experts), n_tokens, k)
    assert float(found.mean) > float(found.expected) + 0.2


def test_experts_that_know_nothing_of_each_other_have_the_stated_lift() -> None:
    n_tokens, n_experts, k = 50_000, 6, 3
    table = CoRouting.count(routes(0, n_tokens, n_experts, k), torch.ones(1, n_tokens).bool(), n_experts)
    lift = CoActivation(table.coactivation, n_tokens).lift[0]
    others = lift[~torch.eye(n_experts).bool()]
    assert float(others.mean()) == pytest.approx((k - 1) * n_experts / (k * (n_experts - 1)), abs=0.01)
    transitions = Transitions(table.transitions, table.coactivation.diagonal(dim1=1, dim2=2), n_tokens)
    assert float(transitions.lift.mean()) == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(transitions.conditional.sum(-1), torch.full((1, 6), 3.0).double())


def test_adding_is_counting_together() -> None:
    first, second = routes(0, 6, 4, 2), routes(1, 4, 4, 2)
    parts = [
        CoRouting.count(layers, torch.ones(2, len(layers[0]) // 2).bool(), 4) for layers in (first, second)
    ]
    keep = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 0]]).bool()
    whole = CoRouting.count([torch.cat(pair) for pair in zip(first, second, strict=True)], keep, 4)
    for name, tensor in vars(parts[0] + parts[1]).items():
        assert torch.equal(tensor, getattr(whole, name)), name


def test_a_single_layer_has_no_transitions() -> None:
    table = CoRouting.count(routes(0, 5, 4, 2, n_layers=1), torch.ones(1, 5).bool(), 4)
    assert table.transitions.shape == (0, 4, 4)
    table.check(counts_of(routes(0, 5, 4, 2, n_layers=1), 4), 5, 2)


def test_a_table_of_other_tokens_is_refused() -> None:
    layers = routes(0, 5, 4, 2)
    table = CoRouting.count(layers, torch.ones(1, 5).bool(), 4)
    with pytest.raises(DataError, match="does not belong"):
        table.check(counts_of(routes(1, 5, 4, 2), 4), 5, 2)
    with pytest.raises(DataError, match="int64"):
        CoRouting(table.coactivation.int(), table.transitions, table.overlaps, table.n_adjacent)


def test_pair_counts_of_known_tokens() -> None:
    (counts,) = pair_counts(torch.tensor([[[0, 1]]]), torch.tensor([[[2, 0]]]), 3).tolist()
    assert counts == [[1, 0, 1], [1, 0, 1], [0, 0, 0]]
