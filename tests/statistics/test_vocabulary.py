"""Counts by token, the divergence from all tokens, and its null, against loops, scipy and known processes."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, entropy
from torch import Tensor

from moe_lens.errors import DataError
from moe_lens.shape import MoEShape
from moe_lens.statistics import vocabulary
from moe_lens.statistics.counts import TokenCounts
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.statistics.vocabulary import top_tokens, vocabulary_specialisation
from tests.text.test_spans import model_with
from tests.tiny_models import tokenizer


def stats_of(layers: list[Tensor], ids: Tensor, n_experts: int) -> RoutingStats:
    counts = torch.stack([torch.bincount(layer.flatten(), minlength=n_experts) for layer in layers])
    zeros = torch.zeros(counts.shape, dtype=torch.float64)
    shape = MoEShape("m", tuple(range(len(layers))), n_experts, layers[0].shape[1])
    table = TokenCounts.count(layers, ids, n_experts)
    return RoutingStats(shape, len(ids), counts, zeros, zeros, vocabulary=table)


def random_stats(
    seed: int, n_tokens: int = 60, n_vocab: int = 9, n_experts: int = 5, k: int = 2
) -> RoutingStats:
    generator = torch.Generator().manual_seed(seed)
    ids = (n_vocab * torch.rand(n_tokens, generator=generator) ** 2).long()
    layers = [torch.rand(n_tokens, n_experts, generator=generator).topk(k).indices for _ in range(2)]
    return stats_of(layers, ids, n_experts)


def table_of(stats: RoutingStats) -> TokenCounts:
    assert stats.vocabulary is not None
    return stats.vocabulary


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n_tokens=st.integers(1, 40))
def test_counts_and_sums_equal_loops(seed: int, n_tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(12, (n_tokens,), generator=generator)
    layers = [torch.rand(n_tokens, 4, generator=generator).topk(2).indices for _ in range(2)]
    expected = np.zeros((2, 4, 12))
    for row, layer in enumerate(layers):
        for token, experts in zip(ids.tolist(), layer.tolist(), strict=True):
            for expert in experts:
                expected[row, expert, token] += 1
    cut = n_tokens // 2
    whole = TokenCounts.count(layers, ids, 4, n_vocab=12)
    parts = [
        TokenCounts.count([layer[half] for layer in layers], ids[half], 4)
        for half in (slice(cut), slice(cut, None))
    ]
    added = parts[0] + parts[1] if cut else parts[1]
    for table in (whole, added):
        for row in range(2):
            dense = table.dense(row, 4)
            assert dense.tolist() == expected[row, :, : dense.shape[1]].tolist()
            assert not expected[row, :, dense.shape[1] :].any()
            for expert in range(4):
                assert torch.equal(table.of_expert(row, expert, 4), dense[expert])
    assert torch.equal(whole.keys, added.keys)
    assert whole.totals.tolist() == np.bincount(ids, minlength=12).tolist()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), n_tokens=st.integers(2, 60))
def test_the_divergence_is_scipys(seed: int, n_tokens: int) -> None:
    stats = random_stats(seed, n_tokens)
    found = vocabulary_specialisation(stats, n_draws=3)
    overall = table_of(stats).totals.numpy() / n_tokens
    for row in range(2):
        dense = table_of(stats).dense(row, 5).numpy()
        for expert, counts in enumerate(dense):
            if counts.sum() == 0:
                assert all(bool(x[row, expert].isnan()) for x in (found.divergence, found.expected, found.p))
            else:
                expected = entropy(counts, overall)
                assert float(found.divergence[row, expert]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.broad
def test_the_null_is_the_multinomial_of_each_size() -> None:
    """Mean and quantiles of the streams' running divergences against numpy's own multinomial draws."""
    totals = np.array([57, 30, 0, 12, 5, 2, 1])
    sizes = np.array([1, 7, 40, 300])
    ours = vocabulary._null(totals, sizes, 4000, seed=1, replacement=True)
    q = totals / totals.sum()
    generator = np.random.default_rng(2)
    for column, size in enumerate(sizes):
        theirs = np.array([entropy(x, q) for x in generator.multinomial(size, q, size=4000)])
        np.testing.assert_allclose(ours[:, column].mean(), theirs.mean(), rtol=0.05)
        for quantile in (0.5, 0.9, 0.95):
            np.testing.assert_allclose(
                np.quantile(ours[:, column], quantile), np.quantile(theirs, quantile), rtol=0.12
            )


def test_the_null_without_replacement_is_the_hypergeometric() -> None:
    totals, size = np.array([57, 30, 0, 12, 5, 2, 1]), 40
    ours = vocabulary._null(totals, np.array([size]), 4000, seed=1, replacement=False)[:, 0]
    drawn = np.random.default_rng(2).multivariate_hypergeometric(totals, size, size=4000)
    theirs = np.array([entropy(x, totals / totals.sum()) for x in drawn])
    np.testing.assert_allclose(ours.mean(), theirs.mean(), rtol=0.05)
    np.testing.assert_allclose(np.quantile(ours, 0.95), np.quantile(theirs, 0.95), rtol=0.12)


def rejection_rate(n_experts: int, null: str) -> float:
    """Share of experts with p ≤ 0.05 where routing knows nothing of the token (Zipf-like vocabulary)."""
    rejected, total = 0, 0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        ids = torch.from_numpy(np.minimum(generator.zipf(1.5, size=2000), 400))
        layers = [torch.from_numpy(generator.integers(n_experts, size=(2000, 1))) for _ in range(2)]
        stats = stats_of(layers, ids, n_experts)
        p = vocabulary_specialisation(stats, null=null, n_draws=99, seed=seed).p
        rejected, total = rejected + int((p <= 0.05).sum()), total + p.numel()
    return rejected / total


def test_the_false_positive_rate_is_the_nominal_one() -> None:
    """1,600 and 320 tests; draws are shared between the experts of one set, so the rates vary somewhat."""
    assert 0.03 <= rejection_rate(40, "permutation") <= 0.075
    assert 0.02 <= rejection_rate(8, "permutation") <= 0.09
    assert 0.015 <= rejection_rate(40, "multinomial") <= 0.065  # each expert has 1/40 of the tokens


def test_the_multinomial_null_is_conservative_for_an_expert_with_much_of_the_tokens() -> None:
    assert rejection_rate(8, "multinomial") < rejection_rate(8, "permutation")


def test_specialised_experts_are_found() -> None:
    generator = np.random.default_rng(0)
    ids = torch.from_numpy(generator.integers(30, size=1500))
    chosen = torch.from_numpy(generator.integers(6, size=(1500, 1)))
    chosen[ids < 3] = 0
    found = vocabulary_specialisation(stats_of([chosen], ids, 6))
    assert int(found.divergence[0].argmax()) == 0
    assert float(found.p[0, 0]) == pytest.approx(1 / 201)
    assert float(found.excess[0, 0]) > 0.2
    top = top_tokens(stats_of([chosen], ids, 6), 0, 0, n=3)
    assert sorted(top["token"]) == [0, 1, 2]
    assert top["rate"].tolist() == [1, 1, 1]


def test_the_same_seed_gives_the_same_numbers() -> None:
    first, second, other = (vocabulary_specialisation(random_stats(0), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.p, second.p)
    assert not torch.equal(first.expected, other.expected)
    assert first.to_dataframe().shape == (10, 6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_top_tokens_are_those_of_a_two_by_two_table(seed: int) -> None:
    stats = random_stats(seed)
    dense, totals = table_of(stats).dense(1, 5)[3].numpy(), table_of(stats).totals.numpy()
    frame = top_tokens(stats, 1, 3, n=100)
    lift = {}
    for token in np.flatnonzero(dense):
        inside = np.array([dense[token], totals[token] - dense[token]])
        outside = np.array([dense.sum(), stats.n_tokens - dense.sum()]) - inside
        if dense[token] / totals[token] > dense.sum() / stats.n_tokens:
            lift[token] = chi2_contingency([inside, outside], correction=False, lambda_="log-likelihood")[0]
    assert set(frame["token"]) == set(lift)
    np.testing.assert_allclose(frame["log_likelihood_ratio"], [lift[t] for t in frame["token"]], atol=1e-9)
    assert frame["log_likelihood_ratio"].is_monotonic_decreasing


def test_top_tokens_are_named_by_the_tokenizer() -> None:
    stats = random_stats(1)
    frame = top_tokens(stats, 0, 2, n=2, tokenizer=tokenizer())
    assert len(frame) == 2
    assert frame["text"].tolist() == [tokenizer().decode([token]) for token in frame["token"]]


def test_bytes_among_the_top_tokens_are_written_out() -> None:
    bytewise = model_with("bytes").tokenizer
    ids = bytewise("山 a", add_special_tokens=False)["input_ids"]
    chosen = torch.tensor([[0]] * 3 + [[1]] * (len(ids) - 3))  # expert 0 runs for the three bytes of 山
    texts = top_tokens(stats_of([chosen], torch.tensor(ids), 2), 0, 0, tokenizer=bytewise)["text"]
    assert sorted(texts) == ["<0xB1>", "<0xB1>", "<0xE5>"][-len(texts) :]


@pytest.mark.parametrize(("layer", "expert", "n"), [(2, 0, 3), (0, 5, 3), (0, -1, 3), (0, 0, 0), ("a", 0, 1)])
def test_what_does_not_exist_is_refused(layer: Any, expert: Any, n: Any) -> None:
    with pytest.raises((DataError, TypeError)):
        top_tokens(random_stats(0), layer, expert, n=n)


def test_statistics_without_a_vocabulary_are_refused() -> None:
    for call in (vocabulary_specialisation, lambda stats: top_tokens(stats, 0, 0)):
        with pytest.raises(DataError, match="vocabulary=True"):
            call(random_stats(0).without("vocabulary"))
    bad: list[dict[str, Any]] = [{"n_draws": 0}, {"seed": -1}, {"null": "normal"}]
    for settings_ in bad:
        with pytest.raises(DataError, match="must be"):
            vocabulary_specialisation(random_stats(0), **settings_)


def test_a_count_beyond_int32_is_refused() -> None:
    half = torch.tensor([2**31 - 1], dtype=torch.int32)
    table = TokenCounts(torch.tensor([0]), half, torch.tensor([2**31 - 1]))
    with pytest.raises(DataError, match="2\\^31"):
        _ = table + table
    with pytest.raises(DataError, match="Token ids"):
        TokenCounts.count([torch.tensor([[0]])], torch.tensor([-1]), 2)
