"""risk_difference against exact fractions, and the order, the table and the refusals of ExpertScores."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.detection.expert_scores import ExpertScores, risk_difference
from moe_lens.errors import DataError
from moe_lens.shape import MoEShape
from moe_lens.statistics.routing_stats import RoutingStats

SHAPE = MoEShape("m", (1, 4), 5, 2)
seeds, sizes = st.integers(0, 10**6), st.integers(1, 40)


def stats(seed: int, n_tokens: int = 7, shape: MoEShape = SHAPE) -> RoutingStats:
    """Random routes: k different experts a token and layer, counted one by one."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(len(shape.layers), shape.n_experts, dtype=torch.int64)
    for row in range(len(shape.layers)):
        for _ in range(n_tokens):
            counts[row, torch.randperm(shape.n_experts, generator=generator)[: shape.top_k]] += 1
    sums = torch.rand(counts.shape, dtype=torch.float64, generator=generator)
    return RoutingStats(shape, n_tokens, counts, sums, sums)


def with_delta(delta: list[list[float]]) -> ExpertScores:
    return ExpertScores(torch.tensor(delta, dtype=torch.float64), stats(0), stats(1))


@settings(max_examples=40, deadline=None)
@given(seeds, seeds, sizes, st.integers(1, 3))
def test_equal_differences_tie(seed_1: int, seed_2: int, n_1: int, times: int) -> None:
    n_2 = times * n_1
    first, second = stats(seed_1, n_1), stats(seed_2, n_2)
    exact = [
        Fraction(int(a), n_1) - Fraction(int(b), n_2)
        for a, b in zip(first.counts.flatten(), second.counts.flatten(), strict=True)
    ]
    delta = risk_difference(first, second).delta.flatten().tolist()
    assert len(set(delta)) == len(set(exact))
    assert sorted(range(len(exact)), key=exact.__getitem__) == sorted(
        range(len(exact)), key=delta.__getitem__
    )


@settings(max_examples=40, deadline=None)
@given(seeds, seeds, sizes, sizes)
def test_delta_is_the_difference_of_the_rates(seed_1: int, seed_2: int, n_1: int, n_2: int) -> None:
    first, second = stats(seed_1, n_1), stats(seed_2, n_2)
    delta = risk_difference(first, second).delta
    assert delta.dtype == torch.float64
    for row in range(2):
        for expert in range(5):
            exact = Fraction(int(first.counts[row, expert]), n_1) - Fraction(
                int(second.counts[row, expert]), n_2
            )
            assert abs(Fraction(float(delta[row, expert])) - exact) < Fraction(1, 10**15)
            assert -1 <= float(delta[row, expert]) <= 1


@settings(max_examples=20, deadline=None)
@given(seeds, seeds, sizes, sizes)
def test_swapping_the_conditions_negates(seed_1: int, seed_2: int, n_1: int, n_2: int) -> None:
    first, second = stats(seed_1, n_1), stats(seed_2, n_2)
    scores, swapped = risk_difference(first, second), risk_difference(second, first)
    assert torch.equal(scores.delta, -swapped.delta)
    assert torch.equal((-scores).delta, swapped.delta)
    assert ((-scores).stats_1, (-scores).stats_2) == (second, first)
    back = -swapped
    assert torch.equal(back.delta, scores.delta)


@settings(max_examples=10, deadline=None)
@given(seeds, sizes)
def test_a_condition_against_itself_is_zero(seed: int, n_tokens: int) -> None:
    assert not risk_difference(stats(seed, n_tokens), stats(seed, n_tokens)).delta.any()


def test_extreme_routes_reach_one_and_minus_one() -> None:
    sums = torch.zeros(1, 2, dtype=torch.float64)
    shape = MoEShape("m", (0,), 2, 1)
    first = RoutingStats(shape, 3, torch.tensor([[3, 0]]), sums, sums)
    second = RoutingStats(shape, 8, torch.tensor([[0, 8]]), sums, sums)
    assert risk_difference(first, second).delta.tolist() == [[1.0, -1.0]]


def test_ranked_goes_by_size_whatever_the_sign_and_ties_keep_layer_and_expert_order() -> None:
    ranked = with_delta([[0.1, -0.3, 0.0, 0.3, 0.0], [0.3, -0.5, 0.0, -0.1, 0.2]]).ranked()
    assert [tuple(score) for score in ranked] == [
        (4, 1, -0.5),
        (1, 1, -0.3),
        (1, 3, 0.3),
        (4, 0, 0.3),
        (4, 4, 0.2),
        (1, 0, 0.1),
        (4, 3, -0.1),
        (1, 2, 0.0),
        (1, 4, 0.0),
        (4, 2, 0.0),
    ]


@settings(max_examples=20, deadline=None)
@given(seeds, seeds)
def test_ranked_names_every_expert_once_with_its_delta(seed_1: int, seed_2: int) -> None:
    scores = risk_difference(stats(seed_1), stats(seed_2, 11))
    ranked = scores.ranked()
    assert sorted(score[:2] for score in ranked) == [(layer, e) for layer in (1, 4) for e in range(5)]
    assert all(score.delta == scores.delta[(1, 4).index(score.layer), score.expert] for score in ranked)
    sizes = [abs(score.delta) for score in ranked]
    assert sizes == sorted(sizes, reverse=True)


def test_the_data_frame_holds_what_is_behind_each_delta() -> None:
    first, second = stats(3, 7), stats(4, 9)
    frame = risk_difference(first, second).to_dataframe()
    names = ["rate", "count", "n_tokens"]
    assert list(frame) == ["layer", "expert", "delta", *[f"{name}_{i}" for i in (1, 2) for name in names]]
    assert len(frame) == 10
    assert [tuple(row) for row in frame[["layer", "expert", "delta"]].itertuples(index=False)] == [
        tuple(score) for score in risk_difference(first, second).ranked()
    ]
    for row in frame.to_dict("records"):
        place = (1, 4).index(row["layer"]), row["expert"]
        assert (row["count_1"], row["n_tokens_1"]) == (int(first.counts[place]), 7)
        assert (row["count_2"], row["n_tokens_2"]) == (int(second.counts[place]), 9)
        assert row["rate_1"] == row["count_1"] / 7
        assert row["rate_2"] == row["count_2"] / 9
        assert row["delta"] == pytest.approx(row["rate_1"] - row["rate_2"], abs=1e-15)


@pytest.mark.parametrize(
    ("differs", "shape"),
    [
        ("model 'm' / 'other'", MoEShape("other", (1, 4), 5, 2)),
        ("layers", MoEShape("m", (1, 3), 5, 2)),
        ("n_experts 5 / 6", MoEShape("m", (1, 4), 6, 2)),
        ("top_k 2 / 3", MoEShape("m", (1, 4), 5, 3)),
    ],
)
def test_statistics_that_do_not_belong_together_are_refused(differs: str, shape: MoEShape) -> None:
    with pytest.raises(DataError, match=differs):
        risk_difference(stats(0), stats(0, shape=shape))
