"""The route of one prompt, against the cache."""

from collections.abc import Callable

import pytest
import torch

from moe_lens.errors import DataError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.statistics.collection import route_prompt
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan
from tests.tiny_models import prompt

RECIPES = ("olmoe", "qwen2_moe", "deepseek_v3")


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_is_what_the_cache_holds(hooked: Callable[..., HookedMoE], recipe: str) -> None:
    model, text = hooked(recipe), prompt(7)
    routing = route_prompt(model, text)
    _, cache = model.run_with_cache(text)
    assert [*routing.tokens[-7:]] == text.split()
    for row, layer in enumerate(model.moe_layers):
        assert torch.equal(routing.indices[row], cache["topk_indices", layer][0])
        assert torch.equal(routing.weights[row], cache["topk_weights", layer][0].float())


def test_the_top_expert_is_the_one_with_the_largest_weight(hooked: Callable[..., HookedMoE]) -> None:
    routing = route_prompt(hooked("qwen2_moe"), prompt(9))
    frame = routing.to_dataframe()
    for layer in routing.shape.layers:
        rows = frame[frame["layer"] == layer]
        expected = [
            max(zip(own["weight"], own["expert"], strict=True))[1]
            for own in (rows[rows["pos"] == pos] for pos in range(len(routing.tokens)))
        ]
        assert routing.top_expert(layer).tolist() == expected
    with pytest.raises(DataError, match="Layer 1 has no router"):
        routing.top_expert(1)


def test_under_hooks_it_is_the_steered_route(hooked: Callable[..., HookedMoE]) -> None:
    plan = SteeringPlan(activate=[(0, 4)], deactivate=[(1, 2)])
    routing = route_prompt(hooked("olmoe"), prompt(9), hooks=steer_hooks(plan))
    assert bool((routing.indices[0] == 4).any(-1).all())
    assert not bool((routing.indices[1] == 2).any())
    # the hooks are gone again:
    assert not torch.equal(routing.indices, route_prompt(hooked("olmoe"), prompt(9)).indices)


def test_one_prompt_only(hooked: Callable[..., HookedMoE]) -> None:
    with pytest.raises(DataError, match="one prompt"):
        route_prompt(hooked("olmoe"), [prompt(3), prompt(4)])
