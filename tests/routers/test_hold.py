"""`Hold`: what two plans keep of each other, and what later hooks set free, against loops over tokens."""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lens.errors import HookError
from moe_lens.routers.biased import SigmoidTopK
from moe_lens.routers.groups import GroupLimit
from moe_lens.routers.hold import Hold
from moe_lens.routers.plain import SoftmaxTopK

N, K = 6, 2
PLAIN = SoftmaxTopK(N, K, renormalize=True)
GROUPED = SigmoidTopK(n_experts=N, top_k=K, groups=GroupLimit(3, 1, 2))
Wishes = list[list[int]]
"""For each token and expert 1 (in), 0 or -1 (out)."""


def hold_of(wishes: Wishes) -> Hold:
    masks = torch.tensor(wishes)
    return Hold(masks == 1, masks == -1)


def named(token: list[int], sign: int) -> list[int]:
    return [expert for expert, wish in enumerate(token) if wish == sign]


def possible_wishes(rule: Any) -> list[list[int]]:
    return [
        list(token)
        for token in product((-1, 0, 1), repeat=N)
        if rule.cannot_steer(named(list(token), 1), named(list(token), -1)) is None
    ]


def later_after_earlier(rule: Any, later: list[int], earlier: list[int]) -> list[int]:
    """One token, by the documented order: both, else what the earlier keeps out, else what it puts in."""
    if not any(later):
        return earlier
    left = [0 if new else old for new, old in zip(later, earlier, strict=True)]
    for kept in ((1, -1), (-1,), (1,), ()):
        both = [new or (old if old in kept else 0) for new, old in zip(later, left, strict=True)]
        if rule.cannot_steer(named(both, 1), named(both, -1)) is None:
            return both
    raise AssertionError("the later plan alone is always possible")


