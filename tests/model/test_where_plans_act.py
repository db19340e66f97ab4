"""A plan at positions acts on the tokens that it names, however a forward is called, or is refused.

Oracle: an expert that the router never chooses by itself; it runs exactly where the plan activates it, which
plain hooks on Hugging Face's experts see.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import HookedMoE, SteeringPlan, steered
from moe_lens.errors import HookError
from tests.tiny_models import tiny_model, tokenizer, tokens

NEVER = 3
PLAN = SteeringPlan(activate=[(0, NEVER)])
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def model_without_expert() -> Any:
    """A model whose routers never choose one of the experts by themselves."""
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.bias[NEVER] = -1e4
    return model


@contextmanager
def seeing(model: Any) -> Iterator[list[list[int]]]:
    """Forward by forward, on which tokens, row after row, the expert runs in layer 0."""
    seen: list[list[int]] = []

    def see(experts: Any, args: Any, kwargs: Any) -> None:
        indices = next(each for each in (*args, *kwargs.values()) if not each.is_floating_point())
        seen.append((indices == NEVER).any(-1).flatten().long().tolist())

    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def flat(*rows: list[int]) -> list[int]:
    return [token for row in rows for token in row]


def by_name(model: Any, given: Tensor, mask: Tensor) -> None:
    model(input_ids=given, attention_mask=mask)


def by_position(model: Any, given: Tensor, mask: Tensor) -> None:
    model(given, mask)


def decoder_alone(model: Any, given: Tensor, mask: Tensor) -> None:
    model.model(given, mask)


def itself(model: Any) -> Any:
    return model


def in_a_bridge(model: Any) -> Any:
    return HookedMoE.from_hf(model, tokenizer())


@pytest.mark.parametrize(
    ("call", "wrap"),
    [(by_name, itself), (by_position, itself), (decoder_alone, itself), (by_position, in_a_bridge)],
)
def test_arguments_count_however_they_are_given(
    call: Callable[..., None], wrap: Callable[[Any], Any]
) -> None:
    model = model_without_expert()
    target = wrap(model)
    with steered(target, PLAN, positions=0), seeing(model) as seen:
        call(model, tokens(2, 6), PADDED)
    assert seen == [flat([0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0])]


def test_a_cache_given_by_position_counts() -> None:
    model, given = model_without_expert(), tokens(1, 4)
    past = model(given, use_cache=True).past_key_values
    for positions, acts in (("generated", [1]), ("prompt", [0])):
        with steered(model, PLAN, positions=positions), seeing(model) as seen:
            model(given[:, :1], torch.ones(1, 5, dtype=torch.long), None, copy.deepcopy(past))
        assert seen == [acts]


def test_places_under_a_mask_of_another_form_are_refused() -> None:
    model, given = model_without_expert(), tokens(2, 6)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    mask = causal & PADDED.bool()[:, None, None, :]
    numbers = (PADDED.cumsum(1) - 1).clamp(min=0)
    with (
        steered(model, PLAN, positions=0),
        pytest.raises(HookError, match=r"mask .*not \[batch total\].*Pass"),
    ):
        model(given, attention_mask=mask, position_ids=numbers)
    columns = torch.tensor([[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
    for positions, acts in (("prompt", [1] * 12), (columns, columns.long().flatten().tolist())):
        with steered(model, PLAN, positions=positions), seeing(model) as seen:
            model(given, attention_mask=mask, position_ids=numbers)
        assert seen == [acts]
