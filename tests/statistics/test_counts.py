"""Counts by prompt and by position: dtypes, merging, and what is read from a cache."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from moe_lens.errors import DataError
from moe_lens.statistics.counts import PositionCounts, PromptCounts, compact, counts_by_group, router_entropy


def prompt_counts(seed: int, lengths: list[int], n_experts: int = 5, k: int = 2) -> PromptCounts:
    generator = torch.Generator().manual_seed(seed)
    prompt_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    layers = [torch.rand(len(prompt_of), n_experts, generator=generator).topk(k).indices for _ in range(2)]
    sums = [torch.rand(len(lengths), n_experts, generator=generator) for _ in range(2)]
    return PromptCounts.count(layers, sums, prompt_of)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n_tokens=st.integers(1, 20), n_groups=st.integers(1, 4))
def test_counts_by_group_equal_a_loop(seed: int, n_tokens: int, n_groups: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(n_groups, (n_tokens,), generator=generator)
    layers = [torch.rand(n_tokens, 4, generator=generator).topk(2).indices for _ in range(3)]
    expected = np.zeros((n_groups, 3, 4))
    for row, layer in enumerate(layers):
        for token, experts in enumerate(layer.tolist()):
            for expert in experts:
                expected[int(group[token]), row, expert] += 1
    assert counts_by_group(layers, group, n_groups, 4).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(255, torch.uint8), (256, torch.int16), (32767, torch.int16), (32768, torch.int32), (0, torch.uint8)],
)
def test_counts_take_the_smallest_dtype_that_holds_them(largest: int, dtype: torch.dtype) -> None:
    counts = torch.tensor([0, largest])
    assert compact(counts).dtype == dtype
    assert compact(counts).tolist() == [0, largest]


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=3), min_size=3, max_size=3))
def test_adding_appends_prompts_whatever_their_dtypes(lengths: list[list[int]]) -> None:
    a, b, c = (prompt_counts(seed, part) for seed, part in enumerate(lengths))
    left, right = (a + b) + c, a + (b + c)
    for name, tensor in vars(left).items():
        assert torch.equal(tensor, getattr(right, name))
        assert tensor.dtype == getattr(right, name).dtype
    assert left.n_tokens.tolist() == [length for part in lengths for length in part]
    assert left.counts.dtype == compact(left.counts.long()).dtype
    assert torch.equal(left.counts[: len(lengths[0])].long(), a.counts.long())
    total = left.counts.long().sum(0)
    left.check(total, int(left.n_tokens.sum()), 2)


def test_a_table_of_other_prompts_is_refused() -> None:
    table = prompt_counts(0, [3, 4])
    total = table.counts.long().sum(0)
    for counts, n_tokens, k in ((total.flip(1) + torch.arange(5), 7, 2), (total, 8, 2), (total, 7, 1)):
        with pytest.raises(DataError, match="PromptCounts"):
            table.check(counts, n_tokens, k)
    with pytest.raises(DataError, match="int64"):
        PromptCounts(table.n_tokens, table.counts.long(), table.probability_sums)
    with pytest.raises(DataError, match="finite"):
        PromptCounts(table.n_tokens, table.counts, table.probability_sums * torch.nan)


def test_positions_of_prompts_of_unequal_lengths_add() -> None:
    long = PositionCounts.count([torch.tensor([[0], [1], [1]])], torch.tensor([0, 1, 2]), 2)
    short = PositionCounts.count([torch.tensor([[1], [1]])], torch.tensor([0, 1]), 2)
    for total in (long + short, short + long):
        assert total.n_tokens.tolist() == [2, 2, 1]
        assert total.counts[:, 0].tolist() == [[1, 1], [0, 2], [0, 1]]
        assert total.counts.dtype == torch.int32
    assert (long + short).rates[:, 0, 1].tolist() == [0.5, 1.0, 1.0]


def test_a_position_where_nothing_counts_has_no_rate() -> None:
    table = PositionCounts.count([torch.tensor([[0]])], torch.tensor([1]), 2)
    assert table.rates[:, 0].isnan().tolist() == [[True, True], [False, False]]


@settings(max_examples=50, deadline=None)
@given(
    logits=st.lists(st.lists(st.floats(-30, 30), min_size=4, max_size=4), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_router_entropy_is_scipys(logits: Any, dtype: torch.dtype) -> None:
    values = torch.tensor(logits, dtype=dtype)
    expected = entropy(np.exp(values.double().numpy()), axis=-1)
    found = router_entropy(values)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_router_entropy_of_masked_experts() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf], [0.0, -torch.inf, -torch.inf, -torch.inf]])
    np.testing.assert_allclose(router_entropy(logits), [np.log(2), 0], atol=1e-7)