@pytest.mark.broad
@pytest.mark.parametrize("rule", [PLAIN, GROUPED], ids=["plain", "grouped"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_of_two_plans_each_token_has_the_later_one_and_what_fits_of_the_earlier(
    rule: Any, data: st.DataObject
) -> None:
    tokens = st.lists(st.sampled_from(possible_wishes(rule)), min_size=5, max_size=5)
    later, earlier = data.draw(tokens), data.draw(tokens)
    both = hold_of(later).after(hold_of(earlier), rule._possible)
    expected = [later_after_earlier(rule, new, old) for new, old in zip(later, earlier, strict=True)]
    assert both == hold_of(expected)


def test_scores_are_infinite_for_whom_it_holds_and_nobody_else() -> None:
    hold = Hold.of_experts([3], [1], 4).like(torch.zeros(2, 4)).on(torch.tensor([True, False]))
    inf = torch.inf
    assert hold.scores(torch.ones(2, 4)).tolist() == [[1, -inf, 1, inf], [1, 1, 1, 1]]
    assert hold.tokens.tolist() == [[True], [False]]


GIVEN = torch.tensor([[0.5, -1.25, 3.0, -2.0], [0.1, 0.2, 0.3, 0.4]])


def held_upon(logits: Tensor) -> list[list[int]]:
    """Which of expert 2 (in) and 3 (out) are still held, token by token."""
    hold = Hold.of_experts([2], [3], 4).like(GIVEN)
    hold = Hold(hold.inside, hold.outside, given=GIVEN).upon(logits)
    return [row.nonzero().flatten().tolist() for row in hold.inside | hold.outside]


@pytest.mark.parametrize(
    ("edit", "still_held"),
    [
        (lambda z: z, [2, 3]),
        (lambda z: z + 0.1, [2, 3]),
        (lambda z: z / 2, [2, 3]),
        (lambda z: z * -1, [2, 3]),
        (lambda z: z + torch.linspace(0.1, 0.4, 4), [2, 3]),
        (lambda z: z + torch.tensor([5.0, 0, 0, 0]), [2, 3]),
        (lambda z: z + torch.tensor([0, 0, 0.1, 0]), [3]),
        (lambda z: z + torch.tensor([0, 0, 0, -0.1]), [2]),
        (lambda z: z + torch.tensor([0, 7.0, 0.1, -0.1]), []),
        (lambda z: z.index_fill(-1, torch.tensor([2]), -torch.inf), [3]),
        (lambda z: z.index_fill(-1, torch.tensor([0]), -torch.inf), [2, 3]),
        (lambda z: z.bfloat16(), [2, 3]),
        (lambda z: z.half(), [2, 3]),
        (lambda z: z.bfloat16().float(), [2, 3]),
        (lambda z: z.half().float(), [2, 3]),
        (lambda z: z.half() + torch.tensor([0, 0, 0.25, 0]).half(), [3]),
        (lambda z: z + torch.tensor([0, 0, 1e-7, 0]), [2, 3]),
    ],
    ids=[
        "nothing", "shift", "temperature", "mirror", "dense", "another expert", "the activated one",
        "the deactivated one", "both", "minus infinity", "minus infinity elsewhere", "bfloat16", "float16",
        "bfloat16 and back", "float16 and back", "float16 and one", "rounding",
    ],
)  # fmt: skip
def test_a_later_edit_frees_experts_only_where_it_is_about_them(edit: Any, still_held: list[int]) -> None:
    assert held_upon(edit(GIVEN)) == [still_held] * 2
    one = torch.cat([edit(GIVEN)[:1].float(), GIVEN[1:]])  # on one token
    assert held_upon(one) == [still_held, [2, 3]]


def test_an_expert_that_stays_at_minus_infinity_says_nothing() -> None:
    """A shift of all logits cannot move it."""
    given_logits = torch.tensor([[-torch.inf, 1.0, 2.0, 0.0]])
    hold = Hold.of_experts([2], [3], 4).like(given_logits)
    hold = Hold(hold.inside, hold.outside, given=given_logits)
    assert hold.upon(given_logits + 1) == hold
    lifted = given_logits.clone()
    lifted[:, 2] += 1
    assert hold.upon(lifted).inside.any().item() is False


@pytest.mark.parametrize(
    ("edit", "still_held"),
    [
        (lambda z: z + torch.linspace(-2, 2, 9), [2, 3]),  # 0 in the middle
        (lambda z: z / 2, [2, 3]),  # 0 stays 0
        (lambda z: z + torch.tensor([1.0] * 7 + [0, 0]), [2, 3]),
        (lambda z: z + torch.tensor([1.0] * 6 + [0, 0, 0]), []),
        (lambda z: z.masked_fill(torch.arange(9) < 8, -torch.inf), []),
        (lambda z: torch.full_like(z, -torch.inf), [2, 3]),
    ],
    ids=["dense vector", "temperature", "two of nine stay", "three stay", "all but one out", "all out"],
)
def test_an_edit_of_nearly_all_logits_is_about_nobody(edit: Any, still_held: list[int]) -> None:
    given_logits = torch.tensor([[1.5, 0.0, 2.5, -3.0, 1.0, 0.5, -1.0, -2.0, 0.25]])
    hold = Hold.of_experts([2], [3], 9).like(given_logits)
    hold = Hold(hold.inside, hold.outside, given=given_logits).upon(edit(given_logits))
    assert (hold.inside | hold.outside)[0].nonzero().flatten().tolist() == still_held


def test_unwatched_logits_free_nobody() -> None:
    hold = Hold.of_experts([2], [3], 4).like(GIVEN)
    assert hold.upon(GIVEN * torch.tensor([1.0, 1, 9, 1])) == hold


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True), st.integers(0, 10**6))
def test_parts_of_a_hold_are_those_of_its_tokens(numbers: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(-1, 2, (3, 4, N), generator=generator)
    scale, given_logits = torch.rand(3, 4, 1, generator=generator), torch.rand(3, 4, N, generator=generator)
    hold = Hold(masks == 1, masks == -1, given=given_logits, scale=scale)
    tokens = torch.tensor(numbers)
    part = hold.at(tokens)
    back = part.spread(tokens, (3, 4))
    for number in range(12):
        row, column = divmod(number, 4)
        if number in numbers:
            at = numbers.index(number)
            assert torch.equal(part.inside[at], hold.inside[row, column])
            assert torch.equal(back.outside[row, column], hold.outside[row, column])
            assert float(back.scale[row, column]) == float(scale[row, column])  # type: ignore[index]
        else:
            assert not bool((back.inside | back.outside)[row, column].any())
            assert float(back.scale[row, column]) == 1  # type: ignore[index]
    on = torch.zeros(3, 4, dtype=torch.bool)
    on.view(-1)[tokens] = True
    assert back.elsewhere(on, hold) == hold


def test_logits_of_other_tokens_are_refused() -> None:
    steered, rule = PLAIN.steer(torch.zeros(4, N), [1], [2], 0.01)
    with pytest.raises(HookError, match=r"tokens of shape \(4,\)"):
        rule.select(steered[:2])
