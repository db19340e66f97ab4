"""Load balance and domain specialisation against formulas written differently, and scipy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from moe_lens.errors import DataError
from moe_lens.shape import MoEShape
from moe_lens.statistics.balance import domain_specialisation, load_balance
from moe_lens.statistics.routing_stats import RoutingStats


def stats_of(counts: Any, n_tokens: int, top_k: int = 1, model: str = "m") -> RoutingStats:
    table = torch.as_tensor(counts)
    zeros = torch.zeros(table.shape, dtype=torch.float64)
    shape = MoEShape(model, tuple(range(len(table))), table.shape[1], top_k)
    return RoutingStats(shape, n_tokens, table, zeros, zeros)


def random_stats(seed: int, n_experts: int, n_tokens: int, n_layers: int = 2) -> RoutingStats:
    generator = np.random.default_rng(seed)
    rates = generator.dirichlet(np.ones(n_experts) / 2)
    return stats_of(generator.multinomial(n_tokens, rates, size=n_layers), n_tokens)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), n_experts=st.integers(2, 70), n_tokens=st.integers(1, 300))
def test_balance_equals_other_formulas(seed: int, n_experts: int, n_tokens: int) -> None:
    stats = random_stats(seed, n_experts, n_tokens)
    balance = load_balance(stats)
    for row, counts in enumerate(stats.counts.numpy().astype(float)):
        differences = np.abs(
            counts[:, None] - counts[None, :]
        ).mean()  # Gini: half the relative mean difference
        assert float(balance.gini[row]) == pytest.approx(differences / 2 / counts.mean(), abs=1e-12)
        assert float(balance.normalised_entropy[row]) == pytest.approx(
            entropy(counts, base=n_experts), abs=1e-12
        )
        assert float(balance.max_over_mean[row]) == pytest.approx(counts.max() / counts.mean())
        for percent, share in ((1, balance.top_1), (5, balance.top_5), (10, balance.top_10)):
            busiest = sorted(counts)[::-1][: max(1, math.ceil(percent * n_experts / 100 - 1e-9))]
            assert float(share[row]) == pytest.approx(sum(busiest) / n_tokens)
    assert 0 <= float(balance.gini.min()) <= float(balance.gini.max()) < 1
    assert float(balance.normalised_entropy.max()) <= 1


def test_the_extremes() -> None:
    equal = load_balance(stats_of([[5, 5, 5, 5]], 20))
    assert (float(equal.gini), float(equal.normalised_entropy), float(equal.max_over_mean)) == (0, 1, 1)
    one = load_balance(stats_of([[0, 20, 0, 0]], 20))
    assert (float(one.gini), float(one.normalised_entropy), float(one.max_over_mean)) == (0.75, 0, 4)
    assert float(one.top_1) == 1
    single = load_balance(stats_of([[20]], 20))
    assert (float(single.gini), float(single.normalised_entropy)) == (0, 1)


def test_the_busiest_percent_is_rounded_up_exactly() -> None:
    """1 % of 700 experts are 7, though 0.01 · 700 > 7 in floating point."""
    balance = load_balance(stats_of([[1] * 700], 700))
    assert float(balance.top_1) == pytest.approx(7 / 700)
    assert float(load_balance(stats_of([[1] * 701], 701)).top_1) == pytest.approx(8 / 701)


def test_the_table_has_a_row_a_layer() -> None:
    frame = random_stats(0, 8, 50, n_layers=3).load_balance().to_dataframe()
    assert frame["layer"].tolist() == [0, 1, 2]
    assert frame.columns.tolist()[1:4] == ["normalised_entropy", "gini", "max_over_mean"]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), n_experts=st.integers(2, 40), n_tokens=st.integers(1, 300))
def test_two_groups_diverge_as_scipy_says(seed: int, n_experts: int, n_tokens: int) -> None:
    a, b = random_stats(seed, n_experts, n_tokens), random_stats(seed + 1, n_experts, 2 * n_tokens)
    found = domain_specialisation({"a": a, "b": b})
    expected = [jensenshannon(x, y) ** 2 for x, y in zip(a.counts.numpy(), b.counts.numpy(), strict=True)]
    np.testing.assert_allclose(found.divergence, np.nan_to_num(expected), atol=1e-7)
    torch.testing.assert_close(found.pairwise[:, 0, 1], found.divergence)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n_groups=st.integers(2, 6), weights=st.sampled_from(["equal", "tokens"]))
def test_many_groups_diverge_by_the_mean_kl_to_the_mixture(seed: int, n_groups: int, weights: str) -> None:
    groups = {f"g{n}": random_stats(seed + n, 9, 40 + 30 * n) for n in range(n_groups)}
    found = domain_specialisation(groups, weights=weights)
    shares = np.stack([group.counts.numpy() / group.n_tokens for group in groups.values()])
    sizes = np.array([1 if weights == "equal" else group.n_tokens for group in groups.values()])
    w = sizes / sizes.sum()
    mixture = np.einsum("g,gle->le", w, shares)
    expected = sum(w[g] * entropy(shares[g], mixture, axis=-1) for g in range(n_groups))
    np.testing.assert_allclose(found.divergence, expected, atol=1e-12)
    assert bool((found.contributions >= 0).all())
    assert float(found.divergence.max()) <= math.log(n_groups) + 1e-12
    if weights == "equal":
        for i in range(n_groups):
            for j in range(n_groups):
                two = [jensenshannon(x, y) ** 2 for x, y in zip(shares[i], shares[j], strict=True)]
                np.testing.assert_allclose(found.pairwise[:, i, j], np.nan_to_num(two), atol=1e-7)


def test_groups_alike_and_groups_apart() -> None:
    a, b = stats_of([[3, 1, 0, 0]], 4), stats_of([[0, 0, 5, 5]], 10)
    assert float(domain_specialisation({"a": a, "b": b}).divergence) == pytest.approx(math.log(2))
    assert float(domain_specialisation({"a": a, "b": a}).divergence) == pytest.approx(0, abs=1e-15)
    shares = domain_specialisation({"a": a, "b": b}).to_dataframe()["share_of_layer"].to_numpy()
    assert shares.sum() == pytest.approx(1)


def test_what_cannot_be_compared_is_refused() -> None:
    a, other = stats_of([[3, 1]], 4), stats_of([[3, 1]], 4, model="other")
    for groups in ({"a": a}, {}, {"a": a, "b": other}, {"a": a, "b": None}, [a, a]):
        with pytest.raises((DataError, TypeError)):
            domain_specialisation(groups)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="'a' and 'b'"):
        domain_specialisation({"a": a, "b": other})
    with pytest.raises(DataError, match="weights"):
        domain_specialisation({"a": a, "b": a}, weights="prompts")
