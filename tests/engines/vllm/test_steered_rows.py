"""Rows under different plans in one tensor: each as the library's own transform steers it alone."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lens.engines.vllm.steered_rows import steered_rows
from moe_lens.routers.transform import soften, steer_logits

N_EXPERTS, TOP_K = 12, 3
PLANS = [([], []), ([0, 5], []), ([], [1, 2, 3, 4, 6, 7, 8, 9, 10]), ([11], [0, 1]), ([3, 4, 5], [6])]


def tables(plans: list[tuple[list[int], list[int]]]) -> Tensor:
    sign = torch.zeros(len(plans), N_EXPERTS, dtype=torch.int8)
    for row, (activate, deactivate) in enumerate(plans):
        sign[row, activate], sign[row, deactivate] = 1, -1
    return sign


def column(value: float, n_rows: int) -> Tensor:
    return torch.full((n_rows, 1), value)


def logits_of(seed: int, scale: float, n_rows: int = len(PLANS)) -> Tensor:
    return torch.randn(n_rows, N_EXPERTS, generator=torch.Generator().manual_seed(seed)) * scale


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-3, 1.0, 10.0, 60.0, 300.0, 5e3]),
    epsilon=st.sampled_from([1e-4, 0.01, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_plan_holds_on_every_row_and_others_keep_their_order(
    seed: int, scale: float, epsilon: float, dtype: torch.dtype
) -> None:
    logits = logits_of(seed, scale).to(dtype)
    steered = steered_rows(logits, tables(PLANS), column(epsilon, 5), column(torch.inf, 5))
    assert steered.dtype == dtype
    chosen = torch.softmax(steered.float(), dim=-1).topk(TOP_K).indices
    for row, (activate, deactivate) in enumerate(PLANS):
        mine = set(chosen[row].tolist())
        assert set(activate) <= mine
        assert not set(deactivate) & mine
        others = [e for e in range(N_EXPERTS) if e not in activate + deactivate]
        before, after = logits[row, others].float(), steered[row, others].float()
        assert bool((after[before.argsort()].diff() >= 0).all())
    assert torch.equal(steered[0], logits[0])


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.5, 3.0, 8.0]))
def test_probabilities_are_those_of_the_librarys_transform(seed: int, scale: float) -> None:
    logits = logits_of(seed, scale)
    steered = steered_rows(logits, tables(PLANS), column(0.01, 5), column(torch.inf, 5))
    for row, (activate, deactivate) in enumerate(PLANS):
        alone = steer_logits(logits[row], activate, deactivate, 0.01)
        torch.testing.assert_close(steered[row].softmax(-1), alone.softmax(-1), rtol=1e-4, atol=1e-7)


def test_far_logits_are_chosen_as_the_librarys_transform_chooses() -> None:
    logits = logits_of(3, 1.0)
    logits[:, ::2] -= 400.0
    steered = steered_rows(logits, tables(PLANS), column(0.01, 5), column(torch.inf, 5))
    for row, (activate, deactivate) in enumerate(PLANS):
        alone = steer_logits(logits[row], activate, deactivate, 0.01)
        if activate or deactivate:
            assert set(steered[row].softmax(-1).topk(TOP_K).indices.tolist()) == set(
                alone.softmax(-1).topk(TOP_K).indices.tolist()
            )


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), strength=st.sampled_from([0.0, 0.5, 4.0]))
def test_the_soft_form_is_the_librarys(seed: int, strength: float) -> None:
    logits, sign = logits_of(seed, 2.0), tables(PLANS)
    steered = steered_rows(logits, sign, column(0.01, 5), column(strength, 5))
    torch.testing.assert_close(steered, soften(logits, sign > 0, sign < 0, strength), rtol=1e-5, atol=1e-6)
    assert torch.equal(steered[sign == 0], logits[sign == 0])


def test_rows_do_not_see_each_other() -> None:
    logits = logits_of(1, 2.0)
    epsilon = torch.tensor([[0.01], [0.5], [0.01], [3.0], [0.1]])
    strength = torch.tensor([[torch.inf], [2.0], [torch.inf], [0.5], [torch.inf]])
    together = steered_rows(logits, tables(PLANS), epsilon, strength)
    for row in range(5):
        one = slice(row, row + 1)
        alone = steered_rows(logits[one], tables(PLANS)[one], epsilon[one], strength[one])
        assert torch.equal(alone, together[one])


@pytest.mark.parametrize("n_rows", [1, 4])
def test_it_is_traced_without_a_break(n_rows: int) -> None:
    torch._dynamo.reset()
    plain = inspect.unwrap(steered_rows)  # the checks of shapes in tests are not traced
    compiled = torch.compile(plain, fullgraph=True, backend="eager")
    logits, sign = logits_of(2, 2.0, n_rows), tables(PLANS[:n_rows])
    for step in range(3):  # the tables change in place, the graph stays
        sign.copy_(sign.roll(1, 1))
        given = (logits + step, sign, column(0.01, n_rows), column(torch.inf, n_rows))
        assert torch.equal(compiled(*given), steered_rows(*given))
