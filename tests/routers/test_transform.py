"""The steering transform against the paper's formulas in float64, and its guarantees."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lens.routers.plain import SoftmaxTopK
from moe_lens.routers.transform import steer_logits, steer_raw_logits
from moe_lens.steering.plan import EPSILON_RANGE

half_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
both_transforms = pytest.mark.parametrize("transform", [steer_logits, steer_raw_logits])


def formula(logits: Tensor, activate: list[int], deactivate: list[int], epsilon: float = 0.01) -> Tensor:
    """SteerMoE's equations in float64, one token and one expert at a time; -inf stays out of the minimum."""
    rows = []
    for z in logits.double().flatten(0, -2):
        log_sum = torch.log(torch.exp(z - z.max()).sum()) + z.max()
        rows.append(moved([float(value - log_sum) for value in z], activate, deactivate, epsilon))
    return torch.tensor(rows, dtype=torch.float64).reshape(logits.shape)


def moved(scores: list[float], activate: list[int], deactivate: list[int], epsilon: float) -> list[float]:
    """One token's scores with some raised above the largest and some lowered below the smallest."""
    highest, lowest = max(scores), min(value for value in scores if value > -float("inf"))
    steered = list(scores)
    for expert in activate:
        steered[expert] = highest + epsilon
    for expert in deactivate:  # after activation: deactivation wins
        steered[expert] = lowest - epsilon
    return steered


@half_dtypes
@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
@pytest.mark.parametrize(
    ("activate", "deactivate"),
    [([2], []), ([], [0, 5]), ([1, 4], [3]), ([2, 3], [3, 6]), ([], list(range(5)))],
)
def test_scores_equal_the_papers_formulas(
    dtype: torch.dtype, scale: float, activate: list[int], deactivate: list[int]
) -> None:
    z = scale * torch.randn(4, 9, 7, generator=torch.Generator().manual_seed(0))
    z = z.to(dtype)
    before = z.clone()
    got = steer_logits(z, activate, deactivate)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), formula(z, activate, deactivate), rtol=1e-6, atol=2e-6)
    assert torch.equal(z, before)


@pytest.mark.parametrize("epsilon", [0.001, 0.5, 20.0])
def test_epsilon_is_the_distance_in_nats(epsilon: float) -> None:
    z = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    got = steer_logits(z, [2], [3], epsilon)
    torch.testing.assert_close(got.double(), formula(z, [2], [3], epsilon), rtol=1e-6, atol=2e-6)


@both_transforms
def test_a_token_without_batch_dimensions_works_too(transform: Callable[..., Tensor]) -> None:
    z = torch.tensor([0.3, -1.0, 2.0])
    assert torch.equal(transform(z, [1], [2]), transform(z[None, None], [1], [2])[0, 0])


@half_dtypes
@pytest.mark.parametrize("epsilon", [0.01, 1.0, 30.0])
@pytest.mark.parametrize(
    ("activate", "deactivate"), [([2], []), ([], [0, 5]), ([1, 4], [3]), ([2, 3], [3, 6]), ([], [])]
)
def test_raw_logits_are_moved_and_all_others_kept_bit_for_bit(
    dtype: torch.dtype, epsilon: float, activate: list[int], deactivate: list[int]
) -> None:
    z = (5 * torch.randn(4, 9, 7, generator=torch.Generator().manual_seed(0))).to(dtype)
    before = z.clone()
    got = steer_raw_logits(z, activate, deactivate, epsilon)
    expected = [moved(token, activate, deactivate, epsilon) for token in z.double().flatten(0, 1).tolist()]
    others = [expert for expert in range(7) if expert not in activate + deactivate]
    assert got.dtype == torch.float32
    assert torch.equal(got[..., others], z[..., others].float())
    torch.testing.assert_close(got.flatten(0, 1).double(), torch.tensor(expected).double())
    assert torch.equal(z, before)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=3, max_size=8),
    st.floats(*EPSILON_RANGE),
)
def test_raw_logits_are_strictly_above_and_below_at_any_size(values: list[float], epsilon: float) -> None:
    z = torch.tensor(values)
    got = steer_raw_logits(z, [0], [1], epsilon)
    assert got[0] > z.max()
    assert got[1] < z.min()
    assert got.isfinite().all()
    assert torch.equal(got[2:], z[2:])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, list[int], list[int], SoftmaxTopK]:
    """Logits of 16 tokens, a plan that fits, and the rule; at least k experts stay finite and free."""
    n_experts = draw(st.integers(2, 12))
    k = draw(st.integers(1, n_experts))
    order = draw(st.permutations(range(n_experts)))
    n_deactivate = draw(st.integers(0, n_experts - k))
    n_activate = draw(st.integers(0, k))
    deactivate, activate = order[:n_deactivate], order[n_deactivate:][:n_activate]
    z = torch.randn(16, n_experts, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    z = z * draw(st.sampled_from([0.0, 0.01, 1.0, 30.0, 100.0, 1e4]))
    if draw(st.booleans()):
        z = z.round()  # ties
    free = [expert for expert in range(n_experts) if expert not in deactivate]
    for expert in free[k:] + deactivate:
        if draw(st.integers(0, 3)) == 0:
            z[::2, expert] = -torch.inf
    z = z.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    return z, activate, deactivate, SoftmaxTopK(n_experts, k, renormalize=draw(st.booleans()))


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([0.001, 0.01, 1.0, 50.0]))
def test_activated_experts_are_chosen_and_deactivated_ones_are_not(case: Any, epsilon: float) -> None:
    z, activate, deactivate, rule = case
    chosen = rule.select(steer_logits(z, activate, deactivate, epsilon))
    for row in chosen.tolist():
        assert set(activate) <= set(row)
        assert not set(deactivate) & set(row)


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from([0.01, 1.0, 50.0]))
def test_other_experts_keep_their_order_and_mostly_their_scores(case: Any, epsilon: float) -> None:
    z, activate, deactivate, _ = case
    others = [expert for expert in range(z.shape[-1]) if expert not in activate + deactivate]
    s = torch.log_softmax(z.float(), -1)
    got = steer_logits(z, activate, deactivate, epsilon)
    for before, after in zip(s[:, others], got[:, others], strict=True):
        above = before[:, None] > before[None, :]
        assert bool((after[:, None] > after[None, :])[above].all())
    exact = formula(z, activate, deactivate, epsilon)
    depth = (exact - exact.logsumexp(-1, keepdim=True)).masked_fill(exact == -torch.inf, 0)
    shallow = (depth > -59.9).all(-1)
    assert torch.equal(got[shallow][:, others], s[shallow][:, others])


@settings(max_examples=60, deadline=None)
@given(cases())
def test_nothing_becomes_nan_or_overflows(case: Any) -> None:
    z, activate, deactivate, rule = case
    got = steer_logits(z, activate, deactivate)
    assert not got.isnan().any()
    weights = rule.weigh(got, rule.select(got))
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()


@pytest.mark.parametrize("epsilon", EPSILON_RANGE)
@both_transforms
def test_the_guarantee_holds_at_the_ends_of_the_range_of_epsilon(
    transform: Callable[..., Tensor], epsilon: float
) -> None:
    z = torch.zeros(8, 6)  # one token of ties, seven without
    z[1:] = torch.randn(7, 6, generator=torch.Generator().manual_seed(0)) * 5
    rule = SoftmaxTopK(6, 1, renormalize=False)
    for expert in range(6):
        others = [other for other in range(6) if other != expert]
        assert rule.select(transform(z, [expert], [], epsilon)).tolist() == [[expert]] * 8
        assert rule.select(transform(z, [], others, epsilon)).tolist() == [[expert]] * 8


@half_dtypes
def test_gradients_reach_the_logits_as_in_the_formula(dtype: torch.dtype) -> None:
    z = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, theirs = z.clone().requires_grad_(), z.double().requires_grad_()
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    (steer_logits(ours, [2], [4]) * weight).sum().backward()
    s = torch.log_softmax(theirs, -1)
    rows = []
    for row in s:
        parts = [row[i] for i in range(6)]
        parts[2], parts[4] = row.max() + 0.01, row.min() - 0.01
        rows.append(torch.stack(parts))
    (torch.stack(rows) * weight).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert bool(ours.grad.abs().max() > 0.1)
    torch.testing.assert_close(
        ours.grad.double(), theirs.grad, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-5
    )


def test_raw_gradients_of_steered_logits_go_to_the_largest_and_the_smallest() -> None:
    z = torch.tensor([[0.5, 3.0, -2.0, 1.0]], requires_grad=True)
    (steer_raw_logits(z, [0], [3]) * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert z.grad is not None
    assert z.grad.tolist() == [[0.0, 1.0 + 10.0, 100.0 + 1000.0, 0.0]]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 12),
    st.floats(0, 30),
    st.sampled_from([1e-4, 0.01, 1.0, 30.0]),
    st.integers(0, 2**31),
)
def test_the_survivors_are_chosen_however_low_they_stand(
    n_experts: int, log_spread: float, epsilon: float, seed: int
) -> None:
    """As many deactivated as possible, the best ones: the k lowest remain, at any spread of the logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = 10**log_spread * torch.randn(32, n_experts, generator=generator)
    top_k = 1 + seed % (n_experts - 1)
    for token in logits:
        deactivate = token.argsort(descending=True)[: n_experts - top_k].tolist()
        steered = steer_logits(token[None], [], deactivate, epsilon)
        chosen = SoftmaxTopK(n_experts, top_k, renormalize=True).select(steered)[0].tolist()
        assert not set(chosen) & set(deactivate)


def test_an_expert_that_an_earlier_hook_ruled_out_stays_out() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 2.0, 0.5]])
    steered = steer_logits(logits, [], [1, 2])
    assert steered[0, 1] == -torch.inf
    assert set(SoftmaxTopK(4, 2, renormalize=True).select(steered)[0].tolist()) == {0, 3}
